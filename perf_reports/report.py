"""`groupconv report`: a layer across group counts or kernel sizes, or a list of layers; a table and a folder."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import torch

from .. import devices
from . import layers, measure, modelled, rows

DTYPES = ("bf16", "fp16", "fp32", "tf32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `groupconv report`."""
    parser.description = (
        "Reports on one layer across group counts (by default ResNeXt-50's 3x3 at 56x56), or a depthwise one across "
        "kernel sizes: parameters, FLOPs, bytes and time of each pass. On a GPU times are measured; without one they "
        "are modelled for --target, kernels are compiled for it, and their numbers checked under Triton's interpreter."
    )
    add = parser.add_argument
    add("--groups", type=int, nargs="+", metavar="G", help="group counts (default: 1 2 4 ... 128)")
    add("--channels", type=int, nargs="+", default=[128], metavar="C", help="input channels, output channels")
    add("--batch", type=int, metavar="N", help="images (default: 128; 64 across kernel sizes)")
    add("--size", type=int, nargs="+", default=[56], metavar="H", help="height, width (default: 56)")
    add("--kernel", type=int, nargs="+", metavar="K", help="kernel height, width (default: 3)")
    add("--kernels", type=int, nargs="+", metavar="K", help="with --layers kernels: sizes (default: 1 3 5 ... 31)")
    add("--stride", type=int, nargs="+", default=[1], metavar="S", help="vertical, horizontal stride (default: 1)")
    add("--padding", type=int, nargs="+", metavar="P", help="vertical, horizontal (default: half the kernel)")
    add("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    add("--layout", choices=("nhwc", "nchw"), default="nhwc", help="memory order; nhwc is channels_last (default)")
    add(
        "--layers", default="groups", metavar="LAYERS",
        help='"groups" (default), "kernels" for a depthwise layer across kernel sizes, "suite" for 65 layers of '
        "published models, or a CSV with the columns of suite.csv",
    )  # fmt: skip
    add("--target", metavar="DEVICE", help="model this GPU, even where another is present (default: nvidia_h200)")
    add("--budget-seconds", type=float, metavar="S", help="begin nothing after this time; keep what there is")
    add("--out", type=pathlib.Path, metavar="DIR", help="default: perf_reports/<device>")
    add("--quick", action="store_true", help="fewer group counts, kernel sizes or layers, for a smoke test")


def run(args: argparse.Namespace) -> int:
    """Make a report; ValueError for arguments that make none, before any work."""
    if args.budget_seconds is not None and not (math.isfinite(args.budget_seconds) and args.budget_seconds > 0):
        raise ValueError(f"--budget-seconds: {args.budget_seconds} is not a positive number")
    chosen = layers.make(args)
    for package in ("matplotlib", "rich"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install 'groupconv[report]'")
    target = devices.named(args.target or devices.DEFAULT.slug)
    measuring = args.target is None and torch.cuda.is_available()
    if measuring and os.environ.get("TRITON_INTERPRET"):
        # Interpreted kernels say nothing of a GPU, and whether they are is settled when they are imported.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", "groupconv.cli", *sys.argv[1:]], env=environment).returncode

    if measuring:
        target = devices.of_device(torch.cuda.current_device())
        gpu, slug = torch.cuda.get_device_name(), target.slug
        total, found = measure.count(chosen, target), measure.rows(chosen, target)
    else:
        gpu, slug = target.slug, f"modelled_{target.slug}"
        # A depthwise layer, or a list of published ones, has many groups: too many programs to interpret.
        total, found = modelled.count(chosen, target), modelled.rows(chosen, target, narrow=args.layers != "groups")

    deadline = rows.Deadline(args.budget_seconds)
    folder = args.out or pathlib.Path("perf_reports", slug)
    folder.mkdir(parents=True, exist_ok=True)
    environment = rows.environment("measured" if measuring else "modelled", gpu)
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
