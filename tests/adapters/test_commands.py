"""python -m fastlora resize, combine, export-gguf: the functions, or one line that says why not."""

import pytest
from adapters import by_peft, llama
from safetensors.torch import load_file

import fastlora
from fastlora.__main__ import main
from fastlora.model.files import WEIGHTS


def test_commands_are_the_functions(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = by_peft(tmp_path / "a", target_modules=["v_proj"], r=4)
    llama().config.save_pretrained("base")
    for name in ("resize a --rank 2 --output b --plot b.png", "resize a"):
        assert main(name.split()) == 0
    reports = fastlora.resize_adapter(folder, rank=2), fastlora.resize_adapter(folder)
    assert capsys.readouterr().out == "".join(f"{report}\n" for report in reports)
    assert (
        main(["combine", "a", "b", "--weights", "1", "-0.5", "--output", "c", "--rank", "3"]) == 0
    )
    sizes = {tuple(tensor.shape) for tensor in load_file(tmp_path / "c" / WEIGHTS).values()}
    assert sizes == {(3, 64), (32, 3)}
    with pytest.raises(SystemExit) as stop:
        main(["resize", "none"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("python -m fastlora resize: none/adapter_config")
    pytest.importorskip("gguf", reason="needs the gguf package")
    assert main(["export-gguf", "a", "a.gguf", "--model-config", "base", "--dtype", "f16"]) == 0
    fastlora.export_gguf(folder, "b.gguf", model_config=llama().config, dtype="f16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
