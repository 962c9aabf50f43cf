"""The analytic model: what a pass must cost (its floor), and what a tiling of it would."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from .problem import ConvProblem

if TYPE_CHECKING:
    from .devices import Target

LAUNCH_US = 7.5  # of a kernel that does nothing, start to end, as races of small layers have it (`weights`)


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


class Parts(NamedTuple):
    """Of each resource a time in microseconds, or how much of that time a kernel's own has; of launches, their number
    and the time of one.
    """

    memory: float
    l2: float
    shared: float
    issue: float
    matrix: float
    waits: float
    latency: float
    launches: float


ANY = "any"
MEMORY_NS = 520.0  # from a load to its data: a guess, by the shortest steps of marches that wait for it (H200)
ISSUE_SLOTS = 4 * 32  # thread instructions a clock and multiprocessor
SHARED_BYTES = 128  # a clock and multiprocessor
TIED = 0.05  # of all that a limit hides; it only ranks tilings


@functools.cache
def weights() -> dict[str, Parts]:
    """By `kernel`, and of ANY other, how much of each resource's time its own has.

    What a program waits for, others hide in part only, so that resources add up. Fitted to all that was raced on GPUs
    (`python -m groupconv.perf_reports.calibration`), winners and losers.
    """
    file = importlib.resources.files(f"{__package__}.autotune_configs").joinpath("weights.json")
    return {name: Parts(**parts) for name, parts in json.loads(file.read_text(encoding="utf-8"))["weights"].items()}


def kernel(algorithm: str, pass_: str) -> str:
    """What kernels are told apart by: their algorithm, and whether they end in sums of dw."""
    return f"{algorithm} {'sums' if pass_ in ('wgrad', 'backward') else 'results'}"


def alone(problem: ConvProblem, tiling: Tiling, target: Target) -> Parts:
    """The microseconds that each resource would take alone; what programs do, stretched by what the last ones leave
    idle: inside a multiprocessor they share what there is, so the one with most programs ends last.
    """
    rate = target.matrix_rate(problem.dtype) or target.matrix_rate("fp32")
    clocks = target.multiprocessors * target.clock_ghz * 1e3  # of all multiprocessors in a microsecond
    each = tiling.programs / target.multiprocessors
    stretch = math.ceil(each) / each if each else 1.0
    # Programs that share a multiprocessor wait side by side.
    trips = tiling.trips / max(1, tiling.ahead) + 2
    rounds = math.ceil(tiling.programs / (target.multiprocessors * tiling.resident))
    return Parts(
        memory=tiling.dram_bytes / (target.copy_gbps * 1e3),
        l2=tiling.l2_bytes / (target.l2_gbps * 1e3),
        shared=stretch * tiling.shared_bytes / (SHARED_BYTES * clocks),
        issue=stretch * tiling.instructions / (ISSUE_SLOTS * clocks),
        matrix=stretch * tiling.matrix_flops / (rate * 1e6),
        waits=stretch * tiling.waits / clocks,
        latency=rounds * trips * MEMORY_NS * 1e-3,
        launches=tiling.launches,
    )


def estimate(problem: ConvProblem, kernel: str, tiling: Tiling, target: Target) -> Estimate:
    """The modelled time of a kernel's tiling: what its resources add up to, but no less than memory allows."""
    parts, shares = alone(problem, tiling, target), weights()
    weighted = map(operator.mul, shares.get(kernel) or shares[ANY], parts)
    memory, l2, shared, issue, matrix, waits, latency, launches = weighted
    total = memory + l2 + shared + issue + matrix + waits + latency
    least = parts.memory + LAUNCH_US
    time = total + launches
    if time < least:
        return Estimate(least, "memory", least + TIED * time)
    compute = (shared, "shared"), (issue, "issue"), (matrix + waits, "matrix")
    _, bound = max((memory, "memory"), (l2, "l2"), (latency, "latency"), *compute)
    return Estimate(time, bound, time + TIED * time)


# F.conv2d's time beyond a launch, over `torch_floor_us`, where nobody measured it, by group width and pass: medians of
# what was measured on an H200, 2026-11-27, bf16, channels_last. A prior, for "auto" before there is a measurement.
TORCH_OVER_FLOOR = {
    "depthwise": {"fprop": 4.5, "dgrad": 9.2, "wgrad": 4.6},
    "narrow": {"fprop": 4.8, "dgrad": 5.4, "wgrad": 6.9},
    "wide": {"fprop": 8.7, "dgrad": 8.0, "wgrad": 6.0},
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
