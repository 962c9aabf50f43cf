"""`groupconv report`: its rows without a GPU and with a pretended one, its files, and its refusals."""

import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from matplotlib import image

from groupconv import children, cli, cost, devices, dispatch, iterations, numerics, options, resources
from groupconv.algorithms import REGISTRY, able
from groupconv.perf_reports import (
    interpreted,
    layers,
    measure,
    passes,
    plot,
    rows,
    tables,
    text,
)
from groupconv.perf_reports.rows import Layer, Timing
from groupconv.problem import PASSES, PLANNED, ConvProblem
from groupconv.tuning import lab

PROVIDERS = {*REGISTRY, "auto", "torch_contiguous", "torch_channels_last"}
SHIPPED = pathlib.Path(__file__).parents[1] / "perf_reports" / "modelled_nvidia_h200" / "results.csv"


def layers_of(*arguments):
    args = options.parser().parse_args(["report", *arguments])
    return layers.make(args, args.dtype, args.layout)


def small_layers(counts=(1, 4)):
    return [Layer(f"g{g}", ConvProblem(2, 8, 6, 5, 8, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), g, "fp32")) for g in counts]


class FakeClock:
    """Seconds that pass only when something is timed."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def race(self, runs, rounds):
        self.now += 1.0
        return {name: [19.0, 19.0, 20.0, 21.0, 22.0] for name in runs}


class FakeLab(lab.Lab):
    """A device whose clock is ours."""

    def __init__(self, device, clock=None):
        super().__init__(devices.DEFAULT, "Pretended GPU", device, (clock or FakeClock()).race)

    def limits(self, dtype):
        return lab.Limits(copy_gbps=4000.0, matrix_tflops=50.0)


def measured_rows(device, clock=None, counts=(1, 4)):
    return measure.rows(small_layers(counts), FakeLab(device, clock))


@pytest.fixture
def writer(tmp_path):
    with rows.Writer(tmp_path / "results.csv", rows.environment("measured", "Pretended GPU")) as writer:
        yield writer


def check_png(path: pathlib.Path):
    pixels = image.imread(path)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.05


def test_quick_report(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("not the report's")
    # Interpreted kernels cannot be compiled: the report has to see to it that a user's setting does not matter.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "groupconv", "report", "--quick", "--out", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plots = ["fraction.png", "overview.png", "time.png", "work.png"]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*plots, "REPORT.md", "notes.txt", "results.csv"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for name in plots:
        check_png(folder / name)

    found = rows.read(folder / "results.csv")
    assert {row["kind"] for row in found} == {"modelled"}
    assert {row["gpu"] for row in found} == {"nvidia_h200"}
    priors = [row for row in found if row["provider"] == rows.PRIOR]
    assert [(row["groups"], row["pass"]) for row in priors] == [(g, p) for g in ("4", "32") for p in PLANNED]
    own = [row for row in found if row["provider"] in REGISTRY]
    assert {(row["groups"], row["pass"]) for row in own} == {(g, p) for g in ("4", "32") for p in PLANNED}
    assert {row["provider"] for row in own} == {"implicit_gemm", "row_block", "row_block_tma", "row_march"}
    for row in own:
        assert 1e-4 < float(row["max_rel_err"]) <= float(row["err_bound"]) == 4e-3
        assert float(row["us_p50"]) >= float(row["floor_us"]) > 0
        assert int(row["registers"]) > 0
        assert row["matrix"]
        assert not row["note"]

    said = (folder / "REPORT.md").read_text()
    assert "Nothing in this report was measured" in said
    assert "us (modelled)" in said
    for name in plots:
        assert f"]({name})" in said
    assert str(tmp_path) not in said
    assert "us (modelled)" in done.stdout.replace("\n", " ")
    assert "modelled for nvidia_h200" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups", "7"], "--groups: 7 does not divide the 128 input channels"),
        (["--groups", "96", "--channels", "96", "128"], "--groups: 96 does not divide the 128 output channels"),
        (["--groups", "4", "0"], "--groups: 0 is not a positive number"),
        (["--groups", "-2"], "--groups: -2 is not a positive number"),
        (["--batch", "0"], "--batch: 0 is not a positive number"),
        (["--padding", "-1"], "--padding: -1 is not zero or more"),
        (["--channels", "1", "2", "3"], "--channels: 3 numbers, but at most 2 are taken"),
        (["--kernel", "9", "--padding", "0", "--size", "5"], "--size: a 9x9 kernel does not fit 5x5 pixels"),
        (["--budget-seconds", "0"], "--budget-seconds: 0.0 is not a positive number"),
        (["--budget-seconds", "nan"], "--budget-seconds: nan is not a positive number"),
        (["--layers", "nosuch.csv"], '--layers: \'nosuch.csv\' is not "groups", "kernels", "suite" or a CSV file'),
        (["--layers", "suite", "--groups", "2"], "--groups: a list of layers has its own group counts"),
        (["--kernels", "3", "5"], "--kernels: 3 5 is for --layers kernels, not --layers groups"),
        (["--layers", "suite", "--kernels", "3"], "--kernels: 3 is for --layers kernels, not --layers suite"),
        (["--layers", "kernels", "--kernels", "3", "0"], "--kernels: 0 is not a positive number"),
        (["--layers", "kernels", "--kernel", "3"], "--kernel: 3 is not for --layers kernels"),
        (["--layers", "kernels", "--groups", "1", "4"], "--groups: 1 4 is not for --layers kernels"),
        (
            ["--layers", "kernels", "--channels", "6", "8"],
            "--channels: 8 depthwise output channels are no multiple of 6",
        ),
        (["--layers", "kernels", "--size", "5", "--padding", "0"], "--size: a 7x7 kernel does not fit 5x5 pixels"),
        (["--layers", "kernels", "--batch", "0"], "--batch: 0 is not a positive number"),
        (["--target", "abacus"], "target 'abacus' is not known"),
    ],
)
def test_bad_arguments_end_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"groupconv report: {message}")
    assert not list(tmp_path.iterdir())


HEADER = "name,N,C_in,H,W,C_out,KH,KW,stride_h,stride_w,pad_h,pad_w,dil_h,dil_w,groups"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,N\na,1\n", "has no column C_in"),
        (f"{HEADER}\n", "has no layers"),
        (f"{HEADER}\na,1,8,9,9,8,3,3,1,1,1,1,1,1,three\n", "line 2, column groups: 'three' is not a whole number"),
        (f"{HEADER}\na,1,8,9,9,8,3,3,1,1,1,1,1,1\n", "line 2, column groups: None is not a whole number"),
        (f"{HEADER}\na,1,8,9,9,8,3,3,0,1,1,1,1,1,1\n", "line 2, column stride_h: 0 is not positive"),
        (f"{HEADER}\na,1,8,9,9,8,3,3,1,1,1,1,1,1,3\n", "line 2: 3 groups do not divide 8 and 8 channels"),
        (f"{HEADER}\na,1,8,1,1,8,3,3,1,1,0,0,1,1,1\n", "line 2: the kernel does not fit"),
        (f"{HEADER}\n" + 2 * "a,1,8,9,9,8,3,3,1,1,1,1,1,1,1\n", "line 3: a second layer called 'a'"),
    ],
)
def test_bad_layer_files(content, message, tmp_path, capsys):
    path = tmp_path / "layers.csv"
    path.write_text(content)
    assert cli.main(["report", "--layers", str(path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_measured_rows(device):
    found = list(measured_rows(device))
    assert len(found) == measure.count(small_layers(), devices.DEFAULT)
    assert [(row["provider"], row.get("gbps") or row["tflops"]) for row in found[:2]] == [
        ("copy_limit", 4000.0),
        ("matrix_limit", 50.0),
    ]
    for row in found[2:]:
        assert row["provider"] in PROVIDERS
        assert row["us_p50"] == 20.0
        assert row["max_rel_err"] < 1e-6
        assert row["fraction"] == pytest.approx(row["floor_us"] / 20.0)
        assert row["gbps"] == pytest.approx(row["bytes"] / 20e-6 / 1e9)
    auto = [row for row in found if row["provider"] == "auto"]
    assert len(auto) == 6
    assert all(row["note"].startswith("takes ") for row in auto)


def test_settings_are_put_back():
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision
    with lab.settings("tf32"):
        assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision) == before


def test_limits(device):
    found = lab.Lab(devices.DEFAULT, "", device, FakeClock().race).limits("fp32", copy_bytes=1000, matrix_size=10)
    assert found.copy_gbps == pytest.approx(2000 / 20e-6 / 1e9)
    assert found.matrix_tflops == pytest.approx(2000 / 20e-6 / 1e12)


def test_wrong_and_failing_kernels_are_recorded_not_timed(device, monkeypatch, tmp_path, writer):
    algorithm = next(iter(REGISTRY.values()))
    prepare = algorithm.prepare

    def wrong(problem, pass_, *others):
        call = prepare(problem, pass_, *others)
        if pass_ == "dgrad":
            raise RuntimeError("out of luck\nat length")

        def zeros(*tensors):
            return torch.zeros_like(call(*tensors))

        zeros.launches = call.launches
        return zeros

    monkeypatch.setattr(algorithm, "prepare", wrong)
    found = list(measured_rows(device))
    for row in found:
        writer.append(row)
        if row["provider"] == algorithm.NAME:
            assert "us_p50" not in row
            expected = "failed: RuntimeError: out of luck" if row["pass"] == "dgrad" else "wrong: error 1 above"
            assert row["note"].startswith(expected)
        elif row["provider"].startswith("torch_"):
            assert row["us_p50"] == 20.0
    assert "6 rows failed" in text.markdown(writer.rows, [], len(found), len(found))
    kept = rows.read(tmp_path / "results.csv")
    assert plot.points(kept, "fprop", algorithm.NAME, "us_p50") == ([], [])


def test_budget_keeps_what_there_is(device, tmp_path, writer):
    clock = FakeClock()
    seen = []
    found = measured_rows(device, clock)
    taken = rows.take(found, writer, rows.Deadline(2.5, clock), seen.append)
    found.close()
    assert clock.now == 3.0  # what had begun was finished, and nothing else begun
    assert taken == len(seen) == 2 + 2 * 5 + 1
    kept = rows.read(tmp_path / "results.csv")
    assert [row["provider"] for row in kept] == [row["provider"] for row in seen]
    said = text.markdown(kept, [], taken, 26)
    assert "**Incomplete:** the time budget ended after 13 of 26 rows" in said
    for path in plot.write(kept, tmp_path):  # of these rows none is of dgrad or wgrad
        check_png(path)


def test_rows_are_on_disk_as_they_come(device, tmp_path, writer):
    found = measured_rows(device)
    for count in range(1, 4):
        writer.append(next(found))
        assert len(rows.read(tmp_path / "results.csv")) == count
    with (tmp_path / "results.csv").open("a") as file:
        file.write("2026-11-22T00:00:00Z,abc")  # a kill in the middle of a line
    assert len(rows.read(tmp_path / "results.csv")) == 3
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv: not a report's CSV: no column "):
        rows.read(tmp_path / "other.csv")


def test_files_of_measured_rows(device, tmp_path, writer):
    """Plots and text come from the CSV alone, and call nothing modelled that was measured."""
    for row in measured_rows(device):
        writer.append(row)
    kept = rows.read(tmp_path / "results.csv")
    written = plot.write(kept, tmp_path)
    assert [path.name for path in written] == ["overview.png", "time.png", "fraction.png", "work.png"]
    for path in written:
        check_png(path)
    said = text.markdown(kept, [path.name for path in written], len(kept), len(kept))
    assert "measured on Pretended GPU" in said
    assert "modelled" not in said.lower().replace("takes", "")
    assert "20.0 (19.0-21.0)" in said


def test_layers_that_differ_get_a_line_each(device, tmp_path, writer):
    other = Layer("other", ConvProblem(2, 6, 5, 5, 6, 1, 1, groups=3, dtype="fp32"))
    for row in measure.rows([*small_layers((1,)), other], FakeLab(device)):
        writer.append(row)
    written = plot.write(rows.read(tmp_path / "results.csv"), tmp_path)
    assert [path.name for path in written] == ["fraction.png"]
    check_png(written[0])


def test_a_budget_too_short_for_any_layer(tmp_path, writer):
    writer.append(rows.limit_row("copy_limit", "bf16", 4000.0, "measured"))
    assert plot.write(writer.rows, tmp_path) == []
    assert text.tables(writer.rows) == []
    assert "ended before the first layer" in text.markdown(writer.rows, [], 1, 50)


def test_suite_is_shipped():
    found = layers_of("--layers", "suite", "--dtype", "fp16", "--layout", "nchw")
    assert len(found) == 65
    assert {(layer.problem.dtype, layer.problem.layout) for layer in found} == {("fp16", "nchw")}
    strided = next(layer for layer in found if layer.name == "resnext50_32x4d.s2d")
    assert str(strided.problem) == "n128-g32-c8x8-h56x56-k3x3-s2x2-p1x1-d1x1-fp16-nchw"


def test_group_counts_that_divide_are_the_default():
    found = layers_of("--channels", "96", "--size", "7", "5", "--kernel", "5")
    assert [layer.problem.groups for layer in found] == [1, 2, 4, 8, 16, 32]
    assert found[0].problem.y_shape == (128, 96, 7, 5)


def test_kernel_sizes_of_the_sweep():
    found = layers_of("--layers", "kernels")
    assert [layer.name for layer in found] == ["k1", "k3", "k5", "k7", "k9", "k11", "k13", "k17", "k21", "k27", "k31"]
    assert str(found[-1].problem) == "n64-g128-c1x1-h56x56-k31x31-s1x1-p15x15-d1x1-bf16-nhwc"
    given = "--kernels", "5", "2", "5", "--channels", "6", "12", "--size", "9", "8", "--padding", "3", "--batch", "7"
    found = layers_of("--layers", "kernels", *given)
    assert [str(layer.problem) for layer in found] == [
        f"n7-g6-c1x2-h9x8-k{kernel}-s1x1-p3x3-d1x1-bf16-nhwc" for kernel in ("2x2", "5x5")
    ]


def depthwise(kernel, size=6, channels=2, batch=2, **fields):
    """A small depthwise layer that keeps the size of its map."""
    pad = (kernel // 2,) * 4
    return ConvProblem(batch, channels, size, size, channels, kernel, kernel, (1, 1), pad, (1, 1), channels, **fields)


def test_shrunk_problems_keep_their_kernel_and_use_all_of_it():
    problem = layers_of("--layers", "kernels", "--kernels", "31")[0].problem
    small = interpreted.shrunk(problem)
    assert (small.kh, small.kw, small.groups, small.h_in, small.w_in) == (31, 31, 2, 16, 16)
    given = numerics.operands(small)
    assert numerics.reference(small, given, "wgrad").ne(0).all()  # a tap that meets no pixel has no gradient
    assert str(interpreted.shrunk(small_layers()[0].problem)).startswith("n2-g1-c8x8-h6x5-k3x3")


def fused_on(target):
    """A depthwise problem with a fused backward pass, and the algorithms that have it."""
    problem = depthwise(3, dtype="fp32")
    names = able(problem, "backward", target)
    if not names:
        pytest.skip("no algorithm has a fused backward pass")
    return problem, names


def test_measured_fused_pass(device, monkeypatch):
    """Rows of dgrad and wgrad by one kernel, and what "auto" takes for it."""
    problem, names = fused_on(devices.DEFAULT)
    fused = dispatch.plan_pass(problem, "backward", devices.DEFAULT, "triton")
    for plan, takes in ((fused, fused.algorithm), (None, "dgrad and wgrad")):
        monkeypatch.setattr(measure, "taken", lambda problem, pass_, target, plan=plan: plan)
        found = [row for row in measure.rows([Layer("k3", problem)], FakeLab(device)) if row.get("pass") == "backward"]
        assert [row["provider"] for row in found] == [*names, "torch_contiguous", "torch_channels_last", "auto"]
        assert found[-1]["note"] == f"takes {takes}"
        assert ("us_p50" in found[-1]) == (plan is not None)
        for row in found[:-1]:
            assert row["max_rel_err"] < 1e-6
            assert row["us_p50"] == 20
            assert row["flops"] == 4 * 2 * 2 * 36 * 9


def sweep_rows(writer, chosen, most_taps=50):
    """Rows without work: each algorithm takes its own time, one of them only small kernels, and "auto" the fastest."""
    for layer in chosen:
        problem = layer.problem
        for pass_, names in passes.reported(problem, devices.DEFAULT):
            floor = cost.floor_us(problem, pass_, devices.DEFAULT)
            served = [*names, *(["small"] if problem.kh * problem.kw < most_taps else []), "auto"]
            for time_us, name in enumerate(reversed(served), start=100):
                timing = rows.timing_fields(problem, pass_, Timing(max(time_us, 101)), floor)
                limits = {"floor_us": floor, "ungrouped_floor_us": floor}
                writer.append(rows.layer_row(layer, pass_, name) | timing | limits)


def test_work_is_that_of_one_pass():
    """The plot of work leaves out the fused backward's rows, which do the work of two passes."""
    kept = rows.read(SHIPPED)
    assert "backward" in {row["pass"] for row in kept}
    _, flops, _ = plot.draw(kept)["work"].axes
    line = flops.get_lines()[0]
    expected = {
        layer.problem.groups: layer.problem.flops("fprop") / 1e9
        for layer in layers_of()
        if layer.problem.groups in layers.UNMEASURED_GROUPS
    }
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == pytest.approx(expected, rel=1e-3)


def test_overview_of_modelled_times():
    """Three lines a pass and what "auto" takes, on one scale that holds them all; that they are modelled is said once,
    in the largest letters."""
    kept = rows.read(SHIPPED)
    figure = plot.draw(kept)["overview"]
    assert figure.get_suptitle() == "Times modelled for nvidia_h200, not measured"
    *_, fprop, dgrad, wgrad = figure.axes
    for axes, pass_ in zip((fprop, dgrad, wgrad), PASSES, strict=True):
        assert axes.get_title() == f"time of {pass_}"
        drawn = {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}
        assert list(drawn) == ["F.conv2d (prior)", "the fastest of ours", "floor", 'what "auto" takes']
        mine = [row for row in kept if row["pass"] == pass_]
        for groups in layers.UNMEASURED_GROUPS:
            times = {row["provider"]: float(row["us_p50"]) for row in mine if row["groups"] == str(groups)}
            prior, auto = times.pop(rows.PRIOR), times.pop("auto")
            assert drawn["F.conv2d (prior)"][groups] == prior
            assert drawn["the fastest of ours"][groups] == min(times.values())
            assert drawn['what "auto" takes'][groups] == auto == min(prior, *times.values())
        (floor,) = {float(row["floor_us"]) for row in mine if row["groups"] == "32"}
        assert drawn["floor"][32] == floor
        low, high = axes.get_ylim()
        assert all(low <= time_us <= high for line in drawn.values() for time_us in line.values())
        assert axes.get_ylim() == fprop.get_ylim()
    words = [f() for axes in figure.axes for f in (axes.get_title, axes.get_xlabel, axes.get_ylabel)]
    (legend,) = figure.legends
    words += [legend.get_title().get_text(), *(each.get_text() for each in legend.get_texts())]
    assert not any("modelled" in each for each in words)
    assert "128 to 128 channels, 3x3" in legend.get_title().get_text()


def test_prior_of_torch():
    """F.conv2d without a GPU: the prior that dispatch compares with, called that."""
    kept = [row for row in rows.read(SHIPPED) if row["provider"] == rows.PRIOR]
    assert {row["source"] for row in kept} == {"prior"}
    for row in kept:
        (problem,) = [layer.problem for layer in layers_of() if layer.name == row["layer"]]
        prior = cost.torch_prior_us(problem, row["pass"], devices.DEFAULT)
        assert float(row["us_p50"]) == pytest.approx(prior, rel=1e-5)
        plan = passes.taken(problem, row["pass"], devices.DEFAULT)
        assert plan is None or plan.torch_time_us == pytest.approx(prior)
    said = text.markdown(rows.read(SHIPPED), [], 1, 1)
    assert "| F.conv2d (prior) |" in said
    assert "only a prior" in said


def test_group_counts_without_a_gpu():
    """Fewer than on one: each is compiled and interpreted."""
    assert tuple(dict.fromkeys(int(row["groups"]) for row in rows.read(SHIPPED)[2:])) == layers.UNMEASURED_GROUPS
    assert set(layers.UNMEASURED_GROUPS) < set(layers.GROUPS)


def command(folder, *arguments):
    """`groupconv report` without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "groupconv", "report", "--out", str(folder), *arguments]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupted_report_leaves_an_earlier_one_whole(tmp_path):
    earlier = {name: f"earlier {name}" for name in ("results.csv", "REPORT.md", "overview.png", "NARROW.md")}
    for name, content in earlier.items():
        (tmp_path / name).write_text(content)
    process = command(tmp_path, "--quick")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(
        len(path.read_text().splitlines()) > 3 for path in tmp_path.glob(".report-*/results.csv")
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (130, "groupconv report: interrupted")
    assert "Traceback" not in err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == earlier


def test_a_report_out_of_time_is_published(tmp_path):
    (tmp_path / "results.csv").write_text("earlier")
    (tmp_path / "NARROW.md").write_text("not the report's")
    process = command(tmp_path, "--quick", "--budget-seconds", "0.001")
    out, _ = process.communicate()
    assert process.returncode == 0
    assert "The time budget ended after 1 of " in out
    assert len(rows.read(tmp_path / "results.csv")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["NARROW.md", "REPORT.md", "results.csv"]


def test_plot_across_kernel_sizes(tmp_path):
    chosen = layers_of("--layers", "kernels")
    with rows.Writer(tmp_path / "results.csv", rows.environment("modelled", "Pretended GPU")) as writer:
        sweep_rows(writer, chosen)
    kept = rows.read(tmp_path / "results.csv")
    assert [path.name for path in plot.write(kept, tmp_path)] == ["time.png", "fraction.png"]
    for name in ("time.png", "fraction.png"):
        check_png(tmp_path / name)
    figure = plot.draw(kept)["time"]
    assert [axes.get_title() for axes in figure.axes] == list(PASSES)
    for axes in figure.axes:
        assert axes.get_xlabel() == "kernel height and width, pixels"
        lines = {line.get_label().removesuffix(" (modelled)"): line for line in axes.get_lines()}
        sizes = {name: list(line.get_xdata()) for name, line in lines.items()}
        served = {
            name: [
                layer.problem.kh for layer in chosen if name in able(layer.problem, axes.get_title(), devices.DEFAULT)
            ]
            for name in REGISTRY
        }
        assert {name: found for name, found in sizes.items() if name in served} == {
            name: found for name, found in served.items() if name in sizes or found
        }
        assert sizes["floor"] == sizes["auto"] == list(layers.KERNELS)
        assert sizes["small"] == [1, 3, 5, 7]
        assert set(lines["auto"].get_ydata()) == {101.0}
        shown = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.get_lines()]
        assert len(set(shown)) == len(shown)
    said = text.markdown(kept, ["time.png"], len(kept), len(kept))
    assert "128 to 128 channels, depthwise, stride 1, 56x56 pixels, batch 64, bf16, nhwc" in said
    assert '"backward" is dgrad and wgrad by one kernel' in said
    assert not text.across_kernels([row for row in kept if row["layer"] == "k3"])


def test_a_wrong_fused_pass_is_found_in_either_gradient():
    problem, _ = fused_on(devices.DEFAULT)
    expected = numerics.reference(problem, numerics.operands(problem), "backward")
    for wrong in (0, 1):
        for fault in (lambda t: t * 1.01, lambda t: t * float("nan")):
            found = [fault(t) if i == wrong else t for i, t in enumerate(expected)]
            error, bound = numerics.worst_error(problem, "backward", found, expected)
            assert not error <= bound
    assert numerics.worst_error(problem, "backward", expected, expected)[0] == 0


# What nvdisasm prints, as far as it is read: an outer loop, one in it that waits, one that works and has a second way
# round, one of the end that is never reached, and a block at the end that jumps back.
SASS = """
.text.kernel:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0010*/              @!P1 EXIT ;
.L_x_0:
        /*0020*/                   LDG.E.LTC128B.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/              @!P3 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0060*/               @P2 BRA `(.L_x_4) ;
.L_x_3:
        /*0070*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0080*/                   HMMA.1688.F32.TF32 R8, R4, R6, R8 ;
        /*0090*/                   FFMA R1, R2, R3, R1 ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00b0*/               @P0 BRA `(.L_x_2) ;
        /*00c0*/                   BRA.U UP0, `(.L_x_0) ;
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   FADD R1, R2, R3 ;
        /*00f0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*0100*/                   BRA `(.L_x_5);
"""


def test_loops_of_machine_code():
    (loop,) = resources.innermost_loops(SASS)
    assert [op.split(".")[0] for op in loop] == ["LDG", "BRA", "HGMMA", "HMMA", "FFMA", "STG", "BRA", "FADD", "BRA"]
    work = resources._work(loop, warps=8)
    assert work == resources.Work(
        issues=9 * 8, multiply_adds=256, matrix_multiply_adds=8 * (16 * 32 * 16 + 16 * 8 * 8),
        loaded_bytes=256 * 2, stored_bytes=256 * 8,
    )  # fmt: skip
    assert resources._work(resources._SASS_OPCODE.findall(SASS), warps=1).loaded_bytes == 32 * (16 + 2)


# Two loops, the first with a loop in it, whose bounds the number of a program decides.
TTIR = """
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %c3_i32 = arith.constant 3 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc2)
    %row = tt.get_program_id y : i32 loc(#loc3)
    %up = arith.subi %c1_i32, %pid : i32 loc(#loc4)
    %half = arith.divsi %up, %c3_i32 : i32 loc(#loc4)
    %late = arith.cmpi sgt, %pid, %c1_i32 : i32 loc(#loc5)
    %end = arith.select %late, %steps, %c1_i32 : i32 loc(#loc6)
    %0:2 = scf.for %b = %half to %blocks step %c1_i32 iter_args(%x = %y) -> (tensor<4xf32>) : i32 {
      %1 = scf.for %t = %row to %end step %c3_i32 iter_args(%z = %x) -> (tensor<4xf32>) : i32 {
        scf.yield %z : tensor<4xf32> loc(#loc7)
      } loc(#loc7)
      scf.yield %1 : tensor<4xf32> loc(#loc8)
    } loc(#loc8)
    scf.for %t = %c1_i32 to %blocks step %c1_i32  : i32 {
    } loc(#loc9)
    scf.for %t = %c1_i32 to %memory step %c1_i32  : i32 {
    } loc(#loc10)
"""


def test_iterations_of_loops():
    def launch(ttir):
        kernel = types.SimpleNamespace(arg_names=["x_ptr", "blocks", "steps"])
        compiled = types.SimpleNamespace(asm={"ttir": ttir})
        return types.SimpleNamespace(compiled=compiled, kernel=kernel, scalars=(2, 8), grid=(5, 2, 1))

    known, _ = TTIR.split("    scf.for %t = %c1_i32 to %memory")
    # Programs 0 to 3 begin the outer loop at 0, and 4, at (1 - 4) / 3, with -1. Of the inner one, 0 and 1 have only
    # the step of row 0; the others walk from the row to 8 by threes.
    assert iterations.of(launch(known)) == [2 * 2 * 1 + (2 + 2 + 3) * (3 + 3), 10 * 1]
    with pytest.raises(ValueError, match="a loop's bound depends on %memory, which no operation makes"):
        iterations.of(launch(TTIR))


@pytest.fixture(scope="module")
def compiler():
    with children.Children("groupconv.compiled", interpret=False) as compiler:
        yield compiler


def compiled(compiler, problem, pass_, name, target="sm_90"):
    """(configuration, what the compiler says, by output element what its loop asks for)."""
    _, config, _ = dispatch.modelled(problem, pass_, devices.named(target), name)
    job = {"problem": children.problem_json(problem), "pass": pass_, "algorithm": name, "config": config}
    answer = compiler.submit({**job, "target": target, "iterations": True}).result()
    assert "failed" not in answer, answer
    return config, answer, tables.counts(answer, tables.outputs(problem, pass_))


def test_loops_of_implicit_gemm(compiler):
    """128 channels a group: the products, iterations and bytes of its loop are its tiles'."""
    problem = ConvProblem(8, 256, 14, 14, 256, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 2)
    config, answer, found = compiled(compiler, problem, "fprop", "implicit_gemm")
    (loop,) = answer["kernels"][0]["loops"]
    m, n, k = (config[f"BLOCK_{axis}"] for axis in "MNK")
    assert loop["matrix_multiply_adds"] == m * n * k
    assert loop["loaded_bytes"] == (m + n) * k * 2
    assert loop["multiply_adds"] == loop["stored_bytes"] == 0
    assert answer["iterations"] == [answer["programs"] * math.ceil(9 * 128 / k)]
    tiles = math.ceil(8 * 14 * 14 / m) * math.ceil(128 / n) * 2
    assert found["matrix_multiply_adds"] == pytest.approx(tiles * m * n * math.ceil(1152 / k) * k / (8 * 256 * 14 * 14))
    assert 0 < found["issues"] < found["matrix_multiply_adds"]


@pytest.mark.parametrize(("pass_", "layout"), [("fprop", "nhwc"), ("backward", "nchw")])
def test_loops_of_depthwise_direct(compiler, pass_, layout):
    """A multiply-add a tap and output, and in each iteration a tile of outputs; a few rows more to begin with."""
    problem = depthwise(3, size=56, channels=128, batch=64, layout=layout, out_layout=layout)
    config, answer, found = compiled(compiler, problem, pass_, "depthwise_direct")
    (loop,) = answer["kernels"][0]["loops"]
    tile, taps = config["BLOCK_P"] * config["BLOCK_C"], 18 if pass_ == "backward" else 9
    assert (loop["multiply_adds"], loop["stored_bytes"], loop["matrix_multiply_adds"]) == (taps * tile, 2 * tile, 0)
    elements = 64 * 128 * 56 * 56
    assert found["multiply_adds"] == pytest.approx(answer["iterations"][0] * taps * tile / elements)
    assert taps < found["multiply_adds"] < 1.3 * taps
    assert found["issues"] > found["multiply_adds"]


def test_counts_of_an_unrolled_loop():
    """The compiler may unroll a loop and leave a small one for the rest: counts are the same."""
    elements = 3200
    one = {"issues": 10, "multiply_adds": 96, "matrix_multiply_adds": 0, "loaded_bytes": 64, "stored_bytes": 32}
    four = {name: 4 * value for name, value in one.items()} | {"issues": 36}
    code = {name: one[name] + four[name] for name in one} | {"issues": 50}

    def counts(*loops):
        answer = {"kernels": [{"code": code, "loops": loops}], "iterations": [elements // 32], "programs": elements}
        return tables.counts(answer, elements)

    assert counts(one)["multiply_adds"] == counts(four, one)["multiply_adds"] == 3
    assert (counts(four, one)["issues"], counts(four, one)["once"]) == (9, 32 * 4)


def test_loops_of_amd_are_not_counted(compiler):
    _, answer, found = compiled(compiler, depthwise(3, size=28, channels=64), "fprop", "depthwise_direct", "gfx942")
    assert (answer["kernels"][0]["code"], answer["kernels"][0]["loops"], found) == (None, [], None)
    assert answer["iterations"][0] > answer["programs"] > 0


@pytest.mark.parametrize(("name", "rows_of_suite"), [("depthwise", 26), ("narrow", 18), ("wide", 21)])
def test_tables(name, rows_of_suite, monkeypatch, tmp_path, capsys):
    """Every such layer of the suite is in the first table; the second has each able algorithm's code."""
    subject = tables.SUBJECTS[name]
    example = Layer(
        "k1",
        dataclasses.replace(depthwise(1, size=20, channels=64), groups={"depthwise": 64, "narrow": 8, "wide": 1}[name]),
    )
    monkeypatch.setitem(tables.SUBJECTS, name, dataclasses.replace(subject, examples=lambda: [example]))
    assert tables.main([name, "--out", str(tmp_path), "--jobs", "1"]) == 0
    assert capsys.readouterr().out == f"{subject.file} in {tmp_path}\n"
    said = (tmp_path / subject.file).read_text()
    of_tables = [block.splitlines() for block in said.split("\n\n") if block[:1] == "|"]
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in lines] for lines in of_tables]
    (_, _, *summary), (plan_header, _, *plans), (work_header, _, *work), *by_width, (code_header, _, *code) = cells
    headers = [list(header) for header in (tables.PLAN_HEADER, tables.WORK_HEADER, tables.CODE_HEADER)]
    assert [plan_header, work_header, code_header] == headers

    suite = [layer.name for layer in layers.suite("bf16", "nhwc") if subject.holds(layer.problem)]
    assert len(suite) == rows_of_suite
    for pass_ in PASSES:
        for layout in ("nhwc", "nchw"):
            assert [line[0] for line in plans if line[2:4] == [layout, pass_]] == suite
    for line in plans:
        ratio = float(line[8].strip("*"))
        assert ratio == pytest.approx(float(line[6].replace(",", "")) / float(line[7].replace(",", "")), rel=0.02)
        assert line[4] in REGISTRY
        depthwise_goal = 1.4 if line[1][:3] in ("7x7", "9x9") else 1.3
        goal = {"narrow": 1.5, "wide": 1.6}.get(name, depthwise_goal)
        assert line[8].startswith("**") == (ratio > goal) or ratio == goal
    assert [line[:2] for line in summary] == [[pass_, layout] for pass_ in PLANNED for layout in ("nhwc", "nchw")]
    for pass_, layout, count, *taken, over, net, _ in summary:
        mine = [line for line in plans if line[2:4] == [layout, pass_]]
        assert int(count) == len(mine) == sum(map(int, taken))
        assert int(over) == sum(line[8].startswith("**") for line in mine)
        assert int(net) == sum(line[9].startswith("**") for line in mine) <= int(over)
        assert [int(n) for n in taken] == [sum(line[4] == name for line in mine) for name in REGISTRY]

    assert {tuple(line[:6]) for line in work} <= {tuple(line[:6]) for line in plans}
    assert len(work) == len(plans) or name == "depthwise"  # which may multiply without matrix units
    for line in work:
        assert float(line[6].rstrip("%")) < 100
        waves = int(line[7]) / (int(line[8]) * devices.DEFAULT.multiprocessors)
        assert float(line[9]) == pytest.approx(waves, abs=0.01)
    if name == "wide":
        ((waste_header, _, *wasted),) = by_width
        assert waste_header == list(tables.WASTE_HEADER)
        assert [(line[0], line[2]) for line in wasted] == [(line[0], line[3]) for line in plans if line[2] == "nhwc"]
        for line in wasted:
            mine, least = (float(cell.strip("*%")) for cell in line[5:7])
            assert least <= mine
            assert line[5].startswith("**") == (mine > 15)
            assert line[7] == "-" or float(line[7]) >= 0.95
    else:
        assert not by_width
    expected = [[p, name] for p in PLANNED for name in able(example.problem, p, devices.DEFAULT)]
    assert [line[2:4] for line in code] == expected
    for line in code:
        by_descriptors = line[3] == "row_block_tma"
        assert line[-1].startswith("tiles by descriptors" if by_descriptors else "")
        assert bool(line[-1]) == by_descriptors == (line[4] == "-")
        assert int(line[9]) > 0
    assert "Nothing here was measured" in said
    assert "not a measurement" in said
    assert str(tmp_path) not in said


def test_tables_row_of_a_layer():
    """A row's time is dispatch's, and its bound the model's."""
    subject = tables.SUBJECTS["depthwise"]
    layer = next(layer for layer in subject.suite() if layer.name == "convnext_tiny.s0")
    found = list(tables.plans(subject, [layer], devices.DEFAULT))
    plan = dispatch.plan(layer.problem, devices.DEFAULT, "triton")
    for row, one in zip(found, filter(None, (*plan.passes, plan.backward)), strict=True):
        assert (row.pass_, row.algorithm, row.config) == (one.pass_, one.algorithm, one.config)
        assert row.estimate.time_us == pytest.approx(one.time_us)
        assert row.floor_us == cost.floor_us(layer.problem, row.pass_, devices.DEFAULT)
        assert f"bound by {row.estimate.bound}" in one.reason
        assert row.goal == 1.4
    names = [(layer.problem.kh, layer.problem.h_in, layer.problem.layout) for layer in subject.examples()]
    sizes = [(3, 56), (5, 56), (7, 56), (9, 56), (31, 56), (7, 14)]
    assert names == [(*size, layout) for size in sizes for layout in ("nhwc", "nchw")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "abacus"], "--target: target 'abacus' is not known"),
        (["--jobs", "0"], "--jobs: 0 is not a positive"),
        (["broad"], "SUBJECT: 'broad' is not one of depthwise, narrow"),
    ],
)
def test_bad_arguments_of_the_tables(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        tables.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_modelled_kernel_sizes(tmp_path):
    """Without a GPU: the command, with rows of every algorithm that is able, compiled and interpreted."""
    command = [sys.executable, "-m", "groupconv", "report", "--layers", "kernels", "--kernels", "1", "2"]
    command += ["--channels", "2", "--size", "17", "--batch", "1", "--target", "nvidia_h200", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["REPORT.md", "fraction.png", "results.csv", "time.png"]
    found = rows.read(tmp_path / "results.csv")
    expected = {
        (layer.name, pass_, name)
        for layer in layers_of("--layers", "kernels", *command[6:-4])
        for pass_, names in passes.reported(layer.problem, devices.DEFAULT)
        for name in (*names, rows.PRIOR, "auto")
    }
    assert {(row["layer"], row["pass"], row["provider"]) for row in found[2:]} == expected
    for row in found[2:]:
        if row["provider"] in REGISTRY:
            assert not row["note"]
            assert 0 < float(row["max_rel_err"]) <= float(row["err_bound"]) == 4e-3
            assert int(row["registers"]) > 0
    said = (tmp_path / "REPORT.md").read_text()
    assert "Nothing in this report was measured" in said
    assert "depthwise, stride 1, 17x17 pixels, batch 1" in said
