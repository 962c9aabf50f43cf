"""`groupconv report` and `groupconv bench`: tables of rows in a folder, and plots and REPORT.md made of them.

A report is of one layer across group counts or kernel sizes, or of a list of layers, modelled where there is no GPU. A
bench has every peer, the host's time of a call and whole models; a run that ended early goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence

import torch

from groupconv import devices, options, workers
from groupconv.common import Layer, files, progress
from groupconv.common.files import Row
from groupconv.common.progress import Deadline
from groupconv.compiling.compiler import Compiler
from groupconv.measuring import stub
from groupconv.measuring.lab import DeviceLost, Lab, this_gpu

from . import counted, host_overhead, layers, plots, rows, text, training
from .comparison import FILES

RESULTS = "results.csv"
SHOWN = ("layer", "pass", "model", "layout", "step", "mode", "provider")  # of a row, as it comes


def report(args: argparse.Namespace) -> int:
    """Make a report; ValueError for arguments that make none, before any work."""
    deadline = Deadline(args.budget_seconds)
    target = devices.named(args.target or devices.DEFAULT.slug)
    measuring = args.target is None and torch.cuda.is_available()
    chosen = layers.make(args, args.dtype, args.layout, layers.GROUPS if measuring else layers.UNMEASURED_GROUPS)
    status = workers.rerun_compiling(args.argv) if measuring else None
    if status is not None:
        return status

    new_rows: Generator[rows.Fields, None, None]
    if measuring:
        gpu = this_gpu()
        environment, slug = files.environment("measured", gpu.name), gpu.target.slug
        total, new_rows = rows.count_measured(chosen, gpu.target), rows.measured(chosen, gpu)
    else:
        environment, slug = files.environment("modelled", target.slug), f"modelled_{target.slug}"
        total, new_rows = rows.count_modelled(chosen, target), rows.modelled(chosen, target)

    folder = args.out or pathlib.Path("perf_reports", slug)
    folder.mkdir(parents=True, exist_ok=True)
    # What an earlier run left stays whole until all of this one is there: inside, as a mounted folder takes files from
    # no other file system by a rename.
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as temporary:
        unfinished = pathlib.Path(temporary)
        with files.Writer(unfinished / RESULTS, rows.FIELDS, environment) as writer:
            taken, _ = _take("report", "rows", new_rows, writer, deadline, total)
        table = files.read(unfinished / RESULTS, rows.FIELDS)
        drawn = [path.name for path in plots.write(plots.draw(table), unfinished)]
        whole = not measuring and taken == total
        suite = layers.suite(args.dtype, args.layout) if whole else []
        served, chains = rows.served(suite, target), rows.chains(suite, target)
        examples = counted.of_present_kernels(target.arch_name) if whole else []
        files.write_atomically(
            unfinished / "REPORT.md", text.report(table, drawn, taken, total, served, chains, examples)
        )
        names = [RESULTS, "REPORT.md", *drawn]
        for name in names:
            os.replace(unfinished / name, folder / name)
    console = progress.console()
    for printed in text.tables(table):
        console.print(printed)
    if taken < total:
        console.print(f"The time budget ended after {taken} of {total} rows.", style="red")
    print(f"{', '.join(names)} in {folder}")
    return 0


def _take(
    command: str, unit: str, new_rows: Generator[rows.Fields, None, None], writer: files.Writer, deadline: Deadline,
    total: int | None = None, ends: Callable[[rows.Fields], bool] = lambda row: True,
) -> tuple[int, bool]:  # fmt: skip
    """Write rows as they come, and say so. How many, and whether the budget ended it, after a row that `ends` a part.

    total: how many there are, if that is known.
    """
    taken, ended = 0, False
    with progress.shown(command, unit, total) as step, contextlib.closing(new_rows):  # with its processes
        for row in new_rows:
            writer.append(row)
            step(" ".join(str(row[field]) for field in SHOWN if row.get(field)))
            taken += 1
            ended = deadline.passed and ends(row)
            if ended:
                break
    return taken, ended


def bench(args: argparse.Namespace) -> int:
    """Benchmark; ValueError for arguments that make no run, before any work."""
    deadline = Deadline(args.budget_seconds)
    if args.stub and args.out is None:
        raise ValueError("--stub: its times are pretended, so it needs --out")
    for model in args.models or ():
        layers.builder(model)
    chosen = layers.variants(args)
    if not (args.stub or torch.cuda.is_available()):
        raise ValueError("there is no GPU here; --stub needs none, and `groupconv report` models one")
    # The stub runs no kernels, but the host's part of a launch is that of compiled ones.
    compiled = not args.stub or "host" in args.parts
    status = workers.rerun_compiling(args.argv) if compiled else None
    if status is not None:
        return status
    lab: Lab = stub.StubLab(devices.DEFAULT) if args.stub else this_gpu()
    folder = args.out or pathlib.Path("perf_reports", lab.target.slug)
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(args, chosen, lab, folder, deadline)
    complete, ended = True, ""
    try:
        for part in args.parts:
            complete &= run.part(part)
    except DeviceLost as error:
        ended = f"the GPU was lost: {error}; the same command goes on from here"
    if not args.csv_only:
        plots.write(plots.draw_bench(folder), folder)
        files.write_atomically(folder / "REPORT.md", text.bench(folder))
        console = progress.console()
        console.print(text.bench_table(folder))
        console.print(f"REPORT.md and plots in {folder}", markup=False, highlight=False)
    if ended or not complete:
        print(ended or "The time budget ended; the same command goes on from here.", file=sys.stderr)
    return 1 if ended else 0


class _Run:
    """A bench: its parts, each of which adds to a CSV what it lacks."""

    def __init__(
        self, args: argparse.Namespace, chosen: list[Layer], lab: Lab, folder: pathlib.Path, deadline: Deadline
    ):
        self.args, self.chosen, self.lab, self.folder, self.deadline = args, chosen, lab, folder, deadline
        self.environment = files.environment(lab.kind, lab.name)

    def part(self, part: str) -> bool:
        """Whether it is complete."""
        run = {"layers": self._layers, "compiled": self._compiled, "host": self._host, "models": self._models}[part]
        return not self.deadline.passed and run()

    def _layers(self) -> bool:
        known = self._known("bench.csv")
        finished = {pass_of(row) for row in known if row["provider"] == "auto"}
        kept = [row for row in known if row["provider"] in (*rows.LIMITS, "torch_compile") or pass_of(row) in finished]
        chosen = [name for name in rows.PEERS if name != "torch_compile"]
        with contextlib.ExitStack() as stack:
            compiler = None if self.args.stub else stack.enter_context(Compiler(workers.processes()))
            new_rows = rows.measured(self.chosen, self.lab, chosen, lambda row: pass_of(row) in finished, compiler)
            # The rows of a pass come together: those of half a one would have to be measured again.
            return self._append("bench.csv", kept, new_rows, lambda row: row["provider"] == "auto")

    def _compiled(self) -> bool:
        kept = self._known("bench.csv")
        finished = {pass_of(row) for row in kept if row["provider"] == "torch_compile"}
        new_rows = rows.of_peer(self.chosen, self.lab, "torch_compile", lambda row: pass_of(row) in finished)
        return self._append("bench.csv", kept, new_rows)

    def _host(self) -> bool:
        if not self._known("host.csv"):
            whole = list(host_overhead.rows())  # a part of them would be taken for all by the next run
            self._append("host.csv", [], (row for row in whole), lambda row: False)
        return True

    def _models(self) -> bool:
        if self.args.stub:
            return True  # there is nothing to pretend: a training step needs a GPU
        models = self.args.models
        if models is None and importlib.util.find_spec("timm") is None:
            print("no whole models: timm is not installed", file=sys.stderr)
            return True
        known = self._known("models.csv")
        finished = {(row["model"], row["layout"]) for row in known if row["provider"] == "groupconv"}
        pairs = [(model, layout) for model in models or options.MODELS for layout in ("nhwc", "nchw")]
        batch = 128 if self.args.batch is None else self.args.batch
        size = None if self.args.size is None else self.args.size[0]
        new_rows = (
            row
            for model, layout in pairs
            if (model, layout) not in finished
            for row in training.rows([model], [layout], batch, size)
        )
        kept = [row for row in known if (row["model"], row["layout"]) in finished]
        return self._append("models.csv", kept, new_rows)

    def _known(self, name: str) -> list[Row]:
        """The rows of an earlier run like this one. A file of another is kept under another name."""
        path = self.folder / name
        if not path.exists():
            return []
        try:
            known = files.read(path, FILES[name])
        except ValueError:
            known = None
        if known is None or any(row[field] != value for row in known for field, value in self.environment.items()):
            files.put_aside(path)
            return []
        return known

    def _append(
        self, name: str, kept: Sequence[Row], new_rows: Generator[rows.Fields, None, None],
        ends: Callable[[rows.Fields], bool] = lambda row: True,
    ) -> bool:  # fmt: skip
        """Add rows to the kept ones of a table; whether all came in time. ends: after which the budget may end it."""
        with files.Writer(self.folder / name, FILES[name], self.environment, kept) as writer:
            return not _take("bench", f"rows of {name}", new_rows, writer, self.deadline, ends=ends)[1]


def pass_of(row: rows.Fields) -> tuple[str, ...]:
    """What tells a pass of a layer from others."""
    return tuple(str(row[field]) for field in ("layer", "pass", *rows.PROBLEM_FIELDS))
