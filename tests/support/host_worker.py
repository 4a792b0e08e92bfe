"""What tests/kernels/test_host.py asks about the host's side of launches for sm_90.

A process of its own: it prints JSON, "skipped" with a reason, or the result of each function below.
"""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import cuda_standin
import torch
from judge import LAYOUTS
from packed import random_float8, random_four_bit, random_int8
from torch import Tensor

from fastlora.projection import Adapter, Base, Output

RANDOM_LAYERS = 30
_ROWS = (1, 2, 7, 16, 17, 33, 64, 65, 127, 300, 1000, 4097)
_FEATURES = (1, 8, 24, 40, 100, 257, 640, 1000, 1024, 2048, 4096)
_RANKS = (1, 3, 8, 8, 16, 16, 16, 20, 64, 96, 200)
# Batches of a training run: powers of two, their neighbors, and what lies between.
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


# What Triton's launcher in C is handed, and what tensor maps were encoded from.
_launches: list[tuple] | None = None
_maps: dict[int, "_Map"] = {}


class _Map(NamedTuple):
    settings: tuple  # what it was encoded from, the address first
    made: Any  # Triton's, alive


def watch() -> None:
    """Put ourselves before the functions in C that launch, and that encode tensor maps.

    Before the first kernel is compiled.
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


def differences_of(
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


def by_plan(name: str | None) -> AbstractContextManager:
    """Of that name in plan.py; None: the default."""
    from fastlora.kernels import plan

    return plan.use_plan(getattr(plan, name)) if name else nullcontext()


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
    """Forward and backward of eight experts, some without rows: the inputs, and what came out."""
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
    """Kernels that Triton would compile for a layer over all LENGTHS, by plan and dropout."""
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
    """Launches by kernel, and tensor maps."""
    counts = {}
    for name, layer in STANDARD.items():
        with cuda_standin.counted() as counted:
            step(*layer)
        counts[name] = {"tensor maps": counted.tensor_maps, **counted.launches}
    return counts


def both_ways(call: Callable[[], list[Tensor]]) -> tuple:
    """Of a call that returns its tensors: how many launches, those of a replay, and where a replay
    differs from ordinary launches."""
    from fastlora.kernels.launch import Launch, intercept

    with handed_over() as ordinary, intercept(Launch.run):
        first = call()
    call()
    with handed_over() as replayed, cuda_standin.counted() as counted:
        second = call()
    differences = differences_of(ordinary, replayed, [*zip(first, second, strict=True)])
    return len(ordinary), {"tensor maps": counted.tensor_maps, **counted.launches}, differences


def experts() -> dict:
    """Launches by kernel, tensor maps, and where a replay differs from ordinary launches."""
    found = {}
    for name, call in {"plain": (4096, 0.0, False), "all": (4096, 0.1, True)}.items():
        _, launches, differences = both_ways(partial(step_experts, *call))
        found[name] = {"launches": launches, "differences": differences}
    return found


def replays() -> dict:
    """How many launches of random layers were compared, and where a replay differs from them."""
    import fastlora

    compared, differences = 0, []
    layers = [random_layer(seed) for seed in range(RANDOM_LAYERS)]
    for seed, layer in enumerate(layers + packed_layers()):
        plan = ("IN_PLACE", "FUSED", None)[seed % 3] if seed < RANDOM_LAYERS else None

        torch.set_float32_matmul_precision(("highest", "high")[seed % 2])

        def call(layer=layer, plan=plan) -> list[torch.Tensor]:
            torch.manual_seed(1)
            with by_plan(plan):
                ys = fastlora.lora_linears(
                    layer.x, layer.outputs, dropout=layer.dropout, backend="triton"
                )
                gradients = torch.autograd.grad(ys, layer.leaves, layer.dys) if layer.leaves else []
            inputs = [*layer.dys, layer.x, *(t for o in layer.outputs for t in tensors_of(o))]
            return [*inputs, *ys, *gradients]

        count, _, found = both_ways(call)
        compared += count
        differences += [f"seed {seed}, {plan}: {each}" for each in found]
    return {"compared": compared, "differences": differences}


def tensors_of(output) -> list[torch.Tensor]:
    (weight, bias), adapters = output
    found = [weight] if isinstance(weight, torch.Tensor) else [*weight.tensors]
    found += [] if bias is None else [bias]
    return [*found, *(tensor for adapter in adapters for tensor in adapter[:2])]


def unloaded() -> list[str]:
    """Which kernels of kept calls unload their code when Triton forgets them; it is the last."""
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


@dataclass
class RandomLayer:
    """One that no model has: any layouts, ranks and dtypes, and what trains of it."""

    x: Tensor
    outputs: list[Output[Tensor]]
    dys: list[Tensor]
    dropout: float

    @property
    def leaves(self) -> list[Tensor]:
        """What trains."""
        tensors = [self.x]
        for base, adapters in self.outputs:
            tensors += [base.bias] * (base.bias is not None)
            tensors += [tensor for adapter in adapters for tensor in adapter[:2]]
        return [tensor for tensor in tensors if tensor.requires_grad]


def random_layer(seed: int) -> RandomLayer:
    """Of up to five outputs, one of them perhaps frozen, some with two adapters; nothing is filled.

    dtypes are float16, bfloat16 and float32, of x and of each adapter.
    """
    draw = Random(seed)
    dtype = draw.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))

    def matrix(rows: int, columns: int, of: torch.dtype = dtype, dense: float = 0.5) -> Tensor:
        layout = "dense" if draw.random() < dense else draw.choice(list(LAYOUTS))
        return LAYOUTS[layout](lambda *shape: torch.empty(shape, dtype=of), rows, columns)

    def adapter(N: int, K: int) -> Adapter[Tensor]:
        pair = [matrix(r, K, of, dense=0.8), matrix(N, r, of, dense=0.8)]
        return Adapter(*(each.requires_grad_(draw.random() < 0.9) for each in pair), 2.0)

    def output(K: int) -> Output[Tensor]:
        N, bias = draw.choice(_FEATURES), None
        if draw.random() < 0.3:
            bias = torch.empty(N, dtype=draw.choice((dtype, torch.float32)))
            bias.requires_grad_(draw.random() < 0.3)
        count = draw.choice((0, 1, 1, 1, 1, 1, 1, 2))
        return Output(Base(matrix(N, K), bias), tuple(adapter(N, K) for _ in range(count)))

    M, K, r = draw.choice(_ROWS), draw.choice(_FEATURES), draw.choice(_RANKS)
    of = draw.choice((dtype, torch.float32, torch.float16))  # the adapters
    x = matrix(M, K).requires_grad_(draw.random() < 0.8)
    outputs = [output(K) for _ in range(draw.choice((1, 1, 1, 2, 3, 5)))]
    dys = [matrix(M, len(each.base.weight)) for each in outputs]
    return RandomLayer(x, outputs, dys, draw.choice((0.0, 0.1)))


def packed_layers() -> list[RandomLayer]:
    """With packed weights: unpacked in a product and made dense; one, a group, blocks over rows."""
    layers = []
    for make, widths in (
        (lambda n, k: random_four_bit(n, k, nested=256), (256,)),
        (lambda n, k: random_four_bit(n, k, block=128), (256, 64)),
        (random_int8, (256, 64)),
        (lambda n, k: random_float8(n, k, 128, 128, scale=torch.float32), (256,)),
    ):
        for rows, columns in ((16, 512), (200, 512), (16, 200)):
            x = torch.empty(rows, columns, dtype=torch.bfloat16, requires_grad=True)
            outputs = [
                Output(
                    Base(make(width, columns)),
                    (
                        Adapter(
                            torch.empty(8, columns, requires_grad=True),
                            torch.empty(width, 8, requires_grad=True),
                            2.0,
                        ),
                    ),
                )
                for width in widths
            ]
            dys = [torch.empty(rows, width, dtype=x.dtype) for width in widths]
            layers.append(RandomLayer(x, outputs, dys, 0.1 * (len(widths) > 1)))
    return layers


def main() -> None:
    reason = cuda_standin.why_not()
    if reason:
        print(json.dumps({"skipped": reason}))
        return
    cuda_standin.install()
    watch()
    # variants first, since it sees only what isn't compiled yet; unloaded last
    asked = (variants, standard_layers, experts, replays, unloaded)
    print(json.dumps({each.__name__: each() for each in asked}))


if __name__ == "__main__":
    main()
