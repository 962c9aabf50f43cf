"""`groupconv bench`: our algorithms and what "auto" takes beside PyTorch's ways; layers, host overhead, whole models.

A folder of CSV files, and plots and REPORT.md made of them. A run that ended early goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .. import children, devices, options, progress
from ..tuning import stub
from ..tuning.compiler import Compiler, processes
from ..tuning.lab import DeviceLost, this_gpu
from . import host_overhead, layers, measure, networks, rows, training

SHOWN = ("layer", "pass", "model", "layout", "step", "mode", "provider")  # of a row, as it comes


def run(args: argparse.Namespace) -> int:
    """Benchmark; ValueError for arguments that make no run, before any work."""
    rows.check_budget(args.budget_seconds)
    if args.stub and args.out is None:
        raise ValueError("--stub: its times are pretended, so it needs --out")
    for model in args.models or ():
        networks.builder(model)
    chosen = layers.variants(args)
    if not (args.stub or torch.cuda.is_available()):
        raise ValueError("there is no GPU here; --stub needs none, and `groupconv report` models one")
    # The stub runs no kernels, but the host's part of a launch is that of compiled ones.
    compiled = not args.stub or "host" in args.parts
    status = children.rerun_compiling(args.argv) if compiled else None
    if status is not None:
        return status
    lab = stub.StubLab(devices.DEFAULT) if args.stub else this_gpu()
    folder = args.out or pathlib.Path("perf_reports", lab.target.slug)
    folder.mkdir(parents=True, exist_ok=True)
    run_ = _Run(args, chosen, lab, folder)
    complete, ended = True, ""
    try:
        for part in args.parts:
            complete &= run_.part(part)
    except DeviceLost as error:
        ended = f"the GPU was lost: {error}; the same command goes on from here"
    if not args.csv_only:
        _write_up(folder)
    if ended or not complete:
        print(ended or "The time budget ended; the same command goes on from here.", file=sys.stderr)
    return 1 if ended else 0


class _Run:
    """One run: its parts, each of which adds to a CSV what it lacks."""

    def __init__(self, args: argparse.Namespace, chosen: list[rows.Layer], lab: Any, folder: pathlib.Path):
        self.args, self.chosen, self.lab, self.folder = args, chosen, lab, folder
        self.environment = rows.environment(lab.kind, lab.name)
        self.deadline = rows.Deadline(args.budget_seconds)

    def part(self, part: str) -> bool:
        """Whether it is complete."""
        made = {"layers": self._layers, "compiled": self._compiled, "host": self._host, "models": self._models}[part]
        return not self.deadline.passed and made()

    def _layers(self) -> bool:
        known = self._known("bench.csv", rows.FIELDS)
        finished = {_pass_of(row) for row in known if row["provider"] == "auto"}
        kept = [row for row in known if row["provider"] in (*rows.LIMITS, "torch_compile") or _pass_of(row) in finished]
        chosen = [name for name in measure.PEERS if name != "torch_compile"]
        with contextlib.ExitStack() as stack:
            compiler = None
            if not self.args.stub:
                compiler = stack.enter_context(Compiler(self.lab.target, processes()))
            found = measure.rows(self.chosen, self.lab, chosen, lambda row: _pass_of(row) in finished, compiler)
            # The rows of a pass come together: those of half a one would have to be measured again.
            return self._append("bench.csv", rows.FIELDS, kept, found, lambda row: row["provider"] == "auto")

    def _compiled(self) -> bool:
        kept = self._known("bench.csv", rows.FIELDS)
        finished = {_pass_of(row) for row in kept if row["provider"] == "torch_compile"}
        found = measure.peer_rows(self.chosen, self.lab, "torch_compile", lambda row: _pass_of(row) in finished)
        return self._append("bench.csv", rows.FIELDS, kept, found)

    def _host(self) -> bool:
        if not self._known("host.csv", host_overhead.FIELDS):
            found = list(host_overhead.rows())
            self._append("host.csv", host_overhead.FIELDS, [], iter(found), lambda row: False)
        return True

    def _models(self) -> bool:
        if self.args.stub:
            return True  # there is nothing to pretend: a training step needs a GPU
        models = self.args.models
        if models is None and importlib.util.find_spec("timm") is None:
            print("no whole models: timm is not installed", file=sys.stderr)
            return True
        kept = self._known("models.csv", training.FIELDS)
        finished = {(row["model"], row["layout"]) for row in kept if row["provider"] == "groupconv"}
        pairs = [(model, layout) for model in models or options.MODELS for layout in ("nhwc", "nchw")]
        batch = 128 if self.args.batch is None else self.args.batch
        size = None if self.args.size is None else self.args.size[0]
        found = (
            row
            for model, layout in pairs
            if (model, layout) not in finished
            for row in training.rows([model], [layout], batch, size)
        )
        kept = [row for row in kept if (row["model"], row["layout"]) in finished]
        return self._append("models.csv", training.FIELDS, kept, found)

    def _known(self, name: str, fields: Sequence[str]) -> list[dict[str, str]]:
        """The rows of an earlier run like this one. A file of another is kept under another name."""
        path = self.folder / name
        if not path.exists():
            return []
        try:
            found = rows.read(path, fields)
        except ValueError:
            found = None
        if found is None or any(row[field] != self.environment[field] for row in found for field in self.environment):
            rows.put_aside(path)
            return []
        return found

    def _append(
        self, name: str, fields: Sequence[str], kept: list[dict[str, str]], found: Iterator[dict],
        ends: Callable[[dict], bool] = lambda row: True,
    ) -> bool:  # fmt: skip
        """Write rows as they come; whether all came in time. ends: after which rows the budget may end it."""
        with (
            rows.Writer(self.folder / name, self.environment, fields, kept) as writer,
            progress.shown("bench", f"rows of {name}") as step,
        ):
            for row in found:
                writer.append(row)
                step(" ".join(str(row[field]) for field in SHOWN if row.get(field)))
                if self.deadline.passed and ends(row):
                    return False
        return True


def _pass_of(row: dict) -> tuple[str, ...]:
    """What tells a pass of a layer from others."""
    return tuple(str(row[field]) for field in ("layer", "pass", *rows.PROBLEM_FIELDS))


def _write_up(folder: pathlib.Path) -> None:
    """Plots, REPORT.md and the printed table, from the CSV files alone."""
    from rich.console import Console

    from . import bench_plot, bench_text

    bench_plot.write(folder)
    rows.write_atomically(folder / "REPORT.md", bench_text.markdown(folder))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(bench_text.table(folder))
    console.print(f"REPORT.md and plots in {folder}", markup=False, highlight=False)
