"""The trials while they train: a step of all, the held-out losses, and what is kept of both."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..layers.batch import in_mode
from .batches import Batch, Feed, joined
from .layer import Attached
from .record import Outcome, State, nan_last, random_state, save
from .trial import Options, Trial

Loss = Callable[[Tensor, Tensor], Tensor]


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of the next token, in float32, as transformers computes it; -100 is none."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def counted(labels: Tensor, loss: Loss) -> int:
    """Of how many labels the loss is the mean; the first token of a text has no prediction."""
    return int(((labels[:, 1:] if loss is causal_loss else labels) != -100).sum())


class Training:
    """The trials while they train."""

    def __init__(
        self,
        model: nn.Module,
        trials: Sequence[Trial],
        parts: Attached,
        options: Options,
        loss: Loss,
        held_out: Sequence[Batch],
    ) -> None:
        self.model, self.trials, self.parts, self.options = model, trials, parts, options
        self.loss, self.held_out = loss, held_out
        self.eval_steps = options.eval_steps or options.steps
        self.device = next(model.parameters()).device
        groups = [
            {"params": list(parameters.values()), "lr": trial.learning_rate}
            for trial, parameters in zip(trials, parts.parameters, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)

    def begun(self, settings: dict[str, Any]) -> State:
        count = len(self.trials)
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            random = random_state()
        return State(
            settings, alive=list(range(count)), losses=[[] for _ in self.trials],
            seconds=[0.0] * count, steps=[0] * count, random=random,
        )  # fmt: skip

    def restored(self, state: State) -> State:
        """Put a state's adapters in place.  Raises ValueError if they don't fit this model."""
        for own, saved in zip(self.parts.parameters, state.adapters, strict=True):
            if {n: p.shape for n, p in own.items()} != {n: a.shape for n, a in saved.items()}:
                raise ValueError(
                    "the sweep to resume is of another model: give that model, another output_dir, "
                    "or resume=False"
                )
        with torch.no_grad():
            for own, saved in zip(self.parts.parameters, state.adapters, strict=True):
                for name, parameter in own.items():
                    parameter.copy_(saved[name])
        self.optimizer.load_state_dict(state.optimizer)
        return state

    def train(
        self,
        state: State,
        feed: Feed,
        folder: Path,
        interrupted: threading.Event,
        progress: bool,
    ) -> None:
        stops = self.options.rungs(len(self.trials))
        if not state.losses[0]:
            self._evaluate(state)
        while (left := self.options.steps - state.step) > 0:
            started = time.perf_counter()
            found = self.step(state, feed)
            elapsed = time.perf_counter() - started
            for i in state.alive:
                state.seconds[i] += elapsed / len(state.alive)
                state.steps[i] += 1
            state.step, left = state.step + 1, left - 1
            if progress:  # on the one line that the next step takes
                said = f"step {state.step} of {self.options.steps}, {elapsed * left:.0f} s left: "
                said += f"{len(state.alive)} trials, loss {min(found):.3f}"
                print(f"\r{said:70}", end="" if left else "\n", file=sys.stderr, flush=True)
            keep = stops.get(state.step)
            if keep or not left or state.step % self.eval_steps == 0:
                self._evaluate(state)
                if keep:
                    by_loss = sorted(state.alive, key=lambda i: nan_last(state.losses[i][-1][1]))
                    state.alive = sorted(by_loss[:keep])
                self._keep(state, feed, folder)
            elif interrupted.is_set():
                self._keep(state, feed, folder)
            if interrupted.is_set() and left:
                raise KeyboardInterrupt(
                    f"stopped after step {state.step}: resume=True goes on from there"
                )

    def step(self, state: State, feed: Feed) -> list[float]:
        """One of every trial that is left; their losses."""
        factor = self.options.factor(state.step)
        for group, trial in zip(self.optimizer.param_groups, self.trials, strict=True):
            group["lr"] = trial.learning_rate * factor
        batches = feed.take(len(self.trials) // len(state.alive))
        batches = joined(batches, self.loss is causal_loss)
        sizes = [counted(batch["labels"], self.loss) for batch in batches]
        found = torch.zeros(len(state.alive), device=self.device)
        self.optimizer.zero_grad()
        for batch, size in zip(batches, sizes, strict=True):
            if size or not batches[1:]:
                share = size / sum(sizes) if batches[1:] else 1.0  # of the mean over all labels
                losses = share * torch.stack(self._losses(state.alive, batch))
                losses.sum().backward()
                found += losses.detach()
        if self.options.max_grad_norm:
            for i in state.alive:
                own = list(self.parts.parameters[i].values())
                nn.utils.clip_grad_norm_(own, self.options.max_grad_norm)
        self.optimizer.step()
        return found.tolist()

    def _losses(self, alive: Sequence[int], batch: Batch) -> list[Tensor]:
        """Each trial's mean loss on the batch."""
        count = len(batch["labels"])
        self.parts.rows.share_out(alive, batch)
        whole = {name: tensor.to(self.device) for name, tensor in batch.items()}
        labels = whole.pop("labels")  # and all else once for each trial, one after the other
        inputs = {k: x.repeat(len(alive), *[1] * (x.dim() - 1)) for k, x in whole.items()}
        logits = _logits(self.model(**inputs))
        if len(logits) != count * len(alive):
            raise ValueError(
                f"the model returned logits {tuple(logits.shape)} for {count * len(alive)} "
                "examples, but must return [examples, …]"
            )
        return [self.loss(own, labels) for own in logits.split(count)]

    @torch.no_grad()
    def _evaluate(self, state: State) -> None:
        """Add the held-out losses of all trials that are left."""
        total, weight = torch.zeros(len(state.alive), dtype=torch.float64, device="cpu"), 0
        with in_mode(self.model, training=False):
            for batch in self.held_out:
                size = counted(batch["labels"], self.loss)
                if size:  # else there is no loss
                    total += size * torch.stack(self._losses(state.alive, batch)).cpu().double()
                    weight += size
        for i, found in zip(state.alive, (total / max(weight, 1)).tolist(), strict=True):
            state.losses[i].append((state.step, found))

    def _keep(self, state: State, feed: Feed, folder: Path) -> None:
        """Put all that is needed to go on from here into the state, and the state on the disk."""
        state.batches, state.random = feed.taken, random_state()
        state.optimizer = self.optimizer.state_dict()
        state.adapters = [
            {name: parameter.detach() for name, parameter in own.items()}
            for own in self.parts.parameters
        ]
        save(state, folder)

    def outcomes(self, state: State) -> tuple[Outcome, ...]:
        return tuple(
            Outcome(
                trial,
                sum(tensor.numel() for tensor in state.adapters[i].values()),
                sum(tensor.nbytes for tensor in state.adapters[i].values()),
                tuple([(step, loss) for step, loss in state.losses[i]]),
                state.seconds[i],
                state.steps[i],
            )
            for i, trial in enumerate(self.trials)
        )


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(output).__name__}, but must return logits, as a tensor or "
            "as the logits of an output"
        )
    return logits
