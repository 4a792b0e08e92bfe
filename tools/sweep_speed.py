"""A step of a sweep of eight LoRA configurations, and eight runs' steps one after the other.

    python -m tools.sweep_speed [16 256 …]

for so many tokens a configuration.  The model has Qwen3 0.6B's shapes, 4 of its 28 layers and as
much of its vocabulary, in float32.  A run alone is ``apply_lora``'s, with its blocks.  Beside the
benchmarks' results of the day it leaves sweep-DATE.json.
"""

import sys
import time
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import fastlora
from benchmarks.measure import in_turn, row_of
from benchmarks.report import markdown
from benchmarks.results import describe_machine, results_path, write_results
from fastlora.trials.batches import Feed
from fastlora.trials.layer import attached
from fastlora.trials.training import Training, causal_loss
from fastlora.trials.trial import Options, Trial, as_trials

ROUNDS, SWEEP, RUNS = 5, "fastlora", "eight runs"
CONFIGS = [{"r": r, "learning_rate": rate} for r in (2, 8, 32, 64) for rate in (1e-4, 5e-4)]
LIMITS = {16: 0.6, 256: 1.0}  # of the sweep's time over the runs', by tokens a configuration


def make_model() -> torch.nn.Module:
    config = Qwen3Config(
        vocab_size=21760, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def seconds_together(model: torch.nn.Module, trials: tuple[Trial, ...], batch: dict) -> float:
    """Of a step of all trials: forward, backward, clipping, AdamW."""
    options = Options(100, False, None, "constant", 0, 0.0, 1.0, 0)
    with attached(model, trials, 0) as parts:
        training = Training(model, trials, parts, options, causal_loss, [])
        state, feed = training.begun({}), Feed([batch], 0)
        training.step(state, feed)  # makes AdamW's moments
        start = time.perf_counter()
        training.step(state, feed)
        return time.perf_counter() - start


def seconds_alone(model: torch.nn.Module, trial: Trial, batch: dict) -> float:
    """The same of one configuration."""
    fastlora.apply_lora(model, trial.config)
    try:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=trial.learning_rate, weight_decay=0.0)
        for _ in range(2):
            start = time.perf_counter()
            optimizer.zero_grad()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return time.perf_counter() - start
    finally:
        fastlora.remove_lora(model)


def measure(model: torch.nn.Module, tokens: int) -> dict:
    ids = torch.randint(0, 21760, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch, trials = {"input_ids": ids, "labels": ids}, as_trials(CONFIGS)

    def runs() -> dict[str, float]:
        return {"step": sum(seconds_alone(model, trial, batch) for trial in trials)}

    def sweep() -> dict[str, float]:
        return {"step": seconds_together(model, trials, batch)}

    targets = [("step", f"{SWEEP}/{RUNS}", LIMITS.get(tokens, 1.0))]
    case = SimpleNamespace(id=f"qwen3-4-layers-8x{tokens}-fp32", table="sweep", targets=targets)
    return row_of(case, in_turn({RUNS: runs, SWEEP: sweep}, rounds=ROUNDS), saved={})


def main() -> None:
    machine, model = describe_machine(torch.device("cpu")), make_model().train()
    rows = [measure(model, tokens) for tokens in map(int, sys.argv[1:] or ["16", "256"])]
    write_results(results_path(machine, name="sweep"), machine, [], rows)
    print(markdown(rows, machine))


if __name__ == "__main__":
    main()
