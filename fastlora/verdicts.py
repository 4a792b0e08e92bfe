"""Verdicts on compiled kernels, in files of the user's cache: which are right on which device.

A verdict is of one kernel's code on one kind of device with one driver, Triton and ptxas, and has a
file of its own, so that processes that judge at one time lose nothing.  Where no file can be
written, each process judges for itself.
"""

import contextlib
import json
from dataclasses import asdict, astuple, dataclass
from hashlib import sha256

from . import cache


@dataclass(frozen=True)
class Environment:
    """What a verdict holds for: names and versions."""

    device: str
    driver: str
    triton: str
    ptxas: str  # "" where it isn't NVIDIA's
    torch: str

    def __str__(self) -> str:
        assembler = f", ptxas {self.ptxas}" if self.ptxas else ""
        return f"{self.device} (driver {self.driver}, Triton {self.triton}{assembler})"


@dataclass(frozen=True)
class Verdict:
    kernel: str  # its name, and the hash of its code
    environment: Environment
    fault: str  # "": it is right

    @property
    def name(self) -> str:
        return self.kernel.split()[0]

    def write(self) -> None:
        """To its file, if that can be."""
        named = "\n".join([self.kernel, *asdict(self.environment).values()])
        file = cache.cache_folder() / _FOLDER / f"{sha256(named.encode()).hexdigest()[:32]}.json"
        cache.write(file, json.dumps(asdict(self), indent=1) + "\n")


_FOLDER = "verdicts"


def written() -> list[Verdict]:
    """Those of all processes of this user; what isn't one is passed over."""
    verdicts = []
    for text in cache.read(cache.cache_folder() / _FOLDER, "*.json").values():
        with contextlib.suppress(
            ValueError, TypeError, LookupError, AttributeError, RecursionError
        ):
            fields = json.loads(text)
            where = Environment(**fields["environment"])
            kernel, fault = fields["kernel"], fields["fault"]
            if kernel.split() and all(isinstance(w, str) for w in (fault, *astuple(where))):
                verdicts.append(Verdict(kernel, where, fault))
    return verdicts


def faults() -> list[Verdict]:
    """Those on kernels that were wrong."""
    return [verdict for verdict in written() if verdict.fault]
