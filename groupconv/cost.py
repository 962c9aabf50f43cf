"""The analytic model: what a pass must cost (its floor), and what a tiling of it would."""

from __future__ import annotations

import math
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
    """A modelled time and what bounds it: "memory", "l2", "matrix", "issue", "shared" or "latency".

    score: by which tilings are compared; of two bound by the same, the one that asks less of the rest is better.
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
    pipelined: whether what a program does in different steps overlaps.
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
    pipelined: bool = False


MEMORY_NS = 520.0  # from a load to its data: a guess, by the shortest steps of marches that wait for it (H200)
UNHIDDEN = (
    2.0  # times as long take the parts of a program that has a multiprocessor to itself: a guess, by its 3-D dots
)
ISSUE_SLOTS = 4 * 32  # thread instructions a clock and multiprocessor
SHARED_BYTES = 128  # a clock and multiprocessor
OVERLAP_LOST = 0.05  # of the work that the slowest resource hides; it only ranks tilings
MATRIX_EFFICIENCY = 0.6  # of the rate of a large matrix product, for products fed by gathers


def estimate(problem: ConvProblem, tiling: Tiling, target: Target) -> Estimate:
    """The modelled time of a tiling: its slowest resource, stretched by what the last programs leave idle."""
    rate = target.matrix_rate(problem.dtype) or target.matrix_rate("fp32")
    clocks = target.multiprocessors * target.clock_ghz * 1e3  # of all multiprocessors in a microsecond
    parts = {
        "memory": tiling.dram_bytes / (target.copy_gbps * 1e3),
        "l2": tiling.l2_bytes / (target.l2_gbps * 1e3),
        "matrix": tiling.matrix_flops / (rate * MATRIX_EFFICIENCY * 1e6) + tiling.waits / clocks,
        "issue": tiling.instructions / (ISSUE_SLOTS * clocks),
        "shared": tiling.shared_bytes / (SHARED_BYTES * clocks),
    }
    # What a program takes by itself: where few share a multiprocessor, others do not hide it.
    places = target.multiprocessors * tiling.resident
    trips = tiling.trips / max(1, tiling.ahead) * MEMORY_NS * 1e-3
    busy = parts["matrix"] + parts["issue"] + parts["shared"]
    busy *= UNHIDDEN * target.multiprocessors / max(1, tiling.programs)
    alone = trips if tiling.pipelined else max(busy, trips) if tiling.ahead else busy + trips
    parts["latency"] = tiling.programs / places * (alone + 2 * MEMORY_NS * 1e-3)
    bound = max(parts, key=parts.__getitem__)
    # Inside a multiprocessor the programs share what bounds them, so the one with most programs ends last; but they
    # wait side by side. Memory is shared by all, and kept busy by half of the programs that fit at once.
    waves = tiling.programs / (places if bound in ("memory", "latency") else target.multiprocessors)
    stretch = math.ceil(waves) / waves if waves else 1.0
    idle = stretch if bound != "memory" else max(1.0, stretch / 2)
    time = parts[bound] * idle + LAUNCH_US * tiling.launches
    return Estimate(time, bound, time + OVERLAP_LOST * (sum(parts.values()) - parts[bound]))


# PyTorch's time over the floor where nobody measured it, by group width (narrow: up to 32) and pass. A prior, to decide
# what "auto" does before a measurement does: cuDNN is near the floor for wide groups and several times above it for
# narrow ones; PyTorch's depthwise wgrad re-reads its input for every tap.
TORCH_OVER_FLOOR = {
    "depthwise": {"fprop": 2.5, "dgrad": 2.5, "wgrad": 6.0},
    "narrow": {"fprop": 4.0, "dgrad": 4.0, "wgrad": 5.0},
    "wide": {"fprop": 1.6, "dgrad": 1.8, "wgrad": 1.8},
}


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
    """A modelled time of F.conv2d for layers that nobody measured: a prior over the floor, no more.

    measured: the multiples found on this device for some of its "WIDTH_CLASS PASS", which take the place of
    TORCH_OVER_FLOOR's.
    """
    if pass_ == "backward":
        return sum(torch_prior_us(problem, part, target, measured) for part in ("dgrad", "wgrad"))
    kind = width_class(problem)
    found = (measured or {}).get(f"{kind} {pass_}")
    if found is not None:
        return found * torch_floor_us(problem, pass_, target)
    prior = TORCH_OVER_FLOOR[kind][pass_] * floor_us(problem, pass_, target)
    return max(prior, torch_floor_us(problem, pass_, target)) + LAUNCH_US
