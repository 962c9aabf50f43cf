"""Compiling ahead: what is to be run is compiled in other processes, into Triton's cache on disk, before its turn."""

from __future__ import annotations

import concurrent.futures
import os

from ..children import Children, problem_json
from ..devices import Target
from ..problem import ConvProblem
from .contenders import Contender


def processes(jobs: int | None = None) -> int:
    """How many may compile: all processes of a job on this machine one a core, but the one that measures."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return jobs or max(1, (os.cpu_count() or 1) // local - 1)


class Compiler:
    """`count` processes that compile for a target. Use it as a context manager."""

    def __init__(self, target: Target, count: int):
        self._target = target.arch_name
        self._children = Children("groupconv.compiled", interpret=False, count=count)
        self._pending: dict[tuple[ConvProblem, str, str], concurrent.futures.Future[dict]] = {}

    def submit(self, problem: ConvProblem, pass_: str, contender: Contender) -> None:
        """Compile one of ours when its turn comes; once, however often it is asked for."""
        key = problem, pass_, contender.name
        if key not in self._pending:
            job = {
                "problem": problem_json(problem), "pass": pass_, "target": self._target,
                "algorithm": contender.provider, "config": contender.config,
            }  # fmt: skip
            self._pending[key] = self._children.submit(job)

    def answer(self, problem: ConvProblem, pass_: str, contender: Contender, seconds: float | None = None) -> dict:
        """What each kernel of it takes, or {"failed": why}; TimeoutError if that is not known in time."""
        self.submit(problem, pass_, contender)
        try:
            return self._pending[problem, pass_, contender.name].result(seconds)
        except concurrent.futures.TimeoutError:  # another class than TimeoutError before Python 3.11
            raise TimeoutError from None

    def __enter__(self) -> Compiler:
        self._children.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._children.__exit__(*exception)


def compiled_fault(answer: dict, target: Target) -> tuple[str | None, dict]:
    """Why compiled kernels are not worth timing, or None; and what the main one takes."""
    if "failed" in answer:
        # What was compiled and could not be looked into is as good: whether it spills the race will tell.
        return (None if "compiled" in answer else f"not compiled: {answer['failed']}"), {}
    main = answer["kernels"][0]
    resources = {name: main[name] for name in ("registers", "spill_bytes", "shared_bytes")}
    if spills := sum(kernel["spill_bytes"] for kernel in answer["kernels"]):
        return f"spills {spills} bytes", resources
    if main["shared_bytes"] > target.shared_bytes:
        return f"takes {main['shared_bytes']} bytes of shared memory of {target.shared_bytes}", resources
    return None, resources
