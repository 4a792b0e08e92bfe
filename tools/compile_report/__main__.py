"""A report on the compiled code of every kernel and every default config: ``make compile-report``.

It needs no GPU.  Each row is one kernel of one call, compiled for one target: registers, spills,
shared and tensor memory, tensor-core and TMA instructions.  ``tests/kernels/test_compile.py`` has
the limits.  ``benchmarks/forms.py`` explains the words of a call (``y``, ``dx``, …).
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

# Triton reads both when it is imported: compile, don't interpret; and an explicit default.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton

from benchmarks.report import align
from fastlora.kernels.config import default_config

from .cases import HARDWARE, REPORTED, Case, cases, half_of_cases, launches, other_cases
from .machine_code import compile_launch

_WITHOUT_FORM = {
    "form": "", "config": {}, "segments": 0, "ieee": False, "refused": "", "estimated": 0,
}  # fmt: skip
NAMES = [name for name, target in HARDWARE.items() if target.kind != "cpu"]


def rows_of(case: Case, by_ptx: bool = False) -> list[dict]:
    """Compile the launches of the call: its kernel, and the sum of its planes if it has any.

    ``by_ptx``: see :func:`compile_launch`.
    """
    target, form, config, facts = HARDWARE[case.target], case.form, case.config, _WITHOUT_FORM
    if form:
        config = config or default_config(form.kernel, target, form.call)
        facts = {
            "form": form.name, "config": asdict(config), "segments": form.segments,
            # float32 without tensor cores, if the target has no exact ones
            "ieee": form.dtype == torch.float32 and form.precision == "ieee",
            "refused": config.why_not(target, form.call),  # "" if it fits
            "estimated": config.shared_memory(target, form.call),
        }  # fmt: skip
    try:
        return [
            {
                "case": case.name, "target": case.target, "kernel": launch.name, **facts,
                "descriptors": launch.arguments.get("DESCRIPTORS", False),
                "limit": target.shared_memory,
                "compiled": asdict(compile_launch(launch, target, by_ptx)),
            }
            for launch in launches(case)
        ]  # fmt: skip
    except Exception as error:
        raise RuntimeError(f"{case.name} doesn't compile") from error


def table(rows: Sequence[dict]) -> str:
    """A line for each row, a column for each number."""
    names = [name.replace("_", " ") for name in rows[0]["compiled"]]
    lines = [(r["case"], r["kernel"], r["limit"], *r["compiled"].values()) for r in rows]
    return align([("call", "kernel", "limit", *names), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=NAMES, default=REPORTED, metavar="NAME")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--brief", action="store_true", help="fewer forms: most configs in only one"
    )
    parser.add_argument("--half", type=int, choices=(0, 1), help="half of these, for GPUs in turn")
    arguments = parser.parse_args()
    if arguments.half is not None:
        chosen = half_of_cases(arguments.target, arguments.half)
    else:
        chosen = [case for name in arguments.target for case in cases(name, arguments.brief)]
        chosen += [case for name in arguments.target for case in other_cases(name)]
    launches(chosen[0])  # imports modules, so that the pool's processes don't have to
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        compiled = partial(rows_of, by_ptx=arguments.half is not None)
        rows = [*chain.from_iterable(pool.map(compiled, chosen, chunksize=4))]
    print(f"Triton {triton.__version__}, {len(rows)} kernels\n\n{table(rows)}")
    if arguments.json:
        text = json.dumps({"triton": triton.__version__, "rows": rows}, indent=1)
        arguments.json.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
