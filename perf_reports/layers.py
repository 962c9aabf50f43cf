"""The layers to report on, from the command line: checked before anything runs."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.resources
import pathlib

from ..problem import ConvProblem
from .rows import Layer

GROUPS = (1, 2, 4, 8, 16, 32, 64, 128)
QUICK_GROUPS = (4, 32)
QUICK_STEP = 16  # of a list of layers, every 16th
COLUMNS = (
    "name", "N", "C_in", "H", "W", "C_out", "KH", "KW", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w",
    "groups",
)  # fmt: skip


def make(args: argparse.Namespace) -> list[Layer]:
    """The layers that the arguments of `groupconv report` ask for; ValueError where they make no convolution."""
    if args.layers != "groups":
        if args.groups:
            raise ValueError("--groups: a list of layers has its own group counts")
        found = _read_layers(args)
        return found[::QUICK_STEP] if args.quick else found

    c_in, c_out = _pair(args.channels, "--channels")
    (height, width), (kh, kw) = _pair(args.size, "--size"), _pair(args.kernel, "--kernel")
    stride = _pair(args.stride, "--stride")
    pad_h, pad_w = (kh // 2, kw // 2) if args.padding is None else _pair(args.padding, "--padding", least=0)
    (batch, _) = _pair([args.batch], "--batch")
    groups = args.groups
    if groups is None:
        groups = [g for g in (QUICK_GROUPS if args.quick else GROUPS) if c_in % g == 0 and c_out % g == 0] or [1]
    for count in groups:
        if count < 1:
            raise ValueError(f"--groups: {count} is not a positive number")
        for channels, which in ((c_in, "input"), (c_out, "output")):
            if channels % count:
                raise ValueError(f"--groups: {count} does not divide the {channels} {which} channels")

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


def _read_layers(args: argparse.Namespace) -> list[Layer]:
    if args.layers == "suite":
        text = importlib.resources.files(__package__).joinpath("suite.csv").read_text(encoding="utf-8")
    else:
        path = pathlib.Path(args.layers)
        if not path.is_file():
            raise ValueError(f'--layers: {args.layers!r} is not "groups", "suite" or a CSV file that exists')
        text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"--layers: {args.layers} has no column {', '.join(missing)}")
    layers: list[Layer] = []
    for number, line in enumerate(reader, start=2):
        where = f"--layers: {args.layers}, line {number}"
        try:
            batch, c_in, h, w, c_out, kh, kw, sh, sw, ph, pw, dh, dw, groups = (int(line[name]) for name in COLUMNS[1:])
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
        if line["name"] in {layer.name for layer in layers}:
            raise ValueError(f"{where}: a second layer called {line['name']!r}")
        layers.append(Layer(line["name"], problem))
    if not layers:
        raise ValueError(f"--layers: {args.layers} has no layers")
    return layers
