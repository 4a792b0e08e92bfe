"""Sweeps write a short text in the place of their picture, which takes longer than their steps."""

from unittest import mock

import pytest

from fastlora import sweeps
from fastlora.sweeps.record import PICTURE


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    with mock.patch.object(sweeps, "curves", return_value={PICTURE: b"a picture"}):
        yield
