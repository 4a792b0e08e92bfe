"""Writing files atomically: the leftovers of a killed process, and files of a running one."""

import os
import signal
import time

import pytest
from peft_models import by_peft, llama

import fastlora
from fastlora.packing import files
from fastlora.packing.files import CONFIG, WEIGHTS, write_whole

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and folder locks")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return by_peft(tmp_path_factory.mktemp("adapter"), target_modules=["q_proj"])


def export(adapter, output):
    pytest.importorskip("gguf", reason="needs the gguf package")
    fastlora.export_gguf(adapter, output / WEIGHTS, model_config=llama().config)


WRITERS = {
    "resize": lambda adapter, output: fastlora.resize_adapter(adapter, rank=2, output=output),
    "combine": lambda adapter, output: fastlora.combine_adapters([adapter], [2], output),
    "export": export,
}


def test_a_file_is_no_folder(adapter, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="out is a file, but must be a folder"):
        export(adapter, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def in_a_child(run) -> int:
    """Run this in a forked process and exit; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(1)
    return child


def scratch_in(folder) -> list[str]:
    return [path.name for path in folder.glob(".fastlora-*")]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_leftovers_of_a_killed_process_are_removed_by_the_next_save(
    write, adapter, tmp_path, monkeypatch
):
    def killed():
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        write_whole(tmp_path, {WEIGHTS: b"half"})

    assert os.waitpid(in_a_child(killed), 0)[1] == signal.SIGKILL
    assert len(scratch_in(tmp_path)) == 1
    write(adapter, tmp_path)
    assert not scratch_in(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} in ({WEIGHTS, CONFIG}, {WEIGHTS})


def test_temporary_files_of_a_running_process_are_kept(adapter, tmp_path, monkeypatch):
    (ready, at_work), (wait, go_on) = os.pipe(), os.pipe()

    def slow():
        os.close(go_on)  # so that the child goes on if its parent ends
        replace = os.replace

        def pause(*paths):
            os.write(at_work, b".")
            os.read(wait, 1)
            replace(*paths)

        monkeypatch.setattr(os, "replace", pause)
        write_whole(tmp_path, {WEIGHTS: b"late"})
        os._exit(0)

    child = in_a_child(slow)
    try:
        os.read(ready, 1)
        (name,) = scratch_in(tmp_path)
        fastlora.resize_adapter(adapter, rank=2, output=tmp_path)  # concurrently
        assert scratch_in(tmp_path) == [name]
    finally:
        os.close(go_on)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / WEIGHTS).read_bytes() == b"late"
    assert not scratch_in(tmp_path)


@pytest.mark.parametrize(("age", "goes"), [(60, False), (7200, True)], ids=["new", "old"])
def test_old_temporary_files_of_another_machine_are_removed(age, goes, tmp_path):
    """Locks of another machine may be invisible here.  Version 0.2.0 made folders without locks."""
    for name in (".fastlora-elsewhere-abcdefgh", ".fastlora-abcdefgh"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / CONFIG).write_text("{}")
        for path in (folder / CONFIG, folder):
            os.utime(path, (time.time() - age,) * 2)
    with pytest.raises(FileNotFoundError) as caught:
        fastlora.load_adapter(llama(), tmp_path)
    assert "subfolders" not in str(caught.value)  # it lists no leftover as an adapter
    write_whole(tmp_path, {"one": b"1"})
    assert len(scratch_in(tmp_path)) == (0 if goes else 2)


def test_files_and_links_with_a_temporary_folder_s_name_are_kept(tmp_path):
    (tmp_path / "precious").mkdir()
    name = f"{files._SCRATCH}{files._HOST}"
    (tmp_path / f"{name}link").symlink_to(tmp_path / "precious")
    (tmp_path / f"{name}file").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    write_whole(tmp_path, {})
    assert sorted(os.listdir(tmp_path)) == before
