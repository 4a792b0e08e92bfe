"""Training of a sweep: a step of all trials, the held-out losses, and saving the state."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from math import isclose
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..common.clock import HostClock, timed
from ..common.text import bar, shown
from ..layers.batch import in_mode
from .record import State, delete, nan_last, random_state, save
from .trial import Options, Trial
from .trial_layer import TrialRows

Batch = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
_ROUNDING = 1e-3  # of a held-out loss, relative: another device, or a repacked weight


def feed(data: Iterable[Mapping[str, Any]], seed: int, loss: Loss) -> Iterator[Batch]:
    """The batches of ``data``, repeated without end, in an order that the seed determines.

    While ``data`` is read, torch's CPU random numbers come from a separate generator.
    """
    if isinstance(data, list | tuple):
        data = [as_batch(batch, loss) for batch in data]  # an invalid batch is found at once
    for epoch in count():
        # An iterator can be read only once, so its batches are kept.
        kept: list[Batch] | None = [] if isinstance(data, Iterator) else None
        # A shuffling loader draws its order when its first batch is read.
        random = torch.Generator("cpu").manual_seed(seed + epoch)
        with drawing(random):
            batches = iter(data)
            batch = next(batches, None)
        if batch is None:
            problem = "ends, and can't be read again" if epoch else "gives no batch"
            raise ValueError(f"data {problem}: give a list of batches or a DataLoader")
        while batch is not None:
            batch = as_batch(batch, loss)
            if kept is not None:
                kept.append(batch)
            yield batch
            with drawing(random):
                batch = next(batches, None)
        data = kept or data


def skip(batches: Iterator[Batch], state: State) -> None:
    """Read the batches that the state has used.  Raises ValueError if they are others."""
    checksum = 0
    for batch in islice(batches, state.batches):
        checksum = _checksum(batch, checksum)
    if checksum != state.checksum:
        raise ValueError(
            "the sweep to resume had other data: give the same (what a loader draws must come from "
            "torch), another output_dir, or replace=True instead of resume"
        )


def _checksum(batch: Batch, before: int) -> int:
    for name in sorted(batch):
        numbers = batch[name].detach().cpu().contiguous().view(torch.uint8).numpy().data
        before = crc32(numbers, crc32(name.encode(), before))
    return before


@contextmanager
def drawing(random: torch.Generator) -> Iterator[None]:
    """Inside, torch's CPU random numbers come from this generator, which advances."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(random.get_state())
        try:
            yield
        finally:
            random.set_state(torch.get_rng_state())


def as_batch(batch: Any, loss: Loss) -> Batch:
    """The batch's tensors by name; other values are dropped.

    Raises ValueError if there are no labels, the tensors differ in the number of examples, or the
    labels don't fit the causal loss.
    """
    items = batch.items() if hasattr(batch, "items") else ()
    tensors = {name: tensor for name, tensor in items if isinstance(tensor, Tensor)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fits = "labels" in shapes and all(shapes.values()) and len({s[0] for s in shapes.values()}) == 1
    if not fits or (loss is causal_loss and len(shapes["labels"]) != 2):
        raise ValueError(
            f"a batch has {shown(shapes or batch)}, but must map names to tensors "
            "[examples, …], and one of the names must be 'labels'.  The default loss takes labels "
            "[examples, tokens]: stack rows to batches, as a DataLoader does"
        )
    return tensors


def joined(batches: Sequence[Batch]) -> list[Batch]:
    """One batch in place of batches of equal names and shapes: one larger call is faster."""
    first = batches[0]
    shapes = [{name: tensor.shape[1:] for name, tensor in batch.items()} for batch in batches]
    if any(each != shapes[0] for each in shapes):
        return list(batches)
    return [{name: torch.cat([batch[name] for batch in batches]) for name in first}]


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of the next token, in float32, ignoring labels of -100, as in transformers."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def counted(labels: Tensor, loss: Loss) -> int:
    """The number of labels that the loss averages.

    The causal loss leaves out the first token of each sequence, which has no prediction.
    """
    return int(((labels[:, 1:] if loss is causal_loss else labels) != -100).sum())


@dataclass
class Training:
    """The training loop of a sweep."""

    model: nn.Module
    trials: Sequence[Trial]
    parameters: Sequence[Mapping[str, nn.Parameter]]  # of each trial
    rows: TrialRows
    options: Options
    loss: Loss
    held_out: Sequence[Batch]
    replaces: bool = False  # whether to delete an earlier sweep's files before the first write

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        groups = [
            {"params": list(parameters.values()), "lr": trial.learning_rate}
            for trial, parameters in zip(self.trials, self.parameters, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.options.weight_decay)

    def restored(self, state: State) -> State:
        """Load a state's adapters and optimizer.

        Raises ValueError if the initial adapters have other held-out losses than in the state: then
        the base or the held-out data are others.
        """
        # self.parameters are the initial adapters until they are loaded at the end.
        pairs = list(zip(self.parameters, state.adapters, strict=True))
        before = [losses[0][1] for losses in state.losses]
        if any(now.keys() != then.keys() for now, then in pairs) or not all(
            isclose(now, then, rel_tol=_ROUNDING)
            for now, then in zip(self._held_out(range(len(before))), before, strict=True)
        ):
            raise ValueError(
                "the sweep to resume had another base model or other held-out data (eval_data): "
                "its first held-out losses were others.  Give the same, another output_dir, or "
                "replace=True instead of resume"
            )
        with torch.no_grad():
            for parameters, saved in pairs:
                for name, parameter in parameters.items():
                    parameter.copy_(saved[name])
        self.optimizer.load_state_dict(state.optimizer)
        return state

    def train(self, state: State, batches: Iterator[Batch], folder: Path, progress: bool) -> None:
        stops = self.options.rungs(len(self.trials))  # the number of trials to keep, by step
        # The losses of the initial adapters, with which ``restored`` compares.
        if not state.losses[0]:
            self._evaluate(state)
        steps, clock = range(state.step + 1, self.options.steps + 1), HostClock(self.device)
        for step in bar(steps, "sweep", "step") if progress else steps:
            elapsed = timed(clock, lambda: self.step(state, batches))
            for i in state.alive:
                state.seconds[i] += elapsed / len(state.alive)
                state.steps[i] += 1
            state.step, keep = step, stops.get(step)
            if keep or step == self.options.steps or step % self.options.eval_steps == 0:
                self._evaluate(state)
                if keep:
                    by_loss = sorted(state.alive, key=lambda i: nan_last(state.losses[i][-1][1]))
                    state.alive = sorted(by_loss[:keep])
                self._keep(state, folder)

    def step(self, state: State, batches: Iterator[Batch]) -> None:
        """Do one step of every remaining trial."""
        factor = self.options.factor(state.step)
        for group, trial in zip(self.optimizer.param_groups, self.trials, strict=True):
            group["lr"] = trial.learning_rate * factor
        # The rows of stopped trials go to the others: k of n trials read ⌊n / k⌋ batches.
        taken = list(islice(batches, len(self.trials) // len(state.alive)))
        for batch in taken:
            state.batches, state.checksum = state.batches + 1, _checksum(batch, state.checksum)
        taken = joined(taken)
        sizes = [counted(batch["labels"], self.loss) for batch in taken]
        self.optimizer.zero_grad()
        for batch, size in zip(taken, sizes, strict=True):
            if size:  # without labels the mean loss would be NaN
                # Weighted by labels, so that the sum is the mean over the labels of all batches.
                losses = size / sum(sizes) * torch.stack(self._losses(state.alive, batch))
                losses.sum().backward()
        if self.options.max_grad_norm:  # clipped separately, as in separate runs
            for i in state.alive:
                parameters = list(self.parameters[i].values())
                nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm)
        # zero_grad made the gradients of stopped trials None: AdamW skips them, decay included.
        self.optimizer.step()

    def _losses(self, alive: Sequence[int], batch: Batch) -> list[Tensor]:
        """Each trial's mean loss on the batch."""
        examples = len(batch["labels"])
        self.rows.share_out(alive, batch)
        whole = {name: tensor.to(self.device) for name, tensor in batch.items()}
        labels = whole.pop("labels")
        # Repeat the inputs once for each trial: first all examples of the first trial, and so on.
        inputs = {k: x.repeat(len(alive), *[1] * (x.dim() - 1)) for k, x in whole.items()}
        output = self.model(**inputs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or len(logits) != examples * len(alive):
            raise ValueError(
                f"the model returned {shown(getattr(logits, 'shape', logits))}, but must return "
                f"logits of {examples * len(alive)} examples, [examples, …]"
            )
        return [self.loss(of_trial, labels) for of_trial in logits.split(examples)]

    def _evaluate(self, state: State) -> None:
        """Append the held-out losses of all remaining trials to the state."""
        for i, loss in zip(state.alive, self._held_out(state.alive), strict=True):
            state.losses[i].append((state.step, loss))

    @torch.no_grad()
    def _held_out(self, trials: Sequence[int]) -> list[float]:
        total, weight = torch.zeros(len(trials), dtype=torch.float64, device="cpu"), 0
        with in_mode(self.model, training=False):
            for batch in self.held_out:
                size = counted(batch["labels"], self.loss)
                if size:
                    # Σ size · loss / Σ size: the mean over the labels of all batches.
                    total += size * torch.stack(self._losses(trials, batch)).cpu().double()
                    weight += size
        return (total / max(weight, 1)).tolist()

    def _keep(self, state: State, folder: Path) -> None:
        """Complete the state, so that a sweep can resume from here, and write it to the folder."""
        state.random, state.optimizer = random_state(), self.optimizer.state_dict()
        state.adapters = [
            {name: parameter.detach() for name, parameter in parameters.items()}
            for parameters in self.parameters
        ]
        if self.replaces:  # only now, so that a failed start keeps the old sweep
            delete(folder)
            self.replaces = False
        save(state, folder)
