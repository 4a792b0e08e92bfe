"""Run the tests' kernels in the emulator instead of the interpreter: for tests/conftest.py.

    FASTLORA_MACHINE=sm_90 .venv/bin/pytest tests/kernels/test_project.py

A launch that races fails its test.
"""

import os
from collections.abc import Iterator

import pytest

from . import driver

driver.install(os.environ["FASTLORA_MACHINE"])

# Names in a test's code that exclude it, with the reason.
_OTHERS = {
    "counted_launches": "it counts the interpreter's loads and stores",
    "run_without_interpreter": "its process has another driver",
}


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    with driver.use(driver.Session()) as session:
        yield
    assert not session.races, session.races[:3]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip a test whose tiles are too large for the target, according to `why_not`."""
    try:
        return (yield)
    except ValueError as error:
        if "can't run" in str(error):
            pytest.skip(str(error))
        raise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in _OTHERS.items():
            if name in item.function.__code__.co_names:
                item.add_marker(pytest.mark.skip(reason=reason))
