"""Files, names and classes of an optimised model are those of PEFT's."""

import pytest
from peft.tuners import lora
from peft_models import KINDS, ROUNDING, assert_same, inputs, mlp, optimized, up

import fastlora
from fastlora.layers.reading import _PLACES

kinds = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


@kinds
def test_names_files_and_merged_models_are_peft_s(settings, tmp_path):
    theirs = mlp(target_modules="up|down", **settings)  # PEFT writes a list in any order
    ours = optimized(theirs)
    ours(inputs()).sum().backward()
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert vars(up(ours)).keys() - set(_PLACES) == vars(up(theirs)).keys()
    assert isinstance(up(ours), lora.Linear)
    assert type(up(ours)).__name__ == type(up(theirs)).__name__
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert "adapter_model.safetensors" in names
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    ours, theirs = ours.merge_and_unload(), theirs.merge_and_unload()
    assert repr(ours) == repr(theirs)
    assert_same(ours.state_dict(), theirs.state_dict(), 0.0)


class Tripled(lora.Linear):
    """A user's layer."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs) * 3


def test_a_user_s_layer_class_is_left_alone():
    theirs = mlp()
    up(theirs).__class__ = Tripled
    ours = optimized(theirs)
    assert type(up(ours)) is Tripled
    report = {layer.name.split(".")[-1]: layer for layer in fastlora.coverage(ours).layers}
    assert "Tripled" in report["up"].reason
    assert report["down"].fast
    assert_same(ours(inputs()), theirs(inputs()), ROUNDING)
