"""Devices that are not there, and files that they leave: what the tests of the tools share."""

import contextlib
import os

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
