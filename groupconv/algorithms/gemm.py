"""What the implicit GEMMs share: the widths of their tiles, what a product costs, and how many ways wgrad is split."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable

from ..devices import Target
from ..kernels.tiles import part_sizes
from ..occupancy import largest_splits, most_splits, shares
from ..problem import ConvProblem

MOST_SPLITS = 256
START_STEPS = 4  # as long as a program takes to load its first tiles and to store its sums; a guess
MOST_WAITING = 64  # columns of a product whose left operand may wait in registers: a guess
LEAST_STEPS = 8  # of a split, which has to fill the pipeline first
# Guesses, in the modelled times only.
DRAIN_CLOCKS = 40  # from a warp group's product to the next that adds to it, where Triton waits in between
STEP_CLOCKS = 50  # to wait for a step's tiles
START_CLOCKS = 1200  # to load the first tiles and to store the last


parts = functools.lru_cache(1024)(part_sizes)


def column_tiles(n: int, problem: ConvProblem, target: Target) -> list[int]:
    """Columns of a program: for each number of tiles that may share N, the least that are one, two or three parts."""
    step = 16 if target.matrix_unit in ("tcgen05", "mfma", "wmma") else 8
    exact = problem.element_bytes == 2
    most = 256 if exact and target.backend == "cuda" else 128
    fewest = math.ceil(n / most)
    found = set()
    for tiles, parts in itertools.product(range(fewest, max(fewest, math.ceil(n / 64)) + 1), (1, 2, 3)):
        size = math.ceil(n / tiles / step) * step
        while size.bit_count() > (parts if exact else 1):
            size += size & -size
        found.add(max(16, size))
    return sorted(size for size in found if size <= most)


def starved(columns: int, k: int, warps: int, element_bytes: int, target: Target) -> bool:
    """Whether the narrowest part of so many columns gives a thread less than 4 bytes, which no pipeline loads."""
    return parts(columns)[-1] * k * element_bytes < 4 * target.warp_size * warps


def pipelined_bytes(operands: Iterable[tuple[int, int]], tile: dict, size: int, target: Target) -> int:
    """Shared memory of a pipeline, for operands of (elements of a step, elements of an access), of `size` bytes each.

    Matrix units that read operands from it, and later, hold one stage more. What is loaded by less than 4 bytes passes
    through registers, once for all stages.
    """
    stages = max(1, tile["num_stages"] - (not target.has_warpgroups))
    elements = 0
    for of_a_step, run in operands:
        elements += of_a_step * (stages if run * size >= 4 else 1)
    return elements * size


def kept_left(problem: ConvProblem, rows: int, columns: int, warps: int, reads: int, target: Target) -> list[int]:
    """Whether the left operand of products may wait in registers, BLOCK_L: of warp groups' alone, which else read it
    from shared memory each time, and more slowly than they multiply it with few columns.

    reads: products that have a tile on their left.
    """
    by_groups = target.matrix_unit == "wgmma" and warps >= 4 and rows >= 64
    worth = reads > 1 and parts(columns)[0] <= MOST_WAITING
    return [1, 0] if by_groups and worth and problem.element_bytes == 2 else [0]


def registers_for_all(options: dict, target: Target) -> dict:
    """Compile options that let a thread have all registers there are.

    For tcgen05, whose sums lie elsewhere, ptxas aims at more programs than shared memory holds, and spills.
    """
    return options | {"maxnreg": 255} if target.matrix_unit == "tcgen05" else options


@dataclasses.dataclass(frozen=True)
class Product:
    """What a program's product of a tile asks of the machine; fields as in cost.Tiling."""

    flops: float
    shared_bytes: float  # read
    instructions: float


@functools.lru_cache(4096)
def product(m: int, n: int, k: int, warps: int, element_bytes: int, target: Target, left: bool = False) -> Product:
    """An [m, k] tile times [k, n], whose columns are as many products as they have parts.

    A warp group reads its rows from shared memory for each part, and the columns for each 64 rows; where there are
    fewer rows than 64 for each group, the groups share the columns instead. Without warp groups a warp reads what it
    multiplies into registers: 16 rows or more, and all columns. left: its rows are in registers.
    """
    sizes = parts(n)
    groups = warps // 4
    if not target.has_warpgroups or m < 64 or not groups:
        half_rate = 2 if target.has_warpgroups else 1
        read = k * (m * len(sizes) + n * min(warps, max(1, m // 16))) * element_bytes
        return Product(2.0 * m * n * k * half_rate, read, m * n * k / 32)
    own = max(1, groups * 64 // m)  # groups that share rows
    slow = 8 * (sizes[-1] == 8)  # columns without an instruction of a warp group, at half the rate
    read = k * (m * own * len(sizes) * (not left) + n * max(1, m // 64)) * element_bytes
    issued = groups * len(sizes) * math.ceil(m / (64 * groups)) * math.ceil(k / 16)  # by warp groups
    return Product(2.0 * m * (n + slow) * k, read, 5 * 128 * issued)


def split(problem: ConvProblem, steps: int, splits: int) -> tuple[int, int]:
    """(splits, steps of each) of a wgrad of so many steps that is to be split in `splits`.

    Fewer, where not each would have a step, or where partial sums would take more memory than the operands.
    """
    return shares(steps, min(splits, largest_splits(problem, "wgrad")))


@functools.lru_cache(4096)
def splits_to_try(problem: ConvProblem, steps: int, tiles: int, fit: int, target: Target) -> list[int]:
    """Numbers of splits that may be good, the likely best first: whole waves of programs, and powers of two.

    tiles: programs of a split, of which a multiprocessor holds `fit`.
    """
    places = target.multiprocessors * fit
    most = max(1, min(most_splits(problem, "wgrad"), steps // LEAST_STEPS, MOST_SPLITS))
    wanted = {1, most} | {waves * places // tiles for waves in range(1, 5)} | {2**i for i in range(9)}
    found = {shares(steps, splits) for splits in wanted if 1 <= splits <= most}  # fewer than `largest_splits`

    def end(choice):  # of the multiprocessor with most programs, in steps
        splits, each = choice
        return math.ceil(tiles * splits / target.multiprocessors) * (each + START_STEPS), splits

    return [splits for splits, _ in sorted(found, key=end)]


def waits(
    each: Product, programs: float, steps: float, chained: float, warps: int, resident: int, dtype: str, target: Target
) -> float:
    """Clocks of a multiprocessor that its matrix unit loses, as cost.Tiling has them.

    programs: those that begin with empty pipelines and end with stores that nothing hides. steps: of all programs'
    loops, each of which waits for its tiles. chained: products that wait for another one of the same step, because they
    add to its sum; a warp group that waits leaves the unit to the others.
    """
    lost = (steps * STEP_CLOCKS + programs * START_CLOCKS) / resident
    if target.matrix_unit == "wgmma":
        groups = max(1, resident * warps // 4)
        busy = each.flops * 1e-3 * target.multiprocessors * target.clock_ghz / target.matrix_rate(dtype)
        lost += chained * max(0.0, (busy + DRAIN_CLOCKS) / groups - busy)
    return lost
