"""A bench's plots, from the CSV files of its folder alone."""

from __future__ import annotations

import math
import os
import pathlib
from operator import itemgetter
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from ..algorithms import REGISTRY
from ..problem import PLANNED
from . import comparison, plot, text
from .bench_text import NAMES, PLOTS, RUN_PLOTS
from .comparison import LOSS, WIDTHS, WIN, Pair, grouped
from .text import Row, timed

OWN = {name: plot.OWN_STYLES[i % len(plot.OWN_STYLES)] for i, name in enumerate(REGISTRY)}
LINES: dict[str, dict[str, Any]] = {
    **{name: {"color": colour, "marker": marker} for name, (colour, marker) in (OWN | plot.TORCH_STYLES).items()},
    "torch_native": {"color": "#E69F00", "marker": "<", "linestyle": ":"},
    "torch_compile": {"color": "#56B4E9", "marker": ">", "linestyle": "-."},
    "flag_gems": {"color": "0.5", "marker": "*", "linestyle": "-."},
}
# Field of a Pair: colour, marker, area, label. The second is drawn over the first, which shows around it.
SERIES = {"auto": ("#0072B2", "o", 42, "auto"), "best": ("#E69F00", "X", 22, "best of PyTorch")}
RESULTS = {
    "win": ("#0072B2", "", f"above {WIN}"),
    "tie": ("0.75", "", "between"),
    "loss": ("#D55E00", "////", f"below {LOSS}"),
}
MARKERS = dict(zip(WIDTHS, ("o", "s", "^"), strict=True))
FILLS = (("#0072B2", ""), ("#E69F00", "///"), ("#009E73", "..."), ("#CC79A7", "xxx"), ("#56B4E9", "\\\\\\"))

LEAST_WIDTH = 10.5  # inches of the narrowest figure, which its title fits


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draw what a bench's folder allows into it, as PNG; the files written."""
    return plot.save(draw(folder), folder)


def pdf(folder: pathlib.Path, path: pathlib.Path) -> int:
    """Draw the same figures as the pages of a PDF; how many. Without any, nothing is written."""
    figures = draw(folder)
    if figures:
        partial = path.with_name(f".{path.name}.partial")
        with PdfPages(partial) as pages:
            for figure in figures.values():
                pages.savefig(figure)
        os.replace(partial, path)
    return len(figures)


def draw(folder: pathlib.Path) -> dict[str, Figure]:
    """What a bench's folder allows, by name."""
    layers, models, host = comparison.read(folder)
    limits = comparison.limits(layers)
    figures: dict[str, Figure] = {}
    for key, mine in comparison.formats(layers).items():
        sweep = [row for row in mine if comparison.is_sweep(row)]
        others = [row for row in mine if not comparison.is_sweep(row)]
        suffix = "_".join(key)
        # Runs into one folder may have left sweeps of several layers, which have no axis in common.
        if any(map(timed, sweep)) and text.across_groups(sweep):
            figures[f"groups_{suffix}"] = _groups(sweep)
        found = comparison.pairs(others)
        if found:
            figures[f"fraction_{suffix}"] = _fractions(others, found)
            figures[f"speedup_{suffix}"] = _speedups(others, found)
            if key[0] in limits:
                figures[f"roofline_{suffix}"] = _rooflines(others, found, *limits[key[0]])
    if any(row["us"] for row in host):
        figures["host"] = _host([row for row in host if row["us"]])
    if any(row["ms_p50"] for row in models):
        figures["models"] = _models(models)
    return figures


def _finish(figure: Figure, rows: list[Row], what: str, *about: str) -> Figure:
    """Title a figure; where nothing was measured, each of its titles and labels says so."""
    plot.titled(figure, rows, what, *about)
    for axes in figure.axes:
        for label in (axes.title, axes.xaxis.label, axes.yaxis.label):
            if label.get_text():
                label.set_text(plot.labelled(rows, label.get_text()))
    return figure


def _panels(rows: list[Row], width: float, height: float, **shared: Any) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a titled panel for each pass that the rows have; sizes in inches, the width that of a panel."""
    passes = [pass_ for pass_ in PLANNED if any(row["pass"] == pass_ for row in rows)]
    figure = Figure(figsize=(max(LEAST_WIDTH, width * len(passes)), height), layout="constrained")
    panels = dict(zip(passes, figure.subplots(1, len(passes), squeeze=False, **shared)[0], strict=True))
    for pass_, axes in panels.items():
        axes.set_title(pass_, fontsize=10)
    return figure, panels


def _grid(axes: Axes) -> None:
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)


def _log_x(axes: Axes, base: int, form: str) -> None:
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_locator(ticker.LogLocator(base=base, numticks=7))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter(form))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _groups(rows: list[Row]) -> Figure:
    """Time across group counts, a line a provider; rings show what "auto" takes."""
    figure, panels = _panels([row for row in rows if timed(row)], 4.2, 5.2, sharex=True, sharey=True)
    for pass_, axes in panels.items():
        for provider, style in LINES.items():
            x, y = plot.points(rows, pass_, provider, "us_p50")
            # Panels share a legend: a provider that lacks one pass is in it all the same.
            if any(row["provider"] == provider and timed(row) for row in rows):
                axes.plot(x, y, label=NAMES.get(provider, provider), **style)
        axes.plot(*plot.points(rows, pass_, "auto", "us_p50"), label="auto", **plot.AUTO)
        floors = sorted({(int(row["groups"]), float(row["floor_us"])) for row in rows if row["pass"] == pass_})
        axes.plot(*zip(*floors, strict=True), label="floor", **plot.FLOOR)
        plot.sweep_axis(axes, rows)
        plot.log_y(axes, "time, us")
        axes.label_outer()
    plot.legend(figure, next(iter(panels.values())))
    return _finish(figure, rows, PLOTS["groups"], text.subject(rows))


def _fractions(rows: list[Row], found: list[Pair]) -> Figure:
    """A line a layer, sorted by what "auto" reaches in its first pass."""
    best: dict[str, float] = {}
    for pair in sorted(found, key=lambda pair: PLANNED.index(pair.auto["pass"])):
        best.setdefault(pair.auto["layer"], float(pair.auto["fraction"]))
    order = sorted(best, key=best.__getitem__)
    figure, panels = _panels([pair.auto for pair in found], 4, 2 + 0.2 * len(order), sharey=True)
    for pass_, axes in panels.items():
        mine = [pair for pair in found if pair.auto["pass"] == pass_]
        y = [order.index(pair.auto["layer"]) for pair in mine]
        x = {name: [100 * float(getattr(pair, name)["fraction"]) for pair in mine] for name in SERIES}
        axes.hlines(y, x["best"], x["auto"], color="0.6", linewidth=1)
        for name, (colour, marker, area, label) in SERIES.items():
            axes.scatter(x[name], y, s=area, color=colour, marker=marker, label=label, zorder=3)
        axes.axvline(100, label="limit", **plot.FLOOR)
        axes.set_xlim(left=0)
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.set_xlabel("floor / time, %")
        _grid(axes)
    plot.legend(figure, next(iter(panels.values())))
    return _finish(figure, rows, PLOTS["fraction"], text.subject(rows))


def _result(pair: Pair) -> str:
    return "win" if pair.speedup > WIN else "loss" if pair.speedup < LOSS else "tie"


def _speedups(rows: list[Row], found: list[Pair]) -> Figure:
    """A bar a layer, from 1, each panel sorted by itself; the mark at its end is the width class."""
    by_pass = grouped(found, lambda pair: pair.auto["pass"])
    most = max(map(len, by_pass.values()))
    width = 3.4 + 0.07 * max(len(pair.auto["layer"]) for pair in found)
    figure, panels = _panels([pair.auto for pair in found], width, 2.2 + 0.2 * most, sharex=True)
    for pass_, axes in panels.items():
        mine = sorted(by_pass[pass_], key=lambda pair: pair.speedup)
        for result, (colour, hatch, label) in RESULTS.items():
            # Bars without a length where the result is another: the legend needs one of each.
            bars = [pair.speedup - 1 if _result(pair) == result else math.nan for pair in mine]
            axes.barh(range(len(mine)), bars, left=1, color=colour, hatch=hatch, edgecolor="white", label=label)
        for name, marker in MARKERS.items():
            ends = [pair.speedup if pair.width == name else math.nan for pair in mine]
            axes.scatter(
                ends, range(len(mine)), marker=marker, s=30, color="black", facecolor="white", zorder=3, label=name
            )
        axes.axvline(1, color="black", linewidth=1.2)
        _log_x(axes, 2, "{x:g}x")
        axes.set_yticks(range(len(mine)), [pair.auto["layer"] for pair in mine], fontsize=8)
        axes.set_ylim(-0.7, most - 0.3)
        axes.set_xlabel("speedup of auto")
        _grid(axes)
    low, high = (pick(pair.speedup for pair in found) for pick in (min, max))
    axes.set_xlim(min(0.5, 0.9 * low), max(2, 1.1 * high))
    plot.legend(figure, axes)
    return _finish(figure, rows, PLOTS["speedup"], text.subject(rows))


def _rooflines(rows: list[Row], found: list[Pair], gbps: float, tflops: float) -> Figure:
    figure, panels = _panels([pair.auto for pair in found], 4.4, 5, sharex=True, sharey=True)
    ends = [float(pair.auto["intensity"]) for pair in found]
    ridge = tflops * 1e3 / gbps
    roof = sorted([min(ends) / 2, max(2 * max(ends), 2 * ridge), ridge])
    for pass_, axes in panels.items():
        mine = [pair for pair in found if pair.auto["pass"] == pass_]
        for name, (colour, marker, area, label) in SERIES.items():
            drawn = [getattr(pair, name) for pair in mine]
            axes.scatter(
                [float(row["intensity"]) for row in drawn], [float(row["tflops"]) for row in drawn],
                s=area, color=colour, marker=marker, label=label,
            )  # fmt: skip
        axes.plot(roof, [min(x * gbps / 1e3, tflops) for x in roof], label="limit", **plot.FLOOR)
        _log_x(axes, 10, "{x:g}")
        plot.log_y(axes, "useful TFLOP/s")
        axes.set_xlabel("FLOPs a byte, every operand moved once")
        _grid(axes)
        axes.label_outer()
    plot.legend(figure, next(iter(panels.values())))
    limit = f"limit: a copy at {text.number(str(gbps))} GB/s, a matrix product at {text.number(str(tflops))} TFLOP/s"
    return _finish(figure, rows, PLOTS["roofline"], text.subject(rows), limit)


def _bars(axes: Axes, labels: list[str], series: dict[str, list[tuple[float, str]]], unit: str) -> None:
    """Horizontal bars, a group a label and a fill a series; the words of each bar stand at its end."""
    height = 0.8 / len(series)
    for i, (name, bars) in enumerate(series.items()):
        colour, hatch = FILLS[i % len(FILLS)]
        y = [place + (i - (len(series) - 1) / 2) * height for place in range(len(labels))]
        drawn = axes.barh(
            y, [value for value, _ in bars], height, color=colour, hatch=hatch, edgecolor="white",
            label=NAMES.get(name, name),
        )  # fmt: skip
        axes.bar_label(drawn, [words for _, words in bars], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel(unit)
    _grid(axes)
    axes.grid(False, axis="y")


NOTHING = (math.nan, "")


def _host(rows: list[Row]) -> Figure:
    """A bar a provider of each step and mode."""
    calls = grouped(rows, itemgetter("step", "mode"))
    series: dict[str, list[tuple[float, str]]] = {row["provider"]: [] for row in rows}
    for call in calls.values():
        found = {row["provider"]: (float(row["us"]), text.number(row["us"])) for row in call}
        for provider, bars in series.items():
            bars.append(found.get(provider, NOTHING))
    figure = Figure(figsize=(LEAST_WIDTH, 1.8 + 0.2 * len(calls) * (1 + len(series))), layout="constrained")
    axes = figure.subplots()
    _bars(axes, [", ".join(call) for call in calls], series, "host time a call, us")
    axes.margins(x=0.1)
    plot.legend(figure, axes)
    return _finish(figure, rows, RUN_PLOTS["host"])


def _models(rows: list[Row]) -> Figure:
    """Two bars a model: a training step with our layers and without."""
    steps = {key: step for key, step in comparison.steps(rows).items() if step}
    labels = [
        f"{model}\nbatch {batch}, {size} pixels, {dtype}, {layout}" for model, batch, size, dtype, layout in steps
    ]
    series: dict[str, list[tuple[float, str]]] = {"groupconv": [], "torch": []}
    for step in steps.values():
        for provider, bars in series.items():
            row = step.get(provider)
            if row is None:
                bars.append(NOTHING)
                continue
            speedup = comparison.step_speedup(step) if provider == "groupconv" else None
            words = [f"{text.number(row['ms_p50'])} ms", f"{speedup:.2f}x" if speedup else ""]
            words.append(f"peak {text.scaled(row['peak_bytes'], 2**30)} GiB")
            bars.append((float(row["ms_p50"]), ", ".join(filter(None, words))))
    figure = Figure(figsize=(LEAST_WIDTH, 1.8 + 0.6 * len(labels)), layout="constrained")
    axes = figure.subplots()
    _bars(axes, labels, series, "time of a training step, ms")
    axes.margins(x=0.4)
    plot.legend(figure, axes)
    return _finish(figure, rows, RUN_PLOTS["models"])
