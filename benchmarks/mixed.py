"""Who takes part where the rows of x belong to several adapters: sequences, one adapter each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastlora

from .cases import ADAPTERS, Case
from .contestants import SCALE, Contestant, Maker, Tensors, frozen, linears


class Mixed(nn.Module):
    """What ``run`` makes of x, cut into a sequence for each adapter, and of these parameters."""

    def __init__(self, run: Callable[[Tensor], Tensor], case: Case, tensors: Tensors) -> None:
        super().__init__()
        self.run, (self.weight,) = run, tensors.weights
        pairs = tensors.adapters[case.adapter_dtype]
        self.adapters = nn.ParameterList([each for pair in pairs for each in pair])

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.view(ADAPTERS, -1, x.shape[-1])).flatten(0, 1)


def makers() -> dict[str, Maker]:
    """By name; the frozen layer, on all rows at once, first, and fastlora last."""
    return {
        "frozen": frozen,
        "single calls": single_calls,
        "peft": peft_batch(),
        "peft, optimized": peft_batch(optimized=True),
        "fastlora": at_once,
    }


def at_once(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """``multi_lora_linear``."""
    pairs, scales = tensors.adapters[case.adapter_dtype], [SCALE] * ADAPTERS
    lora_a, lora_b = map(list, zip(*pairs, strict=True))
    mapping = fastlora.AdapterMapping(list(range(ADAPTERS)), ADAPTERS)

    def run(x: Tensor) -> Tensor:
        return fastlora.multi_lora_linear(
            x, tensors.weights[0], lora_a, lora_b, mapping, scales=scales, dropout=dropout
        )

    return Contestant(Mixed(run, case, tensors))


def single_calls(case: Case, tensors: Tensors, dropout: float) -> Contestant:
    """A call of ``lora_linear`` for each adapter."""
    pairs = tensors.adapters[case.adapter_dtype]

    def run(x: Tensor) -> Tensor:
        calls = zip(x.unbind(), pairs, strict=True)
        options = {"scale": SCALE, "dropout": dropout}
        return torch.stack(
            [
                fastlora.lora_linear(rows, tensors.weights[0], *pair, **options)
                for rows, pair in calls
            ]
        )

    return Contestant(Mixed(run, case, tensors), own_mask=True)


def peft_batch(optimized: bool = False) -> Maker:
    """PEFT's layer, called with ``adapter_names``; it loops over them.

    The layer itself may be called in training, where PEFT's model refuses.
    """

    def make(case: Case, tensors: Tensors, dropout: float) -> Contestant:
        import peft

        names = [f"adapter{i}" for i in range(ADAPTERS)]
        config = peft.LoraConfig(
            r=case.r, lora_alpha=SCALE * case.r, lora_dropout=dropout, target_modules=["0"]
        )
        base = nn.Sequential(*linears(tensors.weights))
        model = peft.get_peft_model(base, config, names[0], autocast_adapter_dtype=False).train()
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(names)
        if optimized:
            fastlora.optimize(model, strict=True)
        layer = model.base_model.model[0]
        pairs = tensors.adapters[case.adapter_dtype]
        for name, pair in zip(names, pairs, strict=True):
            layer.lora_A[name].weight, layer.lora_B[name].weight = pair

        def run(x: Tensor) -> Tensor:
            return layer(x, adapter_names=names)

        return Contestant(Mixed(run, case, tensors), own_mask=True)

    return make
