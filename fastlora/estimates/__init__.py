"""Memory, time and file size of a LoRA rank, before training: ``fastlora.estimate``."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from ..common.clock import HostClock, median, timed
from ..common.other_packages import optional
from ..common.text import bar, shown
from ..common.values import check_switches, must
from ..layers.batch import call, in_mode, loss_and_outputs, undisturbed
from ..layers.modules import check_model, check_plain, embeddings_of, text_config, unwrap
from ..peft.inject import injected
from .count import Estimate, count_adapter, count_frozen, tensors_of

RANKS = (8, 16, 64, 256)
_ROWS, _TOKENS = 1, 256  # of the random batch


def estimate(
    model: nn.Module,
    ranks: Sequence[int] = RANKS,
    *,
    config: Any = None,
    batch: Any = None,
    rounds: int = 0,
    loss: bool = False,
) -> Estimate:
    """The cost of LoRA at each rank for this model.

    Parameters, gradients, optimizer states and file sizes are counted, at once and without a
    change of the model.  With ``rounds``, step time and the memory that a forward keeps are also
    measured on the model's device.

    ``model`` has no adapters yet.  ``config``, a ``peft.LoraConfig``, says which layers would be
    adapted, also weights of experts; None means every linear layer.  Each of ``ranks`` replaces its
    ``r``, and its patterns still apply.  ``batch`` is the model's input in training: a mapping, a
    sequence or a tensor, with labels if the model computes a loss.  None gives a causal language
    model of transformers random tokens, [1, 256] or fewer if it has fewer positions.

    Each of ``rounds``, for example 5, runs forward and backward of the frozen model, down to its
    embeddings, and of the model with each rank, in training mode, behind a progress bar (with
    tqdm).  A note says if the machine was busy.  Afterwards parameters, gradients, buffers, modes
    and random states are unchanged.  ``loss``: the model with a rank computes the loss without
    logits (docs/loss.md), and the frozen model with them.

    Returns a :class:`fastlora.estimates.count.Estimate`, which prints as a table.  Raises
    ValueError for an empty ``ranks`` or a rank below 1, a model with adapters, a missing batch, and
    rounds on ``meta``; also the errors of :func:`fastlora.get_peft_model` and of the model.
    """
    check_model(model)
    inner = unwrap(model)
    is_list = isinstance(ranks, Sequence) and not isinstance(ranks, str | bytes)
    fits = is_list and len(ranks) > 0 and all(type(r) is int and r > 0 for r in ranks)
    must(fits, "ranks", ranks, "a list of whole numbers from 1 on")
    must(type(rounds) is int and rounds >= 0, "rounds", rounds, "a whole number of at least 0")
    check_switches(loss=loss)
    check_plain(inner)
    if config is None:
        config = optional("peft", "estimate needs PEFT", "peft").LoraConfig(
            target_modules="all-linear"
        )
    # Count first: it finds errors in the config before anything is measured.
    counts = [count_adapter(inner, replace(config, r=r)) for r in dict.fromkeys(ranks)]
    rank_costs = tuple(cost for _, cost in counts)
    estimate = Estimate(type(inner).__name__, counts[0][0], count_frozen(inner), rank_costs)
    return _measured(estimate, inner, config, batch, rounds, loss) if rounds else estimate


def _measured(
    estimate: Estimate,
    model: nn.Module,
    config: Any,
    batch: Any,
    rounds: int,
    loss: bool,
) -> Estimate:
    """The estimate, with measured times and kept bytes."""
    if batch is None:
        batch = _random_tokens(model)
    # Detached, so that gradients don't reach the caller's tensors.
    batch = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), batch)
    tokens, text = _size(batch)
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError("the model is on meta, where nothing can be measured: leave out rounds")
    configs = [replace(config, r=cost.r) for cost in estimate.rank_costs]
    # The frozen model and every rank take turns in each round, so that drift affects all alike.
    sides = [partial(frozen, model, batch)]
    sides += [partial(injected, model, each, loss=loss) for each in configs]
    kept, seconds = [], []
    with undisturbed(model), in_mode(model, training=True):
        for i in bar(range(rounds + 1), "measuring", "round"):
            times = []
            for side in sides:
                with side():
                    # The first round warms up, and counts the kept bytes.
                    if not i:
                        kept.append(kept_bytes(model, batch) / tokens)
                    times.append(step_seconds(model, batch))
                    model.zero_grad()
            seconds.append(times)
    del seconds[0]  # it warmed up
    # ratios[j][i]: side j's time divided by the frozen model's, in round i.
    ratios = [[times[j] / times[0] for times in seconds] for j in range(len(sides))]
    rank_costs = tuple(
        replace(cost, kept_bytes=size, step=median(steps))
        for cost, size, steps in zip(estimate.rank_costs, kept[1:], ratios[1:], strict=True)
    )
    middle = median([times[0] for times in seconds])
    return replace(
        estimate,
        frozen=replace(estimate.frozen, kept_bytes=kept[0], seconds=middle),
        rank_costs=rank_costs,
        device=str(device),
        batch=text,
        notes=tuple(_busy()),
    )


def _busy() -> Iterator[str]:
    """A note if more threads run on this machine than it has cores, so that times are wrong."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    if load > cores + 0.5:
        yield (
            f"this machine was busy (load {load:.1f} on {cores} cores), so times may be wrong: "
            "measure again when it is idle"
        )


@contextmanager
def frozen(model: nn.Module, batch: Any) -> Iterator[None]:
    """Inside, no parameter trains; a backward ends at the embeddings or the batch's float tensors.

    This gives the cost of a backward through frozen layers.  Raises ValueError if the model has no
    embeddings and the batch no float tensors.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.is_floating_point()]
    embeddings = embeddings_of(model, "input")
    if embeddings is None and not inputs:
        raise ValueError(
            "the frozen model has nothing to differentiate: batch has no float tensor, and the "
            "model no get_input_embeddings()"
        )
    inputs = [x for x in inputs if not x.requires_grad]
    with ExitStack() as stack:
        for parameter in trained:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for x in inputs:
            x.requires_grad_(True)
            stack.callback(setattr, x, "grad", None)
            stack.callback(x.requires_grad_, False)
        if embeddings is not None:
            # The hook's arguments are (module, inputs, output).
            hook = embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_(True))
            stack.callback(hook.remove)
        yield


def step_seconds(model: nn.Module, batch: Any) -> float:
    """Seconds of one forward and backward, from cleared gradients."""
    clock = HostClock(next(model.parameters()).device)
    model.zero_grad()
    return timed(clock, lambda: loss_and_outputs(call(model, batch))[0].backward())


def kept_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes that autograd saves for the backward, without parameters, buffers, packed weights."""
    of_model = {each.data_ptr() for tensor in tensors_of(model) for each in _storages(tensor)}
    saved: list[ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        made = tensor.detach()  # shares the memory; saving the tensor itself would make a cycle
        saved.append(ref(made))
        return made

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_and_outputs(call(model, batch))[0]
    # Lazy logits have nodes that the loss doesn't need.
    waiting = [tensor for weak in saved if (tensor := weak()) is not None]
    # By address, so that a storage that several nodes save counts once.
    storages = {each.data_ptr(): each.nbytes() for tensor in waiting for each in _storages(tensor)}
    del loss  # it held the graph until here
    return sum(nbytes for address, nbytes in storages.items() if address not in of_model)


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor, or of the inner tensors of a wrapper subclass (torchao's)."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.untyped_storage()]
    names, _ = tensor.__tensor_flatten__()
    return [storage for name in names for storage in _storages(getattr(tensor, name))]


def _random_tokens(model: nn.Module) -> dict[str, Tensor]:
    """Random tokens as input and labels for a causal language model of transformers."""
    text = text_config(getattr(model, "config", None))
    vocabulary = getattr(text, "vocab_size", None)
    if not vocabulary:
        raise ValueError(
            f"batch is None, but {type(model).__name__} has no config.vocab_size to make one from: "
            "give the model's input, such as batch={'input_ids': …, 'labels': …}"
        )
    generator = torch.Generator().manual_seed(0)
    # A model with learned positions can't take a longer input.
    length = min(_TOKENS, getattr(text, "max_position_embeddings", None) or _TOKENS)
    how: Any = {"dtype": torch.int64, "device": "cpu", "generator": generator}
    tokens = torch.randint(0, vocabulary, (_ROWS, length), **how)
    tokens = tokens.to(next(model.parameters()).device)
    return {"input_ids": tokens, "labels": tokens}


def _size(batch: Any) -> tuple[int, str]:
    """The number of tokens in a batch, and its shape as text, from the batch's first tensor."""
    for leaf in tree_leaves(dict(batch) if hasattr(batch, "keys") else batch):
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.numel():
            shape = leaf.shape[:2] if leaf.dim() > 1 else leaf.shape[:1]
            if leaf.is_floating_point():  # the last dimension holds features
                shape = leaf.shape[:-1] or leaf.shape
            return shape.numel(), " x ".join(map(str, shape)) + " tokens"
    raise ValueError(f"batch is {shown(batch)}, but must hold a tensor with elements")
