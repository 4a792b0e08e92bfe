"""Lazy logits: the output of a head, computed only if a function needs its elements.

:class:`LazyLogits` has the shape, dtype and device of the output.  It holds a :class:`Recipe`: the
hidden states, the head's tensors, and the steps after the head (casts, factors, a softcap, a
selection of rows or of the first columns).  A loss reads the recipe and runs
:func:`fastlora.ops.loss.head_loss`, without logits (:mod:`.logits_functions`).  Any other function
gets real logits.  They are computed once for each call of the head.  From then on, every lazy
tensor of this call acts as an ordinary one.

A lazy tensor reads the hidden states and the head's tensors when it is used.  If one of them has
been changed in place since the head's call, the use raises RuntimeError.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_map_only

from ..backends import Call, backend_name, find_backend
from ..backends.protocol import LossSettings
from ..ops.composite import run_composite
from ..ops.dispatch import autocast_off
from ..ops.loss import Head
from ..ops.node import Function, LoRALinearFunction, once_differentiable, run_forward
from ..projection import flatten, layouts_of, unflatten
from ..rows import Share

Change = Callable[[Tensor], Tensor]
# Each handler gets a lazy tensor and the function's other arguments.  It returns the result, or
# NotImplemented if the function needs elements.
HANDLERS: dict[Any, Callable[..., Any]] = {}
_aten = torch.ops.aten


class Recipe(NamedTuple):
    """How to compute a lazy tensor: a call of a head, and the steps after it."""

    head: Head
    dtype: torch.dtype
    # Each is ("mul", factor), ("tanh",), ("log_softmax",), or ("neg",) after log_softmax.
    steps: tuple[tuple, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.head.x.shape[:-1], self.head.output.base.weight.shape[0]

    @property
    def is_logprob(self) -> bool:
        return any(name == "log_softmax" for name, *_ in self.steps)

    @property
    def sign(self) -> float:
        """-1 for negated log-probabilities, 1 for log-probabilities."""
        return -1.0 if self.steps[-1][0] == "neg" else 1.0

    def of_rows(self, change: Change) -> "Recipe":
        """The recipe for other rows.  ``change`` selects or reshapes the rows of any [..., n]."""
        head, mask_rows = self.head, self.head.mask_rows
        if head.seeds is not None:
            if mask_rows is None:
                mask_rows = torch.arange(head.rows, dtype=torch.int64, device=head.x.device)
                mask_rows = mask_rows.view(head.x.shape[:-1])
            mask_rows = change(mask_rows.unsqueeze(-1)).squeeze(-1)
        return self.with_head(x=change(head.x), mask_rows=mask_rows)

    def with_head(self, **changes: Any) -> "Recipe":
        """The recipe with other fields of the head's call."""
        return self._replace(head=self.head._replace(**changes))

    def settings(self) -> LossSettings | None:
        """The settings of a loss that have the effect of the steps; None if no settings have it.

        after · tanh(before · z) equals a softcap of ``after``, applied to logits scaled by
        before · after.
        """
        before, after, is_capped = 1.0, 1.0, False
        for name, *number in self.steps:
            if name == "mul" and is_capped:
                after *= number[0]
            elif name == "mul":
                before *= number[0]
            elif name == "tanh" and is_capped:
                return None
            elif name == "tanh":
                is_capped = True
        if not is_capped:
            return LossSettings(logit_scale=before)
        return LossSettings(softcap=after, logit_scale=before * after) if after > 0.0 else None

    def tensors(self) -> list[Tensor]:
        """The tensors that autograd follows: x, and the head's."""
        output = self.head.output
        return [self.head.x, *flatten([output], layouts_of([output]))]

    def of_tensors(self, change: Change) -> "Recipe":
        """The recipe with other tensors.  ``change`` gets each tensor that autograd follows."""
        x, *tensors = map(change, self.tensors())
        (output,) = unflatten(tensors, layouts_of([self.head.output]))
        return self.with_head(x=x, output=output)

    def compute(self, tensors: list[Tensor]) -> Tensor:
        """The elements, by torch's operations on these values of :meth:`tensors`."""
        (output,) = unflatten(tensors[1:], layouts_of([self.head.output]))
        (mask,), p = self.head.masks() or [None], self.head.dropout

        def drop(number: int, x: Tensor, share: Share | None) -> Tensor:
            assert mask is not None
            keep = mask.rows(0, x.shape[:-1].numel()).view(x.shape)
            return torch.where(keep, x / (1.0 - p), 0.0)

        (z,) = run_composite(tensors[0], [output], None if mask is None else drop)
        z = z.to(self.dtype)
        for name, *number in self.steps:
            z = STEPS[name](z, *number)
        return z


STEPS: dict[str, Callable[..., Tensor]] = {
    "mul": lambda z, factor: z * factor,
    "tanh": torch.tanh,
    "log_softmax": lambda z: torch.log_softmax(z, -1),
    "neg": torch.neg,
}


class HeadCall:
    """One call of a head, shared by all lazy tensors that come from it."""

    def __init__(self, recipe: Recipe, is_current: Callable[[], bool]) -> None:
        """``is_current()``: False if the head changed without a change of the tensors' versions."""
        self.recipe, self.is_current = recipe, is_current
        self.states = [_state_of(tensor) for tensor in recipe.tensors()]
        self.has_grad = torch.is_grad_enabled()
        self.is_inference = torch.is_inference_mode_enabled()
        self.hooks = _top_hooks()
        self.lock = threading.RLock()
        self.logits: Tensor | None = None  # None until a function needs elements
        self.lazy: WeakSet[LazyLogits] = WeakSet()

    def can_stay_lazy(self) -> bool:
        """Whether a function may return a lazy tensor or run a fused loss now.

        It may not inside of a checkpoint that began after the head's call.  Checkpointing runs a
        function twice, and both runs must take the same path, but the first one may compute the
        logits.
        """
        is_transformed = torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
        has_same_hooks = _top_hooks() in (None, self.hooks)
        return self.logits is None and has_same_hooks and not is_transformed

    def check(self) -> None:
        """Raise RuntimeError if the hidden states or the head's tensors have changed."""
        states = [_state_of(tensor) for tensor in self.recipe.tensors()]
        if states != self.states or not self.is_current():
            raise RuntimeError(
                "these logits weren't computed yet, and the hidden states or the weights of the "
                "head have changed since its call (an optimizer step?): read outputs.logits before "
                "the change, or call fastlora.optimize without loss=True"
            )

    def compute(self) -> Tensor:
        """The logits, in the grad mode of the head's call.  Computed once."""
        with self.lock:
            if self.logits is None:
                self.check()
                with (
                    torch.inference_mode(self.is_inference),
                    torch.set_grad_enabled(self.has_grad),
                    autocast_off(self.recipe.head.x.device.type),
                ):
                    self.logits = self._compute()
            return self.logits

    def _compute(self) -> Tensor:
        head, inputs = self.recipe.head, self.recipe.tensors()
        backend = find_backend(backend_name(head.backend, head.x.device))
        call = Call(layouts_of([head.output]), head.dropout, backend)
        if torch.is_grad_enabled():
            return LoRALinearFunction.apply(head.seeds, None, call, *inputs)[0]
        return run_forward(inputs, head.seeds, call)[0][0]


def _top_hooks() -> Any:
    """The innermost hooks on saved tensors, such as checkpointing's; None if there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]


@contextmanager
def _outside(hooks: Any) -> Iterator[None]:
    """Inside, torch.func's transforms and the saved-tensor hooks after ``hooks`` are off."""
    left = []
    while (top := _top_hooks()) not in (None, hooks):
        left.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()  # type: ignore[attr-defined]
    try:
        with temporarily_clear_interpreter_stack():
            yield
    finally:
        for pair in reversed(left):
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)  # type: ignore[attr-defined]


def _state_of(tensor: Tensor) -> tuple[int, int | None]:
    """A value that changes if the tensor is written to, or if its ``data`` is replaced."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


class LazyLogits(Tensor):
    """Logits [..., V] that don't exist yet (see the module)."""

    call: HeadCall
    recipe: Recipe
    _replay: Callable[[], Tensor]  # computes the elements from the elements of the earlier tensor
    _elements: Tensor | None
    _state: tuple  # of the elements when they were computed
    node: Any  # the grad_fn that the tensor was made with
    has_grad: bool  # the grad mode when the tensor was made
    # One flag, shared with the autograd node: true if the elements were changed in place.
    written: list[bool]

    @staticmethod
    def make(call: HeadCall, recipe: Recipe, replay: Callable[[], Tensor]) -> "LazyLogits":
        device = recipe.head.x.device
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogits, recipe.shape, dtype=recipe.dtype, device=device
        )
        # C++ code that asks for its memory raises.  Otherwise it would read address 0.
        torch._C._set_throw_on_mutable_data_ptr(made)  # type: ignore[attr-defined]
        made.call, made.recipe, made._replay, made._elements = call, recipe, replay, None
        made.written, made.node, made.has_grad = [False], None, torch.is_grad_enabled()
        call.lazy.add(made)
        return made

    def elements(self) -> Tensor:
        """The ordinary tensor with these logits, connected to autograd's graph."""
        with self.call.lock:
            if self._elements is None:
                is_first = self.call.logits is None
                requires_grad, node = self._own_node()
                is_inference = self.call.is_inference
                # set_grad_enabled takes effect in its constructor, so construct it inside of
                # inference_mode.
                with (
                    torch.inference_mode(is_inference),
                    torch.set_grad_enabled(requires_grad or self.has_grad),
                    _outside(self.call.hooks),
                ):
                    made = self._replay()
                    if node is not self.node:  # an autograd Function returned this tensor
                        made = MaterializeFunction.apply(self, made)
                if self._elements is None:
                    self._elements, self._state = made, _state_of(made)
                # Compute the elements of all lazy tensors of the call now.  The caller may write to
                # the logits next, which must change their views and must not change their copies.
                for lazy in [*self.call.lazy] if is_first else ():
                    lazy.elements()
            return self._elements

    def then(self, recipe: Recipe, step: Change) -> Tensor:
        """Return a lazy tensor with ``recipe``.

        ``step`` computes its elements from this tensor's elements.
        """
        made = recipe if self._own_node()[0] else recipe.of_tensors(Tensor.detach)
        return with_node(self.call, made, lambda: step(self.elements()), self)

    def _own_node(self) -> tuple[bool, Any]:
        """``requires_grad`` and ``grad_fn`` of this tensor itself, not of its elements."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.requires_grad, self.grad_fn

    def has_its_gradient(self) -> bool:
        """Whether the recipe's gradient is this tensor's gradient.

        It isn't if an autograd Function returned the tensor.  An exception is the Function of
        DistributedDataParallel, which passes the gradient on unchanged.
        """
        node = self._own_node()[1]
        return node is self.node or type(node).__name__ == "_DDPSinkBackward"

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyLogits({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if func in _METADATA and (not isinstance(first, LazyLogits) or first._elements is None):
            return super().__torch_function__(func, types, args, kwargs)
        # A compiled function that gets lazy logits breaks its graph here.
        run = _outside_of_graphs() if "torch._dynamo" in sys.modules else LazyLogits._run
        return run(func, args, kwargs)

    @staticmethod
    def _run(func: Any, args: Any, kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("input")
        handler = HANDLERS.get(func)
        is_lazy = isinstance(first, LazyLogits) and first.call.can_stay_lazy()
        if handler is not None and is_lazy and first.has_its_gradient():
            rest = {name: value for name, value in kwargs.items() if name != "input"}
            with suppress(TypeError):  # arguments that the handler doesn't take
                made = handler(first, *args[1:], **rest)
                if made is not NotImplemented:
                    return made
        made = func(*_real(args), **_real(kwargs))
        for given in (*args, *kwargs.values()):
            if isinstance(given, LazyLogits):
                for lazy in [*given.call.lazy]:  # the function may have written to all of them
                    lazy.written[0] |= _state_of(lazy.elements()) != lazy._state
                if made is given._elements:  # a write, or a cast that changes nothing
                    return given
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run operations that bypass ``__torch_function__``, because autograd itself calls them."""
        if func in (_aten.detach.default, _aten.alias.default):
            lazy = args[0]
            return LazyLogits.make(lazy.call, lazy.recipe, lazy.elements)
        with torch.no_grad():
            return func(*_real(args), **_real(kwargs or {}))


_disabled: list[Callable[..., Any]] = []


def _outside_of_graphs() -> Callable[..., Any]:
    """``LazyLogits._run``, marked so that torch.compile doesn't trace it."""
    if not _disabled:  # made at the first use, because importing the compiler is slow
        _disabled.append(torch.compiler.disable(LazyLogits._run))
    return _disabled[0]


def with_node(
    call: HeadCall, recipe: Recipe, replay: Callable[[], Tensor], parent: LazyLogits | None = None
) -> Tensor:
    """A lazy tensor with its autograd node.  The node of ``parent`` is an input of this node."""
    make = partial(LazyLogits.make, call, recipe, replay)
    made: Any = LazyLogitsFunction.apply(make, recipe, parent, *recipe.tensors())
    # Here, because the grad mode is off in the node's forward.
    made.node, made.has_grad = made._own_node()[1], torch.is_grad_enabled()
    return made


class LazyLogitsFunction(Function):
    """The node of a lazy tensor, for functions that bypass ``__torch_function__``.

    Autograd Functions bypass it, such as the one that DistributedDataParallel applies to a model's
    outputs.  A fused loss computes the gradients of the head's tensors itself.  Its backward
    reaches this node also, with None as the gradient (:class:`LinkFunction`).
    """

    @staticmethod
    def forward(
        ctx, make: Callable[[], Any], recipe: Recipe, parent: LazyLogits | None, *tensors: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.recipe = recipe.with_head(x=tensors[0].new_empty(0, tensors[0].shape[-1]))
        lazy = make()
        ctx.written = lazy.written
        return lazy

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        if gradient is None:
            return (None,) * (3 + len(needs))
        if ctx.written[0]:
            raise RuntimeError(
                "an autograd Function got logits that were changed in place, so their gradient "
                "isn't known: pass it a copy (logits.clone()), or call fastlora.optimize without "
                "loss=True"
            )
        pairs = zip(ctx.saved_tensors, needs, strict=True)
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in pairs]
        with torch.enable_grad():
            y = ctx.recipe.with_head(x=leaves[0]).compute(leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, gradient, allow_unused=True))
        return None, None, None, *[next(found) if need else None for need in needs]


class _FirstFunction(Function):
    """A function of two tensors that passes its gradient on to the first."""

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class MaterializeFunction(_FirstFunction):
    """Returns the elements of a lazy tensor that an autograd Function returned.

    The backward passes their gradient to that Function.
    """

    @staticmethod
    def forward(ctx, lazy: Tensor, elements: Tensor) -> Tensor:
        return elements.detach()  # autograd forbids in-place writes to an input that is returned


class LinkFunction(_FirstFunction):
    """Returns the loss.  Its backward also reaches the lazy tensor's node, with no gradient.

    DistributedDataParallel waits for the node of its Function to run.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, lazy: Tensor) -> Tensor:
        return loss.clone()


def _real(tree: Any) -> Any:
    """These arguments with an ordinary tensor in place of each lazy one."""
    return tree_map_only(LazyLogits, LazyLogits.elements, tree)


# Properties and methods that need no elements, so the tensor itself answers.
_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "layout", "is_cpu", "is_cuda", "requires_grad", "grad_fn",
    "is_leaf", "is_meta", "is_nested", "is_sparse", "is_quantized", "output_nr",
    "itemsize", "nbytes", "is_mps", "is_xpu", "_version",
)  # fmt: skip
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension,
    Tensor.__len__, Tensor.__hash__, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.is_signed, Tensor.get_device,
    torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor,
}  # fmt: skip
