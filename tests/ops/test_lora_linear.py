"""lora_linear and lora_linears: every output and every gradient against the oracle."""

import pytest
import torch
from device import DEVICE
from judge import USUAL_DTYPES, check_against_oracle, make_projection
from pairs import pairwise

import fastlora
from fastlora import blocks

pytestmark = pytest.mark.usefixtures("backend", "poisoned_memory")

DTYPES = USUAL_DTYPES | {
    "f16": (torch.float16, torch.float16),
    "bf16-f16": (torch.bfloat16, torch.float16),
    "f32-bf16": (torch.float32, torch.bfloat16),
    "f32-f64": (torch.float32, torch.float64),
}
# A factor of 1 / 0.5 rounds nothing: 0.1 is the harder one.
DROPOUTS = [0.0, 0.1]
dropouts = pytest.mark.parametrize("p", DROPOUTS, ids="p{}".format)
BIAS = {"": False, "bias": True}
# Several tiles, the last ones cut: the interpreter's have 32 rows, a GPU's up to 128.
LARGE = (70, 67, 65) if DEVICE == "cpu" else (130, 67, 129)


def make_x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


SHAPES = [(1, 1, 1), (1, 17, 33), (33, 1, 7), (5, 3, 1), (64, 32, 48), LARGE]


@pairwise(
    {
        "m,n,k": {"-".join(map(str, shape)): shape for shape in SHAPES},
        "dtype,adapter_dtype": DTYPES,
        "p": DROPOUTS,
        "bias": BIAS,
    }
)
def test_shapes(m, n, k, dtype, adapter_dtype, p, bias):
    projection = make_projection(n, k, 8, dtype, adapter_dtype, bias)
    check_against_oracle(make_x(m, k, dtype=dtype), [projection], p)


@pairwise({"r": [1, 3, 16, 64, 200], "dtype,adapter_dtype": DTYPES, "p": DROPOUTS})
def test_ranks(r, dtype, adapter_dtype, p):
    projection = make_projection(29, 70, r, dtype, adapter_dtype)
    check_against_oracle(make_x(37, 70, dtype=dtype), [projection], p)


@dropouts
@pytest.mark.parametrize(
    "shape", [(7,), (5, 7), (2, 5, 7), (2, 3, 5, 7), (0, 7), (2, 0, 7), (0, 1), (0, 2)], ids=str
)
def test_leading_dimensions(shape, p):
    projection = make_projection(6, shape[-1], 3, torch.float32, bias=True)
    check_against_oracle(make_x(*shape), [projection], p)


STRIDES = {
    "transposed": lambda **kw: make_x(9, 8, **kw).T,
    "every-second-column": lambda **kw: make_x(8, 18, **kw)[:, ::2],
    "every-second-row": lambda **kw: make_x(16, 9, **kw)[::2],
    "permuted-3d": lambda **kw: make_x(9, 4, 5, **kw).permute(1, 2, 0),
    "expanded-rows": lambda **kw: make_x(1, 9, **kw).expand(8, 9),
    "expanded-columns": lambda **kw: make_x(8, 1, **kw).expand(8, 9),
    "negated": lambda **kw: torch._neg_view(make_x(8, 18, **kw)[:, ::2]),
    "every-second-feature-3d": lambda **kw: make_x(2, 3, 18, **kw)[..., 1::2],
}


@pairwise(
    {"make": STRIDES, "dtype": {"f32": torch.float32, "bf16": torch.bfloat16}, "p": [0.0, 0.1]}
)
def test_strided_x(make, dtype, p):
    x = make(dtype=dtype).detach().requires_grad_()
    assert not x.is_contiguous()
    check_against_oracle(x, [make_projection(6, 9, 3, dtype, bias=True)], p)


GROUPS = {"two": ((5, 3), (11, 8)), "three": ((16, 4), (8, 4), (1, 70))}


@pairwise({"dtype,adapter_dtype": DTYPES, "p": DROPOUTS, "sizes": GROUPS})
def test_groups(sizes, dtype, adapter_dtype, p):
    group = [
        make_projection(n, 21, r, dtype, adapter_dtype, bias=i % 2 == 0)
        for i, (n, r) in enumerate(sizes)
    ]
    check_against_oracle(make_x(2, 13, 21, dtype=dtype), group, p)


@dropouts
@pytest.mark.parametrize(
    ("name", "trains"),
    [("weight", True), ("x", False), ("lora_a", False), ("lora_b", False), ("bias", False)],
)
def test_a_tensor_that_trains_or_is_frozen(name, trains, p):
    x, projection = make_x(8, 9), make_projection(6, 9, 3, torch.float32, bias=True)
    (x if name == "x" else getattr(projection, name)).requires_grad_(trains)
    check_against_oracle(x, [projection], p)


def test_dropout_over_many_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_CPU_BLOCK", 64)
    first = make_projection(6, 9, 3, torch.bfloat16, torch.float32)
    group = [first, make_projection(4, 9, 2, torch.bfloat16)]
    check_against_oracle(make_x(50, 9, dtype=torch.bfloat16), group, 0.3)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    x = make_x(5, 7, dtype=torch.float64)
    projection = make_projection(4, 7, 3, torch.float64, bias=True)
    projection.weight.requires_grad_()

    def call(x, weight, lora_a, lora_b, bias):
        torch.manual_seed(3)  # the same mask for every evaluation
        return fastlora.lora_linear(x, weight, lora_a, lora_b, bias=bias, scale=0.6, dropout=p)

    assert torch.autograd.gradcheck(call, (x, *projection[:4]))


def test_output_that_the_loss_does_not_use():
    x, group = make_x(5, 7), [make_projection(4, 7, 3, torch.float32) for _ in range(3)]
    used = fastlora.lora_linears(x, group)[1]
    used.sum().backward()
    alone = x.grad.clone()
    x.grad = None
    fastlora.lora_linear(x, *group[1][:3], scale=group[1].scale).sum().backward()
    torch.testing.assert_close(alone, x.grad)
    assert group[0].lora_a.grad is None
    assert group[2].lora_b.grad is None


def test_output_may_be_changed_in_place():
    x, projection = make_x(2, 5, 7), make_projection(4, 7, 3, torch.float32)
    y = fastlora.lora_linear(x, *projection[:3], scale=projection.scale)
    y += 1
    y.mul_(2).sum().backward()
    changed = projection.lora_b.grad.clone()
    projection.lora_b.grad = None
    (2 * fastlora.lora_linear(x, *projection[:3], scale=projection.scale)).sum().backward()
    torch.testing.assert_close(changed, projection.lora_b.grad)


def test_same_inputs_same_bits():
    x = make_x(40, 33, dtype=torch.bfloat16)
    weight, lora_a, lora_b, *_ = make_projection(20, 33, 4, torch.bfloat16, torch.float32)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        y = fastlora.lora_linear(x, weight, lora_a, lora_b, scale=2.0, dropout=0.2)
        results.append((y, *torch.autograd.grad(y.sum(), (x, lora_a, lora_b))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("scale", "x", "lora_a", "exact"),
    [
        (1 + 2**-8, [1.0], [384.0], 386.0),  # bfloat16 would round the scale to 1
        (1.5, [1.0, 1.0], [256.0, 1.0], 386.0),  # … or the product to 256, before it is scaled
    ],
    ids=["scale", "product"],
)
def test_nothing_is_rounded_before_it_is_scaled(scale, x, lora_a, exact):
    x, lora_a = (torch.tensor([values], dtype=torch.bfloat16) for values in (x, lora_a))
    weight, lora_b = torch.zeros_like(x), torch.ones(1, 1, dtype=torch.bfloat16)
    assert fastlora.lora_linear(x, weight, lora_a, lora_b, scale=scale).item() == exact


def test_a_group_is_one_node():
    group = [make_projection(4, 7, 3, torch.float32) for _ in range(3)]
    assert len({y.grad_fn for y in fastlora.lora_linears(make_x(5, 7), group)}) == 1


def test_no_gradient_mode_keeps_no_graph():
    x, projection = make_x(5, 7), make_projection(4, 7, 3, torch.float32)
    with torch.no_grad():
        assert not fastlora.lora_linear(x, *projection[:3]).requires_grad
    with torch.inference_mode():
        assert fastlora.lora_linear(x, *projection[:3]).is_inference()


@pytest.mark.parametrize("p", [0.0, 0.3], ids="p{}".format)
def test_gradient_of_the_gradient(p):
    """Two layers, one with a second adapter, and one lora_a in two places."""
    x = make_x(2, 3, 7, dtype=torch.float64)
    first, more, last = (make_projection(4, 7, 3, torch.float64, bias=True) for _ in range(3))
    tensors = [x, first.lora_a, first.lora_b, first.bias, more.lora_b, last.lora_a, last.lora_b]

    def run(x, lora_a, lora_b, bias, more_b, last_a, last_b):
        torch.manual_seed(4)
        group = [
            first._replace(lora_a=lora_a, lora_b=lora_b, bias=bias),
            more._replace(weight=None, lora_a=lora_a, lora_b=more_b, bias=None),
            last._replace(lora_a=last_a, lora_b=last_b),
        ]
        return fastlora.lora_linears(x, group, dropout=p)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_gradient_of_the_gradient_of_an_output_that_the_loss_does_not_use():
    x, group = make_x(5, 7), [make_projection(4, 7, 3, torch.float32) for _ in range(2)]
    used = fastlora.lora_linears(x, group)[1]
    (dx,) = torch.autograd.grad(used.square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert group[0].lora_a.grad is None
    assert group[1].lora_a.grad is not None


@pairwise({"adapters": [(3,), (2, 1, 4), (6,)], "name": ["f64", "f32", "bf16-f32"], "p": DROPOUTS})
def test_several_adapters_of_one_layer(adapters, name, p):
    """A layer with 3 adapters is one output; in a group each layer has some of its own."""
    dtype, adapter_dtype = DTYPES[name]
    projections = []
    for layer, count in enumerate(adapters):
        for i in range(count):
            n, r = 19 + layer, 3 + 2 * i
            projection = make_projection(n, 21, r, dtype, adapter_dtype, bias=i == 0)
            projections.append(projection if i == 0 else projection._replace(weight=None))
    x = make_x(2, 17, 21, dtype=dtype)
    assert len(fastlora.lora_linears(x, projections)) == len(adapters)
    check_against_oracle(x, projections, p)
