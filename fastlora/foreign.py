"""Classes of what fastlora doesn't import, known by their names.

``sys.modules`` isn't asked: torch.compile would guard the number of its modules, and compile again
after any import.
"""

# What FSDP2 and FSDP derive classes from.
FULLY_SHARDED = ("torch.distributed.fsdp", "FSDPModule")
FSDP = ("torch.distributed.fsdp", "FullyShardedDataParallel")
DDP = ("torch.nn.parallel", "DistributedDataParallel")


def derived_from(kind: type, package: str, name: str) -> type | None:
    """The class of this name in this package that ``kind`` is or inherits from; None: none is."""
    return next((base for base in kind.__mro__ if is_class(base, package, name)), None)


def is_class(kind: type, package: str, name: str) -> bool:
    """Whether ``kind`` is the class of this name in this package, or in a module inside of it."""
    return kind.__name__ == name and f"{kind.__module__}.".startswith(f"{package}.")


def is_dtensor(tensor: object) -> bool:
    """Whether it is torch's DTensor, of which each rank has a part."""
    return is_class(type(tensor), "torch.distributed.tensor", "DTensor")
