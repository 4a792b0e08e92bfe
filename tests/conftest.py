"""Every test starts from the same random state, uses one thread, and makes no network request."""

import gc
import getpass
import logging
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Tests run in several processes (`make test`), whose threads would compete for the cores.
# Processes started by a test inherit this setting.
os.environ["OMP_NUM_THREADS"] = "1"
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    # Otherwise each process started by a test would compile the sources of torch and transformers,
    # which takes three times as long as importing them.  The bytecode is stored outside of the
    # source folders.
    folder = str(Path(__file__).parents[1] / ".cache" / "bytecode")
    os.environ.setdefault("PYTHONPYCACHEPREFIX", folder)
    sys.pycache_prefix, sys.dont_write_bytecode = os.environ["PYTHONPYCACHEPREFIX"], False
if isa := os.environ.get("ATEN_CPU_CAPABILITY"):
    # Inductor's cache doesn't distinguish code for these vector instructions from code for the
    # CPU's own; using the wrong one writes past the end of memory.
    folder = os.path.join(tempfile.gettempdir(), f"torchinductor-{getpass.getuser()}-{isa}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "FASTLORA_MACHINE" in os.environ:  # before anything imports Triton
    from machine.plugin import *  # noqa: F403

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from marks import DEVICE, wants_equal_bits
from marks import pytest_itemcollected as pytest_itemcollected
from process import Ranks
from triton.runtime import interpreter

import fastlora
from fastlora.backends import products

# With Python's own thresholds, imports and compilers spend a tenth of their time in collections.
gc.set_threshold(50_000, 20, 50)
if DEVICE == "cpu":
    # Each launch, and each call of a device function, would replace triton.language's functions
    # again, which takes a third of the time.  Here they stay replaced.
    interpreter._patch_lang = cache(interpreter._patch_lang)
    interpreter._LangPatchScope.restore = lambda scope: None
    # Each integer operation would be repeated in int64, but an overflow is reported only in debug
    # mode.
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *operands: None
    # These would keep each seed, and the stack of its call, for a device that isn't here.
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = torch.mtia.manual_seed_all = int
else:
    os.environ["FASTLORA_VERIFY"] = "off"  # a wrong kernel must fail its tests

# The same cases in each run.  `--hypothesis-profile=long` tries many others.
_ALWAYS = {"deadline": None, "database": None, "suppress_health_check": [*HealthCheck]}
settings.register_profile("same", derandomize=True, phases=[Phase.generate], **_ALWAYS)
settings.register_profile("long", max_examples=1000, stateful_step_count=20, **_ALWAYS)
settings.load_profile("same")


@pytest.hookimpl(specname="pytest_collection_modifyitems")  # machine.plugin has that name
def pytest_mark_bits(config, items):
    """Mark tests that compare bits automatically, so that none is forgotten."""
    if "bits" in config.option.markexpr:
        for item in items:
            if wants_equal_bits(item.function):
                item.add_marker("bits")


@pytest.fixture(scope="module", autouse=True)
def out_of_the_collector_s_sight():
    """Hide existing objects from the garbage collector.

    Objects from imports and from earlier files stay alive anyway, and each Trainer runs a
    collection, which would walk them all.
    """
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
    """Calls of few rows also use the node."""
    monkeypatch.setattr("fastlora.ops.few_rows.MOST_ROWS", 0)
    monkeypatch.setattr("fastlora.ops.kinds.calls", {})


@pytest.fixture
def log(caplog):
    """A function that returns the level and the text of each line of fastlora's log."""
    caplog.set_level(logging.INFO, "fastlora")
    return lambda: [(r.levelname, r.message) for r in caplog.records if r.name == "fastlora"]


@pytest.fixture
def wide(monkeypatch):
    """Simulates a CPU that multiplies 16-bit numbers slowly, so their products run in float32."""
    monkeypatch.setattr(products, "FORCED", True)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """A function that returns a group of processes, and starts a new one if necessary.

    Starting a group takes seconds, so the files of a session share it.
    """
    started: dict[int, Ranks] = {}

    def get(size: int = 2) -> Ranks:
        if size not in started or not started[size].usable:
            started[size] = Ranks(size, tmp_path_factory.mktemp("ranks"))
        return started[size]

    yield get
    for each in started.values():
        each.close()


@pytest.fixture
def two(ranks) -> Ranks:
    return ranks()


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN, so that an element that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled
