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
    _run_module(program[0], os.getcwd()) if is_module else _run_script(program[0])
    return 0


class _AbsentError(Exception):
    """No module has the name that follows ``-m``, or the module can't be run."""


def _run_module(name: str, folder: str) -> None:
    """Run a module as ``python -m`` does, with this folder at the start of ``sys.path``."""
    _set_path(folder)
    own = sys.modules.pop("__main__")  # so that runpy can't find it in place of the module
    try:
        _, spec, code = runpy._get_module_details(name, _AbsentError)  # type: ignore[attr-defined]
    except _AbsentError as error:
        sys.exit(f"{sys.executable}: {error}")
    except BaseException as error:  # the import of the module's package failed
        _leave_out_this_file(error)
        raise
    if name != own.__name__:
        sys.argv[0] = spec.origin
    names = {"__file__": spec.origin, "__cached__": spec.cached, "__loader__": spec.loader}
    _run(code, **names, __package__=spec.parent, __spec__=spec)


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
    _run(source, __file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))


def _set_path(folder: str) -> None:
    """Put a folder at the start of ``sys.path``, in place of the folder of fastlora's command."""
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11 has python -P
        sys.path[0] = folder


def _run(code: Any, **attributes: Any) -> None:
    """Execute code, or a script's source, as a module ``__main__`` with these attributes."""
    main = ModuleType("__main__")
    vars(main).update(__builtins__=builtins, **attributes)
    sys.modules["__main__"] = main
    try:
        if isinstance(code, bytes):
            code = compile(code, attributes["__file__"], "exec", dont_inherit=True)
        exec(code, vars(main))
    except BaseException as error:
        _leave_out_this_file(error)
        raise


def _leave_out_this_file(error: BaseException) -> None:
    """Let the error's traceback begin in the program."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    hook = sys.excepthook  # the program may have set its own

    def excepthook(kind: Any, value: Any, _: Any) -> None:
        hook(kind, value.with_traceback(trace), trace)

    sys.excepthook = excepthook
