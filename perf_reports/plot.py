"""A report's plots, from its CSV alone."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from ..problem import PASSES
from .rows import PRIOR
from .text import (
    NAMES,
    Row,
    across_groups,
    across_kernels,
    kind,
    layer_rows,
    origin,
    provenance,
    subject,
    timed,
    versions,
)  # fmt: skip

# Okabe and Ito's colours, which colour-blind readers can tell apart; each with a marker of its own, for print.
TORCH_STYLES = {
    "torch_contiguous": ("#E69F00", "X"), "torch_channels_last": ("#56B4E9", "P"), PRIOR: ("#E69F00", "X"),
}  # fmt: skip
OWN_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#F0E442", "v"))
FLOOR: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}
AUTO: dict[str, Any] = {"color": "black", "linestyle": "none", "marker": "o", "markersize": 12, "fillstyle": "none"}
UNGROUPED: dict[str, Any] = {"color": "0.45", "linestyle": ":", "linewidth": 1.6}


def write(rows: list[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draw what the rows allow into `folder`; the files written."""
    return save(draw(rows), folder)


def save(figures: Mapping[str, Figure], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write each figure as NAME.png, whole at every moment; the files written."""
    written = []
    for name, figure in figures.items():
        partial, path = folder / f".{name}.png.partial", folder / f"{name}.png"
        figure.savefig(partial, format="png", dpi=150)
        os.replace(partial, path)
        written.append(path)
    return written


def draw(rows: list[Row]) -> dict[str, Figure]:
    """What the rows allow, by name."""
    if not layer_rows(rows):
        return {}
    if across_groups(rows):
        return {
            "overview": _overview(rows),
            "time": _passes(rows, _time),
            "fraction": _passes(rows, _fraction),
            "work": _work(rows),
        }
    if across_kernels(rows):
        return {"time": _passes(rows, _time), "fraction": _passes(rows, _fraction)}
    return {"fraction": _layers(rows)}


def _styles(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """(colour, marker) by provider, in order of appearance. "auto" repeats another's figures: it is no line."""
    providers = list(dict.fromkeys(row["provider"] for row in layer_rows(rows) if row["provider"] != "auto"))
    own = [name for name in providers if name not in TORCH_STYLES]
    styles = {name: OWN_STYLES[i % len(OWN_STYLES)] for i, name in enumerate(own)}
    return {name: styles.get(name) or TORCH_STYLES[name] for name in providers}


def _along(rows: list[Row]) -> str:
    """The field along the axis: what the layers differ in."""
    return "groups" if across_groups(rows) else "kh"


def points(rows: list[Row], pass_: str, provider: str, field: str) -> tuple[list[int], list[float]]:
    """A provider's line: what the layers differ in, and a field."""
    along = _along(rows)
    found = sorted(
        (int(row[along]), float(row[field]))
        for row in rows
        if (row["pass"], row["provider"]) == (pass_, provider) and timed(row)
    )
    return [x for x, _ in found], [y for _, y in found]


def labelled(rows: list[Row], text: str) -> str:
    """A label of figures that come from times; it says so where nothing was measured."""
    return text if kind(rows) == "measured" else f"{text} ({kind(rows)})"


def titled(figure: Figure, rows: list[Row], what: str, *about: str) -> None:
    """Title a figure: what it shows, lines about it, and where its rows come from."""
    figure.suptitle("\n".join([labelled(rows, what), *about, provenance(rows)]), fontsize=10)


def sweep_axis(axes: Axes, rows: list[Row]) -> None:
    """The axis along which the layers differ."""
    along = _along(rows)
    counts = sorted({int(row[along]) for row in layer_rows(rows)})
    if along == "groups":
        axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("groups" if along == "groups" else "kernel height and width, pixels")
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)


def log_y(axes: Axes, unit: str) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:,.4g}" if y < 1e4 else f"{y:,.0f}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylabel(unit)


def _time(axes: Axes, rows: list[Row], pass_: str) -> None:
    for provider, (colour, marker) in _styles(rows).items():
        x, y = points(rows, pass_, provider, "us_p50")
        axes.plot(x, y, color=colour, marker=marker, label=labelled(rows, NAMES.get(provider, provider)))
    along = _along(rows)
    floors = {int(row[along]): row for row in layer_rows(rows) if row["pass"] == pass_}
    counts = sorted(floors)
    limit = [float(floors[count]["floor_us"]) for count in counts]
    axes.plot(counts, limit, label=labelled(rows, "floor"), **FLOOR)
    if along == "kh":
        axes.plot(*points(rows, pass_, "auto", "us_p50"), label=labelled(rows, "auto"), **AUTO)
    elif counts:  # a run that ended early may lack a pass
        ungrouped = float(floors[counts[0]]["ungrouped_floor_us"])
        axes.axhline(ungrouped, label=labelled(rows, "floor of the ungrouped layer"), **UNGROUPED)
    sweep_axis(axes, rows)
    log_y(axes, labelled(rows, "time, us"))
    axes.set_title(pass_, fontsize=10)


def _fraction(axes: Axes, rows: list[Row], pass_: str) -> None:
    for provider, (colour, marker) in _styles(rows).items():
        x, y = points(rows, pass_, provider, "fraction")
        label = labelled(rows, NAMES.get(provider, provider))
        axes.plot(x, [100 * f for f in y], color=colour, marker=marker, label=label)
    axes.axhline(100, label=labelled(rows, "limit"), **FLOOR)
    sweep_axis(axes, rows)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(labelled(rows, "floor / time, %"))
    axes.set_title(pass_, fontsize=10)


def legend(figure: Figure, axes: Axes) -> Legend:
    """One legend below all panels, of what is drawn on one of them."""
    handles, labels = axes.get_legend_handles_labels()
    return figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9, frameon=False
    )


def _passes(rows: list[Row], panel: Callable[[Axes, list[Row], str], None]) -> Figure:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, pass_ in zip(panels, PASSES, strict=True):
        panel(axes, rows, pass_)
        axes.label_outer()
    legend(figure, panels[0])
    titled(figure, rows, "Time of each pass" if panel is _time else "Fraction of the limit reached", subject(rows))
    return figure


def _work_panels(panels, rows: list[Row]) -> None:
    """Parameters, FLOPs, and all ratios to the ungrouped layer."""
    # A fused backward does the work of two passes.
    layers = sorted({int(row["groups"]): row for row in layer_rows(rows) if row["pass"] == PASSES[0]}.items())
    counts = [count for count, _ in layers]
    for axes, field, ratio, scale, title, unit in (
        (panels[0], "params", "params_ratio", 1e3, "parameters", "thousands"),
        (panels[1], "flops", "flops_ratio", 1e9, "FLOPs of a pass", "GFLOP"),
    ):
        values = [float(row[field]) / scale for _, row in layers]
        ungrouped = values[0] / float(layers[0][1][ratio])
        axes.plot(counts, values, color="#0072B2", marker="o", label="this layer")
        axes.plot(counts, [ungrouped / count for count in counts], label="ungrouped / groups", **FLOOR)
        sweep_axis(axes, rows)
        log_y(axes, unit)
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8, frameon=False)
    # The first, second and last fall together, so each marker leaves the ones below it visible.
    for field, label, colour, style in (
        ("params", "parameters", "#0072B2", {"marker": "o", "markersize": 10, "markerfacecolor": "none"}),
        ("intensity", "FLOPs a byte", "#D55E00", {"marker": "s", "markersize": 6}),
        ("flops", "FLOPs", "black", {"marker": "x", "markersize": 5, "linestyle": "none"}),
        ("bytes", "bytes moved once", "#009E73", {"marker": "^"}),
    ):
        values = [float(row[f"{field}_ratio"]) for _, row in layers]
        panels[2].plot(counts, values, color=colour, label=label, **style)
    sweep_axis(panels[2], rows)
    log_y(panels[2], "ratio")
    panels[2].set_title("beside the ungrouped layer", fontsize=10)
    panels[2].legend(fontsize=8, frameon=False)


def _work(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    _work_panels(panels, rows)
    figure.suptitle(f"Parameters and FLOPs across group counts\n{subject(rows)}", fontsize=10)
    return figure


def _fastest(rows: list[Row], pass_: str, providers: Collection[str]) -> tuple[list[int], list[float]]:
    """The line of the fastest of some providers."""
    found: dict[int, float] = {}
    for provider in providers:
        for count, time_us in zip(*points(rows, pass_, provider, "us_p50"), strict=True):
            found[count] = min(time_us, found.get(count, time_us))
    counts = sorted(found)
    return counts, [found[count] for count in counts]


def _times(axes: Axes, rows: list[Row], pass_: str) -> None:
    """A pass in three lines, and what "auto" takes of the upper two."""
    own = {row["provider"] for row in layer_rows(rows)} - {*TORCH_STYLES, "auto"}
    torch = "F.conv2d" if kind(rows) == "measured" else NAMES[PRIOR]
    axes.plot(*_fastest(rows, pass_, TORCH_STYLES), color="#E69F00", marker="s", label=torch)
    axes.plot(*_fastest(rows, pass_, own), color="#0072B2", marker="o", label="the fastest of ours")
    floors = sorted(
        {int(row["groups"]): float(row["floor_us"]) for row in layer_rows(rows) if row["pass"] == pass_}.items()
    )
    axes.plot([count for count, _ in floors], [floor for _, floor in floors], label="floor", **FLOOR)
    axes.plot(*points(rows, pass_, "auto", "us_p50"), label='what "auto" takes', **AUTO)
    sweep_axis(axes, rows)
    log_y(axes, "time, us")
    axes.set_title(f"time of {pass_}", fontsize=10)


def _overview(rows: list[Row]) -> Figure:
    """The work and the time. What the times are is its title, once for all of it."""
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    panels = figure.subplots(2, 3)
    _work_panels(panels[0], rows)
    for axes, pass_ in zip(panels[1], PASSES, strict=True):
        if axes is not panels[1][0]:
            axes.sharey(panels[1][0])
        _times(axes, rows, pass_)
        if axes is not panels[1][0]:
            axes.set_ylabel("")
            axes.tick_params(labelleft=False)
    legend(figure, panels[1][0]).set_title(f"{subject(rows)}; {versions(rows)}", {"size": 9})
    but = "" if kind(rows) == "measured" else ", not measured"
    figure.suptitle(f"Times {origin(rows)}{but}", fontsize=20, fontweight="bold")
    return figure


def _layers(rows: list[Row]) -> Figure:
    """A line a layer, sorted by the best fraction of its fprop; a panel a pass."""
    best: dict[str, float] = {}
    for row in layer_rows(rows):
        value = float(row["fraction"]) if row["pass"] == "fprop" and timed(row) else 0.0
        best[row["layer"]] = max(best.get(row["layer"], 0.0), value)
    order = sorted(best, key=best.__getitem__)
    place = {name: i for i, name in enumerate(order)}
    height = max(3.5, 2.0 + 0.2 * len(order))
    figure = Figure(figsize=(12, height), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, pass_ in zip(panels, PASSES, strict=True):
        for provider, (colour, marker) in _styles(rows).items():
            drawn = [
                (100 * float(row["fraction"]), place[row["layer"]])
                for row in layer_rows(rows)
                if (row["pass"], row["provider"]) == (pass_, provider) and timed(row)
            ]
            label = labelled(rows, NAMES.get(provider, provider))
            axes.scatter([x for x, _ in drawn], [y for _, y in drawn], s=26, color=colour, marker=marker, label=label)
        axes.axvline(100, label=labelled(rows, "limit"), **FLOOR)
        axes.set_xlim(left=0)
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)
        axes.set_xlabel(labelled(rows, "floor / time, %"))
        axes.set_title(pass_, fontsize=10)
    legend(figure, panels[0])
    titled(figure, rows, "Fraction of the limit reached, by layer", subject(rows))
    return figure
