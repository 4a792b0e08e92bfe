"""The cache of calls: two levels, and one function that makes their keys.

A call with a cached key skips the checks, dispatch, the choice of a backend, and the capture of its
launches.  All of these depend only on the *kind* of a call:

    kind = (facts of x and of all other tensors, scales and other settings, autocast's dtype,
            requested backend)

Facts are shape, strides, dtype, device … (:func:`.projection.facts_of`), never elements.
:func:`key_of` makes the key of a kind.  With this cache, an optimized PEFT layer takes 0.92 to
1.13 × the host time of PEFT's layer, on the Triton backend (``make bench ARGS=host``,
docs/kernels.md).

Level 1, in each module: a dict from the key of x to a function (:mod:`fastlora.layers.guards`),
which runs the call with the tensors that the module holds now.  A guard compares everything else:
parameters, settings, hooks.  An entry is valid while the guard holds.

Level 2, in this file: a dict from the key of all tensors to the call, for functions that are called
without a module.  An entry is a :class:`Call`, or a record of several (of a gated MLP).

* An entry depends on nothing outside of its key, so it is always valid.  A full cache drops its
  oldest entries.
* ``Call.captured`` is a dict with the captured launches of the call's forward.  Launches also
  depend on plans (kernels/plan.py) and on verification.  So ``run_kernels``
  (backends/triton/verification.py) puts a count of the plans' changes in the dict's keys, and
  caches launches only after verification.  kernels/replay.py caches the other captured launches: of
  backwards, experts and many adapters.

A new check of a call must add everything it reads to :func:`key_of` or ``facts_of``.  Otherwise a
cached call skips the check when it would fail.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import asked_backend
from ..call.projection import Output, facts_of, flatten, layouts_of
from .dispatch import NODE, autocast_dtype, path_of

calls: dict[Hashable, Any] = {}  # level 2; no entry has the key None


def key_of(
    inputs: Sequence[Tensor], rest: Sequence[Hashable] = (), backend: str | None = None
) -> Hashable:
    """The key of an eager call with these tensors, x first, under torch's present modes.

    ``rest``: the scales and other settings of the call.  If a call passed the checks, so do all
    calls with an equal key.  Raises an error of torch for a tensor without strides or without an
    address.
    """
    return autocast_dtype(inputs[0]), asked_backend(backend), *rest, *facts_of(inputs)


def key_of_x(x: Tensor) -> Hashable:
    """The key of x for a module's cache, whose guard covers the other tensors.

    None if the call can't be cached.
    """
    # path_of(x) isn't NODE under compilation, torch.func, or for a tensor subclass (dispatch.py).
    try:
        return key_of([x], (torch.is_grad_enabled(),)) if path_of(x) == NODE else None
    except Exception:  # x is no tensor, is sparse, or came from a torch.func transform that ended
        return None


def key_of_outputs(
    x: Tensor,
    outputs: Sequence[Output[Tensor]],
    dropout: Hashable,
    training: bool = True,
    backend: str | None = None,
) -> tuple[Hashable, list[Tensor]]:
    """(key, flat list of tensors) of a call that runs as one node.

    The key is None if the call can't be cached.  ``dropout``: the probability, or for a gated MLP a
    tuple of all its settings.
    """
    # Nothing is checked yet, so any class may come: errors here mean "not cached".
    try:
        layouts = layouts_of(outputs)
        inputs = [x, *flatten(outputs, layouts)]
        # The key contains types, because 1 == 1.0 == True, and the checks refuse some of them.
        numbers = [training, dropout]
        for layout in layouts:
            numbers += layout.scales
        key = key_of(inputs, (layouts, *numbers, *map(type, numbers)), backend)
        hash(key)  # raises for a number that can't be a key, such as a list
        return key, inputs
    except Exception:  # a wrong class or a number that has no hash: the checks report it
        return None, []
