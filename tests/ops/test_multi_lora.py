"""Properties that only multi_lora_linear has; test_numbers.py tests its numbers."""

import torch
from call_kinds import INDICES, RANKS, made

from fastlora import AdapterMapping
from fastlora.backends import torch as torch_backend
from fastlora.call import rows as cut_rows


def test_an_adapter_of_a_list_without_rows_gets_no_gradient():
    kind = made("adapters")
    indices = torch.full_like(INDICES, 2)
    kind.call(*kind.tensors.values(), indices=indices).sum().backward()
    assert [kind.tensors[f"a{i}"].grad is None for i in range(3)] == [True, True, False]


def test_a_bank_has_zeros_where_nothing_was_read():
    """Gradients are zero after each adapter's rank and for unused adapters, even beside NaN."""
    kind = made("bank")
    a, b = kind.tensors["a"], kind.tensors["b"]
    with torch.no_grad():
        a[1], b[1] = torch.nan, torch.nan
        for i, r in enumerate(RANKS):
            a[i, r:], b[i, :, r:] = torch.nan, torch.nan
    y = kind.call(*kind.tensors.values(), indices=INDICES.where(INDICES != 1, -1))
    assert y.isfinite().all()
    d_a, d_b = torch.autograd.grad(y.sum(), [a, b])
    for i, r in enumerate((2, 0, 3)):
        assert d_a[i, :r].all()
        assert d_b[i, :, :r].all()
        assert not d_a[i, r:].any()
        assert not d_b[i, :, r:].any()
    nobody = kind.call(*kind.tensors.values(), indices=torch.full_like(INDICES, -1))
    assert not any(found.any() for found in torch.autograd.grad(nobody.sum(), [a, b]))


def test_layers_share_one_sorting_of_rows(monkeypatch):
    sorted_times, sort = [], cut_rows.sort_items
    monkeypatch.setattr(
        cut_rows, "sort_items", lambda *given: sorted_times.append(given) or sort(*given)
    )
    first, second, indices = made("bank"), made("adapters"), INDICES.clone()
    expected = [kind.call(*kind.tensors.values()) for kind in (first, second)]
    shared = AdapterMapping(indices, 3)
    sorted_times.clear()
    indices.fill_(0)  # a change of the indices doesn't affect an existing mapping
    for kind, y in zip((first, second), expected, strict=True):
        found = kind.call(*kind.tensors.values(), indices=shared)
        found.sum().backward()
        assert torch.equal(found, y)
    assert not sorted_times


def test_rows_that_lie_together_are_not_copied(monkeypatch):
    places, run = [], torch_backend.forward_rows

    def noted(x, outputs, masks, into, dtype):
        places.append((into[0].untyped_storage().data_ptr(), x.untyped_storage().data_ptr()))
        return run(x, outputs, masks, into, dtype)

    monkeypatch.setattr(torch_backend, "forward_rows", noted)
    kind = made("bank")
    x = kind.tensors["x"]
    y = kind.call(*kind.tensors.values(), indices=[1, 1, 1, 0, 0, 2, 2, 2, 2, 2])
    own = (y.untyped_storage().data_ptr(), x.untyped_storage().data_ptr())
    assert places == [own] * 4  # the base, and three adapters


def test_scales_and_ranks_may_be_tensors():
    kind = made("bank")
    as_tensors = {"scales": torch.tensor([0.5, 1.0, -2.0]), "ranks": torch.tensor(RANKS)}
    tensors = kind.tensors.values()
    assert torch.equal(kind.call(*tensors, **as_tensors), kind.call(*tensors))
