"""A training step of the demo's model in bfloat16 on a CPU without 16-bit products, and in float32.

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python -m tools.slow_cpu .cache/gemma-3-270m ROWSxTOKENS [--peft]

keeps other CPUs to such instructions.  ``make demo`` writes the model.  All on one thread, in CPU
time.  The fast sides take turns; --peft adds one step of PEFT's in bfloat16, minutes long.  Beside
the benchmarks' results of the day it leaves slow-cpu-DATE.json.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import peft
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import fastlora
from benchmarks.measure import digits, ratios
from benchmarks.report import markdown
from benchmarks.results import describe_machine, results_path, write_results

ROUNDS = 5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLOAT32, ATTENTION, PEFT, OURS = "fastlora, float32", "float32 attention", "peft", "fastlora"
# Upper limits, of the times' ratios.
TARGET_RATIOS = {
    f"{OURS}/{FLOAT32}": 1.65, f"{ATTENTION}/{FLOAT32}": 1.1, f"{OURS}/{PEFT}": round(1 / 15, 4)
}  # fmt: skip


def float32_attention(module, q, k, v, mask, **settings):
    """docs/peft.md's."""
    mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    y, weights = sdpa_attention_forward(module, q.float(), k.float(), v.float(), mask, **settings)
    return y.to(q.dtype), weights


def make_model(folder: str, dtype: torch.dtype) -> peft.PeftModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS)
    return peft.get_peft_model(model, config).train()


def step_of(model: peft.PeftModel, rows: int, tokens: int) -> Callable[[], float]:
    """Forward, backward and AdamW; the CPU seconds of it."""
    ids = torch.randint(0, 200_000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        start = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    return step


@contextmanager
def attention(model: peft.PeftModel, name: str) -> Iterator[None]:
    before = model.get_base_model().config._attn_implementation
    model.get_base_model().set_attn_implementation(name)
    yield
    model.get_base_model().set_attn_implementation(before)


def measure(folder: str, rows: int, tokens: int, with_peft: bool) -> dict:
    wide, narrow = make_model(folder, torch.float32), make_model(folder, torch.bfloat16)
    times: dict[str, list[float]] = {FLOAT32: [], ATTENTION: [], OURS: []}
    for model in (wide, narrow):
        print(fastlora.optimize(model), file=sys.stderr)
    steps = {model: step_of(model, rows, tokens) for model in (wide, narrow)}
    for each in range(ROUNDS + 1):
        for name in times:
            model, chosen = wide if name == FLOAT32 else narrow, name == ATTENTION
            with attention(model, "float32" if chosen else "sdpa"):
                steps[model]()  # finds the caches and the heap as its own kind leaves them
                times[name].append(steps[model]())
        print({name: found[-1] for name, found in times.items()}, file=sys.stderr)
        if each == 0:
            times = {name: [] for name in times}
    if with_peft:
        fastlora.restore(narrow)
        seconds = steps[narrow]()
        times = {FLOAT32: times[FLOAT32], ATTENTION: times[ATTENTION], PEFT: [seconds] * ROUNDS} | {
            OURS: times[OURS]
        }
    pairs = [(name, FLOAT32) for name in times if name != FLOAT32]
    pairs += [(name, PEFT) for name in (ATTENTION, OURS) if with_peft]
    found = {f"{a}/{b}": ratios(times[a], times[b]) for a, b in pairs}
    seconds = {name: digits(sorted(each)[len(each) // 2]) for name, each in times.items()}
    targets = [
        {"quantity": "step", "ratio": ratio, "limit": limit, "value": found[ratio][1],
         "met": found[ratio][1] <= limit}
        for ratio, limit in TARGET_RATIOS.items() if ratio in found
    ]  # fmt: skip
    return {
        "id": f"gemma3-270m-{rows}x{tokens}-bf16", "table": "slow cpu", "rounds": ROUNDS,
        "peft_steps": int(with_peft), "seconds": {"step": seconds}, "ratios": {"step": found},
        "saved": {}, "targets": targets,
    }  # fmt: skip


def main() -> None:
    folder, shape, *options = sys.argv[1:]
    machine = describe_machine(torch.device("cpu")) | {"threads": 1}
    torch.set_num_threads(machine["threads"])
    AttentionInterface.register("float32", float32_attention)
    AttentionMaskInterface.register("float32", sdpa_mask)
    rows, tokens = map(int, shape.split("x"))
    row = measure(folder, rows, tokens, "--peft" in options)
    path = results_path(machine)
    path = path.with_name(f"slow-cpu-{path.name}")
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [each for each in kept if each["id"] != row["id"]] + [row]
    write_results(path, machine, [], kept)
    print(markdown(kept, machine))


if __name__ == "__main__":
    main()
