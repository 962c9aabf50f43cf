"""Reports and benches in words, from the rows of their CSV files: REPORT.md and the tables that are printed."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter

from rich.table import Table

from groupconv import cost
from groupconv.common import grouped
from groupconv.common.files import Row
from groupconv.problem import PASSES, PLANNED

from . import comparison, counted
from . import rows as rows_
from .comparison import (
    FILES,
    LOSS_BELOW,
    TORCH,
    WIDTHS,
    WIN_ABOVE,
    Pair,
    across_groups,
    across_kernels,
    first_of_each_layer,
    kind,
    layer_rows,
    takes,
    timed,
    width,
)  # fmt: skip

NAMES = {
    "torch_contiguous": "F.conv2d contiguous", "torch_channels_last": "F.conv2d channels_last",
    "torch_native": "F.conv2d without cuDNN", "torch_compile": "F.conv2d by torch.compile", "flag_gems": "FlagGems",
    rows_.PRIOR: "F.conv2d (prior)",
}  # fmt: skip
ORIGINS = {"measured": "measured on", "modelled": "modelled for", "stub": "stub clock: not measurements, on"}
LEGEND = (
    "Figures are of three kinds. *Measured*: timed on a GPU, on the date that is given. *Modelled*: worked out from a "
    "description of the GPU by the model that plans. *Counted*: read from the code as it is compiled, or found by "
    "running that code instruction by instruction, on no GPU and without a time."
)
CLASSES = (
    "Depthwise layers have one input channel a group, narrow ones groups of up to 32 channels, wide ones more or no "
    "groups."
)
FLOOR = (
    "The floor of a pass is the larger of the time to move every operand once and that of the useful FLOPs; the "
    "fraction of the limit is floor / time."
)
COUNTED = ("registers", "spill_bytes", "shared_bytes", "matrix")  # fields of a row
COUNTED_HEADER = ("registers", "spills", "shared", "matrix")


def shape(row: Row, kernel: str) -> str:
    """`128 to 128 channels, 3x3, stride 1, 56x56 pixels, batch 128`."""
    strides = row["stride_h"], row["stride_w"]
    stride = strides[0] if strides[0] == strides[1] else "x".join(strides)
    return (
        f"{row['c_in']} to {row['c_out']} channels, {kernel}, stride {stride}, "
        f"{row['h_in']}x{row['w_in']} pixels, batch {row['batch']}"
    )


def subject(rows: list[Row]) -> str:
    """What a report is about, in a line."""
    layers = first_of_each_layer(rows)
    first = layers[0]
    if across_groups(rows):
        what = shape(first, f"{first['kh']}x{first['kw']}")
    elif across_kernels(rows):
        what = shape(first, "depthwise")
    else:
        what = f"{len(layers)} layers"
    return f"{what}, {first['dtype']}, {first['layout']}"


def origin(rows: list[Row]) -> str:
    """What the times are, and the device: "modelled for nvidia_h200"."""
    return f"{ORIGINS[kind(rows)]} {rows[0]['gpu']}"


def versions(rows: list[Row]) -> str:
    """Versions and date, in a line."""
    first = rows[0]
    known = [f"{name} {first[name]}" for name in ("torch", "triton", "cudnn", "driver") if first[name]]
    return ", ".join([*known, first["utc"][:10]])


def provenance(rows: list[Row]) -> str:
    """Device, versions and date, in a line."""
    return f"{origin(rows)}, {versions(rows)}"


def number(figure: str | float, digits: int = 3) -> str:
    """A number for reading: three digits, no exponent from 0.001 up. "-" for an empty field."""
    if figure == "":
        return "-"
    value = float(figure)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        places = max(0, digits - len(str(int(abs(value)))))
        return f"{value:,.{places}f}" if abs(value) >= 1 else f"{value:.{digits}g}"
    return f"{value:.1e}"


def scaled(text: str, by: float) -> str:
    """A number for reading, in another unit."""
    return number(float(text) / by if text else "")


def spread(row: Row, unit: str) -> str:
    """`12.3 (12.1-12.9)`: a median time and, where it was measured, its 20th and 80th percentiles."""
    p20, p50, p80 = (number(row[f"{unit}_{name}"]) for name in ("p20", "p50", "p80"))
    return f"{p50} ({p20}-{p80})" if row[f"{unit}_p20"] else p50


def capitalized(text: str) -> str:
    """With a large first letter, the others as they are."""
    return text[0].upper() + text[1:]


def markdown_table(header: Sequence[str], lines: list[list[str]], left: int) -> list[str]:
    """The lines of a table whose first `left` columns are words."""
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *escaped)]


# --- `groupconv report` ----------------------------------------------------------------------------------------------

WORK = ("layer", "groups", "parameters", "", "GFLOP a pass", "", "MB a pass", "", "FLOP/byte", "")
PLOTS = {
    "overview.png": "Parameters, FLOPs and time",
    "time.png": "Time of each pass",
    "fraction.png": "Fraction of the limit reached by each pass",
    "work.png": "Parameters and FLOPs",
}


def work_cells(rows: list[Row]) -> list[list[str]]:
    """A line a layer: its work, each figure with its ratio to the ungrouped layer's."""

    def beside(text: str) -> str:
        ratio = float(text)
        return f"{ratio:.2f}" if ratio > 0.6 else f"1/{1 / ratio:.3g}"

    lines = []
    for row in first_of_each_layer(rows):
        figures = {
            "params": f"{int(row['params']):,}", "flops": scaled(row["flops"], 1e9), "bytes": scaled(row["bytes"], 1e6),
            "intensity": number(row["intensity"]),
        }  # fmt: skip
        cells = [cell for name, figure in figures.items() for cell in (figure, beside(row[f"{name}_ratio"]))]
        lines.append([row["layer"], row["groups"], *cells])
    return lines


def time_header(rows: list[Row]) -> list[str]:
    """The columns of `time_cells`."""
    if kind(rows) == "modelled":
        times = ["us", "floor us", "of limit", "bound by"]
        columns = [*(f"{name} (modelled)" for name in times), "error (interpreter)"]
    else:
        columns = ["us p50 (p20-p80)", "floor us", "of limit", "error"]
    return ["layer", "pass", "provider", *columns, *COUNTED_HEADER, "auto takes", "note"]


def time_cells(rows: list[Row]) -> list[list[str]]:
    """A line a layer, pass and provider: time, fraction of the limit, error, resources, and what "auto" takes."""
    autos = {(row["layer"], row["pass"]): row for row in rows if row["provider"] == "auto"}
    lines = []
    for row in layer_rows(rows):
        if row["provider"] == "auto" and _repeats(row, rows):
            continue
        fraction = f"{float(row['fraction']):.1%}" if row["fraction"] else "-"
        cells = [row["layer"], row["pass"], NAMES.get(row["provider"], row["provider"])]
        cells += [spread(row, "us"), number(row["floor_us"]), fraction]
        if kind(rows) == "modelled":
            cells.append(row["bound"] or "-")
        cells.append(f"{float(row['max_rel_err']):.1e}" if row["max_rel_err"] else "-")
        cells += [row[name] or "-" for name in COUNTED]
        auto = autos.get((row["layer"], row["pass"]))
        cells.append(takes(auto) if auto else "-")
        lines.append([*cells, row["note"] if row["provider"] != "auto" else ""])
    return lines


def _repeats(auto: Row, rows: list[Row]) -> bool:
    """Whether a row of "auto" has no time, or another row's."""
    same = ("layer", "pass", "us_p50", "us_p20", "us_p80")
    return not auto["us_p50"] or any(
        row["provider"] != "auto" and all(row[field] == auto[field] for field in same) for row in rows
    )


def _failed(note: str) -> bool:
    return any(word in note for word in ("wrong:", "failed:", "not compiled:", "not interpreted:"))


def tables(rows: list[Row]) -> list[Table]:
    """A report's tables for the terminal."""
    if not layer_rows(rows):
        return []
    work = Table(title=f"Work beside the ungrouped layer: {subject(rows)}")
    for name in WORK:
        work.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for line in work_cells(rows):
        work.add_row(*line)
    times = Table(title=f"Time of each pass: {provenance(rows)}; code counted, as it is compiled")
    words = ("layer", "pass", "provider", "auto takes")
    for name in time_header(rows):
        left = name in (*words, "note") or name.startswith("bound")
        times.add_column(name, justify="left" if left else "right", no_wrap=name in words)
    for of_layer in grouped(time_cells(rows), itemgetter(0)).values():
        for line in of_layer:
            times.add_row(*line, style="red" if _failed(line[-1]) else None)
        times.add_section()
    return [work, times]


def report(
    rows: list[Row], plots: list[str], taken: int, total: int, served: Iterable[rows_.Served] = (),
    chains: Iterable[rows_.Chain] = (), examples: Iterable[counted.Example] = (),
) -> str:  # fmt: skip
    """REPORT.md of the rows of a run that took `taken` of `total`. served: what the model takes for the suite; chains:
    what follows its convolutions; examples: kernels that were counted.
    """
    modelled = kind(rows) == "modelled"
    lines = [f"# {'Modelled report' if modelled else 'Report'}: {rows[0]['gpu']}", ""]
    if not layer_rows(rows):
        return "\n".join([*lines, "The time budget ended before the first layer.", ""])
    lines += [f"{capitalized(subject(rows))}; {provenance(rows)}.", ""]
    if taken < total:
        lines += [f"**Incomplete:** the time budget ended after {taken} of {total} rows.", ""]
    lines += [*(_modelled_words(rows) if modelled else _measured_words(rows)), "", LEGEND, ""]
    if any(row["pass"] == "backward" for row in rows):
        lines += ['"backward" is dgrad and wgrad by one kernel, which "auto" takes where that is faster.', ""]
    failed = [line for line in time_cells(rows) if _failed(line[-1])]
    if failed:
        lines += [f"{len(failed)} rows failed; their notes say why, and no plot shows them.", ""]
    errors = _largest_errors(rows)
    if errors:
        where = "in the interpreter, on a small batch of small maps" if modelled else "on the GPU"
        lines += [f"Largest error of our kernels against float64, {where}: {errors}.", ""]
    for name in plots:
        title = PLOTS.get(name, name)
        heading = f"## {title} (modelled)" if modelled and name != "work.png" else f"## {title}"
        lines += [heading, "", f"![{title}]({name})", ""]
    about = "Beside each figure, its ratio to the same layer without groups. Bytes: every operand moved once."
    lines += ["## Work", "", about, "", *markdown_table(WORK, work_cells(rows), 1), ""]
    lines += _served(list(served))
    lines += _chains(list(chains))
    lines += _over_model(list(examples))
    lines += _counted(rows)
    lines += [f"## Passes ({'times modelled, ' if modelled else ''}code counted)", ""]
    lines += [*markdown_table(time_header(rows), time_cells(rows), 3), ""]
    lines += ["All figures and their configurations: [results.csv](results.csv).", ""]
    return "\n".join(lines)


def _limits(rows: list[Row]) -> tuple[str, str]:
    """A report's limits, GB/s and TFLOP/s; its rows are of one dtype."""
    (gbps, tflops), *_ = [*comparison.limits(rows).values(), ("", "")]
    return number(gbps), number(tflops)


def _modelled_words(rows: list[Row]) -> list[str]:
    gbps, tflops = _limits(rows)
    targets = ", ".join(sorted({row["compiled_for"] for row in rows if row["compiled_for"]})) or "no target"
    return [
        "**Nothing in this report was measured on a GPU.** Times, floors and fractions are modelled; registers, "
        f"spills, shared memory and matrix instructions are counted in the kernels as compiled for {targets}; errors "
        "are those of the same kernels under Triton's interpreter, on a small batch of small maps, a few groups and "
        "with other tile sizes; it cannot run kernels in Gluon, those of algorithms with mma in their names: the tests "
        "do, as compiled.",
        "",
        f"The model assumes a copy at {gbps} GB/s and matrix products at {tflops} TFLOP/s ({rows[0]['source']}). "
        f'{FLOOR} "auto" is what `triton_conv` would take on this device. F.conv2d has no model, only a prior: a '
        "multiple of its floor, by group width and pass, as measured on this device, or else on an H200 (bf16, "
        "channels_last).",
    ]


def _measured_words(rows: list[Row]) -> list[str]:
    gbps, tflops = _limits(rows)
    return [
        "GPU times by events around one call, the L2 cache cleared before each repetition; median of the repetitions, "
        "with the 20th and 80th percentiles. Host overhead is not part of them as long as clearing the cache takes "
        f"longer than it. Limits of the same run: a copy at {gbps} GB/s read and written, a matrix product of "
        f"8192^3 at {tflops} TFLOP/s. {FLOOR}",
        "",
        "F.conv2d ran with torch.backends.cudnn.benchmark on; its backward is aten::convolution_backward, a gradient "
        'at a time. "auto" is what `triton_conv` takes; its row repeats that provider\'s. Errors are against float64: '
        "of some images for fprop and dgrad, of all of dw.",
    ]


def _largest_errors(rows: list[Row]) -> str:
    worst = []
    for pass_ in PLANNED:
        checked = [row for row in _own(rows) if row["pass"] == pass_ and row["max_rel_err"] and row["err_bound"]]
        if checked:
            row = max(checked, key=lambda row: float(row["max_rel_err"]))
            worst.append(f"{pass_} {float(row['max_rel_err']):.1e} (bound {float(row['err_bound']):.1e})")
    return ", ".join(worst)


def _own(rows: list[Row]) -> list[Row]:
    """The rows of our algorithms."""
    return [row for row in layer_rows(rows) if row["provider"] not in (*NAMES, "auto")]


def _served(suite: list[rows_.Served]) -> list[str]:
    """The section of what serves the suite."""
    lines = []
    for name in WIDTHS:
        for pass_ in PASSES:
            mine = [one for one in suite if (one.width, one.pass_) == (name, pass_)]
            if mine:
                counts = collections.Counter(one.algorithm for one in mine).most_common()
                ratios = [one.over_floor for one in mine]
                figures = [f"{ratio:.2f}" for ratio in (statistics.median(ratios), max(ratios))]
                lines.append([name, pass_, ", ".join(f"{who} {n}" for who, n in counts), str(len(mine)), *figures])
    if not lines:
        return []
    header = ("width", "pass", "served by", "layers", "time / floor, median", "the worst")
    about = (
        f"Of ours, what the model takes for the layers of the suite. {CLASSES} A launch is modelled as "
        f"{cost.LAUNCH_US} us: for small layers that is most of what they are over the floor."
    )
    return ["## Which algorithm serves what (modelled)", "", about, "", *markdown_table(header, lines, 3), ""]


def _chains(suite: list[rows_.Chain]) -> list[str]:
    """The section of what follows the suite's convolutions."""
    lines = []
    for name, mine in grouped(suite, attrgetter("width")).items():
        shares = []
        for follows in (*rows_.CHAINS, rows_.NORMED):
            ratios = [one.megabytes[f"{follows}, apart"] / one.megabytes[follows] for one in mine]
            shares.append(f"{statistics.geometric_mean(ratios):.2f}")
        lines.append([name, f"{sum(one.alone for one in mine)} of {len(mine)}", *shares])
    if not lines:
        return []
    about = (
        "Bytes that functions apart move, over those of one kernel, by what follows the convolution; geometric means. "
        "A derivative that is not one of the result (silu's) has the kernel store two results. One kernel: of how many "
        "layers it does the most that may follow, as far as registers are known; else torch's functions do. The last "
        "column is of a step of training with all three passes and conv_bn_act's kernels."
    )
    header = ("width", "one kernel", *rows_.CHAINS, rows_.NORMED)
    return ["## What follows a convolution (modelled)", "", about, "", *markdown_table(header, lines, 1), ""]


def _counted(rows: list[Row]) -> list[str]:
    """The section of the code of a layer of each width class: of what is fastest of ours in each pass."""
    lines = []
    for name, of_width in grouped(_own(rows), width).items():
        of_layer = [row for row in of_width if row["layer"] == of_width[0]["layer"] and timed(row) and row["registers"]]
        for pass_, of_pass in grouped(of_layer, itemgetter("pass")).items():
            best = min(of_pass, key=lambda row: float(row["us_p50"]))
            lines.append([best["layer"], name, pass_, best["provider"], *(best[field] or "-" for field in COUNTED)])
    if not lines:
        return []
    targets = ", ".join(sorted({row["compiled_for"] for row in rows if row["compiled_for"]}))
    about = (
        f"One layer of each width class, and what is planned of ours for its passes, as compiled for {targets}: "
        "registers a thread; bytes of spills, of a thread; bytes of shared memory, of a program; instructions of the "
        "matrix unit, as they stand in the code."
    )
    header = ("layer", "width", "pass", "algorithm", *COUNTED_HEADER)
    return ["## Counted", "", about, "", *markdown_table(header, lines, 4), ""]


def _over_model(examples: list[counted.Example]) -> list[str]:
    """The section of what is counted over what is modelled."""
    if not examples:
        return []
    near = []
    for name, tolerance in counted.NEAR.items():
        ratios = [ratio for one in examples if (ratio := one.over[name]) is not None]
        within = sum(abs(ratio - 1) <= tolerance for ratio in ratios)
        near.append(f"{name.replace('_', ' ')} {within} of {len(ratios)} within {tolerance:.0%}")
    conflicts = [one.conflicts for one in examples if one.conflicts is not None]
    free = sum(ratio <= counted.CONFLICTS for ratio in conflicts)
    about = (
        f"A planned kernel of each algorithm, pass and layout, bf16, compiled for {examples[0].target} and run "
        "instruction by instruction on its layer with two images, few groups and a small map, where what is done once "
        f"a program weighs more than in the whole: {'; '.join(near)}. The last column has the turns that shared memory "
        f"took over the fewest that its bytes could: {free} of {len(conflicts)} are free of bank conflicts, or nearly."
    )
    header = ("algorithm", "pass", "layout", "layer", *(name.replace("_", " ") for name in counted.NEAR), "conflicts")
    lines = [
        [one.algorithm, one.pass_, one.layout, one.layer, *map(_ratio, (*one.over.values(), one.conflicts))]
        for one in examples
    ]
    return ["## Counted over modelled", "", about, "", *markdown_table(header, lines, 4), ""]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# --- `groupconv bench` -----------------------------------------------------------------------------------------------

MOST_LOSSES_LISTED = 10
# The plots of each dtype and layout, by the first word of their files' names; then those of a run.
BENCH_PLOTS = {
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
ABOUT = ("layer", "pass", "dtype", "layout")


def bench_table(folder: pathlib.Path) -> Table:
    """A bench's table for the terminal: geometric means of speedups by dtype, layout, pass and width class."""
    layers, models, host = comparison.read(folder)
    first = layers or models or host
    about = provenance(first) if first else "the run ended before its first row"
    table = Table(title=f"Speedup over the best of PyTorch, and of how many layers: {about}")
    for name in (*SUMMARY[:4], *WIDTHS):
        table.add_column(name, justify="right" if name in WIDTHS else "left")
    means = comparison.summary(layers)
    for key, mine in grouped(means, lambda mean: (mean.of, mean.dtype, mean.layout, mean.pass_)).items():
        cells = {mean.width: f"{mean.over_best:.2f} ({mean.layers})" for mean in mine}
        table.add_row(*key, *(cells.get(name, "-") for name in WIDTHS))
    return table


def bench(folder: pathlib.Path) -> str:
    """REPORT.md of a bench's folder. It shows the plots that lie there: draw them first (`plots.draw_bench`)."""
    layers, models, host = comparison.read(folder)
    first = layers or models or host
    if not first:
        return "# Benchmark\n\nThe run ended before its first row.\n"
    stub = kind([*layers, *models, *host]) == "stub"
    lines = [f"# {'Stub benchmark' if stub else 'Benchmark'}: {first[0]['gpu']}", ""]
    lines += [f"{capitalized(provenance(first))}; commit {first[0]['commit'] or 'unknown'}.", ""]
    if stub:
        lines += ["**The GPU is pretended: its times are the model's with noise, to try the report.**", ""]
    if layers:
        summary = [[_cell(value) for value in dataclasses.astuple(mean)] for mean in comparison.summary(layers)]
        lines += [*_bench_words(layers), "", "## Speedup", "", *markdown_table(SUMMARY, summary, 5), ""]
        lines += ["## Worst losses", "", *_losses(layers), "", "## Failed and wrong", "", *_failures(layers), ""]
    plots = [
        line
        for key in comparison.formats(layers)
        for stem, title in BENCH_PLOTS.items()
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
        lines += ["## Layers", "", *_pairs(comparison.pairs(layers)), ""]
    names = [f"[{name}]({name})" for name in FILES if (folder / name).is_file()]
    return "\n".join([*lines, f"All figures: {', '.join(names)}.", ""])


def _cell(value: float | int | str | None) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)


def _plot(path: pathlib.Path, title: str) -> list[str]:
    return [f"![{title}]({path.name})", ""] if path.is_file() else []


def _bench_words(rows: list[Row]) -> list[str]:
    limits = [
        f"{dtype}, a copy at {number(gbps)} GB/s, a matrix product at {number(tflops)} TFLOP/s"
        for dtype, (gbps, tflops) in comparison.limits(rows).items()
    ]
    by_torch = [NAMES[name] for name in TORCH if any(row["provider"] == name and timed(row) for row in rows)]
    return [
        f"Limits of the same run, bytes read and written: {'; '.join(limits) or 'none'}. {FLOOR}",
        "",
        'Speedup is PyTorch\'s median time over that of "auto", which is what `triton_conv` takes, F.conv2d among it; '
        "means are geometric. The best of PyTorch is, for each layer and pass, the fastest of what the run has of it: "
        f"{', '.join(by_torch) or 'nothing'}; cudnn.benchmark is on, and torch.compile's max_autotune. A win is above "
        f"{WIN_ABOVE}, a loss below {LOSS_BELOW}. Wrong and failed rows enter no comparison, mean or plot.",
        "",
        '"backward" is dgrad and wgrad by one kernel, beside PyTorch\'s both; where "auto" takes two kernels there is '
        f"nothing to compare. {CLASSES} The sweep is a layer across group counts.",
    ]


def _pairs(pairs: list[Pair]) -> list[str]:
    header = [*ABOUT, "best of PyTorch", "auto takes", "best, us p50 (p20-p80)", "auto, us p50 (p20-p80)", "speedup"]
    lines = [
        [
            *itemgetter(*ABOUT)(pair.auto), NAMES[pair.best["provider"]], takes(pair.auto), spread(pair.best, "us"),
            spread(pair.auto, "us"), f"{pair.speedup:.2f}", f"{float(pair.auto['fraction']):.1%}",
        ]
        for pair in pairs
    ]  # fmt: skip
    return markdown_table([*header, "of limit"], lines, 6)


def _losses(rows: list[Row]) -> list[str]:
    pairs = comparison.pairs(rows)
    lost = sorted((pair for pair in pairs if pair.speedup < LOSS_BELOW), key=lambda pair: pair.speedup)
    count = f"Speedups below {LOSS_BELOW}: {len(lost)} of {len(pairs)}"
    return (
        [f"{count}; at most {MOST_LOSSES_LISTED} are listed.", "", *_pairs(lost[:MOST_LOSSES_LISTED])]
        if lost
        else [f"{count}."]
    )


def _failures(rows: list[Row]) -> list[str]:
    lines = [
        [*itemgetter(*ABOUT, "provider")(row), row["note"] or "wrong: the error is above its bound"]
        for row in comparison.failed(rows)
    ]
    return markdown_table((*ABOUT, "provider", "note"), lines, 6) if lines else ["None."]


def _models(models: list[Row]) -> list[str]:
    header = (
        "model", "batch", "size", "dtype", "layout", "provider", "ms p50 (p20-p80)", "speedup", "images/s", "peak GiB",
        "loss", "loss of torch", "layers converted", "note",
    )  # fmt: skip
    steps = comparison.steps(models)
    lines = []
    for row in models:
        key = itemgetter(*header[:5])(row)
        speedup = comparison.step_speedup(steps[key]) if row["provider"] == "groupconv" else None
        lines.append([*key, row["provider"], spread(row, "ms"), f"{speedup:.2f}x" if speedup else "-"])
        lines[-1] += [number(row["images_per_s"]), scaled(row["peak_bytes"], 2**30)]
        lines[-1] += [row[name] or "-" for name in ("loss", "loss_of_torch", "converted", "note")]
    return markdown_table(header, lines, 6)
