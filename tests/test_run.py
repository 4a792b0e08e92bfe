"""``python -m fastlora run``: the program runs as with ``python``, and its PEFT models are fast.

Most programs here import neither torch nor PEFT, so that they start fast.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

RUN = ("-m", "fastlora", "run")
# What a program sees of itself.  Without its annotations, which Python 3.14 makes on demand.
SEEN = """
import __main__, sys
names = sorted(set(globals()) - {"__annotations__"})
print(__name__, __file__, __package__, getattr(__spec__, "name", None), names)
print(sys.argv, sys.path[0], __main__.__dict__ is globals(), "torch" in sys.modules)
"""
# A shell's background jobs ignore SIGINT, and so would the program.
_SIGNAL = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
os.kill(os.getpid(), signal.{})
time.sleep(60)
"""
ENDINGS = {
    "code": "sys.exit(3)",
    "text": "sys.exit('an error')",
    "none": "sys.exit()",
    "raise": "def inner(): raise KeyError('x')\ntry: 1 / 0\nexcept ArithmeticError: inner()",
    "interrupt": _SIGNAL.format("SIGINT"),
    "signal": _SIGNAL.format("SIGTERM"),
    "at-once": "import os; os._exit(7)",
    "syntax": "def (",
    "hook": "sys.excepthook = lambda kind, value, trace: print(kind, value)\n1 / 0",
    "package": "import package",
}


def ended(*arguments: str | Path, cwd: Path, **environment: str) -> tuple[int, str, str]:
    """The return code of Python, and what it wrote to stdout and stderr."""
    own = os.environ | environment
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=own, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "package" / "inside").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").touch()
    for path in ("seen.py", "package/module.py", "package/__main__.py", "inside/__main__.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(SEEN)
    (tmp_path / "link.py").symlink_to(tmp_path / "package" / "module.py")
    return tmp_path


@pytest.mark.parametrize(
    "program",
    [
        ("seen.py", "--lr", "3", "--help", "-m", "--", "--no-gated-mlps"),
        ("--", "seen.py", "--", "a"),
        ("package/module.py",),
        ("link.py",),
        ("-m", "package.module", "--version", "x y"),
        ("-m", "package", ""),
    ],
    ids=["script", "dashes", "in-a-folder", "link", "module", "package"],
)
def test_a_program_sees_what_it_sees_without(program, folder):
    expected = ended(*program, cwd=folder)
    assert expected[0] == 0
    assert ended(*RUN, *program, cwd=folder) == expected
    assert ended(*RUN, "--no-frozen-linears", *program, cwd=folder) == expected


def test_a_folder_and_a_zip_file_with_a_main_file_run(folder):
    with ZipFile(folder / "program.zip", "w") as file:
        file.writestr("__main__.py", SEEN)
    for name in ("inside", "program.zip"):
        expected, found = (ended(*way, name, "a", cwd=folder) for way in ((), RUN))
        assert expected[0] == 0
        assert found == expected


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_program_ends_as_without(ending, tmp_path):
    """Its return code, signals and tracebacks are the same."""
    (tmp_path / "program.py").write_text(f"import sys\nprint('begins', flush=True)\n{ending}\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import absent_one")
    (tmp_path / "package" / "inner.py").touch()
    fails_in_the_package = [("-m", "package.inner")] if ending == "import package" else []
    for program in (("program.py",), ("-m", "program"), *fails_in_the_package):
        code, printed, error = ended(*program, cwd=tmp_path)
        found = ended(*RUN, *program, cwd=tmp_path)
        assert found[:2] == (code, printed)
        # The frames of python -m may be absent.
        frames = re.compile(r'  File "(<frozen runpy>|[^"]*/runpy.py)", .*\n(    .*\n)*')
        assert frames.sub("", found[2]) == frames.sub("", error)


def test_a_program_that_does_not_exist(tmp_path):
    assert ended(*RUN, "-m", "absent", cwd=tmp_path) == ended("-m", "absent", cwd=tmp_path)
    code, printed, error = ended(*RUN, "absent.py", cwd=tmp_path)
    assert (code, printed) == (2, "")
    assert error.endswith(f"can't open '{tmp_path / 'absent.py'}': No such file or directory\n")


@pytest.mark.parametrize("arguments", [(), ("-m",), ("--gates", "seen.py")], ids=str)
def test_wrong_arguments(arguments, tmp_path):
    code, _, error = ended(*RUN, *arguments, cwd=tmp_path)
    assert code == 2
    assert "usage: python -m fastlora run [options] (SCRIPT | -m MODULE)" in error


CHILDREN = """
import multiprocessing, os, subprocess, sys

def state(_=None):
    from fastlora import automatic
    return automatic._settings, automatic._FINDER in sys.meta_path, sys.argv[1:], __name__

if __name__ == "__main__":
    for how in ("spawn", "forkserver", "fork"):
        with multiprocessing.get_context(how).Pool(1) as pool:
            print(how, *pool.map(state, [1]))
    code = "import program, sys; print('python', program.state(), 'startup' in str(sys.path))"
    subprocess.run([sys.executable, "-c", code], check=True)
"""


def test_processes_that_the_program_starts_are_included(tmp_path):
    (tmp_path / "program.py").write_text(CHILDREN)
    for program in (("program.py",), ("-m", "program")):
        options = "--no-gated-mlps", "--loss", "--base", "int8"
        code, printed, error = ended(*RUN, *options, *program, "x", cwd=tmp_path)
        assert (code, error) == (0, "")
        settings = {"gated_mlps": False, "frozen_linears": True, "loss": True, "base": "int8"}
        assert printed.splitlines() == [
            f"spawn {(settings, True, ['x'], '__mp_main__')}",
            f"forkserver {(settings, True, ['x'], '__mp_main__')}",
            f"fork {(settings, True, ['x'], '__main__')}",
            f"python {(settings, True, [], 'program')} False",
        ]


def test_the_user_s_own_sitecustomize_runs_also(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.own = 'ran'")
    code = "import subprocess, sys; subprocess.call([sys.executable, '-c', 'print(own)'])"
    (tmp_path / "program.py").write_text(code)
    found = ended(*RUN, "program.py", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert found == (0, "ran\n", "")


TRAIN = """
import os, sys
import peft, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]))
kinds = {type(m).__module__ for m in model.modules() if hasattr(m, "lora_A")}
wrapped = DistributedDataParallel(model)
for _ in range(2):
    wrapped(torch.randn(64, 8)).square().sum().backward()
mine = torch.stack([p.grad.sum() for p in model.parameters() if p.requires_grad])
every = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(every, mine)
with open(f"rank{dist.get_rank()}", "w") as file:
    print(kinds, torch.equal(*every), sys.argv[1:], file=file)
dist.destroy_process_group()
sys.exit(0)
"""


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("torch.distributed.run", ("--standalone", "--nproc-per-node", "2")),
        ("accelerate.commands.launch", ("--multi_gpu", "--num_processes", "2")),
    ],
    ids=["torchrun", "accelerate-launch"],
)
def test_launchers_start_each_rank_with_it(launcher, options, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ("-m", launcher, *options, *RUN, "train.py", "--lr", "1")
    _, _, error = ended(*command, cwd=tmp_path, **own)
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").exists(), error
        told = (tmp_path / f"rank{rank}").read_text().strip()
        assert told == "{'fastlora.peft.layer'} True ['--lr', '1']"
    assert error.count("fastlora: 2 of 2 layers fast") == 1
