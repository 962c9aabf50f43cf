"""Compiling for `modelled`: answers jobs with what each kernel of a pass takes.

python -m groupconv.perf_reports.compiled < jobs
"""

from __future__ import annotations

import dataclasses

from .. import compile_check
from . import children


def _answer(job: dict) -> dict:
    problem = children.problem_of(job["problem"])
    kernels = compile_check.compile_pass(problem, job["pass"], job["algorithm"], job["config"], job["target"])
    return {"kernels": [dataclasses.asdict(kernel) for kernel in kernels]}


if __name__ == "__main__":
    children.serve(_answer)
