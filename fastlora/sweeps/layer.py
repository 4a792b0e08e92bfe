"""Layers with an adapter for each trial, which the rows of a batch are shared out to."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..formats import quantized_weight
from ..layers.adapted import scaling_of
from ..layers.frozen import is_router, matrix_of
from ..layers.members import class_over
from ..layers.modules import called
from ..model.targets import Pair, find_targets
from ..ops.functional import multi_lora_linear
from ..rows import AdapterMapping
from .trial import Trial

_RECORD = "_fastlora_trials"
# One of several experts: a router chooses its rows, and may order all of a batch's otherwise.
_ROUTED = re.compile(r"(?:^|\.)experts\.\d+\.")


class TrialRows:
    """Which trial each sequence of the running batch belongs to; all layers look there.

    Without a batch of the trials' the layers are the base's.
    """

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self._owners: tuple[int, ...] = ()
        self._lengths: frozenset[int] = frozenset()
        self._mappings: dict[tuple[int, ...], AdapterMapping] = {}

    def share_out(self, trials: Sequence[int], batch: Mapping[str, Tensor]) -> None:
        """The batch's sequences to each of the trials, in this order."""
        owners = tuple([trial for trial in trials for _ in batch["labels"]])
        self._lengths = frozenset(each.shape[1] for each in batch.values() if each.dim() > 1)
        if owners != self._owners:
            self._owners, self._mappings = owners, {}

    def by_sequence(self, x: Tensor, name: str) -> Tensor:
        """x, whose first dimension is of sequences, or all their tokens as rows: then with both.

        Raises ValueError where trials can't be told apart, such as among tokens that were routed.
        """
        count, shape = len(self._owners), tuple(x.shape)
        if len(shape) > 1 and shape[0] == count:
            return x
        all_tokens = any(shape[0] == count * length for length in self._lengths)
        if len(shape) == 2 and all_tokens and not _ROUTED.search(name):
            return x.unflatten(0, (count, -1))
        raise ValueError(
            f"{called(name)} is called with x {shape}, in which nothing says which trial a row is "
            f"of: that needs the {count} sequences first, or all their tokens, sequence by "
            f"sequence; a sweep without this layer has exclude_modules=[{name!r}]"
        )

    def mapping(self, members: tuple[int, ...]) -> AdapterMapping | None:
        """For a layer that these trials adapt."""
        if members not in self._mappings and self._owners:
            places = {trial: place for place, trial in enumerate(members)}
            indices = [places.get(owner, -1) for owner in self._owners]
            self._mappings[members] = AdapterMapping(indices, len(members))
        return self._mappings.get(members)


class Adapters(NamedTuple):
    """Those of one layer: of the trials that target it, in their order."""

    name: str
    members: tuple[int, ...]
    pairs: list[Pair]
    numbers: dict[str, list[float]]  # "scales" and "dropout"
    rows: TrialRows


class TrialsLayer(nn.Module):
    """A linear layer's class, which comes after this one, with the adapters of several trials."""

    plain_class: type[nn.Module]  # what it is without them

    def forward(self, x: Tensor) -> Tensor:
        adapters: Adapters = self.__dict__[_RECORD]
        mapping = adapters.rows.mapping(adapters.members)
        if mapping is None:
            return super().forward(x)
        with torch.enable_grad():  # as a weight is read that a call in evaluation has laid anew
            packed = quantized_weight(self, self.plain_class)
        if isinstance(packed, str):
            raise ValueError(f"the {self.plain_class.__name__} can't be read: {packed}")
        weight: Any = matrix_of(self, self.plain_class) if packed is None else packed.weight

        lora_a, lora_b = map(list, zip(*adapters.pairs, strict=True))
        how: Any = {"bias": cast(Any, self).bias, "training": self.training, **adapters.numbers}

        def run(x: Tensor) -> Tensor:
            return multi_lora_linear(x, weight, lora_a, lora_b, mapping, **how)

        items = adapters.rows.by_sequence(x, adapters.name)
        y = run(items) if packed is None else packed.call(items, run)
        return y if items is x else y.flatten(0, 1)


class Attached(NamedTuple):
    """What a model has while trials train: the trials' parameters by name, and their rows."""

    parameters: list[dict[str, nn.Parameter]]  # of each trial: "layer.lora_A" and so on
    rows: TrialRows


@contextmanager
def attached(model: nn.Module, trials: Sequence[Trial], seed: int) -> Iterator[Attached]:
    """Inside, the model's layers have every trial's adapter, and nothing else of it trains.

    A trial's adapters are those that ``apply_lora`` would make after ``torch.manual_seed(seed)``.
    Raises what :func:`fastlora.apply_lora` raises for a target, and leaves the model as it was.
    """
    targets = [find_targets(model, trial.config, (), every_name=True) for trial in trials]
    routers = sorted(
        n for of_trial in targets for n, one in of_trial.items() if is_router(one.module)
    )
    if routers:
        raise ValueError(
            f"{routers[0]} is a router, whose adapters can't share a batch: exclude it"
        )
    made = []
    for trial, of_trial in zip(trials, targets, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made.append({n: one.new_adapter(n, trial.config) for n, one in of_trial.items()})
    rows = TrialRows(len(trials))
    with ExitStack() as stack:
        for parameter in [each for each in model.parameters() if each.requires_grad]:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for name, layer in model.named_modules():
            adapters = _adapters_of(name, trials, made, rows)
            if adapters.members:
                stack.callback(layer.__dict__.pop, _RECORD)
                stack.callback(setattr, layer, "__class__", type(layer))
                layer.__dict__[_RECORD] = adapters
                layer.__class__ = class_over(TrialsLayer, type(layer), "")
        named = [
            {
                f"{name}.{which}" if name else which: parameter
                for name, pair in adapters.items()
                for which, parameter in zip(("lora_A", "lora_B"), pair, strict=True)
            }
            for adapters in made
        ]
        yield Attached(named, rows)


def _adapters_of(
    name: str, trials: Sequence[Trial], made: Sequence[dict[str, Pair]], rows: TrialRows
) -> Adapters:
    """A layer's, of the trials that target it."""
    members = tuple([i for i, adapters in enumerate(made) if name in adapters])
    configs = [trials[i].config for i in members]
    scales = [scaling_of(c.alpha_of(name), c.rank_of(name), c.use_rslora) for c in configs]
    numbers = {"scales": scales, "dropout": [config.lora_dropout for config in configs]}
    return Adapters(name, members, [made[i][name] for i in members], numbers, rows)
