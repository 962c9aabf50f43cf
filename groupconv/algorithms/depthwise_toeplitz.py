"""Depthwise convolution as products with banded Toeplitz matrices (kernels/depthwise_toeplitz.py)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels import depthwise_toeplitz as kernels
from ..occupancy import Held, largest_splits, most_splits, partial_bytes, shares
from ..problem import ConvProblem
from .calls import (
    NO_EPILOGUE,
    FilterGradient,
    Forward,
    Single,
    SplitK,
    align,
    emulate_bf16,
    epilogue,
    index_64,
    known,
    named_strides,
    pixels_last,
    split_config,
)

NAME = "depthwise_toeplitz"
BLOCKS = {
    "BLOCK_C": (1, 32), "BLOCK_M": (16, 256), "BLOCK_W": (8, 64), "BLOCK_H": (4, 1024), "BLOCK_T": (1, 32),
    "BLOCK_U": (1, 8, 1), "BLOCK_A": (0, 2),
}  # fmt: skip
# BLOCK_H: the most output rows of a segment, about. BLOCK_T: wgrad's filter rows of a program, and BLOCK_U its steps
# that share a row's change of layout.
MOST_SPLITS = 4096
DIVISION = {"SPLITS": (1, MOST_SPLITS, 1)}  # of wgrad's blocks of lanes

LEAST_TAPS = 10
BLOCK_K = 16  # input columns of a product
MOST_UNROLL = 8
MOST_PRODUCTS, MOST_LOADS = 56, 8  # in the body of wgrad's loop
MOST_WAVES = 4  # of wgrad's programs


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How a pass cuts its maps into lanes: blocks of columns, classes and segments of rows; `count` in all.

    left, chunks: a lane's window of input columns, `chunks` times BLOCK_K, begins `left` columns before the block's
    own first. rows: steps of a segment that complete output rows. The march goes from step `first` to `last`, and
    `drain` more steps have no input rows left.
    """

    col_blocks: int
    left: int
    chunks: int
    segments: int
    rows: int
    first: int
    last: int
    drain: int
    count: int


def columns(problem: ConvProblem, pass_: str, block_w: int) -> tuple[int, int, int]:
    """(blocks of columns, columns by which a lane's window begins before its block's own first, width of a window)."""
    w_in, w_out = (problem.w_out, problem.w_in) if pass_ == "dgrad" else (problem.w_in, problem.w_out)
    stride, pad = problem.stride[1], problem.pad[2]
    col_blocks = math.ceil(w_out / block_w)
    reach = (problem.kw - 1) * problem.dilation[1]
    if col_blocks == 1:
        return 1, 0, w_in
    if pass_ == "dgrad":
        left = -((pad - reach) // stride)
        return col_blocks, left, (block_w - 1 + pad) // stride + left + 1
    return col_blocks, pad, (block_w - 1) * stride + reach + 1


def lanes(problem: ConvProblem, pass_: str, block_w: int, block_h: int, taps: int) -> Lanes:
    transposed = pass_ == "dgrad"
    h_in, h_out = (problem.h_out, problem.h_in) if transposed else (problem.h_in, problem.h_out)
    stride_h, dil_h, top = problem.stride[0], problem.dilation[0], problem.pad[0]
    col_blocks, left, window = columns(problem, pass_, block_w)
    chunks = math.ceil(window / BLOCK_K)
    # A window that begins a little earlier, where wider loads begin, if it takes no more chunks.
    for run in (8, 4, 2):
        earlier = math.ceil(left / run) * run
        if col_blocks > 1 and window + earlier - left <= chunks * BLOCK_K:
            left = earlier
            break

    warm = (taps - 1) // stride_h
    step_in, step_out = (1, stride_h) if transposed else (stride_h, 1)
    steps = math.ceil((h_out + top % step_out) / (step_out * dil_h))
    rows = math.ceil(steps / max(1, round(steps / block_h)))
    segments = math.ceil(steps / rows)
    first, drain = 0, 0
    if segments == 1:
        # Input rows of row class 0: start, start + dil_h, ...; of the last class dil_h - 1 rows below.
        start = (-(top % step_out) + top) // stride_h - warm * dil_h if transposed else -top
        first = max(0, min(warm, -start // (step_in * dil_h)))
        needed = max(0, math.ceil((h_in - start) / (step_in * dil_h)))
        drain = max(0, min(warm, rows + warm - max(needed, first)))
    return Lanes(
        col_blocks, left, chunks, segments, rows, first, rows + warm - drain, drain,
        problem.batch * dil_h * segments * col_blocks,
    )  # fmt: skip


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if problem.cin_g != 1:
        return "it serves depthwise convolutions only"
    if problem.dtype == "bf16x3":
        return "bf16x3 products are implicit_gemm's"
    if problem.dtype == "fp32":
        return "matrix units round fp32 to TF32"
    if not target.matrix_rate(problem.dtype) or (problem.dtype == "tf32" and target.precision("tf32") != "tf32"):
        return f"Triton has no {problem.dtype} matrix instructions on {target.arch_name}"
    if pass_ == "backward":
        return "no kernel for both gradients"
    if problem.kh * problem.kw < LEAST_TAPS:
        return "plain products cost less than matrix units for so few taps"
    if pass_ == "dgrad" and problem.cout_g > 1:
        return "it has no sum over a channel multiplier"
    if problem.stride[0] > 1 and problem.dilation[0] > 1:
        return "rows with a stride and a dilation"
    if min(problem.x_shape[1:] + problem.w_shape + problem.y_shape[1:]) < 1:
        return "a channel or pixel count is zero"
    if pass_ == "dgrad" and problem.stride[1] not in (1, 2, 4, 8):
        return "dgrad takes column strides of 1, 2, 4 and 8"
    return None


@dataclasses.dataclass(frozen=True)
class Launched:
    """What a configuration makes of a pass: its lanes, how many rows a step reads and writes, programs and splits."""

    cut: Lanes
    taps: int  # filter rows of a program
    read: int  # rows of x, or of dgrad's dy, that a step reads,
    written: int  # and rows that it writes, or of wgrad's dy, reads
    warm: int
    c_blocks: int
    m_blocks: int
    t_blocks: int


def _launched(problem: ConvProblem, pass_: str, config: dict) -> Launched:
    return launched(problem, pass_, *(config[f"BLOCK_{axis}"] for axis in "CMWHT"))


@functools.lru_cache(4096)
def launched(
    problem: ConvProblem, pass_: str, block_c: int, block_m: int, block_w: int, block_h: int, block_t: int
) -> Launched:
    taps = min(problem.kh, block_t) if pass_ == "wgrad" else problem.kh
    cut = lanes(problem, pass_, block_w, block_h, taps)
    stride = problem.stride[0]
    return Launched(
        cut, taps, *((1, stride) if pass_ == "dgrad" else (stride, 1)), (taps - 1) // stride,
        math.ceil(problem.c_out / block_c), math.ceil(cut.count / block_m),
        math.ceil(problem.kh / taps),
    )  # fmt: skip


def _unrolls(problem: ConvProblem, tile: dict) -> list[int]:
    """What wgrad's BLOCK_U may be, that with the least work first."""
    made = _launched(problem, "wgrad", tile)
    steps, taps = made.cut.last - made.cut.first, made.taps
    most = min(MOST_UNROLL, MOST_PRODUCTS // (taps * made.cut.chunks), MOST_LOADS // (made.read * made.cut.chunks))
    return sorted(range(1, max(1, most) + 1), key=lambda n: math.ceil(steps / n) * (2 * n + made.warm))


def wide_accesses(problem: ConvProblem) -> bool:
    """Whether a thread's loads are at least 8 bytes."""
    if problem.layout == "nhwc":
        return problem.c_out * problem.element_bytes % 16 == 0 and problem.cout_g == 1
    return problem.w_in * problem.element_bytes % 8 == 0 and problem.w_out * problem.element_bytes % 8 == 0


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    """In registers sums and the rows of a step; in shared memory the Toeplitz matrices, and those rows on their way
    into the layout of an operand.
    """
    made = _launched(problem, pass_, tile)
    words, window = problem.element_bytes / 4, made.cut.chunks * BLOCK_K
    columns, block_w = tile["BLOCK_C"] * tile["BLOCK_M"], tile["BLOCK_W"]
    matrices = made.taps * window * block_w  # elements of a channel's
    if pass_ == "wgrad":
        sums, y_rows = matrices * tile["BLOCK_C"], made.warm + tile["BLOCK_U"]
        shared = (made.read * window + block_w) * tile["BLOCK_M"]
        in_registers = 0
    else:
        sums, y_rows = made.written * (made.warm + 1) * columns * block_w, 0
        shared, in_registers = matrices + BLOCK_K * tile["BLOCK_M"], 0
    if target.backend == "hip":  # matrices stay in registers, and one row after the other goes through
        in_registers = 0 if pass_ == "wgrad" else matrices * tile["BLOCK_C"]
        shared = max(BLOCK_K, block_w) * tile["BLOCK_M"]
    loaded = made.read * window * columns * (1 + tile["BLOCK_A"])
    return Held(
        tile["num_warps"],
        tile["BLOCK_C"] * shared * problem.element_bytes,
        sums=sums,
        words=words * (loaded + y_rows * columns * block_w + in_registers),
        accesses=columns * BLOCK_K / (16 // problem.element_bytes if wide_accesses(problem) else 1),
    )


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    stride = problem.stride[0]
    steps = math.ceil((problem.h_in if pass_ == "dgrad" else problem.h_out) / stride)
    heights = [1024] + [height for height in (32, 16, 8) if height < steps]
    shapes = [(16, 8), (16, 16), (8, 8), (4, 4)]
    if problem.layout == "nchw" and pass_ != "wgrad":
        shapes.append((1, 4))
    widths = (16,) if target.backend == "hip" else (8, 16)  # AMD has no 8 columns wide matrix instruction
    for block_c, warps in shapes:
        for block_m, block_w in itertools.product((32, 16, 64) if block_c > 1 else (64, 128), widths):
            for block_t, height in itertools.product((4, 8, 16) if pass_ == "wgrad" else (16,), heights):
                tile = {
                    "BLOCK_C": block_c, "BLOCK_M": block_m, "BLOCK_W": block_w, "BLOCK_H": height,
                    "BLOCK_T": block_t, "BLOCK_U": 1, "BLOCK_A": 0,
                    "num_warps": warps, "num_stages": 1,
                }  # fmt: skip
                if pass_ == "wgrad":
                    yield [tile | {"BLOCK_U": unroll} for unroll in _unrolls(problem, tile)]
                else:
                    yield [tile | {"BLOCK_A": ahead} for ahead in (1, 0)]


def seldom(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> bool:
    """Whether no tile like this won on an H200, 2026-11-27."""
    return target.has_warpgroups and tile["num_warps"] == 16


def split_of(problem: ConvProblem, config: dict, made: Launched) -> tuple[int, int]:
    """(splits of wgrad, blocks of lanes of each); fewer where partial sums would take more memory than the operands."""
    return shares(made.m_blocks, min(config["SPLITS"], largest_splits(problem, "wgrad")))


def divisions_of(problem: ConvProblem, pass_: str, made: Launched, target: Target, fit: int) -> list[dict[str, int]]:
    """`divisions` of algorithms whose programs go through blocks of lanes."""
    if pass_ != "wgrad":
        return [{"SPLITS": 1}]
    tiles, slots = made.c_blocks * made.t_blocks, target.multiprocessors * fit
    most = min(math.ceil(MOST_WAVES * slots / tiles), most_splits(problem, pass_), MOST_SPLITS)
    return [{"SPLITS": splits} for splits in fewest_rounds(made.m_blocks, tiles, slots, most)]


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    return divisions_of(problem, pass_, _launched(problem, pass_, config), target, fit)


def fewest_rounds(blocks: int, tiles: int, slots: int, most: int, prologue: int = 0) -> list[int]:
    """Numbers of splits, of up to `most`, of so many blocks of each tile that end soonest: the best, and a few more.

    slots: programs that the machine runs at once. prologue: of a program, in blocks.
    """
    most = max(1, min(most, blocks))

    def rounds(splits):
        return math.ceil(splits * tiles / slots) * (math.ceil(blocks / splits) + prologue)

    # Every number of blocks a split that there can be, or nearly.
    few = range(1, math.isqrt(blocks) + 1)
    counts = {min(most, shares(blocks, n)[0]) for n in (*few, *(math.ceil(blocks / n) for n in few))}
    return sorted(sorted(counts), key=rounds)[:4] or [1]


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    made = _launched(problem, pass_, config)
    cut, size = made.cut, problem.element_bytes
    block_c, block_m, block_w = (config[f"BLOCK_{axis}"] for axis in "CMW")
    programs, partials, splits = made.m_blocks * made.c_blocks, 0, 1
    if pass_ == "wgrad":
        splits, blocks = split_of(problem, config, made)
        programs = splits * made.c_blocks * made.t_blocks
        partials = partial_bytes(problem, splits)
        moved = programs * blocks
    else:
        moved = programs
    height, width, out_width = problem.h_in, problem.w_in, problem.w_out
    if pass_ == "dgrad":
        height, width, out_width = problem.h_out, problem.w_out, problem.w_in
    unroll = config["BLOCK_U"]
    march = math.ceil((cut.last - cut.first) / unroll) * unroll
    steps = moved * block_c * block_m * march  # of one channel's lane
    window = cut.chunks * BLOCK_K
    x, y = steps * made.read * window, steps * made.written * block_w
    products = steps * made.taps * window * block_w
    matrices = programs * block_c * made.taps * window * block_w  # elements of them, built or summed
    # Of L2 is asked what lies on the map, and once what the windows of neighbouring lanes share.
    neighbours = min(cut.col_blocks, block_m)
    fresh = block_w // problem.stride[1] if pass_ == "dgrad" else block_w * problem.stride[1]
    columns = min(width, window + (neighbours - 1) * fresh) / neighbours
    asked = min(march * made.read, math.ceil(height / problem.dilation[0])) * columns
    if pass_ == "wgrad":
        asked += cut.rows * out_width / cut.col_blocks
    waste = max(1.0, 32 / (block_c * size)) if problem.layout == "nhwc" else 1 + 32 / (columns * neighbours * size)
    l2 = cut.count * problem.c_out * made.t_blocks * asked * size * waste + matrices * size + partials
    each = 4 if wide_accesses(problem) else 8
    if pass_ == "wgrad":
        turns = (unroll + made.warm) / unroll
        instructions = (each - 1) * x + (2.5 * turns + each / 4) * y
        shared = (x + turns * y) * 2 * size
    else:
        instructions = each * (x + y)
        shared = (x + y) * 2 * size + products / block_m * size
    half_rate = target.has_warpgroups
    return Tiling(
        programs=programs,
        matrix_flops=2.0 * products * (2 if half_rate else 1),
        l2_bytes=l2,
        instructions=instructions + products / 64 + 10 * matrices,
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=1 + (splits > 1),
        shared_bytes=shared,
        trips=moved / max(1, programs) * march / unroll,
        ahead=config["BLOCK_A"],
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    top, _, pad, _ = problem.pad
    tiles, options = split_config(config)
    transposed, wgrad = pass_ == "dgrad", pass_ == "wgrad"
    for name in ("BLOCK_H", "BLOCK_T", "BLOCK_U", *(["BLOCK_A"] if wgrad else [])):
        del tiles[name]
    made = _launched(problem, pass_, config)
    cut = made.cut
    step = config["BLOCK_W"] // problem.stride[1] if transposed else config["BLOCK_W"] * problem.stride[1]

    def operand(name, width, *columns):
        memory = strides[name]
        last = pixels_last(memory)
        return last, math.gcd(align(memory, (0, 1, 2)), *columns) if last else align(memory), math.gcd(width, 16)

    kernel = kernels.wgrad_kernel if wgrad else kernels.march_kernel
    maps = [problem.h_in, problem.w_in], [problem.h_out, problem.w_out]
    (h_in, w_in), (h_out, w_out) = reversed(maps) if transposed else maps
    source, result = {"fprop": ("x", "y"), "dgrad": ("dy", "dx"), "wgrad": ("x", "dy")}[pass_]
    scalars = {
        "batch": problem.batch, "h_in": h_in, "w_in": w_in, "h_out": h_out, "w_out": w_out,
        "segments": cut.segments, "col_blocks": cut.col_blocks, "rows": cut.rows,
        "CHANNELS": known(problem, problem.c_out), "MULTIPLIER": problem.cout_g, "KH": problem.kh, "KW": problem.kw,
        "CONV_STRIDE_H": problem.stride[0], "CONV_STRIDE_W": problem.stride[1],
        "PAD_H": top, "PAD_W": pad, "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
        "LEFT": cut.left, "CHUNKS": cut.chunks,
        "INDEX_64": index_64(problem, strides),
        "PRECISION": target.precision(problem.dtype),
        "EMULATE_BF16": emulate_bf16(kernel, problem),
        **tiles, "BLOCK_K": BLOCK_K,
    }  # fmt: skip
    read, written = operand(source, w_in, step, cut.left), operand(result, w_out, config["BLOCK_W"])
    for name, values in (("x", read), ("dy" if wgrad else "y", written)):
        arguments = (f"{name.upper()}_{fact}" for fact in ("PIXELS_LAST", "ALIGN", "RUN"))
        scalars |= dict(zip(arguments, values, strict=True))
    if wgrad:
        splits, blocks = split_of(problem, config, made)
        gradient = FilterGradient(problem, splits, strides["dw"])
        scalars |= gradient.depthwise_arguments()
        scalars |= named_strides("dy", strides["dy"]) | named_strides("x", strides["x"])
        scalars |= {"blocks": blocks, "TAPS": made.taps, "UNROLL": config["BLOCK_U"]}
        scalars["INDEX_64"] = index_64(problem, strides, splits * problem.params)
        grid = (splits * made.c_blocks * made.t_blocks,)
        return SplitK(launcher.Launch(kernel, grid, scalars, **options), gradient)
    scalars |= {"first": cut.first, "last": cut.last, "DRAIN": cut.drain, "TRANSPOSED": transposed}
    scalars |= NO_EPILOGUE if transposed else epilogue(problem)
    scalars |= named_strides("x", strides[source]) | named_strides("wgt", strides["w"])
    scalars |= named_strides("y", strides[result])
    launch = launcher.Launch(kernel, (made.m_blocks * made.c_blocks,), scalars, **options)
    if transposed:
        return Single(launch, problem.x_shape, strides["dx"], lambda dy, w, dx: launch(dy, w, None, None, None, dx))
    return Forward(launch, problem, strides["y"])
