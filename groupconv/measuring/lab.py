"""A GPU as a place to measure: calls made from problems, checked against float64, and timed beside each other."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import triton

from .. import devices, launcher, prepared, workers
from ..algorithms import REGISTRY
from ..common.numerics import (
    TORCH_DTYPES,
    Operands,
    PassResult,
    dense_operand_strides,
    operands,
    reference,
    worst_error,
)
from ..compiling import resources
from ..problem import ConvProblem
from . import peers
from .contenders import Contender

Run = Callable[[], PassResult]
Race = Callable[[dict[str, Run], int], dict[str, list[float]]]
COPY_BYTES = 2**30
MATRIX_SIZE = 8192
LIMIT_ROUNDS = 20


class DeviceLost(RuntimeError):
    """The GPU answers no more: an illegal access ends a process's use of it."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """A call's relative error against float64, and its bound: None for PyTorch's, which must only be finite; or why it
    failed.
    """

    error: float | None = None
    bound: float | None = None
    failed: str = ""

    @property
    def fault(self) -> str:
        """Why it is not to be timed: it failed, or its numbers are wrong; "" if it may be."""
        if self.error is None:
            return self.failed
        if self.bound is None:
            return "" if self.error < float("inf") else "wrong: the result is not finite"
        if self.error <= self.bound:
            return ""
        return f"wrong: error {self.error:.2g} above the bound {self.bound:.2g}"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a device reaches: a large copy, in GB/s read and written, and a large matrix product, in TFLOP/s; of bf16x3,
    which makes three products of one, a third of bf16's.
    """

    copy_gbps: float
    matrix_tflops: float

    def of(self, target: devices.Target, dtype: str) -> devices.Target:
        """The target with these limits of a dtype in place of its own, for the floors of passes."""
        rate = ("bf16", 3 * self.matrix_tflops) if dtype == "bf16x3" else (dtype, self.matrix_tflops)
        return dataclasses.replace(target, copy_gbps=self.copy_gbps, matrix_tflops=(rate,))


def race_on_gpu(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every call in every round, by events around it. The calls take turns, so that what disturbs one
    disturbs all, and each finds a cold L2: the cache is cleared before it, which also hides the host's part of a call.
    """
    driver: Any = triton.runtime.driver.active
    cache = driver.get_empty_cache_for_benchmark()
    for run in runs.values():
        run()
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            driver.clear_cache(cache)
            start.record()
            run()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) * 1e3 for start, end in pairs] for name, pairs in marks.items()}


class Subject(Protocol):
    """A problem that can be measured."""

    def checked_on(self, pass_: str) -> str:
        """What of a pass's result is compared with the reference."""

    def check(self, pass_: str, contender: Contender) -> Checked:
        """Run a contender once. Raises what it raises; DeviceLost if the device is gone then."""

    def used(self, pass_: str, contender: Contender) -> dict[str, int | str]:
        """A row's fields of what the main kernel of one of ours takes, once checked; none where it is not known."""

    def race(self, pass_: str, contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
        """Microseconds of every round of each contender, by name. Raises as `check`."""

    def forget(self, pass_: str) -> None:
        """Drop what was kept for a pass."""


class Lab(Protocol):
    """Where subjects are measured. kind: what its times are; name: the device's."""

    name: str
    kind: str
    target: devices.Target

    def subject(self, problem: ConvProblem) -> contextlib.AbstractContextManager[Subject]:
        """A problem with operands on the device; its memory is free afterwards."""

    def limits(self, dtype: str) -> Limits:
        """What the device reaches in a dtype."""


class GpuLab:
    """A GPU as a `Lab`. `race` times calls; the tests pass another, and "cpu"."""

    kind = "measured"

    def __init__(self, target: devices.Target, name: str, device: str = "cuda", race: Race = race_on_gpu):
        self.target, self.name, self.device, self.race = target, name, device, race

    @contextlib.contextmanager
    def subject(self, problem: ConvProblem) -> Iterator[Subject]:
        with settings(problem.dtype):
            try:
                yield GpuSubject(problem, self)
            finally:
                gc.collect()
                if self.device == "cuda":
                    with contextlib.suppress(RuntimeError):  # a lost device has nothing to free
                        torch.cuda.empty_cache()

    def limits(self, dtype: str, copy_bytes: int = COPY_BYTES, matrix_size: int = MATRIX_SIZE) -> Limits:
        with settings(dtype):
            source = torch.randint(256, (copy_bytes,), dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            a, b = (torch.randn(matrix_size, matrix_size, device=self.device) for _ in range(2))
            a, b = (matrix.to(torch.bfloat16 if dtype == "bf16x3" else TORCH_DTYPES[dtype]) for matrix in (a, b))
            times = self.race({"copy": lambda: target.copy_(source), "matrix": lambda: a @ b}, LIMIT_ROUNDS)
        copy_us, product_us = (statistics.median_high(times[name]) for name in ("copy", "matrix"))
        tflops = 2 * matrix_size**3 / product_us / 1e6
        return Limits(2 * copy_bytes / copy_us / 1e3, tflops / 3 if dtype == "bf16x3" else tflops)


def this_gpu() -> GpuLab:
    """The current CUDA or ROCm device."""
    return GpuLab(devices.of_device(torch.cuda.current_device()), torch.cuda.get_device_name())


@contextlib.contextmanager
def settings(dtype: str) -> Iterator[None]:
    """PyTorch as a fair baseline: cuDNN searches for its fastest algorithm, and fp32 computes in TF32 only if asked.

    bf16x3 is ours alone: F.conv2d computes in IEEE arithmetic beside it.
    """
    backends: Any = torch.backends
    prepared.set_fp32_precision("bf16x3" if dtype == "bf16x3" else None)
    before = backends.cudnn.benchmark, backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
    precision = "tf32" if dtype == "tf32" else "ieee"
    backends.cudnn.benchmark = True
    backends.cudnn.conv.fp32_precision = backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        prepared.set_fp32_precision(None)
        backends.cudnn.benchmark, backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision = before


class GpuSubject:
    """One problem on a device: random operands, references, and the calls that serve its passes."""

    def __init__(self, problem: ConvProblem, lab: GpuLab):
        self.problem, self.lab = problem, lab
        # The first images and the last: an index that overflows does so at the end.
        self.images = sorted({0, min(1, problem.batch - 1), problem.batch - 1})
        self._expected: tuple[str, PassResult] | None = None
        self._runs: dict[tuple[str, str], Run] = {}

    @functools.cached_property
    def given(self) -> Operands:
        return operands(self.problem, self.lab.device)

    def checked_on(self, pass_: str) -> str:
        images = ", ".join(map(str, self.images))
        return "dw" if pass_ == "wgrad" else f"{'dw, ' * (pass_ == 'backward')}images {images}"

    def check(self, pass_: str, contender: Contender) -> Checked:
        """Ours are run into poisoned memory."""
        try:
            run = self._run(pass_, contender)
            if not contender.ours:
                return Checked(self._error(pass_, run())[0], None)
            with launcher.poisoned():
                result = run()
            return Checked(*self._error(pass_, result))
        except Exception as failure:
            self._alive(failure)
            raise

    def used(self, pass_: str, contender: Contender) -> dict[str, int | str]:
        call: Any = self._run(pass_, contender)
        compiled = call.func.launches[0].compiled
        if compiled is None:  # it was interpreted
            return {}
        try:
            return {**resources.of(compiled).fields(), "compiled_for": self.lab.target.arch_name}
        except FileNotFoundError:  # no disassembler: the call is as good without
            return {}

    def race(self, pass_: str, contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
        try:
            return self.lab.race({contender.name: self._run(pass_, contender) for contender in contenders}, rounds)
        except Exception as failure:
            self._alive(failure)
            raise

    def forget(self, pass_: str) -> None:
        """Drop the calls of a pass, and the copies of operands that PyTorch's hold."""
        self._runs = {key: run for key, run in self._runs.items() if key[0] != pass_}

    def _run(self, pass_: str, contender: Contender) -> Run:
        run = self._runs.get((pass_, contender.name))
        if run is None:
            if contender.ours:
                strides = dense_operand_strides(self.problem)
                prepare = REGISTRY[contender.provider].prepare
                call = prepare(self.problem, pass_, contender.config, self.lab.target, strides)
                run = functools.partial(call, *self.given.of(pass_))
            else:
                run = peers.call(self.problem, pass_, contender.provider, self.given)
            self._runs[pass_, contender.name] = run
        return run

    def _error(self, pass_: str, result: PassResult) -> tuple[float, float]:
        if self._expected is None or self._expected[0] != pass_:
            self._expected = pass_, reference(self.problem, self.given, pass_, self.images)
        if isinstance(result, tuple):
            result = result[0][self.images], result[1]
        elif pass_ != "wgrad":
            result = result[self.images]
        return worst_error(self.problem, pass_, result, self._expected[1])

    def _alive(self, failure: Exception) -> None:
        if self.lab.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                raise DeviceLost(str(failure)) from failure


def tried(subject: Subject, pass_: str, contender: Contender) -> Checked:
    """What a check comes to. What it raises, but for DeviceLost, is the contender's own fault: others may do better."""
    try:
        return subject.check(pass_, contender)
    except DeviceLost:
        raise
    except Exception as error:
        return Checked(failed=failure(error))


def failure(error: Exception) -> str:
    """A row's note of what was raised."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "failed: out of memory"
    return f"failed: {workers.in_a_line(error)}"
