"""A pytest plugin for a project's tests: selects the LoRA tests and writes their outcomes.

With ``--suite-optimize``, it calls ``fastlora.auto`` and counts the calls of LoRA layers.  Without
it, PEFT is unchanged.
"""

import json
import random
from pathlib import Path

import pytest

from . import packed
from .suite import SUITES


def pytest_addoption(parser):
    group = parser.getgroup("suites")
    group.addoption("--suite", choices=SUITES, help="the project whose tests run")
    group.addoption(
        "--suite-outcomes", type=Path, help="file for the outcomes, a line of JSON for each test"
    )
    group.addoption("--suite-optimize", action="store_true", help="optimize every LoRA model")
    group.addoption("--regression", action="store_true", help="an option that PEFT's tests need")


def pytest_configure(config):
    config.suite = SUITES[config.getoption("suite")]
    config.suite_outcomes = config.getoption("suite_outcomes").open("w")
    config.suite_calls = None
    if config.getoption("suite_optimize"):
        from .calls import optimize_and_count

        try:
            config.suite_calls = optimize_and_count(**config.suite.settings)
        except RuntimeError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_unconfigure(config):
    config.suite_outcomes.close()


def pytest_collection(session):
    from transformers.integrations import peft

    # transformers' add_adapter refuses a PEFT older than this, although it works with it.
    peft.MIN_PEFT_VERSION = "0"
    session.config.suite.before()


def pytest_collection_modifyitems(config, items):
    is_chosen = config.suite.is_chosen
    config.hook.pytest_deselected(items=[i for i in items if not is_chosen(i.nodeid)])
    items[:] = [item for item in items if is_chosen(item.nodeid)]
    packed.need_no_gpu(items)


def pytest_runtest_setup(item):
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if item.config.suite_calls is not None:
        item.config.suite_calls.clear()


def write(config, report, outcome: str) -> None:
    record = {"test": report.nodeid, "outcome": outcome, "seconds": getattr(report, "duration", 0)}
    if outcome != "passed":
        record["reason"] = first_line(report.longrepr)
    if config.suite_calls:
        record["calls"] = dict(config.suite_calls)
    config.suite_outcomes.write(json.dumps(record) + "\n")
    config.suite_outcomes.flush()


def first_line(text) -> str:
    """The most useful line of the reason why a test failed or was skipped."""
    if isinstance(text, tuple):  # skipped: path, line, reason
        return text[2].removeprefix("Skipped: ")
    crash = getattr(text, "reprcrash", None)
    lines = (crash.message if crash else str(text)).strip().splitlines()
    return lines[0] if lines else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if (
        report.when == "call" or report.outcome != "passed"
    ):  # ignore set-up and tear-down that passed
        xfailed = hasattr(report, "wasxfail") and report.outcome == "skipped"
        write(item.config, report, "xfailed" if xfailed else report.outcome)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.outcome != "passed":  # a file that can't be imported or skips itself
        write(collector.config, report, report.outcome)
    return report
