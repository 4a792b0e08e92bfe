"""python -m fastlora resize, combine, export-gguf: equal to the functions, or a one-line error."""

import pytest
from peft_models import by_peft, llama
from safetensors.torch import load_file

import fastlora
from fastlora.__main__ import main
from fastlora.packing.files import WEIGHTS


def test_commands_are_the_functions(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = by_peft(tmp_path / "a", target_modules=["v_proj"], r=4)
    llama().config.save_pretrained("base")
    for name in ("resize a --rank 2 --output b", "resize a"):
        assert main(name.split()) == 0
    reports = fastlora.resize_adapter(folder, rank=2), fastlora.resize_adapter(folder)
    assert capsys.readouterr().out == f"{reports[0]}\nwritten: b\n{reports[1]}\n"
    sides = ["a", "b", "--weights", "1", "-0.5"]
    assert main(["combine", *sides, "--output", "c", "--rank", "3"]) == 0
    assert "written: c\n" in capsys.readouterr().out
    found = load_file(tmp_path / "c" / WEIGHTS)
    assert {tuple(tensor.shape) for tensor in found.values()} == {(3, 64), (32, 3)}
    with pytest.raises(SystemExit) as stop:
        main(["resize", "none"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("python -m fastlora resize: none/adapter_config")
    pytest.importorskip("gguf", reason="needs the gguf package")
    assert main(["export-gguf", "a", "a.gguf", "--model-config", "base", "--dtype", "f16"]) == 0
    assert capsys.readouterr().out == "written: a.gguf\n"
    fastlora.export_gguf(folder, "b.gguf", model_config=llama().config, dtype="f16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
