"""Depthwise convolution of channels_last maps on matrix units, by fragments (kernels/depthwise_mma.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels.reduce import sum_splits_kernel
from ..occupancy import Held, partial_bytes
from ..problem import ConvProblem
from .calls import (
    NO_EPILOGUE,
    FilterGradient,
    Forward,
    Single,
    SplitK,
    epilogue,
    index_64,
    known,
    named_strides,
    split_config,
)
from .depthwise_toeplitz import MOST_SPLITS, Launched, columns, divisions_of, launched, split_of

try:
    from ..kernels import depthwise_mma as kernels
except ImportError as error:  # Triton calls Gluon experimental
    NO_GLUON: str | None = f"this Triton's Gluon is another ({error})"
else:
    NO_GLUON = None

NAME = "depthwise_mma"
INTERPRETABLE = False
BLOCKS = {
    "BLOCK_V": (2, 8), "BLOCK_C": (8, 64), "BLOCK_M": (16, 64), "BLOCK_H": (4, 1024), "BLOCK_T": (1, 16),
    "BLOCK_U": (1, 4, 1),
}  # fmt: skip
# BLOCK_V: channels of a thread. BLOCK_H: the most output rows of a segment, about. BLOCK_T: wgrad's filter rows of a
# program, and BLOCK_U its steps of a turn of the loop.
DIVISION = {"SPLITS": (1, MOST_SPLITS, 1)}  # of wgrad's blocks of lanes

BLOCK_W = 8  # columns of a product
LEAST_ARCH = 80
LEAST_CHANNELS, STEP_CHANNELS = 8, 4  # of a pixel; copies of fewer at once have more addresses than there are registers
MOST_WINDOW = 32  # input columns of a product
FIXED = 30  # instructions of a thread and step,
BUILT, SUMMED = 10, 10  # and for each element of the matrices, by counts of compiled code


def lacking(problem: ConvProblem, pass_: str, target: Target, layout: str = "nhwc") -> str | None:
    """Why no kernel in Gluon can serve maps that lie so, or None."""
    if problem.dtype not in ("fp16", "bf16"):
        return "it multiplies fp16 and bf16"
    if problem.layout != layout or problem.out_layout != layout:
        return f"it serves {'channels_last' if layout == 'nhwc' else 'contiguous'} maps"
    if target.backend != "cuda" or int(target.arch) < LEAST_ARCH:
        return f"{target.arch_name} has no mma.sync of bf16, or no asynchronous copies"
    if NO_GLUON is not None:
        return NO_GLUON
    if launcher.interpreting(sum_splits_kernel):
        return "Triton's interpreter has no Gluon"
    if pass_ == "backward" and layout == "nhwc":
        return "no kernel for both gradients"
    if problem.stride[0] > 1 and problem.dilation[0] > 1:
        return "rows with a stride and a dilation"
    if layout == "nhwc" and (problem.c_out < LEAST_CHANNELS or problem.c_out % STEP_CHANNELS):
        return f"fewer than {LEAST_CHANNELS} channels, or no multiple of {STEP_CHANNELS}"
    if min(problem.x_shape + problem.w_shape + problem.y_shape) < 1:
        return "a channel or pixel count is zero"
    return None


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if problem.cin_g != 1 or problem.cout_g != 1:
        return "it serves depthwise convolutions without a channel multiplier only"
    if (why_not := lacking(problem, pass_, target)) is not None:
        return why_not
    if pass_ == "dgrad" and problem.stride[1] not in (1, 2, 4, 8):
        return "dgrad takes column strides of 1, 2, 4 and 8"
    if columns(problem, pass_, BLOCK_W)[2] > MOST_WINDOW:
        return f"{BLOCK_W} columns meet more than {MOST_WINDOW}"
    return None


def _launched(problem: ConvProblem, pass_: str, config: dict) -> Launched:
    block_c, block_m, block_h, block_t = (config[f"BLOCK_{axis}"] for axis in "CMHT")
    return launched(problem, pass_, block_c, block_m, BLOCK_W, block_h, block_t)


def _block_k(problem: ConvProblem, pass_: str) -> int:
    """Input columns of a product."""
    return max(16, 1 << (columns(problem, pass_, BLOCK_W)[2] - 1).bit_length())


def vector(problem: ConvProblem, strides) -> int:
    """Channels of a pixel that can be read together where a tensor begins at a multiple of 16 bytes."""
    return math.gcd(8, problem.c_out, *(strides[axis] for axis in (0, 2, 3))) if strides[1] == 1 else 1


def waits_of(pass_: str, made: Launched, march: int) -> int:
    """How often a program waits for copies: wgrad for all rows of a step at once, the others for each."""
    return march if pass_ == "wgrad" else march * made.read


def steps_of(pass_: str, made: Launched) -> int:
    """Of a block of lanes that have input rows: wgrad's begin with dy's first row."""
    return made.cut.last - (made.cut.first if pass_ != "wgrad" else 0)


def _copied(problem: ConvProblem, pass_: str, tile: dict, made: Launched) -> tuple[int, int]:
    """Elements of x (of dgrad, dy) and of wgrad's dy that a step of a program copies into shared memory."""
    pixel = tile["BLOCK_C"] * tile["BLOCK_M"]
    return made.read * pixel * _block_k(problem, pass_), pixel * BLOCK_W if pass_ == "wgrad" else 0


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    """In registers sums, matrices or the last rows of dy, and the rows of a step; in shared memory rows on their way
    in and, once, a row on its way out.
    """
    made, size, warps = _launched(problem, pass_, tile), problem.element_bytes, tile["num_warps"]
    block_v, block_c, block_m = (tile[f"BLOCK_{axis}"] for axis in "VCM")
    matrix = _block_k(problem, pass_) * BLOCK_W  # elements
    x, dy = _copied(problem, pass_, tile, made)
    result = block_c * block_m * BLOCK_W
    if pass_ == "wgrad":
        sums, kept, result = made.taps * matrix * block_c, (made.warm + tile["BLOCK_U"]) * dy, 0
    else:
        copies = warps * block_v // block_c  # of a matrix, which each warp has whole
        sums, kept = made.written * (made.warm + 1) * result, made.taps * matrix * block_c * copies
    out_bytes = 4 if problem.residual or problem.keeps else size
    return Held(
        warps,
        tile["num_stages"] * ((x if pass_ == "wgrad" else x // made.read) + dy) * size + result * out_bytes,
        sums=sums,
        words=(kept + x) * size / 4,
        accesses=(x / made.read + dy + result) / math.gcd(8, problem.c_out),
    )


SHAPES = (  # BLOCK_V, BLOCK_C, BLOCK_M, num_warps
    (4, 16, 16, 4), (4, 32, 16, 8), (4, 16, 32, 8), (4, 16, 32, 4), (8, 16, 16, 2), (8, 32, 16, 4), (8, 16, 32, 4),
    (2, 16, 16, 8), (2, 8, 32, 8),
)  # fmt: skip
SUM_SHAPES = (  # of wgrad, whose warps share no channels
    (4, 16, 16, 4), (4, 32, 16, 8), (4, 16, 32, 4), (8, 16, 16, 2), (8, 32, 16, 4), (2, 16, 32, 8),
    (2, 8, 32, 4),
)  # fmt: skip


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    stride = problem.stride[0]
    steps = math.ceil((problem.h_in if pass_ == "dgrad" else problem.h_out) / stride)
    heights = [1024] + [height for height in (32, 16) if height < steps]
    shapes, rows = (SUM_SHAPES, (16, 4)) if pass_ == "wgrad" else (SHAPES, (16,))
    for block_v, block_c, block_m, warps in shapes:
        for stages, height, block_t in itertools.product((4, 8), heights, rows):
            if block_t >= problem.kh and block_t < rows[0]:
                continue
            tile = {
                "BLOCK_V": block_v, "BLOCK_C": block_c, "BLOCK_M": block_m, "BLOCK_H": height, "BLOCK_T": block_t,
                "BLOCK_U": 1, "num_warps": warps, "num_stages": stages,
            }  # fmt: skip
            if pass_ == "wgrad":
                unrolls = turns(steps_of(pass_, _launched(problem, pass_, tile)), BLOCKS["BLOCK_U"][1])
                yield [tile | {"BLOCK_U": unroll} for unroll in unrolls]
            else:
                yield [tile]


def turns(steps: int, most: int) -> list[int]:
    """How many of wgrad's steps a turn of its loop may have, that with the least work first: a turn moves the rows of
    dy that it carries, which takes about as long as a third of a step.
    """
    return sorted(range(1, most + 1), key=lambda unroll: math.ceil(steps / unroll) * (3 * unroll + 1))


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    return divisions_of(problem, pass_, _launched(problem, pass_, config), target, fit)


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    made = _launched(problem, pass_, config)
    cut, size, warps = made.cut, problem.element_bytes, config["num_warps"]
    block_v, block_c, block_m = (config[f"BLOCK_{axis}"] for axis in "VCM")
    programs, splits, blocks = made.m_blocks * made.c_blocks, 1, 1
    if pass_ == "wgrad":
        splits, blocks = split_of(problem, config, made)
        programs = splits * made.c_blocks * made.t_blocks
    partials = partial_bytes(problem, splits)
    unroll = config["BLOCK_U"]
    march = math.ceil(steps_of(pass_, made) / unroll) * unroll * blocks  # steps of a program
    x, dy = _copied(problem, pass_, config, made)
    matrix = made.taps * _block_k(problem, pass_) * BLOCK_W
    products = march * matrix * block_c * block_m
    results = 0
    if pass_ == "wgrad":
        instructions = march * ((x + dy) * (1.8 + 1 / block_v) + made.warm * dy / (2 * unroll))
        instructions += SUMMED * matrix * block_c
    else:
        results = (march + cut.drain) * made.written * block_c * block_m * BLOCK_W
        instructions = march * x * (1.25 + 1 / block_v) + results * 1.5 + BUILT * matrix * block_v * warps
    waits = waits_of(pass_, made, march)
    instructions += products / 64 + FIXED * 32 * warps * waits
    # Eight threads of a warp read from eight places of 16 bytes, or parts of them.
    read = max(1, 8 // block_v)
    half_rate = target.has_warpgroups
    return Tiling(
        programs=programs,
        matrix_flops=2.0 * programs * products * (2 if half_rate else 1),
        l2_bytes=l2_bytes(problem, pass_, made, block_c, columns(problem, pass_, BLOCK_W), BLOCK_W) + partials,
        instructions=programs * instructions,
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=1 + (splits > 1),
        shared_bytes=programs * size * (march * (x + dy) * (1 + read) + 2 * results),
        trips=waits,
        ahead=config["num_stages"] - 1,
    )


def l2_bytes(
    problem: ConvProblem, pass_: str, made: Launched, block_c: int, window: tuple[int, int, int], block_w: int
) -> float:
    """What L2 is asked for and given, as copies pass L1 by: what of windows lies on the map, of all lanes; dy; results.

    window: as `columns` has it.
    """
    height, width, out_width = problem.h_in, problem.w_in, problem.w_out
    if pass_ == "dgrad":
        height, width, out_width = problem.h_out, problem.w_out, problem.w_in
    cut = made.cut
    col_blocks, left, wide = window
    fresh = block_w // problem.stride[1] if pass_ == "dgrad" else block_w * problem.stride[1]
    starts = [block * fresh - left for block in range(col_blocks)]
    met = sum(max(0, min(width, start + wide) - max(0, start)) for start in starts) / col_blocks
    asked = min(steps_of(pass_, made) * made.read, math.ceil(height / problem.dilation[0])) * met
    asked += cut.rows * made.written * out_width / col_blocks  # dy, or what is stored
    waste = max(1.0, 32 / (block_c * problem.element_bytes))
    return cut.count * problem.c_out * made.t_blocks * asked * problem.element_bytes * waste


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    top, _, pad, _ = problem.pad
    tiles, options = split_config(config)
    transposed, wgrad = pass_ == "dgrad", pass_ == "wgrad"
    del tiles["BLOCK_H"], tiles["BLOCK_T"], tiles["BLOCK_U"]
    made = _launched(problem, pass_, config)
    cut = made.cut
    _, left, window = columns(problem, pass_, BLOCK_W)
    maps = [problem.h_in, problem.w_in], [problem.h_out, problem.w_out]
    (h_in, w_in), (h_out, w_out) = reversed(maps) if transposed else maps
    source, result = {"fprop": ("x", "y"), "dgrad": ("dy", "dx"), "wgrad": ("x", "dy")}[pass_]
    scalars = {
        "batch": problem.batch, "h_in": h_in, "w_in": w_in, "h_out": h_out, "w_out": w_out,
        "segments": cut.segments, "col_blocks": cut.col_blocks, "rows": cut.rows,
        "CHANNELS": known(problem, problem.c_out), "KH": problem.kh, "KW": problem.kw,
        "CONV_STRIDE_H": problem.stride[0], "CONV_STRIDE_W": problem.stride[1],
        "PAD_H": top, "PAD_W": pad, "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
        "LEFT": left, "WINDOW": window, "BLOCK_K": _block_k(problem, pass_), "STAGES": config["num_stages"],
        "X_VECTOR": vector(problem, strides[source]), "INDEX_64": index_64(problem, strides),
        **named_strides("x", strides[source]), **tiles,
    }  # fmt: skip
    if wgrad:
        splits, blocks = split_of(problem, config, made)
        gradient = FilterGradient(problem, splits, strides["dw"])
        scalars |= gradient.depthwise_arguments() | named_strides("dy", strides["dy"])
        scalars |= {
            "blocks": blocks,
            "TAPS": made.taps,
            "UNROLL": config["BLOCK_U"],
            "DY_VECTOR": vector(problem, strides["dy"]),
        }
        scalars["INDEX_64"] = index_64(problem, strides, splits * problem.params)
        grid = (splits * made.c_blocks * made.t_blocks,)
        alone = {"X_VECTOR": 1, "DY_VECTOR": 1}
        return SplitK(launcher.Launch(kernels.wgrad_kernel, grid, scalars, alone, (0, 1), **options), gradient)
    scalars |= {"first": cut.first, "last": cut.last, "DRAIN": cut.drain, "TRANSPOSED": transposed}
    scalars |= NO_EPILOGUE if transposed else epilogue(problem)
    scalars |= named_strides("wgt", strides["w"]) | named_strides("y", strides[result])
    scalars["Y_VECTOR"] = vector(problem, strides[result])
    grid = (made.m_blocks * made.c_blocks,)
    launch = launcher.Launch(kernels.march_kernel, grid, scalars, {"X_VECTOR": 1}, (0,), **options)
    if transposed:
        return Single(launch, problem.x_shape, strides["dx"], lambda dy, w, dx: launch(dy, w, None, None, None, dx))
    return Forward(launch, problem, strides["y"])
