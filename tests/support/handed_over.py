"""What Triton's launcher in C is handed, by ordinary launches and by replays: the same?

For a process with :mod:`cuda_standin`.  :func:`watch` comes before the first kernel is compiled.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

_launches: list[tuple] | None = None
_maps: dict[int, "_Map"] = {}


class _Map(NamedTuple):
    settings: tuple  # what it was encoded from, the address first
    made: Any  # Triton's, alive


def watch() -> None:
    """Put ourselves before the functions in C that launch, and that encode tensor maps."""
    import triton
    from triton.backends.nvidia import driver

    utils = triton.runtime.driver.active.utils
    for name, encode in list(vars(utils).items()):
        if name.startswith("fill_tma"):
            setattr(utils, name, _watching_maps(encode))
    if hasattr(utils, "launch"):
        utils.launch = _watching(utils.launch)
        return
    compile_module = driver.compile_module_from_src  # Triton 3.6 compiles a launcher a kernel

    def compiled(*arguments: Any, **keywords: Any) -> Any:
        module = compile_module(*arguments, **keywords)
        return SimpleNamespace(launch=_watching(module.launch))

    driver.compile_module_from_src = compiled


@contextmanager
def handed_over() -> Iterator[list[tuple]]:
    """The arguments of each launch in the block; tensors and maps among them stay alive."""
    global _launches
    _launches = []
    try:
        yield _launches
    finally:
        _launches = None


def differences(
    ordinary: Sequence[tuple], replayed: Sequence[tuple], pairs: Sequence[tuple[Tensor, Tensor]]
) -> list[str]:
    """Where these launches differ by more than the addresses of buffers.

    ``pairs``: tensors whose addresses are known, of the ordinary call and of the replayed one.
    """
    if len(ordinary) != len(replayed):
        return [f"{len(ordinary)} launches, {len(replayed)} in the replay"]
    known = {one.data_ptr(): two.data_ptr() for one, two in pairs}
    found: list[str] = []
    for i, (one, two) in enumerate(zip(ordinary, replayed, strict=True)):
        _compare(one, two, known, f"launch {i}", found)
    return found


def _compare(one: Any, two: Any, known: dict[int, int], where: str, found: list[str]) -> None:
    if isinstance(one, Tensor):
        _compare_addresses(one.data_ptr(), two, known, where, found)
    elif id(one) in _maps:
        if id(two) not in _maps:
            found.append(f"{where}: a tensor map, and {two!r}")
            return
        (address, *settings), (its_address, *its_settings) = _maps[id(one)][0], _maps[id(two)][0]
        _compare_addresses(address, its_address, known, where, found)
        _compare(settings, its_settings, known, f"{where}, map", found)
    elif isinstance(one, (tuple, list)):
        if not isinstance(two, (tuple, list)) or len(one) != len(two):
            found.append(f"{where}: {one!r}, and {two!r}")
            return
        for i, (each, other) in enumerate(zip(one, two, strict=True)):
            _compare(each, other, known, f"{where}.{i}", found)
    elif type(one).__name__ in ("HookChain", "LazyDict"):  # for hooks, of which there are none
        if two is not None:
            found.append(f"{where}: {one!r}, and {two!r}")
    elif type(one) is not type(two) or one != two:
        found.append(f"{where}: {one!r}, and {two!r}")


def _compare_addresses(
    one: int, two: Any, known: dict[int, int], where: str, found: list[str]
) -> None:
    if type(two) is not int:
        found.append(f"{where}: an address, and {two!r}")
    elif (known[one] != two) if one in known else (one % 16 != two % 16 or (not one) != (not two)):
        found.append(f"{where}: the address {one}, and {two}")


def _watching(launch: Callable) -> Callable:
    def watched(*arguments: Any) -> Any:
        if _launches is not None:
            _launches.append(arguments)
        return launch(*arguments)

    return watched


def _watching_maps(encode: Callable) -> Callable:
    def watched(*settings: Any) -> Any:
        made = encode(*settings)
        if _launches is not None:
            _maps[id(made)] = _Map(settings, made)
        return made

    return watched
