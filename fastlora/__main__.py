"""The command line: ``python -m fastlora``, or ``fastlora``."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .integrations.run import WHAT
from .integrations.run import main as run_program
from .version import __version__

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_PLUGINS = {"swift": Path(__file__).parent / "integrations" / "swift" / "fastlora_swift.py"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.  Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["run"]:  # first, because the program decides whether torch is imported
        return run_program(arguments[1:])
    parser = ArgumentParser(
        prog="python -m fastlora",
        allow_abbrev=False,
        epilog="fastlora.estimate(model) estimates the time and memory of a rank (docs/rank.md).",
    )
    parser.add_argument("--version", action="version", version=f"fastlora-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    add_command = partial(_command, commands)
    _add_doctor(add_command)
    commands.add_parser("run", help=WHAT)
    _add_tune(add_command)
    _add_adapters(add_command)
    what = "print the path of the file that a trainer loads as a plugin"
    path = add_command("path", what, lambda trainer: _PLUGINS[trainer])
    path.add_argument("trainer", choices=_PLUGINS, help="ms-swift")
    options = vars(parser.parse_args(arguments))
    command, run = options.pop("command"), options.pop("run", None)
    if not command:
        parser.print_help()
        return 0
    output = options.get("output") or options.get("path")
    plot, as_json = options.pop("plot", None), options.pop("json", False)
    try:
        report = run(**options)
        if as_json:
            print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
        elif report is not None:
            print(report)
        if plot:
            report.plot(plot)
        if output:
            print(f"written: {output}")
    except (ImportError, OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog} {command}: {error}\n")
    if command == "doctor":
        return 1 if report.broken else 0
    return 0 if command != "check-adapter" or (report.fixed or report).loads else 1


def _command(commands: Any, name: str, what: str, run: Callable) -> ArgumentParser:
    """Add a command.  ``run``: takes its options as arguments, and returns a report to print."""
    parser = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _add_doctor(add_command: Callable[..., ArgumentParser]) -> None:
    from .doctor import examine

    what = "a report on this machine and what runs on it, with a self-test: for bug reports"
    doctor = add_command("doctor", what, examine)
    doctor.description = f"Prints {what}. Exits with 1 if something is broken."
    doctor.add_argument("--json", action="store_true", help="print JSON")


def _add_tune(add_command: Callable[..., ArgumentParser]) -> None:
    from .tuning import command as tune

    what = "measure which plans and tiles are fastest on this GPU, and use them from now on"
    add = add_command("tune", what, tune).add_argument
    model = "a model of transformers: a folder, or a name in its cache"
    add("model", metavar="MODEL", help=model)
    tokens = "tokens in a step: batch size times length (%(default)s)"
    add("--tokens", type=int, default=4096, help=tokens)
    add("--r", type=int, default=16, help="rank of the adapters (%(default)s)")
    add("--dtype", choices=_DTYPES, help="dtype of x and weights (the model's, or bfloat16)")
    add("--dropout", type=float, default=0.0, metavar="P", help="dropout of adapters (0)")
    add("--seconds", type=float, default=120.0, help="time limit, roughly (%(default)g)")


def _add_adapters(add_command: Callable[..., ArgumentParser]) -> None:
    """Add the commands on saved PEFT adapters.  Their options are the functions' arguments."""
    from .adapters.combine import combine_adapters
    from .adapters.llama_cpp import export_gguf
    from .adapters.resize import resize_adapter
    from .adapters.serving import SERVERS, check_adapter

    what = "show how many ranks an adapter uses, or cut it to a lower rank"
    resize = add_command("resize", what, resize_adapter)
    what = "write the weighted sum of several adapters as one adapter"
    combine = add_command("combine", what, combine_adapters)
    export = add_command("export-gguf", "write an adapter as a file for llama.cpp", export_gguf)
    what = "say which parts of an adapter a server doesn't load"
    check = add_command("check-adapter", what, check_adapter)
    resize.add_argument("adapter", metavar="FOLDER")
    resize.add_argument("--energy", type=float, help="share of the squared singular values to keep")
    resize.add_argument("--output", metavar="FOLDER", help="folder for the cut adapter")
    resize.add_argument("--plot", metavar="FILE", help="write a PNG of the singular values")
    combine.add_argument("folders", nargs="+", metavar="FOLDER")
    combine.add_argument("--weights", nargs="+", type=float, required=True, help="one per adapter")
    combine.add_argument("--output", metavar="FOLDER", required=True)
    for each in (resize, combine):
        each.add_argument("--rank", type=int, help="largest rank of each layer")
    export.add_argument("folder", metavar="FOLDER")
    export.add_argument("path", metavar="FILE")
    base = "folder of the base model"
    export.add_argument("--model-config", metavar="FOLDER", required=True, help=base)
    export.add_argument("--dtype", default="f32", help="f32, f16 or q8_0 (%(default)s)")
    check.add_argument("folder", metavar="FOLDER")
    check.add_argument("--for", dest="server", choices=SERVERS, required=True, help="the server")
    check.add_argument("--base", metavar="CONFIG", help="folder or config.json of the base model")
    check.add_argument("--fix", metavar="FOLDER", help="new folder for a mended adapter")
    check.add_argument("--max-lora-rank", type=int, metavar="R", help="the server's option")


if __name__ == "__main__":
    sys.exit(main())
