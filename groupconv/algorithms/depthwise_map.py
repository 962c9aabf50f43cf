"""Depthwise convolution of small maps with tall filters: whole maps in a program (kernels/depthwise_map.py)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels import depthwise_map as kernels
from ..occupancy import Held, shares
from ..problem import ConvProblem
from .calls import (
    NO_EPILOGUE,
    Forward,
    Single,
    align,
    emulate_bf16,
    epilogue,
    index_64,
    known,
    named_strides,
    pixels_last,
    split_config,
)
from .depthwise_toeplitz import BLOCK_K, fewest_rounds, wide_accesses

NAME = "depthwise_map"
BLOCKS = {"BLOCK_C": (1, 32), "BLOCK_M": (16, 256), "BLOCK_W": (8, 16)}
MOST_SPLITS = 4096
DIVISION = {"SPLITS": (1, MOST_SPLITS, 1)}  # of the blocks of images
TALL = 9  # rows of a filter: of others depthwise_toeplitz multiplies little padding
SMALL = 16  # rows and columns of a map: one of an instruction
GROUP = 4  # rows of x that are loaded together


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if problem.cin_g != 1:
        return "it serves depthwise convolutions only"
    if pass_ not in ("fprop", "dgrad"):
        return f"no {pass_} kernel"
    if target.backend == "hip":
        return "not made for AMD's matrix instructions"
    if problem.dtype in ("fp32", "bf16x3") or not target.matrix_rate(problem.dtype):
        return f"no {problem.dtype} matrix instructions on {target.arch_name}"
    if problem.element_bytes == 4 and (problem.layout == "nchw" or target.precision(problem.dtype) != "tf32"):
        return "its fp32 maps do not fit the registers"
    if pass_ == "dgrad" and problem.cout_g > 1:
        return "it has no sum over a channel multiplier"
    if problem.kh < TALL:
        return f"{problem.kh} filter rows, fewer than {TALL}"
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return "a stride or a dilation"
    if min(problem.x_shape + problem.w_shape) < 1:
        return "an axis of no elements"
    if (largest := max(problem.h_in, problem.w_in, problem.h_out, problem.w_out)) > SMALL:
        return f"maps of {largest} rows or columns, more than {SMALL}"
    return None


@dataclasses.dataclass(frozen=True)
class Maps:
    """The maps and padding of the convolution that a launch does, and what is made of them."""

    h_in: int
    w_in: int
    h_out: int
    w_out: int
    pad_h: int
    pad_w: int
    matrices: int  # of a channel
    pairs: int  # of an input and an output row that meet
    c_blocks: int
    m_blocks: int  # of images


def _maps(problem: ConvProblem, pass_: str, config: dict) -> Maps:
    maps = (problem.h_in, problem.w_in, problem.h_out, problem.w_out)
    pad_h, pad_w = problem.pad[0], problem.pad[2]
    if pass_ == "dgrad":
        maps = (*maps[2:], *maps[:2])
        pad_h, pad_w = problem.kh - 1 - pad_h, problem.kw - 1 - pad_w
    taps = [h - out + pad_h for h in range(maps[0]) for out in range(maps[2])]
    taps = [tap for tap in taps if 0 <= tap < problem.kh]
    c_blocks, m_blocks = math.ceil(problem.c_out / config["BLOCK_C"]), math.ceil(problem.batch / config["BLOCK_M"])
    return Maps(*maps, pad_h, pad_w, len(set(taps)), len(taps), c_blocks, m_blocks)


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    width = problem.w_in if pass_ == "dgrad" else problem.w_out
    shapes = [(8, 16, 8), (4, 16, 4), (4, 16, 8)]
    if problem.layout == "nchw":
        # tcgen05, which takes 64 images, keeps the accumulators of all rows in a tensor memory that is too small.
        shapes = [(1, 32, 2) if target.matrix_unit == "tcgen05" else (1, 64, 4), (1, 32, 4)]
    for block_c, block_m, warps in shapes:
        blocks = {"BLOCK_C": block_c, "BLOCK_M": block_m, "BLOCK_W": 8 if width <= 8 else 16}
        yield [blocks | {"num_warps": warps, "num_stages": 1}]


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    """Sums of all rows; the Toeplitz matrices, and a group of rows on their way into the layout of an operand."""
    made, rows = _maps(problem, pass_, tile), tile["BLOCK_C"] * tile["BLOCK_M"]
    elements = tile["BLOCK_C"] * BLOCK_K * (made.matrices * tile["BLOCK_W"] + GROUP * tile["BLOCK_M"])
    loaded = GROUP * rows * BLOCK_K
    return Held(
        tile["num_warps"],
        elements * problem.element_bytes,
        sums=made.h_out * rows * tile["BLOCK_W"],
        words=loaded * problem.element_bytes / 4,
        accesses=loaded / (16 // problem.element_bytes if wide_accesses(problem) else 1),
    )


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    made = _maps(problem, pass_, config)
    # To build the matrices takes about as long as a block.
    tried = fewest_rounds(made.m_blocks, made.c_blocks, target.multiprocessors * fit, MOST_SPLITS, prologue=1)
    return [{"SPLITS": splits} for splits in tried]


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    made, size = _maps(problem, pass_, config), problem.element_bytes
    block_c, block_m, block_w = (config[name] for name in BLOCKS)
    splits, blocks = shares(made.m_blocks, config["SPLITS"])
    programs = made.c_blocks * splits
    maps = programs * blocks * block_c * block_m
    x, y, products = maps * made.h_in * BLOCK_K, maps * made.h_out * block_w, maps * made.pairs * BLOCK_K * block_w
    matrices = programs * block_c * made.matrices * BLOCK_K * block_w
    waste = max(1.0, 32 / (block_c * size)) if problem.layout == "nhwc" else 1 + 32 / (made.w_in * size)
    if block_c == 1:  # wgmma reads both operands of every product from shared memory
        fragments = products / block_m + products / block_w
    else:
        fragments = matrices * blocks
    return Tiling(
        programs=programs,
        # wgmma of so few columns waits for its other operand half of the time
        matrix_flops=2.0 * products * (2 if target.has_warpgroups else 1),
        l2_bytes=problem.min_bytes(pass_) * waste + matrices * size,
        instructions=(4 if wide_accesses(problem) else 8) * (x + y) + products / 64 + 10 * matrices,
        dram_bytes=problem.min_bytes(pass_),
        resident=fit,
        shared_bytes=(2 * (x + y) + fragments) * size,
        trips=blocks * math.ceil(made.h_in / GROUP),
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    made, transposed = _maps(problem, pass_, config), pass_ == "dgrad"
    blocks, options = split_config(config)
    splits, images = shares(made.m_blocks, config["SPLITS"])
    source, result = ("dy", "dx") if transposed else ("x", "y")
    scalars = {
        "batch": problem.batch, "blocks": images,
        **named_strides("x", strides[source]), **named_strides("wgt", strides["w"]),
        **named_strides("y", strides[result]),
        "H_IN": made.h_in, "W_IN": made.w_in, "H_OUT": made.h_out, "W_OUT": made.w_out,
        "CHANNELS": known(problem, problem.c_out), "MULTIPLIER": problem.cout_g, "KH": problem.kh, "KW": problem.kw,
        "PAD_H": made.pad_h, "PAD_W": made.pad_w,
        "TRANSPOSED": transposed, **(NO_EPILOGUE if transposed else epilogue(problem)),
        "INDEX_64": index_64(problem, strides),
        "PRECISION": target.precision(problem.dtype),
        "EMULATE_BF16": emulate_bf16(kernels.fprop_kernel, problem),
        **blocks, "BLOCK_K": BLOCK_K, "GROUP": GROUP,
    }  # fmt: skip
    for name, memory in (("X", strides[source]), ("Y", strides[result])):
        last = pixels_last(memory)
        scalars |= {f"{name}_PIXELS_LAST": last, f"{name}_ALIGN": align(memory, (0, 1, 2) if last else (0, 2, 3))}
    launch = launcher.Launch(kernels.fprop_kernel, (made.c_blocks * splits,), scalars, **options)
    if transposed:
        return Single(launch, problem.x_shape, strides["dx"], lambda dy, w, dx: launch(dy, w, None, None, None, dx))
    return Forward(launch, problem, strides["y"])
