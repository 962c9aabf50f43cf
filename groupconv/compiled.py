"""Compiling for reports: answers jobs with what each kernel of a pass takes, and how often its main loop runs if asked.

python -m groupconv.compiled < jobs
"""

from __future__ import annotations

import dataclasses
import math

from . import children, compile_check, iterations, resources


def _answer(job: dict) -> dict:
    problem = children.problem_of(job["problem"])
    made = compile_check.launched(problem, job["pass"], job["algorithm"], job["config"], job["target"])
    try:
        answer: dict = {"kernels": [dataclasses.asdict(resources.of(launch.compiled)) for launch in made]}
    except FileNotFoundError as error:
        return {"compiled": True, "failed": f"no disassembler: {error}"}
    if job.get("iterations"):
        answer |= {"programs": math.prod(made[0].grid), "iterations": iterations.of(made[0])}
    return answer


if __name__ == "__main__":
    children.serve(_answer)
