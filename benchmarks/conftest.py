"""The options of ``pytest benchmarks``, the list of its rows, and the table at its end."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

import fastlora

from .cases import cpu_cases, gpu_cases, host_cases
from .compare import Pair, check_ref, pair_with
from .releases import ROWS
from .report import heading, text
from .results import FOLDER, describe_machine, results_path, write_results

_ROWS = pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    option = parser.getgroup("fastlora").addoption
    option("--device", choices=("cpu", "cuda"), default="cpu", help="the device to measure")
    release = "measure and save this release's rows (releases.py)"
    option("--release", action="store_true", help=release)
    option("--host", action="store_true", help="the host's time for a GPU, without a GPU (host.py)")
    option("--base", metavar="REF", help="compare fastlora with this commit's")
    seconds = "seconds for the rounds of a row; more on a shared machine"
    option("--seconds", type=float, default=2.0, help=seconds)
    saves = f"write {FOLDER}/<device>/[NAME-]<date>.json"
    option("--save-results", nargs="?", const="", metavar="NAME", help=saves)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    config.option.benchmark_quiet = True  # its table has one round a row, of all contestants
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU here")
    if config.option.host:
        if config.option.base is not None:
            why = "--host doesn't support --base: run it in each of the two commits"
            raise pytest.UsageError(why)
        import cuda_standin

        cuda_standin.install()
    if config.option.base is not None:
        check_ref(config.option.base)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the quick rows only on request: their times mean nothing."""
    options = metafunc.config.option
    of_device = gpu_cases if options.device == "cuda" else cpu_cases
    cases = (host_cases if options.host else of_device)()
    cases = [case for case in cases if not case.tiny or "quick" in options.keyword]
    if options.release:
        cases = [case for case in cases if case.id in ROWS]
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair | None]:
    """The two commits that ``--base`` compares, whose files are removed even after Ctrl-C."""
    options = request.config.option
    with pair_with(options.base, options.device) if options.base else nullcontext() as found:
        yield found


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[dict]:
    """The rows of the table and of the results file."""
    return request.config.stash[_ROWS]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not (rows := config.stash[_ROWS]):
        return
    machine = describe_machine(torch.device(config.option.device))
    terminalreporter.section(heading(machine))
    terminalreporter.write_line(text(rows))
    met = [all(each["met"] for each in row["targets"]) for row in rows if row["targets"]]
    terminalreporter.write_line(f"\n{sum(met)} of {len(met)} rows met all of their targets")
    options = config.option
    if options.release or options.save_results is not None:
        named = options.save_results or "host" * options.host
        name = f"release-{fastlora.__version__}" if options.release else named
        path = results_path(machine, name=name)
        write_results(path, machine, config.invocation_params.args, rows)
        terminalreporter.write_line(f"saved as {path}")
