"""`groupconv advise`: parameters and FLOPs of a layer against the time of a training step, across groups and widths.

On a GPU what calls are planned to run is timed; without one, times are modelled.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from groupconv import devices, dispatch, workers
from groupconv.common import Layer, files, grouped, progress
from groupconv.common.files import ENVIRONMENT, Row
from groupconv.devices import Target
from groupconv.measuring.contenders import same_layout
from groupconv.measuring.lab import Lab, this_gpu, tried
from groupconv.problem import PASSES, PLANNED, ConvProblem

from . import layers, plots
from . import rows as rows_
from .text import number, provenance

FIELDS = (
    *ENVIRONMENT, "layer", "c_in", "c_out", "groups", "own", "params", "flops", "bytes", "fprop_us", "backward_us",
    "step_us", "times", "takes", "shuffle_us", "shuffle", "front", "trap",
)  # fmt: skip
WIDTHS = (0.75, 1.0, 1.25)  # of the layer's own channels
MULTIPLE = 16  # channels of a near width: a matrix unit's, and 32 bytes of bf16
# A trap is a choice beside which another, of no fewer parameters and FLOPs, takes at most so much of its time.
TRAP = 0.8
MOST_PANELS = 6


@dataclasses.dataclass(frozen=True)
class Choice:
    """A layer with a number of groups and channels, and what a training step of it takes.

    own: it is the layer as it was asked about. times: "measured" or "modelled". takes: the algorithms of fprop, and of
    dgrad and wgrad or of both in one kernel. shuffle_us: what a channel shuffle of the result adds, modelled.
    """

    problem: ConvProblem
    own: bool
    fprop_us: float
    backward_us: float
    times: str
    takes: str
    shuffle_us: float

    @property
    def step_us(self) -> float:
        return self.fprop_us + self.backward_us

    @property
    def work(self) -> tuple[int, int]:
        """Parameters and FLOPs."""
        return self.problem.params, sum(self.problem.flops(pass_) for pass_ in PASSES)

    def no_less_than(self, other: Choice) -> bool:
        return all(mine >= theirs for mine, theirs in zip(self.work, other.work, strict=True))


def problems(own: ConvProblem, groups: Sequence[int] | None) -> list[ConvProblem]:
    """A layer at its own and near widths, with group counts that divide them: `groups`, or where there are none the
    powers of two, 3, 5 and 7 times those, and depthwise.
    """
    found = [own]
    for scale in WIDTHS:
        c_in, c_out = (
            size if scale == 1 else max(MULTIPLE, round(size * scale / MULTIPLE) * MULTIPLE)
            for size in (own.c_in, own.c_out)
        )
        counts = groups or [*(odd << power for odd in (1, 3, 5, 7) for power in range(c_in.bit_length())), c_in]
        for count in counts:
            if c_in % count == 0 and c_out % count == 0:
                found.append(dataclasses.replace(own, c_in=c_in, c_out=c_out, groups=count))
    return sorted(set(found), key=lambda problem: (problem.c_in, problem.c_out, problem.groups))


def choices(problems_: list[ConvProblem], own: ConvProblem, target: Target, lab: Lab | None = None) -> list[Choice]:
    """What a training step of each problem takes: on a lab, by what calls of it are planned to run; else modelled.

    One kind for all, so that they compare: measurements of their classes may be of other sizes.
    """
    found = []
    for problem in problems_:
        times = _modelled(problem, target) if lab is None else _measured(problem, lab)
        backward: tuple[str, ...] = ("dgrad", "wgrad")
        if "backward" in times and times["backward"][1] < sum(times[pass_][1] for pass_ in backward):
            backward = ("backward",)
        passes = ("fprop", *backward)
        takes = ", ".join("F.conv2d" if times[pass_][0] == "torch" else times[pass_][0] for pass_ in passes)
        y_bytes = problem.out_pixels * problem.c_out * problem.element_bytes
        found.append(
            Choice(
                problem, problem == own, times["fprop"][1], sum(times[pass_][1] for pass_ in backward),
                "modelled" if lab is None else lab.kind, takes, 2 * y_bytes / target.copy_gbps / 1e3,
            )
        )  # fmt: skip
    return found


def _modelled(problem: ConvProblem, target: Target) -> dict[str, tuple[str, float]]:
    return {pass_: dispatch.expected(problem, pass_, target) for pass_ in PLANNED}


def _measured(problem: ConvProblem, lab: Lab) -> dict[str, tuple[str, float]]:
    """Of each pass what its plan takes, or F.conv2d where that fails; and the median of its times."""
    times = {}
    with lab.subject(problem) as subject:
        for pass_ in PLANNED:
            plan = rows_.taken(problem, pass_, lab.target)
            if plan is None:
                continue
            contender = rows_.contender(problem, plan)
            if tried(subject, pass_, contender).fault:
                contender = same_layout(problem)
            raced = subject.race(pass_, [contender], rows_.ROUNDS)[contender.name]
            times[pass_] = plan.algorithm if contender.ours else "torch", statistics.median(raced)
            subject.forget(pass_)
    return times


def front(swept: list[Choice]) -> list[Choice]:
    """The choices beside which none has more parameters in no more time, or as many in less, by parameters."""
    best: list[Choice] = []
    for each in sorted(swept, key=lambda each: (each.step_us, -each.problem.params)):
        if not best or each.problem.params > best[-1].problem.params:
            best.append(each)
    return best


def trap(this: Choice, swept: list[Choice]) -> Choice | None:
    """The fastest choice of no fewer parameters and FLOPs that makes this one a trap, or None."""
    better = [c for c in swept if c.no_less_than(this) and c.step_us <= TRAP * this.step_us]
    return min(better, key=lambda each: each.step_us, default=None)


def shuffle(problem: ConvProblem, followed: bool | None) -> str:
    """Whether a channel shuffle is advisable behind a layer. followed: by another grouped one; None: nobody knows."""
    if problem.groups == 1 or problem.cin_g == 1:
        return "no"
    return {None: "if the next is grouped", True: "yes", False: "no"}[followed]


def rows(layer: Layer, swept: list[Choice], followed: bool | None) -> list[dict]:
    """A layer's choices as rows of advise.csv."""
    best = front(swept)
    listed = []
    for each in swept:
        better, problem = trap(each, swept), each.problem
        params, flops = each.work
        listed.append({
            "layer": layer.name, "c_in": problem.c_in, "c_out": problem.c_out, "groups": problem.groups,
            "own": "yes" if each.own else "", "params": params, "flops": flops,
            "bytes": sum(problem.min_bytes(pass_) for pass_ in PASSES),
            "fprop_us": each.fprop_us, "backward_us": each.backward_us, "step_us": each.step_us,
            "times": each.times, "takes": each.takes, "shuffle_us": each.shuffle_us,
            "shuffle": shuffle(problem, followed), "front": "yes" if each in best else "",
            "trap": "" if better is None else f"{_name(better.problem)} takes {number(better.step_us)} us",
        })  # fmt: skip
    return listed


def _name(problem: ConvProblem) -> str:
    return f"{problem.c_in} to {problem.c_out} in {problem.groups}"


def table(name: str, listed: list[Row]) -> Table:
    """The choices that matter of a layer: its own, the front, and the traps of its own width."""
    own = next(row for row in listed if row["own"])
    shown = Table(title=f"{name}: a training step, {provenance(listed)}")
    for column in ("channels", "groups", "parameters", "GFLOP", "MB", "us", "over own", "times", "shuffle, us", ""):
        shown.add_column(column, justify="left" if column in ("times", "") else "right")
    for row in listed:
        if row["own"] or row["front"] or (row["trap"] and row["c_in"] == own["c_in"]):
            remarks = ["own" * bool(row["own"]), "front" * bool(row["front"])]
            remarks.append(f"trap: {row['trap']}" if row["trap"] else "")
            shown.add_row(
                f"{row['c_in']} to {row['c_out']}", row["groups"], number(row["params"]),
                number(float(row["flops"]) / 1e9), number(float(row["bytes"]) / 1e6), number(row["step_us"]),
                f"{float(row['step_us']) / float(own['step_us']):.2f}", row["times"],
                f"{number(row['shuffle_us'])} ({row['shuffle']})" if row["shuffle"] != "no" else "-",
                ", ".join(filter(None, remarks)),
            )  # fmt: skip
    return shown


def draw(listed: list[Row]) -> Figure:
    """Time against parameters, a panel a layer, of those that take longest."""
    by_layer = grouped(listed, lambda row: row["layer"])
    own_us = {name: max(float(row["step_us"]) for row in mine if row["own"]) for name, mine in by_layer.items()}
    chosen = sorted(by_layer, key=lambda name: -own_us[name])[:MOST_PANELS]
    columns = min(2, len(chosen))
    figure = Figure(figsize=(7.5 * columns, 5.2 * -(-len(chosen) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(chosen) // columns), columns, squeeze=False).flat
    for name, axes in zip(chosen, panels, strict=False):
        _panel(axes, name, by_layer[name])
    for axes in list(panels)[len(chosen) :]:
        axes.remove()
    figure.suptitle(f"A training step against parameters; groups beside the points\n{provenance(listed)}", fontsize=10)
    return figure


def _panel(axes: Axes, name: str, listed: list[Row]) -> None:
    def at(rows: list[Row]) -> tuple[list[float], list[float]]:
        return [float(row["params"]) for row in rows], [float(row["step_us"]) for row in rows]

    best = sorted((row for row in listed if row["front"]), key=lambda row: float(row["params"]))
    axes.plot(*at(best), color="0.6", linewidth=1.2, label="Pareto front", zorder=1)
    for (width, mine), (colour, marker) in zip(
        grouped(listed, lambda row: row["c_in"]).items(), plots.OWN_STYLES, strict=False
    ):
        axes.plot(*at(mine), linestyle="none", color=colour, marker=marker, label=f"{width} channels")
        for row in mine:
            axes.annotate(
                row["groups"], (float(row["params"]), float(row["step_us"])), (4, 4), textcoords="offset points",
                fontsize=7, color=colour,
            )  # fmt: skip
    traps, own = [row for row in listed if row["trap"]], [row for row in listed if row["own"]]
    if traps:
        axes.plot(*at(traps), label="trap", linestyle="none", marker="x", markersize=11, color="black")
    axes.plot(*at(own), label="own", linestyle="none", marker="o", markersize=13, fillstyle="none", color="black")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("time of a step, us")
    axes.set_title(name, fontsize=9)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False)


def run(args: argparse.Namespace) -> int:
    """`groupconv advise`; ValueError for arguments that make no layer, before any work."""
    deadline = progress.Deadline(args.budget_seconds)
    target = devices.named(args.target or devices.DEFAULT.slug)
    asked = layers.make(_own(args), args.dtype, args.layout)
    followed: dict[str, bool] = {}
    if args.model is not None:
        batch, size = 128 if args.batch is None else args.batch, None if args.size is None else args.size[0]
        followed = layers.followed_by_groups(args.model, batch, size)
    if args.groups:
        layers.make(args, args.dtype, args.layout)  # raises for a count that does not divide
    counts = args.groups or (layers.QUICK_GROUPS if args.quick else None)
    lab: Lab | None = None
    if args.target is None and torch.cuda.is_available():
        status = workers.rerun_compiling(args.argv)
        if status is not None:
            return status
        lab = this_gpu()
        target = lab.target
    folder = args.out or pathlib.Path("perf_reports", f"advise_{target.slug}")
    folder.mkdir(parents=True, exist_ok=True)
    environment = files.environment("modelled" if lab is None else lab.kind, target.slug)
    with (
        progress.shown("advise", "layers", len(asked)) as step,
        files.Writer(folder / "advise.csv", FIELDS, environment) as writer,
    ):
        for layer in asked:
            timed_by = None if deadline.passed else lab
            swept = choices(problems(layer.problem, counts), layer.problem, target, timed_by)
            for row in rows(layer, swept, followed.get(layer.name)):
                writer.append(row | {"kind": swept[0].times})
            step(layer.name)
    written = files.read(folder / "advise.csv", FIELDS)
    plots.write({"advise": draw(written)}, folder)
    console = progress.console()
    for name, mine in grouped(written, lambda row: row["layer"]).items():
        console.print(table(name, mine))
    print(f"advise.csv, advise.png in {folder}")
    return 0


def _own(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of the layer that is asked about: the first of the group counts that are."""
    if args.model is not None or args.layers != "groups":
        return args
    return argparse.Namespace(**vars(args) | {"groups": (args.groups or [1])[:1]})
