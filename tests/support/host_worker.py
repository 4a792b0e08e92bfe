"""Runs the measurements of tests/kernels/test_host.py on the host side of launches for sm_90.

It runs in a process of its own and prints JSON: the result of each function in :func:`main`, or
"skipped" with a reason.
"""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import cuda_standin
import torch
from random_calls import Case
from torch import Tensor

RANDOM_LAYERS = 24
# Row counts of a training run: powers of two, their neighbors, and values between them.
LENGTHS = sorted(
    {2**i + j for i in range(14) for j in (-1, 0, 1, 2**i // 3, 2**i // 2)} - {0} | {2**14}
)
# By name: rows, in_features, out_features of each projection, dropout, and the plan.
STANDARD = {
    "in-place": (512, 2048, (2048,), 0.0, "IN_PLACE"),
    "in-place-long": (4096, 2048, (2048,), 0.0, "IN_PLACE"),
    "in-place-dropout": (4096, 2048, (2048,), 0.1, "IN_PLACE"),
    "fused-few-rows": (16, 2048, (2048,), 0.0, "FUSED"),
    "fused": (4096, 2048, (2048,), 0.0, "FUSED"),
    "fused-dropout": (4096, 2048, (2048,), 0.1, "FUSED"),
    "default": (4096, 2048, (2048,), 0.0, None),
    "qkv-in-place": (4096, 2048, (2048, 512, 512), 0.0, "IN_PLACE"),
    "qkv-fused-dropout": (4096, 2048, (2048, 512, 512), 0.1, "FUSED"),
}


# The arguments passed to Triton's C launcher.
_launches: list[tuple] | None = None
# The arguments each tensor map was encoded from (the address first), and the map itself, which
# stays alive so that its id stays unique.
_maps: dict[int, tuple[tuple, Any]] = {}


def watch() -> None:
    """Wrap the C functions that launch kernels and encode tensor maps.

    Call it before the first kernel is compiled.
    """
    import triton
    from triton.backends.nvidia import driver

    utils = triton.runtime.driver.active.utils
    for name, encode in list(vars(utils).items()):
        if name.startswith("fill_tma"):
            setattr(utils, name, _watching_maps(encode))
    if hasattr(utils, "launch"):
        utils.launch = _watching(utils.launch)
        return
    # Triton 3.6 compiles one launcher for each kernel
    compile_module = driver.compile_module_from_src

    def compiled(*arguments: Any, **keywords: Any) -> Any:
        module = compile_module(*arguments, **keywords)
        return SimpleNamespace(launch=_watching(module.launch))

    driver.compile_module_from_src = compiled


@contextmanager
def handed_over() -> Iterator[list[tuple]]:
    """The arguments of each launch in the block.  Tensors and maps among them stay alive."""
    global _launches
    _launches = []
    try:
        yield _launches
    finally:
        _launches = None


def differences_of(
    ordinary: Sequence[tuple], replayed: Sequence[tuple], pairs: Sequence[tuple[Tensor, Tensor]]
) -> list[str]:
    """The differences between two sequences of launches, other than the addresses of buffers.

    ``pairs``: tensors of the ordinary call and of the replayed call, whose addresses must
    correspond.
    """
    if len(ordinary) != len(replayed):
        return [f"{len(ordinary)} launches, {len(replayed)} in the replay"]
    known = {one.data_ptr(): two.data_ptr() for one, two in pairs}
    return [
        f"launch {i}, argument {j}: {one!r}, and {two!r}"
        for i, launches in enumerate(zip(ordinary, replayed, strict=True))
        for j, (one, two) in enumerate(zip(*launches, strict=True))
        if not _agree(one, two, known)
    ]


def _agree(one: Any, two: Any, known: dict[int, int]) -> bool:
    """Whether a replay may pass ``two`` in the place of ``one``."""
    if isinstance(one, Tensor):  # a replay passes its address
        return _agree_on_address(one.data_ptr(), two, known)
    if id(one) in _maps:
        if id(two) not in _maps:
            return False
        (address, *settings), (its_address, *its_settings) = _maps[id(one)][0], _maps[id(two)][0]
        same_place = _agree_on_address(address, its_address, known)
        return same_place and _agree(settings, its_settings, known)
    if isinstance(one, (tuple, list)):
        of_one_length = isinstance(two, (tuple, list)) and len(one) == len(two)
        return of_one_length and all(_agree(*each, known) for each in zip(one, two, strict=True))
    # both stand for hooks, and no hook is set
    if type(one).__name__ in ("HookChain", "LazyDict"):
        return two is None
    return type(one) is type(two) and one == two


def _agree_on_address(one: int, two: Any, known: dict[int, int]) -> bool:
    if type(two) is not int:
        return False
    return known[one] == two if one in known else (one % 16, not one) == (two % 16, not two)


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
            _maps[id(made)] = settings, made
        return made

    return watched


def by_plan(name: str | None) -> AbstractContextManager:
    """Use the plan of this name from plan.py, or the default for None."""
    from fastlora.kernels import plan

    return plan.use_plan(getattr(plan, name) if name else None)


def step(
    M: int, K: int, outputs: tuple[int, ...], dropout: float, plan: str | None, device: str = "cpu"
) -> None:
    """Forward and backward of a group in bfloat16, with float32 adapters of rank 16."""
    import fastlora

    with torch.device(device):
        x = torch.empty(M, K, dtype=torch.bfloat16, requires_grad=True)
        group = [
            fastlora.Projection(
                torch.empty(N, K, dtype=torch.bfloat16),
                torch.empty(16, K, requires_grad=True),
                torch.empty(N, 16, requires_grad=True),
            )
            for N in outputs
        ]
    with by_plan(plan):
        ys = fastlora.lora_linears(x, group, dropout=dropout, backend="triton")
        torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])


def step_experts(S: int, dropout: float, transposed: bool, device: str = "cpu") -> list:
    """Forward and backward of eight experts, some without rows.  Returns inputs and results."""
    import fastlora

    experts, K, N = 8, 2048, 1536
    with torch.device(device):
        x = torch.empty(S, K, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(experts, N, K, dtype=torch.bfloat16)
        weight = weight.mT.contiguous().mT if transposed else weight
        bias = torch.empty(experts, N, dtype=torch.bfloat16) if transposed else None
        lora_a = torch.empty(experts, 16, K, requires_grad=True)
        lora_b = torch.empty(experts, N, 16, requires_grad=True)
        ends = torch.tensor([S * i // experts // 2 * 2 for i in (1, 1, 3, 4, 5, 5, 7, 8)]).int()
        dy = torch.empty(S, N, dtype=torch.bfloat16)
    leaves = [x, lora_a, lora_b]
    torch.manual_seed(1)
    y = fastlora.grouped_lora_linear(
        x, weight, lora_a, lora_b, ends, bias=bias, dropout=dropout, backend="triton"
    )
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    return [*leaves, weight, ends, dy, *([] if bias is None else [bias]), *found]


def variants() -> dict[str, int]:
    """How many kernels Triton would compile for a layer over all LENGTHS, by plan and dropout."""
    import triton

    from fastlora.kernels.launch import Launch, intercept
    from fastlora.kernels.target import TARGETS, use_target

    found: set[tuple[str, str]] = set()

    def instead_of_compiling(*, key: str, fn: object, **_) -> bool:
        found.add((fn.name, key))
        return True

    counts = {}
    triton.knobs.runtime.jit_cache_hook = instead_of_compiling
    for plan in ("IN_PLACE", "FUSED"):
        for dropout in (0.0, 0.1):
            found.clear()
            with use_target(TARGETS["sm_90"]), intercept(Launch.compile):
                for M in LENGTHS:
                    step(M, 4096, (4096,), dropout, plan, device="meta")
            counts[f"{plan} {dropout}"] = len(found)
    found.clear()
    with use_target(TARGETS["sm_90"]), intercept(Launch.compile):
        for S in LENGTHS:
            step_experts(S, 0.0, transposed=False)
    counts["experts"] = len(found)
    triton.knobs.runtime.jit_cache_hook = None
    return counts


def standard_layers() -> dict[str, dict]:
    """For each standard layer: launches by kernel, and tensor maps."""
    counts = {}
    for name, layer in STANDARD.items():
        with cuda_standin.counted() as counted:
            step(*layer)
        counts[name] = {"tensor maps": counted.tensor_maps, **counted.launches}
    return counts


def both_ways(call: Callable[[], list[Tensor]]) -> tuple:
    """Call it three times: ordinarily, to capture its launches, and as a replay.

    ``call`` returns its tensors.  Returns the number of ordinary launches, the counts of the
    replay, and the differences between the replay and the ordinary launches.
    """
    from fastlora.kernels.launch import Launch, intercept

    with handed_over() as ordinary, intercept(Launch.run):
        first = call()
    call()
    with handed_over() as replayed, cuda_standin.counted() as counted:
        second = call()
    differences = differences_of(ordinary, replayed, [*zip(first, second, strict=True)])
    return len(ordinary), {"tensor maps": counted.tensor_maps, **counted.launches}, differences


def experts() -> dict:
    """For calls of experts: launches by kernel, tensor maps, and differences in a replay."""
    found = {}
    for name, call in {"plain": (4096, 0.0, False), "all": (4096, 0.1, True)}.items():
        _, launches, differences = both_ways(partial(step_experts, *call))
        found[name] = {"launches": launches, "differences": differences}
    return found


def replays() -> dict:
    """The number of launches compared over random layers, and the differences in their replays.

    Each second layer is large and aligned.  Of each four, two may have packed weights.
    """
    import fastlora

    compared, differences = 0, []
    for seed in range(RANDOM_LAYERS):
        fixed: dict[str, Any] = {"kind": "layer"}
        if seed % 2:
            fixed |= {"M": 200, "K": 512, "N": 640, "adapter_dtype": torch.float32}
        if seed % 4 > 1:
            fixed |= {"format": ("nf4", "int8", "float8")[seed % 3]}
        case = Case(1, seed, "triton", **fixed)
        made = case.make(case)
        dys = [case.rows(width, case.dtype) for width in made.widths]
        leaves = [tensor for tensor in case.leaves.values() if tensor.requires_grad]
        torch.set_float32_matmul_precision(("highest", "high")[seed % 2])

        def call(case=case, made=made, dys=dys, leaves=leaves) -> list[Tensor]:
            torch.manual_seed(1)
            with by_plan(case.plan), fastlora.use_backend("triton"):
                ys = made.run()
                gradients = torch.autograd.grad(ys, leaves, dys) if leaves else []
            return [*dys, *case.given, *ys, *gradients]

        count, _, found = both_ways(call)
        compared += count
        differences += [f"seed {seed}, {case.words}: {each}" for each in found]
    return {"compared": compared, "differences": differences}


def benchmark() -> dict:
    """A row of ``make bench ARGS=host``."""
    from benchmarks import cases, host

    case = next(c for c in cases.host_cases() if c.dropout and c.id.startswith("layer-16"))
    return host.measure(case, 0.0)


def unloaded() -> list[str]:
    """Kernels of captured calls that unload their code when Triton forgets them.  Runs last."""
    import triton

    from fastlora.kernels.launch import intercept

    kernels, gone = set(), []
    with intercept(lambda launch: kernels.add(launch.kernel)):
        step(*STANDARD["fused"])
    step(*STANDARD["fused"])
    triton.knobs.runtime.kernel_unload_hook = lambda *unloaded: gone.append(unloaded[2])
    for kernel in kernels:
        kernel.device_caches.clear()
    gc.collect()
    return gone


def main() -> None:
    reason = cuda_standin.why_not()
    if reason:
        print(json.dumps({"skipped": reason}))
        return
    cuda_standin.install()
    watch()
    # variants runs first, because it sees only kernels that aren't compiled yet; unloaded runs last
    asked = (variants, standard_layers, experts, replays, benchmark, unloaded)
    print(json.dumps({each.__name__: each() for each in asked}))


if __name__ == "__main__":
    main()
