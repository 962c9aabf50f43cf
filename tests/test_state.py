"""A full disk, a folder that is read-only, clocks that jump, several GPUs, and the end of an interpreter."""

import contextlib
import errno
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import filelock
import pretended
import pytest
from pretended import ENVIRONMENT

from groupconv import cli, configs, raced
from groupconv.common import files

FUTURE = 4_000_000_000  # seconds: the year 2096
SLOW = """
import time
from groupconv import workers
workers.serve(lambda job: time.sleep(job["seconds"]) or {"failed": ""})
"""
LAYERS = ("--layers", "groups", "--groups", "4", "--channels", "16", "--size", "14", "--batch", "4")


# --- A full disk, and a folder that is read-only ---------------------------------------------------------------------


@contextlib.contextmanager
def no_room(where, folder, monkeypatch):
    """Nothing more can be written in a folder, as is found out in the `middle` of a file, or only when it is begun, or
    when it takes its place.
    """

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "read-only":
        with pretended.read_only(folder):
            yield
    elif where == "replace":
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            yield
    else:
        with pretended.full_disk({"begin": 0, "middle": 100}[where]):
            yield


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _table(path):
    with files.Writer(path, ("utc", "a", "b"), {"a": "x" * 30}) as writer:
        for number in range(9):
            writer.append({"b": 1000 + number})


@pytest.mark.parametrize("where", ["begin", "middle", "replace", "read-only"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_atomically(path, "new" * 1000),
        lambda path: files.Writer(path, ("a",), {}, [{"a": "new" * 1000}]),
        files.put_aside,
    ],
    ids=["text", "table", "copy"],
)
def test_a_file_that_cannot_be_written_leaves_what_was_there(write, where, folder, monkeypatch):
    path = folder / "file"
    path.write_text("old" * 1000)
    before = contents(folder)
    with no_room(where, folder, monkeypatch), pytest.raises(OSError, match=r"large|space|denied"):
        write(path)
    assert contents(folder) == before
    write(path)
    assert contents(folder) != before


def test_a_table_keeps_the_rows_for_which_there_was_room(tmp_path):
    path = tmp_path / "table.csv"
    header, row = 8, 57
    with pretended.full_disk(header + 3 * row - 2), pytest.raises(OSError, match="large"):
        _table(path)
    assert path.stat().st_size == header + 3 * row - 2  # the last row's last digit is not there
    assert [row["b"] for row in files.read(path, ("a", "b"))] == ["1000", "1001"]


def tune(out, *arguments):
    return cli.main(["tune", "--stub", "--out", str(out), *LAYERS, *arguments])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a tuning run that nothing came in the way of."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "shipped_folder", lambda: folder / "none")
        configs.reset()
        assert tune(folder) == 0
    return folder


def entries(folder):
    return json.loads((folder / "stub.json").read_text())["entries"]


@pytest.mark.parametrize("where", ["begin", "middle", "replace", "read-only"])
def test_tuning_goes_on_when_there_is_room_again(where, folder, tuned, monkeypatch, capsys):
    """A line says why it ended, what was measured is kept, and so is the file that an earlier run left."""
    (folder / "stub.json").write_text("an earlier run's")
    room = {"middle": (tuned / "stub.jsonl").stat().st_size // 2}
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.warns() if where == "replace" else contextlib.nullcontext())
        stack.enter_context(pretended.full_disk(room[where]) if where in room else no_room(where, folder, monkeypatch))
        assert tune(folder) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("groupconv tune: [Errno")
    assert (folder / "stub.json").read_text() == "an earlier run's"
    assert {path.name for path in folder.iterdir()} <= {"stub.json", "stub.jsonl"}
    measured = (folder / "stub.jsonl").read_bytes() if (folder / "stub.jsonl").exists() else b""
    (folder / "stub.json").unlink()
    with pytest.warns(UserWarning, match="1 damaged") if where == "middle" else contextlib.nullcontext():
        assert tune(folder) == 0
    assert (folder / "stub.jsonl").read_bytes().startswith(measured)
    assert entries(folder) == entries(tuned)


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=ENVIRONMENT | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


UNCOMPILED = """
import warnings, torch, torch.nn.functional as F, groupconv
from groupconv import assembler, cost, prepared
from groupconv.compiling import stub_driver

prepared.refusal = lambda x, backend: None
cost.torch_prior_us = lambda *_: 1e6
x, w = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(16, 4, 3, 3)
with stub_driver.active("sm_90"), warnings.catch_warnings(record=True) as caught:
    for _ in range(3):
        y = groupconv.triton_conv(x, w, padding=1, groups=4)
        assert torch.equal(y, F.conv2d(x, w, padding=1, groups=4))
        y.sum().backward()
    try:
        groupconv.triton_conv(x, w, padding=1, groups=4, backend="triton")
    except assembler.NoKernel as error:
        print(error)
for warning in caught:
    if "compiled" in str(warning.message):
        print(warning.message)
"""


WITHOUT_C = """
import subprocess
from groupconv.compiling import stub_driver

def launcher(src, metadata):
    raise subprocess.CalledProcessError(1, ["cc"])

stub_driver.StubDriver.launcher_cls = staticmethod(launcher)
"""


@pytest.mark.parametrize(("before", "why"), [("", "Not a directory"), (WITHOUT_C, "'cc'")], ids=["no place", "no C"])
def test_triton_cannot_compile_here(before, why, tmp_path):
    """F.conv2d serves where no backend was asked for, which is told once a kernel."""
    (tmp_path / "file").touch()
    cache = str(tmp_path / "cache" if before else tmp_path / "file" / "cache")
    raised, forward, backward = python(before + UNCOMPILED, TRITON_CACHE_DIR=cache).splitlines()
    for line in (raised, forward, backward):
        assert line.startswith("groupconv: ")
        assert f"_kernel cannot be compiled into {cache}: " in line
        assert why in line
        assert "TRITON_CACHE_DIR names another" in line
    assert forward.endswith("F.conv2d runs instead")


# --- Several GPUs ----------------------------------------------------------------------------------------------------


GPUS = """
import types, torch, groupconv, triton
from groupconv import devices, prepared, torch_private, trial
from groupconv.compiling import stub_driver

NAMES = ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"]
TARGETS = [devices.named(name) for name in NAMES]
current, streams, launched = 0, [100, 101, 102], []


class Driver(stub_driver.StubDriver):
    def __init__(self):
        self.utils = self

    @property
    def target(self):
        return TARGETS[current]

    def load_binary(self, name, binary, shared, device):
        return 1, (device, name), 32, 0, 1024

    def get_device_properties(self, device):
        return stub_driver._Utils(TARGETS[device]).get_device_properties(device)

    def get_current_device(self):
        return current

    def get_current_stream(self, device):
        return streams[device]

    class launcher_cls:
        def __init__(self, src, metadata):
            self.arch = metadata.target.arch

        def __call__(self, x, y, z, stream, function, *args):
            launched.append((current, function[0], self.arch, stream))


def exchange(index):
    global current
    before, current = current, index if index >= 0 else current
    return before


triton.runtime.driver.set_active(Driver())
torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = exchange
torch_private.current_gpu = torch.cuda.current_device = lambda: current
torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(
    name=NAMES[index], multi_processor_count=TARGETS[index].multiprocessors
)
torch.Tensor.device = property(lambda tensor: torch.device("cuda", getattr(tensor, "index", 0)))


def on(index, *tensors):
    for tensor in tensors:
        tensor.index = index
    return tensors


def step(index, backend="triton"):
    x, w, bias, dy = on(
        index, torch.randn(2, 16, 8, 8), torch.randn(16, 4, 3, 3), torch.randn(16), torch.randn(2, 16, 8, 8)
    )
    call = prepared.lookup(x, w, bias, 1, 1, 1, 4, backend)
    assert call.plan.target.slug == TARGETS[index].slug, call.plan.target
    launched.clear()
    call.forward(x, w, bias)
    call.backward(dy, x, w, (True, True, False))
    if finish := call.finisher(x, w, bias, "relu", False, False):
        call.finish(finish, x, w, bias, None, "relu", False)
    return call
"""


def test_several_gpus_of_two_models():
    """Whichever is current: a call is planned for the GPU of its tensors, compiled for it, and launched on it, on the
    stream that is current there; then what was current is current again.
    """
    code = """
for current in (0, 1, 2):
    for index in (0, 1, 2, 1):
        before = current
        for stream in (100, 200):
            streams[index] = stream + index
            step(index)
            arch = 90 if index == 0 else 80
            assert len(launched) >= 3 and set(launched) == {(index, index, arch, stream + index)}, launched
            assert current == before
assert len(prepared._CALLS) == 3
tiles = [str(call.plan.fprop.config) for call in prepared._CALLS.values()]
print(tiles[1] == tiles[2])
"""
    assert python(GPUS + code).split() == ["True"]


def test_trials_on_another_gpu():
    """What is checked and timed is the tensors' GPU, and what it found is of that model of GPU alone."""
    code = """
class Clock:
    capturing = staticmethod(lambda: False)
    later = staticmethod(lambda tensor: lambda: [[0.0, 1.0, 1.0]] * len(tensor))

    def mark(self):
        marked.add(current)

    def microseconds(self, start, end):
        return 1.0


import concurrent.futures
marked, jobs = set(), []


def submit(job):
    jobs.append(job["on"]["slug"])
    answer = concurrent.futures.Future()
    answer.set_result({"failed": ""})
    return answer


trial.DEVICE, trial.submit = Clock(), submit
trial.raced.is_fair, trial.dispatch.MOST_CONTENDERS = lambda: False, 1
groupconv.set_trials(True)
for number in range(60):
    step(1, "auto")
assert marked == {1} and set(jobs) == {TARGETS[1].slug}, (marked, jobs)
found = {(status.device, status.pass_, status.state) for status in groupconv.trials()}
assert {("nvidia_a100_sxm", pass_, "raced") for pass_ in ("fprop", "dgrad", "wgrad")} <= found, found
assert step(2, "auto").plan.fprop.source == "raced"
assert step(0, "auto").plan.fprop.source == "modelled"
print(current)
"""
    assert python(GPUS + code).split() == ["0"]


# --- Clocks that jump ------------------------------------------------------------------------------------------------


@pytest.fixture
def jumping(monkeypatch):
    """A time of day that is days before or after what it was when it was last asked."""
    days, now = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86400 * days.randint(-3000, 3000))


@pytest.mark.usefixtures("jumping")
@pytest.mark.parametrize("stamp", [0, FUTURE])
def test_tuning_by_a_clock_that_jumps(tuned, tmp_path, stamp, capsys):
    """Its budget lasts, and files of any age are gone on with."""
    lines = (tuned / "stub.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stub.jsonl").write_text("".join(lines[: len(lines) // 2]))
    os.utime(tmp_path / "stub.jsonl", (stamp, stamp))
    assert tune(tmp_path, "--budget-seconds", "100") == 0
    assert "budget" not in capsys.readouterr().out
    assert entries(tmp_path) == entries(tuned)
    assert len((tmp_path / "stub.jsonl").read_text().splitlines()) == len(lines) + 1  # and what it is measured with
    os.utime(tmp_path / "stub.json", (stamp, stamp))
    assert configs.parse_device((tmp_path / "stub.json").read_text(), "").entries


@pytest.mark.usefixtures("jumping")
@pytest.mark.parametrize("stamp", [0, FUTURE])
def test_a_lock_of_any_age(stamp, tmp_path, monkeypatch):
    """One that is held is waited for so many seconds, and one that was left is taken."""
    monkeypatch.setenv("GROUPCONV_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(raced, "LOCK_SECONDS", 0.2)
    found, path = raced.of_now(configs.Entry({}, "torch", {}, 1.0, 1.0)), raced.user_file("gpu")
    lock = pathlib.Path(f"{path}.lock")
    lock.touch()
    os.utime(lock, (stamp, stamp))
    raced.write("gpu", found)
    assert len(path.read_text().splitlines()) == 1
    raced.reset()
    began = time.monotonic()
    with filelock.FileLock(lock), pytest.warns(UserWarning, match=r"gpu.trials.jsonl: what races find is not kept"):
        raced.write("gpu", found)
    assert 0.1 < time.monotonic() - began < 5
    assert len(path.read_text().splitlines()) == 1


# --- The end of an interpreter ---------------------------------------------------------------------------------------


BUSY = """
import pathlib, threading, time
from groupconv import configs, raced, trial, workers

slow, begun = workers.Workers, pathlib.Path("pids")
trial.workers.Workers = lambda module, *args, **options: slow("slow", *args, **options)
trial.submit({"seconds": 600})
"""
# What goes on while the main thread comes to its end.
ENDINGS = {
    "a process that starts": "",
    "a job under way": "while not begun.exists(): time.sleep(0.01)",
    "a thread that submits jobs": """
def submitting():
    while True:
        trial.submit({"seconds": 0})
while not begun.exists(): time.sleep(0.01)
threading.Thread(target=submitting, daemon=True).start()
time.sleep(0.2)
""",
    "threads that write": """
while not begun.exists(): time.sleep(0.01)
found = raced.of_now(configs.Entry({}, "torch", {}, 1.0, 1.0))
for number in range(20):
    threading.Thread(target=raced.write, args=("gpu", found)).start()
""",
}


@pytest.mark.parametrize("doing", ENDINGS)
def test_an_interpreter_ends_in_the_middle_of_a_trial(doing, tmp_path):
    """At once, in silence, and with its processes; what is written is whole."""
    (tmp_path / "slow.py").write_text(f"open('pids', 'a').write(f'{{__import__(\"os\").getpid()}} ')\n{SLOW}")
    code = f"{BUSY}{ENDINGS[doing]}\nprint(time.monotonic(), flush=True)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env=ENVIRONMENT | {"GROUPCONV_CONFIG_DIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - float(done.stdout) < 10
    begun = tmp_path / "pids"
    pids = [int(pid) for pid in begun.read_text().split()] if begun.exists() else []
    assert bool(pids) == (doing != "a process that starts")
    deadline = time.monotonic() + 5
    while any(map(pretended.is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(pretended.is_alive, pids))
    if doing == "threads that write":
        lines = (tmp_path / "gpu.trials.jsonl").read_text().splitlines()
        assert [json.loads(line)["algorithm"] for line in lines] == ["torch"] * 20
