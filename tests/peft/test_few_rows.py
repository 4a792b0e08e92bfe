"""Few rows on a CPU: dispatched to torch's operations, with the same dropout mask as more rows."""

import pytest
import torch
from models import counted_blocks, tiny_llama
from peft_models import adapted, optimized
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora

FEW = 32


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr("fastlora.ops.few_rows.MOST_ROWS", FEW)
    monkeypatch.setattr("fastlora.backends.products.FORCED", False)  # 16 bits are fast
    monkeypatch.setattr("fastlora.ops.kinds.calls", {})
    torch.compiler.reset()


def layer(**settings) -> nn.Module:
    model = adapted(
        nn.Sequential(nn.Linear(64, 12)), target_modules=["0"], lora_dropout=0.3, **settings
    )
    return optimized(model.train()).base_model.model[0]


def block() -> nn.Module:
    """A gated MLP: one node for many rows, three layers for few."""
    model = adapted(tiny_llama(), target_modules="all-linear", lora_dropout=0.3).train()
    return optimized(model).base_model.model.model.layers[0].mlp


MODULES = {
    "layer": layer,
    "bfloat16": lambda: layer().bfloat16(),
    "bfloat16-float32-adapter": lambda: base_of_16_bits(layer()),
    "two-adapters": lambda: layer(adapters=("a", "b")),
    "gated-mlp": block,
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def base_of_16_bits(layer: nn.Module) -> nn.Module:
    layer.base_layer.bfloat16()
    return layer


def rows(module: nn.Module, count: int) -> torch.Tensor:
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(1))
    return x.to(next(module.parameters()).dtype)


def output(module, x: torch.Tensor) -> torch.Tensor:
    """The output, computed from the same random state each time."""
    torch.manual_seed(3)
    return module(x)


def step(module, run, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and all gradients, computed from the same random state each time."""
    x = x.clone().requires_grad_()
    y = output(run, x)
    y.square().sum().backward()
    found = [y, x.grad, *[p.grad for p in module.parameters() if p.requires_grad]]
    module.zero_grad()
    return found


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Equal up to rounding; another dropout mask would change most elements."""
    tolerance = 0.02 if found[0].dtype == torch.bfloat16 else 1e-5
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@every_module
def test_a_row_more_drops_the_same_elements_of_the_others(make):
    module = make()
    x = rows(module, FEW + 1)
    few, many = output(module, x[:FEW]), output(module, x)[:FEW]
    assert_close([few], [many])


COMPILED = [("two-adapters", FEW, "aot_eager"), ("gated-mlp", FEW + 1, "aot_eager")]
COMPILED += [("layer", FEW, "inductor")]  # the other modules use the same op


@pytest.mark.parametrize(("name", "count", "compiler"), COMPILED)
def test_a_compiled_call_drops_the_same_elements(name, count, compiler):
    """Inductor draws random numbers differently, except the seeds."""
    module = MODULES[name]()
    x, compiled = rows(module, count), torch.compile(module, backend=compiler, fullgraph=True)
    assert_close(step(module, compiled, x), step(module, module, x))


@every_module
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_drops_the_same_again(make, reentrant):
    module = make()
    x = rows(module, 8)
    again = lambda x: checkpoint(module, x, use_reentrant=reentrant)  # noqa: E731
    assert all(map(torch.equal, step(module, again, x), step(module, module, x)))


def test_check_gives_peft_the_same_masks():
    model = adapted(tiny_llama(), target_modules="all-linear", lora_dropout=0.3).train()
    ids = torch.randint(0, 100, (2, FEW // 2))
    assert fastlora.check(model, {"input_ids": ids, "labels": ids})


def test_a_gated_mlp_of_few_rows_goes_layer_by_layer():
    module = block()
    for count, blocks in ((FEW, 0), (FEW + 1, 1)):
        with counted_blocks() as calls:
            module(rows(module, count))
        assert len(calls) == blocks
