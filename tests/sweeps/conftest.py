"""Sweeps write a short text in the place of their picture, which takes longer than their steps."""

from unittest import mock

import pytest

from fastlora.sweeps import record


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    with mock.patch.object(record, "curves", return_value={record.PICTURE: b"a picture"}):
        yield
