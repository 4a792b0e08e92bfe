"""Contestants of rows with more than one layer: transformers' modules with PEFT's layers.

All contestants share the frozen tensors.  Each has its own adapters, with equal values.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

import fastlora

from .cases import PACKS, Case
from .contestants import Contestant, Maker, Tensors, lora_config, with_adapters

_VOCABULARY = 21760  # Qwen3's vocabulary, scaled from its 28 layers to 4
TARGETS = {
    "experts": {
        "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "mlp": {"target_modules": r"mlp\.\w+_proj"},
    "projections": {"target_modules": "all-linear"},
    "step": {"target_modules": r"model\..*_proj"},
}  # fmt: skip


def makers_for(case: Case) -> dict[str, Maker]:
    """A step has no "layer by layer", because another model would take too long."""
    apart = {"layer by layer": partial(_adapted, gated_mlps=False)} if case.block == "mlp" else {}
    fast = partial(_adapted, gated_mlps=True)
    if case.in_8_bits:
        apart, fast = {"peft, optimized": fast}, partial(fast, base="int8")
    elif case.kind in PACKS or case.block == "step":
        fast = _injected
    adapted = {"peft": _adapted, **apart, "fastlora": fast}
    return {"frozen": _frozen, **adapted}


def make_tensors(case: Case, device: torch.device) -> Tensors:
    torch.manual_seed(0)
    kinds = {"experts": Routed, "mlp": GatedMLP, "projections": Projections, "step": Step}
    base = kinds[case.block](case).requires_grad_(False).to(device, case.dtype)
    if case.kind in PACKS:
        from fastlora.formats.packing import pack_weight

        for weight in base.experts.parameters():
            weight.copy_(pack_weight(weight, case.kind).dense(weight.dtype))
    like = {"device": device, "dtype": case.dtype}
    x, *dys = (torch.randn(case.M, size, **like) for size in (case.K, *case.outputs))
    if isinstance(base, Step):
        x, dys = base.embedded(), [torch.ones((), device=device)]
    return Tensors(x.requires_grad_(), tuple(dys), (), {torch.float32: []}, base)


class Routed(nn.Module):
    """Qwen3-MoE's experts, with the choice of a router that trains."""

    def __init__(self, case: Case) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        self.config = config = Qwen3MoeConfig(
            hidden_size=case.K, moe_intermediate_size=case.inner, num_experts=case.experts
        )
        config._experts_implementation = "grouped_mm"  # transformers' default
        self.experts = Qwen3MoeExperts(config)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        weights, index = torch.randn(case.M, case.experts).softmax(-1).topk(case.top, -1)
        self.register_buffer("index", index)
        self.weights = nn.Parameter(weights / weights.sum(-1, keepdim=True))

    def double(self) -> "Routed":
        """The module in float64 for the oracle; torch's grouped_mm has no float64."""
        self.config._experts_implementation = "eager"
        return super().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.index, self.weights)


class GatedMLP(nn.Module):
    """The gated MLP of Qwen3."""

    def __init__(self, case: Case) -> None:
        from transformers import Qwen3Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

        super().__init__()
        self.mlp = Qwen3MLP(Qwen3Config(hidden_size=case.K, intermediate_size=case.inner))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Projections(nn.Module):
    """All seven projections of a Llama layer, without the operations between them.

    Each has its own leaf for x.  Otherwise autograd would sum every dx [M, K] on the CPU, and the
    host's time would contain arithmetic that a GPU does.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        *of_attention, _ = case.outputs
        self.attention = nn.ModuleList(nn.Linear(case.K, N, bias=False) for N in of_attention)
        self.block = GatedMLP(case)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for _ in self.attention]
        ys = [layer(leaf) for layer, leaf in zip(self.attention, leaves, strict=True)]
        return *ys, self.block(x)


class Step(nn.Module):
    """The loss of a Qwen3 or Llama for two rows of tokens, or for their embeddings."""

    def __init__(self, case: Case) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        is_llama = case.in_8_bits
        config = AutoConfig.for_model(
            "llama" if is_llama else "qwen3",
            vocab_size=99 if case.tiny else _VOCABULARY, hidden_size=case.K,
            intermediate_size=case.inner, num_hidden_layers=case.layers,
            num_attention_heads=32 if is_llama else 16, num_key_value_heads=8,
            head_dim=8 if case.tiny else 64 if is_llama else 128,
            tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        self.model = AutoModelForCausalLM.from_config(config)
        ids = torch.randint(0, config.vocab_size, (2, case.M // 2))
        self.register_buffer("ids", ids)
        self.from_x = True

    def embedded(self) -> Tensor:
        with torch.no_grad():
            return self.model.get_input_embeddings()(self.ids)

    def forward(self, x: Tensor) -> Tensor:
        given = {"inputs_embeds": x} if self.from_x else {"input_ids": self.ids}
        return self.model(**given, labels=self.ids).loss


def _frozen(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """The frozen block: gradients of x, and of the router's choice of experts."""
    module = _copy(tensors.base)
    if isinstance(module, Routed):
        module.weights.requires_grad_()
    return Contestant(module)


def _adapted(
    case: Case, tensors: Tensors, dropout: float, gated_mlps: bool | None = None,
    **options: object,
) -> Contestant:  # fmt: skip
    """PEFT's block, optimized with ``gated_mlps`` and the ``options``, if that isn't None."""
    import peft

    torch.manual_seed(1)
    config = lora_config(case, dropout, init_lora_weights=False, **TARGETS[case.block])
    model = peft.get_peft_model(_copy(tensors.base), config, autocast_adapter_dtype=case.mixed)
    module = model.base_model.model
    if gated_mlps is not None:
        fastlora.optimize(module, strict=True, gated_mlps=gated_mlps, **options)
    return _training(module)


def _injected(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """fastlora's block; packed experts are packed again, to the same values."""
    module = _copy(tensors.base)
    if case.kind in PACKS:
        fastlora.pack(module, case.kind, modules=["experts"])
    config = lora_config(case, dropout, **TARGETS[case.block])
    contestant = _training(with_adapters(module, config))
    theirs = _adapted(case, tensors, dropout).adapter
    for own, parameter in zip(contestant.adapter, theirs, strict=True):
        own.data.copy_(parameter)
    return contestant


def _training(module: nn.Module) -> Contestant:
    """A contestant with adapters.

    A step's backward ends at the first adapter.  A step trains and clips the gradients' norm.  The
    learning rate is 0, so all steps start from the same values.
    """
    module.train()
    if isinstance(module, Routed):
        module.weights.requires_grad_()
    if not isinstance(module, Step):
        return Contestant(module)
    module.from_x = False
    adapter = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=0.0)

    def finish() -> None:
        nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()

    return Contestant(module, finish=finish, needs_dx=False)


def _copy(base: nn.Module) -> nn.Module:
    """Another module with the same parameters."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
