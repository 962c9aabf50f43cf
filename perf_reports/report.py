"""`groupconv report`: a layer across group counts or kernel sizes, or a list of layers; a table and a folder."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Generator

import torch
from rich.console import Console

from .. import children, devices, progress
from ..tuning import lab
from . import layers, measure, modelled, plot, rows, text

TABLE = "results.csv"


def run(args: argparse.Namespace) -> int:
    """Make a report; ValueError for arguments that make none, before any work."""
    rows.check_budget(args.budget_seconds)
    target = devices.named(args.target or devices.DEFAULT.slug)
    measuring = args.target is None and torch.cuda.is_available()
    chosen = layers.make(args, args.dtype, args.layout, layers.GROUPS if measuring else layers.UNMEASURED_GROUPS)
    status = children.rerun_compiling(args.argv) if measuring else None
    if status is not None:
        return status

    if measuring:
        gpu = lab.this_gpu()
        target, name, slug = gpu.target, gpu.name, gpu.target.slug
        total, found = measure.count(chosen, target), measure.rows(chosen, gpu)
    else:
        name, slug = target.slug, f"modelled_{target.slug}"
        total, found = modelled.count(chosen, target), modelled.rows(chosen, target)

    deadline = rows.Deadline(args.budget_seconds)
    folder = args.out or pathlib.Path("perf_reports", slug)
    folder.mkdir(parents=True, exist_ok=True)
    environment = rows.environment("measured" if measuring else "modelled", name)
    # What an earlier run left stays whole until all of this one is there: inside, as a mounted folder takes files from
    # no other file system by a rename.
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as made:
        taken = _take(found, total, pathlib.Path(made, TABLE), environment, deadline)
        kept, plots = _write_up(pathlib.Path(made), taken, total)
        names = [TABLE, "REPORT.md", *plots]
        for name in names:
            os.replace(pathlib.Path(made, name), folder / name)
    _show(kept, taken, total)
    print(f"{', '.join(names)} in {folder}")
    return 0


def _take(
    found: Generator[dict, None, None], total: int, path: pathlib.Path, environment: dict[str, str],
    deadline: rows.Deadline,
) -> int:  # fmt: skip
    with (
        rows.Writer(path, environment) as writer,
        progress.shown("report", "rows", total) as step,
        contextlib.closing(found),
    ):

        def on_row(row: dict) -> None:
            step(" ".join(str(row[name]) for name in ("layer", "pass", "provider") if name in row))

        return rows.take(found, writer, deadline, on_row)


def _write_up(folder: pathlib.Path, taken: int, total: int) -> tuple[list[text.Row], list[str]]:
    """Plots and REPORT.md, from the CSV alone; its rows, and the names of the plots."""
    kept = rows.read(folder / TABLE)
    plots = [path.name for path in plot.write(kept, folder)]
    rows.write_atomically(folder / "REPORT.md", text.markdown(kept, plots, taken, total))
    return kept, plots


def _show(kept: list[text.Row], taken: int, total: int) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in text.tables(kept):
        console.print(table)
    if taken < total:
        console.print(f"The time budget ended after {taken} of {total} rows.", style="red")
