"""``python -m fastlora run``: set the environment, and replace this process by the program."""

import json
import os
import shutil
import sys
from argparse import REMAINDER, SUPPRESS, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .patches import settings_in

WHAT = "run a program, with every PEFT model in it optimized"
_STARTUP = str(Path(__file__).parent / "startup")


def main(arguments: Sequence[str]) -> NoReturn:
    """Become the program of the command line."""
    parser = ArgumentParser(
        prog="python -m fastlora run",
        usage="%(prog)s [options] (SCRIPT | -m MODULE | - | COMMAND) [ARGUMENTS …]",
        description=f"{WHAT[0].upper()}{WHAT[1:]}: the program starts with fastlora.auto(). "
        "Processes that it starts are included. One line on stderr says how many layers are fast. "
        "FASTLORA=0 in the environment switches fastlora off.",
        epilog="examples: python -m fastlora run train.py; python -m fastlora run trl sft …; "
        "python -m fastlora run accelerate launch train.py; torchrun … -m fastlora run train.py",
        allow_abbrev=False,
        argument_default=SUPPRESS,
    )
    add = parser.add_argument
    add("--no-gated-mlps", dest="gated_mlps", action="store_false", help="don't fuse gated MLPs")
    without = "on a CPU, don't speed up layers without an adapter"
    add("--no-frozen-linears", dest="frozen_linears", action="store_false", help=without)
    add("--loss", action="store_true", help="compute the loss without logits")
    add("--base", choices=("int8",), help="round frozen weights to 8 bits, and multiply in 8 bits")
    add("-m", dest="is_module", action="store_true", help="run a module, as python -m does")
    what = "a script, or a command of this environment, and its arguments; - reads from stdin"
    add("program", nargs=REMAINDER, metavar="SCRIPT", help=what)
    options = vars(parser.parse_args(arguments))
    program, is_module = options.pop("program"), options.pop("is_module", False)
    program = program[program[:1] == ["--"] :]
    if not program:
        parser.error("it needs a program: a script, a command, or -m and a module")
    if sys.flags.ignore_environment or sys.flags.no_site:
        parser.error("with -I, -E or -S, Python starts without fastlora: leave the option out")
    if not any(finder.find_spec("fastlora", None) for finder in sys.meta_path):
        parser.error(
            "fastlora isn't installed, so the program couldn't import it: pip install -e ."
        )
    value = os.environ.get("FASTLORA", "")
    try:
        settings = settings_in(value or "1")
    except ValueError as error:
        parser.error(str(error))
    if settings is None:
        print(f"fastlora: off, because FASTLORA is {value}", file=sys.stderr, flush=True)
    else:
        os.environ["FASTLORA"] = json.dumps(settings | options)
        # In this folder, the program and the processes that it starts find our sitecustomize.py.
        others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [_STARTUP, *(path for path in others if path != _STARTUP)]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths if others != [""] else paths[:1])
    command = _command(program, is_module)
    if command is None:
        parser.error(f"{program[0]!r} is neither a file nor a command of this environment")
    os.execv(command[0], command)


def _command(program: list[str], is_module: bool) -> list[str] | None:
    """The program's command: of this Python, with its options, if it is no command by itself.

    None if there is no such program.
    """
    name, *arguments = program
    is_script = name == "-" or os.path.isfile(name) or os.path.exists(f"{name}/__main__.py")
    if not is_module and not is_script:
        places = os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)
        found = shutil.which(name, path=os.pathsep.join(places))
        return [found, *arguments] if found else None
    # The options in "python -u -m fastlora run …", and in "python -u bin/fastlora run …".
    *options, _ = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    if options and options[-1].startswith("-"):
        options[-1] = options[-1].removesuffix("m")  # -m, or -um
    options = [option for option in options if option != "-"]
    return [sys.executable, *options, *["-m"] * is_module, *program]
