"""python -m fastlora resize, combine, export-gguf: equal to the functions, or a one-line error."""

import re

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
    for name in ("resize a --rank 2 --output b --plot b.png", "resize a"):
        assert main(name.split()) == 0
    reports = fastlora.resize_adapter(folder, rank=2), fastlora.resize_adapter(folder)
    size = sum(file.stat().st_size for file in (tmp_path / "b").iterdir()) / 2**20
    ends = f"written: b ({size:.1f} MiB)", "nothing was written: --rank R --output FOLDER"
    printed = capsys.readouterr().out
    assert re.sub(" writes the .*", "", printed) == "".join(
        f"{report}\n{end}\n" for report, end in zip(reports, ends, strict=True)
    )
    for weight in ("-0.5", "-5e-1"):
        sides = ["a", "b", "--weights", "1", weight]
        assert main(["combine", *sides, "--output", f"c{weight}", "--rank", "3"]) == 0
        assert f"written: c{weight} (0." in capsys.readouterr().out
    found, same = (load_file(tmp_path / name / WEIGHTS) for name in ("c-0.5", "c-5e-1"))
    assert all(same[key].equal(tensor) for key, tensor in found.items())
    assert {tuple(tensor.shape) for tensor in found.values()} == {(3, 64), (32, 3)}
    with pytest.raises(SystemExit) as stop:
        main(["resize", "none"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("python -m fastlora resize: none/adapter_config")
    pytest.importorskip("gguf", reason="needs the gguf package")
    assert main(["export-gguf", "a", "a.gguf", "--model-config", "base", "--dtype", "f16"]) == 0
    assert re.fullmatch(
        r"written: a.gguf \(0.\d MiB\): .* --lora a.gguf\n", capsys.readouterr().out
    )
    fastlora.export_gguf(folder, "b.gguf", model_config=llama().config, dtype="f16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
