"""Proves the kernels' accesses for all sizes: ``python -m tools.prove [KERNEL …]``."""

import importlib
import sys
import time
from typing import Any

from . import contracts, once
from .engine import Proof, Source, run
from .facts import MODES


def proof_of(kernel: str, mode: dict[str, Any], edits: dict | None = None, **options: Any) -> Proof:
    """What is proved, and what isn't, of a kernel in a mode."""
    launched, _ = MODES[kernel]
    file = "gated" if kernel == "gated_backward" else kernel
    jitted = getattr(importlib.import_module(f"fastlora.kernels.{file}"), f"{kernel}_kernel")
    proof, outputs = Proof(**options), {}

    def setup(proof: Proof) -> dict[str, Any]:
        made = launched(proof, **mode)
        outputs.update(made.outputs)
        taken = jitted.fn.__code__.co_varnames[: jitted.fn.__code__.co_argcount]
        return {name: made.arguments[name] for name in taken}

    run(proof, Source(contracts.CONTRACTS, edits), jitted, setup)
    if mode.get("segments") != "any" and not proof.failures:
        once.check(proof, outputs)
    return proof


if __name__ == "__main__":
    for kernel in sys.argv[1:] or MODES:
        for mode in MODES[kernel][1]:
            begin = time.monotonic()
            proof = proof_of(kernel, mode)
            print(kernel, mode, proof.proved, proof.solver.queries, f"{time.monotonic() - begin:.1f} s", flush=True)
            for site, example in proof.failures.items():
                print("    ", site, ":", example)
            print(*[f"     never: {site}\n" for site, ok in proof.sites.items() if not ok], end="")
