"""`groupconv report`: its rows without a GPU and with a pretended one, its files, and its refusals."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from matplotlib import image

from groupconv import cli, cost, devices, dispatch, options
from groupconv.algorithms import REGISTRY, able
from groupconv.common import Layer, files, numerics
from groupconv.common.progress import Deadline
from groupconv.compiling import interpreter
from groupconv.measuring import lab, stub
from groupconv.perf_reports import bench, comparison, layers, plots, rows, text
from groupconv.problem import PASSES, ConvProblem

PROVIDERS = {*REGISTRY, "auto", "torch_contiguous", "torch_channels_last"}
SHIPPED = pathlib.Path(__file__).parents[1] / "perf_reports" / "modelled_nvidia_h200"


def layers_of(*arguments):
    args = options.parser().parse_args(["report", *arguments])
    return layers.make(args, args.dtype, args.layout)


def small_layers(counts=(1, 4)):
    return [Layer(f"g{g}", ConvProblem(2, 8, 6, 5, 8, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), g, "fp32")) for g in counts]


class FakeLab(lab.GpuLab):
    """A device whose clock is ours and whose calls are interpreted."""

    def __init__(self):
        super().__init__(devices.DEFAULT, "Pretended GPU", "cuda" if torch.cuda.is_available() else "cpu", race)

    def limits(self, dtype):
        return lab.Limits(copy_gbps=4000.0, matrix_tflops=50.0)


def race(runs, rounds):
    return {name: [19.0, 19.0, 20.0, 21.0, 22.0] for name in runs}


class SlowLab(stub.StubLab):
    """A device that runs nothing, and takes a second of its own clock for every race."""

    now = 0.0

    @contextlib.contextmanager
    def subject(self, problem):
        subject = stub.StubSubject(problem, self.target)
        subject.race = self.race
        yield subject

    def race(self, pass_, contenders, rounds):
        self.now += 1.0
        return {contender.name: [20.0] for contender in contenders}


@pytest.fixture(scope="module")
def measured():
    """The rows of two layers by every algorithm and F.conv2d, their numbers checked."""
    return list(rows.measured(small_layers(), FakeLab()))


@pytest.fixture
def writer(tmp_path):
    """Of results.csv in tmp_path, measured."""
    environment = files.environment("measured", "Pretended GPU")
    with files.Writer(tmp_path / "results.csv", rows.FIELDS, environment) as writer:
        yield writer


def read(folder):
    return files.read(folder / "results.csv", rows.FIELDS)


def check_png(path: pathlib.Path):
    pixels = image.imread(path)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.05


def command(folder, *arguments, cwd=None, **environment):
    """`groupconv report` without a GPU."""
    line = [sys.executable, "-m", "groupconv", "report", "--out", str(folder), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen(line, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_report_without_a_gpu(tmp_path):
    """Times modelled, code counted, numbers interpreted; what else lies in the folder stays."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("not the report's")
    # Interpreted kernels cannot be compiled: the report has to see to it that a user's setting does not matter.
    process = command(folder, "--groups", "8", "--channels", "64", "--size", "14", TRITON_INTERPRET="1", cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    pictures = ["fraction.png", "overview.png", "time.png", "work.png"]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*pictures, "REPORT.md", "notes.txt", "results.csv"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for name in pictures:
        check_png(folder / name)

    found = read(folder)
    assert {(row["kind"], row["gpu"]) for row in found} == {("modelled", "nvidia_h200")}
    problem = ConvProblem(128, 64, 14, 14, 64, 3, 3, pad=(1,) * 4, groups=8)
    reported = rows.reported(problem, devices.DEFAULT)
    expected = [(pass_, name) for pass_, names in reported for name in (*names, rows.PRIOR, "auto")]
    assert [(row["pass"], row["provider"]) for row in found[2:]] == expected
    for row in found[2:]:
        if row["provider"] in REGISTRY:
            assert 1e-4 < float(row["max_rel_err"]) <= float(row["err_bound"]) == 4e-3
            assert float(row["us_p50"]) >= float(row["floor_us"]) > 0
            assert int(row["registers"]) > 0
            assert row["matrix"]
            assert not row["note"]
        elif row["provider"] == rows.PRIOR:
            prior = cost.torch_prior_us(problem, row["pass"], devices.DEFAULT)
            assert float(row["us_p50"]) == pytest.approx(prior, rel=1e-5)

    said = (folder / "REPORT.md").read_text()
    assert "Nothing in this report was measured" in said
    assert text.LEGEND in said
    for name in pictures:
        assert f"]({name})" in said
    assert str(tmp_path) not in said
    assert "us (modelled)" in out.replace("\n", " ")
    assert "modelled for nvidia_h200" in out
    sections = dict(section.split("\n", 1) for section in said.split("## ")[1:])
    served = sections["Which algorithm serves what (modelled)"]
    lines = [line.strip("| ").split(" | ")[:2] for line in served.splitlines() if line.startswith("| ")]
    assert lines[2:] == [[width, pass_] for width in comparison.WIDTHS for pass_ in PASSES]
    counted = [line.split(" | ") for line in sections["Counted"].splitlines() if line.startswith("| g8 ")]
    assert [line[2] for line in counted] == [pass_ for pass_, _ in reported]
    for _, width, pass_, name, registers, spills, shared, matrix in counted:
        (row,) = [row for row in found if (row["pass"], row["provider"]) == (pass_, name)]
        code = [row[field] for field in text.COUNTED]
        assert (width, [registers, spills, shared, matrix.removesuffix(" |")]) == ("narrow", code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups", "7"], "--groups: 7 does not divide the 128 input channels"),
        (["--groups", "96", "--channels", "96", "128"], "--groups: 96 does not divide the 128 output channels"),
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
        (["--layers", "kernels", "--kernel", "3"], "--kernel: 3 is not for --layers kernels"),
        (["--layers", "kernels", "--groups", "1", "4"], "--groups: 1 4 is not for --layers kernels"),
        (
            ["--layers", "kernels", "--channels", "6", "8"],
            "--channels: 8 depthwise output channels are no multiple of 6",
        ),
        (["--layers", "kernels", "--size", "5", "--padding", "0"], "--size: a 7x7 kernel does not fit 5x5 pixels"),
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
        (f"{HEADER}\n\xe9", "layers.csv is not UTF-8"),
    ],
)
def test_bad_layer_files(content, message, tmp_path, capsys):
    path = tmp_path / "layers.csv"
    path.write_text(content, encoding="latin-1")
    assert cli.main(["report", "--layers", str(path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_measured_rows(measured):
    assert len(measured) == rows.count_measured(small_layers(), devices.DEFAULT)
    assert [(row["provider"], row.get("gbps") or row["tflops"]) for row in measured[:2]] == [
        ("copy_limit", 4000.0),
        ("matrix_limit", 50.0),
    ]
    for row in measured[2:]:
        assert row["provider"] in PROVIDERS
        assert row["us_p50"] == 20.0
        assert row["max_rel_err"] < 1e-6
        assert row["fraction"] == pytest.approx(row["floor_us"] / 20.0)
        assert row["gbps"] == pytest.approx(row["bytes"] / 20e-6 / 1e9)
    auto = [row for row in measured if row["provider"] == "auto"]
    assert len(auto) == 6
    assert all(row["note"].startswith("takes ") for row in auto)


def test_settings_are_put_back():
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision
    with lab.settings("tf32"):
        assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision) == before


def test_limits(device):
    found = lab.GpuLab(devices.DEFAULT, "", device, race).limits("fp32", copy_bytes=1000, matrix_size=10)
    assert found.copy_gbps == pytest.approx(2000 / 20e-6 / 1e9)
    assert found.matrix_tflops == pytest.approx(2000 / 20e-6 / 1e12)


def test_wrong_and_failing_kernels_are_recorded_not_timed(monkeypatch, tmp_path, writer):
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
    found = list(rows.measured(small_layers((4,)), FakeLab()))
    for row in found:
        writer.append(row)
        if row["provider"] == algorithm.NAME:
            assert "us_p50" not in row
            expected = "failed: RuntimeError: out of luck" if row["pass"] == "dgrad" else "wrong: error 1 above"
            assert row["note"].startswith(expected)
        elif row["provider"].startswith("torch_"):
            assert row["us_p50"] == 20.0
    kept = read(tmp_path)
    assert "3 rows failed" in text.report(kept, [], len(found), len(found))
    assert plots.points(kept, "fprop", algorithm.NAME, "us_p50") == ([], [])


def test_budget_keeps_what_there_is(tmp_path, writer):
    slow = SlowLab(devices.DEFAULT)
    found = rows.measured(small_layers(), slow)
    taken, ended = bench._take("report", "rows", found, writer, Deadline(2.5, lambda: slow.now))
    assert ended
    assert slow.now == 3.0  # what had begun was finished, and nothing else begun
    kept = read(tmp_path)
    assert taken == len(kept) == 2 + 2 * 5 + 1
    assert "**Incomplete:** the time budget ended after 13 of 26 rows" in text.report(kept, [], taken, 26)
    for path in plots.write(plots.draw(kept), tmp_path):  # of these rows none is of dgrad or wgrad
        check_png(path)


def test_rows_are_on_disk_as_they_come(measured, tmp_path, writer):
    for count in range(1, 4):
        writer.append(measured[count])
        assert len(read(tmp_path)) == count
    with (tmp_path / "results.csv").open("a") as file:
        file.write("2026-11-22T00:00:00Z,abc")  # a kill in the middle of a line
    assert len(read(tmp_path)) == 3
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv: not a report's CSV: no column "):
        files.read(tmp_path / "other.csv", rows.FIELDS)


def test_files_of_measured_rows(measured, tmp_path, writer):
    """Plots and text come from the CSV alone, and call nothing modelled that was measured."""
    for row in measured:
        writer.append(row)
    kept = read(tmp_path)
    written = plots.write(plots.draw(kept), tmp_path)
    assert [path.name for path in written] == ["overview.png", "time.png", "fraction.png", "work.png"]
    for path in written:
        check_png(path)
    said = text.report(kept, [path.name for path in written], len(kept), len(kept))
    assert "measured on Pretended GPU" in said
    assert "modelled" not in said.replace(text.LEGEND, "").lower()
    assert said.count(text.LEGEND) == 1
    assert "20.0 (19.0-21.0)" in said


def test_a_budget_too_short_for_any_layer(tmp_path, writer):
    writer.append(rows.limit_row("copy_limit", "bf16", 4000.0, "measured"))
    kept = read(tmp_path)
    assert plots.draw(kept) == {}
    assert text.tables(kept) == []
    assert "ended before the first layer" in text.report(kept, [], 1, 50)


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
    small = interpreter.shrunk(problem)
    assert (small.kh, small.kw, small.groups, small.h_in, small.w_in) == (31, 31, 2, 16, 16)
    given = numerics.operands(small)
    assert numerics.reference(small, given, "wgrad").ne(0).all()  # a tap that meets no pixel has no gradient
    assert str(interpreter.shrunk(small_layers()[0].problem)).startswith("n2-g1-c8x8-h6x5-k3x3")


def fused_on(target):
    """A depthwise problem with a fused backward pass, and the algorithms that have it."""
    problem = depthwise(3, dtype="fp32")
    names = able(problem, "backward", target)
    if not names:
        pytest.skip("no algorithm has a fused backward pass")
    return problem, names


def test_measured_fused_pass(monkeypatch):
    """Rows of dgrad and wgrad by one kernel, and what "auto" takes for it."""
    problem, names = fused_on(devices.DEFAULT)
    fused = dispatch.plan_pass(problem, "backward", devices.DEFAULT, "triton")
    for plan, takes, on in (
        (fused, fused.algorithm, FakeLab()),
        (None, "dgrad and wgrad", SlowLab(devices.DEFAULT)),
    ):
        monkeypatch.setattr(rows, "taken", lambda problem, pass_, target, plan=plan: plan)
        chosen = [Layer("k3", problem)]
        found = [row for row in rows.measured(chosen, on) if row.get("pass") == "backward"]
        assert [row["provider"] for row in found] == [*names, "torch_contiguous", "torch_channels_last", "auto"]
        assert found[-1]["note"] == f"takes {takes}"
        assert ("us_p50" in found[-1]) == (plan is not None)
        for row in found[:-1]:
            assert plan is None or row["max_rel_err"] < 1e-6
            assert row["us_p50"] == 20
            assert row["flops"] == 4 * 2 * 2 * 36 * 9


def test_overview_of_modelled_times():
    """Three lines a pass and what "auto" takes, on one scale that holds them all; that they are modelled is said once,
    in the largest letters. The work is that of one pass: a fused backward's rows, of two, are left out.
    """
    kept = read(SHIPPED)
    figure = plots.draw(kept)["overview"]
    assert figure.get_suptitle() == "Times modelled for nvidia_h200, not measured"
    _, flops, _, *passes = figure.axes
    for axes, pass_ in zip(passes, PASSES, strict=True):
        assert axes.get_title() == f"time of {pass_}"
        drawn = {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}
        assert list(drawn) == ["F.conv2d (prior)", "the fastest of ours", "floor", 'what "auto" takes']
        for groups in layers.UNMEASURED_GROUPS:
            mine = [row for row in kept if (row["pass"], row["groups"]) == (pass_, str(groups))]
            times = {row["provider"]: float(row["us_p50"]) for row in mine}
            prior, auto = times.pop(rows.PRIOR), times.pop("auto")
            shown = [line[groups] for line in drawn.values()]
            assert shown == [prior, min(times.values()), float(mine[0]["floor_us"]), auto]
        low, high = axes.get_ylim()
        assert all(low <= time_us <= high for line in drawn.values() for time_us in line.values())
        assert axes.get_ylim() == passes[0].get_ylim()
    done = {int(row["groups"]): float(row["flops"]) / 1e9 for row in kept if row["pass"] == "fprop"}
    line = flops.get_lines()[0]
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == done
    words = [f() for axes in figure.axes for f in (axes.get_title, axes.get_xlabel, axes.get_ylabel)]
    (legend,) = figure.legends
    words += [legend.get_title().get_text(), *(each.get_text() for each in legend.get_texts())]
    assert not any("modelled" in each for each in words)
    assert "128 to 128 channels, 3x3" in legend.get_title().get_text()


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
    assert len(read(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["NARROW.md", "REPORT.md", "results.csv"]


def test_plot_across_kernel_sizes(tmp_path, writer):
    """A provider that serves small kernels only has a shorter line; "auto" is a ring on the fastest."""
    chosen = layers_of("--layers", "kernels")
    for layer in chosen:
        floor = cost.floor_us(layer.problem, "fprop", devices.DEFAULT)
        for name, time_us in (("small", 101), ("depthwise_direct", 102), ("auto", 101)):
            if name != "small" or layer.problem.kh <= 7:
                about = rows.layer_row(layer, "fprop", name) | {"floor_us": floor, "ungrouped_floor_us": floor}
                writer.append(about | rows.timing_fields(layer.problem, "fprop", floor, time_us))
    kept = read(tmp_path)
    figures = plots.draw(kept)
    assert list(figures) == ["time", "fraction"]
    for path in plots.write(figures, tmp_path):
        check_png(path)
    axes = figures["time"].axes[0]
    assert axes.get_xlabel() == "kernel height and width, pixels"
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    sizes = list(layers.KERNELS)
    assert lines == {"small": sizes[:4], "depthwise_direct": sizes, "floor": sizes, "auto": sizes}
    shown = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(shown) == len(lines)
    said = text.report(kept, ["time.png"], len(kept), len(kept))
    assert "128 to 128 channels, depthwise, stride 1, 56x56 pixels, batch 64, bf16, nhwc" in said
    assert not comparison.across_kernels([row for row in kept if row["layer"] == "k3"])


def test_a_wrong_fused_pass_is_found_in_either_gradient():
    problem, _ = fused_on(devices.DEFAULT)
    expected = numerics.reference(problem, numerics.operands(problem), "backward")
    for wrong in (0, 1):
        for fault in (lambda t: t * 1.01, lambda t: t * float("nan")):
            found = [fault(t) if i == wrong else t for i, t in enumerate(expected)]
            error, bound = numerics.worst_error(problem, "backward", found, expected)
            assert not error <= bound
    assert numerics.worst_error(problem, "backward", expected, expected)[0] == 0
