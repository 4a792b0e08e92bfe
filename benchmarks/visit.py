"""Everything that a visit to a machine with a GPU should do, in ten minutes, a short table last.

    python -P benchmarks/gpu_visit.py --out FOLDER             all steps, 9 minutes at most
    python -P benchmarks/gpu_visit.py --out FOLDER --only layers --minutes 4
    python -P benchmarks/gpu_visit.py --out FOLDER --dry       tiny, on a CPU, kernels interpreted

Facts, GPU tests, the benchmark, each launch alone, tuning: ``benchmarks/gpu/__init__.py`` has the
overview.  Each step has a share of the time, and a process of its own, which is started again
behind the item that ended it.  FOLDER/<device>/<date>.json is written after every step.  A number
from ``--dry`` says only that the code runs: it never goes into benchmarks/results.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
if "benchmarks" not in sys.modules:
    # Not by sys.path: the repository's kernels/ would hide Hugging Face's package of that name.
    sys.modules["benchmarks"] = package = ModuleType("benchmarks")
    package.__path__ = [str(HERE)]

from benchmarks.gpu.journal import LOST, Journal, describe  # noqa: E402
from benchmarks.gpu.table import table  # noqa: E402

SHARES = {"facts": 0.05, "tests": 0.27, "layers": 0.33, "launches": 0.07, "tuning": 0.28}
_GRACE = 20.0  # seconds that an item may take beyond its step's deadline
_STARTS = 10  # of one step


def main() -> None:
    options = parse()
    folder = options.out / "journal"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jsonl"):
        old.unlink()
    end = time.time() + 60 * options.minutes
    steps = [options.only] if options.only else list(SHARES)
    if options.only and options.only != "facts":
        steps.insert(0, "facts")
    seconds = {}
    for i, name in enumerate(steps):
        start = time.time()
        left = end - start - _GRACE
        share = SHARES[name] / sum(SHARES[each] for each in steps[i:])
        run(name, folder, max(left * share, 5.0), options.dry)
        seconds[name] = round(time.time() - start, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
        results = gather(folder, seconds, options.dry)
        path = write(results, options.out)
    print(f"\n{path}\n")
    for row in results["rows"]:
        if "plan" in row:
            print(f"{row['plan']},")
    print(f"\n{table(results)}")
    if results["steps"]["facts"]["failures"]:
        sys.exit(1)  # there is no GPU


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, interpreted")
    parser.add_argument("--only", choices=SHARES, help="this step alone (and the facts)")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all steps together")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.dry and options.out.is_relative_to(HERE / "results"):
        parser.error("--dry measures nothing: its numbers don't belong in benchmarks/results")
    return options


def run(name: str, folder: Path, seconds: float, dry: bool) -> None:
    """One step, started again behind the item that ended its process, while there is time."""
    journal = Journal(folder / f"{name}.jsonl")
    if name == "tests":
        from benchmarks.gpu.suite import run_suite

        try:
            journal.add(run_suite(ROOT, seconds, dry, environment(dry)))
        except Exception as error:
            journal.fail(name, describe(error))
        return
    deadline = time.time() + seconds
    for _ in range(_STARTS):
        code, tail = start(name, folder, deadline, dry)
        if code == 0:
            return
        reason = "the device was lost" if code == LOST else f"the process ended with {code}"
        in_item = journal.close_unfinished(f"{reason}: {tail}")
        if code != LOST and not in_item:
            journal.fail(name, f"{reason}, outside of any item: {tail}")
            return
        if time.time() > deadline:
            return


def start(name: str, folder: Path, deadline: float, dry: bool) -> tuple[int | str, str]:
    """Exit status, or "timeout", of a step's process, and the end of what it printed."""
    log = folder / f"{name}.log"
    command = [sys.executable, "-P", str(HERE / "gpu_visit.py"), "--step", name, str(folder)]
    command += [str(deadline), str(int(dry))]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(dry), stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=deadline + _GRACE - time.time())
        except subprocess.TimeoutExpired:
            code = "timeout"
        finally:
            _end_group(process)
    return code, log.read_text(encoding="utf-8", errors="replace")[-1500:]


def _end_group(process: subprocess.Popen) -> None:
    """The step and the compilers that it may have left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def environment(dry: bool) -> dict[str, str]:
    """Triton reads TRITON_INTERPRET when the kernels are imported."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if dry:  # one thread: on a busy machine tiny products wait for the others' threads
        kept |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return kept


def gather(folder: Path, seconds: dict[str, float], dry: bool) -> dict:
    """What the journals hold: rows, and for each step its time, failures and what is missing."""
    steps, rows = {}, []
    for name in seconds:
        journal = Journal(folder / f"{name}.jsonl")
        rows += journal.rows
        steps[name] = {
            "seconds": seconds[name],
            "rows": len(journal.rows),
            "failures": journal.failures,
            "skipped": journal.skipped,
        }
    machine = next((row for row in rows if row["table"] == "gpu-facts"), None)
    machine = machine or {"device": "unknown", "date": time.strftime("%Y-%m-%d", time.gmtime())}
    return {"machine": machine, "dry": dry, "steps": steps, "rows": rows}


def write(results: dict, out: Path) -> Path:
    from benchmarks.results import write_results

    rest = {key: value for key, value in results.items() if key not in ("machine", "rows")}
    return write_results(results["rows"], sys.argv[1:], out, results["machine"], **rest)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        from benchmarks.gpu.steps import run_step

        run_step(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5] == "1")
    else:
        main()
