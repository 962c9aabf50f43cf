"""`groupconv trials`: the results of races in users' own calls, as a table."""

from __future__ import annotations

import argparse
import pathlib

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import configs, devices, raced

COLUMNS = ("pass", "problems", "ours", "us", "F.conv2d us", "taken", "when")


def run(args: argparse.Namespace) -> int:
    """Print a table a device. ValueError for a target that nobody knows."""
    folder, console = configs.user_folder(), Console()
    only = None if args.target is None else devices.named(args.target).slug
    paths = [] if folder is None else sorted(folder.glob("*.trials.jsonl"))
    paths = [path for path in paths if only in (None, path.name.removesuffix(".trials.jsonl"))]
    for path in paths:
        console.print(_table(path))
    if not paths:
        console.print(f"no results of trials in {folder or 'any folder: there is none for users'}")
    return 0


def _table(path: pathlib.Path) -> Table:
    table = Table(title=escape(str(path)), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column.endswith("us") else "left")
    for found, made_with in raced.read(path):
        entry, holds = found.entry, made_with == raced.made_with()
        taken = (entry.algorithm if found.won else "F.conv2d") if holds else "nothing: of other versions"
        table.add_row(
            entry.key["pass"], _problems(entry.key), entry.algorithm, f"{entry.time_us:.1f}",
            f"{entry.torch_time_us:.1f}", taken, found.utc,
        )  # fmt: skip
    return table


def _problems(key: dict) -> str:
    """A class of problems in words: `3x3 s1x1 d1x1 4->4 of ~32 groups, ~56x56 pixels ...`."""
    kernel, stride, dilation = ("x".join(map(str, key[name])) for name in ("k", "stride", "dilation"))
    sizes = f"~{key['groups_bucket']} groups, ~{key['map_bucket']} pixels of ~{key['m_bucket']}"
    return f"{key['dtype']} {key['layout']} {kernel} s{stride} d{dilation} {key['cin_g']}->{key['cout_g']}, {sizes}"
