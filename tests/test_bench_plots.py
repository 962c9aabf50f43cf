"""Plots and text of `groupconv bench`, from CSV files of rows whose times the tests choose."""

import csv
import dataclasses
import functools
import io
import math
import random
import re

import pytest
from matplotlib import image
from pretended import read
from rich.console import Console

from groupconv import cost, devices
from groupconv.common import Layer
from groupconv.measuring import lab
from groupconv.perf_reports import comparison, layers, plots, rows, text
from groupconv.problem import PLANNED, ConvProblem

TARGET = devices.DEFAULT
ENVIRONMENT = {
    "utc": "2026-11-22T10:00:00Z", "commit": "0123456789ab", "gpu": "Pretended GPU", "driver": "570.1",
    "torch": "2.13.0", "triton": "3.7.1", "cudnn": "91002",
}  # fmt: skip
FORMATS = (("bf16", "nhwc"), ("fp16", "nchw"))
WRONG = "wrong: error 1 above the bound 0.004"
LOST = "failed: OutOfMemoryError: CUDA out of memory"


def limit_rows(dtype):
    return rows.limit_rows(lab.Limits(TARGET.copy_gbps, TARGET.matrix_rate(dtype)), dtype, "measured")


def row(layer, pass_, provider, us, **more):
    """A row with a time, or without where `us` is None."""
    about = rows.row_with_floors(layer, pass_, provider, TARGET)
    if us is not None:
        about |= rows.timing_fields(layer.problem, pass_, about["floor_us"], us, 0.9 * us, 1.2 * us)
    return about | more


def pass_rows(layer, pass_, times, takes):
    """The rows of a pass: times by provider, and what "auto" takes of them."""
    same = comparison.SAME_FORMAT[layer.problem.layout]
    auto = row(layer, pass_, "auto", times[takes], note=f"takes {'F.conv2d' if takes == same else takes}")
    return [*(row(layer, pass_, name, us) for name, us in times.items()), auto]


def sweep(dtype, layout, counts=(1, 4, 32, 128)):
    padded = (1, 1, 1, 1)
    problems = [
        ConvProblem(8, 128, 28, 28, 128, 3, 3, (1, 1), padded, (1, 1), g, dtype, layout, layout) for g in counts
    ]
    return [Layer(f"g{problem.groups}", problem) for problem in problems]


def shipped(dtype, layout):
    return layers.suite(dtype, layout)[::5]


def replaced(table, layer, pass_, provider, **fields):
    """The rows with one that has other fields, and no time."""
    untimed = dict.fromkeys(("us_p20", "us_p50", "us_p80", "tflops", "gbps", "fraction"))
    about = layer.name, layer.problem.dtype, pass_, provider
    (mine,) = [r for r in table if r.get("layer") and (r["layer"], r["dtype"], r["pass"], r["provider"]) == about]
    return [r | untimed | fields if r is mine else r for r in table]


@functools.cache
def random_rows():
    """Every provider of every pass takes a seeded random time; then one is wrong, one failed and one F.conv2d's."""
    chance, table = random.Random(20261122), []
    for dtype, layout in FORMATS:
        table += limit_rows(dtype)
        for layer in [*sweep(dtype, layout), *shipped(dtype, layout)]:
            for pass_, names in rows.reported(layer.problem, TARGET):
                floor = cost.floor_us(layer.problem, pass_, TARGET)
                times = {name: floor * chance.uniform(1.1, 4) for name in (*names, *comparison.TORCH, "flag_gems")}
                times["flag_gems"] = floor  # the fastest, and neither ours nor PyTorch's
                table += pass_rows(layer, pass_, times, chance.choice([*names, comparison.SAME_FORMAT[layout]]))
    wrong, failed, apart = shipped(*FORMATS[0])[:3]
    table = replaced(table, wrong, "fprop", "implicit_gemm", max_rel_err=1.0, err_bound=4e-3, note=WRONG)
    table = replaced(table, wrong, "fprop", "auto", note=f"takes implicit_gemm; {WRONG}")
    table = replaced(table, failed, "dgrad", "torch_channels_last", note=LOST)
    return replaced(table, apart, "backward", "auto", note="takes dgrad and wgrad")


def model_rows():
    common = {"batch": 128, "size": 224, "dtype": "bf16", "converted": 16, "loss": 6.9, "loss_of_torch": 6.91}
    for layout, torch_ms, ours_ms in (("nhwc", 60.0, 48.0), ("nchw", 50.0, None)):
        for provider, ms in (("torch", torch_ms), ("groupconv", ours_ms)):
            about = {"model": "timm:resnext50_32x4d", "layout": layout, "provider": provider, **common}
            times = {"ms_p20": 0.9 * ms, "ms_p50": ms, "ms_p80": 1.1 * ms, "images_per_s": 128e3 / ms} if ms else {}
            yield about | times | ({"peak_bytes": 3 * 2**30} if ms else {"note": LOST})


def host_rows():
    for step in ("forward", "forward and backward"):
        for mode in ("eager", "compiled", "graph"):
            for i, provider in enumerate(("triton_conv", "F.conv2d")):
                # The last has no time.
                lost = (step, mode, provider) == ("forward and backward", "graph", "F.conv2d")
                yield {"step": step, "mode": mode, "provider": provider, "us": "" if lost else 10.0 + i}


def put(folder, kind="measured", **tables):
    """Write tables as a bench does: `bench=rows` is bench.csv."""
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, comparison.FILES[f"{name}.csv"], restval="")
            writer.writeheader()
            writer.writerows({**ENVIRONMENT, "kind": kind, **row} for row in table)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a bench leaves, with its plots; and how they were drawn."""
    path = tmp_path_factory.mktemp("bench") / "measured"
    put(path, bench=random_rows(), models=model_rows(), host=host_rows())
    return path


@pytest.fixture(scope="module")
def figures(folder):
    return plots.draw_bench(folder)


@pytest.fixture(scope="module")
def kept(folder):
    return read(folder, "bench.csv")


def of_one(rows_, pass_):
    return [row for row in rows_ if row["pass"] == pass_ and row["us_p50"]]


DEPTHWISE = ConvProblem(8, 64, 28, 28, 64, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 64)


def known(folder, times):
    """The rows of depthwise layers by their times (ours, contiguous, channels_last, native); "auto" takes ours."""
    bench = limit_rows("bf16")
    for i, (ours, *by_torch) in enumerate(times):
        names = ("torch_contiguous", "torch_channels_last", "torch_native")
        times_us = dict(zip(names, by_torch, strict=True)) | ({"row_march": ours} if ours else {})
        bench += pass_rows(Layer(f"net.{i}", DEPTHWISE), "fprop", times_us, "row_march" if ours else names[1])
    return read(put(folder, bench=bench), "bench.csv")


def test_known_means(tmp_path):
    """Speedups of 2, 1/4, 8, 1.02 and, by F.conv2d itself, 1/2: their geometric mean, wins, losses and fallbacks."""
    kept = known(
        tmp_path,
        [(50, 300, 400, 100), (400, 100, 100, 200), (50, 400, 800, 900), (100, 102, 103, 104), (None, 100, 200, 300)],
    )
    (summary,) = comparison.summary(kept)
    assert (summary.of, summary.dtype, summary.layout, summary.pass_, summary.width) == (
        "layers", "bf16", "nhwc", "fprop", "depthwise",
    )  # fmt: skip
    assert summary.over_best == pytest.approx((2 * 0.25 * 8 * 1.02 * 0.5) ** (1 / 5))
    assert summary.over_same == pytest.approx((8 * 0.25 * 16 * 1.03 * 1) ** (1 / 5))
    assert (summary.layers, summary.wins, summary.losses, summary.fallbacks) == (5, 2, 2, 1)
    floor = cost.floor_us(DEPTHWISE, "fprop", TARGET)
    assert summary.memory_bound == 5
    assert summary.fraction == pytest.approx(floor / 100, rel=1e-3)
    assert [pair.best["provider"] for pair in comparison.pairs(kept)] == [
        "torch_native", "torch_contiguous", "torch_contiguous", "torch_contiguous", "torch_contiguous",
    ]  # fmt: skip


WIDTHS = {"depthwise": {}, "narrow": {"groups": 2}, "wide": {"c_in": 128, "groups": 2}}


@pytest.mark.parametrize(("width", "changes"), WIDTHS.items())
def test_width_classes(width, changes, tmp_path):
    layer = Layer("net.0", dataclasses.replace(DEPTHWISE, **changes))
    bench = pass_rows(layer, "wgrad", {"implicit_gemm": 1, "torch_contiguous": 2}, "implicit_gemm")
    kept = read(put(tmp_path, bench=[*limit_rows("bf16"), *bench]), "bench.csv")
    (summary,) = comparison.summary(kept)
    assert (summary.width, summary.over_best, summary.over_same) == (width, 2.0, None)


def test_wrong_and_failed_rows_are_no_pairs(kept):
    pairs = comparison.pairs(kept)
    wrong, failed, apart = (layer.name for layer in shipped(*FORMATS[0])[:3])
    there = {(pair.auto["layer"], pair.auto["dtype"], pair.auto["pass"]): pair for pair in pairs}
    assert (wrong, "bf16", "fprop") not in there
    assert (wrong, "bf16", "dgrad") in there
    assert (apart, "bf16", "backward") not in there
    assert there[failed, "bf16", "dgrad"].same is None
    assert there[failed, "bf16", "dgrad"].best["provider"] != "torch_channels_last"


@pytest.mark.parametrize("error", [1.0, math.nan])
def test_a_wrong_row_with_a_time_is_compared_and_drawn_nowhere(error, tmp_path):
    """Ours, and what "auto" takes of it, in one layer; the fastest of PyTorch in another; right ones beside them."""
    wrong, right = {"max_rel_err": error, "err_bound": 4e-3}, {"max_rel_err": 1e-3, "err_bound": 4e-3}
    ours, best, sound = (Layer(f"net.{i}", DEPTHWISE) for i in range(3))
    times = {"row_march": 50.0, "torch_contiguous": 100.0, "torch_channels_last": 200.0}
    bench = limit_rows("bf16")
    for layer, bad in ((ours, {"row_march", "auto"}), (best, {"torch_contiguous"}), (sound, set())):
        mine = pass_rows(layer, "fprop", times, "row_march")
        bench += [r | (wrong if r["provider"] in bad else right) for r in mine]
    kept = read(put(tmp_path, bench=bench), "bench.csv")
    assert {pair.auto["layer"]: pair.speedup for pair in comparison.pairs(kept)} == {"net.1": 4.0, "net.2": 2.0}
    (summary,) = comparison.summary(kept)
    assert (summary.layers, summary.wins) == (2, 2)
    assert summary.over_best == pytest.approx(math.sqrt(8))
    for figure in plots.draw_bench(tmp_path).values():
        (axes,) = figure.axes
        for collection in axes.collections:
            assert len(collection.get_offsets()) <= 2
    assert plots.points(kept, "fprop", "row_march", "us_p50") == ([64, 64], [50.0, 50.0])
    assert plots.points(kept, "fprop", "torch_contiguous", "us_p50") == ([64, 64], [100.0, 100.0])
    failures = text.bench(tmp_path).split("## Failed and wrong\n")[1].split("\n## ")[0]
    reason = "wrong: the error is above its bound"
    assert f"| net.0 | fprop | bf16 | nhwc | row_march | {reason} |" in failures
    assert "| net.0 | fprop | bf16 | nhwc | auto | takes row_march |" in failures
    assert f"| net.1 | fprop | bf16 | nhwc | torch_contiguous | {reason} |" in failures
    assert failures.count("\n| ") == 2 + 3


def test_plots_are_written(folder, figures, tmp_path):
    """Each as a picture that REPORT.md shows, and as a page of a PDF; nothing half-written is left."""
    per_format = ("groups", "fraction", "speedup", "roofline")
    names = [f"{stem}_{dtype}_{layout}" for dtype, layout in FORMATS for stem in per_format]
    assert list(figures) == [*names, "host", "models"]
    some = {name: figures[name] for name in ("groups_bf16_nhwc", "roofline_fp16_nchw", "host", "models")}
    for path in plots.write(some, folder):
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05
    assert sorted(re.findall(r"\]\((\w+)\.png\)", text.bench(folder))) == sorted(some)
    plots.write_pdf(some, tmp_path / "bench.pdf")
    assert len(re.findall(rb"/Type /Page\b", (tmp_path / "bench.pdf").read_bytes())) == len(some)
    assert [*folder.glob(".*"), *tmp_path.glob(".*")] == []


def drawn(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_lines_across_group_counts(figures, kept):
    axes = figures["groups_bf16_nhwc"].axes
    assert [panel.get_title() for panel in axes] == list(PLANNED)
    for panel in axes:
        for label, provider in (("auto", "auto"), ("F.conv2d channels_last", "torch_channels_last")):
            expected = {
                int(row["groups"]): float(row["us_p50"])
                for row in of_one(kept, panel.get_title())
                if comparison.is_sweep(row) and (row["dtype"], row["provider"]) == ("bf16", provider)
            }
            assert drawn(panel, label) == expected
            assert len(expected) > 1
    lines = axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == len(lines)
    assert len({line.get_marker() for line in lines if line.get_label() != "auto"}) == len(lines) - 1


def test_bars_of_speedups(figures, kept):
    """Each bar ends at its layer's speedup, in order, hatched where it is a loss; wrong rows have none."""
    panels = {axes.get_title(): axes for axes in figures["speedup_bf16_nhwc"].axes}
    wrong = shipped(*FORMATS[0])[0].name
    for pass_, axes in panels.items():
        names = [label.get_text() for label in axes.get_yticklabels()]
        expected = {
            pair.auto["layer"]: pair.speedup
            for pair in comparison.pairs(kept)
            if (pair.auto["dtype"], pair.auto["pass"]) == ("bf16", pass_) and not comparison.is_sweep(pair.auto)
        }
        assert names == sorted(expected, key=expected.get)
        assert (wrong in names) == (pass_ != "fprop")
        lengths = [bar for bar in axes.patches if not math.isnan(bar.get_width())]
        bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in lengths}
        assert len(bars) == len(names)
        for y, name in enumerate(names):
            assert 1 + bars[y].get_width() == pytest.approx(expected[name])
            assert (bars[y].get_hatch() == "////") == (expected[name] < 0.97)
    assert list(panels) == list(PLANNED)


def test_fractions_and_rooflines(figures, kept):
    for pass_, fraction, roofline in zip(
        PLANNED, figures["fraction_fp16_nchw"].axes, figures["roofline_fp16_nchw"].axes, strict=True
    ):
        autos = [pair.auto for pair in comparison.pairs(kept) if pair.auto["pass"] == pass_]
        autos = [row for row in autos if row["dtype"] == "fp16" and not comparison.is_sweep(row)]
        (points,) = [collection for collection in fraction.collections if collection.get_label() == "auto"]
        names = [label.get_text() for label in figures["fraction_fp16_nchw"].axes[0].get_yticklabels()]
        fractions = {names[round(y)]: x / 100 for x, y in points.get_offsets()}
        assert fractions == pytest.approx({row["layer"]: float(row["fraction"]) for row in autos})
        (points,) = [collection for collection in roofline.collections if collection.get_label() == "auto"]
        places = sorted(tuple(point) for point in points.get_offsets())
        assert places == sorted((float(row["intensity"]), float(row["tflops"])) for row in autos)
        roof = drawn(roofline, "limit")
        assert max(roof.values()) == pytest.approx(TARGET.matrix_rate("fp16"))
        assert min(roof.values()) == pytest.approx(min(roof) * TARGET.copy_gbps / 1e3)


def test_bars_of_models_and_host(figures):
    (axes,) = figures["models"].axes
    words = [label.get_text() for label in axes.texts]
    assert words[:2] == ["48.0 ms, 1.25x, peak 3.00 GiB", ""]
    assert words[2:] == ["60.0 ms, peak 3.00 GiB", "50.0 ms, peak 3.00 GiB"]
    (axes,) = figures["host"].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{row['step']}, {row['mode']}" for row in host_rows() if row["provider"] == "F.conv2d"]
    assert [bar.get_width() for bar in axes.patches] == [*[10.0] * 6, *[11.0] * 5, pytest.approx(math.nan, nan_ok=True)]


def test_report(folder, kept):
    said = text.bench(folder)
    assert "Measured on Pretended GPU, torch 2.13.0, triton 3.7.1, cudnn 91002, driver 570.1, 2026-11-22" in said
    assert "stub" not in said
    wrong, failed, apart = (layer.name for layer in shipped(*FORMATS[0])[:3])
    failures = said.split("## Failed and wrong\n")[1].split("\n## ")[0]
    assert f"| {wrong} | fprop | bf16 | nhwc | implicit_gemm | {WRONG} |" in failures
    assert f"| {wrong} | fprop | bf16 | nhwc | auto | takes implicit_gemm; {WRONG} |" in failures
    assert f"| {failed} | dgrad | bf16 | nhwc | torch_channels_last | {LOST} |" in failures
    assert failures.count("\n| ") == 2 + 3
    pairs = comparison.pairs(kept)
    losses = said.split("## Worst losses\n")[1].split("\n## ")[0]
    worst = sorted(pair.speedup for pair in pairs)[:10]
    assert re.findall(r"\| ([\d.]+) \| [\d.]+% \|", losses) == [f"{speedup:.2f}" for speedup in worst]
    full = said.split("## Layers\n")[1]
    assert full.count("\n| ") == 2 + len(pairs)
    assert f"| {apart} | backward | bf16 |" not in full
    assert "| timm:resnext50_32x4d | 128 | 224 | bf16 | nhwc | groupconv | 48.0 (43.2-52.8) | 1.25x |" in said
    assert f"| {LOST} |" in said.split("## Training steps of whole models\n")[1]
    assert "| forward and backward | graph | triton_conv | 10.0 |" in said
    assert "| forward and backward | graph | F.conv2d | - |" in said


def printed(folder):
    console = Console(file=io.StringIO(), width=200)
    console.print(text.bench_table(folder))
    return console.file.getvalue()


def test_table_for_the_terminal(tmp_path):
    known(tmp_path, [(50, 300, 400, 100), (50, 400, 800, 900)])
    said = printed(tmp_path)
    assert "measured on Pretended GPU" in " ".join(said.split())
    (line,) = [line for line in said.splitlines() if "fprop" in line]
    assert line.split("│")[1:-1] == [" layers ", " bf16  ", " nhwc   ", " fprop ", "  4.00 (2) ", "      - ", "    - "]


def test_a_stub_clock_is_said_everywhere(tmp_path):
    layer = sweep("bf16", "nhwc")[1]
    times = {"row_march": 30.0, "torch_contiguous": 40.0}
    bench = [r for one in (layer, Layer("net.0", DEPTHWISE)) for r in pass_rows(one, "fprop", times, "row_march")]
    put(tmp_path, "stub", bench=[*limit_rows("bf16"), *bench], models=model_rows(), host=host_rows())
    origin = "stub clock: not measurements, on Pretended GPU"
    figures = plots.draw_bench(tmp_path)
    assert len(figures) == 6
    for figure in figures.values():
        what, *_, last = figure.get_suptitle().splitlines()
        assert what.endswith(" (stub)")
        assert last.startswith(origin)
        labels = [f() for axes in figure.axes for f in (axes.get_title, axes.get_xlabel, axes.get_ylabel)]
        assert any(labels)
        counted = ("", plots.INTENSITY, *plots.ALONG.values())
        assert all(label.endswith(" (stub)") for label in labels if label not in counted)
    said = text.bench(tmp_path)
    assert "# Stub benchmark: Pretended GPU\n" in said
    assert f"\n{origin[0].upper()}{origin[1:]}, torch 2.13.0" in said
    assert "**The GPU is pretended: its times are the model's" in said
    assert "easured on" not in said
    assert origin in " ".join(printed(tmp_path).split())


@pytest.mark.parametrize(
    ("tables", "drawn"),
    [
        ({}, []),
        ({"bench": limit_rows("bf16")}, []),
        ({"models": list(model_rows())}, ["models.png"]),
        ({"host": list(host_rows())}, ["host.png"]),
        ({"bench": [], "models": [], "host": []}, []),
        (
            {"bench": pass_rows(sweep("bf16", "nhwc")[1], "fprop", {"row_march": 30.0}, "row_march")},
            ["groups_bf16_nhwc.png"],
        ),
    ],
)
def test_runs_that_ended_early(tables, drawn, tmp_path):
    put(tmp_path, **tables)
    assert [path.name for path in plots.write(plots.draw_bench(tmp_path), tmp_path)] == drawn
    plots.write_pdf(plots.draw_bench(tmp_path), tmp_path / "bench.pdf")
    assert (tmp_path / "bench.pdf").exists() == bool(drawn)
    said = text.bench(tmp_path)
    assert [name for name in drawn if f"]({name})" not in said] == []
    assert "Pretended GPU" in said or not any(tables.values())
    assert ("ended before its first row" in said) == (not any(tables.values()))
    assert printed(tmp_path)


def test_a_bench_of_one_pass(tmp_path):
    """A pass that is missing has no panel; the legend shows what no bar of a panel is."""
    known(tmp_path, [(50, 300, 400, 100)])
    figures = plots.draw_bench(tmp_path)
    assert list(figures) == ["fraction_bf16_nhwc", "speedup_bf16_nhwc", "roofline_bf16_nhwc"]
    assert all([axes.get_title() for axes in figure.axes] == ["fprop"] for figure in figures.values())
    (legend,) = figures["speedup_bf16_nhwc"].legends
    shown = {text.get_text(): handle for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    assert list(shown) == ["depthwise", "narrow", "wide", "above 1.03", "between", "below 0.97"]
    assert shown["below 0.97"].get_hatch() == "////"
    assert len({shown[name].get_facecolor() for name in ("above 1.03", "between", "below 0.97")}) == 3


def test_sweeps_of_two_layers_are_not_drawn_as_one(tmp_path):
    one, other = (
        Layer("g4", dataclasses.replace(DEPTHWISE, c_in=channels, c_out=channels, groups=4)) for channels in (64, 128)
    )
    times = {"row_march": 1.0, "torch_native": 2.0}
    bench = [r for layer in (one, other) for r in pass_rows(layer, "fprop", times, "row_march")]
    kept = read(put(tmp_path, bench=bench), "bench.csv")
    assert len(comparison.pairs(kept)) == 2
    assert plots.draw_bench(tmp_path) == {}
