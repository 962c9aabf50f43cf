"""`groupconv report`: its rows without a GPU and with a pretended one, its files, and its refusals."""

import argparse
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from matplotlib import image

from groupconv import cli, devices
from groupconv.algorithms import REGISTRY
from groupconv.perf_reports import layers, measure, plot, report, rows, text
from groupconv.perf_reports.rows import Layer, Timing
from groupconv.problem import PASSES, ConvProblem

PROVIDERS = {*REGISTRY, "auto", "torch_contiguous", "torch_channels_last"}


def small_layers(counts=(1, 4)):
    return [Layer(f"g{g}", ConvProblem(2, 8, 6, 5, 8, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), g, "fp32")) for g in counts]


class FakeClock:
    """Seconds that pass only when something is timed."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def timer(self, run):
        run()
        self.now += 1.0
        return Timing(20.0, 19.0, 22.0)


def fake_limits(dtype, timer, device):
    return measure.Limits(copy_gbps=4000.0, matrix_tflops=50.0)


def measured_rows(device, clock=None, counts=(1, 4)):
    timer = (clock or FakeClock()).timer
    return measure.rows(small_layers(counts), devices.DEFAULT, device, timer, fake_limits)


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
    command = [sys.executable, "-m", "groupconv.cli", "report", "--quick", "--out", str(folder)]
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
    own = [row for row in found if row["provider"] in REGISTRY]
    assert {(row["groups"], row["pass"]) for row in own} == {(g, p) for g in ("4", "32") for p in PASSES}
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
        (["--layers", "nosuch.csv"], '--layers: \'nosuch.csv\' is not "groups", "suite" or a CSV file that exists'),
        (["--layers", "suite", "--groups", "2"], "--groups: a list of layers has its own group counts"),
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
        (f"{HEADER}\na,1,8,9,9,8,3,3,1,1,1,1,1,1,three\n", "line 2: a size is not a whole number"),
        (f"{HEADER}\na,1,8,9,9,8,3,3,1,1,1,1,1,1\n", "line 2: a size is not a whole number"),
        (f"{HEADER}\na,1,8,9,9,8,3,3,0,1,1,1,1,1,1\n", "line 2: a size is not positive"),
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
    with measure.settings("tf32"):
        assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision) == before


def test_limits(device):
    clock = FakeClock()
    found = measure.limits("fp32", clock.timer, device, copy_bytes=1000, matrix_size=10)
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
    assert plot._points(kept, "fprop", algorithm.NAME, "us_p50") == ([], [])


def test_budget_keeps_what_there_is(device, tmp_path, writer):
    clock = FakeClock()
    seen = []
    found = measured_rows(device, clock)
    taken = rows.take(found, writer, rows.Deadline(2.5, clock), seen.append)
    found.close()
    assert clock.now == 3.0  # what had begun was finished, and nothing else begun
    assert taken == len(seen) == 5
    kept = rows.read(tmp_path / "results.csv")
    assert [row["provider"] for row in kept] == [row["provider"] for row in seen]
    said = text.markdown(kept, [], taken, 26)
    assert "**Incomplete:** the time budget ended after 5 of 26 rows" in said
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
    assert "20.0 (19.0-22.0)" in said


def test_layers_that_differ_get_a_line_each(device, tmp_path, writer):
    other = Layer("other", ConvProblem(2, 6, 5, 5, 6, 1, 1, groups=3, dtype="fp32"))
    timer = FakeClock().timer
    for row in measure.rows([*small_layers((1,)), other], devices.DEFAULT, device, timer, fake_limits):
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
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    found = layers.make(parser.parse_args(["--layers", "suite", "--dtype", "fp16", "--layout", "nchw"]))
    assert len(found) == 65
    assert {(layer.problem.dtype, layer.problem.layout) for layer in found} == {("fp16", "nchw")}
    strided = next(layer for layer in found if layer.name == "resnext50_32x4d.s2d")
    assert str(strided.problem) == "n128-g32-c8x8-h56x56-k3x3-s2x2-p1x1-d1x1-fp16-nchw"


def test_group_counts_that_divide_are_the_default():
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    found = layers.make(parser.parse_args(["--channels", "96", "--size", "7", "5", "--kernel", "5"]))
    assert [layer.problem.groups for layer in found] == [1, 2, 4, 8, 16, 32]
    assert found[0].problem.y_shape == (128, 96, 7, 5)
