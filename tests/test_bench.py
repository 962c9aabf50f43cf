"""`groupconv bench`, `make gpu` and `make ship`: rows with every peer, going on, and what must not be shipped."""

import collections
import dataclasses
import pathlib
import shutil
import statistics
import subprocess
import sys
import types

import pytest
import torch
from pretended import FakeLab, read

from groupconv import cli, configs, devices, options
from groupconv.algorithms import REGISTRY
from groupconv.common import Layer, files, progress
from groupconv.compiling.compiler import Compiled
from groupconv.measuring import lab, stub
from groupconv.measuring.contenders import Contender
from groupconv.perf_reports import gpu_run, layers, rows
from groupconv.perf_reports.bench import pass_of
from groupconv.problem import ConvProblem

NARROW = ConvProblem(2, 8, 6, 5, 8, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 4, "fp32")
DEPTHWISE = dataclasses.replace(NARROW, groups=8)
ASYMMETRIC = dataclasses.replace(NARROW, pad=(2, 1, 0, 1))
QUICK = ["bench", "--stub", "--quick", "--parts", "layers", "--layers", "suite"]


def passes(table):
    return collections.Counter(pass_of(row) for row in table if row["provider"] == "auto")


# --- Peers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def flag_gems(tmp_path, monkeypatch):
    """A package of that name, with the one function that is called."""
    (tmp_path / "flag_gems").mkdir()
    source = "import torch.nn.functional as F\ncalls = []\ndef conv2d(*args):\n"
    (tmp_path / "flag_gems" / "__init__.py").write_text(f"{source}    calls.append(args)\n    return F.conv2d(*args)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("flag_gems", None)


def test_peers_are_those_with_something_to_offer():
    assert rows.peers(NARROW, rows.PEERS) == ["torch_contiguous", "torch_channels_last", "torch_compile"]
    assert "torch_native" in rows.peers(DEPTHWISE, rows.PEERS)
    assert rows.peers(dataclasses.replace(NARROW, groups=1, c_in=1), ("torch_native",)) == []


@pytest.mark.parametrize("problem", [DEPTHWISE, ASYMMETRIC], ids=str)
def test_every_peer_computes_the_same(problem, flag_gems, monkeypatch):
    """Each of them against float64, in every pass; torch.compile is called with its search on."""
    searched = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: searched.append(options) or call)
    passes = [pass_ for pass_, _ in rows.reported(problem, devices.DEFAULT)]
    for name in rows.peers(problem, rows.PEERS):
        table = list(rows.of_peer([Layer("a", problem)], FakeLab(), name))
        assert [(row["pass"], row["provider"], row["source"]) for row in table] == [
            (pass_, name, "baseline") for pass_ in passes
        ]
        for row in table:
            assert row["max_rel_err"] < 1e-6, name
            assert row["us_p50"] == 20.0
    assert searched == [{"dynamic": False, "options": {"max_autotune": True}}] * len(passes)
    assert sys.modules["flag_gems"].calls


def test_native_kernels_run_without_cudnn(monkeypatch):
    seen = []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda *args: seen.append(torch.backends.cudnn.enabled) or conv2d(*args)
    )
    with FakeLab().subject(DEPTHWISE) as subject:
        for name in ("torch_native", "torch_contiguous"):
            seen.clear()
            subject.check("fprop", Contender(name))
            assert seen[0] == (name != "torch_native")
    assert torch.backends.cudnn.enabled


def test_what_is_measured_was_compiled_ahead():
    """Asked for before its layer's turn, and waited for before its check."""

    class Asked:
        def __init__(self):
            self.submitted, self.answered = [], []

        def submit(self, job):
            self.submitted.append(job)

        def answer(self, job):
            assert job in self.submitted
            self.answered.append(job)
            return Compiled()

    asked = Asked()
    table = list(rows.measured([Layer("a", DEPTHWISE)], stub.StubLab(devices.DEFAULT), compiler=asked))
    assert [row["provider"] for row in table if row["provider"] in REGISTRY] == [j.algorithm for j in asked.submitted]
    assert asked.answered == asked.submitted


def test_rows_of_one_peer():
    chosen = [Layer("a", NARROW), Layer("b", DEPTHWISE)]
    on = stub.StubLab(devices.DEFAULT)
    table = list(rows.of_peer(chosen, on, "torch_compile", lambda row: row["pass"] == "dgrad"))
    assert {row["provider"] for row in table} == {"torch_compile"}
    assert {(row["layer"], row["pass"]) for row in table} >= {("a", "fprop"), ("b", "wgrad")}
    assert all(row["us_p50"] and row["pass"] != "dgrad" for row in table)


# --- The command -----------------------------------------------------------------------------------------------------


def test_bench_on_the_stub(tmp_path):
    """Every pass of every layer with every provider that serves it; said to be the stub's wherever it is shown."""
    assert cli.main([*QUICK, "--out", str(tmp_path), "--dtypes", "bf16x3"]) == 0
    table = read(tmp_path, "bench.csv")
    assert {row["kind"] for row in table} == {row["gpu"] for row in table} == {"stub"}
    chosen = layers.suite("bf16x3", "nhwc")[:: layers.QUICK_STEP]
    peers = [name for name in rows.PEERS if name != "torch_compile"]
    assert len(table) == rows.count_measured(chosen, devices.DEFAULT, peers)
    assert set(passes(table).values()) == {1}
    assert "stub clock" in (tmp_path / "REPORT.md").read_text().lower()
    assert list(tmp_path.glob("speedup_*.png"))


def test_bench_goes_on(tmp_path, monkeypatch, capsys):
    """What the budget leaves is measured by the next run; a pass of which rows are missing is measured whole."""
    clock = iter(range(10**6))
    monkeypatch.setattr(progress.Deadline.__init__, "__defaults__", (lambda: float(next(clock)),))
    assert cli.main([*QUICK, "--out", str(tmp_path), "--csv-only", "--budget-seconds", "20"]) == 0
    assert "the same command goes on" in capsys.readouterr().err
    part = read(tmp_path, "bench.csv")
    assert part[-1]["provider"] == "auto"  # no pass is left in the middle
    assert 10 < len(part) < 40
    assert cli.main([*QUICK, "--out", str(tmp_path), "--csv-only"]) == 0
    whole = read(tmp_path, "bench.csv")
    assert set(passes(whole).values()) == {1}
    assert all(row in whole for row in part if pass_of(row) in passes(part))
    per_pass = collections.Counter(pass_of(row) for row in whole if row["layer"])
    straight = tmp_path / "straight"
    assert cli.main([*QUICK, "--out", str(straight), "--csv-only"]) == 0
    assert per_pass == collections.Counter(pass_of(row) for row in read(straight, "bench.csv") if row["layer"])
    before = (tmp_path / "bench.csv").read_text()
    assert cli.main([*QUICK, "--out", str(tmp_path), "--csv-only"]) == 0
    assert (tmp_path / "bench.csv").read_text() == before
    assert not list(tmp_path.glob("*.old"))


@pytest.mark.parametrize("foreign", ["a,b\n1,2\n", None], ids=["another-table", "another-commit"])
def test_rows_of_another_run_are_kept_apart(tmp_path, foreign):
    if foreign is None:
        environment = files.environment("stub", "stub") | {"commit": "0"}
        with files.Writer(tmp_path / "bench.csv", rows.FIELDS, environment) as writer:
            writer.append({"provider": "copy_limit", "dtype": "bf16", "gbps": 1.0, "source": "measured"})
    else:
        (tmp_path / "bench.csv").write_text(foreign)
    before = (tmp_path / "bench.csv").read_text()
    assert cli.main([*QUICK, "--out", str(tmp_path), "--csv-only"]) == 0
    (aside,) = tmp_path.glob("bench.csv.*.old")
    assert aside.read_text() == before
    assert len({row["commit"] for row in read(tmp_path, "bench.csv")}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no GPU here"),
        (["--stub"], "--stub: its times are pretended, so it needs --out"),
        (["--stub", "--out", "OUT", "--budget-seconds", "0"], "--budget-seconds: 0.0 is not a positive number"),
        (["--stub", "--out", "OUT", "--models", "resnet"], "'resnet' is not timm:NAME or torchvision:NAME"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    assert cli.main(["bench", *(str(out) if word == "OUT" else word for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


# --- make gpu --------------------------------------------------------------------------------------------------------

TESTS = """
import pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("text", ["a-1", "b [x]"])
def test_passes(text):
    assert text

def test_fails():
    assert 1 == 2

def test_skips():
    pytest.skip("no such device")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project without tests so far; the log of its GPU tests."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: on a GPU\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_run.os, "cpu_count", lambda: 1)  # one worker is enough
    return tmp_path / "tests.txt"


def test_gpu_tests_are_run_once(project, capsys):
    """What a log has is not run again, unless it is of another commit."""
    log = project
    (log.parent / "tests" / "test_some.py").write_text(TESTS)
    commit = files.environment("measured", "")["commit"]
    log.write_text(f"commit {commit}\n[gw0] [ 25%] PASSED tests/test_some.py::test_passes[a-1] \n")
    assert not gpu_run.tests(log, progress.Deadline(None))
    assert gpu_run.outcomes(log.read_text()) == {
        "tests/test_some.py::test_passes[a-1]": "PASSED",
        "tests/test_some.py::test_passes[b [x]]": "PASSED",
        "tests/test_some.py::test_fails": "FAILED",
        "tests/test_some.py::test_skips": "SKIPPED",
    }
    assert log.read_text().count("test_passes[a-1]") == 1
    said = capsys.readouterr().out
    assert "2 passed" in said
    assert "FAILED tests/test_some.py::test_fails" in said
    whole = log.read_text()
    assert not gpu_run.tests(log, progress.Deadline(None))
    assert log.read_text() == whole
    log.write_text(whole.replace(f"commit {commit}\n", "commit 0\n"))
    assert not gpu_run.tests(log, progress.Deadline(None))
    assert log.read_text().count("PASSED") == 2


def test_gpu_tests_that_cannot_begin_have_not_passed(project, capsys):
    """A file that does not import: said, and tried again by the next run."""
    (project.parent / "tests" / "test_some.py").write_text("import no_such_module  # pytest.mark.gpu\n")
    assert not gpu_run.tests(project, progress.Deadline(None))
    assert "pytest ended with status" in capsys.readouterr().out
    assert gpu_run.TESTS_END not in project.read_text()


def test_gpu_tests_end_with_the_time(project):
    (project.parent / "tests" / "test_slow.py").write_text(
        "import pytest, time\n@pytest.mark.gpu\ndef test_slow():\n    time.sleep(300)\n"
    )
    assert gpu_run.tests(project, progress.Deadline(3.0))
    assert gpu_run.TESTS_END not in project.read_text()


def test_gpu_steps_leave_few_files(tmp_path, monkeypatch, capsys):
    """A tuning and a bench against the stub: at most 8 files, a short table, and a second run finds all done."""
    monkeypatch.setattr(gpu_run, "VARIANTS", (("bf16", "nhwc"),))
    monkeypatch.setattr(gpu_run, "tests", lambda log, deadline: log.write_text(gpu_run.TESTS_END) > 0)
    steps = gpu_run.steps
    monkeypatch.setattr(gpu_run, "steps", lambda args: steps(args)[:2])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # or each step starts another process without it
    out = tmp_path / "out"

    def run(line, **options):
        """A step in this process, but for host times, which are of compiled kernels."""
        if line[3] == "bench" and not (out / "host.csv").exists():
            return subprocess.run(line, **options)
        return subprocess.CompletedProcess(line, cli.main(line[3:]))

    here = types.SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu_run, "subprocess", here)
    assert gpu_run.main(["--out", str(out), "--stub", "--quick"]) == 0
    names = ["REPORT.md", "bench.csv", "host.csv", "plots.pdf", "stub.json", "stub.jsonl", "tests.txt"]
    assert sorted(path.name for path in out.iterdir()) == names
    host = read(out, "host.csv")
    assert {row["mode"] for row in host} == {"eager"}
    assert all(float(row["us"]) > 0 for row in host)

    def contents():
        tables = [(out / name).read_text() for name in ("bench.csv", "host.csv")]
        journal = (out / "stub.jsonl").read_text().splitlines()
        return tables, [line for line in journal if "measured_with" not in line]

    before = contents()
    assert gpu_run.main(["--out", str(out), "--stub", "--quick", "--budget-seconds", "300"]) == 0
    said = capsys.readouterr().out
    assert "Everything is done." in said
    assert "stub clock" in said.lower()
    assert contents() == before


def test_gpu_steps_cover_what_is_to_be_tuned():
    args = gpu_run.argparse.Namespace(out=pathlib.Path("OUT"), stub=False, quick=False)
    steps = gpu_run.steps(args)
    assert [(step[4], step[6]) for step in steps if step[0] == "tune"] == list(gpu_run.VARIANTS)
    for step in steps:
        options.parser().parse_args(step)


# --- make ship -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What `make gpu` leaves: of the stub."""
    out = tmp_path_factory.mktemp("left")
    assert cli.main(["tune", "--stub", "--quick", "--out", str(out)]) == 0
    assert cli.main([*QUICK, "--out", str(out), "--csv-only"]) == 0
    return out


@pytest.fixture
def folder(left, tmp_path):
    """A copy, which `pretend` says to be measured on another device."""
    return shutil.copytree(left, tmp_path / "out")


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    for name in ("autotune_configs", "perf_reports"):
        (root / name).mkdir(parents=True)
    return root


def pretend(folder, device="Pretended GPU", kind="measured", clock="measured"):
    """Have a folder's files say that they are of another device, its rows of a kind, and its configurations' clock."""
    file = folder / "stub.json"
    text = file.read_text().replace('"device": "stub", "kind": "stub"', f'"device": "{device}", "kind": "{clock}"')
    (folder / f"{devices.slugify(device)}.json").write_text(text)
    file.unlink()
    changed = [row | {"gpu": device, "kind": kind} for row in read(folder, "bench.csv")]
    files.Writer(folder / "bench.csv", rows.FIELDS, {}, changed).__exit__()


def test_shipped_is_what_was_measured(folder, checkout, capsys):
    pretend(folder)
    assert gpu_run.main(["ship", str(folder), "--to", str(checkout)]) == 0
    shipped = checkout / "autotune_configs" / "pretended_gpu.json"
    assert shipped.read_text() == (folder / "pretended_gpu.json").read_text()
    reports = checkout / "perf_reports" / "pretended_gpu"
    assert (reports / "bench.csv").read_text() == (folder / "bench.csv").read_text()
    said = (reports / "REPORT.md").read_text()
    assert "Pretended GPU" in said
    assert "stub" not in said.lower()
    assert list(reports.glob("*.png"))
    assert str(shipped) in capsys.readouterr().out


def _stale(folder):
    path = folder / "pretended_gpu.json"
    path.write_text(path.read_text().replace(configs.kernels_sha256()["tiles.py"], "0" * 64))


REFUSED = {
    "the-stub": (lambda folder: None, "stub.json: a stub clock's times are not measurements"),
    "its-clock": (
        lambda folder: pretend(folder, clock="stub"),
        "pretended_gpu.json: a stub clock's times are not measurements",
    ),
    "stub-rows": (lambda folder: pretend(folder, kind="stub"), "bench.csv: a row of Pretended GPU is stub"),
    "other-kernels": (lambda folder: (pretend(folder), _stale(folder)), "entries were measured with other kernels"),
    "another-name": (
        lambda folder: (pretend(folder), (folder / "pretended_gpu.json").rename(folder / "mine.json")),
        "mine.json is of Pretended GPU, whose file is called pretended_gpu.json",
    ),
    "no-configurations": (lambda folder: (folder / "stub.json").unlink(), "but holds 0"),
    "damaged": (lambda folder: (folder / "stub.json").write_text("{"), "stub.json: not JSON"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_nothing_else_is_shipped(folder, checkout, capsys, spoil, message):
    spoil(folder)
    for root, says in ((checkout, message), (folder, "is no checkout of groupconv")):
        assert gpu_run.main(["ship", str(folder), "--to", str(root)]) == 2
        assert says in capsys.readouterr().err
    assert not [path for path in checkout.rglob("*") if path.is_file()]


# --- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_bench_on_the_gpu(tmp_path):
    """For real: every row has a time or says why not, no time is under what the copy's rate allows by much."""
    arguments = ["--layers", "groups", "--groups", "8", "128", "--batch", "64", "--parts", "layers", "host"]
    assert cli.main(["bench", "--out", str(tmp_path), *arguments]) == 0
    table = [row for row in read(tmp_path, "bench.csv") if row["layer"]]
    assert {row["kind"] for row in table} == {"measured"}
    for row in table:
        assert row["us_p50"] or row["note"], row
        if row["us_p50"]:
            assert float(row["fraction"]) < 1.3, row
    own = [row for row in table if row["source"] != "baseline" and row["provider"] != "auto"]
    assert own
    assert all(row["us_p50"] for row in own)
    modes = {row["mode"] for row in read(tmp_path, "host.csv")}
    assert modes == {"eager", "compiled", "graph"}


@pytest.mark.gpu
def test_races_are_fair():
    """The same call twice in a race takes the same time, whoever goes first; a call of twice the work takes longer."""
    x = torch.randn(2**27, device="cuda")
    y, z = torch.empty_like(x), torch.empty(2**28, device="cuda")
    runs = {"one": lambda: y.copy_(x), "same": lambda: y.copy_(x), "twice": lambda: z.view(2, -1).copy_(x)}
    medians = {name: statistics.median(times) for name, times in lab.race_on_gpu(runs, 30).items()}
    assert medians["same"] == pytest.approx(medians["one"], rel=0.05)
    assert medians["twice"] > 1.3 * medians["one"]
