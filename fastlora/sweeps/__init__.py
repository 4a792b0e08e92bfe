"""Many LoRA configurations on one base, side by side: ``fastlora.sweep``."""

import json
import math
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.batch import in_mode, kept_buffers
from ..layers.modules import called, some, unwrap
from ..model.checkpoint import save_adapter
from ..model.files import check_folder, write_whole
from ..model.inject import apply_lora, check_model, check_plain, remove_lora
from ..projection import check_switch, shown
from .fingerprint import check_same, of_base, of_batches
from .layer import attached
from .record import (
    ADAPTERS,
    BEST,
    FILE,
    TABLE,
    State,
    Sweep,
    curves,
    delete_adapter,
    earlier,
    set_random_state,
)
from .training import Feed, Loss, Training, as_batch, causal_loss, counted, drawing
from .trial import Options, Trial, as_trials


def sweep(
    model: nn.Module,
    configs: Sequence[Mapping[str, Any]],
    data: Iterable[Mapping[str, Any]],
    *,
    eval_data: Iterable[Mapping[str, Any]],
    steps: int,
    output_dir: str | Path,
    halving: bool = False,
    eval_steps: int | None = None,
    schedule: str = "linear",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    loss: Loss = causal_loss,
    seed: int = 0,
    resume: bool = False,
    replace: bool = False,
    progress: bool = True,
) -> Sweep:
    """Train every configuration on this model at once, and say which one is best.

    ``configs`` is a list of dicts: fields of :class:`fastlora.LoRAConfig` (``target_modules`` is
    "all-linear" where it isn't given), ``learning_rate``, and a ``name`` if the differing fields
    shall not make one.  ``data`` gives batches, over and over (a list, a DataLoader; what can be
    read only once is read before, as far as it is needed): mappings of tensors [examples, …] with
    ``labels``, the rest being what ``model`` is called with.  In each of ``steps`` every trial sees
    the same batch, as rows of one call; its gradients, AdamW's moments, learning rate and the norm
    that is clipped at ``max_grad_norm`` are its own.  So what it learns is, to rounding, what it
    would learn alone.  ``loss(logits, labels)`` is a trial's mean loss.

    ``halving`` stops the worse half of the trials, by held-out loss, at equal intervals until one
    is left; the others take over the rows of those that left: two, four … batches a step, as one
    where their lengths differ with an ``attention_mask`` or without a ``loss`` of your own.

    ``eval_data`` gives the batches of the held-out loss, every ``eval_steps`` (a quarter of the
    steps) and in the end.  ``schedule``, "linear" to zero, "cosine" or "constant", comes behind
    ``warmup_steps``.  Initial adapters, the order of a shuffling loader and dropout follow
    ``seed``.

    ``output_dir`` gets ``adapters/NAME`` and ``best``, PEFT's files each; ``sweep.json``, all
    numbers; ``losses.png``, where matplotlib is installed; and ``state.pt`` at each evaluation and
    on Ctrl-C, which ends the running step first: with ``resume`` the sweep goes on from there, to
    the same end, over the same base and data.  A folder that has a sweep is refused without it;
    with ``replace`` that one's files go when the new one writes its first.

    The model is as it was afterwards, also if the sweep fails.  Rows must not see each other: batch
    norms stay in evaluation, with a warning.  Returns a :class:`fastlora.sweeps.record.Sweep`,
    which prints as a table.  Raises ValueError or TypeError for what doesn't fit, and OSError for
    a folder that can't be written to, before anything changes, and what the model raises; and
    ValueError for a layer in whose x trials can't be told apart.
    """
    check_model(model)
    switches = {"halving": halving, "resume": resume, "replace": replace, "progress": progress}
    _check(data, eval_data, loss, switches)
    inner, trials, folder = unwrap(model), as_trials(configs), check_folder(output_dir)
    check_plain(inner)
    if eval_steps is None and type(steps) is int:
        eval_steps = max(1, steps // 4)
    options = Options(
        steps, halving, eval_steps, schedule, warmup_steps, weight_decay, max_grad_norm, seed
    )
    options.check(len(trials))
    settings = {"trials": [trial.plain for trial in trials], **options._asdict()}
    state = earlier(folder, settings, resume=resume, replace=replace)
    with drawing(torch.Generator("cpu").manual_seed(seed)):
        held_out = [as_batch(batch) for batch in eval_data]
    if not any(counted(batch["labels"], loss) for batch in held_out):
        raise ValueError(
            "eval_data gives no batch with labels: the held-out loss is what trials are judged by"
        )
    write_whole(folder, {})  # raises now, and not hours later, if no file can be written there
    fingerprints = {"base": of_base(inner), "eval_data": of_batches(held_out)}
    before = state.fingerprints if state else {}
    check_same(before, fingerprints, folder / FILE)
    norms = _batch_norms(inner)
    with kept_buffers(inner), attached(inner, trials, seed) as parts:
        run = Training(inner, trials, parts, options, loss, held_out, replace)
        state = run.restored(state) if state else run.begun(settings)
        with torch.random.fork_rng(), in_mode(inner, training=True), _interruption() as interrupted:
            for norm in norms.values():
                norm.eval()
            # It may draw numbers for what it skips.
            feed = Feed(data, seed, state.batches, options.batches(len(trials)))
            check_same(before, {"data": feed.fingerprint}, folder / FILE)
            state.fingerprints = fingerprints | {"data": feed.fingerprint}
            set_random_state(state.random)
            run.train(state, feed, folder, interrupted, progress)
    return _finish(run, state, folder)


def _check(data: object, eval_data: object, loss: object, switches: Mapping[str, bool]) -> None:
    """Raise TypeError or ValueError for what can't be meant."""
    for name, switch in switches.items():
        check_switch(name, switch)
    for name, batches in (("data", data), ("eval_data", eval_data)):
        # No ``iter``: a loader would start its workers.
        if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
            raise TypeError(
                f"{name} is {shown(batches)}, but must give batches: a list or a DataLoader"
            )
    if not callable(loss):
        raise TypeError(f"loss is {shown(loss)}, but must be a function of (logits, labels)")


def _finish(run: Training, state: State, folder: Path) -> Sweep:
    """Write what a sweep leaves in the end."""
    ranks = [
        _write(run.model, trial, adapters, folder / ADAPTERS / trial.name)
        for adapters, trial in zip(state.adapters, run.trials, strict=True)
    ]
    sweep = Sweep(run.outcomes(state, ranks), run.options.steps, sum(state.seconds), folder)
    if sweep.best is None:
        warnings.warn("no trial's held-out loss is finite: there is no best one", stacklevel=3)
        delete_adapter(folder / BEST)
    else:
        best = sweep.outcomes.index(sweep.best)
        _write(run.model, run.trials[best], state.adapters[best], folder / BEST)
    numbers = (json.dumps(sweep.as_dict(), indent=2) + "\n").encode()
    write_whole(folder, {TABLE: numbers} | curves(sweep))
    return sweep


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Set by a first Ctrl-C, while a second one is Python's own; in the main thread alone."""
    event, mine = threading.Event(), threading.current_thread() is threading.main_thread()
    if not mine:
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Those that stay in evaluation, since they would mix trials in training; it warns of them.

    Raises ValueError for one that has no running statistics, and mixes in evaluation too.
    """
    norms: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    mixing = [called(name) for name, norm in norms.items() if norm.running_mean is None]
    if mixing:
        raise ValueError(
            f"{some(mixing)} would mix trials, for it normalizes by the statistics of the batch: "
            "give it running ones (track_running_stats=True), or train each configuration alone"
        )
    if norms:
        warnings.warn(
            f"{some(list(map(called, norms)))} stays in evaluation: a batch norm in training would "
            "mix trials",
            stacklevel=3,
        )
    return norms


def _write(model: nn.Module, trial: Trial, adapters: Mapping[str, Tensor], folder: Path) -> float:
    """The adapter in PEFT's files; its effective rank, NaN if it has NaN."""
    from ..adapters.resize import resize_adapter  # here, where all training is over

    with torch.random.fork_rng():
        apply_lora(model, trial.config, frozen=False, blocks=False)
    try:
        with torch.no_grad():
            for name, value in adapters.items():
                model.get_parameter(name).copy_(value)
        save_adapter(model, folder)
    finally:
        remove_lora(model)
    try:
        return resize_adapter(folder).effective_rank
    except ValueError:
        return math.nan
