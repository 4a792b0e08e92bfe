"""Lazy logits: the output of a head, computed only if a function needs its elements.

:class:`LazyLogits` has the shape, strides, dtype and device of the output.  Autograd treats it as
an ordinary tensor: each operation has torch's own node.  Below autograd (``__torch_dispatch__``),
an operation in :data:`STEPS` returns another lazy tensor.  Any other operation needs the elements.
Then the elements of all lazy tensors of this call of the head are computed, and from then on these
lazy tensors act as ordinary ones.

The lazy tensors of a call are a tree.  Each has a :class:`Cell`: its parent, and the operation that
computes its elements from the parent's.  The root's elements are the output of the head.

Losses are replaced above autograd (``__torch_function__``), by :data:`HANDLERS`
(:mod:`.logits_functions`).  A handler reads the :class:`Recipe` of a lazy tensor, the formula of
its elements, and runs :func:`fastlora.ops.loss.head_loss`, without logits.

The elements are computed from the hidden states and the head's tensors.  If one of them has been
changed since the head's call, this raises RuntimeError.
"""

import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..backends import BackwardCall, Call, backend_name, find_backend
from ..backends.protocol import LossSettings
from ..call.projection import flatten, layouts_of, unflatten
from ..ops.dispatch import autocast_off
from ..ops.loss import Head
from ..ops.node import Function, backend_backward, backend_forward, refuse_by_torch_only

Change = Callable[[Tensor], Tensor]
Report = Callable[[str], None] | None  # called with a text: how the loss of a call ran
# A function of torch -> its handler.  A handler gets a lazy tensor and the function's other
# arguments.  It returns the result, or NotImplemented if the function needs elements.
HANDLERS: dict[Any, Callable[..., Any]] = {}
# An operation of ATen -> its step.  A step gets the operation, the cell of a lazy tensor and the
# other arguments.  It returns the cell of the result (a list of cells if the operation returns a
# list), the result itself, or None if the operation needs elements.
STEPS: dict[Any, Callable[..., Any]] = {}
_aten = torch.ops.aten


class HeadCall:
    """One call of a head, shared by all lazy tensors that come from it."""

    def __init__(self, head: Head, is_current: Callable[[], bool], report: Report = None) -> None:
        """``is_current()``: False if the head changed without a change of its tensors."""
        self.head, self.is_current, self.report = map_tensors(head, _alias), is_current, report
        # Version counters don't show all changes: fused optimizers write to parameters without
        # incrementing them.  So the sums of rows of trained parameters are compared also.
        pairs = [*zip(tensors_of(head), tensors_of(self.head), strict=True)]
        self.trained = [alias for tensor, alias in pairs[1:] if tensor.requires_grad]  # without x
        self.state = self._state()
        self.hooks = _top_hooks()  # compared in can_fuse
        self.lock = threading.RLock()  # two threads may read the elements
        self.is_computed = False
        self.hs: list[Tensor] | None = None  # the adapter's h, saved for backward
        self.cells: WeakSet[Cell] = WeakSet()  # of all lazy tensors that are still in use

    def _state(self) -> tuple[list[int], list[Tensor]]:
        """(version counters of all tensors, sums of rows of :attr:`trained`)."""
        with torch.no_grad():
            # nan_to_num_, because NaN != NaN would look like a change.
            sums = [tensor.sum(-1).nan_to_num_() for tensor in self.trained]
        return [tensor._version for tensor in tensors_of(self.head)], sums

    def check(self) -> None:
        """Raise RuntimeError if the hidden states or the head's tensors have changed."""
        (versions, sums), (versions_now, sums_now) = self.state, self._state()
        is_same = versions == versions_now and all(map(torch.equal, sums, sums_now))
        if not is_same or not self.is_current():
            raise RuntimeError(
                "these logits weren't computed yet, and the hidden states or the weights of the "
                "head have changed since its call (an optimizer step?): read outputs.logits before "
                "the change, or call fastlora.optimize without loss=True"
            )

    def can_fuse(self) -> bool:
        """Whether a loss may run without logits now.

        It may not if the elements exist already, or inside of a torch.func transform.  It also may
        not under ``torch.utils.checkpoint`` if the checkpoint began after the head's call.
        Checkpointing runs a function twice, and both runs must save the same tensors.  If the first
        run computes the logits, the second one would find them computed, and take another path.
        """
        is_transformed = torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
        return not self.is_computed and _top_hooks() in (None, self.hooks) and not is_transformed

    def report_once(self, text: str) -> None:
        """Report how the loss of this call ran.  Only the first text of a call is reported."""
        if self.report is not None:
            self.report(text)
        self.report = None

    def compute(self, reader: str = "the elements were read") -> None:
        """Compute the elements of all lazy tensors of this call, once; ``reader`` says what for.

        All are computed together, because the caller may next write to one of them in place.  For
        example, after ``y = z * 2; z.add_(1)``, y must still be twice the old z.
        """
        with self.lock, torch.no_grad(), autocast_off(self.head.x.device.type):
            if not self.is_computed:
                self.check()
                self.report_once(reader)
                for cell in [*self.cells]:
                    cell.compute()
                self.is_computed = True

    def logits(self) -> Tensor:
        """Compute the output of the head, and set ``hs``."""
        (y,), self.hs = backend_forward(tensors_of(self.head), self.head.seeds, self.backend_call())
        return y

    def backend_call(self) -> Call:
        """The record of this call for a backend."""
        backend = find_backend(backend_name(self.head.backend, self.head.x.device))
        return Call(layouts_of([self.head.output]), self.head.dropout, backend)


def tensors_of(head: Head) -> list[Tensor]:
    """The tensors that autograd tracks: x, then the head's weight, bias and adapters."""
    return [head.x, *flatten([head.output], layouts_of([head.output]))]


def map_tensors(head: Head, change: Change) -> Head:
    """The head with ``change(tensor)`` in place of each of its :func:`tensors_of`."""
    x, *tensors = map(change, tensors_of(head))
    (output,) = unflatten(tensors, layouts_of([head.output]))
    return head._replace(x=x, output=output)


def _alias(tensor: Tensor) -> Tensor:
    """A view of the tensor.  A later change of the tensor's ``requires_grad`` doesn't affect it."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach()


def _top_hooks() -> Any:
    """The innermost hooks on saved tensors, such as checkpointing's; None if there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]


class Recipe(NamedTuple):
    """The formula of a lazy tensor [..., V]: elements = f(s[rows]).

    z [M, V] is the head's output, and s = logit_scale · z.  With a softcap,
    s = softcap · tanh(logit_scale · z / softcap).  ``form`` names f:

        "logits"    f(s) = s
        "logprobs"  f(s) = log_softmax(s)
        "probs"     f(s) = softmax(s)
        "p_log_p"   f(s) = softmax(s) · log_softmax(s)
    """

    rows: Tensor | None = None  # int64 [...]: numbers of rows of z; None: all, in order
    settings: LossSettings = LossSettings()  # has logit_scale and softcap
    form: str = "logits"
    # The same f and scale as functions of torch: applied in order to z[rows], they give the
    # elements, with torch's rounding.
    changes: tuple[Change, ...] = ()


class Cell:
    """One lazy tensor: a node in the tree of a call, and its elements once they are computed.

    Example, ``logits[:, :-1]``: the parent is the cell of ``logits``, and ``run`` takes the slice.
    Operations of views make new LazyLogits, and only cells refer to parents.

    elements = run(the parent's elements); without a parent, the output of the head.
    """

    def __init__(
        self, call: HeadCall, like: Tensor, recipe: Recipe, parent: Any = None, run: Any = None
    ) -> None:
        """``like``: a meta tensor with the shape, strides and dtype of the elements."""
        self.call, self.like, self.recipe = call, like, recipe
        self.parent, self.run = parent, run
        self.data: Tensor | None = None  # the elements, once they are computed
        self.lse: Tensor | None = None  # log-sum-exp of each row, if ``gather`` has computed it
        call.cells.add(self)

    def compute(self) -> Tensor:
        if self.data is None:
            parent, like = self.parent, self.like
            data = self.call.logits() if parent is None else self.run(parent.compute())
            # The lazy tensor has promised the strides of ``like``, and views of it use them.
            if data.stride() != like.stride():
                data = data.new_empty_strided(like.shape, like.stride()).copy_(data)
            self.data, self.parent = data, None  # frees the parent's elements
        return self.data

    def with_rows(self, like: Tensor, rows: Tensor | None, run: Change) -> "Cell":
        """The result of an operation that selects rows."""
        return Cell(self.call, like, self.recipe._replace(rows=rows), self, run)

    def changed(self, run: Change, **fields: Any) -> "Cell":
        """The result of an operation on each row.  ``fields``: new values of the recipe."""
        rows, changes = self.recipe.rows, (*self.recipe.changes, run)
        # The result is a new contiguous tensor.  ``_rows_at`` reads the row numbers by its strides.
        rows = None if rows is None else rows.contiguous()
        recipe = self.recipe._replace(rows=rows, changes=changes, **fields)
        return Cell(self.call, run(self.like), recipe, self, run)


class LazyLogits(Tensor):
    """Logits [..., V] that don't exist yet (see the module)."""

    cell: Cell

    @staticmethod
    def make(cell: Cell) -> "LazyLogits":
        like = cell.like
        lazy: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogits, like.shape, strides=like.stride(), storage_offset=like.storage_offset(),
            dtype=like.dtype, device=cell.call.head.x.device,
        )  # fmt: skip
        # Makes C++ code raise when it asks for the address.  Otherwise it would read address 0.
        torch._C._set_throw_on_mutable_data_ptr(lazy)  # type: ignore[attr-defined]
        lazy.cell = cell
        return lazy

    def elements(self) -> Tensor:
        """The ordinary tensor with these logits: a view of this one in autograd's graph."""
        # ``alias`` returns an ordinary tensor (__torch_dispatch__), because the elements exist.
        self.cell.call.compute()
        with torch._C.DisableTorchFunctionSubclass():
            return _aten.alias(self)

    def functions(self) -> list[str]:
        """The names of the autograd Functions between the head and this tensor."""
        node, number, names = self.grad_fn, self.output_nr, list[str]()
        # Walk from this tensor towards the head's node (LazyHeadFunction), which has ``head_call``.
        while node is not None and getattr(node, "head_call", None) is not self.cell.call:
            edges = node.next_functions
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                names.append(type(node).__name__)
                # Output i of such a Function is its input i, unchanged: follow that input.
                edges = edges[number:]
            node, number = edges[0] if edges else (None, 0)
        return names

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyLogits({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A compiled function that gets lazy logits breaks its graph here.
        run = _outside_of_graphs() if "torch._dynamo" in sys.modules else LazyLogits._run
        return run(func, args, kwargs or {})

    @staticmethod
    def _run(func: Any, args: Any, kwargs: Any) -> Any:
        # In this order: a fused loss, a refusal, the elements; else torch's own function.
        first, handler = args[0] if args else kwargs.get("input"), HANDLERS.get(func)
        if handler is not None and isinstance(first, LazyLogits) and first.cell.call.can_fuse():
            rest = {name: value for name, value in kwargs.items() if name != "input"}
            result = handler(first, *args[1:], **rest)
            if result is not NotImplemented:
                return result
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            raise _refusal("logits.data = …")
        if func in _OF_GRADIENTS:
            first.cell.call.compute()
        if func in _OF_MEMORY:
            args, kwargs = tree_map_only(LazyLogits, LazyLogits.elements, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, step = kwargs or {}, STEPS.get(func)
        first = args[0] if args else None
        if step and isinstance(first, LazyLogits) and not first.cell.call.is_computed:
            cells = step(func, first.cell, *args[1:], **kwargs)
            if cells is not None:
                return tree_map_only(Cell, LazyLogits.make, cells)
        if torch.Tag.inplace_view in func.tags:
            raise _refusal(func)
        # The operation needs elements.  It runs on ordinary tensors.  If it returns one of them (an
        # in-place operation does), the caller must get the lazy tensor again.
        lazy_of: dict[int, LazyLogits] = {}

        def with_elements(lazy: LazyLogits) -> Tensor:
            lazy.cell.call.compute(f"{func} read them")
            data = lazy.cell.compute()
            lazy_of[id(data)] = lazy
            return data

        args, kwargs = tree_map_only(LazyLogits, with_elements, (args, kwargs))
        result = func(*args, **kwargs)
        if result is None:  # in place on a list, such as torch._foreach_mul_
            torch.autograd.graph.increment_version(lazy_of.values())
        return tree_map_only(Tensor, lambda tensor: lazy_of.get(id(tensor), tensor), result)


# Functions that read memory without an operation of ATen.  They get ordinary tensors.
_OF_MEMORY = {
    Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__reduce_ex__, Tensor.__deepcopy__,
    Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage, Tensor.__dlpack__, torch.as_tensor,
    Tensor.__dlpack_device__, torch.asarray, torch.from_dlpack, Tensor.as_subclass,
}  # fmt: skip
# Functions that need the gradient of the logits.  A loss without logits never computes it, so these
# functions compute the elements, and the loss then runs on them.
_OF_GRADIENTS = {
    Tensor.register_hook, Tensor.retain_grad, Tensor.requires_grad_,
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
}  # fmt: skip


@cache
def _outside_of_graphs() -> Callable[..., Any]:
    """``LazyLogits._run``, marked so that torch.compile doesn't trace it.

    A function, because importing the compiler is slow.
    """
    return torch.compiler.disable(LazyLogits._run)


def _refusal(name: Any) -> RuntimeError:
    return RuntimeError(
        f"{name} changes the shape or the memory of lazy logits in place: make a new tensor "
        "instead, or call fastlora.optimize without loss=True"
    )


class LazyHeadFunction(Function):
    """The node of a head's call.  Its backward runs only if the logits have a gradient."""

    @staticmethod
    def forward(ctx, call: HeadCall, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.head_call = call
        x, weight = tensors[0], call.head.output.base.weight
        like = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device="meta")
        return LazyLogits.make(Cell(call, like, Recipe()))

    @staticmethod
    def backward(ctx, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needs = ctx.head_call, ctx.needs_input_grad[1:]
        if dy is None:
            return None, *[None] * len(needs)
        refuse_by_torch_only([dy], "a lazy head", "optimize the model with loss=False")
        # h exists once the elements were computed.  A Function may return dy without reading them.
        if call.hs is None:
            call.logits()
        arguments = [dy], ctx.saved_tensors, call.hs, needs, call.head.seeds, call.backend_call()
        return None, *backend_backward(BackwardCall(*arguments))
