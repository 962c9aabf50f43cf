"""`make gpu`: everything that a GPU is needed for, in one folder and in as many runs as it takes; `make ship`.

    python -m groupconv.perf_reports.gpu_run --out DIR --budget-seconds S
    python -m groupconv.perf_reports.gpu_run ship DIR

Tests, tuning, benchmarks and plots, each step a command of its own that goes on where an earlier run ended. The folder
holds at most 8 files: tests.txt, <device>.json and its journal <device>.jsonl, bench.csv, host.csv, models.csv,
REPORT.md and plots.pdf. Run from the checkout's root.

`ship` makes what lies in the folder the project's own: configurations go to autotune_configs/, CSV files with plots and
REPORT.md to perf_reports/<device>/. Nothing is copied unless all of it is measured, on one device that is none of ours
to pretend, with the kernels as they are.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

from groupconv import configs, devices
from groupconv.common import files, progress
from groupconv.common.progress import Deadline
from groupconv.measuring import stub

from . import plots, text
from .comparison import FILES

WRITE_UP_SECONDS = 30.0  # of the budget, kept for plots and tables
GRACE_SECONDS = 10.0  # after its time, for what a step has begun
TESTS_SHARE = 0.6  # of a run's time
VARIANTS = (("bf16", "nhwc"), ("fp16", "nhwc"), ("bf16", "nchw"), ("fp16", "nchw"))
FAILURES = {"FAILED", "ERROR"}
OUTCOME = re.compile(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED) (tests/\S.*?)\s*$")
GPU_MARK = "pytest.mark.gpu"
TESTS_END = "tests ended"


def main(argv: list[str] | None = None) -> int:
    """Run the steps that the time is enough for, or ship; the exit status is 1 if tests failed or a step did."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["ship"]:
        return ship_command(argv[1:])
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Tests, tuning and benchmarks of the library on a GPU."
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--budget-seconds", type=float, metavar="S", help="what is left is for the next run")
    parser.add_argument("--stub", action="store_true", help="try the steps without a GPU, against a pretended one")
    parser.add_argument("--quick", action="store_true", help="few layers, for a smoke test")
    args = parser.parse_args(argv)
    try:
        Deadline(args.budget_seconds)
        if not (args.stub or torch.cuda.is_available()):
            raise ValueError("there is no GPU here; --stub tries the steps without one")
    except ValueError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(args.budget_seconds and max(1.0, args.budget_seconds - WRITE_UP_SECONDS))
    log = args.out / "tests.txt"
    failed = [] if tests(log, deadline) else ["tests"]
    cut_short = TESTS_END not in log.read_text(encoding="utf-8")
    for command in steps(args):
        if deadline.passed:
            cut_short = True
            break
        print(f"--- groupconv {' '.join(command)}", flush=True)
        left = deadline.left
        seconds = [] if left is None else ["--budget-seconds", f"{max(left, 1.0):.0f}"]
        # The configurations that were tuned are what the benchmark's "auto" goes by.
        environment = os.environ | {"GROUPCONV_CONFIG_DIR": str(args.out.resolve())}
        try:
            line = [sys.executable, "-m", "groupconv", *command, *seconds]
            status = subprocess.run(line, env=environment, timeout=None if left is None else left + GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # killed in the middle: it loses nothing but that
            cut_short = True
            continue
        if status.returncode:
            failed.append(command[0])
    _write_up(args.out)
    print(f"failed: {', '.join(failed)}" if failed else "every step that was begun went well")
    cut_short = cut_short or deadline.passed  # a step ends in time with what it has
    print("Not all is done; the same command goes on." if cut_short or failed else "Everything is done.")
    return 1 if failed else 0


def steps(args: argparse.Namespace) -> list[list[str]]:
    """The commands, what matters most first."""
    common = ["--out", str(args.out), *(["--stub"] if args.stub else []), *(["--quick"] if args.quick else [])]

    def tune(dtype: str, layout: str) -> list[str]:
        return ["tune", *common, "--dtypes", dtype, "--layouts", layout]

    def bench(parts: list[str], *variants: tuple[str, str]) -> list[str]:
        dtypes, layouts = (list(dict.fromkeys(column)) for column in zip(*variants, strict=True))
        return ["bench", *common, "--csv-only", "--parts", *parts, "--dtypes", *dtypes, "--layouts", *layouts]

    first, *others = VARIANTS
    return [
        tune(*first),
        bench(["layers", "host", "models"], first),
        *(tune(*variant) for variant in others),
        bench(["layers"], *VARIANTS),
        bench(["compiled"], first),
    ]


def tests(log: pathlib.Path, deadline: Deadline) -> bool:
    """Whether the GPU tests passed so far. Those that an earlier run got to are not run again, unless it was of another
    commit; a run's tests take at most TESTS_SHARE of its time.
    """
    head = f"commit {files.environment('measured', '')['commit']}"
    written = log.read_text(encoding="utf-8") if log.exists() else ""
    if not written.startswith(head):
        written = f"{head}\n"
        log.write_text(written, encoding="utf-8")
    if TESTS_END not in written:
        left = deadline.left
        done = list(outcomes(written))
        status = _pytest(log, done, None if left is None else left * TESTS_SHARE)
        all_had_run = done and status == pytest.ExitCode.NO_TESTS_COLLECTED
        # Workers that cannot import a file end like workers whose tests fail, but no test of theirs did.
        failures = FAILURES & set(outcomes(log.read_text(encoding="utf-8")).values())
        some_failed = failures and status == pytest.ExitCode.TESTS_FAILED
        if status == pytest.ExitCode.OK or all_had_run or some_failed:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{TESTS_END} with status {status}\n")
        elif status is not None:
            print(f"tests: pytest ended with status {status}; {log} says why")
            return False
    ended = outcomes(log.read_text(encoding="utf-8"))
    counts = collections.Counter(ended.values())
    print(f"tests: {', '.join(f'{count} {outcome.lower()}' for outcome, count in counts.items()) or 'none yet'}")
    for test, outcome in ended.items():
        if outcome in FAILURES:
            print(f"  {outcome} {test}")
    return not FAILURES & set(counts)


def outcomes(log: str) -> dict[str, str]:
    """By test, how it ended."""
    return {match[2]: match[1] for line in log.splitlines() if (match := OUTCOME.search(line))}


def _pytest(log: pathlib.Path, done: list[str], seconds: float | None) -> int | None:
    """pytest's exit status, its output appended to the log; None if the time ended first."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as skipped, log.open("a") as file:
        skipped.write("\n".join(f"--deselect={test}" for test in done))
        skipped.flush()
        workers = min(8, os.cpu_count() or 1)
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-n", str(workers), "--timeout", "200"]
        # Other files' tests need none, but their imports may need what only a development machine has.
        marked = [str(path) for path in sorted(pathlib.Path("tests").glob("test_*.py")) if GPU_MARK in path.read_text()]
        command += ["-p", "no:cacheprovider", f"@{skipped.name}", *marked]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def _write_up(folder: pathlib.Path) -> None:
    """Plots and REPORT.md of the CSV files there are, and a short table."""
    if not (folder / "bench.csv").exists():
        return
    plots.write_pdf(plots.draw_bench(folder), folder / "plots.pdf")
    files.write_atomically(folder / "REPORT.md", text.bench(folder))
    progress.console().print(text.bench_table(folder))


def ship_command(argv: list[str]) -> int:
    """Ship a folder; exit status 2 if it holds what must not be."""
    parser = argparse.ArgumentParser(prog="make ship", description="Take a GPU's results into the project.")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path(), help="the checkout's root (default: here)")
    args = parser.parse_args(argv)
    try:
        for path in ship(args.folder, args.to):
            print(path)
    except (ValueError, OSError) as error:
        print(f"make ship: {error}", file=sys.stderr)
        return 2
    return 0


def ship(folder: pathlib.Path, root: pathlib.Path) -> list[pathlib.Path]:
    """Check and copy; the files written. ValueError says what must not be shipped."""
    for name in ("autotune_configs", "perf_reports"):
        if not (root / name).is_dir():
            raise ValueError(f"{root} is no checkout of groupconv: it has no {name}")
    parsed = [
        configs.parse_device(path.read_text(encoding="utf-8"), path.name) for path in sorted(folder.glob("*.json"))
    ]
    if len(parsed) != 1:
        raise ValueError(f"{folder} must hold the configuration file of one device, but holds {len(parsed)}")
    (file,) = parsed
    slug = devices.slugify(file.device)
    if file.kind != "measured" or stub.NAME in (slug, file.path.removesuffix(".json")):
        raise ValueError(f"{file.path}: a stub clock's times are not measurements")
    if file.path != f"{slug}.json":
        raise ValueError(f"{file.path} is of {file.device}, whose file is called {slug}.json")
    if file.stale:
        raise ValueError(f"{file.path}: {file.stale} entries were measured with other kernels")
    tables = {name: folder / name for name in FILES if (folder / name).exists()}
    for name, path in tables.items():
        for row in files.read(path, FILES[name]):
            if row["kind"] != "measured" or row["gpu"] != file.device:
                raise ValueError(f"{name}: a row of {row['gpu']} is {row['kind']}, not measured on {file.device}")
    reports = root / "perf_reports" / slug
    reports.mkdir(exist_ok=True)
    written = [root / "autotune_configs" / file.path]
    shutil.copyfile(folder / file.path, written[0])
    for name, path in tables.items():
        shutil.copyfile(path, reports / name)
        written.append(reports / name)
    if tables:
        written += plots.write(plots.draw_bench(reports), reports)
        files.write_atomically(reports / "REPORT.md", text.bench(reports))
        written.append(reports / "REPORT.md")
    return written


if __name__ == "__main__":
    sys.exit(main())
