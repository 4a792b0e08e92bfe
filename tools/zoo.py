"""Compare lazy heads with standard ones, on tiny models of all classes of transformers.

    python -m tools.zoo                        # causal and sequence-to-sequence classes
    python -m tools.zoo LlamaForCausalLM …     # these classes

Each class runs in a process of its own, in float32 on the CPU.  The loss, the gradients and the
logits must equal the standard head's, with a head that trains and with a frozen one.  Then the
logits of an evaluation are compared.  A line for each class says what happened:

    fused       the loss ran without logits, and all numbers are equal
    dense       the logits were computed, and all numbers are equal
    left alone  the head stayed the standard one
    not run     no tiny model of the class runs with the standard head
    random      two standard calls differ, so nothing can be compared
    WRONG       numbers differ, or only the call with a lazy head fails

The exit code is 1 if a class is WRONG.
"""

import argparse
import multiprocessing
import os
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastlora.layers import logits, logits_functions
from fastlora.layers.classes import change_classes
from fastlora.peft import head as heads

SECONDS = 90  # for a class
TOLERANCE = 5e-5  # of the largest number of a tensor; float32 sums in another order
LARGEST = 60e6  # parameters

# The size of a tiny model for each number of a configuration, by its name.
_LAYERS = r"num_hidden_layers|n_layers?|num_(de|en)?_?(coder_)?layers|(de|en)coder_layers"
_KV = r"num_(key_value|kv)_heads"
_EXPERTS = r"num_(local_)?experts|n_routed_experts|moe_num_experts"
_CHOSEN = r"num_experts_per_tok(en)?|moe_topk|moe_k|num_selected_experts|top_k_experts"
_FEW = {
    r"(de|en)?(coder_)?vocab_size(_per_layer_input)?|(src|tgt|text|entity)_vocab_size": 131,
    _LAYERS: 4,
    _EXPERTS: 4,
    r"(pad|bos)_token_id|padding_idx": 0,
    r"eos_token_id": 2,
}
_TINY = _FEW | {
    r"(attention_)?hidden_size|d_model|n_embd|dim|(word_)?embed(ding)?_(proj_)?(dim|size)": 64,
    r"model_dim|lru_width": 64,
    r"intermediate_size|\w*(de|en)coder_ffn_dim|ffn_(hidden_size|dim)|d_ff|dff|dim_ff": 96,
    r"n_inner|feed_forward_(hidden_)?size": 96,
    _LAYERS: 2,
    r"(num|n|\w*attention)_(attention_)?heads?|n_head|index_n_heads|linear_num_\w+_heads": 4,
    _KV: 2,
    r"(qk_rope_|qk_nope_|v_|linear_key_|linear_value_|index_|swa_|mamba_)?head_dim": 16,
    r"attention_head_(dim|size)|dim_head|mamba_d_head|rotary_dim|(q|kv)_lora_rank": 16,
    r"sliding_window|chunk_size|mamba_chunk_size|mamba_d_state|(ssm_)?state_size": 16,
    r"max_(position_embeddings|seq_len|sequence_length)|n_positions|n_ctx|mamba_d_ssm": 128,
    _CHOSEN: 2,
    r"moe_intermediate_size|shared_(expert_)?intermediate_size|expert_ffn_hidden_size": 32,
    r"n_group|topk_group|n_shared_experts|mamba_n_groups": 1,
    r"mamba_(n_heads|num_heads)|index_topk|attention_window_size|hidden_size_per_layer_input": 8,
    r"mamba_expand": 2,
}
# Tried in turn until one runs.  The last one is the class's own configuration.
ATTEMPTS: tuple[dict[str, int], ...] = (
    _TINY,
    _TINY | {_KV: 4},
    _TINY | {_LAYERS: 8},
    _TINY | {_LAYERS: 12, _KV: 4},
    _TINY | {_CHOSEN: 1},
    _FEW,
    {},
)
_LEFT_OUT = ((), ("head_dim",), ("n_group", "topk_group"), ("chunk_size",), ("mamba_n_heads",))


class Outcome(NamedTuple):
    found: str
    detail: str = ""


class SkippedError(Exception):
    """No model was made of this attempt, or its standard call fails."""


def classes() -> dict[str, str]:
    """The model type of each causal and sequence-to-sequence class."""
    found: dict[str, str] = {}
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for model_type, names in mapping.items():
            for name in names if isinstance(names, tuple | list) else (names,):
                found.setdefault(name, model_type)
    return found


def tiny_config(kind: Any, sizes: dict[str, int]) -> Any:
    """A configuration of this class, and of its parts, with small sizes."""
    standard, given = kind(), {}
    for name, value in standard.to_dict().items():
        if type(value) is int or name == "head_dim":
            found = [size for pattern, size in sizes.items() if re.fullmatch(pattern, name)]
            given |= dict.fromkeys([name], found[-1]) if found else {}
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(standard, name, None)
        if part is not None:
            given[name] = tiny_config(type(part), sizes).to_dict()
    errors = []
    for names in _LEFT_OUT:  # names that this class derives from others
        try:
            return kind(**{name: value for name, value in given.items() if name not in names})
        except Exception as error:
            errors.append(error)
    raise errors[0]


def tiny_model(name: str, model_type: str, sizes: dict[str, int]) -> Any:
    kind = getattr(transformers, name)
    config = tiny_config(kind.config_class or CONFIG_MAPPING[model_type], sizes)
    config.use_cache = False
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if hasattr(config, "is_decoder"):  # Reformer's class is only for decoders
        config.is_decoder = name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind(config).parameters())
    if count > LARGEST:
        raise SkippedError(f"has {count / 1e6:.0f} million parameters at least")
    same_seed()
    model = kind(config).float().train()
    # Some classes don't initialize all parameters, or set them to zero.
    for parameter in model.parameters():
        largest = parameter.abs().max()
        if not largest < 1e3 or (parameter.dim() > 1 and not largest):
            nn.init.normal_(parameter, std=0.05)
    return model


def same_seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # BigBird's attention
    random.seed(0)


def batch_of(model: Any) -> dict[str, Tensor]:
    vocabulary = min(100, getattr(model.config.get_text_config(), "vocab_size", 100))
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (2, 24), generator=draw)
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, batch: dict[str, Tensor], counts: Counter) -> dict[str, Tensor]:
    """The loss, the gradients, and the logits, which are read last."""
    model.train().zero_grad()
    same_seed()
    out = model(**batch)
    loss = out.loss if hasattr(out, "loss") else out[0]
    loss.backward()
    counts["until read"] = counts["dense"]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **_logits_of(out), **found}


def _logits_of(out: Any) -> dict[str, Tensor]:
    made = getattr(out, "logits", None)
    return {"logits": made.detach() + 0.0} if isinstance(made, Tensor) else {}


def evaluation(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    same_seed()
    with torch.no_grad():
        out = model.eval()(**batch)
        return _logits_of(out) | ({"loss": out.loss} if hasattr(out, "loss") else {})


def apart(found: dict[str, Tensor], standard: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference over the tensors, relative to a tensor's largest number."""
    if found.keys() != standard.keys():
        return float("inf"), f"only one has {', '.join(sorted(found.keys() ^ standard.keys()))}"
    gradients = [g.abs().max().item() for n, g in standard.items() if n not in ("loss", "logits")]
    smallest = max([*gradients, 0.0]) * 1e-2  # smaller gradients are rounding errors of larger sums
    worst = (0.0, "nothing")
    for name, tensor in standard.items():
        size = max(tensor.abs().max().item(), smallest)
        difference = (found[name] - tensor).abs().max().item() / (size or 1.0)
        if not difference <= worst[0]:
            worst = difference, name
    return worst


@contextmanager
def counted() -> Iterator[Counter]:
    """Count calls with lazy logits, losses without logits, and computations of logits."""
    counts: Counter = Counter()

    def count(owner: Any, name: str, kind: str) -> Any:
        function = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[kind] += 1
            return function(*args, **kwargs)

        return mock.patch.object(owner, name, counting)

    with (
        count(heads, "lazy_logits", "lazy"),
        count(logits_functions, "head_loss", "fused"),
        count(logits.HeadCall, "logits", "dense"),
    ):
        yield counts


def compare(model: Any, batch: dict[str, Tensor], begin: Any = lambda: None) -> Outcome:
    """Judge a model.  ``begin`` is called before its first call with a lazy head."""
    unused: Counter = Counter()
    try:
        runs = [step(model, batch, unused) for _ in range(2)]
        noise, where = apart(*runs)
    except Exception as error:
        raise SkippedError(_shown(error)) from error
    if not noise <= TOLERANCE:
        return Outcome("random", f"two standard calls differ by {noise:.1e} in {where}")
    begin()
    worst, counts = (0.0, "nothing"), []
    for is_trained in (True, False):
        for head in heads.heads_of(model):
            head.requires_grad_(is_trained)
        standard = step(model, batch, unused), evaluation(model, batch)
        with warnings.catch_warnings(record=True) as said, counted() as count:
            warnings.simplefilter("always")
            taken = heads.make_lazy(model)
            if not taken:
                return Outcome("left alone", str(said[-1].message).split(": ", 1)[1])
            try:
                lazy = step(model, batch, count), evaluation(model, batch)
            except Exception as error:
                return Outcome("WRONG", f"only the lazy head raises {_shown(error)}")
        change_classes(taken)
        for found, wanted in zip(lazy, standard, strict=True):
            difference, name = apart(found, wanted)
            if not difference <= TOLERANCE:
                what = "training" if found is lazy[0] else "evaluation"
                return Outcome("WRONG", f"{name} in {what} differs by {difference:.1e}")
            worst = max(worst, (difference, name))
        counts.append(count)
    detail = f"{worst[0]:.1e} in {worst[1]}"
    if not counts[0]["lazy"]:
        return Outcome("left alone", f"no call of its head is lazy; {detail}")
    is_fused = all(count["fused"] and not count["until read"] for count in counts)
    return Outcome("fused" if is_fused else "dense", detail)


def judge(name: str, model_type: str, begin: Any = lambda: None) -> Outcome:
    """Judge the first attempt whose standard call runs."""
    reasons = []
    for sizes in ATTEMPTS:
        try:
            model = tiny_model(name, model_type, sizes)
        except Exception as error:
            reasons.append(_shown(error))
            continue
        try:
            return compare(model, batch_of(model), begin)
        except SkippedError as skipped:
            reasons.append(str(skipped))
    return Outcome("not run", reasons[0])


def _shown(error: BaseException) -> str:
    kind = "" if isinstance(error, SkippedError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:120]


def _child(pipe: Connection, name: str, model_type: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    pipe.send(judge(name, model_type, lambda: pipe.send(None)))


def judge_all(names: dict[str, str], jobs: int) -> Iterator[tuple[str, Outcome]]:
    """Judge each class in a process of its own, so that a crash ends only that process."""
    context = multiprocessing.get_context("fork")  # imports are done
    waiting, running = list(names.items()), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, model_type = waiting.pop(0)
            ours, theirs = context.Pipe()
            child = context.Process(target=_child, args=(theirs, name, model_type), daemon=True)
            child.start()
            # Both ends stay open, because reading from a pipe that a child closed raises an error.
            running[name] = child, ours, theirs, time.monotonic() + SECONDS
        wait([child.sentinel for child, *_ in running.values()], timeout=1.0)
        for name, (child, ours, _, end) in [*running.items()]:
            if not child.is_alive() or time.monotonic() > end:
                yield name, _outcome(child, ours)
                del running[name]


def _outcome(child: BaseProcess, pipe: Connection) -> Outcome:
    """The outcome that a child sent.  A child that still runs is late, and is ended."""
    is_late, told = child.is_alive(), []
    child.kill()
    child.join()
    while pipe.poll():
        told.append(pipe.recv())
    if told and told[-1]:
        return told[-1]
    if is_late:
        with_what = "with a lazy head" if told else "without a lazy head"
        return Outcome("not run", f"takes more than {SECONDS} s, {with_what}")
    crash = f"its process ended with {child.exitcode}"
    return Outcome("WRONG" if told else "not run", crash)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make zoo", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CLASS", help="without it, all classes")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (2)")
    asked = parser.parse_args()
    known = classes()
    if unknown := set(asked.names) - known.keys():
        parser.error(f"transformers {transformers.__version__} has no {', '.join(unknown)}")
    transformers.logging.set_verbosity_error()
    started, counts = time.monotonic(), Counter[str]()
    names = {name: known[name] for name in asked.names} or known
    for name, (found, detail) in judge_all(names, asked.jobs):
        counts[found] += 1
        print(f"{name:40} {found:10}  {detail}", flush=True)
    total = ", ".join(f"{count} {found}" for found, count in sorted(counts.items()))
    print(f"{len(names)} classes of transformers {transformers.__version__}: {total}", end=" ")
    print(f"({time.monotonic() - started:.0f} s)")
    return int(bool(counts["WRONG"]))


if __name__ == "__main__":
    sys.exit(main())
