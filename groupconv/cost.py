"""The analytic model: what a pass must cost (its floor), and what a tiling of it would."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from .problem import ConvProblem

if TYPE_CHECKING:
    from .devices import Target

LAUNCH_US = 2.5  # a launch's own time on the device, start to end; a guess, in the modelled times only


def floor_us(problem: ConvProblem, pass_: str, target: Target) -> float:
    """The larger of the time to move `min_bytes` once and the time of the useful FLOPs on the matrix unit."""
    memory = problem.min_bytes(pass_) / (target.copy_gbps * 1e3)
    rate = target.matrix_rate(problem.dtype) or target.matrix_rate("fp32")
    return max(memory, problem.flops(pass_) / (rate * 1e6))


class Estimate(NamedTuple):
    """A modelled time and what most of it goes to: "memory", "l2", "matrix", "issue", "shared" or "latency".

    score: by which tilings are compared; of two that a limit makes equal, the one that asks less of the rest is better.
    """

    time_us: float
    bound: str
    score: float

    def scaled(self, factor: float) -> Estimate:
        """The estimate with its times multiplied, by what measurements say."""
        return Estimate(self.time_us * factor, self.bound, self.score * factor)


class Tiling(NamedTuple):
    """What a launch asks of the machine, counted by the algorithm that would make it.

    programs: of the grid. matrix_flops: done on the matrix unit, padding included; those of an instruction that
    reaches half the rate count twice. l2_bytes: asked of L2, whole 32-byte sectors. instructions: of one thread each.
    dram_bytes: what must move, workspaces too. resident: programs that fit a multiprocessor at once. launches: kernels.
    shared_bytes: written to and read from shared memory. waits: clocks of one multiprocessor in which its matrix unit
    has nothing to do, because a product waits for the one before it. trips: steps of a program that wait for memory,
    one after another, and ahead: how many steps before its own a load is made; 0 where nothing is done while it waits.
    work: what of WEIGHTS its time is made up by.
    """

    programs: int
    matrix_flops: float
    l2_bytes: float
    instructions: float
    dram_bytes: float
    resident: int
    launches: int = 1
    shared_bytes: float = 0.0
    waits: float = 0.0
    trips: float = 0.0
    ahead: int = 0
    work: str = "products"


class Weights(NamedTuple):
    """Of the times that a kernel's resources would take alone, how much its own time has of each."""

    memory: float
    shared: float
    issue: float
    matrix: float
    waits: float


# What a program waits for, others hide in part only, so that resources add up. Fitted to what was measured on an H200,
# 2026-11-26 (`python -m groupconv.perf_reports.calibration`): "products" of tiles (111 passes, which lie 15% from it),
# and "batched" ones, of three axes, whose programs have a multiprocessor almost to themselves (18 passes, 17%).
# "multiply-adds" is a guess: so went 71 passes of a former depthwise_direct.
WEIGHTS = {
    "products": Weights(memory=0.74, shared=1.25, issue=0.56, matrix=0.24, waits=0.84),
    "batched": Weights(memory=0.0, shared=0.0, issue=6.8, matrix=5.3, waits=0.0),
    "multiply-adds": Weights(memory=0.6, shared=0.2, issue=2.1, matrix=0.0, waits=0.0),
}
MEMORY_NS = 520.0  # from a load to its data: a guess, by the shortest steps of marches that wait for it (H200)
ISSUE_SLOTS = 4 * 32  # thread instructions a clock and multiprocessor
SHARED_BYTES = 128  # a clock and multiprocessor
TIED = 0.05  # of all that a limit hides; it only ranks tilings


def alone(problem: ConvProblem, tiling: Tiling, target: Target) -> Weights:
    """The microseconds that each resource would take alone; but memory, stretched by what the last programs leave idle:
    inside a multiprocessor the programs share what there is, so the one with most programs ends last.
    """
    rate = target.matrix_rate(problem.dtype) or target.matrix_rate("fp32")
    clocks = target.multiprocessors * target.clock_ghz * 1e3  # of all multiprocessors in a microsecond
    each = tiling.programs / target.multiprocessors
    stretch = math.ceil(each) / each if each else 1.0
    return Weights(
        memory=tiling.dram_bytes / (target.copy_gbps * 1e3),
        shared=stretch * tiling.shared_bytes / (SHARED_BYTES * clocks),
        issue=stretch * tiling.instructions / (ISSUE_SLOTS * clocks),
        matrix=stretch * tiling.matrix_flops / (rate * 1e6),
        waits=stretch * tiling.waits / clocks,
    )


def estimate(problem: ConvProblem, tiling: Tiling, target: Target) -> Estimate:
    """The modelled time of a tiling: what its resources add up to, but no less than memory, L2 or latency allow."""
    weights, parts = WEIGHTS[tiling.work], alone(problem, tiling, target)
    memory, shared, issue, matrix, waits = map(operator.mul, weights, parts)
    total = memory + shared + issue + matrix + waits
    largest = max((memory, "memory"), (shared, "shared"), (issue, "issue"), (matrix + waits, "matrix"))
    # Programs that share a multiprocessor wait side by side; where nothing is loaded ahead, they work in between.
    trips = tiling.trips / max(1, tiling.ahead) + 2
    rounds = math.ceil(tiling.programs / (target.multiprocessors * tiling.resident))
    latency = rounds * trips * MEMORY_NS * 1e-3 + (0.0 if tiling.ahead else (total - memory) / tiling.resident)
    l2 = tiling.l2_bytes / (target.l2_gbps * 1e3)
    time, bound = max((total, largest[1]), (parts.memory, "memory"), (l2, "l2"), (latency, "latency"))
    time += LAUNCH_US * tiling.launches
    return Estimate(time, bound, time + TIED * total)


# F.conv2d's time over `torch_floor_us` where nobody measured it, by group width and pass: medians of what was measured
# on an H200, 2026-11-26, bf16, channels_last. A prior, to decide what "auto" does before a measurement does.
TORCH_OVER_FLOOR = {
    "depthwise": {"fprop": 4.8, "dgrad": 9.4, "wgrad": 5.2},
    "narrow": {"fprop": 5.7, "dgrad": 6.2, "wgrad": 6.6},
    "wide": {"fprop": 8.9, "dgrad": 7.3, "wgrad": 6.1},
}
UNGROUPED = 1.7  # the same of convolutions in one group, where cuDNN is at home: a guess


def width_class(problem: ConvProblem) -> str:
    """How a layer is grouped, as F.conv2d's time goes by it: "depthwise", "narrow" (up to 32 channels) or "wide"."""
    if problem.cin_g == 1:
        return "depthwise"
    # cuDNN is at home without groups.
    return "narrow" if max(problem.cin_g, problem.cout_g) <= 32 and problem.groups > 1 else "wide"


def torch_floor_us(problem: ConvProblem, pass_: str, target: Target) -> float:
    """What F.conv2d's time is a multiple of: for depthwise layers its kernels multiply without matrix units."""
    floor = floor_us(problem, pass_, target)
    if width_class(problem) == "depthwise":
        floor = max(floor, problem.flops(pass_) / (target.matrix_rate("fp32") * 1e6))
    return floor


def torch_prior_us(
    problem: ConvProblem, pass_: str, target: Target, measured: Mapping[str, float] | None = None
) -> float:
    """A modelled time of F.conv2d for layers that nobody measured: a prior over its floor, no more.

    measured: the multiples found on this device for some of its "WIDTH_CLASS PASS", which take the place of
    TORCH_OVER_FLOOR's.
    """
    if pass_ == "backward":
        return sum(torch_prior_us(problem, part, target, measured) for part in ("dgrad", "wgrad"))
    kind, floor = width_class(problem), torch_floor_us(problem, pass_, target)
    if problem.groups == 1 and problem.cin_g > 1:
        return UNGROUPED * floor + LAUNCH_US
    found = (measured or {}).get(f"{kind} {pass_}")
    return TORCH_OVER_FLOOR[kind][pass_] * floor + LAUNCH_US if found is None else found * floor
