"""``python -m fastlora``: what a person runs."""

import json
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from .doctor.call import Call
from .doctor.dtypes import NAMES
from .doctor.report import examine
from .price.load import plan_of
from .price.quote import RANKS


class _Parser(ArgumentParser):
    """Whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the status to exit with."""
    parser = _Parser(prog="python -m fastlora", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_doctor(commands)
    _add_plan(commands)
    options = vars(parser.parse_args(arguments))
    if not options.pop("command"):
        parser.print_help()
        return 0
    return options.pop("run")(**options)


def _add_doctor(commands: Any) -> None:
    what = "what is here, what would run, and whether it works: the text for a bug report"
    parser = commands.add_parser(
        "doctor",
        help=what,
        description=f"Prints {what}. Exits with 1 if something is broken.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print it for a program")
    add("--shape", type=_shape, metavar="M,K,N", help="also tell how such a call would run")
    add("--r", type=_rank, help="the rank of its adapter (16)")
    add("--dtype", type=_dtype, help="of x and the weight (bfloat16)")
    add("--dropout", type=_probability, metavar="P", help="of its adapter (0)")
    add("--target", type=_target, help="a GPU that need not be here, such as sm_90")

    def run(json: bool, shape: tuple[int, int, int] | None, **options: Any) -> int:
        details = {name: value for name, value in options.items() if value is not None}
        if details and not shape:
            parser.error(f"--{next(iter(details))} is of a call: give its --shape too")
        report = examine(Call(*shape, **details) if shape else None)
        _print(report, json)
        return 1 if report.broken else 0

    parser.set_defaults(run=run)


def _add_plan(commands: Any) -> None:
    what = "the price of each rank: parameters, file, memory, and a step's time beside the frozen"
    parser = commands.add_parser(
        "plan",
        help=f"{what} model's",
        description=f"Prints {what} model's, for LoRA on every linear layer of a causal language "
        "model of transformers, with random weights.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with a config.json, or that file")
    add("--r", type=_ranks, default=RANKS, metavar="R,R,…", help="the ranks (8,16,64,256)")
    add("--dropout", type=_probability, default=0.0, metavar="P", help="of the adapters (0)")
    add(
        "--target-parameters",
        dest="parameters",
        type=lambda text: text.split(","),
        metavar="NAME,…",
        help="experts' weights to adapt, too, such as experts.down_proj",
    )
    add("--dtype", type=_dtype, help="of the model (its config's)")
    add("--rounds", type=_count, default=5, help="of measurement (5); 0 only counts")
    add("--layers", type=_rank, help="measure with so many (as many as memory allows)")
    add("--json", action="store_true", help="print it for a program")

    def run(model: str, r: Sequence[int], dropout: float, json: bool, **options: Any) -> int:
        try:
            found = plan_of(model, r, dropout, progress=_progress, **options)
        except (ImportError, ValueError) as error:
            parser.error(str(error))
        _print(found, json)
        return 0

    parser.set_defaults(run=run)


def _progress(text: str) -> None:
    """On the one line of a terminal that the next one takes."""
    if sys.stderr.isatty():
        print(f"\r{text:30}", end="\r", file=sys.stderr, flush=True)


def _print(report: Any, as_json: bool) -> None:
    print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if as_json else report)


def _shape(text: str) -> tuple[int, int, int]:
    sizes = [_whole(part) for part in text.split(",")]
    if len(sizes) != 3 or 0 in sizes:
        raise ArgumentTypeError(
            f"{text!r} is no M,K,N: rows, in_features and out_features, such as 4096,2048,2048"
        )
    m, k, n = sizes
    return m, k, n


def _rank(text: str) -> int:
    if not _whole(text):
        raise ArgumentTypeError(f"{text!r} is no rank: a whole number of at least 1")
    return _whole(text)


def _ranks(text: str) -> list[int]:
    return [_rank(part) for part in text.split(",")]


def _count(text: str) -> int:
    return 0 if text == "0" else _rank(text)


def _whole(text: str) -> int:
    """A number from 1 to 9,999,999; 0 for any other text."""
    return int(text) if re.fullmatch("[0-9]{1,7}", text) else 0


def _dtype(text: str) -> torch.dtype:
    if text not in NAMES:
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(NAMES)}")
    return NAMES[text]


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise ArgumentTypeError(f"{text!r} is no probability from 0 to below 1")
    return value


def _target(text: str) -> str:
    try:
        from .backends.triton import TARGETS  # here, since it imports the kernels
    except ImportError as error:
        raise ArgumentTypeError(f"the kernels can't be imported ({error})") from error
    if text not in TARGETS:
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(TARGETS)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
