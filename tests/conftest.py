"""Every test starts from the same random state, and reaches no hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from contextlib import nullcontext

import pytest
import torch
from device import DEVICE

import fastlora


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny models: they gain nothing from more, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """The ops run on this backend, and tensors are made on the tests' device."""
    place = nullcontext() if DEVICE == "cpu" else torch.device(DEVICE)
    with fastlora.use_backend(request.param), place:
        yield request.param


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
