"""The cache of calls: two levels, and one function that makes their keys.

A call with a cached key skips the checks, dispatch, the choice of a backend, and the capture of its
launches.  All of these depend only on the *kind* of a call: the facts of x and of all other tensors
(:func:`fastlora.projection.facts_of`: shape, strides, dtype, device …), the numbers beside them,
autocast's dtype, and the requested backend.  :func:`key_of` makes the key of a kind.  With this
cache, an optimized PEFT layer takes 0.95 × the host time of PEFT's layer, on the Triton backend
(``make bench ARGS=host``, docs/kernels.md).

Level 1, in a module: a guarded record (:mod:`fastlora.layers.guards`) holds the module's calls by
the key of x.  The guard compares everything else: parameters, settings, hooks.  An entry is valid
while the guard holds.

Level 2, in this file: calls by the key of all their tensors.  An entry is a :class:`Call`, or a
record of several.  ``Call.captured`` holds the launches of its forward.

* An entry depends on nothing outside of its key, so it is always valid.  The cache drops the oldest
  entries when it is full.
* Captured launches depend also on plans and on verification.  kernels/replay.py compares both
  before each replay.  That file also caches the launches of backwards, experts and many adapters.

A new check of a call must add everything it reads to :func:`key_of` or ``facts_of``.  Otherwise a
cached call skips the check when it would fail.
"""

from collections.abc import Hashable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..backends import asked_backend
from ..projection import Output, facts_of, flatten, layouts_of
from .dispatch import autocast_dtype, is_ordinary

_MOST = 1024  # entries; a new sequence length makes a new one
_changes = Lock()  # held while the oldest entry is found and deleted; lookups need no lock
_calls: dict[Hashable, Any] = {}


def key_of(
    inputs: Sequence[Tensor], rest: Sequence[Hashable] = (), backend: str | None = None
) -> Hashable:
    """The key of an eager call with these tensors, x first, under torch's present modes.

    ``rest`` are the numbers and other settings of the call.  Calls with equal keys are equally
    valid, so the checks can be skipped.  Raises an error of torch for a tensor without strides or
    without an address.
    """
    return autocast_dtype(inputs[0]), asked_backend(backend), *rest, *map(facts_of, inputs)


def key_of_x(x: Tensor) -> Hashable:
    """The key of x for a module, whose guard covers the other tensors; None: don't cache."""
    try:
        return key_of([x], (torch.is_grad_enabled(),)) if is_ordinary(x) else None
    except Exception:  # x is sparse, or came from a transform of torch.func that has ended
        return None


def key_of_outputs(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    dropout: Hashable,
    training: bool = True,
    backend: str | None = None,
) -> tuple[Hashable, list[Tensor]]:
    """The key of a call that takes the node, and the flat list of its tensors.

    The key is None if the call can't be cached.  ``dropout``: a gated MLP gives a tuple of all its
    settings here.
    """
    try:
        layouts = layouts_of(outputs)
        inputs = [x, *flatten(outputs, layouts)]
        # Types belong in the key, because 1 == 1.0 == True, and the checks refuse some of them.
        numbers = [training, dropout, *[scale for layout in layouts for scale in layout.scales]]
        key = key_of(inputs, (layouts, *numbers, *map(type, numbers)), backend)
        hash(key)
        return key, inputs
    except Exception:  # a wrong class or a number that has no hash: the checks report it
        return None, []


def call_of(key: Hashable) -> Any:
    """The cached call of this key, or None; key None: there is none."""
    return _calls.get(key)


def remember(
    key: Hashable, call: Any, calls: dict[Hashable, Any] | None = None, most: int | None = None
) -> None:
    """Cache a call that passed the checks; ``calls`` is a module's cache, or None for level 2."""
    calls = _calls if calls is None else calls
    with _changes:
        while len(calls) >= (most or _MOST) and key not in calls:
            del calls[next(iter(calls))]
        calls[key] = call
