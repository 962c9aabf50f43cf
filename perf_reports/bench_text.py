"""A bench in words, from the CSV files of its folder alone: REPORT.md and a short table."""

from __future__ import annotations

import dataclasses
import pathlib
from operator import itemgetter

from rich.table import Table

from . import comparison, text
from .comparison import FILES, LOSS, TORCH, WIDTHS, WIN, Pair, grouped
from .text import Row, markdown_table, number, provenance, scaled, spread, takes, timed

NAMES = text.NAMES | {
    "torch_native": "F.conv2d without cuDNN",
    "torch_compile": "F.conv2d by torch.compile",
    "flag_gems": "FlagGems",
}
WORST = 10
# The plots of each dtype and layout, by the first word of their files' names; then those of a run.
PLOTS = {
    "speedup": "Speedup over the best of PyTorch",
    "groups": "Time across group counts",
    "fraction": "Fraction of the limit reached",
    "roofline": "Roofline",
}
RUN_PLOTS = {"models": "Training steps of whole models", "host": "Host time of a call"}
SUMMARY = (
    "set", "dtype", "layout", "pass", "width", "layers", "over best of PyTorch", "over F.conv2d, same format",
    "wins", "losses", "takes F.conv2d", "memory-bound layers", "their median fraction",
)  # fmt: skip


def _summary_cells(rows: list[Row]) -> list[list[str]]:
    return [
        [f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value) for value in line]
        for line in map(dataclasses.astuple, comparison.summary(rows))
    ]


def table(folder: pathlib.Path) -> Table:
    """The table for the terminal: geometric means of speedups by dtype, layout, pass and width class."""
    layers, models, host = comparison.read(folder)
    first = layers or models or host
    about = provenance(first) if first else "the run ended before its first row"
    made = Table(title=f"Speedup over the best of PyTorch, and of how many layers: {about}")
    for name in (*SUMMARY[:4], *WIDTHS):
        made.add_column(name, justify="right" if name in WIDTHS else "left")
    found = comparison.summary(layers)
    for key, mine in grouped(found, lambda each: (each.of, each.dtype, each.layout, each.pass_)).items():
        cells = {each.width: f"{each.over_best:.2f} ({each.layers})" for each in mine}
        made.add_row(*key, *(cells.get(width, "-") for width in WIDTHS))
    return made


def markdown(folder: pathlib.Path) -> str:
    """REPORT.md of a bench's folder. It shows the plots that lie there: draw them first (`bench_plot.write`)."""
    layers, models, host = comparison.read(folder)
    first = layers or models or host
    if not first:
        return "# Benchmark\n\nThe run ended before its first row.\n"
    stub = text.kind([*layers, *models, *host]) == "stub"
    lines = [f"# {'Stub benchmark' if stub else 'Benchmark'}: {first[0]['gpu']}", ""]
    lines += [f"{provenance(first)[0].upper()}{provenance(first)[1:]}; commit {first[0]['commit'] or 'unknown'}.", ""]
    if stub:
        lines += ["**The GPU is pretended: its times are the model's with noise, to try the report.**", ""]
    if layers:
        lines += [*_words(layers), "", "## Speedup", "", *markdown_table(SUMMARY, _summary_cells(layers), 5), ""]
        lines += ["## Worst losses", "", *_losses(layers), "", "## Failed and wrong", "", *_failures(layers), ""]
    plots = [
        line
        for key in comparison.formats(layers)
        for stem, title in PLOTS.items()
        for line in _plot(folder / f"{stem}_{'_'.join(key)}.png", f"{title}, {', '.join(key)}")
    ]
    if plots:
        lines += ["## Plots", "", *plots]
    if models:
        lines += [f"## {RUN_PLOTS['models']}", "", *_plot(folder / "models.png", RUN_PLOTS["models"])]
        lines += ["A step is forward under autocast, cross entropy, backward and SGD, on random images.", ""]
        lines += [*_models(models), ""]
    if host:
        lines += [f"## {RUN_PLOTS['host']}", "", *_plot(folder / "host.png", RUN_PLOTS["host"])]
        lines += ["Means of calls of a small layer, in the fastest of many repeats; no call waits for the device.", ""]
        cells = [[row["step"], row["mode"], row["provider"], number(row["us"])] for row in host]
        lines += [*markdown_table(("step", "mode", "provider", "us a call"), cells, 3), ""]
    if layers:
        lines += ["## Layers", "", *_layers(comparison.pairs(layers)), ""]
    names = [f"[{name}]({name})" for name in FILES if (folder / name).is_file()]
    return "\n".join([*lines, f"All figures: {', '.join(names)}.", ""])


def _plot(path: pathlib.Path, title: str) -> list[str]:
    return [f"![{title}]({path.name})", ""] if path.is_file() else []


def _words(rows: list[Row]) -> list[str]:
    found = [
        f"{dtype}, a copy at {number(str(gbps))} GB/s, a matrix product at {number(str(tflops))} TFLOP/s"
        for dtype, (gbps, tflops) in comparison.limits(rows).items()
    ]
    by_torch = [NAMES[name] for name in TORCH if any(row["provider"] == name and timed(row) for row in rows)]
    return [
        f"Limits of the same run, bytes read and written: {'; '.join(found) or 'none'}. The floor of a pass is the "
        "larger of the time to move every operand once and that of the useful FLOPs; the fraction of the limit is "
        "floor / time.",
        "",
        'Speedup is PyTorch\'s median time over that of "auto", which is what `triton_conv` takes, F.conv2d among it; '
        "means are geometric. The best of PyTorch is, for each layer and pass, the fastest of what the run has of it: "
        f"{', '.join(by_torch) or 'nothing'}; cudnn.benchmark is on, and torch.compile's max_autotune. A win is above "
        f"{WIN}, a loss below {LOSS}. Wrong and failed rows enter no comparison, mean or plot.",
        "",
        '"backward" is dgrad and wgrad by one kernel, beside PyTorch\'s both; where "auto" takes two kernels there is '
        "nothing to compare. Depthwise layers have one input channel a group, narrow ones groups of up to 32 channels, "
        "wide ones more or no groups. The sweep is a layer across group counts.",
    ]


ABOUT = ("layer", "pass", "dtype", "layout")


def _layers(found: list[Pair]) -> list[str]:
    header = [*ABOUT, "best of PyTorch", "auto takes", "best, us p50 (p20-p80)", "auto, us p50 (p20-p80)", "speedup"]
    lines = []
    for pair in found:
        lines.append([*itemgetter(*ABOUT)(pair.auto), NAMES[pair.best["provider"]], takes(pair.auto)])
        lines[-1] += [spread(pair.best, "us"), spread(pair.auto, "us"), f"{pair.speedup:.2f}"]
        lines[-1].append(f"{float(pair.auto['fraction']):.1%}")
    return markdown_table([*header, "of limit"], lines, 6)


def _losses(rows: list[Row]) -> list[str]:
    found = comparison.pairs(rows)
    lost = sorted((pair for pair in found if pair.speedup < LOSS), key=lambda pair: pair.speedup)
    count = f"Speedups below {LOSS}: {len(lost)} of {len(found)}"
    return [f"{count}; at most {WORST} are listed.", "", *_layers(lost[:WORST])] if lost else [f"{count}."]


def _failures(rows: list[Row]) -> list[str]:
    lines = [
        [*itemgetter(*ABOUT, "provider")(row), row["note"] or "wrong: the error is above its bound"]
        for row in comparison.failed(rows)
    ]
    return markdown_table((*ABOUT, "provider", "note"), lines, 6) if lines else ["None."]


def _models(models: list[Row]) -> list[str]:
    header = ["model", "batch", "size", "dtype", "layout", "provider", "ms p50 (p20-p80)", "speedup", "images/s"]
    found = comparison.steps(models)
    lines = []
    for row in models:
        key = itemgetter(*header[:5])(row)
        speedup = comparison.step_speedup(found[key]) if row["provider"] == "groupconv" else None
        lines.append([*key, row["provider"], spread(row, "ms"), f"{speedup:.2f}x" if speedup else "-"])
        lines[-1] += [number(row["images_per_s"]), scaled(row["peak_bytes"], 2**30)]
        lines[-1] += [row[name] or "-" for name in ("loss", "loss_of_torch", "converted", "note")]
    header += ["peak GiB", "loss", "loss of torch", "layers converted", "note"]
    return markdown_table(header, lines, 6)
