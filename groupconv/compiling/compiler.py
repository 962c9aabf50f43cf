"""Compiling kernels for GPUs that are not there, through the code that launches them, here and in other processes.

python -m groupconv.compiling.compiler < jobs
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
import triton

from .. import devices, launcher, outside, workers
from ..algorithms import REGISTRY
from ..common.numerics import OPERANDS, TORCH_DTYPES, dense_operand_strides
from ..problem import ConvProblem
from . import resources, stub_driver

LOCKS = 64  # files, by the hash of a job


@dataclasses.dataclass(frozen=True)
class Job:
    """A configuration to compile for a problem on a target.

    target: a name; on: the GPU itself, if there is one. strides: of the call's tensors, as `prepare` takes them; None
    for dense ones. unaligned: those of its operands whose addresses are no multiples of 16 bytes.
    """

    algorithm: str
    pass_: str
    config: dict[str, int]
    problem: ConvProblem
    target: str
    strides: dict[str, tuple[int, ...]] | None = None
    unaligned: tuple[str, ...] = ()
    on: devices.Target | None = None

    def __str__(self) -> str:
        p, options = self.problem, " ".join(str(size) for size in self.config.values())
        kernel = f"{self.algorithm} {p.kernel_of(self.pass_)}"
        return f"{kernel} {p.kh}x{p.kw} s{p.stride[0]} {p.cin_g}->{p.cout_g} [{options}]"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came of a job. kernels: what each of a pass takes, the main one first; none where that cannot be read, for
    lack of a disassembler. failed: what the compiler raised.
    """

    kernels: tuple[resources.Resources, ...] = ()
    failed: str = ""

    def faults(self, target: devices.Target) -> tuple[str, ...]:
        """Why a target is not to run it: not compiled, spills, too much shared memory. What cannot be read may run."""
        if self.failed:
            return (f"not compiled: {self.failed}",)
        faults = []
        if spills := sum(kernel.spill_bytes for kernel in self.kernels):
            faults.append(f"{spills} bytes of spills")
        if self.kernels and (shared := self.kernels[0].shared_bytes) > target.shared_bytes:
            faults.append(f"{shared} bytes of shared memory of {target.shared_bytes}")
        return tuple(faults)


def launched(job: Job) -> tuple[launcher.Launch, ...]:
    """The launches of one pass, compiled for a target as a call would."""
    problem, strides = job.problem, job.strides or dense_operand_strides(job.problem)
    x, w, y = problem.x_shape, problem.w_shape, problem.y_shape
    shapes = {"x": x, "w": w, "y": y, "dy": y, "bias": (problem.c_out,)}
    names = OPERANDS[job.pass_]
    if job.pass_ == "fprop":
        names = ("x", "w", "bias" if problem.bias else None, "y" if problem.residual else None)
    operands = [
        None if name is None else _meta(shapes[name], strides.get(name, (1,)), problem, name in job.unaligned)
        for name in names
    ]
    on = job.on or devices.named(job.target)
    with stub_driver.active(on):
        call = REGISTRY[job.algorithm].prepare(problem, job.pass_, job.config, on, strides)
        call(*operands)
    return call.launches


def _meta(shape: tuple[int, ...], strides: tuple[int, ...], problem: ConvProblem, unaligned: bool) -> torch.Tensor:
    """A tensor without memory, as if it began at a multiple of 16 bytes or one element later."""
    tensor = torch.empty_strided(shape, strides, dtype=TORCH_DTYPES[problem.dtype], device="meta")
    return tensor.as_strided(shape, strides, 1) if unaligned else tensor


def compiled(job: Job) -> Compiled:
    """Compile a job in this process."""
    try:
        launches = launched(job)
        with contextlib.suppress(FileNotFoundError):  # no disassembler
            return Compiled(tuple(resources.of(launch.compiled) for launch in launches))
        return Compiled()
    except Exception as error:  # whatever the compiler raises is the finding
        return Compiled(failed=workers.in_a_line(error))


class Compiler:
    """`count` processes that compile ahead of need, into Triton's cache on disk. Use it as a context manager."""

    def __init__(self, count: int):
        self._workers = workers.Workers(f"{__package__}.compiler", interpret=False, count=count)
        self._pending: dict[str, concurrent.futures.Future[dict[str, Any]]] = {}

    def submit(self, job: Job) -> None:
        """Compile a job when its turn comes; once, however often it is asked for."""
        if repr(job) not in self._pending:
            self._pending[repr(job)] = self._workers.submit(dataclasses.asdict(job))

    def answer(self, job: Job, seconds: float | None = None) -> Compiled:
        """What came of a job; TimeoutError if that is not known in time."""
        self.submit(job)
        try:
            answer = self._pending[repr(job)].result(seconds)
        except concurrent.futures.TimeoutError:  # another class than TimeoutError before Python 3.11
            raise TimeoutError from None
        kernels = tuple(resources.Resources(**fields) for fields in answer.get("kernels", ()))
        return Compiled(kernels, answer["failed"])

    def __enter__(self) -> Compiler:
        self._workers.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._workers.__exit__(*exception)


def _answer(fields: dict[str, Any]) -> dict[str, Any]:
    """Of processes that are asked the same at once one compiles, and the others find it in Triton's cache: in `folder`,
    if a job names one.
    """
    fields = dict(fields)
    triton.knobs.cache.dir = fields.pop("folder", None) or triton.knobs.cache.dir
    strides = {name: tuple(sizes) for name, sizes in (fields["strides"] or {}).items()}
    on = None if fields["on"] is None else devices.of_fields(fields["on"])
    job = Job(**fields | {"problem": workers.problem_of(fields["problem"]), "strides": strides or None, "on": on})
    with _alone(fields):
        return dataclasses.asdict(compiled(job))


@contextlib.contextmanager
def _alone(fields: dict[str, Any]) -> Iterator[None]:
    """While no other process does the same, if there is a cache that is shared."""
    number = int(hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest(), 16) % LOCKS
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # another user's, or a file system without locks
            folder = pathlib.Path(triton.knobs.cache.dir, "groupconv-locks")
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(outside.alone(folder / f"{number}.lock"))
        yield


def main() -> None:
    """Answer jobs until the input ends."""
    workers.serve(_answer)


if __name__ == "__main__":
    main()
