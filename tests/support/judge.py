"""Checks used by all op tests: a float64 oracle, and an error budget from PyTorch's own error.

Also makers of random inputs, and counters of memory: the bytes that autograd saves for the
backward, and the peak of live bytes.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import oracles
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastlora
from fastlora import Projection
from fastlora.backends import BackwardCall, Call
from fastlora.backends import torch as torch_backend
from fastlora.backends.protocol import LossRows
from fastlora.call.projection import Base, Output, as_outputs, flatten, layouts_of
from fastlora.formats.format import Quantized
from fastlora.ops.node import draw_seed

K, HIDDEN, N = 24, 40, 20  # the sizes of a gated MLP
# The dtypes of a layer and of its adapter.
USUAL_DTYPES = {
    "f64": (torch.float64, torch.float64),
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32": (torch.bfloat16, torch.float32),
    "f16-f32": (torch.float16, torch.float32),
}


def _make_layer(
    lead: tuple[int, ...],
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A random weight, lora_a, lora_b and bias, with more axes of the sizes ``lead`` in front.

    All require gradients except the base weight.
    """
    shapes = (*lead, n, k), (*lead, r, k), (*lead, n, r)
    weight, *pair = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    lora_a, lora_b = (t.to(adapter_dtype or dtype).requires_grad_() for t in pair)
    shift = torch.randn(*lead, n).to(dtype).requires_grad_() if bias else None
    return weight.to(dtype), lora_a, lora_b, shift


def make_projection(*sizes_and_dtypes: Any, **bias: bool) -> Projection:
    """A layer made from n, k, r, its dtype, its adapter's dtype (or None), and ``bias``."""
    return Projection(*_make_layer((), *sizes_and_dtypes, **bias), 0.75)


def make_outputs(
    dtype: torch.dtype, adapter_dtype: torch.dtype | None = None, k: int = 16
) -> list[Output]:
    """Three outputs of different sizes: a bias and an adapter; two adapters; none."""
    one, two, more = (
        make_projection(n, k, r, dtype, adapter_dtype, bias=b)
        for n, r, b in ((6, 2, True), (9, 3, False), (9, 1, False))
    )
    weight = torch.randn(7, k, dtype=torch.float64).to(dtype)
    return [*as_outputs([one, two, more._replace(weight=None)]), Output(Base(weight))]


def make_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def make_mlp(
    dtype=torch.float32, adapter_dtype=None, bias=False, adapted="gud", sizes=(K, HIDDEN, N)
) -> list[Output]:
    """gate, up and down with values of usual sizes.

    ``adapted``: the letters of the projections that get an adapter.  Adapters and biases require
    gradients.
    """
    k, hidden, n = sizes
    outputs = []
    for letter, rows, columns, r in (("g", hidden, k, 3), ("u", hidden, k, 8), ("d", n, hidden, 5)):
        projection = make_projection(rows, columns, r, dtype, adapter_dtype, bias)
        with torch.no_grad():
            for tensor in projection[:3]:
                tensor.mul_(tensor.shape[1] ** -0.5)
        (output,) = as_outputs([projection])
        outputs.append(output if letter in adapted else output._replace(adapters=()))
    return outputs


class Experts(NamedTuple):
    """The tensors of a call, without x."""

    weight: Tensor | Quantized
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None = None


def make_experts(experts: int, *sizes_and_dtypes: Any, **bias: bool) -> Experts:
    """Like :func:`make_projection`, for several experts."""
    return Experts(*_make_layer((experts,), *sizes_and_dtypes, **bias))


def make_rows(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, k, dtype=torch.float64).to(dtype).requires_grad_()


def ends_of(counts: Sequence[int]) -> Tensor:
    """The offsets of experts that have this many rows each."""
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def call_experts(x: Tensor, experts: Experts, offsets: Tensor, **options) -> Tensor:
    weight, lora_a, lora_b, bias = experts
    return fastlora.grouped_lora_linear(x, weight, lora_a, lora_b, offsets, bias=bias, **options)


def assert_close(
    name: str, value: Tensor, truth: Tensor, eager: Tensor, size: Tensor, dtype: torch.dtype
) -> None:
    """Require error ≤ 2 · error(eager) + a few units in the last place.

    ``eager`` is the formula computed by PyTorch in the dtype under test.  The unit in the last
    place belongs to the coarser of ``value.dtype`` and ``dtype`` (x's).

    ``size`` is the sum of the absolute values of all terms.  Where terms cancel, the error from
    rounding h or dh (half a unit) is relative to ``size``, not to the result.
    """
    assert value.shape == truth.shape, name
    assert value.dtype == eager.dtype, f"{name}: {value.dtype}, eager has {eager.dtype}"
    if value.numel() == 0:
        return
    eps = max(torch.finfo(value.dtype).eps, torch.finfo(dtype).eps)
    # in float64, the oracle rounds as much as the tested code
    share = 1.0 if dtype == torch.float64 else 0.5
    truth = truth.detach()
    error, eager_error = ((t.detach().double() - truth).abs().max() for t in (value, eager))
    budget = 2 * eager_error + eps * (2 * truth.abs().max() + share * size.detach().abs().max())
    assert error <= budget, f"{name}: {error:.3g}, budget {budget:.3g}, eager {eager_error:.3g}"


def random_like(y: Tensor) -> Tensor:
    return torch.randn(y.shape, dtype=torch.float64).to(y.dtype)


def check(
    run: Callable[[], Tensor | Sequence[Tensor]],
    textbook: Callable[[dict[str, Tensor]], Tensor | Sequence[Tensor]],
    leaves: dict[str, Tensor],
    make_dy: Callable[[Tensor], Tensor] = random_like,
    rounded: torch.dtype | None = None,
    mixed: bool = False,
) -> dict[str, Tensor]:
    """Check that every output and gradient of ``run`` is as near to the truth as PyTorch's own.

    ``textbook`` computes the same from ``leaves`` (x among them) converted to another dtype.
    ``rounded``: the dtype whose precision products have, if it isn't x's.  ``mixed``: the terms
    have random signs, so the sum of their sizes would allow far too much; the budget uses 8 × the
    result in its place.
    """
    dtype = leaves["x"].dtype

    def results(ys, its_leaves: dict[str, Tensor], dys=None) -> tuple[dict, list[Tensor]]:
        ys = (ys,) if isinstance(ys, Tensor) else ys
        dys = [make_dy(y.detach()) for y in ys] if dys is None else dys
        wanted = {f"d_{name}": t for name, t in its_leaves.items() if t.requires_grad}
        its_dys = [dy.to(y.dtype) for y, dy in zip(ys, dys, strict=True)]
        found = torch.autograd.grad(ys, list(wanted.values()), its_dys, allow_unused=True)
        named = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        return named | dict(zip(wanted, found, strict=True)), dys

    def by_textbook(convert: Callable[[Tensor], Tensor], its_dys: list[Tensor]) -> dict:
        own = {n: convert(t.detach()).requires_grad_(t.requires_grad) for n, t in leaves.items()}
        cast = {name: tensor.to(own["x"].dtype) for name, tensor in own.items()}
        return results(textbook(cast), own, its_dys)[0]

    # The textbook runs three times: in float64, in the tested dtype, and on absolute values.
    found, dys = results(run(), leaves)
    # Contiguous: on a CPU with AMX, oneDNN's products read the memory beside a window's rows.
    truth, eager = by_textbook(Tensor.double, dys), by_textbook(Tensor.contiguous, dys)
    size = by_textbook(lambda tensor: tensor.double().abs(), [dy.abs() for dy in dys])
    for name, value in found.items():
        if value is None:  # an adapter of a list that has no rows
            assert truth[name] is None or not truth[name].any(), name
        else:
            its_size = 8 * truth[name].abs() if mixed else size[name]
            assert_close(name, value, truth[name], eager[name], its_size, rounded or dtype)
    return found


def row_loss_by(backend: Any) -> Callable:
    """A backend's row_loss with the arguments of the kernel's."""
    return lambda *fields: backend.row_loss(LossRows(*fields))


def row_loss_of(run: Callable, z: Tensor, target: Tensor, *settings) -> list[Tensor]:
    """Run a kernel's row_loss (or a backend's) on a copy of z; returns the losses and the copy."""
    z, wide = z.clone(), torch.promote_types(z.dtype, torch.float32)
    losses = z.new_full((len(z),), torch.nan, dtype=wide)
    run(z, target, losses, *settings)
    return [losses, z]


def check_row_loss(
    row_loss: Callable, z: Tensor, target: Tensor, settings: tuple, upstream: Tensor | None = None
) -> dict[str, Tensor]:
    """Check losses and gradients, which must be computed in float32 and rounded once.

    The gradients are written over z, and only if they are asked for.
    """
    leaf, before, eps = z.double().requires_grad_(), z.clone(), torch.finfo(z.dtype).eps
    truth = oracles.row_losses(leaf, target, settings)
    factor = torch.ones_like(truth) if upstream is None else upstream.double()
    (gradient,) = torch.autograd.grad(truth, leaf, factor)
    losses, again = truth.new_full((2, len(z)), torch.nan, dtype=torch.float32)
    row_loss(z, target, losses, settings, upstream, False)
    assert torch.equal(z, before)
    row_loss(z, target, again, settings, upstream, True)
    assert torch.equal(losses, again)
    torch.testing.assert_close(losses.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.double(), gradient, rtol=eps + 1e-5, atol=2e-7)
    return {"losses": losses, "gradient": z}


def saved_bytes(run: Callable[[], Any], apart_from: Iterable[Tensor] = ()) -> dict[int, int]:
    """The bytes of every storage that autograd saves while ``run`` runs, by address.

    The result of ``run`` stays alive until the end, so that no address is used twice.
    """
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = run()
    assert keep is not None
    for tensor in apart_from:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return storages


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators allocate, until each is freed."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0
        for tensor in tensors:
            self.note(tensor)

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key, size)
        return tensor

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return tree_map_only(Tensor, self.note, func(*args, **(kwargs or {})))


def peak_bytes(tensors: Iterable[Tensor], run: Callable[[], object]) -> tuple[int, int, int]:
    """Bytes alive before ``run``, at the peak, and after it, over these tensors and new ones."""
    live = _Live(tensors)
    before = live.now
    with live:
        run()
    return before, live.peak, live.now


def run_torch_backend(
    x: Tensor, outputs: Sequence[Output], p: float, frozen: bool = False
) -> list[Tensor | None]:
    """Call the torch backend's forward and backward directly, so that a mode sees its operators.

    Returns all gradients or, with ``frozen``, only the gradients that a tensor requires.
    """
    layouts = layouts_of(outputs)
    settings = Call(layouts, p, torch_backend)
    given = x, *flatten(outputs, layouts)
    inputs = [tensor.detach() for tensor in given]
    needs = [tensor.requires_grad or not frozen for tensor in given]
    seeds = draw_seed(sum(len(output.adapters) for output in outputs), x.device) if p else None
    ys, hs = torch_backend.forward(inputs, seeds, settings)
    return torch_backend.backward(BackwardCall(ys, inputs, hs, needs, seeds, settings))
