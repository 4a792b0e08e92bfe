"""Lazy logits act as ordinary ones: torch's functions give equal values, gradients and errors.

Functions without a handler of fastlora's all take one path, so a few of each form are enough.
After each expression, the logits, a copy and a view that were made before it are read as well, so
that a write to memory shows.
"""

import io
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from models import Reverse
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree

from fastlora.call.projection import Adapter, Base, Output
from fastlora.layers import logits_functions
from fastlora.layers.logits import LazyLogits
from fastlora.layers.logits_functions import lazy_logits
from fastlora.ops.loss import head_of

B, N, K, V, R, P = 2, 5, 6, 11, 2, 0.3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Logits, and the tensors that autograd follows.


def leaves_of(kind: str) -> dict[str, Tensor]:
    made = {"x": draw(B, N, K), "weight": draw(V, K, seed=1), "bias": draw(V, seed=2)}
    if kind == "adapter":
        made |= {"lora_a": draw(R, K, seed=3), "lora_b": draw(V, R, seed=4)}
    frozen = {"adapter": ("weight", "bias"), "frozen": ("weight", "bias")}.get(kind, ())
    return {name: tensor.requires_grad_(name not in frozen) for name, tensor in made.items()}


def logits_of(leaves: dict[str, Tensor], is_lazy: bool) -> Tensor:
    """Both use the same dropout mask."""
    x, weight, bias, *adapter = leaves.values()
    adapters = (Adapter(*adapter, 0.5),) if adapter else ()
    torch.manual_seed(5)
    head = head_of(x, Output(Base(weight, bias), adapters), P)
    if is_lazy:
        return lazy_logits(head)
    z = x @ weight.T + bias
    for mask in head.masks() if adapters else ():
        keep = mask.rows(0, B * N).view(x.shape)
        z = z + 0.5 * (torch.where(keep, x / (1.0 - P), 0.0) @ adapter[0].T) @ adapter[1].T
    return z


MASK = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
STATES = {
    "itself": lambda z: z,
    "rows": lambda z: z.view(-1, V),
    "shifted": lambda z: z[..., :-1, :],
    "shifted-copy": lambda z: z[..., :-1, :].contiguous().view(-1, V),
    "one-row": lambda z: z[0],
    "selected": lambda z: z[MASK],
    "scaled": lambda z: z * 0.5,
    "capped": lambda z: 3.0 * torch.tanh(z / 3.0),
    "logprobs": lambda z: z.log_softmax(-1),
    "negative-logprobs": lambda z: -functional.log_softmax(z[:, 1:], -1),
    "copy": lambda z: z.clone(),
    "detached": lambda z: z.detach(),
    "cast": lambda z: z.double().to("cpu"),
}


# Expressions.  Z is like the logits, T has a class for each row.


def like(z: Tensor, seed: int = 7) -> Tensor:
    return draw(*z.shape, seed=seed)


def classes(z: Tensor) -> Tensor:
    return torch.arange(z.shape[:-1].numel()).mul(3).remainder(5).view(z.shape[:-1])


def flat(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.reshape(-1, z.shape[-1]), classes(z).flatten()


def ignoring(z: Tensor) -> Tensor:
    target = classes(z).flatten()
    target[::3] = -100
    return target


def evaluated(text: str, z: Tensor):
    return eval(text, globals() | {"z": z})


def written(text: str, z: Tensor):
    """The statements' effect on y, a copy of z, and on two views of it."""
    names = globals() | {"z": z, "y": z * 2.0, "v": z[..., :2], "w": z.view(z.shape)}
    exec(text, names)
    return names["y"], names["v"], names["w"]


def saved(z):
    file = io.BytesIO()
    torch.save(z.detach(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def hooked(z):
    seen = []
    z.register_hook(lambda g: seen.append(g.clone()) or g * 2.0)
    y = functional.cross_entropy(*flat(z)) + z.square().sum()
    (g,) = torch.autograd.grad(y, z, retain_graph=True)
    return y, g, seen[0]


def retained(z):
    z.retain_grad()
    y = z.logsumexp(-1).sum()
    y.backward(retain_graph=True)
    return y, z.grad.clone()


def twice(z):
    y = z.softmax(-1).square().sum()
    y.backward(retain_graph=True)
    y.backward(retain_graph=True)
    return y


def second_order(z):
    y = z.sin().sum()
    (g,) = torch.autograd.grad(y, z, create_graph=True)
    return g.square().sum()


own_function = Reverse.apply


def entropy(z):
    logp = z.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def filled(z):
    made = torch.zeros_like(z)
    made[:] = z
    made[..., 0] += z[..., 1]
    return made


EXPRESSIONS = r"""
entropy(z) ;
z * True ; z * 1j ; z * float("inf") ; z / 0.0 ; z - z ; 1 - z ; z[False] ; z[..., :0] ;
functional.cross_entropy(*flat(z)) ; functional.cross_entropy(*flat(z), reduction="sum") ;
functional.cross_entropy(*flat(z), reduction="none") ;
functional.cross_entropy(*flat(z), label_smoothing=0.1) ;
functional.cross_entropy(*flat(z), weight=draw(z.shape[-1]).abs()) ;
functional.cross_entropy(flat(z)[0], ignoring(z)) ;
functional.cross_entropy(flat(z)[0], ignoring(z), reduction="sum") / 7 ;
functional.cross_entropy(flat(z)[0], torch.full_like(ignoring(z), -100)) ;
functional.cross_entropy(flat(z)[0], flat(z)[1][1:]) ;
functional.cross_entropy(flat(z)[0], flat(z)[0].detach().softmax(-1)) ;
functional.cross_entropy(z.movedim(-1, 1), classes(z)) ;
functional.cross_entropy(input=flat(z)[0], target=flat(z)[1]) ;
functional.cross_entropy(flat(z)[0], flat(z)[1].int()) ;
functional.cross_entropy(flat(z)[0], flat(z)[1], label_smoothing=2.0) ;
torch.nn.CrossEntropyLoss()(*flat(z)) + torch.nn.CrossEntropyLoss()(*flat(z)) ;
functional.cross_entropy(z[..., -1, :], classes(z)[..., -1]) ;
functional.nll_loss(functional.log_softmax(flat(z)[0], -1), flat(z)[1]) ;
functional.nll_loss(flat(z)[0], flat(z)[1]) ;
functional.kl_div(z.log_softmax(-1), like(z).softmax(-1), reduction="batchmean") ;
functional.log_softmax(z, -1).gather(-1, classes(z).unsqueeze(-1)).squeeze(-1) ;
z.log_softmax(dim=-1).gather(dim=-1, index=classes(z).unsqueeze(-1)) ;
z.log_softmax(-1).gather(-1, classes(z).unsqueeze(-1).int()) ;
z.log_softmax(-1).gather(-1, classes(z).unsqueeze(-1)[..., :1, :]) ;
z.log_softmax(-1).gather(-1, torch.zeros_like(z, dtype=torch.int64)) ;
(-z.log_softmax(-1)).gather(-1, classes(z).unsqueeze(-1)) ;
z.gather(-1, classes(z).unsqueeze(-1)) - z.logsumexp(-1, keepdim=True) ;
z.log_softmax(-1).sum(-1) ; z.log_softmax(-1).sum(-1, keepdim=True) ;
z.log_softmax(-1).sum(dim=-1, keepdim=True, dtype=torch.float32) ; z.log_softmax(-1).sum((-1,)) ;
z.log_softmax(-1).log_softmax(-1) ; z.log_softmax(0) ; z.log_softmax(-1, dtype=torch.float32) ;
functional.log_softmax(z, dim=-1, dtype=torch.float64).mean() ;
functional.log_softmax(z.float(), -1) ; z.sum(-1) ; -(z.softmax(-1) * z.log_softmax(-1)).sum(-1) ;
z * 2 ; 2 * z ; z / 3 ; z * torch.tensor(0.3) ; torch.tensor(0.3) * z ; z * 0.0 ; z / 0 ;
z * torch.tensor([0.5], dtype=torch.float64) ; z * like(z)[..., :1] ;
z * torch.tensor(2.0, requires_grad=True) ; z + 1 ; -(-z) ; z * z ; z + draw(z.shape[-1]) ;
-2.0 * torch.tanh(z / -2.0) ;
torch.tanh(torch.tanh(z)) ; 0.0 * torch.tanh(z) ; z[0] ; z[-1:] ; z[..., 0] ; z[..., -1, :] ;
z[()] ; z[None] ; z[..., None] ; z[:, None] ; z[..., 1:] ; z[..., :-1] ; z[..., ::2] ;
z[..., [0, 2]] ; z[[0, 1]] ; z[torch.tensor([1, 0, 0])] ; z[torch.tensor(1)] ;
z[np.array([1, 0])] ; z[z > 0] ; z[z.argmax(-1) > 2] ; z[..., torch.tensor([0, 1])] ;
z[1:, ..., :3] ; z[0, ..., :3] ; z[0, 0] ; z[torch.tensor([0, 1]), torch.tensor([1, 1])] ;
z[torch.tensor([1, 0], dtype=torch.int32)] ; z[torch.tensor([1], dtype=torch.uint8)] ; z[:, ::2] ;
z[:, :, :4] ; z[MASK] ; z[MASK, :4] ; z[MASK][..., :4] ; z[:1, :2, :3] ; z.view(-1) ;
z.view(z.shape[-1], -1) ; z.view(-1, z.shape[-1]).view(z.shape) ; z.view(-1, -1) ;
z.reshape(-1, z.shape[-1]) ; z.flatten() ; z.flatten(0, 1) ; z.flatten(0, -2) ; z.unsqueeze(0) ;
z.unsqueeze(-1) ; z.unsqueeze(-2) ; z[None].squeeze() ; z[None].squeeze(0) ; z.squeeze(0) ;
z.squeeze(-1) ; z[:1].squeeze(0) ; z.unbind(0) ; z.unbind(-1) ; [*z] ;
list(zip(z, like(z), strict=True)) ; [row.sum() for row in z] ; len(z) ; z.tolist() ;
z.detach().numpy() ; np.asarray(z.detach()) ; z.sum().item() ; z.split([1, len(z) - 1]) ;
torch.cat((like(z), z, z), -1) ; torch.cat([z[:1], z[1:]]) ;
torch.distributions.Categorical(logits=z).entropy() ; filled(z) ; like(z).copy_(z) ; z.float() ;
z.float().double() ; z.to(torch.float32).sum(-1) ; z.to(dtype=torch.bfloat16) ;
z.to("meta").shape ; (z.shape, z.size(-1), z.dtype, z.device, z.ndim, z.numel(), z.requires_grad) ;
(z.is_contiguous(), z.stride(), z.storage_offset()) ; z.contiguous().is_contiguous() ; z.grad ;
z.is_leaf ; z.contiguous().mul_(0.5) ; z.clone().zero_() ; z.detach().clone().exp_() ;
z.float().zero_() ; z.contiguous() is z ; z.double() is z ; z.requires_grad_() ; z.detach_() ;
z.data ; z.data.mul_(3) ; z.detach().mul_(3) ; pickle.loads(pickle.dumps(z.detach())) ;
copy.deepcopy(z.detach()) ; copy.deepcopy(z) ; copy.copy(z) ; pickle.loads(pickle.dumps(z)) ;
saved(z) ; hooked(z) ; retained(z) ; twice(z) ; second_order(z) ; own_function(z) ;
z[:0].split(2) ; torch.func.grad(lambda x: (x * z).sum())(like(z)) ;
torch.vmap(lambda row: row.sum())(z) ;
torch.func.jvp(torch.sin, (z.detach(),), (like(z),)) ;
checkpoint(lambda y: y.sin() * 2, z, use_reentrant=False) ;
checkpoint(lambda y: y.sin() * 2, z, use_reentrant=True) ;
checkpoint(lambda y: functional.cross_entropy(*flat(y)), z, use_reentrant=False) ;
checkpoint(lambda y: functional.cross_entropy(*flat(y)), z, use_reentrant=True) ;
torch.autograd.grad(z.sum(), z) ; torch.autograd.grad(z, z, like(z)) ;
z.backward(like(z), retain_graph=True) ; z.backward() ;
torch.autograd.backward([z], [like(z)], retain_graph=True) ; z.grad_fn is None ;
(z * 2).grad_fn is None ; isinstance(z, Tensor) ; z.T ; z.mT ; z.real ; z.abs() ; z.sort() ;
z.topk(2) ; z.norm() ; z.cumsum(-1) ; z.where(z > 0, like(z)) ; torch.where(z > 0, z, like(z)) ;
torch.maximum(like(z), z) ; torch.einsum("...v,...v->...", z, like(z)) ; z @ like(z).mT ;
like(z) @ z.mT ; torch.linalg.vector_norm(z) ; torch.fft.fft(z) ; torch.special.expit(z) ;
functional.layer_norm(z, z.shape[-1:]) ; functional.pad(z, (0, 1)) ; torch._foreach_exp([z]) ;
z.expand(2, *z.shape) ; z.scatter(-1, classes(z)[..., None], 0.0)
"""
# Statements that write to z, or to another tensor with its memory.
WRITES = r"""
d = z.detach().requires_grad_(); functional.cross_entropy(*flat(d)).backward(); y = d.grad ;
d = torch.tensor(0.5, dtype=torch.float64, requires_grad=True);
functional.cross_entropy(*flat(z.detach() * d)).backward(); y = d.grad ;
z.mul_(3) ; z *= 3 ; z += 1 ; z /= 2 ; z -= z ; z.zero_() ; z **= 2 ; z[0] = 0 ; z[..., 0] = -1e9 ;
z[..., :2] *= 2 ; z[..., 1:].fill_(1) ; z //= 2 ; v.mul_(3) ; w.mul_(3) ; y.mul_(3) ; y[0] = 1 ;
v[...] = 5; y += v.sum() ; z.view(-1)[0] = 2 ; z[0].zero_() ; z.masked_fill_(z > 0, 0) ;
z.copy_(like(z)) ; z.clamp_(-1, 1) ; z.tanh_() ; z.softmax(-1); z.neg_() ;
functional.relu(z, inplace=True) ; functional.relu(z, True) ;
functional.dropout(z, 0.5, True, True) ; functional.leaky_relu(z, 0.1, inplace=True) ;
torch.relu_(z) ; torch.nn.ReLU(inplace=True)(z) ; functional.silu(v, inplace=True) ;
z.data.mul_(2) ; z.detach().mul_(2) ; z.detach().numpy()[...] = 2 ; torch.add(like(z), 1, out=z) ;
torch.tanh(like(z), out=z) ; torch.exp(z, out=z) ; d = z.detach(); torch.add(d, 1, out=d) ;
d = z.detach(); e = d * 2; torch.add(d, 1, out=d); y = y + e ;
d = z.detach(); e = d * 2; d.numpy()[...] = 1; y = y + e ;
d = z.detach(); e = d[..., 1:]; d.zero_(); y = e + 1 ; d = z.detach().contiguous(); d.zero_() ;
d = z[..., :1, :].contiguous(); d.zero_() ; d = z[..., :1, :].reshape(-1, z.shape[-1]); d.zero_() ;
d = z[[0]]; d.zero_() ; d = z.float().double(); d.zero_() ; d = z.view(-1, z.shape[-1]); d.zero_() ;
d = z[None]; d.add_(1) ; d = z.flatten(0, -2); d.add_(1) ; d = z.log_softmax(-1); z.mul_(2); y = d ;
d = z.log_softmax(-1); e = -d; d.mul_(2); y = e ; l = z.exp().sum(); z.mul_(2); y = y + l ;
d = z * 1; d.zero_() ; d = z / 1; d.zero_() ; d = z.clone(); d[0] = 0; y = d ;
d = z.tanh(); d.mul_(2); y = d ; d = draw(z.shape[-1]); y = z + d; d.zero_() ;
d = torch.tensor([0, 1]); y = z.detach()[d]; d.zero_() ;
z = z.detach(); z.requires_grad_(); y = z * 2; y.sum().backward(); y = z.grad ;
torch.no_grad().__enter__(); z.mul_(2); torch.set_grad_enabled(True) ;
z.mul_(draw(1).requires_grad_()) ; z.index_fill_(-1, torch.tensor([0]), 0) ;
z.scatter_(0, torch.zeros_like(z, dtype=torch.int64), 0.0) ; functional.hardtanh(z, -1, 1, True) ;
torch.nn.functional.elu_(z) ; z.uniform_() ; torch.nn.init.zeros_(z) ; torch._foreach_mul_([z], 2) ;
torch.clamp(z, 0, 1, out=v)
"""


# Comparison.


def expressions() -> dict:
    found = {}
    for block, run in ((EXPRESSIONS, evaluated), (WRITES, written)):
        for text in re.split(r" ;\s", block.strip()):
            found[text] = partial(run, text)
    return found


def observe(kind: str, state, function, is_lazy: bool):
    """The function's error and results, the logits afterwards, and all gradients."""
    leaves = leaves_of(kind)
    root = logits_of(leaves, is_lazy)
    assert isinstance(root, LazyLogits) is is_lazy
    before, view = root * 2.0, root[:, 1:]
    z = state(root)
    torch.manual_seed(6)
    try:
        made = function(z)
        error = None
    except Exception as raised:
        made, error = None, type(raised).__name__
    parts = _pytree.tree_leaves([made, z, root, before, view])
    same = [part is z for part in parts]
    parts = [
        part.to_dense() if isinstance(part, Tensor) and part.is_sparse else part for part in parts
    ]
    needs = [isinstance(part, Tensor) and part.requires_grad for part in parts]
    tensors = [part for part, need in zip(parts, needs, strict=True) if need]
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    try:
        total = sum((part.real.double() * draw(*part.shape, seed=11)).sum() for part in tensors)
        found = torch.autograd.grad(total, trained, allow_unused=True)
    except Exception as raised:
        found = (f"backward: {type(raised).__name__}",)
    every = [*parts, *found, *(leaf.grad for leaf in leaves.values())]
    values = [part.detach().clone() if isinstance(part, Tensor) else part for part in every]
    return error, same, needs, values


def _equal(found, wanted) -> bool:
    if isinstance(wanted, Tensor) and isinstance(found, Tensor):
        if (
            found.dtype != wanted.dtype
            or found.shape != wanted.shape
            or type(found) is not type(wanted)
        ):
            return False
        tolerance = 1e-12 if wanted.dtype is torch.float64 else 1e-5
        if not (wanted.is_floating_point() or wanted.is_complex()):
            return torch.equal(found, wanted)
        largest = wanted.abs().nan_to_num(0.0, 0.0).amax().item() if wanted.numel() else 0.0
        absolute = tolerance * max(1.0, largest)  # a sum of large numbers rounds like them
        return torch.allclose(found, wanted, tolerance, absolute, equal_nan=True)
    if isinstance(wanted, np.ndarray | float):
        return np.allclose(found, wanted, 1e-12, 1e-12, equal_nan=True)
    if isinstance(wanted, int | str | bool | None | torch.dtype | torch.device | torch.layout):
        return found == wanted
    return type(found) is type(wanted)


def difference(kind: str, state, function) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, wanted = (observe(kind, state, function, is_lazy) for is_lazy in (True, False))
    names = ("error", "identity", "requires_grad")
    for name, ours, theirs in zip(names, found, wanted, strict=False):
        if ours != theirs:
            return f"{name}: {ours}, not {theirs}"
    if len(found[3]) != len(wanted[3]):
        return f"{len(found[3])} results, not {len(wanted[3])}"
    for number, (ours, theirs) in enumerate(zip(found[3], wanted[3], strict=True)):
        if not _equal(ours, theirs):
            return f"result {number} of {len(found[3])}: {ours}, not {theirs}"
    return ""


def wrong(state: str) -> dict[str, str]:
    """The expressions whose results differ.  Each is tried on two states."""
    names, found = [*STATES], {}
    for number, (text, function) in enumerate(expressions().items()):
        if state in (names[number % len(names)], names[number * 7 // 3 % len(names)]):
            kind = ("trained", "adapter", "frozen")[number % 3]
            if reason := difference(kind, STATES[state], function):
                found[f"{text} ({kind})"] = reason
    return found


@pytest.mark.parametrize("state", STATES)
def test_lazy_logits_act_as_ordinary_ones(state):
    assert wrong(state) == {}


# Expressions near one with a handler, each with one difference that the handler must notice.
NEAR = {
    "softmax-of-rows": "z.log_softmax(1).gather(-1, classes(z)[..., None])",
    "gather-of-rows": "z.log_softmax(-1).gather(1, classes(z)[..., None])",
    "cap-of-zero": "functional.cross_entropy(*flat(0.0 * torch.tanh(z)))",
    "two-softmaxes": "(z.log_softmax(-1).exp() * (2.0 * z).log_softmax(-1)).sum(-1)",
}


@pytest.mark.parametrize("text", NEAR.values(), ids=NEAR)
def test_an_expression_near_a_lazy_one_has_torch_s_values(text):
    for kind in ("trained", "frozen"):
        assert difference(kind, STATES["itself"], partial(evaluated, text)) == ""


REFUSED = {
    "a class": ("functional.cross_entropy(flat(z)[0], flat(z)[1] + 100)", ValueError),
    "an ignored class": (
        'functional.cross_entropy(flat(z)[0], ignoring(z), reduction="none", ignore_index=0)',
        ValueError,
    ),
    "a gathered class": ("z.log_softmax(-1).gather(-1, classes(z)[..., None] + 100)", ValueError),
    # The loss has no logits between its inputs and its value.
    "the logits' gradient": (
        "torch.autograd.grad(functional.cross_entropy(*flat(z)), z)",
        RuntimeError,
    ),
}


@pytest.mark.parametrize(("text", "error"), REFUSED.values(), ids=REFUSED)
def test_a_loss_without_logits_refuses(text, error):
    with pytest.raises(error):
        evaluated(text, logits_of(leaves_of("trained"), True))


@pytest.mark.parametrize("write", ["z.mul_(3.0)", "z[..., 0] = 0.0", "z[:, :1].zero_()"])
def test_an_autograd_function_of_written_logits_gets_the_write_s_gradient(write):
    gradients = []
    for is_lazy in (True, False):
        leaves = leaves_of("trained")
        z = logits_of(leaves, is_lazy)
        exec(write, {"z": z})
        own_function(z).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("change", ["z.t_()", "z.unsqueeze_(0)", "z.data = torch.ones(3)"])
def test_a_change_of_shape_or_memory_in_place_is_refused(change):
    z = logits_of(leaves_of("frozen"), True).detach()[0]
    with pytest.raises(RuntimeError, match="in place: make a new tensor instead"):
        exec(change, {"z": z, "torch": torch})


# Precision, laziness and speed.


def half_logits(is_lazy: bool) -> Tensor:
    x, weight = draw(B, K).bfloat16(), draw(V, K, seed=1).bfloat16()
    head = head_of(x, Output(Base(weight, None)), 0.0)
    return lazy_logits(head) if is_lazy else functional.linear(x, weight)


BEST = half_logits(False).argmax(-1)


ROW = draw(V, seed=2).float()
PRECISE = {
    "a float32 row": lambda z: functional.cross_entropy(z.float() + ROW, BEST),
    "float64": lambda z: functional.cross_entropy(z.double() * 3.0, BEST, reduction="sum"),
    "log_softmax in float64": lambda z: functional.nll_loss(
        (z * 3.0).log_softmax(-1, dtype=torch.float64), BEST, reduction="sum"
    ),
    "a sum in float32": lambda z: z.log_softmax(-1).sum(-1, dtype=torch.float32),
}


@pytest.mark.parametrize("function", PRECISE.values(), ids=PRECISE)
def test_the_elements_of_16_bit_logits_have_torch_s_precision(function):
    torch.testing.assert_close(function(half_logits(True)), function(half_logits(False)),
                               rtol=1e-9, atol=0)  # fmt: skip


def fused_losses(z: Tensor) -> dict:
    """Common losses of 16-bit logits [B, N, V], as their authors write them."""
    t = classes(like(z))
    return {
        "transformers": lambda: functional.cross_entropy(
            z.float().view(-1, V), t.view(-1), ignore_index=-100, reduction="mean"
        ),
        "an older model": lambda: torch.nn.CrossEntropyLoss()(
            z[..., :-1, :].contiguous().view(-1, V), t[..., 1:].contiguous().view(-1)
        ),
        "smoothing": lambda: functional.cross_entropy(
            z.to(torch.float32).reshape(-1, V), t.flatten(), label_smoothing=0.1
        ),
        "log-probabilities": lambda: torch.gather(
            (z[:, :-1] / 0.7).log_softmax(-1), -1, t[:, 1:].unsqueeze(-1)
        ).squeeze(-1),
        "row by row": lambda: torch.stack([
            functional.log_softmax(row, dim=-1).gather(dim=-1, index=labels.unsqueeze(-1))
            for row, labels in zip(z, t, strict=True)
        ]),
        "a softcap": lambda: functional.cross_entropy(
            (torch.tanh(z / 30.0) * 30.0).float().flatten(0, 1), t.flatten()
        ),
        "a mask": lambda: functional.cross_entropy(z[MASK], t[MASK]),
    }  # fmt: skip


@pytest.mark.parametrize("name", fused_losses(draw(B, N, V)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_common_losses_compute_no_logits(name, dtype):
    weight = draw(V, K, seed=1).to(dtype)
    x = draw(B, N, K).to(dtype).requires_grad_()
    z = lazy_logits(head_of(x, Output(Base(weight, None)), 0.0))
    found, wanted = fused_losses(z)[name](), fused_losses(x @ weight.T)[name]()
    assert not z.cell.call.is_computed
    gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss in (found, wanted)]
    tolerance = 0.03 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_a_loop_over_rows_works_on_ordinary_rows():
    z = lazy_logits(head_of(draw(300, K), Output(Base(draw(V, K, seed=1), None)), 0.0))
    assert {type(row) for row in z} == {Tensor}


def test_a_type_error_inside_of_a_loss_is_raised(monkeypatch):
    def broken(*given, **more):
        raise TypeError("inside")

    monkeypatch.setattr(logits_functions, "head_loss", broken)
    with pytest.raises(TypeError, match="inside"):
        functional.cross_entropy(logits_of(leaves_of("frozen"), True)[0], torch.arange(N))
