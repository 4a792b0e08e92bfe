"""A sweep's folder: resumed only with the same base and data, refused, or replaced."""

import json
import os
import shutil

import pytest
import torch
from torch import nn

import fastlora
from fastlora.packing.files import WEIGHTS
from fastlora.sweeps.record import FILE, TABLE

CONFIGS = [{"r": r, "learning_rate": 1e-2, "name": f"rank{r}"} for r in (1, 2)]
STEPS = 4


class Words(nn.Module):
    """A causal language model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 40)

    def forward(self, input_ids, labels=None):
        return self.head(self.mix(self.embed(input_ids)).tanh())


def batches(count: int, seed: int = 0) -> list[dict]:
    rows = torch.randint(0, 40, (count, 2, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": tokens, "labels": tokens} for tokens in rows]


DATA, HELD_OUT = batches(5), batches(2, seed=1)


def swept(folder, model=None, data=DATA, configs=CONFIGS, **options):
    settings = {"steps": STEPS, "eval_steps": 1, "progress": False, "eval_data": HELD_OUT} | options
    return fastlora.sweep(model or Words(), configs, data, output_dir=folder, **settings)


def broken_off(folder, after: int = 4, **options):
    """A sweep whose model raises an error after this many evaluations and steps."""
    model, calls = Words(), []

    def fail(*_):
        calls.append(1)
        if len(calls) > after * 3:  # two batches of held-out data and one of data
            raise RuntimeError("no more")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        swept(folder, model, **options)


def files_in(folder) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def other_words() -> Words:
    model = Words()
    with torch.no_grad():
        model.head.weight.mul_(3.0)
    return model


OTHER = {
    "first-batch": ({"data": [batches(1, 9)[0], *DATA[1:]]}, "had other data"),
    "second-batch": ({"data": [DATA[0], batches(1, 9)[0], *DATA[2:]]}, "had other data"),
    "another-key": ({"data": [b | {"more": b["labels"]} for b in DATA]}, "had other data"),
    "held-out": ({"eval_data": batches(2, 9)}, "other held-out data"),
    "less-held-out": ({"eval_data": HELD_OUT[:1]}, "other held-out data"),
    "base": ({"model": other_words()}, "another base model"),
}


@pytest.fixture(scope="module", params=[broken_off, swept], ids=lambda begin: begin.__name__)
def begun(request, tmp_path_factory):
    """The folder of a sweep that was broken off, or has ended.  Tests must not change it."""
    folder = tmp_path_factory.mktemp("begun")
    request.param(folder)
    return folder


@pytest.mark.parametrize("name", OTHER)
def test_a_sweep_resumes_only_with_the_same_base_and_data(name, begun):
    options, message = OTHER[name]
    before = files_in(begun)
    with pytest.raises(ValueError, match=message):
        swept(begun, resume=True, **options)
    assert files_in(begun) == before


def test_a_sweep_resumes_with_the_same_base_and_data(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "resumed")
    swept(tmp_path / "resumed", resume=True)


class Changing(torch.utils.data.Dataset):
    """Draws its examples at random, like an augmentation."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        tokens = torch.randint(0, 40, (6,))
        return {"input_ids": tokens, "labels": tokens}


class Endless(torch.utils.data.IterableDataset):
    """A data set of unknown length."""

    def __iter__(self):
        while True:
            yield from DATA


LOADERS = {
    "shuffled": lambda: torch.utils.data.DataLoader(Changing(), 2, shuffle=True),
    "endless": lambda: torch.utils.data.DataLoader(Endless(), batch_size=None),
    "once": lambda: iter(DATA),
    "list": lambda: DATA,
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_a_loader_gives_the_same_again(make, tmp_path):
    """Also for the held-out loss."""
    held_out = torch.utils.data.DataLoader(Changing(), 2, shuffle=True)
    broken_off(tmp_path / "cut", data=make(), eval_data=[*held_out][:2])
    with pytest.raises(ValueError, match="other held-out data"):
        swept(tmp_path / "cut", data=make(), eval_data=[*held_out][:2], resume=True)
    for folder, resume in (("a", False), ("a", True), ("b", False)):
        if resume:
            (tmp_path / folder / TABLE).unlink()
        swept(tmp_path / folder, data=make(), eval_data=held_out, resume=resume)
    found = [json.loads((tmp_path / name / TABLE).read_text())["trials"] for name in "ab"]
    assert found[0][0]["losses"] == found[1][0]["losses"]


@pytest.mark.parametrize("left", [[FILE], [FILE, TABLE], [TABLE]], ids="-".join)
def test_a_folder_that_has_a_sweep_is_refused(left, tmp_path):
    (broken_off if left == [FILE] else swept)(tmp_path)
    for name in {FILE, TABLE} - {*left}:
        (tmp_path / name).unlink(missing_ok=True)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=rf"has a sweep \({', '.join(left)}\): .*replace=True"):
        swept(tmp_path)
    with pytest.raises(ValueError, match="give only one"):
        swept(tmp_path, resume=True, replace=True)
    if FILE not in left:
        with pytest.raises(ValueError, match=r"state\.pt can't be read"):
            swept(tmp_path, resume=True)
    assert files_in(tmp_path) == before


NOTES = ("notes.txt", "adapters/notes.txt", "adapters/mine/notes.txt", "best/notes.txt")
OTHERS = [{"r": 3, "learning_rate": 1e-2, "name": "rank3"}]


def test_a_replaced_sweep_s_files_go_and_nothing_else(tmp_path):
    swept(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for name in (*NOTES, f"elsewhere/{WEIGHTS}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "elsewhere")
    found = swept(tmp_path, configs=OTHERS, replace=True)
    assert (tmp_path / "elsewhere" / WEIGHTS).read_text() == "mine"
    assert all((tmp_path / name).read_text() == "mine" for name in NOTES)
    assert sorted(os.listdir(tmp_path / "adapters")) == ["link", "mine", "notes.txt", "rank3"]
    assert json.loads((tmp_path / TABLE).read_text())["best"] == found.best.trial.name == "rank3"
    swept(tmp_path, configs=OTHERS, resume=True)


def test_there_is_no_best_where_no_loss_is_finite(tmp_path):
    configs = [config | {"learning_rate": 1e30} for config in CONFIGS]
    with pytest.warns(UserWarning, match="no trial has a finite held-out loss"):
        found = swept(tmp_path, configs=configs, max_grad_norm=0.0, halving=True)
    assert found.best is None
    assert str(found).endswith("best: none, because no loss is finite")
    assert not (tmp_path / "best").exists()
    assert json.loads((tmp_path / TABLE).read_text())["best"] is None
    assert (tmp_path / "adapters" / "rank1" / WEIGHTS).exists()
