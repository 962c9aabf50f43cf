"""The errors of kernels under Triton's interpreter, on problems shrunk to what it can do.

TRITON_INTERPRET=1 python -m groupconv.compiling.interpreter < jobs
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch

from .. import devices, launcher, workers
from ..algorithms import REGISTRY, candidates, divided
from ..common import numerics
from ..common.numerics import dense_operand_strides, reference, worst_error
from ..problem import ConvProblem

# Images, rows and columns of a problem shrunk for the interpreter, where a program costs milliseconds of every size.
SMALL = (2, 9, 7)
NARROW_GROUPS, NARROW_WIDTH = 2, 64


def shrunk(problem: ConvProblem) -> ConvProblem:
    """The problem on a small batch of small maps, with only a few groups of small width.

    The kernel stays as it is, and maps are as large as it takes for each tap to meet a pixel.
    """

    def size(small: int, actual: int, kernel: int, pad: int, dilation: int) -> int:
        return min(actual, max(small, dilation * (kernel - 1) + 1 - pad))

    top, bottom, left, right = problem.pad
    groups, cin_g, cout_g = min(problem.groups, NARROW_GROUPS), _narrowed(problem.cin_g), _narrowed(problem.cout_g)
    return dataclasses.replace(
        problem,
        batch=min(problem.batch, SMALL[0]),
        h_in=size(SMALL[1], problem.h_in, problem.kh, min(top, bottom), problem.dilation[0]),
        w_in=size(SMALL[2], problem.w_in, problem.kw, min(left, right), problem.dilation[1]),
        c_in=groups * cin_g,
        c_out=groups * cout_g,
        groups=groups,
    )


def _narrowed(width: int) -> int:
    """A small group width that leaves the same remainder in a tile."""
    return width if width <= NARROW_WIDTH else NARROW_WIDTH // 2 + width % (NARROW_WIDTH // 2)


def largest_tiles(tiles: Sequence[dict[str, int]]) -> dict[str, int]:
    """The tile of the fewest programs: they are what the interpreter's time goes to."""
    return max(tiles, key=lambda config: math.prod(v for k, v in config.items() if k.startswith("BLOCK")))


@functools.lru_cache(maxsize=1)
def _operands(problem: ConvProblem) -> numerics.Operands:
    return numerics.operands(problem)


def _answer(job: workers.Fields) -> workers.Fields:
    problem, pass_, algorithm = workers.problem_of(job["problem"]), job["pass_"], REGISTRY[job["algorithm"]]
    # Where nothing is worth measuring for so small a problem, the configuration of the one that it stands for.
    tile = largest_tiles(candidates(algorithm.NAME, problem, pass_, devices.DEFAULT) or [job["config"]])
    config = divided(algorithm.NAME, problem, pass_, tile, devices.DEFAULT)[0]
    operands = _operands(problem)
    call = algorithm.prepare(problem, pass_, config, devices.DEFAULT, dense_operand_strides(problem))
    with launcher.poisoned():
        result = call(*operands.of(pass_))
    error, bound = worst_error(problem, pass_, result, reference(problem, operands, pass_))
    return {"error": error, "bound": bound}


if __name__ == "__main__":
    torch.set_num_threads(1)
    workers.serve(_answer)
