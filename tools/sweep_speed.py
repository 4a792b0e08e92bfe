"""Time a step of a sweep of eight LoRA configurations, and the steps of eight separate runs.

    python -m tools.sweep_speed [16 256 …]

The arguments are tokens for each configuration.  The model has Qwen3 0.6B's shapes, with 4 of its
28 layers and 4/28 of its vocabulary, in float32.  A separate run uses ``get_peft_model``.  The
results file is sweep-DATE.json in the folder of the benchmarks' results.
"""

import sys
import time
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import peft
import torch

import fastlora
from benchmarks.blocks import Step
from benchmarks.cases import cpu_cases
from benchmarks.measure import in_turn, row_of
from benchmarks.report import text
from benchmarks.results import describe_machine, results_path, write_results

ROUNDS, STEPS, SWEEP, RUNS = 5, 2, "fastlora", "eight runs"
CONFIGS = [{"r": r, "learning_rate": rate} for r in (2, 8, 32, 64) for rate in (1e-4, 5e-4)]
# Limits of the ratio of the sweep's time to the runs', by tokens for each configuration.
LIMITS = {16: 0.6, 256: 1.0}


def seconds_alone(model: torch.nn.Module, r: int, learning_rate: float, batch: dict) -> float:
    """Seconds of a step of one configuration: forward, backward, clipping, AdamW."""
    adapted = fastlora.get_peft_model(model, peft.LoraConfig(r=r, target_modules="all-linear"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    fastlora.restore(adapted).unload()
    return seconds / STEPS


def measure(model: torch.nn.Module, tokens: int) -> dict:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=draw)
    batch = {"input_ids": ids, "labels": ids}

    def runs() -> dict[str, float]:
        return {"step": sum(seconds_alone(model, **config, batch=batch) for config in CONFIGS)}

    def sweep() -> dict[str, float]:
        settings = {"steps": STEPS, "eval_steps": STEPS, "progress": False, "eval_data": [batch]}
        with TemporaryDirectory() as folder:
            found = fastlora.sweep(model, CONFIGS, [batch], output_dir=folder, **settings)
        return {"step": found.seconds / STEPS}

    targets = [("step", f"{SWEEP}/{RUNS}", LIMITS.get(tokens, 1.0))]
    case = SimpleNamespace(id=f"qwen3-4-layers-8x{tokens}-fp32", table="sweep", targets=targets)
    return row_of(case, in_turn({RUNS: runs, SWEEP: sweep}, rounds=ROUNDS), saved={})


def main() -> None:
    machine = describe_machine(torch.device("cpu"))
    torch.manual_seed(0)
    model = Step(next(case for case in cpu_cases() if case.id.startswith("qwen3-0.6b-step"))).model
    rows = [measure(model, tokens) for tokens in map(int, sys.argv[1:] or ["16", "256"])]
    write_results(results_path(machine, name="sweep"), machine, [], rows)
    print(text(rows))


if __name__ == "__main__":
    main()
