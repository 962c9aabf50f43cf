"""Devices that are not there, and files that they leave: what the tests of the tools share."""

import contextlib
import os
import pathlib
import resource

import torch

from groupconv import devices
from groupconv.common import files
from groupconv.measuring import lab, stub
from groupconv.perf_reports import comparison, rows

# Of a process that compiles, or runs nothing: the tests' own has interpreted kernels.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
TIMES_US = [19.0, 19.0, 20.0, 21.0, 22.0]


class FakeLab(lab.GpuLab):
    """A device whose clock is ours: calls are checked, on the CPU in the interpreter, and all take TIMES_US."""

    def __init__(self):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(devices.DEFAULT, "Pretended GPU", device, self._race)
        self.raced = []

    def _race(self, runs, rounds):
        self.raced.append(tuple(runs))
        return dict.fromkeys(runs, TIMES_US)

    def limits(self, dtype):
        return lab.Limits(copy_gbps=4000.0, matrix_tflops=50.0)


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


def read(folder, name="results.csv"):
    """The rows of a report's or a bench's table."""
    return files.read(folder / name, comparison.FILES.get(name, rows.FIELDS))


@contextlib.contextmanager
def full_disk(room):
    """No file grows beyond `room` bytes: a write takes what there is room for, and the next one raises OSError."""
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, was[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)


@contextlib.contextmanager
def read_only(folder):
    """Nobody may write in a folder, root neither."""
    was = os.geteuid()
    folder.chmod(0o555)
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)
        folder.chmod(0o755)


def is_alive(pid):
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"
