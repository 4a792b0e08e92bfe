"""The options of ``pytest benchmarks``, the list of its rows, and the table at its end."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from .cases import cpu_cases, gpu_cases
from .compare import Pair, UnknownRefError, check_ref
from .measure import missed
from .report import text
from .results import describe_machine, results_path, write_results

_ROWS = pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlora")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured")
    group.addoption("--base", metavar="REF", help="compare fastlora with this commit's")
    flag, where = {"action": "store_true"}, "benchmarks/results/<device>/<date>.json"
    group.addoption("--save-results", help=f"write the rows to {where}", **flag)
    group.addoption("--strict-targets", help="a missed time target fails its test", **flag)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    # pytest-benchmark's table repeats ours in absolute times: --benchmark-verbose shows it.
    config.option.benchmark_quiet = True
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU here")
    if config.option.base is not None:
        try:
            check_ref(config.option.base)
        except UnknownRefError as error:
            raise pytest.UsageError(f"--base: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    on_gpu = metafunc.config.option.device == "cuda"
    cases = gpu_cases() if on_gpu else cpu_cases()
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The quick rows run only when asked for: their times mean nothing beside the others."""
    if "quick" not in config.option.keyword:
        quick = [item for item in items if "quick" in item.name]
        config.hook.pytest_deselected(items=quick)
        items[:] = [item for item in items if item not in quick]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.option.device)


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair | None]:
    """The two commits that ``--base`` compares.  Also after Ctrl-C nothing of them is left."""
    with ExitStack() as stack:
        ref = request.config.option.base
        yield None if ref is None else stack.enter_context(Pair(ref, request.config.option.device))


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark):
    """Keep a row for the table and pytest-benchmark's JSON; fail if strict targets are missed."""

    def keep(row: dict) -> None:
        request.config.stash[_ROWS].append(row)
        benchmark.extra_info.update(row)
        if request.config.option.strict_targets and missed(row):
            pytest.fail("; ".join(missed(row)), pytrace=False)

    return keep


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    machine = describe_machine(torch.device(config.option.device))
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    terminalreporter.section(f"{name}, torch {machine['torch']}")
    terminalreporter.write_line(text(rows))
    wrong = sum(bool(missed(row)) for row in rows)
    with_target = sum(bool(row["targets"]) for row in rows)
    terminalreporter.write_line(
        f"\n{with_target - wrong} of {with_target} rows met all of their targets"
    )
    if config.option.save_results:
        path = results_path(machine)
        write_results(path, machine, config.invocation_params.args, rows)
        terminalreporter.write_line(f"saved as {path}")
