"""The plots of a report or bench, from the rows of its CSV files alone."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend import Legend

from groupconv.common import files, grouped
from groupconv.common.files import Row
from groupconv.problem import PASSES, PLANNED

from . import comparison
from .comparison import LOSS_BELOW, WIDTHS, WIN_ABOVE, Pair, across_groups, across_kernels, kind, layer_rows, timed
from .rows import PRIOR
from .text import BENCH_PLOTS, NAMES, RUN_PLOTS, number, origin, provenance, scaled, subject, versions

# Okabe and Ito's colours, which colour-blind readers can tell apart; each with a marker of its own, for print.
PEER_STYLES: dict[str, dict[str, Any]] = {
    "torch_contiguous": {"color": "#E69F00", "marker": "X"},
    "torch_channels_last": {"color": "#56B4E9", "marker": "P"},
    "torch_native": {"color": "#E69F00", "marker": "<", "linestyle": ":"},
    "torch_compile": {"color": "#56B4E9", "marker": ">", "linestyle": "-."},
    "flag_gems": {"color": "0.5", "marker": "*", "linestyle": "-."},
    PRIOR: {"color": "#E69F00", "marker": "X"},
}
OWN_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#F0E442", "v"))
FLOOR: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}
AUTO: dict[str, Any] = {"color": "black", "linestyle": "none", "marker": "o", "markersize": 12, "fillstyle": "none"}
# What layers differ in along an axis, by its field; these labels, and FLOPs a byte, are of no time.
ALONG = {"groups": "groups", "kh": "kernel height and width, pixels"}
INTENSITY = "FLOPs a byte, every operand moved once"
LEAST_WIDTH = 10.5  # inches of the narrowest figure, which its title fits
UNGROUPED: dict[str, Any] = {"color": "0.45", "linestyle": ":", "linewidth": 1.6}


def write(figures: Mapping[str, Figure], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write each figure as NAME.png, whole at every moment; the files written."""
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        with files.whole(written[-1]) as partial:
            figure.savefig(partial, format="png", dpi=150)
    return written


def write_pdf(figures: Mapping[str, Figure], path: pathlib.Path) -> None:
    """Write figures as the pages of a PDF, whole at every moment. Without any, nothing is written."""
    if figures:
        with files.whole(path) as partial, PdfPages(partial) as pages:
            for figure in figures.values():
                pages.savefig(figure)


def _finish(figure: Figure, rows: list[Row], what: str, *about: str) -> Figure:
    """Title a figure: what it shows, lines about it, and where its rows come from. Where nothing was measured, each of
    its titles and labels that is about times says so.
    """

    def labelled(text: str) -> str:
        return text if kind(rows) == "measured" else f"{text} ({kind(rows)})"

    figure.suptitle("\n".join([labelled(what), *about, provenance(rows)]), fontsize=10)
    for axes in figure.axes:
        for label in (axes.title, axes.xaxis.label, axes.yaxis.label):
            if label.get_text() not in ("", INTENSITY, *ALONG.values()):
                label.set_text(labelled(label.get_text()))
    return figure


def _legend(figure: Figure, axes: Axes) -> Legend:
    """One legend below all panels, of what is drawn on one of them."""
    handles, labels = axes.get_legend_handles_labels()
    return figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9, frameon=False
    )


def _grid(axes: Axes) -> None:
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)


def _along(rows: list[Row]) -> str:
    """The field along the axis: what the layers differ in."""
    return "groups" if across_groups(rows) else "kh"


def points(rows: list[Row], pass_: str, provider: str, field: str) -> tuple[list[int], list[float]]:
    """A provider's line: what the layers differ in, and a field."""
    along = _along(rows)
    line = sorted(
        (int(row[along]), float(row[field]))
        for row in rows
        if (row["pass"], row["provider"]) == (pass_, provider) and timed(row)
    )
    return [x for x, _ in line], [y for _, y in line]


def _floors(rows: list[Row], pass_: str) -> tuple[list[int], list[float]]:
    """The line of the floor."""
    along = _along(rows)
    floors = {int(row[along]): float(row["floor_us"]) for row in layer_rows(rows) if row["pass"] == pass_}
    return sorted(floors), [floors[x] for x in sorted(floors)]


def _sweep_axis(axes: Axes, rows: list[Row]) -> None:
    """The axis along which the layers differ."""
    along = _along(rows)
    counts = sorted({int(row[along]) for row in layer_rows(rows)})
    if along == "groups":
        axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel(ALONG[along])
    _grid(axes)


def _log_y(axes: Axes, unit: str) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:,.4g}" if y < 1e4 else f"{y:,.0f}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylabel(unit)


def _log_x(axes: Axes, base: int, form: str) -> None:
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_locator(ticker.LogLocator(base=base, numticks=7))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter(form))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _fraction_axis(axes: Axes, names: list[str]) -> None:
    """Fractions of the limit, a line a layer."""
    axes.axvline(100, label="limit", **FLOOR)
    axes.set_xlim(left=0)
    axes.set_xlabel("floor / time, %")
    _layer_axis(axes, names, len(names))


def _layer_axis(axes: Axes, names: list[str], most: int) -> None:
    """A line a layer, as many as `most` of them."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(-0.7, most - 0.3)
    _grid(axes)


def _styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """How each provider is drawn, in order of appearance. "auto" repeats another's figures: it is no line."""
    providers = list(dict.fromkeys(row["provider"] for row in layer_rows(rows) if row["provider"] != "auto"))
    own = [name for name in providers if name not in PEER_STYLES]
    colours = {name: OWN_STYLES[i % len(OWN_STYLES)] for i, name in enumerate(own)}
    own_styles = {name: {"color": colour, "marker": marker} for name, (colour, marker) in colours.items()}
    return {name: own_styles.get(name) or PEER_STYLES[name] for name in providers}


def _lines(axes: Axes, rows: list[Row], pass_: str, field: str, scale: float = 1) -> None:
    """A line a provider: a field across what the layers differ in."""
    for provider, style in _styles(list(filter(timed, rows))).items():
        x, y = points(rows, pass_, provider, field)
        # Panels share a legend: a provider that lacks one pass is in it all the same.
        axes.plot(x, [scale * value for value in y], label=NAMES.get(provider, provider), **style)


def _panels(passes: Sequence[str], width: float, height: float, **shared: Any) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a titled panel a pass; sizes in inches, the width that of a panel."""
    figure = Figure(figsize=(max(LEAST_WIDTH, width * len(passes)), height), layout="constrained")
    panels = dict(zip(passes, figure.subplots(1, len(passes), squeeze=False, **shared)[0], strict=True))
    for pass_, axes in panels.items():
        axes.set_title(pass_, fontsize=10)
    return figure, panels


def _passes_of(rows: Iterable[Row]) -> list[str]:
    """The passes that rows have."""
    having = {row["pass"] for row in rows}
    return [pass_ for pass_ in PLANNED if pass_ in having]


# --- `groupconv report` ----------------------------------------------------------------------------------------------


def draw(rows: list[Row]) -> dict[str, Figure]:
    """What a report's rows allow, by name."""
    if not layer_rows(rows):
        return {}
    if across_groups(rows):
        return {"overview": _overview(rows), **_sweeps(rows), "work": _work(rows)}
    return _sweeps(rows) if across_kernels(rows) else {"fraction": _layers(rows)}


def _sweeps(rows: list[Row]) -> dict[str, Figure]:
    """Time and fraction of the limit across group counts or kernel sizes."""
    figures = {}
    for name, title, draw_panel in (
        ("time", "Time of each pass", _time_of_report), ("fraction", "Fraction of the limit reached", _fraction)
    ):  # fmt: skip
        figures[name], panels = _panels(PASSES, 4, 4.6, sharey=True)
        for pass_, axes in panels.items():
            draw_panel(axes, rows, pass_)
            axes.label_outer()
        _legend(figures[name], panels[PASSES[0]])
        _finish(figures[name], rows, title, subject(rows))
    return figures


def _time(axes: Axes, rows: list[Row], pass_: str) -> None:
    """Time across group counts or kernel sizes, a line a provider, and the floor."""
    _lines(axes, rows, pass_, "us_p50")
    axes.plot(*_floors(rows, pass_), label="floor", **FLOOR)
    _sweep_axis(axes, rows)
    _log_y(axes, "time, us")


def _auto(axes: Axes, rows: list[Row], pass_: str) -> None:
    """A ring on what "auto" takes."""
    axes.plot(*points(rows, pass_, "auto", "us_p50"), label="auto", **AUTO)


def _time_of_report(axes: Axes, rows: list[Row], pass_: str) -> None:
    _time(axes, rows, pass_)
    ungrouped = [float(row["ungrouped_floor_us"]) for row in layer_rows(rows) if row["pass"] == pass_]
    if not across_groups(rows):
        _auto(axes, rows, pass_)
    elif ungrouped:  # a run that ended early may lack a pass
        axes.axhline(ungrouped[0], label="floor of the ungrouped layer", **UNGROUPED)


def _fraction(axes: Axes, rows: list[Row], pass_: str) -> None:
    _lines(axes, rows, pass_, "fraction", 100)
    axes.axhline(100, label="limit", **FLOOR)
    _sweep_axis(axes, rows)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("floor / time, %")


def _work_panels(panels: Sequence[Axes], rows: list[Row]) -> None:
    """Parameters, FLOPs, and all ratios to the ungrouped layer."""
    # A fused backward does the work of two passes.
    layers = sorted({int(row["groups"]): row for row in layer_rows(rows) if row["pass"] == PASSES[0]}.items())
    counts = [count for count, _ in layers]
    for axes, field, scale, title, unit in (
        (panels[0], "params", 1e3, "parameters", "thousands"),
        (panels[1], "flops", 1e9, "FLOPs of a pass", "GFLOP"),
    ):
        values = [float(row[field]) / scale for _, row in layers]
        ungrouped = values[0] / float(layers[0][1][f"{field}_ratio"])
        axes.plot(counts, values, color="#0072B2", marker="o", label="this layer")
        axes.plot(counts, [ungrouped / count for count in counts], label="ungrouped / groups", **FLOOR)
        _log_y(axes, unit)
        axes.set_title(title, fontsize=10)
    # The first, second and last fall together, so each marker leaves the ones below it visible.
    styles: dict[tuple[str, str], dict[str, Any]] = {
        ("params", "parameters"): {"color": "#0072B2", "marker": "o", "markersize": 10, "markerfacecolor": "none"},
        ("intensity", "FLOPs a byte"): {"color": "#D55E00", "marker": "s", "markersize": 6},
        ("flops", "FLOPs"): {"color": "black", "marker": "x", "markersize": 5, "linestyle": "none"},
        ("bytes", "bytes moved once"): {"color": "#009E73", "marker": "^"},
    }
    for (field, label), style in styles.items():
        panels[2].plot(counts, [float(row[f"{field}_ratio"]) for _, row in layers], label=label, **style)
    _log_y(panels[2], "ratio")
    panels[2].set_title("beside the ungrouped layer", fontsize=10)
    for axes in panels:
        _sweep_axis(axes, rows)
        axes.legend(fontsize=8, frameon=False)


def _work(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    _work_panels(figure.subplots(1, 3), rows)
    figure.suptitle(f"Parameters and FLOPs across group counts\n{subject(rows)}", fontsize=10)
    return figure


def _fastest(rows: list[Row], pass_: str, providers: Collection[str]) -> tuple[list[int], list[float]]:
    """The line of the fastest of some providers."""
    best: dict[int, float] = {}
    for provider in providers:
        for count, time_us in zip(*points(rows, pass_, provider, "us_p50"), strict=True):
            best[count] = min(time_us, best.get(count, time_us))
    counts = sorted(best)
    return counts, [best[count] for count in counts]


def _overview(rows: list[Row]) -> Figure:
    """The work and the time. What the times are is its title, once for all of it."""
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    work, times = figure.subplots(2, 3)
    _work_panels(work, rows)
    own = {row["provider"] for row in layer_rows(rows)} - {*PEER_STYLES, "auto"}
    torch = "F.conv2d" if kind(rows) == "measured" else NAMES[PRIOR]
    for axes, pass_ in zip(times, PASSES, strict=True):
        if axes is not times[0]:
            axes.sharey(times[0])
        axes.plot(*_fastest(rows, pass_, PEER_STYLES), color="#E69F00", marker="s", label=torch)
        axes.plot(*_fastest(rows, pass_, own), color="#0072B2", marker="o", label="the fastest of ours")
        axes.plot(*_floors(rows, pass_), label="floor", **FLOOR)
        axes.plot(*points(rows, pass_, "auto", "us_p50"), label='what "auto" takes', **AUTO)
        _sweep_axis(axes, rows)
        _log_y(axes, "time, us")
        axes.set_title(f"time of {pass_}", fontsize=10)
        axes.label_outer()
    _legend(figure, times[0]).set_title(f"{subject(rows)}; {versions(rows)}", FontProperties(size=9))
    but = "" if kind(rows) == "measured" else ", not measured"
    figure.suptitle(f"Times {origin(rows)}{but}", fontsize=20, fontweight="bold")
    return figure


def _layers(rows: list[Row]) -> Figure:
    """A line a layer, sorted by the best fraction of its first pass."""
    best: dict[str, float] = {}
    for row in layer_rows(rows):
        value = float(row["fraction"]) if row["pass"] == PASSES[0] and timed(row) else 0.0
        best[row["layer"]] = max(best.get(row["layer"], 0.0), value)
    order = sorted(best, key=best.__getitem__)
    figure, panels = _panels(PASSES, 4, max(3.5, 2.0 + 0.2 * len(order)), sharey=True)
    for pass_, axes in panels.items():
        for provider, style in _styles(rows).items():
            mine = [row for row in layer_rows(rows) if (row["pass"], row["provider"]) == (pass_, provider)]
            drawn = [(100 * float(row["fraction"]), order.index(row["layer"])) for row in mine if timed(row)]
            axes.plot(
                [x for x, _ in drawn], [y for _, y in drawn],
                label=NAMES.get(provider, provider), **style | {"linestyle": "none"},
            )  # fmt: skip
        _fraction_axis(axes, order)
    _legend(figure, panels[PASSES[0]])
    return _finish(figure, rows, "Fraction of the limit reached, by layer", subject(rows))


# --- `groupconv bench` -----------------------------------------------------------------------------------------------

# Field of a Pair: colour, marker, area, label. The second is drawn over the first, which shows around it.
SERIES = {"auto": ("#0072B2", "o", 42, "auto"), "best": ("#E69F00", "X", 22, "best of PyTorch")}
RESULTS = {
    "win": ("#0072B2", "", f"above {WIN_ABOVE}"),
    "tie": ("0.75", "", "between"),
    "loss": ("#D55E00", "////", f"below {LOSS_BELOW}"),
}
MARKERS = dict(zip(WIDTHS, ("o", "s", "^"), strict=True))
FILLS = (("#0072B2", ""), ("#E69F00", "///"), ("#009E73", "..."), ("#CC79A7", "xxx"), ("#56B4E9", "\\\\\\"))


def draw_bench(folder: pathlib.Path) -> dict[str, Figure]:
    """What a bench's folder allows, by name."""
    layers, models, host = comparison.read(folder)
    limits = comparison.limits(layers)
    figures: dict[str, Figure] = {}
    for key, mine in comparison.formats(layers).items():
        sweep = [row for row in mine if comparison.is_sweep(row)]
        others = [row for row in mine if not comparison.is_sweep(row)]
        suffix = "_".join(key)
        # Runs into one folder may have left sweeps of several layers, which have no axis in common.
        if any(map(timed, sweep)) and across_groups(sweep):
            figures[f"groups_{suffix}"] = _groups(sweep)
        pairs = comparison.pairs(others)
        if pairs:
            figures[f"fraction_{suffix}"] = _fractions(others, pairs)
            figures[f"speedup_{suffix}"] = _speedups(others, pairs)
            if key[0] in limits:
                figures[f"roofline_{suffix}"] = _rooflines(others, pairs, *limits[key[0]])
    if any(row["us"] for row in host):
        figures["host"] = _host([row for row in host if row["us"]])
    if any(row["ms_p50"] for row in models):
        figures["models"] = _models(models)
    return figures


def _groups(rows: list[Row]) -> Figure:
    """Time across group counts, a line a provider; rings show what "auto" takes."""
    figure, panels = _panels(_passes_of(filter(timed, rows)), 4.2, 5.2, sharex=True, sharey=True)
    for pass_, axes in panels.items():
        _time(axes, rows, pass_)
        _auto(axes, rows, pass_)
        axes.label_outer()
    _legend(figure, next(iter(panels.values())))
    return _finish(figure, rows, BENCH_PLOTS["groups"], subject(rows))


def _fractions(rows: list[Row], pairs: list[Pair]) -> Figure:
    """A line a layer, sorted by what "auto" reaches in its first pass."""
    best: dict[str, float] = {}
    for pair in sorted(pairs, key=lambda pair: PLANNED.index(pair.auto["pass"])):
        best.setdefault(pair.auto["layer"], float(pair.auto["fraction"]))
    order = sorted(best, key=best.__getitem__)
    figure, panels = _panels(_passes_of(pair.auto for pair in pairs), 4, 2 + 0.2 * len(order), sharey=True)
    for pass_, axes in panels.items():
        mine = [pair for pair in pairs if pair.auto["pass"] == pass_]
        y = [order.index(pair.auto["layer"]) for pair in mine]
        x = {name: [100 * float(getattr(pair, name)["fraction"]) for pair in mine] for name in SERIES}
        axes.hlines(y, x["best"], x["auto"], color="0.6", linewidth=1)
        for name, (colour, marker, area, label) in SERIES.items():
            axes.scatter(x[name], y, s=area, color=colour, marker=marker, label=label, zorder=3)
        _fraction_axis(axes, order)
    _legend(figure, next(iter(panels.values())))
    return _finish(figure, rows, BENCH_PLOTS["fraction"], subject(rows))


def _result(pair: Pair) -> str:
    return "win" if pair.speedup > WIN_ABOVE else "loss" if pair.speedup < LOSS_BELOW else "tie"


def _speedups(rows: list[Row], pairs: list[Pair]) -> Figure:
    """A bar a layer, from 1, each panel sorted by itself; the mark at its end is the width class."""
    by_pass = grouped(pairs, lambda pair: pair.auto["pass"])
    most = max(map(len, by_pass.values()))
    width = 3.4 + 0.07 * max(len(pair.auto["layer"]) for pair in pairs)
    figure, panels = _panels(_passes_of(pair.auto for pair in pairs), width, 2.2 + 0.2 * most, sharex=True)
    for pass_, axes in panels.items():
        mine = sorted(by_pass[pass_], key=lambda pair: pair.speedup)
        for result, (colour, hatch, label) in RESULTS.items():
            # Bars without a length where the result is another: the legend needs one of each.
            bars = [pair.speedup - 1 if _result(pair) == result else math.nan for pair in mine]
            axes.barh(range(len(mine)), bars, left=1, color=colour, hatch=hatch, edgecolor="white", label=label)
        for name, marker in MARKERS.items():
            ends = [pair.speedup if comparison.width(pair.auto) == name else math.nan for pair in mine]
            axes.scatter(
                ends, range(len(mine)), marker=marker, s=30, color="black", facecolor="white", zorder=3, label=name
            )
        axes.axvline(1, color="black", linewidth=1.2)
        _log_x(axes, 2, "{x:g}x")
        _layer_axis(axes, [pair.auto["layer"] for pair in mine], most)
        axes.set_xlabel("speedup of auto")
    low, high = (pick(pair.speedup for pair in pairs) for pick in (min, max))
    axes.set_xlim(min(0.5, 0.9 * low), max(2, 1.1 * high))
    _legend(figure, axes)
    return _finish(figure, rows, BENCH_PLOTS["speedup"], subject(rows))


def _rooflines(rows: list[Row], pairs: list[Pair], gbps: float, tflops: float) -> Figure:
    figure, panels = _panels(_passes_of(pair.auto for pair in pairs), 4.4, 5, sharex=True, sharey=True)
    ends = [float(pair.auto["intensity"]) for pair in pairs]
    ridge = tflops * 1e3 / gbps
    roof = sorted([min(ends) / 2, max(2 * max(ends), 2 * ridge), ridge])
    for pass_, axes in panels.items():
        mine = [pair for pair in pairs if pair.auto["pass"] == pass_]
        for name, (colour, marker, area, label) in SERIES.items():
            drawn = [getattr(pair, name) for pair in mine]
            axes.scatter(
                [float(row["intensity"]) for row in drawn], [float(row["tflops"]) for row in drawn],
                s=area, color=colour, marker=marker, label=label,
            )  # fmt: skip
        axes.plot(roof, [min(x * gbps / 1e3, tflops) for x in roof], label="limit", **FLOOR)
        _log_x(axes, 10, "{x:g}")
        _log_y(axes, "useful TFLOP/s")
        axes.set_xlabel(INTENSITY)
        _grid(axes)
        axes.label_outer()
    _legend(figure, next(iter(panels.values())))
    limit = f"limit: a copy at {number(gbps)} GB/s, a matrix product at {number(tflops)} TFLOP/s"
    return _finish(figure, rows, BENCH_PLOTS["roofline"], subject(rows), limit)


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
        by_provider = {row["provider"]: (float(row["us"]), number(row["us"])) for row in call}
        for provider, bars in series.items():
            bars.append(by_provider.get(provider, NOTHING))
    figure = Figure(figsize=(LEAST_WIDTH, 1.8 + 0.2 * len(calls) * (1 + len(series))), layout="constrained")
    axes = figure.subplots()
    _bars(axes, [", ".join(call) for call in calls], series, "host time a call, us")
    axes.margins(x=0.1)
    _legend(figure, axes)
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
            words = [f"{number(row['ms_p50'])} ms", f"{speedup:.2f}x" if speedup else ""]
            words.append(f"peak {scaled(row['peak_bytes'], 2**30)} GiB")
            bars.append((float(row["ms_p50"]), ", ".join(filter(None, words))))
    figure = Figure(figsize=(LEAST_WIDTH, 1.8 + 0.6 * len(labels)), layout="constrained")
    axes = figure.subplots()
    _bars(axes, labels, series, "time of a training step, ms")
    axes.margins(x=0.4)
    _legend(figure, axes)
    return _finish(figure, rows, RUN_PLOTS["models"])
