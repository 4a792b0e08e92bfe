"""The suite's options, the list that gathers its rows, and the table that is printed last."""

import pytest
import torch

from .report import text
from .results import describe_machine, missed, write_results

_ROWS = pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlora")
    group.addoption(
        "--save-results",
        action="store_true",
        help="write the rows to benchmarks/results/<device>/<date>.json",
    )
    group.addoption(
        "--strict-targets", action="store_true", help="a missed time target fails its test"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    # pytest-benchmark's table repeats ours in absolute times: --benchmark-verbose shows it.
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The quick rows run only when asked for: their times mean nothing beside the others."""
    if "quick" not in config.option.keyword:
        quick = [item for item in items if "quick" in item.name]
        config.hook.pytest_deselected(items=quick)
        items[:] = [item for item in items if item not in quick]


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark):
    """Keep a row for the table and pytest-benchmark's JSON; fail if strict targets are missed."""

    def keep(row: dict) -> None:
        request.config.stash[_ROWS].append(row)
        benchmark.extra_info.update(row)
        if request.config.option.strict_targets and missed(row):
            pytest.fail("; ".join(missed(row)), pytrace=False)

    return keep


@pytest.fixture
def one_thread():
    """torch on one thread, so that the process's CPU time is the caller's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    machine = describe_machine()
    terminalreporter.section(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    )
    terminalreporter.write_line(text(rows))
    wrong = sum(bool(missed(row)) for row in rows)
    with_target = sum(bool(row["targets"]) for row in rows)
    terminalreporter.write_line(
        f"\n{with_target - wrong} of {with_target} rows met all of their targets"
    )
    if config.option.save_results:
        terminalreporter.write_line(
            f"saved as {write_results(rows, config.invocation_params.args)}"
        )
