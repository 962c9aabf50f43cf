"""`groupconv report`: a layer across group counts or kernel sizes, or a list of layers; a table and a folder."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator

import torch

from .. import children, devices
from ..tuning import lab
from . import layers, measure, modelled, rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `groupconv report`."""
    parser.description = (
        "Reports on one layer across group counts (by default ResNeXt-50's 3x3 at 56x56), or a depthwise one across "
        "kernel sizes: parameters, FLOPs, bytes and time of each pass. On a GPU times are measured; without one they "
        "are modelled for --target, kernels are compiled for it, and their numbers checked under Triton's interpreter."
    )
    layers.add_arguments(parser, "groups")
    add = parser.add_argument
    add("--dtype", choices=layers.DTYPES, default="bf16", help="default: bf16")
    add("--layout", choices=layers.LAYOUTS, default="nhwc", help="memory order; nhwc is channels_last (default)")
    add("--target", metavar="DEVICE", help="model this GPU, even where another is present (default: nvidia_h200)")
    add("--budget-seconds", type=float, metavar="S", help="begin nothing after this time; keep what there is")
    add("--out", type=pathlib.Path, metavar="DIR", help="default: perf_reports/<device>")


def run(args: argparse.Namespace) -> int:
    """Make a report; ValueError for arguments that make none, before any work."""
    rows.check_budget(args.budget_seconds)
    chosen = layers.make(args, args.dtype, args.layout)
    rows.check_installed("matplotlib", "rich")
    target = devices.named(args.target or devices.DEFAULT.slug)
    measuring = args.target is None and torch.cuda.is_available()
    status = children.rerun_compiling(args.argv) if measuring else None
    if status is not None:
        return status

    if measuring:
        gpu = lab.this_gpu()
        target, name, slug = gpu.target, gpu.name, gpu.target.slug
        total, found = measure.count(chosen, target), measure.rows(chosen, gpu)
    else:
        name, slug = target.slug, f"modelled_{target.slug}"
        # A depthwise layer, or a list of published ones, has many groups: too many programs to interpret.
        total, found = modelled.count(chosen, target), modelled.rows(chosen, target, narrow=args.layers != "groups")

    deadline = rows.Deadline(args.budget_seconds)
    folder = args.out or pathlib.Path("perf_reports", slug)
    folder.mkdir(parents=True, exist_ok=True)
    environment = rows.environment("measured" if measuring else "modelled", name)
    with rows.Writer(folder / "results.csv", environment) as writer, contextlib.closing(found):
        taken = _take(found, total, writer, deadline)
    _write_up(folder, taken, total)
    return 0


def _take(found: Iterator[dict], total: int, writer: rows.Writer, deadline: rows.Deadline) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("report", total=total)

        def on_row(row: dict) -> None:
            what = " ".join(str(row.get(name, "")) for name in ("layer", "pass", "provider"))
            progress.update(bar, advance=1, description=what.strip())

        return rows.take(found, writer, deadline, on_row)


def _write_up(folder: pathlib.Path, taken: int, total: int) -> None:
    """Plots, REPORT.md and the printed table, from the CSV alone."""
    from rich.console import Console

    from . import plot, text

    kept = rows.read(folder / "results.csv")
    plots = plot.write(kept, folder)
    rows.write_atomically(folder / "REPORT.md", text.markdown(kept, [path.name for path in plots], taken, total))
    console = Console(width=None if sys.stdout.isatty() else 180)
    for table in text.tables(kept):
        console.print(table)
    if taken < total:
        console.print(f"The time budget ended after {taken} of {total} rows.", style="red")
    names = ", ".join(["results.csv", "REPORT.md", *(path.name for path in plots)])
    console.print(f"{names} in {folder}", markup=False, highlight=False)
