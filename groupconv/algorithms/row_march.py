"""Narrow groups, several to a channel tile, by a march down the rows (kernels/row_march.py)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import triton

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels import row_march as kernels
from ..occupancy import Held, largest_splits, partial_bytes
from ..problem import ConvProblem
from .calls import (
    FilterGradient,
    Forward,
    align,
    call_of_backward,
    convolution,
    emulate_bf16,
    epilogue,
    index_64,
    named_strides,
    pixels_last,
    split_config,
)
from .gemm import kept_left

NAME = "row_march"
BLOCKS = {
    "BLOCK_P": (16, 512), "BLOCK_C": (16, 256), "BLOCK_S": (1, 16), "BLOCK_R": (1, 8), "BLOCK_A": (0, 2),
    "BLOCK_L": (0, 1), "BLOCK_W": (1, 8),
}  # fmt: skip
MOST_SEGMENTS = 16
# SEGMENTS: of the rows. LANE_BLOCKS: blocks of lanes that a program walks down, one after another; in fprop 1.
DIVISION = {"SEGMENTS": (1, MOST_SEGMENTS, 1), "LANE_BLOCKS": (1, 2**20)}
MOST_WIDTH = 64  # of a group; wider ones fill a matrix instruction alone
MOST_TAPS = 49
FEWEST_TAPS = 20  # of depthwise convolution: fewer multiply-adds take less than products of diagonals, modelled
MOST_COLUMNS = 256  # of a product of a warp group
ABREAST = (2, 4)  # columns of a lane, where it has several
SINGLE = {"RUN": 1, "BLOCK_A": 0}  # where no runs are: more is loaded, which would fill the registers if it went ahead
ENOUGH = 8  # programs for each multiprocessor: no more are made by cutting the rows


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if problem.dtype == "bf16x3":
        return "bf16x3 products are implicit_gemm's"
    if not target.matrix_rate(problem.dtype):
        return f"Triton has no {problem.dtype} matrix instructions on {target.arch_name}"
    if min(problem.x_shape[1:] + problem.w_shape) < 1:
        return "a channel or pixel count is zero"
    if problem.cin_g == problem.cout_g == 1 and problem.kh * problem.kw < FEWEST_TAPS:
        return f"{problem.kh * problem.kw} taps of depthwise convolution, fewer than {FEWEST_TAPS}"
    if max(problem.cin_g, problem.cout_g) > MOST_WIDTH:
        return f"a group width of {max(problem.cin_g, problem.cout_g)}, more than {MOST_WIDTH}"
    if problem.kh * problem.kw > MOST_TAPS:
        return f"{problem.kh * problem.kw} taps, more than {MOST_TAPS}"
    if pass_ != "fprop" and any(s > 1 and d > 1 for s, d in zip(problem.stride, problem.dilation, strict=True)):
        return "stride and dilation along one axis"
    return None


@dataclasses.dataclass(frozen=True)
class _Channels:
    """How a pass cuts its channels: result channels in `tiles` tiles of `step`, each reading `read` of the source."""

    step: int
    tiles: int
    read: int
    block_c: int  # the power of two that holds `step`,
    block_k: int  # and `read`
    align: int  # of the first channel read


def _channels(result: int, source: int, groups: int, block_c: int, align: int) -> _Channels:
    """The cut with the least padding, in tiles of at most block_c channels.

    result, source: group widths of what the pass writes and what it reads. align: channels in 16 bytes, or 1.
    """
    total = groups * result
    wide = math.gcd(align, total)  # the alignment that every tile of the result can have
    steps = {min(block_c, total)}
    steps |= {block_c // width * width for width in (result, math.lcm(result, wide)) if width <= block_c}
    found = []
    for step in steps:
        period = math.lcm(step, result)  # after which tiles begin inside a group, and inside 16 bytes, as they did
        period *= align // math.gcd(align, period // result * source)
        begins = range(0, min(total, period), step)
        first = [c // result * source // align * align for c in begins]
        past = [((min(c + step, total) - 1) // result + 1) * source for c in begins]
        read = max(b - a for a, b in zip(first, past, strict=True))
        read = min(math.ceil(read / align) * align, math.ceil(groups * source / align) * align)
        block_k = max(16, triton.next_power_of_2(read))
        tiles = math.ceil(total / step)
        waste = tiles * block_k * (1.0 if step % wide == 0 or tiles == 1 else 1.2)
        made = _Channels(step, tiles, read, max(16, triton.next_power_of_2(step)), block_k, align)
        found.append((waste, tiles, made))
    return min(found, key=lambda choice: choice[:2])[2]


@dataclasses.dataclass(frozen=True)
class _March:
    """What a pass walks over, and what each step of the walk does for a column of the result, or of its phases."""

    strips: int  # (image, class of rows)
    columns: int  # of each
    rows: int  # steps that complete rows of the result
    begin: int  # steps before this one meet no row of the source,
    end: int  # and those from this one on
    warm_up: int  # steps that a segment, but the first of backward, spends on its neighbour's rows
    shifts: int  # column taps, or in backward distinct column shifts,
    apart: int  # and the columns of the source between those that neighbouring columns meet,
    least: int  # from this one on, counted from a lane's own,
    spread: int  # so far apart
    rows_loaded: int  # of the source in a step
    products: int  # pairs of a source row and a result row (and phase) that meet in a step
    sums: int  # tiles of the result in fp32, carried from step to step
    stored: int  # tiles of the result that a step completes
    held: int  # tiles of x, in wgrad, of which
    fresh: int  # so many are new in each step

    def met(self, run: int) -> set[int]:
        """The columns of the source that a run of lanes meets."""
        return set(kernels.columns_met(run, self.shifts, self.apart, self.spread, self.least))

    def blocks(self, config: dict) -> int:
        """Of lanes, each of which has BLOCK_W columns."""
        return math.ceil(self.strips * math.ceil(self.columns / config["BLOCK_W"]) / config["BLOCK_P"])


@functools.lru_cache(4096)
def _march(problem: ConvProblem, pass_: str) -> _March:
    (kh, kw), (stride_h, stride_w), dil_h = (problem.kh, problem.kw), problem.stride, problem.dilation[0]
    top, _, left, _ = problem.pad
    if pass_ == "fprop":
        live = (kh - 1) // stride_h + 1
        rows = math.ceil(problem.h_out / dil_h)
        above = -((dil_h - 1) * stride_h - top) // dil_h  # rows of padding in the class that has fewest, rounded down
        end = math.ceil(math.ceil((problem.h_in + top) / dil_h) / stride_h)
        return _March(
            strips=problem.batch * dil_h, columns=problem.w_out, rows=rows,
            begin=min(max(0, above) // stride_h, live - 1), end=max(rows, end), warm_up=live - 1,
            shifts=kw, apart=stride_w, least=-left, spread=problem.dilation[1], rows_loaded=min(stride_h, kh),
            products=kh, sums=live, stored=1, held=0, fresh=0,
        )  # fmt: skip
    live = max(kh, stride_h)
    rows = ((problem.h_in - 1 + top) // dil_h + stride_h) // stride_h
    along = stride_w, left, problem.dilation[1], kw
    want_dx, want_dw = pass_ != "wgrad", pass_ != "dgrad"
    return _March(
        strips=problem.batch * dil_h, columns=math.ceil(problem.w_in / stride_w), rows=rows,
        begin=0, end=max(math.ceil(problem.h_out / dil_h), rows - math.ceil((live - stride_h) / stride_h)),
        warm_up=(kh - 1) // stride_h, shifts=kernels.shift_count(*along), apart=1, least=kernels.least_shift(*along),
        spread=problem.dilation[1] if stride_w == 1 else 1, rows_loaded=1,
        products=kh * stride_w, sums=want_dx * live * stride_w, stored=want_dx * stride_h * stride_w,
        held=want_dw * kh * stride_w, fresh=want_dw * min(kh, stride_h) * stride_w,
    )  # fmt: skip


@functools.lru_cache(4096)
def _cut(problem: ConvProblem, pass_: str, block_c: int) -> _Channels:
    align = 16 // problem.element_bytes if problem.layout == "nhwc" else 1
    widths = (problem.cout_g, problem.cin_g) if pass_ == "fprop" else (problem.cin_g, problem.cout_g)
    source = problem.c_in if pass_ == "fprop" else problem.c_out
    return _channels(*widths, problem.groups, block_c, math.gcd(align, source))


@functools.lru_cache(4096)
def _longest_run(problem: ConvProblem, pass_: str, own=None, source=None) -> int:
    """How many neighbours of a row an access takes, as the kernel has it, of the source; of x and dx as many times the
    stride.

    own, source: the strides of what the lanes are of (y, or x and dx) and of what they read (x, or dy); None if dense.
    """
    forward = pass_ == "fprop"
    step = 1 if forward else problem.stride[1]
    columns, read = (problem.w_out, problem.w_in) if forward else (problem.w_in, problem.w_out)
    contiguous = all(pixels_last(strides) and strides[3] == 1 for strides in (own, source) if strides)
    if "nhwc" in (problem.layout, problem.out_layout) or not contiguous or step > 2:
        return 1
    lanes = math.gcd(columns, *(own or ())[:3])
    return math.gcd(16 // problem.element_bytes, read, *(source or ())[:3], lanes // step if lanes % step == 0 else 1)


def _run(problem: ConvProblem, pass_: str, config: dict, own=None, source=None) -> int:
    """The run of a configuration: 1 but for lanes of one column, and in fprop of one tap."""
    alone = config["BLOCK_W"] == 1 and (config["BLOCK_S"] == 1 or pass_ != "fprop")
    return _longest_run(problem, pass_, own, source) if alone else 1


@dataclasses.dataclass(frozen=True)
class _Size:
    """What a program handles: elements of its tiles, and how many products a column."""

    products: int  # of a step that make wgrad's sums,
    joint: int  # and those that make fprop's or dgrad's, each of BLOCK_R tiles of the result,
    columns: int  # with so many columns together
    sources: int  # tiles of x in fprop, else of dy, of a step
    wide: int  # source channels of a tile, BLOCK_S taps side by side
    weight: int  # of a tile of dw, or of the weights for one tile of the result
    result: int  # of a tile of the result
    run: int  # neighbours of a row that an access takes, where they are contiguous
    staged: int  # of the tiles that products read, new in a step,
    loaded: int  # and of what is used of all that is loaded for them,
    accesses: int  # in so many accesses, if not of channels side by side


def _size(problem: ConvProblem, pass_: str, config: dict) -> _Size:
    names = ("BLOCK_P", "BLOCK_C", "BLOCK_S", "BLOCK_R", "BLOCK_W")
    return _size_of(problem, pass_, _run(problem, pass_, config), *(config[name] for name in names))


@functools.lru_cache(4096)
def _size_of(
    problem: ConvProblem, pass_: str, run: int, block_p: int, block_c: int, block_s: int, most: int, abreast: int
) -> _Size:
    march, made = _march(problem, pass_), _cut(problem, pass_, block_c)
    chunks, wide = math.ceil(march.shifts / block_s), block_s * made.block_k
    sources = march.rows_loaded * math.ceil(((abreast - 1) * march.apart + march.shifts) / block_s)
    result = block_p * block_c
    joint = tiles = march.products
    if most > 1:
        each = [kernels.beside(product, march.sums, most) for product in range(math.ceil(march.sums / most))]
        joint, tiles = march.rows_loaded * len(each), march.rows_loaded * sum(each)
    staged = sources * block_p * wide + abreast * march.fresh * result
    loaded = accesses = staged
    if run > 1:  # those of a tap are moved in registers from the runs that all of a row meet
        met, fresh = march.met(run), march.fresh * result
        lanes = march.rows_loaded * block_p // run * made.block_k
        loaded, accesses = lanes * len(met) + fresh, lanes * len(kernels.runs_met(met, 0, run)) + fresh // run
    return _Size(
        products=march.products * chunks, joint=joint * chunks, columns=tiles * chunks * block_c, sources=sources,
        wide=wide, weight=wide * block_c, result=result, run=run, staged=staged, loaded=loaded, accesses=accesses,
    )  # fmt: skip


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    """Rolling sums, those that a product makes side by side, and wgrad's; what is loaded, carried, and the weights.

    In shared memory the weights, and what the pipeline holds of the source.
    """
    march, size, stages = _march(problem, pass_), _size(problem, pass_, tile), tile["num_stages"]
    results = tile["BLOCK_W"] * size.result
    bytes_, beside = problem.element_bytes, tile["BLOCK_R"] if tile["BLOCK_R"] > 1 else 0
    weights = size.columns * size.wide if march.sums else 0
    nhwc = problem.layout == "nhwc"
    vector = math.gcd(_cut(problem, pass_, tile["BLOCK_C"]).step, 16 // bytes_) if nhwc else 1
    if target.backend == "hip":  # each wave holds all weights
        shared, in_registers = size.staged * max(1, stages - 1), weights * tile["num_warps"]
    else:
        shared = weights + size.staged * max(1, stages) + (march.held - march.fresh) * results
        shared += size.result * (march.held == 0)  # on its way from registers to memory
        in_registers = size.weight if march.sums else 0
    if target.matrix_unit == "tcgen05":
        shared = math.ceil(shared * 1.5)
    return Held(
        tile["num_warps"],
        shared * bytes_,
        sums=march.sums * results + beside * size.result + (march.held > 0) * size.products * size.weight,
        words=(size.loaded * (1 + tile["BLOCK_A"]) + march.held * results + in_registers) * bytes_ / 4,
        accesses=(size.accesses + march.stored * results / size.run) / (16 // bytes_ if nhwc else 1),
        vector=vector,
    )


def _shared_columns(problem: ConvProblem, pass_: str) -> bool:
    """Whether lanes may have several columns: neighbours meet the same columns of the source, in channels_last."""
    march = _march(problem, pass_)
    return problem.layout == "nhwc" and problem.dilation[1] == 1 and march.shifts > march.apart


def _by_multiply_adds(problem: ConvProblem, target: Target) -> bool:
    """Whether products are IEEE ones of fp32, for which NVIDIA has no matrix instruction."""
    return problem.element_bytes == 4 and target.backend == "cuda" and target.precision(problem.dtype) == "ieee"


def _possible(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> bool:
    """Whether products of a tile have enough rows for the warps, and their sums a place."""
    march, size, warps = _march(problem, pass_), _size(problem, pass_, tile), tile["num_warps"]
    if _by_multiply_adds(problem, target):  # which have whole operands in registers
        names = ("BLOCK_P", "BLOCK_C", "BLOCK_S", "BLOCK_W")
        smallest = (*(tile[name] for name in names), warps) == (32, 16, 1, 1, 4)
        return smallest and pass_ != "backward"
    # The rows of a product, 16 to a warp.
    rows = [tile["BLOCK_P"]] * (march.sums > 0) + [size.wide] * (march.held > 0)
    # Products take columns of tensor memory, about 1.5 for each of N, and there are 512.
    overflowing = target.matrix_unit == "tcgen05" and size.products * tile["BLOCK_C"] * 3 // 2 > 512
    return min(rows) >= 16 * warps and not overflowing


def _beside(problem: ConvProblem, pass_: str, block_c: int, warps: int, target: Target) -> int:
    """Tiles of the result that one product makes.

    A product of a warp group (four warps) runs on while registers are moved, unless they are its own sums: ptxas then
    waits after each. So sums are carried along apart from it, and it makes all tiles that a row of the source meets.
    """
    if target.matrix_unit != "wgmma" or warps < 4 or pass_ == "wgrad" or _by_multiply_adds(problem, target):
        return 1
    return min(triton.next_power_of_2(_march(problem, pass_).sums), BLOCKS["BLOCK_R"][1], MOST_COLUMNS // block_c)


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    widest = triton.next_power_of_2(_march(problem, pass_).shifts)
    cuda = target.backend == "cuda"
    for block_c, block_p in itertools.product((16, 32, 64, 128), (16, 32, 64, 128)):
        made = _cut(problem, pass_, block_c)
        if made.block_c != block_c:  # a narrower tile holds as much
            continue
        spans = [1] if target.matrix_unit == "wgmma" else sorted({1, widest})  # no others won on an H200, 2026-11-26
        if pass_ in ("wgrad", "backward") and not _by_multiply_adds(problem, target):
            spans = sorted({widest, max(widest, 64 // made.block_k)})  # 64 rows for four warps
        # (BLOCK_S, BLOCK_W, pairs of num_stages and BLOCK_A). What goes ahead by itself shares columns in L1.
        shapes, ways = [], [(3, 0), (2, 0), *([(1, 1)] if cuda else [])]
        if _longest_run(problem, pass_) > 1:
            ways = [(1, 1), (1, 2)] if cuda else [(2, 0)]
            spans = spans if pass_ in ("wgrad", "backward") else [1]
        if block_p > 16:
            shapes = [(span, 1, ways) for span in spans]
        if block_p < 128 and block_c < 64 and _shared_columns(problem, pass_):
            stages = 4 if cuda and block_p == 16 else 3  # of small tiles more are under way
            shapes += [(1, abreast, [(stages, 0)]) for abreast in ABREAST]
        # Of matrix units that read registers, fewer warps read less: each of them reads all of the right operand.
        numbers = (4, 8, 2, 1) if cuda else (4, 8)
        choices = ((shape, warps, way) for shape in shapes for warps in numbers for way in shape[2])
        for (span, abreast, _), warps, (stages, ahead) in choices:  # the first of equals is taken
            tile = {
                "BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_S": span,
                "BLOCK_R": _beside(problem, pass_, block_c, warps, target), "BLOCK_A": ahead, "BLOCK_L": 0,
                "BLOCK_W": abreast, "num_warps": warps, "num_stages": stages,
            }  # fmt: skip
            if _possible(problem, pass_, tile, target):
                # What makes all tiles of a result together reads its left operand once.
                rows = span * made.block_k if pass_ in ("wgrad", "backward") else 0
                for left in kept_left(problem, rows, block_c, warps, _march(problem, pass_).products, target):
                    yield [tile | {"BLOCK_L": left}]


def seldom(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> bool:
    """Whether no tile like this won on an H200, 2026-11-27."""
    if not target.has_warpgroups:
        return False
    warps, block_p = tile["num_warps"], tile["BLOCK_P"]
    return tile["BLOCK_C"] == 128 or (warps == 8 and tile["BLOCK_A"] > 0) or (warps == 1 and block_p == 128)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """How programs share a pass: `groups` times `blocks` blocks of lanes, and `segments` of `steps` rows."""

    groups: int
    blocks: int
    segments: int
    steps: int


def _grid(problem: ConvProblem, pass_: str, config: dict) -> _Grid:
    """The grid of a configuration; of programs that leave partial sums, no more than have room beside the operands."""
    march = _march(problem, pass_)
    blocks = march.blocks(config)
    each = 1 if pass_ == "fprop" else min(config["LANE_BLOCKS"], max(1, blocks))
    steps = math.ceil(march.rows / min(config["SEGMENTS"], march.rows))
    if march.held:
        most = largest_splits(problem, pass_)
        if math.ceil(blocks / each) * math.ceil(march.rows / steps) > most:
            steps, each = march.rows, max(each, math.ceil(blocks / most))
    return _Grid(math.ceil(blocks / each), each, math.ceil(march.rows / steps), steps)


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    march = _march(problem, pass_)
    blocks = march.blocks(config)
    tiles = _cut(problem, pass_, config["BLOCK_C"]).tiles
    places = target.multiprocessors * fit
    affordable = largest_splits(problem, pass_) if march.held else math.inf
    # Segments where there are few programs, and blocks of lanes where there are many.
    programs = max(1, blocks * tiles)
    most = min(march.rows, MOST_SEGMENTS, math.ceil(ENOUGH * target.multiprocessors / programs))
    found = [(segments, 1) for segments in range(1, most + 1) if segments * blocks <= affordable]
    found += [(1, 2**n) for n in range(blocks.bit_length()) if march.held and math.ceil(blocks / 2**n) <= affordable]
    if not found:
        found = [(1, 2 ** max(0, blocks - 1).bit_length())]

    def apart(division):  # from one program for each place
        segments, each = division
        return abs(math.log2(max(1, math.ceil(blocks / each)) * tiles * segments / places))

    distinct = dict.fromkeys(sorted(found, key=apart))
    return [{"SEGMENTS": segments, "LANE_BLOCKS": each} for segments, each in distinct]


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    grid = _grid(problem, pass_, config)
    march, made = _march(problem, pass_), _cut(problem, pass_, config["BLOCK_C"])
    size, bytes_, nhwc = _size(problem, pass_, config), problem.element_bytes, problem.layout == "nhwc"
    block_p, block_c, abreast = config["BLOCK_P"], config["BLOCK_C"], config["BLOCK_W"]
    results = abreast * size.result
    threads = target.warp_size * config["num_warps"]
    programs = made.tiles * grid.groups * grid.segments
    # Steps that meet rows of the source, of all programs.
    walked = min(march.end, march.rows + march.warm_up) - march.begin + (grid.segments - 1) * march.warm_up
    walked *= made.tiles * grid.groups * grid.blocks

    def moved(channels):  # bytes of a lane's channels in whole sectors
        return math.ceil(channels * bytes_ / 32) * 32 if nhwc else channels * bytes_

    # Pipelined loads bypass L1, and share only what lies side by side in one instruction; those of NCHW, if they are
    # wide enough for the pipeline, mostly share in L1, as those do that go ahead.
    ahead, span = config["BLOCK_A"], config["BLOCK_S"]
    pipelined = nhwc and not ahead
    if pipelined:
        pixels = max(1.0, 32 * 16 / (size.wide * bytes_))
        reach = (abreast - 1) * march.apart + march.shifts
        again = min(reach, math.ceil(reach / span) * (1 + (span - 1) / pixels))
    else:
        again = abreast + (march.shifts - 1) * problem.dilation[1] / block_p
    read = march.rows_loaded * again * moved(made.read) + abreast * march.fresh * moved(made.step)
    splits = grid.groups * grid.segments if march.held else 1
    partials = partial_bytes(problem, splits)

    # Counted in the compiled loops of sm_90: a load or store with its address and mask takes a thread 8 instructions,
    # or 5 where taps share them, a product of 16 in K that warps share 5 of each, and sums and results are moved or
    # converted once.
    access = (8 if pipelined else 5) * bytes_ / 16 if nhwc else 5
    moves = size.staged / 2 if size.run > 1 else 0  # between registers, that make tiles of taps
    rotated = march.sums + march.stored + (march.held if pipelined else 0)
    instructions = 40 * threads + rotated * results
    instructions += access * (size.accesses + march.stored * results / size.run) + moves
    flops = shared = 0.0
    for m, n, k, right, count in (  # right: columns of right operands that differ
        (block_p, abreast * size.columns, size.wide, size.columns, abreast * size.joint * (march.sums > 0)),
        (
            size.wide, abreast * size.products * block_c, block_p, abreast * march.held * block_c,
            abreast * size.products * (march.held > 0),
        ),
    ):  # fmt: skip
        if count:
            warpgroups = target.has_warpgroups and m >= 64 and config["num_warps"] >= 4
            flops += 2 * m * n * k * (2 if target.has_warpgroups and not warpgroups else 1)
            if warpgroups:  # read the left operand once a product or tile, and the right one for each 64 rows
                shared += m * k * (size.sources if config["BLOCK_L"] else count) + m / 64 * k * n
                instructions += 5 * m * k / 8 * count
            else:  # a warp reads its rows of the left operand once, and all of the right one
                reads = m * k * size.sources + k * right * config["num_warps"]
                shared += reads
                instructions += (reads + m * k * n / 8) / 8
    shared += size.staged + 2 * march.stored * results + (march.held - march.fresh) * results
    weights = max(size.columns * size.wide * (march.sums > 0), size.products * size.weight * (march.held > 0))
    once = weights * 6 + 100 * threads
    return Tiling(
        programs=programs,
        matrix_flops=walked * flops,
        l2_bytes=walked * block_p * read + partials,
        instructions=walked * instructions + programs * once,
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=1 + (splits > 1),
        shared_bytes=walked * shared * bytes_,
        trips=walked / max(1, programs),
        ahead=config["num_stages"] - 1 if not ahead and (nhwc or size.run > 1) else ahead,
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    march, made = _march(problem, pass_), _cut(problem, pass_, config["BLOCK_C"])
    grid = _grid(problem, pass_, config)
    kernel = kernels.fprop_kernel if pass_ == "fprop" else kernels.backward_kernel
    blocks, options = split_config(config)
    left = blocks.pop("BLOCK_L") * (not launcher.interpreting(kernel))  # which knows no assembly
    x, w, y, dx, dw, dy = (strides.get(name) for name in ("x", "w", "y", "dx", "dw", "dy"))
    splits = grid.groups * grid.segments
    scalars = {
        **convolution(problem),
        "segments": grid.segments, "steps": grid.steps, "end": march.end,
        **named_strides("x", x), **named_strides("wgt", w),
        "X_PIXELS_LAST": pixels_last(x), "X_ALIGN": align(x), "C_ALIGN": made.align,
        "INDEX_64": index_64(problem, strides, splits * problem.params),
        "PRECISION": target.precision(problem.dtype),
        "EMULATE_BF16": emulate_bf16(kernel, problem),
        "STEP_C": made.step, "READ_C": made.read, "BLOCK_K": made.block_k, **blocks,
    }  # fmt: skip
    programs = (made.tiles * splits,)
    own, source = {
        "fprop": ([y], x), "dgrad": ([dx], dy), "wgrad": ([x], dy), "backward": ([x, dx], dy),
    }[pass_]  # fmt: skip
    scalars["RUN"] = run = min(_run(problem, pass_, config, each, source) for each in own)
    if run == 1 < _run(problem, pass_, config):
        scalars |= SINGLE
    unaligned = SINGLE if run > 1 else {}
    if pass_ == "fprop":
        scalars |= {
            "begin": march.begin, **epilogue(problem), **named_strides("y", y),
            "Y_PIXELS_LAST": pixels_last(y), "Y_ALIGN": align(y),
        }  # fmt: skip
        return Forward(launcher.Launch(kernel, programs, scalars, unaligned, (0,), **options), problem, y)
    result = FilterGradient(problem, splits, dw if march.held else None)
    scalars |= {
        "blocks": grid.blocks, "BLOCK_L": left, **result.arguments,
        **named_strides("dy", dy), **named_strides("dx", dx),
        "DY_PIXELS_LAST": pixels_last(dy), "DX_PIXELS_LAST": pixels_last(dx),
        "DY_ALIGN": align(dy), "DX_ALIGN": align(dx),
        "WANT_DX": pass_ != "wgrad", "WANT_DW": pass_ != "dgrad",
    }  # fmt: skip
    launch = launcher.Launch(kernel, programs, scalars, unaligned, (0, 1), **options)
    return call_of_backward(pass_, launch, problem, result, dx)
