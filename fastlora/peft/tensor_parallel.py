"""Tensor parallel layers: this rank's part of a LoRA layer that transformers shards.

transformers makes the parameters of such a base DTensors and replaces its forward on the instance.
PEFT does both to one half of the adapter also.  The replaced forwards turn their input into a
DTensor and return this rank's tensor.  Here one node takes this rank's tensors instead:

=======  =======  ====================  ===================  =========================
style    x        weight                adapter              y
=======  =======  ====================  ===================  =========================
colwise  whole    some rows, [N/n, K]   lora_B: some rows    some columns, [M, N/n]
rowwise  columns  some columns          lora_A: the same     a sum over ranks, [M, N]
=======  =======  ====================  ===================  =========================

No trainer and no hook sums gradients over these ranks, so a layer sums all that are partial:

* colwise: dx and d lora_A, because each rank computes them from its own columns of dy.
* rowwise: d lora_B = dyᵀ h, because a rank's h is a partial sum.  y is summed in the forward, with
  the adapter's part in it, and the bias is added to the sum.

So a whole tensor has the same gradient on every rank, and a shard has its own.  PEFT's forward sums
dh and h in place of d lora_A and d lora_B.

Dropout: for colwise, the gradients are exact for any masks, because each rank's terms use the masks
of its own columns of y.  Ranks with equal random states draw equal masks, like one rank.  For
rowwise, each rank masks its own features (:meth:`Part.seeds`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from ..call.projection import Base, Output
from ..common.other_packages import defined_in, is_dtensor
from ..layers.classes import twin
from ..layers.guards import LinearRecord
from ..ops.functional import linears
from ..ops.node import draw_seed

_PLACE = "transformers.distributed.tensor_parallel"
PARALLEL = "its base layer is tensor parallel"
# A style's class, and how its input and output lie on the ranks -> the sharded axis of the weight.
_AXES = {
    ("ColwiseParallel", "Replicate()", "Shard(dim=-1)"): 0,
    ("RowwiseParallel", "Shard(dim=-1)", "Replicate()"): 1,
}


class Part(NamedTuple):
    """The part of a tensor parallel layer that this rank computes."""

    group: Any  # the process group of the ranks that share the layer
    rank: int  # in this group
    size: int
    is_rowwise: bool

    def local(self, linear: nn.Module) -> nn.Module:
        """A stand-in for a linear layer, with this rank's tensors and its class's forward."""
        alike = twin(linear, type(linear))
        alike.__dict__.pop("forward", None)
        for name, tensor in alike._parameters.items():
            if is_dtensor(tensor):
                alike._parameters[name] = tensor.to_local()
        return alike

    def run(self, x: Tensor, record: LinearRecord) -> tuple[Tensor, None]:
        """The layer's output for this rank's x.  No kind, because each call gathers a matrix."""
        ((weight, bias), adapters), p, whole = record.outputs[0], max(record.dropouts), self._whole
        # colwise: this rank's terms of dx and d lora_A are summed over the ranks.
        if not self.is_rowwise:
            adapters = tuple([each._replace(lora_a=whole(each.lora_a)) for each in adapters])
            return linears(whole(x), (Output(Base(weight, bias), adapters),), p)[0][0], None
        # rowwise: y and d lora_B are summed, and the bias is added once, after the sum.
        adapters = tuple([each._replace(lora_b=whole(each.lora_b)) for each in adapters])
        seeds = self.seeds(len(adapters), x.device) if p else None
        (y,), _ = linears(x, (Output(Base(weight, None), adapters),), p, seeds=seeds)
        y = _Sum.apply(y, self.group)
        return y if bias is None else y + bias.to(y.dtype), None

    def seeds(self, count: int, device: torch.device) -> Tensor:
        """The seeds of a call's adapters.

        For rowwise, this rank's of the seeds of all ranks.  Every rank draws all of them, so that
        equal random states of the ranks stay equal, and different features have different masks.
        """
        if not self.is_rowwise:
            return draw_seed(count, device)
        return draw_seed(self.size * count, device).view(self.size, count)[self.rank].clone()

    def _whole(self, tensor: Tensor) -> Tensor:
        """The tensor, with a gradient that is summed over the ranks."""
        follows = tensor.requires_grad and torch.is_grad_enabled()
        return _Whole.apply(tensor, self.group) if follows else tensor


class _Whole(torch.autograd.Function):
    """A tensor that every rank has whole: its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        # ``_Sum`` writes to its argument, which a graph of the backward may have saved.
        own = gradient.clone() if torch.is_grad_enabled() else gradient
        return _Sum.apply(own.contiguous(), ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum of the ranks' tensors, in place.  Every rank gets the sum's gradient whole."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ctx.mark_dirty(tensor)
        distributed.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        # Each rank has the gradient of y whole.  In a second backward, its own gradient is summed.
        follows = torch.is_grad_enabled()
        return _Whole.apply(gradient, ctx.group) if follows else gradient, None


def is_parallel(layer: nn.Module | None) -> bool:
    """Whether transformers runs this layer, or a PEFT layer's base, in any parallel style."""
    return layer is not None and bool(_held_by(layer._modules.get("base_layer") or layer))


def part_of(layer: Any, names: list[str], mixed: bool = False) -> tuple[str, Part | None]:
    """This rank's part of a PEFT layer with these adapters, or the reason why there is none.

    Without a part, the reason is "" if the base isn't tensor parallel.  It is the same on every
    rank, because both forwards wait for the other ranks.  ``mixed``: the batch is a mixed one.
    """
    modules = layer._modules
    held = _held_by(modules["base_layer"])
    if not held:
        return "", None
    style, mesh = held["self"], held["mesh"]
    axis, size, world = _axis_of(style), mesh.size(), distributed.get_world_size()
    # The half of the adapter that is sharded with the base's weight.
    half = "lora_A" if axis else "lora_B"
    halves = [modules[half]._modules[name] for name in names]
    if axis is None:
        reason = "in another style than colwise and rowwise"
    elif mesh.ndim > 1 or size < world:
        reason = f"over {size} of {world} ranks, beside another kind of parallelism"
    elif mixed:
        reason = "and the batch is mixed"
    elif any(name in layer.lora_variant for name in names):
        reason = "and its adapter is no plain LoRA (DoRA, …)"
    elif not all(_is_like(each, style, mesh, axis) for each in (modules["base_layer"], *halves)):
        reason = f"and its {half} isn't, or the ranks have unequal parts"
    else:
        return "", Part(mesh.get_group(), mesh.get_local_rank(), size, bool(axis))
    return f"{PARALLEL} {reason}", None


def _is_like(linear: nn.Module, style: Any, mesh: Any, axis: int) -> bool:
    """Whether a linear layer runs in this style, and each rank has an equal part of its weight."""
    held, weight = _held_by(linear), vars(linear)["_parameters"].get("weight")
    return (
        held.get("self") is style
        and is_dtensor(weight)
        and weight.device_mesh == mesh == held["mesh"]
        and weight.placements[0].is_shard(axis)
        and not weight.shape[axis] % mesh.size()
    )


def _held_by(linear: nn.Module) -> dict[str, Any]:
    """The variables of transformers' forward on this instance; empty if it has another forward.

    They are the style (``self``), the ``mesh`` and the replaced forward, which must be the class's.
    Compiled calls run PEFT's forward, because a closure can't be traced.
    """
    forward: Any = None if torch.compiler.is_compiling() else vars(linear).get("forward")
    if defined_in(forward) != _PLACE:
        return {}
    cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
    held = {name: cell.cell_contents for name, cell in cells}
    own = getattr(held.get("original_forward"), "__self__", None) is linear
    own = own and held["original_forward"].__func__ is type(linear).forward
    return held if own and {"self", "mesh"} <= held.keys() else {}


def _axis_of(style: Any) -> int | None:
    """The sharded axis of the weight, [out, in]: 0 for colwise, 1 for rowwise; None for others."""
    if type(style).__module__ != _PLACE or not getattr(style, "use_local_output", False):
        return None
    layouts = repr(style.input_layouts), repr(getattr(style, "output_layouts", None))
    return _AXES.get((type(style).__name__, *layouts))
