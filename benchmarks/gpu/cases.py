"""What a visit measures, in the order of importance, for time may run out."""

from collections.abc import Iterator

import torch

from ..shapes import DROPOUTS, Case, Model

DECODE = 16  # up to so many rows a call is inference: no gradients, and the merged layer takes part
GRAPHS = 256  # up to so many rows it is timed in a CUDA graph, too

MODELS = {
    "llama3-8b": Model(tokens=8192, hidden=4096, query=4096, key=1024, mlp=14336),
    "llama3-70b": Model(tokens=8192, hidden=8192, query=8192, key=1024, mlp=28672),
    "qwen3-32b": Model(tokens=4096, hidden=5120, query=8192, key=1024, mlp=25600),
    "gemma3-4b": Model(tokens=8192, hidden=2560, query=2048, key=1024, mlp=10240),
    "gemma3-27b": Model(tokens=4096, hidden=5376, query=4096, key=2048, mlp=21504),
}


def layer_cases(dry: bool) -> list[Case]:
    """Each with and without dropout in training; the main shape first."""
    if dry:
        return [
            *_cases("dry", 34, 40, (48,), r=8, dropouts=(0.1,)),
            *_cases("dry-qkv", 34, 40, (48, 24), r=8, dropouts=(0.0,)),
            *_cases("dry-decode", 2, 40, (48,), r=8),
        ]
    llama, large = MODELS["llama3-8b"], MODELS["llama3-70b"]
    qkv = (llama.query, llama.key, llama.key)
    gate_up = (llama.mlp, llama.mlp)
    cases = [
        *_cases("llama3-8b-q", 8192, 4096, (4096,)),
        *_cases("llama3-8b-qkv", 8192, 4096, qkv),
        *_cases("llama3-8b-q", 16, 4096, (4096,)),
        *_cases("llama3-8b-gateup", 8192, 4096, gate_up),
        *_cases("llama3-8b-q", 1, 4096, (4096,)),
        *_cases("llama3-8b-q", 256, 4096, (4096,)),
        *_cases("llama3-8b-down", 8192, llama.mlp, (4096,)),
        *_cases("llama3-8b-q", 4096, 4096, (4096,)),
    ]
    for r in (64, 8, 128):
        cases += _cases("llama3-8b-q", 8192, 4096, (4096,), r=r)
    cases += _cases("llama3-70b-q", 8192, large.hidden, (large.query,))
    for name in ("qwen3-32b", "gemma3-27b", "gemma3-4b"):
        model = MODELS[name]
        cases += _cases(f"{name}-up", model.tokens, model.hidden, (model.mlp,), dropouts=(0.1,))
        cases += _cases(
            f"{name}-qkv", model.tokens, model.hidden, (model.query, model.key, model.key),
            dropouts=(0.1,),
        )  # fmt: skip
    cases += _cases("llama3-8b-gateup", 16, 4096, gate_up)
    cases += _cases("llama3-8b-qkv", 1, 4096, qkv)
    cases += _cases("llama3-70b-down", 8192, large.mlp, (large.hidden,))
    return cases


def compiled_cases(dry: bool) -> list[Case]:
    """Those in which torch.compile's peer takes part: it compiles for long."""
    cases = layer_cases(dry)
    return cases[:1] if dry else cases[:2]


def main_cases(dry: bool) -> list[Case]:
    """Those whose launches are timed one by one, and whose tiles are tuned."""
    if dry:
        return layer_cases(dry)[:2]
    chosen = ("llama3-8b-q-8192x", "llama3-8b-qkv-8192x", "llama3-8b-gateup-8192x")
    cases = [case for case in layer_cases(dry) if case.id.startswith(chosen)]
    return [case for case in cases if case.r == 16] + [
        case for case in layer_cases(dry) if case.M <= GRAPHS or "down-8192" in case.id
    ]


def _cases(
    name: str,
    M: int,
    K: int,
    outputs: tuple[int, ...],
    r: int = 16,
    dropouts: tuple[float, ...] = DROPOUTS,
) -> Iterator[Case]:
    for dropout in dropouts if M > DECODE else (0.0,):
        yield Case(M, K, outputs, r, torch.bfloat16, torch.bfloat16, dropout, name)
