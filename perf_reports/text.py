"""A report in words: the tables that are printed, and REPORT.md. Both come from the CSV's rows."""

from __future__ import annotations

from rich.table import Table

from ..problem import PLANNED
from . import rows as rows_

Row = dict[str, str]
NAMES = {
    "torch_contiguous": "F.conv2d contiguous", "torch_channels_last": "F.conv2d channels_last",
    rows_.PRIOR: "F.conv2d (prior)",
}  # fmt: skip
ORIGINS = {"measured": "measured on", "modelled": "modelled for", "stub": "stub clock: not measurements, on"}


def layer_rows(rows: list[Row]) -> list[Row]:
    """The rows that are about a layer, not about the device."""
    return [row for row in rows if row["provider"] not in rows_.LIMITS]


def kind(rows: list[Row]) -> str:
    """What the rows' times are: "measured"; where any is not, "modelled" or "stub"."""
    return next((row["kind"] for row in rows if row["kind"] != "measured"), "measured")


def is_modelled(rows: list[Row]) -> bool:
    return kind(rows) == "modelled"


def timed(row: Row) -> bool:
    """Whether a row has a time and, as far as they were checked, right numbers. No other is compared or drawn."""
    checked = row["max_rel_err"] and row["err_bound"]
    return bool(row["us_p50"]) and (not checked or float(row["max_rel_err"]) <= float(row["err_bound"]))


def takes(auto: Row) -> str:
    """What a row of "auto" takes: an algorithm, F.conv2d or "dgrad and wgrad"."""
    return auto["note"].split(";")[0].removeprefix("takes ")


def across_groups(rows: list[Row]) -> bool:
    """Whether the layers differ in nothing but their groups."""
    fields = [field for field in rows_.PROBLEM_FIELDS if field != "groups"]
    return len({tuple(row[field] for field in fields) for row in layer_rows(rows)}) <= 1


def across_kernels(rows: list[Row]) -> bool:
    """Whether the layers are depthwise and differ in nothing but a square kernel and its padding."""
    free = ("kh", "kw", "pad_top", "pad_bottom", "pad_left", "pad_right")
    fields = [field for field in rows_.PROBLEM_FIELDS if field not in free]
    layers = _first_of_each_layer(rows)
    sizes = {row["kh"] for row in layers if row["kh"] == row["kw"] and row["groups"] == row["c_in"]}
    return 1 < len(layers) == len(sizes) and len({tuple(row[field] for field in fields) for row in layers}) == 1


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
    first = layer_rows(rows)[0]
    if across_groups(rows):
        what = shape(first, f"{first['kh']}x{first['kw']}")
    elif across_kernels(rows):
        what = shape(first, "depthwise")
    else:
        what = f"{len(_first_of_each_layer(rows))} layers"
    return f"{what}, {first['dtype']}, {first['layout']}"


def origin(rows: list[Row]) -> str:
    """What the times are, and the device: "modelled for nvidia_h200"."""
    return f"{ORIGINS[kind(rows)]} {rows[0]['gpu']}"


def versions(rows: list[Row]) -> str:
    """Versions and date, in a line."""
    first = rows[0]
    found = [f"{name} {first[name]}" for name in ("torch", "triton", "cudnn", "driver") if first[name]]
    return ", ".join([*found, first["utc"][:10]])


def provenance(rows: list[Row]) -> str:
    """Device, versions and date, in a line."""
    return f"{origin(rows)}, {versions(rows)}"


def number(text: str, digits: int = 3) -> str:
    """A number for reading: three digits, no exponent from 0.001 up."""
    if not text:
        return "-"
    value = float(text)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        places = max(0, digits - len(str(int(abs(value)))))
        return f"{value:,.{places}f}" if abs(value) >= 1 else f"{value:.{digits}g}"
    return f"{value:.1e}"


def scaled(text: str, by: float) -> str:
    """A number for reading, in another unit."""
    return number(str(float(text) / by)) if text else "-"


def spread(row: Row, unit: str) -> str:
    """`12.3 (12.1-12.9)`: a median time and, where it was measured, its 20th and 80th percentiles."""
    p20, p50, p80 = (number(row[f"{unit}_{name}"]) for name in ("p20", "p50", "p80"))
    return f"{p50} ({p20}-{p80})" if row[f"{unit}_p20"] else p50


def _times_ungrouped(text: str) -> str:
    ratio = float(text)
    return f"{ratio:.2f}" if ratio > 0.6 else f"1/{1 / ratio:.3g}"


WORK = ("layer", "groups", "parameters", "", "GFLOP a pass", "", "MB a pass", "", "FLOP/byte", "")


def work_cells(rows: list[Row]) -> list[list[str]]:
    """A line a layer: its work, each figure with its ratio to the ungrouped layer's."""
    lines = []
    for row in _first_of_each_layer(rows):
        figures = []
        for name, value in (
            ("params", f"{int(row['params']):,}"),
            ("flops", scaled(row["flops"], 1e9)),
            ("bytes", scaled(row["bytes"], 1e6)),
            ("intensity", number(row["intensity"])),
        ):
            figures += [value, _times_ungrouped(row[f"{name}_ratio"])]
        lines.append([row["layer"], row["groups"], *figures])
    return lines


def _first_of_each_layer(rows: list[Row]) -> list[Row]:
    return list({row["layer"]: row for row in reversed(layer_rows(rows))}.values())[::-1]


def time_header(rows: list[Row]) -> list[str]:
    """The columns of `time_cells`."""
    label = "us (modelled)" if is_modelled(rows) else "us p50 (p20-p80)"
    limit = "floor us (modelled)" if is_modelled(rows) else "floor us"
    error = "error (interpreter)" if is_modelled(rows) else "error"
    header = ["layer", "pass", "provider", label, limit, "of limit"]
    if is_modelled(rows):
        header[-1] += " (modelled)"
        header.append("bound by (modelled)")
    return [*header, error, "registers", "spills", "shared", "matrix", "auto takes", "note"]


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
        if is_modelled(rows):
            cells.append(row["bound"] or "-")
        cells.append(f"{float(row['max_rel_err']):.1e}" if row["max_rel_err"] else "-")
        cells += [row[name] or "-" for name in ("registers", "spill_bytes", "shared_bytes", "matrix")]
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


def tables(rows: list[Row]) -> list[Table]:
    """The tables for the terminal."""
    if not layer_rows(rows):
        return []
    work = Table(title=f"Work beside the ungrouped layer: {subject(rows)}")
    for name in WORK:
        work.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for line in work_cells(rows):
        work.add_row(*line)
    times = Table(title=f"Time of each pass: {provenance(rows)}")
    for name in time_header(rows):
        left = name in ("layer", "pass", "provider", "auto takes", "note") or name.startswith("bound")
        times.add_column(
            name, justify="left" if left else "right", no_wrap=name in ("layer", "pass", "provider", "auto takes")
        )
    before = ""
    for line in time_cells(rows):
        if before not in ("", line[0]):
            times.add_section()
        before = line[0]
        times.add_row(*line, style="red" if _failed(line[-1]) else None)
    return [work, times]


def _failed(note: str) -> bool:
    return any(word in note for word in ("wrong:", "failed:", "not compiled:", "not interpreted:"))


def markdown_table(header, lines: list[list[str]], left: int) -> list[str]:
    """The lines of a table whose first `left` columns are words."""
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *escaped)]


PLOTS = {
    "overview.png": "Parameters, FLOPs and time",
    "time.png": "Time of each pass",
    "fraction.png": "Fraction of the limit reached by each pass",
    "work.png": "Parameters and FLOPs",
}


def markdown(rows: list[Row], plots: list[str], taken: int, total: int) -> str:
    """REPORT.md of the rows of a run that took `taken` of `total`."""
    modelled = is_modelled(rows)
    first = rows[0]
    lines = [f"# {'Modelled report' if modelled else 'Report'}: {first['gpu']}", ""]
    if not layer_rows(rows):
        return "\n".join([*lines, "The time budget ended before the first layer.", ""])
    lines += [f"{subject(rows)[0].upper()}{subject(rows)[1:]}; {provenance(rows)}.", ""]
    if taken < total:
        lines += [f"**Incomplete:** the time budget ended after {taken} of {total} rows.", ""]
    lines += [*(_modelled_words(rows) if modelled else _measured_words(rows)), ""]
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
        lines += [f"## {PLOTS.get(name, name)}{' (modelled)' if modelled and name != 'work.png' else ''}", ""]
        lines += [f"![{PLOTS.get(name, name)}]({name})", ""]
    about = "Beside each figure, its ratio to the same layer without groups. Bytes: every operand moved once."
    lines += ["## Work", "", about, "", *markdown_table(WORK, work_cells(rows), 1), ""]
    lines += [f"## Passes{' (times modelled)' if modelled else ''}", ""]
    lines += [*markdown_table(time_header(rows), time_cells(rows), 3), ""]
    lines += ["All figures and their configurations: [results.csv](results.csv).", ""]
    return "\n".join(lines)


def _limits(rows: list[Row]) -> tuple[str, str]:
    by_provider = {row["provider"]: row for row in rows}
    copy, matrix = (by_provider.get(name, {}) for name in rows_.LIMITS)
    return number(copy.get("gbps", "")), number(matrix.get("tflops", ""))


def _modelled_words(rows: list[Row]) -> list[str]:
    copy, matrix = _limits(rows)
    compiled_for = ", ".join(sorted({row["compiled_for"] for row in rows if row["compiled_for"]})) or "no target"
    return [
        "**Nothing in this report was measured on a GPU.** Times, floors and fractions are modelled; registers, spills "
        f"and shared memory are those of the kernels as compiled for {compiled_for}; errors are those of the "
        "same kernels under Triton's interpreter, on a small batch of small maps, a few groups and with other tile "
        "sizes.",
        "",
        f"The model assumes a copy at {copy} GB/s and matrix products at {matrix} TFLOP/s ({rows[0]['source']}). The "
        "floor is the larger of the time to move every operand once and that of the useful FLOPs; the fraction of the "
        'limit is floor / time. "auto" is what `triton_conv` would take on this device. F.conv2d has '
        "no model, only a prior: a multiple of the floor, by group width and pass, that nobody measured here.",
    ]


def _measured_words(rows: list[Row]) -> list[str]:
    copy, matrix = _limits(rows)
    return [
        "GPU times by events around one call, the L2 cache cleared before each repetition; median of the repetitions, "
        "with the 20th and 80th percentiles. Host overhead is not part of them as long as clearing the cache takes "
        f"longer than it. Limits of the same run: a copy at {copy} GB/s read and written, a matrix product of "
        f"8192^3 at {matrix} TFLOP/s. The floor is the larger of the time to move every operand once and that of the "
        "useful FLOPs; the fraction of the limit is floor / time.",
        "",
        "F.conv2d ran with torch.backends.cudnn.benchmark on; its backward is aten::convolution_backward, a gradient "
        'at a time. "auto" is what `triton_conv` takes; its row repeats that provider\'s. Errors are against float64: '
        "of some images for fprop and dgrad, of all of dw.",
    ]


def _largest_errors(rows: list[Row]) -> str:
    found = []
    for pass_ in PLANNED:
        mine = [
            row
            for row in rows
            if row["pass"] == pass_ and row["max_rel_err"] and row["err_bound"] and row["provider"] != "auto"
        ]
        if mine:
            worst = max(mine, key=lambda row: float(row["max_rel_err"]))
            found.append(f"{pass_} {float(worst['max_rel_err']):.1e} (bound {float(worst['err_bound']):.1e})")
    return ", ".join(found)
