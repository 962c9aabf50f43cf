"""Wide groups as implicit GEMMs over blocks of rows that share their source rows (kernels/row_block.py)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels import row_block as kernels
from ..occupancy import Held, partial_bytes
from ..problem import ConvProblem
from .calls import (
    FilterGradient,
    Forward,
    Single,
    SplitK,
    align,
    convolution,
    emulate_bf16,
    epilogue,
    index_64,
    named_strides,
    pixels_last,
    split_config,
)
from .gemm import (
    MOST_SPLITS,
    column_tiles,
    kept_left,
    parts,
    pipelined_bytes,
    product,
    registers_for_all,
    split,
    splits_to_try,
    starved,
    waits,
)

NAME = "row_block"
BLOCKS = {
    "BLOCK_R": (1, 16, 1), "BLOCK_M": (16, 512), "BLOCK_N": (8, 512, 8), "BLOCK_K": (16, 512), "BLOCK_L": (0, 1),
}  # fmt: skip
DIVISION = {"SPLITS": (1, MOST_SPLITS, 1)}  # of wgrad's blocks
MOST_ROWS = 8
MOST_TAPS = 7  # kernel rows: each has its tiles in every step
MOST_PADDING = 1.2  # of rows, by blocks that reach past the map
INSTRUCTIONS_A_LOAD = 5  # with its address and mask, which the rows of a block share
INSTRUCTIONS_A_STEP = 60  # of each thread, to wait and to go on


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if pass_ == "backward":
        return "no kernel for both gradients"
    if not target.matrix_rate(problem.dtype):
        return f"Triton has no {problem.dtype} matrix instructions on {target.arch_name}"
    if min(problem.x_shape[1:] + problem.w_shape) < 1:
        return "a channel or pixel count is zero"
    if problem.cin_g == 1:
        return "depthwise convolution has algorithms of its own"
    if problem.dtype == "bf16x3":
        return "bf16x3 products are implicit_gemm's"
    if problem.element_bytes == 4 and target.backend == "cuda" and target.precision(problem.dtype) == "ieee":
        return "IEEE products of fp32 are multiply-adds, whose operands do not fit the registers"
    if problem.kh > MOST_TAPS:
        return f"{problem.kh} kernel rows, more than {MOST_TAPS}"
    return None


@dataclasses.dataclass(frozen=True)
class Work:
    """What a pass does, whatever its tiles: per group, the axes of its products, and the rows that it walks over.

    m: of all programs of a row block, lanes or, in wgrad, column taps and channels. k: of all steps, without wgrad's.
    rows: of what blocks are made of; classes of them, which share no source rows. phases: of columns, in grid.
    """

    m: int
    n: int
    k: float
    rows: int
    classes: int
    phases: int


@functools.lru_cache(4096)
def work_of(problem: ConvProblem, pass_: str) -> Work:
    stride_h, stride_w = problem.stride
    classes = kernels.row_step(pass_ == "dgrad", stride_h, problem.dilation[0])
    if pass_ == "dgrad":
        lanes = problem.batch * math.ceil(problem.w_in / stride_w)
        return Work(lanes, problem.cin_g, problem.kw * problem.cout_g / stride_w, problem.h_in, classes, stride_w)
    lanes = problem.batch * problem.w_out
    if pass_ == "fprop":
        return Work(lanes, problem.cout_g, problem.kw * problem.cin_g, problem.h_out, classes, 1)
    return Work(problem.kw * problem.cin_g, problem.cout_g, lanes, problem.h_out, classes, 1)


def axes(problem: ConvProblem, pass_: str) -> tuple[int, int, float]:
    """(M, N, K) of one group's products in a row of the result."""
    work = work_of(problem, pass_)
    return work.m, work.n, work.k


@functools.lru_cache(4096)
def met_counts(problem: ConvProblem, pass_: str, block_r: int) -> tuple[int, int, int]:
    """How many (row, kernel row, source row) meet in a block, and how many different kernel rows and source rows."""
    met = kernels.meetings(
        pass_ == "dgrad", block_r, problem.kh, problem.stride[0], problem.pad[0], problem.dilation[0]
    )
    return len(met), len({r for _, r, _ in met}), len({row for _, _, row in met})


def row_blocks(work: Work, block_r: int) -> int:
    """Blocks that cover the rows, those of every class alike."""
    return math.ceil(math.ceil(work.rows / work.classes) / block_r) * work.classes


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one step of a program's loop handles, in elements of tiles, and how many products."""

    source: int  # of the source that has rows: x, or dy in dgrad
    other: int  # weights, or dy in wgrad
    products: int
    sums: int  # accumulators in all


def _step(problem: ConvProblem, pass_: str, config: dict) -> _Step:
    return _step_of(problem, pass_, config["BLOCK_R"], config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"])


@functools.lru_cache(4096)
def _step_of(problem: ConvProblem, pass_: str, block_r: int, bm: int, bn: int, bk: int) -> _Step:
    products, taps, rows = met_counts(problem, pass_, block_r)
    if pass_ == "wgrad":
        return _Step(rows * bm * bk, block_r * bk * bn, products, problem.kh * bm * bn)
    return _Step(rows * bm * bk, taps * bk * bn, products, block_r * bm * bn)


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    work = work_of(problem, pass_)
    for block_r, bm, bn in itertools.product(
        heights(problem, pass_, work), (64, 128), column_tiles(work.n, problem, target)
    ):
        # A product takes columns of tensor memory, about 1.5 for each of N, and there are 512.
        if target.matrix_unit == "tcgen05" and met_counts(problem, pass_, block_r)[0] * bn * 3 // 2 > 512:
            continue
        # What passes through registers: elements that are loaded one by one, and the operands of all products but those
        # of warp groups, which have 16 columns at least.
        through = min(_runs(problem, pass_)) < 4 or not target.has_warpgroups or bn % 16
        for bk, warps in itertools.product((32, 64, 16), (4, 8)):
            if (bk > 16 and work.k <= bk // 2) or bk > (32 if through else 64) or bm < 16 * warps:
                continue
            if starved(bn, bk, warps, problem.element_bytes, target):
                continue
            tile = {"BLOCK_R": block_r, "BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": bk, "BLOCK_L": 0, "num_warps": warps}
            for stages in (3, 2):  # as many as there is room for
                if _shared_bytes(problem, pass_, tile | {"num_stages": stages}, target) <= target.shared_bytes:
                    for left in kept_left(problem, bm, bn, warps, problem.kh * len(parts(bn)), target):
                        yield [tile | {"BLOCK_L": left, "num_stages": stages}]
                    break


def heights(problem: ConvProblem, pass_: str, work: Work) -> list[int]:
    """The rows that a block may have: of dgrad, a multiple of the stride, so that it has whole phases."""
    step = problem.stride[0] if pass_ == "dgrad" else 1
    least = row_blocks(work, step) * step
    most = max(MOST_ROWS, step)
    return [r for r in range(step, most + 1, step) if row_blocks(work, r) * r <= MOST_PADDING * least or r == step]


def _stored_run(problem: ConvProblem, pass_: str) -> int:
    """Elements of one access of the result: in wgrad, of fp32 sums."""
    if pass_ == "wgrad":
        return math.gcd(problem.kw * problem.cin_g, 4)
    width = problem.cout_g if pass_ == "fprop" else problem.cin_g
    return math.gcd(width, 16 // problem.element_bytes) if problem.out_layout == "nhwc" else 4


@functools.lru_cache(4096)
def _runs(problem: ConvProblem, pass_: str) -> tuple[int, int]:
    """Elements of one access of the source and of the other operand."""
    wide = 16 // problem.element_bytes
    cin, cout = math.gcd(problem.cin_g, wide), math.gcd(problem.cout_g, wide)
    if problem.layout == "nhwc":
        return {"fprop": (cin, cin), "dgrad": (cout, cin), "wgrad": (cin, cout)}[pass_]
    return 1, 1


def _shared_bytes(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> int:
    step, (source, other) = _step(problem, pass_, tile), _runs(problem, pass_)
    operands = ((step.source, source), (step.other, other))
    pipeline = pipelined_bytes(operands, tile, problem.element_bytes, target)
    if target.matrix_unit == "tcgen05":  # and copies of operands
        return pipeline * (3 if problem.element_bytes == 2 else 4) // 2
    return pipeline


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    step, (source, other) = _step(problem, pass_, tile), _runs(problem, pass_)
    words = (step.source + step.other) * problem.element_bytes / 4
    shared = _shared_bytes(problem, pass_, tile, target)
    accesses = max(step.source / source + step.other / other, step.sums / _stored_run(problem, pass_))
    return Held(tile["num_warps"], shared, sums=step.sums, words=words, accesses=accesses)


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    if pass_ != "wgrad":
        return [{"SPLITS": 1}]
    work = work_of(problem, "wgrad")
    tiles = math.ceil(work.m / config["BLOCK_M"]) * math.ceil(work.n / config["BLOCK_N"]) * problem.groups
    tried = splits_to_try(problem, _blocks(problem, config), tiles, fit, target)
    return [{"SPLITS": splits} for splits in tried]


def _blocks(problem: ConvProblem, config: dict) -> int:
    """Blocks of pixels that wgrad reduces over."""
    work = work_of(problem, "wgrad")
    return math.ceil(work.k / config["BLOCK_K"]) * row_blocks(work, config["BLOCK_R"])


def _split(problem: ConvProblem, pass_: str, config: dict) -> tuple[int, int]:
    """(splits, blocks of each)."""
    return split(problem, _blocks(problem, config), config["SPLITS"]) if pass_ == "wgrad" else (1, 0)


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    splits, _ = _split(problem, pass_, config)
    work, step = work_of(problem, pass_), _step(problem, pass_, config)
    block_r, bm, bn, bk, left = (config[name] for name in BLOCKS)
    size, nhwc, threads = problem.element_bytes, problem.layout == "nhwc", target.warp_size * config["num_warps"]
    blocks = row_blocks(work, block_r)
    tiles = math.ceil(work.m / bm) * math.ceil(work.n / bn) * problem.groups * work.phases
    programs = tiles * (splits if pass_ == "wgrad" else blocks)
    steps = math.ceil(work.k / bk) * tiles * blocks  # of all programs
    partials = partial_bytes(problem, splits)
    source_width = problem.cout_g if pass_ == "dgrad" else problem.cin_g
    other_width = problem.cout_g if pass_ == "wgrad" else problem.cin_g

    def sectors(width):  # whole ones of 32 bytes
        return max(1.0, 32 / (width * size)) if nhwc else 1.0

    each = product(bm, bn, bk, config["num_warps"], size, target, bool(left))
    source, other = _runs(problem, pass_)
    # Products that add to one sum in a step wait for each other.
    chained = steps * max(0, step.products - (problem.kh if pass_ == "wgrad" else block_r))
    stored = programs * step.sums
    loads = (step.source / source + step.other / other) * INSTRUCTIONS_A_LOAD
    return Tiling(
        programs=programs,
        matrix_flops=steps * step.products * each.flops,
        l2_bytes=steps * (step.source * sectors(source_width) + step.other * sectors(other_width)) * size + partials,
        instructions=steps * (loads + threads * INSTRUCTIONS_A_STEP + step.products * each.instructions) + 4 * stored,
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=1 + (splits > 1),
        shared_bytes=steps * ((step.source * (1 + left) + step.other) * size + step.products * each.shared_bytes),
        trips=steps / max(1, programs),
        ahead=config["num_stages"] - 1 if nhwc else 0,
        waits=waits(each, programs, steps, chained, config["num_warps"], fit, problem.dtype, target),
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    work = work_of(problem, pass_)
    x, w, y, dx = (strides[name] for name in ("x", "w", "y", "dx"))
    dy = strides.get("dy")
    splits, chunk = _split(problem, pass_, config)
    blocks, options = split_config(config)
    options = registers_for_all(options, target)
    kernel = {"fprop": kernels.fprop_kernel, "dgrad": kernels.dgrad_kernel, "wgrad": kernels.wgrad_kernel}[pass_]
    blocks["BLOCK_L"] *= not launcher.interpreting(kernel)  # which knows no assembly
    blocks_of_rows = row_blocks(work, config["BLOCK_R"])
    scalars = {
        **convolution(problem),
        "row_blocks": blocks_of_rows,
        "INDEX_64": index_64(problem, strides, splits * problem.params),
        "PRECISION": target.precision(problem.dtype),
        "EMULATE_BF16": emulate_bf16(kernel, problem),
        **blocks,
    }  # fmt: skip
    tiles = math.ceil(work.m / config["BLOCK_M"]) * math.ceil(work.n / config["BLOCK_N"]) * problem.groups
    grid = (tiles * work.phases * (splits if pass_ == "wgrad" else blocks_of_rows),)
    if pass_ == "fprop":
        scalars |= named_strides("x", x) | named_strides("wgt", w) | named_strides("y", y)
        adjacent = problem.kw == 1 or w[3] == problem.cin_g
        scalars |= {
            **epilogue(problem),
            "WGT_ROW_DENSE": adjacent and (w[1] == 1 or problem.cin_g == 1),
            "X_PIXELS_LAST": pixels_last(x),
            "Y_PIXELS_LAST": pixels_last(y),
            "X_ALIGN": align(x),
            "Y_ALIGN": align(y),
            "WGT_ALIGN": align(w, (0, 2)),
        }
        return Forward(launcher.Launch(kernel, grid, scalars, **options), problem, y)
    if pass_ == "dgrad":
        common = math.gcd(problem.stride[1], problem.dilation[1])
        scalars |= named_strides("dy", dy) | named_strides("wgt", w) | named_strides("dx", dx)
        scalars |= {
            "w_phase": math.ceil(problem.w_in / problem.stride[1]),
            "COMMON_W": common,
            "INVERSE_W": pow(problem.dilation[1] // common, -1, problem.stride[1] // common),
            "DY_PIXELS_LAST": pixels_last(dy),
            "DX_PIXELS_LAST": pixels_last(dx),
            "DY_ALIGN": align(dy),
            "DX_ALIGN": align(dx),
            "WGT_ALIGN": align(w),
        }
        return Single(launcher.Launch(kernel, grid, scalars, **options), problem.x_shape, dx)
    scalars |= named_strides("dy", dy) | named_strides("x", x)
    scalars |= {
        "chunk": chunk,
        "DY_PIXELS_LAST": pixels_last(dy),
        "X_PIXELS_LAST": pixels_last(x),
        "DY_ALIGN": align(dy),
        "X_ALIGN": align(x),
    }
    result = FilterGradient(problem, splits, strides["dw"])
    return SplitK(launcher.Launch(kernel, grid, scalars | result.arguments, **options), result)
