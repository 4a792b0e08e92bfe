"""``python -m fastlora run``: the program runs as by itself, and its PEFT models are fast.

Most programs here import neither torch nor PEFT, so that they start fast.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = ("-m", "fastlora", "run")
# What a program sees of itself.
SEEN = """
import __main__, sys
print(__name__, __package__, getattr(__spec__, "name", None), sorted(globals()), sys.argv)
print(sys.path, sys.flags, __main__.__dict__ is globals(), "torch" in sys.modules)
"""
STATE = (
    "from fastlora.integrations import patches as a; print(a._settings, a._FINDER in sys.meta_path)"
)
# A shell's background jobs ignore SIGINT, and so would the program.
_SIGNAL = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
ENDINGS = {
    "code": "sys.exit(3)",
    "raise": "def inner(): raise KeyError('x')\ntry: 1 / 0\nexcept ArithmeticError: inner()",
    "interrupt": _SIGNAL,
}


def ended(
    *arguments: str | Path,
    cwd: Path,
    python: str = sys.executable,
    stdin: str | None = None,
    **environment: str,
) -> tuple[int, str, str]:
    """The return code of Python, and what it wrote to stdout and stderr."""
    own, both = os.environ | environment, {"capture_output": True, "text": True, "input": stdin}
    done = subprocess.run([python, *arguments], cwd=cwd, env=own, check=False, **both)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "package" / "inside").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").touch()
    for path in ("seen.py", "package/module.py", "inside/__main__.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(SEEN)
    (tmp_path / "link.py").symlink_to(tmp_path / "package" / "module.py")
    return tmp_path


PROGRAMS = {
    "script": ("seen.py", "--lr", "3", "--help", "-m", "--", "--no-gated-mlps"),
    "dashes": ("--", "seen.py", "--", "a"),
    "link": ("link.py",),
    "module": ("-m", "package.module", "--version", "x y"),
    "folder": ("inside", "a"),
    "stdin": ("-", "a"),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_sees_what_it_sees_without(program, folder):
    expected = ended(*program, cwd=folder, stdin=SEEN)
    assert expected[0] == 0
    assert ended(*RUN, "--no-frozen-linears", *program, cwd=folder, stdin=SEEN) == expected


@pytest.mark.parametrize("flags", ["-u -O -X dev -m", "-OBm"], ids=str)
def test_python_s_own_options_stay(flags, folder):
    options = flags.removesuffix("m").removesuffix("-").split()
    expected = ended(*options, "seen.py", cwd=folder)
    assert ended(*flags.split(), "fastlora", "run", "seen.py", cwd=folder) == expected


def test_a_command_of_the_environment_runs(tmp_path):
    """From the folder of Python, and from PATH; a file of this name in the folder comes first."""
    state = "import sys\n" + STATE
    (tmp_path / "train.py").write_text(state)
    torchrun = "torchrun", "--standalone", "--nproc-per-node", "1", "train.py"
    code, printed, error = ended(*RUN, *torchrun, cwd=tmp_path, PATH="/bin:/usr/bin")
    assert (code, printed) == (0, "{} True\n"), error
    command = tmp_path / "bin" / "own-command"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\n{state}\nprint(sys.argv[1:])")
    command.chmod(0o755)
    named = (*RUN, "--loss", "own-command", "-m", "x")
    found = ended(*named, cwd=tmp_path, PATH=f"{command.parent}")
    assert found == (0, "{'loss': True} True\n['-m', 'x']\n", "")
    (tmp_path / "own-command").write_text("print('a script')")
    assert ended(*named, cwd=tmp_path, PATH=f"{command.parent}") == (0, "a script\n", "")


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_program_ends_as_without(ending, tmp_path):
    """Its return code, signals and tracebacks are the same."""
    (tmp_path / "program.py").write_text(f"import sys\nprint('begins', flush=True)\n{ending}\n")
    assert ended(*RUN, "program.py", cwd=tmp_path) == ended("program.py", cwd=tmp_path)


@pytest.mark.parametrize("name", ["absent.py", "absent"])
def test_a_program_that_does_not_exist(name, tmp_path):
    code, printed, error = ended(*RUN, name, cwd=tmp_path)
    assert (code, printed) == (2, "")
    assert f"'{name}' is neither a file nor a command of this environment" in error


def test_a_module_that_does_not_exist(tmp_path):
    code, printed, error = ended("-m", "absent", cwd=tmp_path)
    assert code
    assert ended(*RUN, "-m", "absent", cwd=tmp_path) == (code, printed, error)


def test_a_file_with_the_name_of_a_standard_module_is_not_imported(tmp_path):
    """``python scripts/seen.py`` doesn't see the files of the working directory."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "seen.py").write_text(SEEN)
    for name in ("logging", "typing", "json", "argparse", "pathlib", "warnings", "shutil"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('replaced')")
    expected = ended("scripts/seen.py", cwd=tmp_path)
    assert ended(*RUN, "scripts/seen.py", cwd=tmp_path) == expected


@pytest.mark.parametrize("arguments", [(), ("-m",), ("--gates", "seen.py")], ids=str)
def test_wrong_arguments(arguments, tmp_path):
    code, _, error = ended(*RUN, *arguments, cwd=tmp_path)
    assert code == 2
    usage = "usage: python -m fastlora run [options] (SCRIPT | -m MODULE | - | COMMAND)"
    assert usage in error


@pytest.mark.parametrize("option", ["-I", "-S"])
def test_an_option_that_leaves_out_sitecustomize_is_an_error(option, folder):
    code, printed, error = ended(option, *RUN, "seen.py", cwd=folder, PYTHONPATH=str(ROOT))
    assert (code, printed) == (2, "")
    assert "with -I, -E or -S, Python starts without fastlora: leave the option out" in error


@pytest.mark.skipif(sys._base_executable == sys.executable, reason="it has fastlora installed")
def test_a_fastlora_that_the_program_could_not_import_is_an_error():
    bare = {"cwd": ROOT, "python": sys._base_executable, "PYTHONPATH": ""}
    code, _, error = ended(*RUN, "setup.py", **bare)
    assert code == 2
    assert "fastlora isn't installed, so the program couldn't import it: pip install -e ." in error


@pytest.mark.parametrize(
    ("value", "settings"),
    [
        ("", {"gated_mlps": False}),
        ('{"loss": true, "gated_mlps": true}', {"loss": True, "gated_mlps": False}),
    ],
)
def test_options_add_to_the_settings_in_the_environment(value, settings, tmp_path):
    (tmp_path / "program.py").write_text(f"import sys; {STATE}")
    found = ended(*RUN, "--no-gated-mlps", "program.py", cwd=tmp_path, FASTLORA=value)
    assert found == (0, f"{settings} True\n", "")


def test_off_in_the_environment_wins_and_one_line_says_so(tmp_path):
    (tmp_path / "program.py").write_text(f"import sys; {STATE}")
    found = ended(*RUN, "--loss", "program.py", cwd=tmp_path, FASTLORA="0")
    assert found == (0, "None False\n", "fastlora: off, because FASTLORA is 0\n")


WRONG = "FASTLORA is {!r}, but must be 0, 1 or a JSON object with some of strict, frozen_linears, "


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"gates": true}', WRONG),
        ("loss", WRONG),
        ('["loss"]', WRONG),
        ('{"base": "int4"}', "FASTLORA is {!r}: base is 'int4', but must be \"int8\", or None"),
    ],
    ids=["name", "word", "list", "value"],
)
def test_a_wrong_setting_in_the_environment_is_an_error_at_the_start(value, message, tmp_path):
    """Of ``run``, and of a process that a program starts with another value."""
    (tmp_path / "program.py").write_text(
        f"import subprocess, sys; from os import environ; environ['FASTLORA'] = {value!r}\n"
        "print(subprocess.run([sys.executable, '-c', 'print(1)']).returncode)"
    )
    code, printed, error = ended(*RUN, "program.py", cwd=tmp_path, FASTLORA=value)
    assert (code, printed) == (2, "")
    assert message.format(value) in error
    code, printed, error = ended(*RUN, "program.py", cwd=tmp_path)
    assert (code, printed) == (0, "2\n")
    assert error.startswith(f"fastlora: {message.format(value)}")


CHILDREN = """
import multiprocessing, os, subprocess, sys

def state(_=None):
    from fastlora.integrations import patches
    return patches._settings, patches._FINDER in sys.meta_path, sys.argv[1:], __name__

if __name__ == "__main__":
    for how in ("spawn", "forkserver", "fork"):
        with multiprocessing.get_context(how).Pool(1) as pool:
            print(how, *pool.map(state, [1]))
    code = "import program, sys; print('python', program.state(), 'startup' in str(sys.path))"
    subprocess.run([sys.executable, "-c", code], check=True)
"""


def test_processes_that_the_program_starts_are_included(tmp_path):
    (tmp_path / "program.py").write_text(CHILDREN)
    options = "--no-gated-mlps", "--loss", "--base", "int8"
    code, printed, error = ended(*RUN, *options, "program.py", "x", cwd=tmp_path)
    assert (code, error) == (0, "")
    settings = {"gated_mlps": False, "loss": True, "base": "int8"}
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


# PEFT imports these if they are here, which takes a quarter of its import.
TRAIN = """
import os, sys
sys.modules |= dict.fromkeys(("bitsandbytes", "hqq", "sklearn", "torchao"))
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


def test_a_launcher_starts_each_rank_with_it(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    _, _, error = ended(*launcher, *RUN, "train.py", "--lr", "1", cwd=tmp_path, **own)
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").exists(), error
        told = (tmp_path / f"rank{rank}").read_text().strip()
        assert told == "{'fastlora.peft.layer'} True ['--lr', '1']"
    assert error.count("fastlora: 2 of 2 layers fast") == 1
