"""Files that were made to hurt: no memory is taken for them, and each is a ValueError."""

import json
import struct
from contextlib import nullcontext

import pytest
import torch
from memory import peak_bytes
from models import Mlp, assert_untouched, snapshot
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import LoRAConfig
from fastlora.model.checkpoint import CONFIG, WEIGHTS

A, B = (f"base_model.model.up.lora_{half}.weight" for half in "AB")


def adapted(**settings) -> torch.nn.Module:
    return fastlora.apply_lora(Mlp(), LoRAConfig(target_modules=["up"], **settings))


@pytest.fixture
def folder(tmp_path):
    fastlora.save_adapter(adapted(), tmp_path)
    return tmp_path


def edit_config(folder, **changes) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def write_header(folder, **tensors) -> None:
    """A safetensors file of a header alone, whatever it says."""
    header = json.dumps(tensors).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def entry(*shape: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]}


HOSTILE = {
    "rank": (lambda f: edit_config(f, r=10**8), r"shape \(8, 8\), but .* \(100000000, 8\)"),
    "rank-pattern": (
        lambda f: edit_config(f, rank_pattern={"up": 10**8}),
        r"shape \(8, 8\), but .* \(100000000, 8\)",
    ),
    "rank-1e30": (lambda f: edit_config(f, r=10**30), "r is 1000.*, but the rank"),
    "rank-of-5000-digits": (
        lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}"),
        "is no JSON",
    ),
    "rank-infinite": (lambda f: edit_config(f, r=float("inf")), "r is inf"),
    "alpha-infinite": (lambda f: edit_config(f, lora_alpha=float("inf")), "lora_alpha is inf"),
    "alpha-1e400": (lambda f: edit_config(f, lora_alpha=10**400), "lora_alpha is 1000"),
    "layer-minus-one": (lambda f: edit_config(f, layers_to_transform=-1), "is -1, but must be a w"),
    "no-such-rank": (lambda f: edit_config(f, r=[8]), r"r is \[8\]"),
    "deep-json": (lambda f: (f / CONFIG).write_text("[" * 100_000), "nested too deeply"),
    "deep-pattern": (
        lambda f: edit_config(f, rank_pattern={"(" * 50_000 + ")" * 50_000: 8}),
        r"rank_pattern has '\(+…: 8: ",
    ),
    "long-repetition": (
        lambda f: edit_config(f, target_modules="up{99999999999}"),
        "is no regular expression",
    ),
    "no-text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "is no JSON"),
    "shape-without-data": (
        lambda f: write_header(f, **{A: entry(10**9, 8), B: entry(12, 10**9)}),
        "is damaged",
    ),
    "negative-shape": (lambda f: write_header(f, **{A: entry(-1, 8)}), "is damaged"),
    "header-longer-than-the-file": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "is damaged",
    ),
    "no-bytes-a-number": (
        lambda f: write_header(f, **{A: entry(8, 0, dtype="F4"), B: entry(12, 0)}),
        "doesn't fit|is damaged|of shape",
    ),
    "scalars": (
        lambda f: save_file({A: torch.zeros(()), B: torch.zeros(())}, f / WEIGHTS),
        r"of shape \(\)",
    ),
    "float8": (
        lambda f: save_file(
            {A: torch.zeros(8, 8, dtype=torch.complex64), B: torch.zeros(12, 8)}, f / WEIGHTS
        ),
        "lora_A.weight of C64",
    ),
}


CASES = {name: (*case, True) for name, case in HOSTILE.items()}
CASES |= {f"{n}-adapted": (*HOSTILE[n], False) for n in ("rank", "scalars", "float8", "deep-json")}


@pytest.mark.parametrize(("harm", "message", "fresh"), CASES.values(), ids=CASES)
def test_a_hostile_file_changes_nothing(folder, harm, message, fresh):
    harm(folder)
    model = Mlp() if fresh else adapted()
    before = snapshot(model)
    if not fresh:
        message = rf"{message}|\(r, lora_alpha, use_rslora\)"
    with pytest.raises(ValueError, match=message):
        fastlora.load_adapter(model, folder)
    assert_untouched(model, before)


def test_nothing_is_allocated_for_a_rank_that_the_file_hasn_t(folder):
    edit_config(folder, r=1_000_000)  # 80 MB
    model = Mlp()

    def load() -> None:
        with pytest.raises(ValueError, match=r"\(1000000, 8\)"):
            fastlora.load_adapter(model, folder)

    before, peak, _ = peak_bytes(model.parameters(), load)
    assert peak - before < 2**20


def test_a_byte_order_mark_is_read(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text, encoding="utf-8-sig")
    fastlora.load_adapter(Mlp(), folder)


@pytest.mark.parametrize("fresh", [True, False], ids=["plain", "adapted"])
@pytest.mark.parametrize(
    "change", [lambda t: t * torch.nan, lambda t: t.to(torch.float8_e4m3fn)], ids=["nan", "float8"]
)
def test_values_of_every_kind_are_loaded(folder, change, fresh):
    """As PEFT loads them; a NaN, which equals nothing, is no sign of a weight of its own."""
    tensors = load_file(folder / WEIGHTS)
    tensors[A] = change(tensors[A])
    save_file(tensors, folder / WEIGHTS)
    broken = not tensors[A].float().isfinite().all()
    said = pytest.warns(UserWarning, match=rf"NaN or infinity in {A}") if broken else nullcontext()
    with said:
        model = fastlora.load_adapter(Mlp() if fresh else adapted(), folder)
    torch.testing.assert_close(model.up.lora_A, tensors[A].float(), equal_nan=True)


@pytest.mark.parametrize("setting", ["target_modules", "unknown"])
def test_a_long_value_is_cut_in_the_message(folder, setting):
    edit_config(folder, **{setting: "up" * 10**4})
    with pytest.raises(ValueError, match=setting) as caught:
        fastlora.load_adapter(Mlp(), folder)
    assert len(str(caught.value)) < 700
