"""``python -m fastlora run``: call ``fastlora.auto()``, then run a program in this process."""

import builtins
import json
import os
import runpy
import sys
from argparse import REMAINDER, ArgumentParser
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from pkgutil import get_importer
from types import ModuleType
from typing import Any

from .automatic import from_environment

WHAT = "run a program, with every PEFT model in it optimized"
_STARTUP = str(Path(__file__).parent / "integrations" / "startup")


def main(arguments: Sequence[str]) -> int:
    """Run the program of the command line.  Exit status, signals and errors are the program's."""
    parser = ArgumentParser(
        prog="python -m fastlora run",
        usage="%(prog)s [options] (SCRIPT | -m MODULE) [ARGUMENTS …]",
        description=f"{WHAT[0].upper()}{WHAT[1:]}: fastlora.auto(), then the program, as python "
        "runs it. Processes that it starts are included. One line on stderr says how many layers "
        "are fast.",
        epilog="examples: python -m fastlora run -m trl.scripts.sft …; accelerate launch -m "
        "fastlora run train.py; torchrun … -m fastlora run train.py",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--no-gated-mlps", dest="gated_mlps", action="store_false", help="don't fuse gated MLPs")
    without = "on a CPU, don't speed up layers without an adapter"
    add("--no-frozen-linears", dest="frozen_linears", action="store_false", help=without)
    add("--loss", action="store_true", help="compute the loss without logits")
    add("--base", choices=("int8",), help="round frozen weights to 8 bits, and multiply in 8 bits")
    add("-m", dest="is_module", action="store_true", help="run a module, as python -m does")
    add("program", nargs=REMAINDER, metavar="SCRIPT", help="a script, and the program's arguments")
    options = vars(parser.parse_args(arguments))
    program, is_module = options.pop("program"), options.pop("is_module")
    program = program[program[:1] == ["--"] :]
    if not program:
        parser.error("it needs a program: a script, or -m and a module")
    os.environ["FASTLORA"] = json.dumps(options)
    # In this folder, processes that the program starts find our sitecustomize.py.
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [_STARTUP, *(path for path in others if path != _STARTUP)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths if others != [""] else paths[:1])
    from_environment()
    sys.argv = program
    try:
        _run_module(program[0], os.getcwd()) if is_module else _run_script(program[0])
    except BaseException as error:
        _leave_out_this_file(error)
        raise
    return 0


def _run_module(name: str, folder: str) -> None:
    """Run a module as ``python -m`` does, with this folder at the start of ``sys.path``."""
    _set_path(folder)
    _new_main()
    is_named = name != "__main__"  # otherwise sys.argv[0] stays the folder or zip file
    runpy._run_module_as_main(name, is_named)  # type: ignore[attr-defined]


def _run_script(name: str) -> None:
    """Run a script, folder or zip file as ``python`` does."""
    path = os.path.abspath(name)
    if get_importer(path) is not None:  # a folder or a zip file with __main__.py
        return _run_module("__main__", path)
    _set_path(os.path.dirname(os.path.realpath(path)))
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        print(f"{sys.executable}: can't open {error.filename!r}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    names, loader = vars(_new_main()), SourceFileLoader("__main__", path)
    names.update(__file__=path, __cached__=None, __loader__=loader)
    exec(compile(source, path, "exec", dont_inherit=True), names)


def _set_path(folder: str) -> None:
    """Put a folder at the start of ``sys.path``, in place of the folder of fastlora's command."""
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11 has python -P
        sys.path[0] = folder


def _new_main() -> ModuleType:
    """An empty module in place of ``__main__``, which is this command."""
    sys.modules["__main__"] = main = ModuleType("__main__")
    vars(main)["__builtins__"] = builtins
    return main


def _leave_out_this_file(error: BaseException) -> None:
    """Let the error's traceback begin in the program."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    hook = sys.excepthook  # the program may have set its own

    def excepthook(kind: Any, value: Any, _: Any) -> None:
        hook(kind, value.with_traceback(trace), trace)

    sys.excepthook = excepthook
