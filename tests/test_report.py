"""`groupconv report`: its rows without a GPU and with a pretended one, its files, and its refusals."""

import pathlib
import subprocess
import sys

import pytest
import torch
from matplotlib import image
from pretended import ENVIRONMENT, TIMES_US, FakeLab, SlowLab, read

from groupconv import cli, cost, devices, dispatch, options
from groupconv.algorithms import REGISTRY, able
from groupconv.common import Layer, files, numerics
from groupconv.common.progress import Deadline
from groupconv.compiling import interpreter
from groupconv.measuring import lab
from groupconv.perf_reports import bench, comparison, layers, plots, rows, text
from groupconv.problem import PASSES, ConvProblem

SHIPPED = pathlib.Path(__file__).parents[1] / "perf_reports" / "modelled_nvidia_h200"
PICTURES = ["fraction.png", "overview.png", "time.png", "work.png"]


def layers_of(*arguments):
    args = options.parser().parse_args(["report", *arguments])
    return layers.make(args, args.dtype, args.layout)


def small_layers(counts=(1, 4)):
    return [Layer(f"g{g}", ConvProblem(2, 8, 6, 5, 8, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), g, "fp32")) for g in counts]


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


def check_png(path):
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


# --- Without a GPU ---------------------------------------------------------------------------------------------------


def test_report_without_a_gpu(tmp_path):
    """Times modelled, code counted, numbers interpreted; what else lies in the folder stays."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("not the report's")
    # Interpreted kernels cannot be compiled: the report has to see to it that a user's setting does not matter.
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    line = [sys.executable, "-m", "groupconv", "report", "--out", str(folder)]
    line += ["--groups", "2", "--channels", "6", "--size", "14"]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == sorted([*PICTURES, "REPORT.md", "notes.txt", "results.csv"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for name in PICTURES:
        check_png(folder / name)

    table = read(folder)
    assert {(row["kind"], row["gpu"]) for row in table} == {("modelled", "nvidia_h200")}
    problem = ConvProblem(128, 6, 14, 14, 6, 3, 3, pad=(1,) * 4, groups=2)
    reported = rows.reported(problem, devices.DEFAULT)
    expected = [(pass_, name) for pass_, names in reported for name in (*names, rows.PRIOR, "auto")]
    assert [(row["pass"], row["provider"]) for row in table[2:]] == expected
    for row in table[2:]:
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
    assert [name for name in PICTURES if f"]({name})" not in said] == []
    assert str(tmp_path) not in said
    assert "us (modelled)" in done.stdout.replace("\n", " ")
    assert "modelled for nvidia_h200" in done.stdout
    sections = dict(section.split("\n", 1) for section in said.split("## ")[1:])
    served = sections["Which algorithm serves what (modelled)"]
    lines = [line.strip("| ").split(" | ")[:2] for line in served.splitlines() if line.startswith("| ")]
    assert lines[2:] == [[width, pass_] for width in comparison.WIDTHS for pass_ in PASSES]
    counted = [line.split(" | ") for line in sections["Counted"].splitlines() if line.startswith("| g2 ")]
    assert [line[2] for line in counted] == [pass_ for pass_, _ in reported]
    for _, width, pass_, name, registers, spills, shared, matrix in counted:
        (row,) = [row for row in table if (row["pass"], row["provider"]) == (pass_, name)]
        code = [row[field] for field in text.COUNTED]
        assert (width, [registers, spills, shared, matrix.removesuffix(" |")]) == ("narrow", code)


def test_a_report_out_of_time_is_published(tmp_path, capsys):
    """Over an earlier one; what is not the report's stays."""
    (tmp_path / "results.csv").write_text("earlier")
    (tmp_path / "NARROW.md").write_text("not the report's")
    options = ["--target", "sm_90", "--quick", "--budget-seconds", "0.001"]
    assert cli.main(["report", "--out", str(tmp_path), *options]) == 0
    assert "The time budget ended after 1 of " in capsys.readouterr().out
    assert len(read(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["NARROW.md", "REPORT.md", "results.csv"]
    assert "ended before the first layer" in (tmp_path / "REPORT.md").read_text()


def test_what_fails_is_noted():
    """Of a row that neither compiled nor ran, and of one with wrong numbers."""
    broken = rows._outcome(rows.Compiled(failed="X: y"), {"failed": "Z: w"})
    assert broken == {"note": "not interpreted: Z: w; not compiled: X: y"}
    wrong = rows._outcome(rows.Compiled(), {"error": float("nan"), "bound": 1e-3})
    assert wrong["note"].startswith("wrong: error nan above the bound")


def test_overview_of_modelled_times():
    """Three lines a pass and what "auto" takes, on one scale that holds them all; that they are modelled is said once,
    in the largest letters. The work is that of one pass: a fused backward's rows, of two, are left out.
    """
    table = read(SHIPPED)
    figure = plots.draw(table)["overview"]
    assert figure.get_suptitle() == "Times modelled for nvidia_h200, not measured"
    _, flops, _, *passes = figure.axes
    for axes, pass_ in zip(passes, PASSES, strict=True):
        assert axes.get_title() == f"time of {pass_}"
        drawn = {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}
        assert list(drawn) == ["F.conv2d (prior)", "the fastest of ours", "floor", 'what "auto" takes']
        for groups in layers.UNMEASURED_GROUPS:
            mine = [row for row in table if (row["pass"], row["groups"]) == (pass_, str(groups))]
            times = {row["provider"]: float(row["us_p50"]) for row in mine}
            prior, auto = times.pop(rows.PRIOR), times.pop("auto")
            shown = [line[groups] for line in drawn.values()]
            assert shown == [prior, min(times.values()), float(mine[0]["floor_us"]), auto]
        low, high = axes.get_ylim()
        assert all(low <= time_us <= high for line in drawn.values() for time_us in line.values())
        assert axes.get_ylim() == passes[0].get_ylim()
    work = {int(row["groups"]): float(row["flops"]) / 1e9 for row in table if row["pass"] == "fprop"}
    line = flops.get_lines()[0]
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == work
    (legend,) = figure.legends
    labels = [f() for axes in figure.axes for f in (axes.get_title, axes.get_xlabel, axes.get_ylabel)]
    labels += [legend.get_title().get_text(), *(label.get_text() for label in legend.get_texts())]
    assert not any("modelled" in label for label in labels)
    assert "128 to 128 channels, 3x3" in legend.get_title().get_text()


# --- What is asked for -----------------------------------------------------------------------------------------------


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
        (["--budget-seconds", "nan"], "--budget-seconds: nan is not a positive number"),
        (["--layers", "nosuch.csv"], '--layers: \'nosuch.csv\' is not "groups", "kernels", "suite" or a CSV file'),
        (["--layers", "suite", "--groups", "2"], "--groups: a list of layers has its own; 2 is for"),
        (["--kernels", "3", "5"], "--kernels: 3 5 is for --layers kernels, not --layers groups"),
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


def test_layers_that_are_asked_for():
    suite = {layer.name: layer.problem for layer in layers_of("--layers", "suite", "--dtype", "fp16")}
    assert len(suite) == 65
    assert str(suite["resnext50_32x4d.s2d"]) == "n128-g32-c8x8-h56x56-k3x3-s2x2-p1x1-d1x1-fp16-nhwc"
    dividing = layers_of("--channels", "96", "--size", "7", "5", "--kernel", "5")
    assert [layer.problem.groups for layer in dividing] == [1, 2, 4, 8, 16, 32]
    assert dividing[0].problem.y_shape == (128, 96, 7, 5)
    across = layers_of("--layers", "kernels")
    assert [layer.name for layer in across] == [f"k{size}" for size in layers.KERNELS]
    assert str(across[-1].problem) == "n64-g128-c1x1-h56x56-k31x31-s1x1-p15x15-d1x1-bf16-nhwc"
    chosen = "--kernels", "5", "2", "5", "--channels", "6", "12", "--size", "9", "8", "--padding", "3", "--batch", "7"
    assert [str(layer.problem) for layer in layers_of("--layers", "kernels", *chosen)] == [
        f"n7-g6-c1x2-h9x8-k{kernel}-s1x1-p3x3-d1x1-bf16-nhwc" for kernel in ("2x2", "5x5")
    ]


def test_shrunk_problems_keep_their_kernel_and_use_all_of_it():
    problem = layers_of("--layers", "kernels", "--kernels", "31")[0].problem
    small = interpreter.shrunk(problem)
    assert (small.kh, small.kw, small.groups, small.h_in, small.w_in) == (31, 31, 2, 16, 16)
    operands = numerics.operands(small)
    assert numerics.reference(small, operands, "wgrad").ne(0).all()  # a tap that meets no pixel has no gradient
    assert str(interpreter.shrunk(small_layers()[0].problem)).startswith("n2-g1-c8x8-h6x5-k3x3")


# --- Measured --------------------------------------------------------------------------------------------------------


def test_measured_rows_and_their_files(measured, tmp_path, writer):
    """Plots and text come from the CSV alone, and call nothing modelled that was measured."""
    assert len(measured) == rows.count_measured(small_layers(), devices.DEFAULT)
    copy, product = measured[:2]
    assert (copy["provider"], copy["gbps"]) == ("copy_limit", 4000.0)
    assert (product["provider"], product["tflops"]) == ("matrix_limit", 50.0)
    for row in measured:
        writer.append(row)
    for row in measured[2:]:
        assert row["provider"] in {*REGISTRY, "auto", "torch_contiguous", "torch_channels_last"}
        assert (row["us_p20"], row["us_p50"], row["us_p80"]) == (19.0, 20.0, 21.0)
        assert row["max_rel_err"] < 1e-6
        assert row["fraction"] == pytest.approx(row["floor_us"] / 20.0)
        assert row["gbps"] == pytest.approx(row["bytes"] / 20e-6 / 1e9)
    autos = [row for row in measured if row["provider"] == "auto"]
    assert len(autos) == 6
    assert all(row["note"].startswith("takes ") for row in autos)
    table = read(tmp_path)
    written = plots.write(plots.draw(table), tmp_path)
    assert sorted(path.name for path in written) == PICTURES
    for path in written:
        check_png(path)
    said = text.report(table, [path.name for path in written], len(table), len(table))
    assert "measured on Pretended GPU" in said
    assert "modelled" not in said.replace(text.LEGEND, "").lower()
    assert said.count(text.LEGEND) == 1
    assert "20.0 (19.0-21.0)" in said


def test_settings_are_put_back():
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision
    with lab.settings("tf32"):
        assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.conv.fp32_precision) == before


@pytest.mark.parametrize(("dtype", "products"), [("fp32", 1), ("bf16x3", 3)])
def test_limits(dtype, products, device):
    """Of bf16x3, three products of bf16 in place of one; floors of its passes are by these limits."""
    clock = lab.GpuLab(devices.DEFAULT, "", device, lambda runs, rounds: dict.fromkeys(runs, TIMES_US))
    limits = clock.limits(dtype, copy_bytes=1000, matrix_size=10)
    assert limits.copy_gbps == pytest.approx(2000 / 20e-6 / 1e9)
    assert limits.matrix_tflops == pytest.approx(2000 / 20e-6 / 1e12 / products)
    limited = limits.of(devices.DEFAULT, dtype)
    assert (limited.copy_gbps, limited.matrix_rate(dtype)) == pytest.approx((limits.copy_gbps, limits.matrix_tflops))


def test_wrong_and_failing_kernels_are_recorded_not_timed(monkeypatch, tmp_path, writer):
    algorithm = REGISTRY["implicit_gemm"]
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
    measured = list(rows.measured(small_layers((4,)), FakeLab()))
    for row in measured:
        writer.append(row)
        if row["provider"] == algorithm.NAME:
            assert "us_p50" not in row
            expected = "failed: RuntimeError: out of luck" if row["pass"] == "dgrad" else "wrong: error 1 above"
            assert row["note"].startswith(expected)
        elif row["provider"].startswith("torch_"):
            assert row["us_p50"] == 20.0
    table = read(tmp_path)
    assert "3 rows failed" in text.report(table, [], len(table), len(table))
    assert plots.points(table, "fprop", algorithm.NAME, "us_p50") == ([], [])


def test_budget_keeps_what_there_is(tmp_path, writer):
    slow = SlowLab(devices.DEFAULT)
    taken, ended = bench._take(
        "report", "rows", rows.measured(small_layers(), slow), writer, Deadline(2.5, lambda: slow.now)
    )
    assert ended
    assert slow.now == 3.0  # what had begun was finished, and nothing else begun
    table = read(tmp_path)
    assert taken == len(table) == 2 + 2 * 5 + 1
    assert "**Incomplete:** the time budget ended after 13 of 26 rows" in text.report(table, [], taken, 26)
    assert len(plots.write(plots.draw(table), tmp_path)) == len(PICTURES)  # of these rows none is of dgrad or wgrad


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


FUSED = ConvProblem(2, 2, 6, 6, 2, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 2, "fp32")


def test_measured_fused_pass(monkeypatch):
    """Rows of dgrad and wgrad by one kernel, and what "auto" takes for it."""
    names = able(FUSED, "backward", devices.DEFAULT)
    plan = dispatch.plan_pass(FUSED, "backward", devices.DEFAULT, "triton")
    for taken, takes, on in ((plan, plan.algorithm, FakeLab()), (None, "dgrad and wgrad", SlowLab(devices.DEFAULT))):
        monkeypatch.setattr(rows, "taken", lambda problem, pass_, target, taken=taken: taken)
        fused_rows = [row for row in rows.measured([Layer("k3", FUSED)], on) if row.get("pass") == "backward"]
        assert [row["provider"] for row in fused_rows] == [*names, "torch_contiguous", "torch_channels_last", "auto"]
        assert fused_rows[-1]["note"] == f"takes {takes}"
        assert ("us_p50" in fused_rows[-1]) == (taken is not None)
        for row in fused_rows[:-1]:
            assert taken is None or row["max_rel_err"] < 1e-6
            assert row["us_p50"] == 20
            assert row["flops"] == 4 * 2 * 2 * 36 * 9


def test_a_wrong_fused_pass_is_found_in_either_gradient():
    expected = numerics.reference(FUSED, numerics.operands(FUSED), "backward")
    for wrong in (0, 1):
        for fault in (lambda t: t * 1.01, lambda t: t * float("nan")):
            gradients = tuple(fault(t) if i == wrong else t for i, t in enumerate(expected))
            error, bound = numerics.worst_error(FUSED, "backward", gradients, expected)
            assert not error <= bound
    assert numerics.worst_error(FUSED, "backward", expected, expected)[0] == 0


def test_plot_across_kernel_sizes(tmp_path, writer):
    """A provider that serves small kernels only has a shorter line; "auto" is a ring on the fastest."""
    for layer in layers_of("--layers", "kernels"):
        for name, time_us in (("small", 101), ("depthwise_direct", 102), ("auto", 101)):
            if name != "small" or layer.problem.kh <= 7:
                row = rows.row_with_floors(layer, "fprop", name, devices.DEFAULT)
                writer.append(row | rows.timing_fields(layer.problem, "fprop", row["floor_us"], time_us))
    table = read(tmp_path)
    figures = plots.draw(table)
    assert list(figures) == ["time", "fraction"]
    axes = figures["time"].axes[0]
    assert axes.get_xlabel() == "kernel height and width, pixels"
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    sizes = list(layers.KERNELS)
    assert lines == {"small": sizes[:4], "depthwise_direct": sizes, "floor": sizes, "auto": sizes}
    shown = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(shown) == len(lines)
    said = text.report(table, ["time.png"], len(table), len(table))
    assert "128 to 128 channels, depthwise, stride 1, 56x56 pixels, batch 64, bf16, nhwc" in said
    assert not comparison.across_kernels([row for row in table if row["layer"] == "k3"])
