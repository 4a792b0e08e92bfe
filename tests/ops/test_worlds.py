"""Every kind of call under torch's features: autocast, checkpointing, compilers, transforms, …

The files of each kind test numbers; this file tests the environment of a call.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from call_kinds import ENDS, KINDS, ROWS, K, made
from judge import saved_bytes
from marks import DEVICE
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy as Policy
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastlora
from fastlora.backends import find_backend

pytestmark = pytest.mark.usefixtures("backend")
BF16, F16 = torch.bfloat16, torch.float16
every_kind = pytest.mark.parametrize("name", KINDS)


def on_backends(torch=tuple(KINDS), triton=(), **more: list) -> pytest.MarkDecorator:
    """Parametrize over the kinds for each backend; ``more``'s values are assigned in turn."""
    rows = [("torch", name) for name in torch] + [("triton", name) for name in triton]
    rows = [
        (*row, *(values[i % len(values)] for values in more.values())) for i, row in enumerate(rows)
    ]
    ids = ["-".join(map(str, row)) for row in rows]
    return pytest.mark.parametrize(("backend", "name", *more), rows, ids=ids, indirect=["backend"])


# The kinds that differ in dispatch: several outputs, segments of rows, a bank, packed weights.
WAYS = ("group", "bank", "packed_experts")
every_way = on_backends(triton=WAYS)
dropping_or_not = on_backends(triton=WAYS, p=[0.4, 0.0])
# Kinds that have gradients of gradients.
TWICE = ("layer", "group", "packed")
twice = on_backends(TWICE, ("group",))
# Where the backend is called by the registered op or not at all, one kind is enough.
one_by_triton = on_backends(triton=("bank",))
on_torch = pytest.mark.parametrize("backend", ["torch"], indirect=True)
by_torch_alone = on_backends()


def leaves_of(kind) -> list[torch.Tensor]:
    return [tensor for tensor in kind.tensors.values() if tensor.requires_grad]


def run(kind, p: float = 0.0, seed: int = 3, around=lambda call, *tensors: call(*tensors)):
    """y, and the gradient of each trainable tensor."""
    torch.manual_seed(seed)
    y = around(lambda *tensors: kind.call(*tensors, dropout=p), *kind.tensors.values())
    found = torch.autograd.grad(y.float().square().sum(), leaves_of(kind), allow_unused=True)
    return [y, *(torch.zeros(()) if gradient is None else gradient for gradient in found)]


def assert_same(first, second) -> None:
    assert all(map(torch.equal, first, second))


@every_way
def test_autocast_changes_neither_float64_nor_the_backward_of_an_outer_call(name):
    wide, kind = made(name, torch.float64), made(name)
    outside, y = run(kind), kind.call(*kind.tensors.values())
    options = {"allow_unused": True, "retain_graph": True}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert wide.call(*wide.tensors.values()).dtype == torch.float64
        for more in ({}, {"create_graph": True})[: 1 + (name in TWICE)]:
            dy = (2 * y).detach()
            found = torch.autograd.grad(y, leaves_of(kind), dy, **options, **more)
            for before, after in zip(outside[1:], found, strict=True):
                if after is not None:
                    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)


def keep_products(context, op, *args, **kwargs):
    kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return Policy.MUST_SAVE if kept else Policy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "plain": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": lambda: create_selective_checkpoint_contexts(keep_products),
    },
}


@on_backends(tuple(KINDS) * 3, WAYS, how=list(CHECKPOINTS))
def test_checkpointing_replays_the_mask(name, how):
    kind, settings = made(name), CHECKPOINTS[how]
    found = []
    for around in (lambda call, *t: call(*t), lambda call, *t: checkpoint(call, *t, **settings)):
        torch.manual_seed(3)
        for leaf in leaves_of(kind):
            leaf.grad = None
        around(
            lambda *t: kind.call(*t, dropout=0.4), *kind.tensors.values()
        ).square().sum().backward()
        found.append([leaf.grad for leaf in leaves_of(kind)])
    assert_same(*found)


class Seen(TorchDispatchMode):
    """Records the arguments of fastlora's registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fastlora.lora_linears.default:
            self.forward.append(args)
        if func is torch.ops.fastlora.lora_linears_backward.default:
            self.backward.append(args)
        return func(*args, **(kwargs or {}))


@dropping_or_not
def test_the_registered_op(backend, name, p):
    """A dispatch mode sees the op; its bits are the node's; torch's opcheck passes."""
    kind = made(name)
    with Seen() as seen:
        by_op = run(kind, p)
    assert_same(run(kind, p), by_op)
    ((x, tensors, *rest),), (backward,) = seen.forward, seen.backward
    follow = lambda t: t.detach().requires_grad_(t.is_floating_point())  # noqa: E731
    packed = name.startswith("packed")
    arguments = follow(x), [t.detach() if packed else follow(t) for t in tensors], *rest
    # The other checks concern only the op, not the backend.
    looks = ("test_schema", "test_faketensor")
    looks += ("test_autograd_registration", "test_aot_dispatch_dynamic") * (backend == "torch")
    opcheck = partial(torch.library.opcheck, test_utils=looks)
    opcheck(torch.ops.fastlora.lora_linears.default, arguments)
    backward = tree_map_only(torch.Tensor, torch.Tensor.detach, backward)
    opcheck(torch.ops.fastlora.lora_linears_backward.default, backward)


def assert_compiled_is_the_same(name, compiler):
    torch.compiler.reset()
    kind = made(name, torch.bfloat16, torch.float32)
    compiled = torch.compile(kind.call, fullgraph=True, backend=compiler)
    ours, theirs = (run(kind._replace(call=call)) for call in (compiled, kind.call))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@one_by_triton
def test_compiled_whole(name):
    assert_compiled_is_the_same(name, "aot_eager")


@on_backends(["group", "bank"])  # the other kinds use the same op, with fewer arguments
def test_compiled_by_inductor(name):
    assert_compiled_is_the_same(name, "inductor")


@on_torch
def test_one_graph_for_all_numbers_of_rows():
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    kind = made("experts")
    _, *others = kind.tensors.values()
    compiled = torch.compile(kind.call, fullgraph=True, backend="aot_eager", dynamic=True)
    for ends in ([4, 4, 10], [9, 14, 16], [0, 1, 21]):
        offsets = torch.tensor(ends, dtype=torch.int32)
        x = torch.randn(ends[-1] + 1, K)
        torch.testing.assert_close(*(c(x, *others, offsets=offsets) for c in (compiled, kind.call)))
    assert graphs["unique_graphs"] == 1


@on_backends(TWICE * 2, ("group",), p=[0.4, 0.4, 0.4, 0.0, 0.0, 0.0])
def test_gradients_of_gradients(name, p):
    kind = made(name, torch.float64)
    leaves = {n: t for n, t in kind.tensors.items() if t.requires_grad and n != "x"}
    names, x = list(leaves), kind.tensors["x"].detach()[..., :].requires_grad_()

    def call(x, *own):
        torch.manual_seed(4)
        return kind.call(*(kind.tensors | {"x": x} | dict(zip(names, own, strict=True))).values(),
                         dropout=p)  # fmt: skip

    y = call(x, *leaves.values())
    v = [torch.randn_like(t) for t in (x, *leaves.values())]
    first = torch.autograd.grad(y.square().sum(), (x, *leaves.values()), create_graph=True)
    dot = sum((g * each).sum() for g, each in zip(first, v, strict=True))
    second = torch.autograd.grad(dot, (x, *leaves.values()), allow_unused=True)
    step = 1e-5  # a numerical second derivative, from differences of first gradients
    moved = []
    for sign in (1, -1):
        at = [(t + sign * step * each).detach().requires_grad_() for t, each in
              zip((x, *leaves.values()), v, strict=True)]  # fmt: skip
        moved.append(torch.autograd.grad(call(*at).square().sum(), at))
    for found, plus, minus in zip(second, *moved, strict=True):
        expected = (plus - minus) / (2 * step)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("how", [{"create_graph": True}, {"is_grads_batched": True}], ids=str)
@on_backends(("experts", "bank", "adapters", "packed_experts"), ("bank",))
def test_experts_and_many_adapters_have_neither_second_order_nor_batched_gradients(name, how):
    kind = made(name)
    y = kind.call(*kind.tensors.values())
    dy = torch.ones(2, *y.shape) if "is_grads_batched" in how else torch.ones_like(y)
    with pytest.raises(RuntimeError, match=r"call fastlora\.lora_linear for each"):
        torch.autograd.grad(y, kind.tensors["x"], dy, **how)


@twice
def test_many_gradients_at_once(name):
    kind = made(name)
    y, leaves = kind.call(*kind.tensors.values()), leaves_of(kind)
    dys = torch.randn(3, *y.shape)
    options = {"retain_graph": True, "allow_unused": True}
    at_once = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, **options)
    for i, dy in enumerate(dys):
        for many, one in zip(at_once, torch.autograd.grad(y, leaves, dy, **options), strict=True):
            expected = torch.zeros_like(many[i]) if one is None else one
            torch.testing.assert_close(many[i], expected, rtol=1e-4, atol=1e-4)


def transforms(kind):
    tensors = [tensor.detach() for tensor in kind.tensors.values()]
    x, *others = tensors
    last = others[-1]

    def loss(run):
        return lambda *t: run(*t).square().sum()

    return {
        "grad": lambda run: grad(loss(run), argnums=tuple(range(len(tensors))))(*tensors),
        "grad-of-grad": lambda run: grad(lambda x: grad(loss(run))(x, *others).square().sum())(x),
        "jvp": lambda run: jvp(run, tuple(tensors), tuple(tensors)),
        "vmap-of-x": lambda run: vmap(lambda x: run(x, *others))(torch.stack([x, 2 * x])),
        "vmap-of-a-tensor": lambda run: vmap(lambda t: grad(loss(run))(x, *others[:-1], t))(
            torch.stack([last, 2 * last])
        ),
    }


@by_torch_alone
@pytest.mark.parametrize("transform", transforms(made("layer")))
def test_transforms_of_torch_func(name, transform):
    kind = made(name, torch.float64)
    apply = transforms(kind)[transform]
    torch.testing.assert_close(apply(kind.call), apply(kind.truth))


@by_torch_alone
def test_a_transform_under_autocast(name):
    kind = made(name)
    tensors = [tensor.detach() for tensor in kind.tensors.values()]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = grad(lambda *t: kind.call(*t).float().square().sum())(*tensors)
    expected = grad(lambda *t: kind.truth(*t).square().sum())(*tensors)
    assert (found - expected).norm() < 0.03 * expected.norm()


class Module(torch.nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.call = kind.call
        _, *others = kind.tensors.items()
        for name, tensor in others:
            self.register_parameter(name, torch.nn.Parameter(tensor.detach()))

    def forward(self, x):
        return self.call(x, *self._parameters.values())


@one_by_triton
def test_export(name):
    kind = made(name)
    module, x = Module(kind), kind.tensors["x"].detach()
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(2 * x), module(2 * x))


@every_way
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_tensors_without_numbers_pass_through(name, where):
    from torch._subclasses.fake_tensor import FakeTensorMode

    if where == "meta" and name in ("bank", "adapters", "packed", "packed_experts"):
        pytest.skip("indices and packed tensors can't be on the meta device")
    kind = made(name)
    shape = kind.call(*kind.tensors.values()).shape
    with FakeTensorMode(allow_non_fake_inputs=True) if where == "fake" else nullcontext():
        tensors = [torch.empty_like(t, device="meta" if where == "meta" else None)
                   for t in kind.tensors.values()]  # fmt: skip
        options = {"offsets": ENDS.to("meta")} if where == "meta" and name == "experts" else {}
        assert kind.call(*tensors, dropout=0.4, **options).shape == shape


@every_kind
def test_evaluation_drops_and_draws_nothing(name):
    kind = made(name)
    state = torch.get_rng_state()
    y = kind.call(*kind.tensors.values(), dropout=0.5, training=False)
    assert torch.equal(y, kind.call(*kind.tensors.values()))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(kind.call(*kind.tensors.values(), dropout=0.5), y)


@dropping_or_not
def test_a_second_backward_gives_the_same_gradients(name, p):
    """Also, the output may be changed in place."""
    kind = made(name)
    y, leaves = kind.call(*kind.tensors.values(), dropout=p), leaves_of(kind)
    options = {"retain_graph": True, "allow_unused": True}
    first, second = (torch.autograd.grad(y.sum(), leaves, **options) for _ in range(2))
    y += 1
    third = torch.autograd.grad(y.mul_(2).sum(), leaves, **options)
    for one, other, twice in zip(first, second, third, strict=True):
        if one is not None:
            assert torch.equal(one, other)
            torch.testing.assert_close(2 * one, twice, rtol=1e-5, atol=1e-4)  # the strides differ


@dropping_or_not
def test_x_h_and_seeds_are_saved_only_if_the_backward_reads_them(name, p):
    kind = made(name, torch.bfloat16, torch.float32)
    dtype = find_backend().h_dtype(torch.bfloat16, kind.tensors["x"].device)
    h = ROWS * sum(kind.ranks) * dtype.itemsize
    parameters = [*list(kind.tensors.values())[1:], *kind.others]
    expected = {"": kind.tensors["x"].nbytes + h, "a": h, "b": 0}
    for frozen, size in expected.items():
        for n, tensor in kind.tensors.items():
            if frozen and n.startswith(frozen) and n != "bias":
                tensor.requires_grad_(False)
        kept = saved_bytes(lambda: kind.call(*kind.tensors.values(), dropout=p), parameters)
        assert sum(kept.values()) == size + (8 * kind.seeds if p else 0), frozen


@twice
def test_a_gradient_of_dx_is_an_error_if_x_is_not_saved(name):
    """With lora_a and weight frozen, lora_b's gradient doesn't read x, so x isn't saved."""
    kind = made(name)
    for n, tensor in kind.tensors.items():
        tensor.requires_grad_(tensor.requires_grad and not n.startswith("a"))
    y = kind.call(*kind.tensors.values())
    with pytest.raises(RuntimeError, match="let lora_a require gradients"):
        torch.autograd.grad(y.square().sum(), kind.tensors["x"], create_graph=True)


@on_torch
def test_an_unknown_backend_is_an_error_when_compiled():
    torch.compiler.reset()
    kind = made("layer")
    compiled = torch.compile(lambda *t: kind.call(*t, backend="metal"), backend="aot_eager")
    with pytest.raises(ValueError, match="backend 'metal'"):
        compiled(*kind.tensors.values())


@on_torch
def test_other_scales_ranks_and_indices_recompile_nothing():
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    _, weight, a, b, bias = (tensor.detach() for tensor in made("bank").tensors.values())

    def call(x, indices, scales, ranks):
        options = {"bias": bias, "scales": scales, "ranks": ranks}
        return fastlora.multi_lora_linear(x, weight, a, b, indices, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for i in range(3):
        indices = torch.randint(-1, 3, (ROWS,)).to(torch.int32)
        arguments = (
            torch.randn(ROWS, K),
            indices,
            torch.rand(3),
            torch.tensor([2, 4 + i % 2, 1 + i]),
        )
        torch.testing.assert_close(compiled(*arguments), call(*arguments))
    assert graphs["unique_graphs"] == 1
    with pytest.raises(ValueError, match="beyond the adapters"):
        compiled(arguments[0], torch.full((ROWS,), 3, dtype=torch.int32), *arguments[2:])
