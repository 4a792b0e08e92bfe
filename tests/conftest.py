"""Every test starts from the same random state, has one thread, and reaches no hub."""

import gc
import getpass
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Tests run in as many processes as `make test` says; the threads of each would wait for each other.
# The processes that a test starts inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    # Each process that a test starts would compile the sources of torch and transformers anew,
    # three times as long as it takes to import them.  It stays out of the folders of sources.
    folder = str(Path(__file__).parents[1] / ".cache" / "bytecode")
    os.environ.setdefault("PYTHONPYCACHEPREFIX", folder)
    sys.pycache_prefix, sys.dont_write_bytecode = os.environ["PYTHONPYCACHEPREFIX"], False
if isa := os.environ.get("ATEN_CPU_CAPABILITY"):
    # Inductor's cache doesn't tell code for these vectors from that for the CPU's own, which then
    # writes past the end of its memory.
    folder = os.path.join(tempfile.gettempdir(), f"torchinductor-{getpass.getuser()}-{isa}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "FASTLORA_MACHINE" in os.environ:  # before anything imports Triton
    from machine.plugin import *  # noqa: F403

from contextlib import nullcontext

import pytest
import torch
from marks import DEVICE, wants_equal_bits
from marks import pytest_itemcollected as pytest_itemcollected

import fastlora
from fastlora.backends import products

if DEVICE != "cpu":
    os.environ["FASTLORA_VERIFY"] = "off"  # a wrong kernel is to fail its tests


def pytest_collection_modifyitems(config, items):
    """Nobody marks a test ``bits``, and so none is forgotten."""
    if "bits" in config.option.markexpr:
        for item in items:
            if wants_equal_bits(item.function):
                item.add_marker("bits")


@pytest.fixture(scope="module", autouse=True)
def out_of_the_collector_s_sight():
    """What imports and earlier files made stays, and the collector, which each Trainer calls,
    needn't walk it."""
    gc.collect(1)
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """The ops run on this backend, and tensors are made on the tests' device."""
    place = nullcontext() if DEVICE == "cpu" else torch.device(DEVICE)
    with fastlora.use_backend(request.param), place:
        yield request.param


@pytest.fixture
def node(monkeypatch):
    """A call of a few rows is a node too."""
    monkeypatch.setattr("fastlora.ops.dispatch.MOST_ROWS", 0)
    monkeypatch.setattr("fastlora.ops.kinds._calls", {})


@pytest.fixture
def wide(monkeypatch):
    """This CPU multiplies 16 bits slowly: every such call on it runs in float32."""
    monkeypatch.setattr(products, "FORCED", True)


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN, so that an element which nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled
