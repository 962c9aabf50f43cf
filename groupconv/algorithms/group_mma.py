"""Narrow groups of channels_last maps on matrix units, by fragments (kernels/group_mma.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from .. import launcher
from ..cost import Tiling
from ..devices import Target
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
from .depthwise_mma import (
    FIXED,
    NO_GLUON,
    SUMMED,
    l2_bytes,
    lacking,
    steps_of,
    turns,
    vector,
    waits_of,
)
from .depthwise_toeplitz import MOST_SPLITS, Launched, divisions_of, launched, split_of

if NO_GLUON is None:
    from ..kernels import group_mma as kernels

NAME = "group_mma"
INTERPRETABLE = False
BLOCKS = {
    "BLOCK_J": (1, 8), "BLOCK_I": (1, 4), "BLOCK_C": (8, 128), "BLOCK_M": (16, 64), "BLOCK_H": (4, 1024),
    "BLOCK_U": (1, 4, 1),
}  # fmt: skip
# BLOCK_J: eights of outputs of a group and lane. BLOCK_I: groups of a warp. BLOCK_H: the most output rows of a segment,
# about. BLOCK_U: steps of a turn of wgrad's loop.
DIVISION = {"SPLITS": (1, MOST_SPLITS, 1)}  # of wgrad's blocks of lanes

GROUPS = (2, 4, 8, 16)  # channels
MOST_COLUMNS = 32  # of a step
BUILT = 12  # instructions for each element of a thread's matrices, by counts of compiled code


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    group = problem.cin_g
    if group != problem.cout_g or group not in GROUPS:
        return f"it serves groups of {', '.join(map(str, GROUPS))} channels, in and out"
    if (why_not := lacking(problem, pass_, target)) is not None:
        return why_not
    if pass_ == "dgrad" and problem.stride != (1, 1):
        return "dgrad takes strides of 1"
    if _block_k(problem, pass_, 2) > MOST_COLUMNS:
        return f"16 outputs of a group meet more than {MOST_COLUMNS} columns"
    return None


def _columns(problem: ConvProblem, pass_: str, block_j: int) -> tuple[int, int, int, int]:
    """(columns of a lane, blocks of them, columns by which a window begins before them, width of a window)."""
    wide = 8 * block_j // problem.cin_g
    reach = (problem.kw - 1) * problem.dilation[1]
    pad = problem.pad[2]
    if pass_ == "dgrad":
        return wide, math.ceil(problem.w_in / wide), reach - pad, wide + reach
    return wide, math.ceil(problem.w_out / wide), pad, (wide - 1) * problem.stride[1] + reach + 1


def _launched(problem: ConvProblem, pass_: str, config: dict) -> Launched:
    wide = _columns(problem, pass_, config["BLOCK_J"])[0]
    return launched(problem, pass_, config["BLOCK_C"], config["BLOCK_M"], wide, config["BLOCK_H"], problem.kh)


def _block_k(problem: ConvProblem, pass_: str, block_j: int) -> int:
    """Columns of a step, a power of two, at least as many as a product has."""
    window = _columns(problem, pass_, block_j)[3]
    return max(16 // problem.cin_g, 1 << (window - 1).bit_length())


def _met(problem: ConvProblem, outputs: int) -> int:
    """Sixteens of a row's inputs that so many outputs of a group meet: products, or of wgrad sums."""
    columns = max(1, outputs // problem.cin_g)
    reach = (columns - 1) * problem.stride[1] + (problem.kw - 1) * problem.dilation[1] + 1
    return math.ceil(reach * problem.cin_g / 16)


def _matrices(problem: ConvProblem, pass_: str, tile: dict) -> int:
    """Elements of matrices, of wgrad sums, that a program's warps hold."""
    met = _met(problem, 16) * 16 if pass_ == "wgrad" else max(1, problem.cin_g // 8) * _met(problem, 8) * 8
    return tile["num_warps"] * tile["BLOCK_I"] * problem.kh * met * 16


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    """In registers sums, matrices and the rows of a step; in shared memory rows on their way in and, once, out."""
    made, size, warps = _launched(problem, pass_, tile), problem.element_bytes, tile["num_warps"]
    block_j, block_c, block_m = (tile[f"BLOCK_{axis}"] for axis in "JCM")
    x = block_c * block_m * _block_k(problem, pass_, block_j)
    result = block_c * block_m * 8 * block_j // problem.cin_g
    if pass_ == "wgrad":
        return Held(
            warps,
            tile["num_stages"] * (made.read * x + result) * size,
            sums=_matrices(problem, pass_, tile),
            words=((made.warm + tile["BLOCK_U"]) * result + made.read * x) * size / 4,
            accesses=(x + result) / math.gcd(8, problem.c_out),
        )
    out_bytes = 4 if problem.residual or problem.keeps else size
    return Held(
        warps,
        tile["num_stages"] * x * size + result * out_bytes,
        sums=(made.warm + 1) * result,
        words=(_matrices(problem, pass_, tile) + x) * size / 4,
        accesses=(x + result) / math.gcd(8, problem.c_out),
    )


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    group, steps = problem.cin_g, problem.h_in if pass_ == "dgrad" else problem.h_out
    heights = [1024] + [height for height in (32, 16) if height < steps]
    sums = pass_ == "wgrad"  # whose warps share no channels, and which takes eights in pairs
    least = max(2 if sums else 1, group // 8)
    for block_j, block_i, across, lanes in itertools.product((2, 4, 8), (1, 2, 4), (1, 2, 4, 8), (1, 2)):
        block_c, warps = group * block_i * across, across * (1 if sums else lanes)
        if block_j < least or not 16 <= block_c <= 64 or not 2 <= warps <= 8 or block_i * block_j > 8:
            continue
        if _block_k(problem, pass_, block_j) > MOST_COLUMNS:
            continue
        for stages, height in itertools.product((4, 8), heights):
            tile = {
                "BLOCK_J": block_j, "BLOCK_I": block_i, "BLOCK_C": block_c, "BLOCK_M": 16 * lanes,
                "BLOCK_H": height, "BLOCK_U": 1, "num_warps": warps, "num_stages": stages,
            }  # fmt: skip
            if sums:
                unrolls = turns(steps_of(pass_, _launched(problem, pass_, tile)), BLOCKS["BLOCK_U"][1])
                yield [tile | {"BLOCK_U": unroll} for unroll in unrolls]
            else:
                yield [tile]


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    return divisions_of(problem, pass_, _launched(problem, pass_, config), target, fit)


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    made = _launched(problem, pass_, config)
    cut, size, warps = made.cut, problem.element_bytes, config["num_warps"]
    block_j, block_c, block_m = (config[f"BLOCK_{axis}"] for axis in "JCM")
    programs, splits, blocks = made.m_blocks * made.c_blocks, 1, 1
    if pass_ == "wgrad":
        splits, blocks = split_of(problem, config, made)
        programs = splits * made.c_blocks
    partials = partial_bytes(problem, splits)
    unroll = config["BLOCK_U"]
    march = math.ceil(steps_of(pass_, made) / unroll) * unroll * blocks  # steps of a program
    wide, *window = _columns(problem, pass_, block_j)
    elements = _matrices(problem, pass_, config)
    x = march * made.read * block_c * block_m * _block_k(problem, pass_, block_j)  # elements of a program
    y = (march + cut.drain) * block_c * block_m * wide
    if pass_ == "wgrad":
        products = march * made.taps * _met(problem, 16) * 16 * block_c * block_m * wide
        instructions = x * 1.5 + y * (1.5 + made.warm / (2 * unroll))
        instructions += SUMMED * elements * math.ceil(problem.kw * problem.cin_g / 16)
    else:
        products = march * made.taps * _met(problem, 8) * 16 * block_c * block_m * wide
        instructions = x * 1.5 + y * 1.5 + BUILT * elements
    waits = waits_of(pass_, made, march)
    instructions += products / 64 + FIXED * 32 * warps * waits
    return Tiling(
        programs=programs,
        matrix_flops=2.0 * programs * products * (2 if target.has_warpgroups else 1),
        l2_bytes=l2_bytes(problem, pass_, made, block_c, (window[0], window[1], window[2]), wide) + partials,
        instructions=programs * instructions,
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=1 + (splits > 1),
        shared_bytes=programs * size * (x * (2 if problem.cin_g >= 8 and pass_ != "wgrad" else 3) + 2 * y),
        trips=waits,
        ahead=config["num_stages"] - 1,
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    top, _, pad, _ = problem.pad
    tiles, options = split_config(config)
    del tiles["BLOCK_H"], tiles["BLOCK_U"]
    transposed = pass_ == "dgrad"
    made = _launched(problem, pass_, config)
    cut = made.cut
    _, _, left, window = _columns(problem, pass_, config["BLOCK_J"])
    maps = [problem.h_in, problem.w_in], [problem.h_out, problem.w_out]
    (h_in, w_in), (h_out, w_out) = reversed(maps) if transposed else maps
    source, result = {"fprop": ("x", "y"), "dgrad": ("dy", "dx"), "wgrad": ("x", "dy")}[pass_]
    scalars = {
        "batch": problem.batch, "h_in": h_in, "w_in": w_in, "h_out": h_out, "w_out": w_out,
        "segments": cut.segments, "col_blocks": cut.col_blocks, "rows": cut.rows,
        "CHANNELS": known(problem, problem.c_out), "GROUP": problem.cin_g, "KH": problem.kh, "KW": problem.kw,
        "CONV_STRIDE_H": problem.stride[0], "CONV_STRIDE_W": problem.stride[1],
        "PAD_H": top, "PAD_W": pad, "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
        "WINDOW": window, "BLOCK_K": _block_k(problem, pass_, config["BLOCK_J"]), "STAGES": config["num_stages"],
        "X_VECTOR": vector(problem, strides[source]), "INDEX_64": index_64(problem, strides),
        **named_strides("x", strides[source]), **tiles,
    }  # fmt: skip
    if pass_ == "wgrad":
        splits, blocks = split_of(problem, config, made)
        gradient = FilterGradient(problem, splits, strides["dw"])
        scalars |= gradient.arguments | named_strides("dy", strides["dy"])
        scalars |= {"blocks": blocks, "UNROLL": config["BLOCK_U"], "DY_VECTOR": vector(problem, strides["dy"])}
        scalars["INDEX_64"] = index_64(problem, strides, splits * problem.params)
        alone, grid = {"X_VECTOR": 1, "DY_VECTOR": 1}, (splits * made.c_blocks,)
        return SplitK(launcher.Launch(kernels.wgrad_kernel, grid, scalars, alone, (0, 1), **options), gradient)
    scalars |= {
        "first": cut.first, "last": cut.last, "DRAIN": cut.drain, "LEFT": left,
        "TRANSPOSED": transposed, **(NO_EPILOGUE if transposed else epilogue(problem)),
        "Y_VECTOR": vector(problem, strides[result]),
        **named_strides("wgt", strides["w"]), **named_strides("y", strides[result]),
    }  # fmt: skip
    grid = (made.m_blocks * made.c_blocks,)
    launch = launcher.Launch(kernels.march_kernel, grid, scalars, {"X_VECTOR": 1}, (0,), **options)
    if transposed:
        return Single(launch, problem.x_shape, strides["dx"], lambda dy, w, dx: launch(dy, w, None, None, None, dx))
    return Forward(launch, problem, strides["y"])
