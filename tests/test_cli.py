"""The command line: what it answers without its heavy packages, how it ends, and what it says on the way."""

import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from pretended import ENVIRONMENT

import groupconv
from groupconv import cli
from groupconv.common import progress
from groupconv.compiling import command
from groupconv.compiling.compiler import Job
from groupconv.problem import ConvProblem

COMMANDS = ("compile", "report", "tune", "bench")
# As in an environment without some packages: nothing finds them.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {missing!r} else super().find_spec(name, path, target)
sys.meta_path = [Others if finder is PathFinder else finder for finder in sys.meta_path]
"""
HEAVY = ("torch", "triton", "numpy", "rich", "matplotlib")


def without(missing, arguments, tmp_path):
    """`python -m groupconv ARGUMENTS`, where some packages are missing."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(missing=set(missing)))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "groupconv", *arguments],
        capture_output=True, text=True, env=ENVIRONMENT | {"PYTHONPATH": path}, cwd=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_needs_no_heavy_package(command, tmp_path):
    done = without(HEAVY, [*command, "--help"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" ".join(["usage: groupconv", *command]))
    for name in COMMANDS if not command else ():
        assert re.search(rf"^    {name} ", done.stdout, re.M)


def test_version_and_mistakes_need_no_heavy_package(tmp_path):
    done = without(HEAVY, ["--version"], tmp_path)
    assert (done.returncode, done.stdout) == (0, f"groupconv {groupconv.__version__}\n")
    done = without(HEAVY, ["report", "--dtype", "fp8"], tmp_path)
    assert done.returncode == 2
    assert "invalid choice: 'fp8'" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_extra_is_named_in_a_line(command, tmp_path):
    done = without(["rich", "matplotlib", "numpy"], [command], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    missing = "(rich|matplotlib|numpy) is not installed"
    assert re.fullmatch(rf"groupconv {command}: {missing}: pip install 'groupconv\[report\]'\n", done.stderr)


def script(tmp_path):
    """The command as pip installs it."""
    path = tmp_path / "groupconv"
    path.write_text("import sys\nfrom groupconv.cli import main\nsys.exit(main())\n")
    return path


@pytest.mark.parametrize("how", ["script", "groupconv", "groupconv.cli"])
def test_every_way_to_call_it_is_quick(how, tmp_path):
    start = [str(script(tmp_path))] if how == "script" else ["-m", how]
    line = [sys.executable, "-X", "importtime", *start, "bench", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: groupconv bench")
    loaded = set(re.findall(r"\|\s+(\S+)$", done.stderr, re.M))
    assert "groupconv.options" in loaded
    assert not loaded & set(HEAVY)


def test_public_names_are_there_in_every_process(tmp_path):
    """At once in a program, with the operators; when asked for in the command line's."""
    assert set(groupconv.__all__) <= vars(groupconv).keys()
    code = """
import sys
import groupconv
eager = "torch" in sys.modules
names = [getattr(groupconv, name) for name in groupconv.__all__]
import torch
from groupconv import Conv2d, api, layers, modules
assert groupconv.triton_conv is api.triton_conv and groupconv.convert is modules.convert and Conv2d is layers.Conv2d
assert hasattr(torch.ops, "groupconv") and not hasattr(groupconv, "nothing")
print(eager, len(names))
"""
    path = script(tmp_path)
    path.write_text(code)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"False {len(groupconv.__all__)}\n"


def test_an_unknown_algorithm_is_named_with_those_there_are(capsys):
    assert cli.main(["compile", "--algorithm", "winograd"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("groupconv compile: --algorithm: 'winograd' is not one of implicit_gemm, row_block, ")
    assert said.count("\n") == 1


# --- Interrupts ------------------------------------------------------------------------------------------------------


def alive(group):
    """The processes of a group that have not ended."""
    pids = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # ended meanwhile
        if int(pgrp) == group and state != "Z":
            pids.append(int(path.parent.name))
    return pids


INTERRUPTED = {
    # Both kinds of workers have begun, and rows came.
    "report": (["report", "--quick", "--out", "out"], {}, ".report-*/results.csv"),
    # The command again, as a child without this setting.
    "bench": (["bench", "--stub", "--out", "out", "--layers", "suite"], {"TRITON_INTERPRET": "1"}, "bench.csv"),
}


@pytest.mark.parametrize(("arguments", "setting", "begun"), INTERRUPTED.values(), ids=INTERRUPTED)
def test_an_interrupt_ends_in_a_line(arguments, setting, begun, tmp_path):
    """Ctrl-C, which a terminal sends to the whole group: exit status 130, one line, no process left, and what an
    earlier run left is whole.
    """
    out = tmp_path / "out"
    out.mkdir()
    earlier = {name: f"earlier {name}" for name in ("results.csv", "REPORT.md", "overview.png", "NARROW.md")}
    for name, content in earlier.items():
        (out / name).write_text(content)
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path / "cache")} | setting
    process = subprocess.Popen(
        [sys.executable, "-m", "groupconv", *arguments], start_new_session=True, env=environment, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(path.read_text().count("\n") > 3 for path in out.glob(begun)):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        ended = time.monotonic() + 5
        while alive(process.pid) and time.monotonic() < ended:
            time.sleep(0.05)
        assert alive(process.pid) == []
    finally:
        for pid in alive(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 130
    said = [line for line in err.splitlines() if not re.match(r"\w+: \d+ ", line)]  # how far it was
    assert said == [f"groupconv {arguments[0]}: interrupted"]
    left = {path.name: path.read_text() for path in out.iterdir()}
    assert {name: left[name] for name in earlier} == earlier
    assert left.keys() - earlier.keys() <= {"bench.csv"}


# --- Progress --------------------------------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now = [100.0]
    with progress.shown("report", "rows", 60, lambda: now[0]) as step:
        for _ in range(60):
            now[0] += 3.0
            step("g4 fprop")
    lines = sys.stderr.getvalue().splitlines()
    assert lines[:2] == ["report: 4 of 60 rows, 12 s", "report: 8 of 60 rows, 24 s"]
    assert len(lines) == 15
    with progress.shown("bench", "rows of bench.csv", clock=lambda: now[0]) as step:
        now[0] += 10.0
        step("g4 fprop")
    assert sys.stderr.getvalue().splitlines()[15:] == ["bench: 1 rows of bench.csv, 10 s"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.shown("report", "rows", 2) as step:
        step("g4 fprop")
        step("g4 dgrad")
    assert "g4 dgrad" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


def test_parallel_compilation_is_judged_as_one_alone():
    """A tile that is good, one that does not fit, one that its target has no instructions for, and one that is none."""
    problem = ConvProblem(32, 512, 28, 28, 512, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1), 4)
    good = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "SPLITS": 1, "num_warps": 4, "num_stages": 2}
    huge = good | {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 128, "num_stages": 4}
    jobs = [
        Job("implicit_gemm", "fprop", config, problem, target)
        for config, target in ((good, "sm_80"), (huge, "sm_86"), (good, "sm_75"), (good | {"BLOCK_K": 24}, "sm_80"))
    ]
    seen = []
    outcomes = command.run_parallel(jobs, seen.append, 1)
    assert seen == outcomes
    assert [outcome.job for outcome in outcomes] == jobs
    fine, large, excluded, broken = outcomes
    assert fine.resources.registers > 0
    assert not fine.faults
    assert "shared memory" in large.faults[0]
    assert "bf16 matrix instructions" in excluded.excluded
    assert broken.resources is None
    assert len(broken.faults) == 1
