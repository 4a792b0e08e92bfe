"""The command line: ``python -m fastlora``, or ``fastlora``."""

import json
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .run import WHAT
from .run import main as run_program
from .version import __version__

if TYPE_CHECKING:
    import torch

_PLUGINS = {"swift": Path(__file__).parent / "integrations" / "swift" / "fastlora_swift.py"}


class _Parser(ArgumentParser):
    """A parser with errors of one line.  It takes -1e-3 as a number, as Python 3.14 does."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.  Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["run"]:  # first, because the program decides whether torch is imported
        return run_program(arguments[1:])
    parser = _Parser(
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
    path = add_command("path", "print the path of the file that a trainer loads as a plugin")
    path.add_argument("trainer", choices=_PLUGINS, help="ms-swift")
    options = vars(parser.parse_args(arguments))
    command, run = options.pop("command"), options.pop("run", None)
    if not command:
        parser.print_help()
        return 0
    if command == "doctor":
        return _examine(options["json"])
    if command == "path":
        print(_PLUGINS[options["trainer"]])
        return 0
    plot = options.pop("plot", None)
    output = options.get("output") or options.get("path")
    try:
        report = run(**options)
        if report is not None:
            print(report)
        if plot:
            report.plot(plot)
        if command not in ("tune", "check-adapter"):
            print(_written(output))
    except (ImportError, OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog} {command}: {error}\n")
    loads = command != "check-adapter" or (report.fixed or report).loads
    return 0 if loads else 1


def _command(commands: Any, name: str, what: str, run: Callable | None = None) -> ArgumentParser:
    """Add a command.  ``run``: takes its options as arguments, and returns a report to print."""
    parser = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _written(output: str | None) -> str:
    if not output:
        return "nothing was written: --rank R --output FOLDER writes the adapter at a lower rank"
    files = [*Path(output).glob("adapter_*")]  # none if the output is a single file
    size = sum(file.stat().st_size for file in files or [Path(output)])
    how = "" if files else f": llama-cli -m BASE.gguf --lora {output}"
    return f"written: {output} ({size / 2**20:.1f} MiB){how}"


def _add_doctor(add_command: Callable[..., ArgumentParser]) -> None:
    what = "a report on this machine and what runs on it, with a self-test: for bug reports"
    doctor = add_command("doctor", what)
    doctor.description = f"Prints {what}. Exits with 1 if something is broken."
    doctor.add_argument("--json", action="store_true", help="print JSON")


def _examine(as_json: bool) -> int:
    from .doctor import examine

    report = examine()
    text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if as_json else str(report)
    print(text)
    return 1 if report.broken else 0


def _add_tune(add_command: Callable[..., ArgumentParser]) -> None:
    from .tuning import command as tune

    what = "measure which plans and tiles are fastest on this GPU, and use them from now on"
    add = add_command("tune", what, tune).add_argument
    model = "a model of transformers: a folder, or a name in its cache"
    shape = "instead of a model: a layer; can be repeated"
    add("model", nargs="?", metavar="MODEL", help=model)
    add("--shape", type=_shape, action="append", metavar="M,K,N", help=shape)
    add("--tokens", type=_count, help="tokens in a model's step: batch size times length (4096)")
    add("--r", type=_rank, default=16, help="rank of the adapters (%(default)s)")
    add("--dtype", type=_dtype, help="dtype of x and weights (the model's, or bfloat16)")
    add("--dropout", type=_probability, default=0.0, metavar="P", help="dropout of adapters (0)")
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
        each.add_argument("--rank", type=_rank, help="largest rank of each layer")
    export.add_argument("folder", metavar="FOLDER")
    export.add_argument("path", metavar="FILE")
    base = "folder of the base model"
    export.add_argument("--model-config", metavar="FOLDER", required=True, help=base)
    export.add_argument("--dtype", default="f32", help="f32, f16 or q8_0 (%(default)s)")
    check.add_argument("folder", metavar="FOLDER")
    check.add_argument("--for", dest="server", choices=SERVERS, required=True, help="the server")
    check.add_argument("--base", metavar="CONFIG", help="folder or config.json of the base model")
    check.add_argument("--fix", metavar="FOLDER", help="new folder for a mended adapter")
    check.add_argument("--max-lora-rank", type=_rank, metavar="R", help="the server's option")


def _shape(text: str) -> tuple[int, int, int]:
    sizes = [_whole(part) for part in text.split(",")]
    if len(sizes) != 3 or 0 in sizes:
        raise ArgumentTypeError(
            f"{text!r} isn't M,K,N: give rows, in_features and out_features, such as 4096,2048,2048"
        )
    return sizes[0], sizes[1], sizes[2]


def _rank(text: str, what: str = "rank") -> int:
    if not _whole(text):
        raise ArgumentTypeError(f"{text!r} isn't a {what}: give a whole number of at least 1")
    return _whole(text)


_count = partial(_rank, what="number of tokens")


def _whole(text: str) -> int:
    """A number from 1 to 9,999,999; 0 for any other text."""
    return int(text) if re.fullmatch("[0-9]{1,7}", text) else 0


def _dtype(text: str) -> "torch.dtype":
    from .formats.format import name_of
    from .projection import DTYPES

    names = {name_of(dtype): dtype for dtype in DTYPES}
    if text not in names:
        raise ArgumentTypeError(f"{text!r} isn't one of {', '.join(names)}")
    return names[text]


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise ArgumentTypeError(f"{text!r} isn't a probability from 0 to below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
