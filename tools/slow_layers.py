"""A 16-bit layer's step on a CPU without 16-bit products, over the float32 layer's of its sizes.

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python -m tools.slow_layers MxKxN …

Forward and backward of fastlora.lora_linear, rank 16, on one thread, in CPU time; the layers take
turns.  With bitsandbytes there is one more, whose base is NF4.  Beside the benchmarks' results of
the day it leaves slow-layers-DATE.json.
"""

import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import fastlora
from benchmarks.measure import Step, in_turn, row_of
from benchmarks.report import markdown
from benchmarks.results import describe_machine, results_path, write_results

SECONDS, LIMIT, NF4_LIMIT = 5.0, 1.15, 1.6
FLOAT32, NF4 = "fastlora, float32", "NF4, bfloat16"
# By name: the dtypes of x and weight, and of the adapter.
KINDS = {
    FLOAT32: (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float32),
    "bfloat16, bfloat16 adapter": (torch.bfloat16, torch.bfloat16),
    **({NF4: (torch.bfloat16, torch.float32)} if find_spec("bitsandbytes") else {}),
    "fastlora": (torch.bfloat16, torch.float32),
}


def step_of(M: int, K: int, N: int, name: str) -> Step:
    """Forward and backward; the CPU seconds of it."""
    dtype, adapter_dtype = KINDS[name]
    torch.manual_seed(0)
    x, dy = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(M, N).to(dtype)
    weight = torch.randn(N, K).mul_(K**-0.5).to(dtype)
    lora_a = torch.randn(16, K).mul_(K**-0.5).to(adapter_dtype).requires_grad_()
    lora_b = torch.randn(N, 16).mul_(0.25).to(adapter_dtype).requires_grad_()
    packed = _packed(weight, lora_a, lora_b) if name == NF4 else None

    def call() -> Tensor:
        if packed is not None:
            return packed(x)
        return fastlora.lora_linear(x, weight, lora_a, lora_b, scale=2.0)

    def step() -> dict[str, float]:
        start = time.process_time()
        call().backward(dy)
        x.grad = lora_a.grad = lora_b.grad = None
        return {"both": time.process_time() - start}

    return step


def _packed(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> fastlora.LoRALinear:
    """The layer with this weight in NF4, its absmax nested, and these adapters."""
    import bitsandbytes as bnb

    N, K = weight.shape
    base = bnb.nn.LinearNF4(K, N, bias=False, compute_dtype=weight.dtype)
    base.load_state_dict({"weight": weight})
    layer = fastlora.LoRALinear.from_linear(base.to("cpu"), r=16, lora_alpha=32)
    layer.lora_A, layer.lora_B = nn.Parameter(lora_a), nn.Parameter(lora_b)
    return layer


def measure(M: int, K: int, N: int) -> dict:
    steps = {name: step_of(M, K, N, name) for name in KINDS}
    limits = {name: NF4_LIMIT if name == NF4 else LIMIT for name in KINDS if name != FLOAT32}
    targets = [("both", f"{name}/{FLOAT32}", limit) for name, limit in limits.items()]
    case = SimpleNamespace(id=f"{M}x{K}x{N}-r16", table="slow layers", targets=targets)
    return row_of(case, in_turn(steps, SECONDS), saved={})


def main() -> None:
    machine = describe_machine(torch.device("cpu")) | {"threads": 1}
    torch.set_num_threads(machine["threads"])
    rows = [measure(*map(int, shape.split("x"))) for shape in sys.argv[1:]]
    write_results(results_path(machine, name="slow-layers"), machine, [], rows)
    print(markdown(rows, machine))


if __name__ == "__main__":
    main()
