"""`groupconv report`: a layer across group counts, or a list of layers; a table, and a folder of CSV, plots and text."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import importlib.resources
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

GROUPS = (1, 2, 4, 8, 16, 32, 64, 128)
QUICK_GROUPS = (1, 8, 32)
QUICK_LAYERS = 16  # of a list, every 16th
DTYPES = ("bf16", "fp16", "fp32", "tf32")
LAYER_COLUMNS = (
    "name", "N", "C_in", "H", "W", "C_out", "KH", "KW", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w",
    "groups",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `groupconv report`."""
    parser.description = (
        "Reports on one layer across group counts (by default ResNeXt-50's 3x3 at 56x56): parameters, FLOPs, bytes and "
        "time of each pass. On a GPU times are measured; without one they are modelled for --target, kernels are "
        "compiled for it, and their numbers checked under Triton's interpreter."
    )
    add = parser.add_argument
    add("--groups", type=int, nargs="+", metavar="G", help="group counts (default: 1 2 4 ... 128)")
    add("--channels", type=int, nargs="+", default=[128], metavar="C", help="input channels, output channels")
    add("--batch", type=int, default=128, metavar="N", help="images (default: 128)")
    add("--size", type=int, nargs="+", default=[56], metavar="H", help="height, width (default: 56)")
    add("--kernel", type=int, nargs="+", default=[3], metavar="K", help="kernel height, width (default: 3)")
    add("--stride", type=int, nargs="+", default=[1], metavar="S", help="vertical, horizontal stride (default: 1)")
    add("--padding", type=int, nargs="+", metavar="P", help="vertical, horizontal (default: half the kernel)")
    add("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    add("--layout", choices=("nhwc", "nchw"), default="nhwc", help="memory order; nhwc is channels_last (default)")
    add(
        "--layers", default="groups", metavar="LAYERS",
        help='"groups" (default), "suite" for 65 layers of published models, or a CSV with the columns of suite.csv',
    )  # fmt: skip
    add("--target", metavar="DEVICE", help="model this GPU, even where another is present (default: nvidia_h200)")
    add("--budget-seconds", type=float, metavar="S", help="begin nothing after this time; keep what there is")
    add("--out", type=pathlib.Path, metavar="DIR", help="default: perf_reports/<device>")
    add("--quick", action="store_true", help="fewer group counts or layers, for a smoke test")


def run(args: argparse.Namespace) -> int:
    """Make a report; ValueError for arguments that make none, before any work."""
    layers = make_layers(args)
    for package in ("matplotlib", "rich"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install 'groupconv[report]'")
    from groupconv import devices

    target = devices.named(args.target or devices.DEFAULT.slug)

    import torch

    measuring = args.target is None and torch.cuda.is_available()
    if measuring and os.environ.get("TRITON_INTERPRET"):
        # Interpreted kernels say nothing of a GPU, and whether they are is settled when they are imported.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", "groupconv.cli", *sys.argv[1:]], env=environment).returncode

    from . import measure, modelled, rows

    if measuring:
        target = devices.of_device(torch.cuda.current_device())
        gpu, slug = torch.cuda.get_device_name(), target.slug
        total, found = measure.count(layers, target), measure.rows(layers, target)
    else:
        gpu, slug = target.slug, f"modelled_{target.slug}"
        most_groups = modelled.MOST_GROUPS if args.layers == "groups" else modelled.MOST_GROUPS_OF_SUITE
        total, found = modelled.count(layers, target), modelled.rows(layers, target, most_groups)

    deadline = rows.Deadline(args.budget_seconds)
    folder = args.out or pathlib.Path("perf_reports", slug)
    folder.mkdir(parents=True, exist_ok=True)
    environment = rows.environment("measured" if measuring else "modelled", gpu)
    with rows.Writer(folder / "results.csv", environment) as writer, contextlib.closing(found):
        taken = _take(found, total, writer, deadline)
    _write_up(folder, taken, total)
    return 0


def _take(found, total: int, writer, deadline) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import rows

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

    from . import plot, rows, text

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


def make_layers(args: argparse.Namespace) -> list:
    """The layers that the arguments ask for, checked."""
    from .rows import Layer

    if args.budget_seconds is not None and not (math.isfinite(args.budget_seconds) and args.budget_seconds > 0):
        raise ValueError(f"--budget-seconds: {args.budget_seconds} is not a positive number")
    if args.layers != "groups":
        if args.groups:
            raise ValueError("--groups: a list of layers has its own group counts")
        found = _read_layers(args)
        return found[::QUICK_LAYERS] if args.quick else found

    c_in, c_out = _pair(args.channels, "--channels")
    (height, width), (kh, kw) = _pair(args.size, "--size"), _pair(args.kernel, "--kernel")
    stride = _pair(args.stride, "--stride")
    pad_h, pad_w = (kh // 2, kw // 2) if args.padding is None else _pair(args.padding, "--padding", least=0)
    (batch, _) = _pair([args.batch], "--batch")
    groups = args.groups
    if groups is None:
        groups = [g for g in (QUICK_GROUPS if args.quick else GROUPS) if c_in % g == 0 and c_out % g == 0]
    for count in groups:
        if count < 1:
            raise ValueError(f"--groups: {count} is not a positive number")
        for channels, which in ((c_in, "input"), (c_out, "output")):
            if channels % count:
                raise ValueError(f"--groups: {count} does not divide the {channels} {which} channels")

    from groupconv.problem import ConvProblem

    problem = ConvProblem(
        batch, c_in, height, width, c_out, kh, kw, stride, (pad_h, pad_h, pad_w, pad_w),
        dtype=args.dtype, layout=args.layout, out_layout=args.layout,
    )  # fmt: skip
    if min(problem.h_out, problem.w_out) < 1:
        raise ValueError(f"--size: a {kh}x{kw} kernel does not fit {height}x{width} pixels with this padding")
    return [Layer(f"g{count}", dataclasses.replace(problem, groups=count)) for count in sorted(set(groups))]


def _pair(values: list[int], option: str, least: int = 1) -> tuple[int, int]:
    if len(values) > 2:
        raise ValueError(f"{option}: {len(values)} numbers, but at most 2 are taken")
    for value in values:
        if value < least:
            raise ValueError(f"{option}: {value} is not {'a positive number' if least else 'zero or more'}")
    return values[0], values[-1]


def _read_layers(args: argparse.Namespace) -> list:
    from groupconv.problem import ConvProblem

    from .rows import Layer

    if args.layers == "suite":
        text = importlib.resources.files(__package__).joinpath("suite.csv").read_text(encoding="utf-8")
    else:
        path = pathlib.Path(args.layers)
        if not path.is_file():
            raise ValueError(f'--layers: {args.layers!r} is not "groups", "suite" or a CSV file that exists')
        text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in LAYER_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"--layers: {args.layers} has no column {', '.join(missing)}")
    layers = []
    for number, line in enumerate(reader, start=2):
        where = f"--layers: {args.layers}, line {number}"
        try:
            batch, c_in, h, w, c_out, kh, kw, sh, sw, ph, pw, dh, dw, groups = (
                int(line[name]) for name in LAYER_COLUMNS[1:]
            )
        except (TypeError, ValueError):
            raise ValueError(f"{where}: a size is not a whole number") from None
        if min(batch, c_in, h, w, c_out, kh, kw, sh, sw, dh, dw, groups) < 1 or min(ph, pw) < 0:
            raise ValueError(f"{where}: a size is not positive")
        if c_in % groups or c_out % groups:
            raise ValueError(f"{where}: {groups} groups do not divide {c_in} and {c_out} channels")
        problem = ConvProblem(
            batch, c_in, h, w, c_out, kh, kw, (sh, sw), (ph, ph, pw, pw), (dh, dw), groups,
            args.dtype, args.layout, args.layout,
        )  # fmt: skip
        if min(problem.h_out, problem.w_out) < 1:
            raise ValueError(f"{where}: the kernel does not fit")
        layers.append(Layer(line["name"], problem))
    if not layers:
        raise ValueError(f"--layers: {args.layers} has no layers")
    return layers
