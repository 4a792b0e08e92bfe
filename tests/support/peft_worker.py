"""The functions that a rank runs: the training of a tiny adapted Llama, and a record of it."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from unittest import mock

import peft
import torch
import torch.distributed as dist
from models import randomize, tiny_llama
from peft.tuners.lora import LoraLayer
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

import fastlora
from fastlora.backends import find_backend
from fastlora.layers.logits import LazyLogits
from fastlora.layers.report import LayerCoverage
from fastlora.peft.baseline import shared_masks

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
TARGETS = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}
ROWWISE = ("o_proj", "down_proj")
LAYERS, STEPS, LEARNING_RATE = 2 * len(TARGETS), 3, 1.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Record:
    """The results of a training.  Tensors are unsharded and have the unwrapped model's names."""

    losses: list[float]
    gradients: dict[str, Tensor]  # of the first step
    adapter: dict[str, Tensor]  # after the last step
    fast: int  # how many outputs the fast op computed
    inside: fastlora.Coverage  # coverage during the forward of the module around each layer
    coverage: fastlora.Coverage  # afterwards, between calls
    # the parameters that ZeRO-3 would gather because another module's call read them
    external: frozenset[str] = frozenset()


def base_model(**settings) -> nn.Module:
    """The same model with the same weights in every process."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48} | settings
    model = tiny_llama(**sizes, attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def peft_model(kind: str = "lora", dropout: float = 0.0) -> nn.Module:
    """Adapted layers of one kind, with the same weights in every process."""
    base = base_model()
    torch.manual_seed(2)
    settings = {"target_modules": list(TARGETS), "lora_dropout": dropout}
    kinds = {"use_dora": kind == "dora", "lora_bias": kind == "lora-bias"}
    config = peft.LoraConfig(r=4, lora_alpha=8, **kinds, **settings)
    model = peft.get_peft_model(base, config)
    if kind == "two-adapters":
        model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, **settings))
        model.base_model.set_adapter(["default", "second"])
    return randomize(model).train()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a PEFT model or of a plain one."""
    return model.get_decoder().layers


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def batch() -> Tensor:
    return torch.randint(0, 100, (4, 12), generator=torch.Generator().manual_seed(5))


def own_part() -> Tensor:
    """This rank's rows of the batch."""
    return batch().chunk(dist.get_world_size())[dist.get_rank()]


def error_of(call: Callable, *arguments, kind: type[Exception] = ValueError) -> str:
    """The text of the error of this kind that a call raises; if it raises none, of its result."""
    try:
        return str(call(*arguments))
    except kind as error:
        return str(error)


class Engine:
    """Takes a model's steps with plain SGD, and returns its unsharded tensors.

    Momentum or Adam would test nothing more, and would magnify the rounding error of small
    gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)

    def gradients(self) -> dict[str, Tensor]:
        return {name: whole(p.grad) for name, p in trained(self.model) if p.grad is not None}

    def adapter(self) -> dict[str, Tensor]:
        return {name: whole(p) for name, p in trained(self.model)}

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class FlatEngine(Engine):
    """FSDP1 keeps parameters as views of flat ones, so they are summoned first."""

    def gradients(self) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.model, with_grads=True):
            return super().gradients()

    def adapter(self) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.model):
            return super().adapter()


class Zero3Engine(Engine):
    def adapter(self) -> dict[str, Tensor]:
        with self.model.gathered():
            return super().adapter()

    def step(self) -> None:
        with self.model.gathered():
            super().step()


def train(
    model: nn.Module, parts: list[Tensor], engine: Callable[[nn.Module], Engine] = Engine
) -> Record:
    """Train a few steps on the mean loss of ``parts``, each from the same random state."""
    engine = engine(model)
    losses, gradients = [], {}
    with counted() as calls, covered(model) as inside:
        for _ in range(STEPS):
            total = 0.0
            for ids in parts:
                torch.manual_seed(100)
                loss = model(input_ids=ids, labels=ids).loss / len(parts)
                loss.backward()
                total += loss.item()
            losses.append(total)
            gradients = gradients or engine.gradients()
            engine.step()
    external = frozenset(getattr(model, "external", ()))
    coverages = fastlora.Coverage(tuple(inside.values())), fastlora.coverage(model)
    return Record(losses, gradients, engine.adapter(), len(calls), *coverages, external)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable parameters, by their names without the wrappers' prefixes."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield re.sub(r"^module\.|_(checkpoint|fsdp)_wrapped_module\.", "", name), parameter


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@contextmanager
def counted() -> Iterator[list[None]]:
    """Yields a list that gets one element for each output that the fast op computes."""
    calls, backend = [], find_backend(device=CPU)

    def forward(inputs, seeds, settings):
        calls.extend([None] * len(settings.layouts))
        return original(inputs, seeds, settings)

    original = backend.forward
    with mock.patch.object(backend, "forward", forward):
        yield calls


@contextmanager
def covered(model: nn.Module) -> Iterator[dict[str, LayerCoverage]]:
    """The coverage of every layer by name, while the module that contains it runs."""
    layers = {}

    def look(name: str, module: nn.Module, _) -> None:
        if not torch.compiler.is_compiling():
            for layer in fastlora.coverage(module).layers:
                layers[f"{name}.{layer.name}"] = layer

    parents = ((n, m) for n, m in model.named_modules() if isinstance(m, LlamaAttention | LlamaMLP))
    hooks = [m.register_forward_pre_hook(partial(look, name)) for name, m in parents]
    yield layers
    for hook in hooks:
        hook.remove()


def alone(parts: int = 1, kind: str = "lora", dropout: float = 0.0) -> Record:
    """PEFT's forward in one process on the whole batch, in one call or in equal parts."""
    model = peft_model(kind, dropout)
    with shared_masks(model):
        return train(model, list(batch().chunk(parts)))


Wrap = Callable[[nn.Module], nn.Module]


def adapted(when: str, wrap: Wrap, kind: str = "lora", dropout: float = 0.0) -> nn.Module:
    """The wrapped model, optimized "before" wrapping, "after" wrapping, or "never"."""
    model = peft_model(kind, dropout)
    if when == "before":
        fastlora.optimize(model)
    wrapped = wrap(model)
    if when == "after":
        fastlora.optimize(wrapped)
    return wrapped


def ddp(when: str, kind: str = "lora", dropout: float = 0.0, **settings) -> Record:
    model = adapted(when, lambda model: DistributedDataParallel(model, **settings), kind, dropout)
    return train(model, [own_part()])


def ddp_checked(broken: bool) -> tuple[bool, float]:
    """The result of ``check`` on a model whose gradients are views of DDP's buckets.

    Also returns how much ``check`` changed existing gradients.  ``broken``: use a wrong backward.
    """
    model = DistributedDataParallel(peft_model(), gradient_as_bucket_view=True)
    inputs, backend = {"input_ids": own_part(), "labels": own_part()}, find_backend(device=CPU)
    for _ in range(2):  # DDP rebuilds its buckets after the first backward
        model(**inputs).loss.backward()
    before = torch.cat([p.grad.flatten() for _, p in trained(model)])

    def backward(*arguments, **settings):
        return tree_map(lambda g: None if g is None else g * 1.5, original(*arguments, **settings))

    original = backend.backward
    with mock.patch.object(backend, "backward", backward) if broken else nullcontext():
        verdict = bool(fastlora.check(model, inputs))
    after = torch.cat([p.grad.flatten() for _, p in trained(model)])
    return verdict, (after - before).abs().max().item()


# The modules that are sharded by themselves, besides the decoder blocks and the model.
UNITS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "blocks": lambda model: [],
    "lora-layers": lora_layers,
    "base-layers": lambda model: [layer.base_layer for layer in lora_layers(model)],
    "adapters": lambda model: [
        part
        for layer in lora_layers(model)
        for half in (layer.lora_A, layer.lora_B)
        for part in half.values()
    ],
}


def shard(model: nn.Module, units: str = "blocks", **settings) -> nn.Module:
    for module in (*UNITS[units](model), *blocks(model), model):
        fully_shard(module, **settings)
    return model


def fsdp2(
    when: str, units: str = "blocks", kind: str = "lora", dropout: float = 0.0, **settings
) -> Record:
    model = adapted(when, partial(shard, units=units, **settings), kind, dropout)
    return train(model, [own_part()])


def fsdp2_checkpointed(when: str, how: str, dropout: float = 0.0) -> Record:
    def wrap(model: nn.Module) -> nn.Module:
        if how == "wrapper":
            check = lambda module: isinstance(module, LlamaDecoderLayer)  # noqa: E731
            apply_activation_checkpointing(model, check_fn=check)
        else:
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
            model.enable_input_require_grads()
        return shard(model)

    return train(adapted(when, wrap, "lora", dropout), [own_part()])


def fsdp2_from_meta(when: str) -> Record:
    """Build, optimize and shard a model on the meta device, then load its weights."""
    full = peft_model()
    with torch.device("meta"):
        model = adapted(when, shard)
    model.to_empty(device="cpu")
    whole_tensors = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, full.state_dict(), options=whole_tensors)
    # buffers that aren't in the state dict
    for buffer, value in zip(model.buffers(), full.buffers(), strict=True):
        buffer.copy_(value)
    return train(model, [own_part()])


def fsdp2_restored(when: str) -> tuple[int, Record, list[type]]:
    """``restore`` of a model with every LoRA layer sharded.

    Returns the number of fast calls before it, and after it a training and the bases of a layer's
    class.
    """
    model = adapted(when, partial(shard, units="lora-layers"))
    with counted() as calls:
        model(input_ids=own_part(), labels=own_part()).loss.backward()
    model.zero_grad()
    fastlora.restore(model)
    return len(calls), train(model, [own_part()]), list(type(lora_layers(model)[0]).__bases__)


def fsdp2_checked() -> str:
    """The text of ``check``'s result, or of its error."""
    ids = own_part()
    return error_of(fastlora.check, shard(peft_model()), {"input_ids": ids, "labels": ids})


def flat(model: nn.Module, units: str = "blocks") -> nn.Module:
    """Wrap with FSDP1: the decoder blocks as units, or more units by PEFT's policy."""
    by_block = ModuleWrapPolicy({LlamaDecoderLayer})
    policy = by_block if units == "blocks" else fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=CPU
    )


def fsdp1(when: str, units: str = "blocks") -> Record:
    return train(adapted(when, partial(flat, units=units)), [own_part()], engine=FlatEngine)


def zero3(when: str, leaves: bool = False) -> Record:
    def wrap(model: nn.Module) -> nn.Module:
        return Zero3(model, blocks(model) if leaves else ())

    return train(adapted(when, wrap), [own_part()], engine=Zero3Engine)


def torch_tensor_parallel(when: str) -> Record:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return train(adapted(when, partial(split, mesh=mesh)), [batch()])


def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split the projections by columns or rows, and of each adapter the half with that axis."""
    plan = {}
    for name, parent in TARGETS.items():
        style, half = (RowwiseParallel, "A") if name in ROWWISE else (ColwiseParallel, "B")
        layer = f"base_model.model.model.layers.*.{parent}.{name}"
        plan |= {f"{layer}.base_layer": style(), f"{layer}.lora_{half}.default": style()}
    return parallelize_module(model, mesh, plan)


def lazy_steps(wrap: str, loss: bool, **settings) -> tuple[list[float], dict[str, Tensor], bool]:
    """Two steps of a model with an adapter on its head.

    Returns the losses, the gradients of the last step, and whether logits were lazy.
    """
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(tiny_llama(hidden_size=32, intermediate_size=48), config)
    model = fastlora.optimize(randomize(model).train(), loss=loss)
    kinds = {"fsdp1": flat, "fsdp2": shard, "ddp": DistributedDataParallel}
    wrapped = kinds[wrap](model, **settings)
    ids, losses = own_part(), []
    for _ in range(2):
        wrapped.zero_grad()
        out = wrapped(input_ids=ids, labels=ids)
        # The model's own loss, and one outside of the wrapper.
        rows = out.logits[:, :-1].flatten(0, 1)
        loss = out.loss + functional.cross_entropy(rows, ids[:, 1:].flatten()).square()
        loss.backward()
        losses.append(float(loss.detach()))
    found = {} if wrap == "fsdp1" else {name: whole(p.grad) for name, p in trained(model)}
    return (
        losses,
        found,
        isinstance(out.logits, LazyLogits) and not out.logits.cell.call.is_computed,
    )


class Zero3(nn.Module):
    """A small imitation of DeepSpeed's ZeRO-3: parameters exist only during their module's call.

    It copies the effects that DeepSpeed (``deepspeed.runtime.zero``) has on a model and its calls,
    not its implementation:

    * Between calls, a parameter's data is empty.  Parameters and modules have a ``ds_id``.
    * Hooks on every module gather its own parameters before its forward and its backward, and
      release them after its forward.  A module in ``leaves`` is gathered with all its submodules,
      which have no hooks.
    * The names of parameters that a forward reads outside of their module's call are recorded,
      because DeepSpeed gathers each of them at once.
    """

    def __init__(self, model: nn.Module, leaves: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.module = model
        self.external: set[str] = set()
        self.reads = False  # whether reading an empty parameter is recorded: during forward
        for number, (name, parameter) in enumerate(model.named_parameters()):
            parameter.ds_id, parameter.ds_name, parameter.ds_whole = number, name, parameter.data
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_mean_over_ranks)
        self._register(model, set(leaves))
        _release(model.parameters())

    def forward(self, **batch):
        self.reads = True
        try:
            return self.module(**batch)
        finally:
            self.reads = False

    @contextmanager
    def gathered(self) -> Iterator[None]:
        _gather(self.module.parameters())
        yield
        _release(self.module.parameters())

    def _register(self, module: nn.Module, leaves: set[nn.Module]) -> None:
        module.ds_id = 0
        module._parameters = _Parameters(module._parameters, self)
        is_leaf = module in leaves
        for child in () if is_leaf else module.children():
            self._register(child, leaves)
        gather = lambda *_: _gather(module.parameters(is_leaf))  # noqa: E731
        release = lambda *_: _release(module.parameters(is_leaf))  # noqa: E731
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        module.register_full_backward_pre_hook(gather)


class _Parameters(dict):
    """A module's parameters by name, which record that an empty one is read."""

    def __init__(self, parameters: dict[str, nn.Parameter], engine: Zero3) -> None:
        super().__init__(parameters)
        self.engine = engine

    def __getitem__(self, name: str) -> nn.Parameter:
        parameter = super().__getitem__(name)
        if parameter is not None and self.engine.reads and not parameter.numel():
            self.engine.external.add(parameter.ds_name)
        return parameter


def _gather(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.ds_whole


def _release(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = torch.empty(0)


def _mean_over_ranks(parameter: nn.Parameter) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()
