"""Writing files atomically, and the leftovers of a killed process."""

import os
import signal

import pytest
from peft_models import by_peft, llama

import fastlora
from fastlora.packing.files import CONFIG, WEIGHTS, write_whole


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return by_peft(tmp_path_factory.mktemp("adapter"), target_modules=["q_proj"])


def export(adapter, output):
    pytest.importorskip("gguf", reason="needs the gguf package")
    fastlora.export_gguf(adapter, output / WEIGHTS, model_config=llama().config)


def test_a_file_is_no_folder(adapter, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="out is a file, but must be a folder"):
        export(adapter, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_process_leaves_whole_files_and_the_next_one_writes(
    adapter, tmp_path, monkeypatch
):
    (tmp_path / WEIGHTS).write_bytes(b"old")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        write_whole(tmp_path, {WEIGHTS: b"half"})
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / WEIGHTS).read_bytes() == b"old"
    fastlora.resize_adapter(adapter, rank=2, output=tmp_path)
    shown = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".fastlora-")}
    assert shown == {WEIGHTS, CONFIG}
    assert (tmp_path / WEIGHTS).read_bytes() not in (b"old", b"half")


def test_a_leftover_is_no_adapter(tmp_path):
    (tmp_path / ".fastlora-abcdefgh").mkdir()
    (tmp_path / ".fastlora-abcdefgh" / CONFIG).write_text("{}")
    with pytest.raises(FileNotFoundError) as caught:
        fastlora.load_adapter(llama(), tmp_path)
    assert "subfolders" not in str(caught.value)
