"""Depthwise convolution of contiguous maps on matrix units, by fragments (kernels/depthwise_mma_nchw.py)."""

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
    Fused,
    Single,
    SplitK,
    epilogue,
    index_64,
    known,
    named_strides,
    split_config,
)
from .depthwise_mma import NO_GLUON, lacking, steps_of
from .depthwise_toeplitz import BLOCK_K as LEAST_K
from .depthwise_toeplitz import MOST_SPLITS, Launched, columns, divisions_of, launched, split_of

if NO_GLUON is None:
    from ..kernels import depthwise_mma_nchw as kernels

NAME = "depthwise_mma_nchw"
INTERPRETABLE = False
BLOCKS = {"BLOCK_C": (1, 16), "BLOCK_M": (16, 256), "BLOCK_W": (8, 16), "BLOCK_H": (4, 1024), "BLOCK_T": (1, 16)}
# BLOCK_H: the most output rows of a segment, about. BLOCK_T: wgrad's filter rows of a program.
DIVISION = {"SPLITS": (1, MOST_SPLITS, 1)}  # of wgrad's blocks of lanes

MOST_K = 64  # input columns of a product
ONCE, LANES, BUILT = 150, 220, 20  # instructions of a warp, by counts of compiled code: of all, for 16 lanes, for a tap
AHEAD = 4  # the most rows that are under way: more spill, or are moved about


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if problem.cin_g != 1:
        return "it serves depthwise convolutions only"
    if pass_ in ("dgrad", "backward") and problem.cout_g > 1:
        return "it has no sum over a channel multiplier"
    if pass_ == "backward" and problem.stride != (1, 1):
        return "both gradients at once have no strides"
    if (why_not := lacking(problem, pass_, target, "nchw")) is not None:
        return why_not
    if pass_ == "dgrad" and problem.stride[1] not in (1, 2, 4, 8):
        return "dgrad takes column strides of 1, 2, 4 and 8"
    if min(columns(problem, _march(pass_), block_w)[2] for block_w in (8, 16)) > MOST_K:
        return f"8 columns meet more than {MOST_K}"
    return None


def _march(pass_: str) -> str:
    """Whose march down the rows a pass makes: both gradients at once that of dgrad."""
    return "dgrad" if pass_ == "backward" else pass_


def _launched(problem: ConvProblem, pass_: str, config: dict) -> Launched:
    return launched(problem, _march(pass_), *(config[f"BLOCK_{axis}"] for axis in "CMWHT"))


def _block_k(made: Launched) -> int:
    """Input columns of a product."""
    return LEAST_K << (made.cut.chunks - 1).bit_length()


def _fresh(problem: ConvProblem, pass_: str, block_w: int) -> int:
    """Input columns by which a lane's window begins after its neighbour's."""
    return block_w // problem.stride[1] if _march(pass_) == "dgrad" else block_w * problem.stride[1]


def _vectors(problem: ConvProblem, pass_: str, block_w: int, made: Launched) -> tuple[int, int, int]:
    """Of dense tensors: of what is read by windows, of what meets them in sums, and of results."""
    w_in, w_out = (problem.w_out, problem.w_in) if _march(pass_) == "dgrad" else (problem.w_in, problem.w_out)
    fresh = _fresh(problem, pass_, block_w)
    return math.gcd(_block_k(made) // 4, w_in, fresh, made.cut.left), math.gcd(block_w // 4, w_out), math.gcd(2, w_out)


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    """In registers sums, matrices or the last rows of dy, and rows on their way in."""
    made, warps = _launched(problem, pass_, tile), tile["num_warps"]
    block_c, block_m, block_w = (tile[f"BLOCK_{axis}"] for axis in "CMW")
    block_k, size = _block_k(made), problem.element_bytes
    matrix = made.taps * block_k * block_w * block_c  # elements of matrices, or of their gradients
    x, result = made.read * block_k * block_m * block_c, block_w * block_m * block_c
    ahead = tile["num_stages"] * x
    x_vector, met_vector, vector = _vectors(problem, pass_, block_w, made)
    if pass_ == "backward":
        ahead += tile["num_stages"] * result
        return Held(
            warps, 0, sums=matrix + made.taps * result, words=(matrix + made.taps * result + 2 * x + ahead) * size / 4,
            accesses=x / x_vector + result / met_vector + result / vector,
        )  # fmt: skip
    if pass_ == "wgrad":
        ahead += tile["num_stages"] * result
        return Held(
            warps, 0, sums=matrix, words=((made.warm + 1) * result + x + ahead) * size / 4,
            accesses=x / made.read / x_vector + result / met_vector,
        )  # fmt: skip
    return Held(
        warps,
        0,
        sums=made.written * (made.warm + 1) * result,
        words=(matrix * warps // block_c + ahead) * size / 4,
        accesses=x / made.read / x_vector + result / vector,
    )


SHAPES = ((1, 64, 4), (2, 32, 4), (4, 16, 4), (1, 128, 4), (2, 64, 4), (4, 32, 4), (4, 64, 4), (2, 32, 2))
SUM_SHAPES = ((4, 16, 4), (4, 32, 4), (2, 16, 2), (2, 32, 2), (8, 16, 8), (4, 64, 4))  # BLOCK_C, BLOCK_M, num_warps


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    stride, march = problem.stride[0], _march(pass_)
    height, width = (problem.h_in, problem.w_in) if march == "dgrad" else (problem.h_out, problem.w_out)
    steps = math.ceil(height / stride)
    # A row that is a lane's has nothing that another lane loads, too; but takes more registers.
    whole = width <= 16 < width + 8 and columns(problem, march, 16)[2] <= MOST_K
    heights = [1024] + [most for most in (32, 16, 8) if most < steps]
    shapes, rows = SHAPES if pass_ in ("fprop", "dgrad") else SUM_SHAPES, (16, 8, 4) if pass_ == "wgrad" else (16,)
    for (block_c, block_m, warps), block_w in itertools.product(shapes, (16, 8) if whole else (8,)):
        for stages, block_h, block_t in itertools.product((1, 2, 4), heights, rows):
            read = stages * (1 if march == "dgrad" else stride)
            if (block_t >= problem.kh and block_t < rows[0]) or not 2 <= read <= max(AHEAD, stride):
                continue
            yield [{
                "BLOCK_C": block_c, "BLOCK_M": block_m, "BLOCK_W": block_w, "BLOCK_H": block_h,
                "BLOCK_T": block_t, "num_warps": warps, "num_stages": stages,
            }]  # fmt: skip


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    sums = "wgrad" if pass_ == "backward" else pass_
    return divisions_of(problem, sums, _launched(problem, pass_, config), target, fit)


def _l2_bytes(problem: ConvProblem, pass_: str, made: Launched) -> float:
    """What L2 is asked for and given, in whole sectors: what the windows of neighbouring lanes share, once; dy, or what
    is stored.
    """
    maps = [(problem.h_in, problem.w_in), (problem.h_out, problem.w_out)]
    (height, width), (_, out_width) = reversed(maps) if _march(pass_) == "dgrad" else maps
    cut, size = made.cut, problem.element_bytes
    read = width * min(math.ceil(height / problem.dilation[0]), cut.segments * steps_of(pass_, made) * made.read)
    written = out_width * cut.rows * cut.segments * made.written
    lanes = problem.batch * problem.dilation[0] * problem.c_out
    # Where a row ends within a sector, the rest is the next row's: what is read lies in the first-level cache by then,
    # what is stored goes out again; and again where the two columns of a thread are stored one by one.
    sectors = out_width * size / 32
    waste = (1.0 if sectors == int(sectors) else 1 + 1 / sectors) * 2 / math.gcd(2, out_width)
    if pass_ == "wgrad":
        return lanes * size * made.t_blocks * (read + written)
    if pass_ == "backward":
        read += out_width * cut.rows * cut.segments
    return lanes * size * (read + written * waste)


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    made = _launched(problem, pass_, config)
    block_c, block_m, ahead = config["BLOCK_C"], config["BLOCK_M"], config["num_stages"]
    programs, splits, blocks = made.m_blocks * made.c_blocks, 1, 1
    if pass_ in ("wgrad", "backward"):
        splits, blocks = split_of(problem, config, made)
        programs = splits * made.c_blocks * (made.t_blocks if pass_ == "wgrad" else 1)
    partials = partial_bytes(problem, splits)
    block_k = _block_k(made)
    chunks = block_k // LEAST_K
    x_vector, met_vector, vector = _vectors(problem, pass_, config["BLOCK_W"], made)
    march = math.ceil(steps_of(pass_, made) / ahead) * ahead * blocks  # steps of a program
    sixteens = block_c * block_m / 16  # products of a step, chunk and tap: a warp has 16 lanes of each
    # Of a warp, by counts of compiled code: rows have masks and addresses, a word moves into its fragment's order.
    eights = config["BLOCK_W"] // 8
    row = 8 + 3 * (block_k / 2 / x_vector) + 6 * chunks
    met = 8 + 3 * (4 * eights / met_vector) + 5 * eights
    products = made.taps * chunks * eights
    if pass_ == "wgrad":
        step = products + made.read * (row + chunks) + met
    else:
        step = products + made.read * row + made.written * (8 + eights * (2 + 4 / vector))
    if pass_ == "backward":
        step, products = step + products + 5 * chunks + met, 2 * products
    once = LANES * sixteens * blocks + (ONCE + BUILT * products) * config["num_warps"]
    half_rate = target.has_warpgroups
    return Tiling(
        programs=programs,
        matrix_flops=2.0 * programs * march * sixteens * products * 16 * LEAST_K * 8 * (2 if half_rate else 1),
        l2_bytes=_l2_bytes(problem, pass_, made) + partials,
        instructions=32 * programs * (march * sixteens * step + once),
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=1 + (splits > 1),
        trips=march,
        ahead=ahead,
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    tiles, options = split_config(config)
    block_w, unroll, march = config["BLOCK_W"], config["num_stages"], _march(pass_)
    del tiles["BLOCK_H"], tiles["BLOCK_T"]
    made = _launched(problem, pass_, config)
    cut, block_k = made.cut, _block_k(made)
    _, left, window = columns(problem, march, block_w)
    read = "dy" if march == "dgrad" else "x"  # by windows
    widths = {"x": problem.w_in, "dx": problem.w_in, "y": problem.w_out, "dy": problem.w_out}

    def vector(name, *columns):
        """Columns that can be read together where a tensor begins at a multiple of 16 bytes; they divide `columns`."""
        return math.gcd(8, widths[name], *strides[name][:3], *columns) if strides[name][3] == 1 else 1

    of_windows = vector(read, block_k // 4, _fresh(problem, pass_, block_w), cut.left)
    scalars = {
        "batch": problem.batch, "h_in": problem.h_in, "w_in": problem.w_in,
        "h_out": problem.h_out, "w_out": problem.w_out,
        "segments": cut.segments, "col_blocks": cut.col_blocks, "rows": cut.rows,
        "CHANNELS": known(problem, problem.c_out), "KH": problem.kh, "KW": problem.kw,
        "PAD_H": problem.pad[0], "PAD_W": problem.pad[2], "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
        "LEFT": cut.left, "WINDOW": math.ceil((window + cut.left - left) / of_windows) * of_windows,
        "BLOCK_K": block_k, "UNROLL": unroll, "INDEX_64": index_64(problem, strides), **tiles,
    }  # fmt: skip
    if pass_ != "backward":
        scalars |= {"CONV_STRIDE_H": problem.stride[0], "CONV_STRIDE_W": problem.stride[1]}
        scalars["MULTIPLIER"] = problem.cout_g
    if pass_ != "wgrad":
        more = -steps_of(pass_, made) % unroll  # steps that complete a turn, and have no input rows
        scalars |= {"first": cut.first, "last": cut.last, "DRAIN": max(0, cut.drain - more)}
        scalars |= named_strides("wgt", strides["w"])
    if pass_ in ("wgrad", "backward"):
        splits, blocks = split_of(problem, config, made)
        gradient = FilterGradient(problem, splits, strides["dw"])
        scalars |= gradient.depthwise_arguments() | {"blocks": blocks}
        scalars |= named_strides("dy", strides["dy"]) | named_strides("x", strides["x"])
        scalars["INDEX_64"] = index_64(problem, strides, splits * problem.params)
        alone = {"X_VECTOR": 1, "DY_VECTOR": 1}
        if pass_ == "wgrad":
            scalars |= {"X_VECTOR": of_windows, "DY_VECTOR": vector("dy", block_w // 4), "TAPS": made.taps}
            grid = (splits * made.c_blocks * made.t_blocks,)
            return SplitK(launcher.Launch(kernels.wgrad_kernel, grid, scalars, alone, (0, 1), **options), gradient)
        scalars |= {"DY_VECTOR": of_windows, "X_VECTOR": vector("x", block_w // 4), "DX_VECTOR": vector("dx", 2)}
        scalars |= {"FIRST": cut.first} | named_strides("dx", strides["dx"])
        grid = (splits * made.c_blocks,)
        launch = launcher.Launch(kernels.backward_kernel, grid, scalars, alone, (0, 1), **options)
        return Fused(launch, problem, gradient, strides["dx"])
    written = {"dy": "dx", "x": "y"}[read]
    if pass_ == "dgrad":
        scalars |= {"h_in": problem.h_out, "w_in": problem.w_out, "h_out": problem.h_in, "w_out": problem.w_in}
    scalars |= {"X_VECTOR": of_windows, "Y_VECTOR": vector(written, 2), "TRANSPOSED": pass_ == "dgrad"}
    scalars |= NO_EPILOGUE if pass_ == "dgrad" else epilogue(problem)
    scalars |= named_strides("x", strides[read]) | named_strides("y", strides[written])
    grid = (made.m_blocks * made.c_blocks,)
    launch = launcher.Launch(kernels.march_kernel, grid, scalars, {"X_VECTOR": 1}, (0,), **options)
    if pass_ == "dgrad":
        return Single(launch, problem.x_shape, strides["dx"], lambda dy, w, dx: launch(dy, w, None, None, None, dx))
    return Forward(launch, problem, strides["y"])
