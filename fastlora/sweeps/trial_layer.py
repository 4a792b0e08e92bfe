"""Linear layers with one adapter for each trial; the rows of a batch are divided among trials."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..call.rows import AdapterMapping
from ..formats import quantized_weight
from ..layers.classes import change_class, class_over
from ..layers.frozen import matrix_of
from ..layers.linear import Pair, new_adapter, scaling_of
from ..layers.modules import called, full_name
from ..ops.functional import multi_lora_linear
from ..peft.targets import Target, find_targets
from .trial import Trial

_RECORD = "_fastlora_trials"
# A linear layer of one expert: the router chooses its rows, so their number and order tell nothing.
_ROUTED = re.compile(r"(?:^|\.)experts\.\d+\.")


class TrialRows:
    """Which trial each sequence of the running batch belongs to; all layers share this record.

    Before the first batch, layers compute the base only.
    """

    _owners: tuple[int, ...] = ()
    _lengths: frozenset[int] = frozenset()

    def share_out(self, trials: Sequence[int], batch: Mapping[str, Tensor]) -> None:
        """Announce the next call: the batch's sequences, once for each trial, in this order."""
        self._owners = tuple([trial for trial in trials for _ in batch["labels"]])
        self._lengths = frozenset(x.shape[1] for x in batch.values() if x.dim() > 1)

    def by_sequence(self, x: Tensor, name: str) -> Tensor:
        """x as [sequences, …].  An x of all tokens as rows becomes [sequences, tokens, features].

        Raises ValueError if x doesn't tell which trial a row belongs to, such as routed tokens.
        """
        count, shape = len(self._owners), tuple(x.shape)
        if len(shape) > 1 and shape[0] == count:
            return x
        all_tokens = any(shape[0] == count * length for length in self._lengths)
        if len(shape) == 2 and all_tokens and not _ROUTED.search(name):
            return x.unflatten(0, (count, -1))
        raise ValueError(
            f"{called(name)} is called with x of shape {shape}, which doesn't tell which trial a "
            f"row belongs to: its first dimension must be the {count} sequences, or all their "
            f"tokens in order; to leave this layer out, set exclude_modules=[{name!r}]"
        )

    def mapping(self, members: tuple[int, ...]) -> AdapterMapping | None:
        """The mapping for a layer that these trials adapt; None before the first batch."""
        return _mapping(self._owners, members) if self._owners else None


@lru_cache(maxsize=64)
def _mapping(owners: tuple[int, ...], members: tuple[int, ...]) -> AdapterMapping:
    # -1: no adapter, for trials that don't target this layer.
    return AdapterMapping([members.index(i) if i in members else -1 for i in owners], len(members))


class Adapters(NamedTuple):
    """One layer's adapters, of the trials that target it, in order."""

    name: str
    members: tuple[int, ...]
    pairs: list[Pair]
    numbers: dict[str, list[float]]  # "scales" and "dropout"
    rows: TrialRows


class TrialsLayer(nn.Module):
    """A mixin that gives a linear layer the adapters of several trials.

    :func:`fastlora.layers.classes.class_over` puts it before the layer's class.
    """

    plain_class: type[nn.Module]  # the layer's class without adapters

    def forward(self, x: Tensor) -> Tensor:
        adapters: Adapters = self.__dict__[_RECORD]
        mapping = adapters.rows.mapping(adapters.members)
        if mapping is None:
            return super().forward(x)
        # Reading needs grad mode where an earlier call in evaluation rearranged the packed weight.
        with torch.enable_grad():
            packed = quantized_weight(self, self.plain_class)
        if isinstance(packed, str):
            raise ValueError(f"the weight of {called(adapters.name)} can't be read: {packed}")
        weight: Any = matrix_of(self, self.plain_class) if packed is None else packed.weight

        lora_a, lora_b = map(list, zip(*adapters.pairs, strict=True))
        how: Any = {"bias": cast(Any, self).bias, "training": self.training, **adapters.numbers}

        def run(x: Tensor) -> Tensor:
            return multi_lora_linear(x, weight, lora_a, lora_b, mapping, **how)

        items = adapters.rows.by_sequence(x, adapters.name)
        y = run(items) if packed is None else packed.call(items, run)
        return y if items is x else y.flatten(0, 1)


@contextmanager
def attached(
    model: nn.Module, trials: Sequence[Trial], seed: int
) -> Iterator[tuple[list[dict[str, nn.Parameter]], TrialRows]]:
    """Inside, the model's layers have the adapters of all trials, and only adapters train.

    Yields each trial's parameters, by "layer.lora_A" …, and the record of rows for all layers.
    A trial's initial adapters are those of a new :class:`fastlora.LoRALinear`, in the model's order
    of layers, after ``torch.manual_seed(seed)``.  A PeftModel's adapters are disabled inside.
    Raises ValueError if a config matches nothing; the model is then unchanged.
    """
    targets = [find_targets(model, trial.config) for trial in trials]
    pairs = []
    for trial, of_trial in zip(trials, targets, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pairs.append({n: new_pair(target, trial) for n, target in of_trial.items()})
    rows = TrialRows()
    # Each change registers its undo, so an error inside restores the model.
    with ExitStack() as stack:
        if disabled := getattr(model, "disable_adapter", None):
            stack.enter_context(cast(Any, disabled)())
        for parameter in [weight for weight in model.parameters() if weight.requires_grad]:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for name, layer in model.named_modules():
            members = tuple([i for i, adapters in enumerate(pairs) if name in adapters])
            if members:
                made = [pairs[i][name] for i in members]
                own = [(targets[i][name], trials[i].config) for i in members]
                numbers = {
                    "scales": [scaling_of(t.lora_alpha, t.r, c.use_rslora) for t, c in own],
                    "dropout": [config.lora_dropout for _, config in own],
                }
                adapters = Adapters(name, members, made, numbers, rows)
                layer = getattr(layer, "base_layer", layer)
                layer.__dict__[_RECORD] = adapters
                stack.callback(layer.__dict__.pop, _RECORD)
                before = change_class(layer, class_over(TrialsLayer, type(layer), ""))
                stack.callback(change_class, layer, before)
        sides = ("lora_A", "lora_B")
        named = [
            {full_name(n, side): p for n in own for side, p in zip(sides, own[n], strict=True)}
            for own in pairs
        ]
        yield named, rows


def new_pair(target: Target, trial: Trial) -> Pair:
    pair = new_adapter(target.weight, target.r, target.dtype)
    # As in PEFT: False leaves lora_B random as nn.Linear's, "gaussian" draws N(0, 1 / r²).
    if trial.config.init_lora_weights is False:
        nn.init.kaiming_uniform_(pair[1], a=math.sqrt(5))
    elif trial.config.init_lora_weights == "gaussian":
        nn.init.normal_(pair[0], std=1 / target.r)
    return pair
