"""linear_cross_entropy and token_logprobs: values and all gradients against the formula in float64.

Chunks of few rows make every call sum over several of them.
"""

import itertools

import oracles
import pytest
import torch
from models import assert_near
from packed import random_four_bit, random_int8, random_rotated_int8
from torch import Tensor
from torch.nn import functional

import fastlora
from fastlora.backends import loss as of_backend
from fastlora.backends import loss_of_rows as row_loss_module
from fastlora.backends import products
from fastlora.backends.dropout import dropout_mask

M, K, V, R = 27, 12, 37, 3
SETTINGS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.5},
    "z-loss": {"z_loss": 0.01},
    "all": {"label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 2.0, "z_loss": 0.01},
}
TRAINED = {
    "x": "x",
    "adapter": ("x", "lora_a", "lora_b"),
    "only-lora_b": ("lora_b",),
    "head": ("x", "weight", "bias"),
    "everything": ("x", "weight", "bias", "lora_a", "lora_b"),
}


def tensors(dtype=torch.float64, trained=(), adapter: bool = True) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {"x": (3, M // 3, K), "weight": (V, K), "bias": (V,)}
    shapes |= {"lora_a": (R, K), "lora_b": (V, R)} if adapter else {}
    made = {n: torch.randn(s, generator=draw, dtype=torch.float64) / 2 for n, s in shapes.items()}
    return {name: t.to(dtype).requires_grad_(name in trained) for name, t in made.items()}


def target_of(ignored: str = "some") -> Tensor:
    target = torch.arange(M).mul(7).remainder(V).view(3, -1)
    if ignored != "none":
        target[:, :: 1 if ignored == "all" else 2] = -100
    return target


def formula(
    x, weight, target, *, bias=None, lora_a=None, lora_b=None, scale=1.0, mask=None, p=0.0,
    label_smoothing=0.0, reduction="mean", softcap=None, logit_scale=1.0, z_loss=0.0,
):  # fmt: skip
    z = x @ weight.T if bias is None else x @ weight.T + bias
    if lora_a is not None:
        dropped = x if mask is None else x * mask / (1.0 - p)
        z = z + scale * (dropped @ lora_a.T) @ lora_b.T
    counts, settings = target != -100, (label_smoothing, softcap, logit_scale, z_loss)
    loss = torch.where(counts, oracles.row_losses(z, target.clamp(min=0), settings), 0.0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / counts.sum()}[reduction]


def compare(found: Tensor, truth: Tensor, given: dict[str, Tensor], tolerance: float) -> None:
    """The values, and the gradients of the trained tensors for a random upstream gradient."""
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).double()
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    pairs = [(found, truth)]
    if leaves:
        ours = torch.autograd.grad(found, leaves, upstream.to(found.dtype))
        pairs += zip(ours, torch.autograd.grad(truth, leaves, upstream), strict=True)
    for one, other in pairs:
        assert one.shape == other.shape
        most = tolerance * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=most)


@pytest.fixture(params=[7, 16, M], ids=lambda rows: f"chunks-of-{rows}")
def chunked(request, monkeypatch):
    monkeypatch.setattr(of_backend, "_CHUNK_ON_CPU", request.param * V * 8)
    monkeypatch.setattr(of_backend, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(row_loss_module, "_BLOCK", 5 * V * 8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_values_and_gradients_in_float64(settings, reduction, chunked):
    for trained, ignored in itertools.product(TRAINED.values(), ("none", "some")):
        given, target = tensors(trained=trained), target_of(ignored)
        rest = settings | {"reduction": reduction}
        found = fastlora.linear_cross_entropy(target=target, scale=0.7, **given, **rest)
        compare(found, formula(target=target, scale=0.7, **given, **rest), given, 1e-13)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dropout_drops_rows_of_x_by_fastlora_s_mask(reduction, chunked):
    given, target, p = tensors(trained=TRAINED["everything"]), target_of(), 0.4
    torch.manual_seed(5)
    found = fastlora.linear_cross_entropy(
        target=target, scale=0.7, dropout=p, reduction=reduction, **given
    )
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    kept = dropout_mask(seed, (M, K), p).view(3, -1, K)
    mask = kept.double()
    truth = formula(target=target, scale=0.7, mask=mask, p=p, reduction=reduction, **given)
    compare(found, truth, given, 1e-13)
    evaluated = fastlora.linear_cross_entropy(
        target=target, scale=0.7, dropout=p, training=False, **given
    )
    torch.testing.assert_close(evaluated, formula(target=target, scale=0.7, **given))


def test_without_a_row_that_counts():
    given, target = tensors(trained=TRAINED["everything"]), target_of("all")
    mean = fastlora.linear_cross_entropy(target=target, **given)
    total = fastlora.linear_cross_entropy(target=target, reduction="sum", **given)
    assert mean.isnan()
    assert total == 0
    for loss in (mean, total):
        assert not any(each.any() for each in torch.autograd.grad(loss, [*given.values()]))


@pytest.mark.parametrize("wide", [False, True], ids=["16-bit products", "float32 products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_as_exact_as_the_standard_loss(dtype, wide, monkeypatch):
    monkeypatch.setattr(products, "FORCED", wide)
    monkeypatch.setattr(of_backend, "_CHUNK_ON_CPU", 64 * 640 * 2)
    draw = torch.Generator().manual_seed(3)
    shapes = {"x": (256, 64), "weight": (640, 64), "lora_a": (4, 64), "lora_b": (640, 4)}
    given = {n: torch.randn(s, generator=draw) / s[-1] ** 0.5 for n, s in shapes.items()}
    given = {n: t if "lora" in n else t.to(dtype) for n, t in given.items()}  # as PEFT has them
    for name in ("x", "lora_a", "lora_b"):
        given[name].requires_grad_()
    target = torch.randint(0, 640, (256,), generator=draw)
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in given.items()}
    truth = formula(target=target, **exact)
    logits = fastlora.lora_linear(**given)
    standard = functional.cross_entropy(logits.float(), target)
    found = fastlora.linear_cross_entropy(target=target, **given)
    assert found.dtype == torch.float32
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    exact_leaves = [tensor for tensor in exact.values() if tensor.requires_grad]
    true = torch.autograd.grad(truth, exact_leaves)
    for one, other, right in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(standard, leaves), true, strict=True
    ):
        assert one.dtype == other.dtype
        errors = [(gradient.double() - right).norm() / right.norm() for gradient in (one, other)]
        assert errors[0] <= 1.1 * errors[1] + 1e-4, errors


@pytest.mark.parametrize("make", [random_four_bit, random_int8, random_rotated_int8])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_packed_head(make, p):
    """The result equals that with the dense weight."""
    sizes = (5, 64), (4, 64), (24, 4)
    x, a, b = leaves = [torch.randn(size).div(8).requires_grad_() for size in sizes]
    weight, found = make(24, 64), []
    for each in (weight, weight.dense(x.dtype)):
        torch.manual_seed(1)
        how = {"lora_a": a, "lora_b": b, "dropout": p}
        loss = fastlora.linear_cross_entropy(x, each, torch.arange(5), **how)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    assert_near(*found, 0.03 if make is random_rotated_int8 else 1e-5)  # x is rounded also


def test_token_logprobs_need_no_product_in_the_backward(monkeypatch):
    given, target = tensors(trained=("x",), adapter=False), target_of()
    found = fastlora.token_logprobs(target=target, **given)
    monkeypatch.setattr(of_backend, "forward_rows", None)  # a product would fail
    compare(found, -formula(target=target, reduction="none", **given), given, 1e-13)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("trained", [("x",), ("x", "weight")], ids=["frozen", "trained"])
def test_an_upstream_gradient_of_an_ignored_row_does_not_count(number, trained):
    """As a focal loss has it: the logarithm of an ignored row's zero."""
    given, target = tensors(trained=trained, adapter=False), target_of()
    upstream = torch.where(target == -100, number, 1.0)
    found = fastlora.token_logprobs(target=target, **given)
    dx = torch.autograd.grad(found, given["x"], upstream, retain_graph=True)
    expected = torch.autograd.grad(found, given["x"], torch.ones_like(upstream))
    torch.testing.assert_close(dx, expected, rtol=0, atol=0)


def test_it_saves_gradients_only():
    given, saved = tensors(trained=("x", "lora_a", "lora_b")), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastlora.linear_cross_entropy(target=target_of(), **given)
    counted = int((target_of() != -100).sum())
    assert sorted(t.numel() for t in saved) == sorted([counted * K, R * K, V * R])


def test_autocast_casts_x_and_the_weight():
    given, target = tensors(torch.float32, trained=("x", "lora_b")), target_of()
    with torch.autocast("cpu", torch.bfloat16):
        found = fastlora.linear_cross_entropy(target=target, **given)
    cast = {n: t.bfloat16() if n in ("x", "weight") else t for n, t in given.items()}
    assert found == fastlora.linear_cross_entropy(target=target, **cast)
    found.backward()
    assert given["x"].grad.dtype == given["lora_b"].grad.dtype == torch.float32


def test_transforms_and_compilation_run_torch_s_operations():
    given, target = tensors(torch.float32, adapter=False), target_of()
    plain = fastlora.linear_cross_entropy(target=target, z_loss=0.1, **given)
    run = lambda x: fastlora.linear_cross_entropy(  # noqa: E731
        x, given["weight"], target, bias=given["bias"], z_loss=0.1
    )
    torch.testing.assert_close(
        torch.compile(run, backend="eager", fullgraph=True)(given["x"]), plain
    )
    tangent = torch.func.jvp(run, (given["x"],), (torch.ones_like(given["x"]),))
    torch.testing.assert_close(tangent[0], plain)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tensors_without_numbers_pass_through(reduction):
    given = {name: tensor.to("meta") for name, tensor in tensors(torch.float32).items()}
    target = target_of().to("meta")
    loss = fastlora.linear_cross_entropy(target=target, reduction=reduction, **given)
    assert loss.is_meta
    assert loss.shape == (target.shape if reduction == "none" else ())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [("x",), ("x", "lora_a")], ids=["dx", "all"])
def test_gradients_of_gradients_are_an_error(reduction, trained):
    given = tensors(trained=trained)
    loss = fastlora.linear_cross_entropy(target=target_of(), reduction=reduction, **given).sum()
    with pytest.raises(RuntimeError, match="compute the logits and their loss"):
        torch.autograd.grad(loss, given["x"], create_graph=True)


X, W, T = torch.randn(4, K), torch.randn(V, K), torch.arange(4)
WRONG = {
    "target-dtype": ({"target": T.int()}, TypeError, r"target has dtype torch.int32.*target.long"),
    "target-shape": ({"target": T[:3]}, ValueError, r"target must be \[4\], a class for each row"),
    "class": ({"target": T + V}, ValueError, f"target has the class {V + 3}, but the classes are"),
    "negative": ({"target": T - 1}, ValueError, r"target has the class -1, but the classes are 0"),
    "half-adapter": ({"lora_a": W[:2]}, ValueError, "lora_b is None, but an adapter has both"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction is 'max', but must be one of"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing is 1.5.*\[0, 1\]"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap is 0.0, but must be positive, or None"),
    "scale": (
        {"logit_scale": float("nan")},
        ValueError,
        "logit_scale is nan, but must be a finite",
    ),
    "ignore": (
        {"ignore_index": 1.0},
        ValueError,
        "ignore_index is 1.0, but must be a whole number",
    ),
    "weight": ({"weight": W[:, :5]}, ValueError, r"weight must be \[out_features, 12\]"),
    "no-tensor": ({"target": [1]}, TypeError, "target must be a tensor, not list"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(change, error, message):
    with pytest.raises(error, match=message):
        fastlora.linear_cross_entropy(**{"x": X, "weight": W, "target": T} | change)


def test_rows_of_any_layout():
    given, target = tensors(trained=("x",), adapter=False), target_of()
    strided = given["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    found = fastlora.linear_cross_entropy(target=target, **given | {"x": strided})
    assert found == fastlora.linear_cross_entropy(target=target, **given)
    one = fastlora.linear_cross_entropy(given["x"][0, 0], given["weight"], target[0, 1])
    assert one.shape == ()
    by_torch, _ = torch.func.vjp(
        lambda x: fastlora.linear_cross_entropy(x, given["weight"], target[0, 1]), given["x"][0, 0]
    )
    torch.testing.assert_close(by_torch, one)
    assert fastlora.linear_cross_entropy(X[:0], W, T[:0], reduction="sum") == 0
