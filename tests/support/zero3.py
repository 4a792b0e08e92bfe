"""DeepSpeed's ZeRO-3 in little: parameters that are whole only while their module is called.

It copies what DeepSpeed does to a model and to its calls (``deepspeed.runtime.zero``), none of how:

* between calls a parameter's data is empty, and each rank keeps a part of it; ``ds_id``,
  ``ds_shape`` and ``ds_tensor`` are on the parameter;
* hooks on every module gather its own parameters before its forward and its backward, and release
  them after it.  A module that is named a leaf is gathered with all that it contains, and the hooks
  are on it alone;
* a parameter of another module that is read in forward is gathered then and there, and belongs to
  the module that is being called from then on ("external").
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Zero3(nn.Module):
    """The engine around a model.  ``step`` is plain SGD."""

    def __init__(self, model: nn.Module, leaves: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.module = model
        self.external: set[str] = set()  # names of parameters that were read outside of their calls
        self.reads = False  # whether reading gathers: in forward
        self.called: list[nn.Module] = []
        self._gradients: dict[nn.Parameter, Tensor] = {}
        for number, (name, parameter) in enumerate(model.named_parameters()):
            parameter.ds_id, parameter.ds_shape, parameter.ds_name = number, parameter.shape, name
            self._partition(parameter)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._reduce)
        self._register(model, set(leaves))

    def forward(self, **batch):
        self.reads = True
        try:
            return self.module(**batch)
        finally:
            self.reads = False
            self.release_all()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return self._gradients[parameter]

    def step(self, learning_rate: float) -> None:
        self.release_all()
        for parameter, gradient in self._gradients.items():
            parameter.ds_tensor -= learning_rate * self._own(gradient)
            if parameter.numel() == gradient.numel():
                self._gather(parameter, anew=True)
        self._gradients.clear()

    def whole(self, parameter: nn.Parameter) -> Tensor:
        parts = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, parameter.ds_tensor)
        return torch.cat(parts)[: parameter.ds_shape.numel()].view(parameter.ds_shape)

    def release_all(self) -> None:
        for parameter in self.module.parameters():
            self._release(parameter)

    def _register(self, module: nn.Module, leaves: set[nn.Module]) -> None:
        module.ds_id, module.ds_external = 0, {}
        module._parameters = _Parameters(module._parameters, self)
        if module not in leaves:
            for child in module.children():
                self._register(child, leaves)
        recurse = module in leaves

        def parameters() -> Iterator[nn.Parameter]:
            yield from module.parameters(recurse=recurse)
            yield from module.ds_external.values()

        def gather(*_) -> None:
            for parameter in parameters():
                self._gather(parameter)

        def release(*_) -> None:
            for parameter in parameters():
                self._release(parameter)

        def before(module, inputs):
            self.called.append(module)
            gather()
            return _on_tensors(inputs, lambda x: _AtBackward.apply(x, release))

        def after(module, inputs, output):
            self.called.pop()
            release()
            return _on_tensors(output, lambda y: _AtBackward.apply(y, gather))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _own(self, tensor: Tensor) -> Tensor:
        """This rank's part of a whole tensor, filled up to the size of the others'."""
        size = dist.get_world_size()
        flat = torch.zeros(-(-tensor.numel() // size) * size)
        flat[: tensor.numel()] = tensor.detach().flatten()
        return flat.chunk(size)[dist.get_rank()].clone()

    def _partition(self, parameter: nn.Parameter) -> None:
        parameter.ds_tensor = self._own(parameter)
        self._release(parameter)

    def _gather(self, parameter: nn.Parameter, anew: bool = False) -> None:
        if anew or is_partitioned(parameter):
            parameter.data = self.whole(parameter)

    def _release(self, parameter: nn.Parameter) -> None:
        parameter.data = torch.empty(0)

    def _reduce(self, parameter: nn.Parameter) -> None:
        dist.all_reduce(parameter.grad)
        mean = parameter.grad / dist.get_world_size()
        self._gradients[parameter] = self._gradients.get(parameter, 0) + mean
        parameter.grad = None


def is_partitioned(parameter: nn.Parameter) -> bool:
    return parameter.shape != parameter.ds_shape


class _Parameters(dict):
    """A module's parameters by name; reading one in forward gathers it."""

    def __init__(self, parameters: dict[str, nn.Parameter], engine: Zero3) -> None:
        super().__init__(parameters)
        self.engine = engine

    def __getitem__(self, name: str) -> nn.Parameter:
        parameter = super().__getitem__(name)
        if parameter is not None and self.engine.reads and is_partitioned(parameter):
            self.engine.external.add(parameter.ds_name)
            self.engine.called[-1].ds_external[id(parameter)] = parameter
            self.engine._gather(parameter)
        return parameter


class _AtBackward(torch.autograd.Function):
    """Nothing, and ``act`` when the gradient comes back."""

    @staticmethod
    def forward(ctx, x, act):
        ctx.act = act
        return x.detach()

    @staticmethod
    def backward(ctx, dx):
        ctx.act()
        return dx, None


def _on_tensors(value, function):
    """``function`` of every tensor with a gradient in a hook's inputs or output."""
    if isinstance(value, Tensor):
        return function(value) if value.requires_grad else value
    if isinstance(value, tuple | list):
        return type(value)(_on_tensors(item, function) for item in value)
    return value
