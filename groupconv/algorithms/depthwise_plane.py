"""Depthwise convolution of small maps as matrix products over the batch (kernels/depthwise_plane.py)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import triton

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels import depthwise_plane as kernels
from ..occupancy import Held, largest_splits, most_splits, partial_bytes, shares
from ..problem import ConvProblem
from .calls import (
    FilterGradient,
    Forward,
    align,
    call_of_backward,
    emulate_bf16,
    epilogue,
    index_64,
    named_strides,
    split_config,
)

NAME = "depthwise_plane"
BLOCKS = {"BLOCK_N": (16, 128), "BLOCK_C": (1, 16), "BLOCK_IN": (16, 128), "BLOCK_OUT": (16, 128)}
MOST_SPLITS = 64
DIVISION = {"SPLITS": (1, MOST_SPLITS, 1)}  # programs that share the images of a channel
MOST_PIXELS = 256  # of a map: above, the products are mostly zeros, or too many to be unrolled
# Products in a kernel's loop, which is unrolled: more compile for long, and spill.
MOST_PRODUCTS = {"fprop": 49, "dgrad": 49, "wgrad": 40, "backward": 48}
TAPS = 64  # summed at once
# Thread instructions, from compiled kernels for sm_90: of an element moved (and of its load or store, which has a
# vector of them), of an entry of a matrix or of a gathered accumulator, and of a thread besides.
AN_ELEMENT, A_VECTOR, AN_ENTRY, A_THREAD = 2, 8.5, 8, 300
A_PRODUCT = 3 / 64  # of a multiply-add on mma.sync, with its operands; warp-group products take next to none


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How maps are cut, and which distances lie between chunks that meet: the kernels' arguments of these names."""

    rows_in: int
    rows_out: int
    unit: int
    first: int
    distances: int
    count_in: int
    count_out: int
    pairs: int  # of an input and an output chunk that meet
    window_in: int  # the most chunks of the input that one of the output meets,
    window_out: int  # and the other way round

    def arguments(self) -> dict[str, int]:
        return {
            "ROWS_IN": self.rows_in, "ROWS_OUT": self.rows_out,
            "UNIT": self.unit, "FIRST": self.first, "DISTANCES": self.distances,
        }  # fmt: skip


def cut(problem: ConvProblem, config: dict) -> Chunks:
    """Chunks of as many whole rows as a tile holds, evenly filled; those of the input as long as the output's reach."""
    stride, dilation, top = problem.stride[0], problem.dilation[0], problem.pad[0]
    rows_out = _even(problem.h_out, config["BLOCK_OUT"] // problem.w_out)
    rows_in = _even(problem.h_in, config["BLOCK_IN"] // problem.w_in)
    if rows_out < problem.h_out and rows_in > rows_out * stride:
        rows_in = rows_out * stride
    count_in, count_out = math.ceil(problem.h_in / rows_in), math.ceil(problem.h_out / rows_out)
    step = rows_out * stride
    unit = math.gcd(rows_in if count_in > 1 else 0, step if count_out > 1 else 0) or 1
    least = max(1 - rows_in - top, (1 - count_out) * step)
    most = min((problem.kh - 1) * dilation - top + step - stride, (count_in - 1) * rows_in)
    first, last = math.ceil(least / unit), most // unit
    meet = [[first * unit <= i * rows_in - j * step <= last * unit for j in range(count_out)] for i in range(count_in)]
    window_in, window_out = max(map(sum, zip(*meet, strict=True))), max(map(sum, meet))
    return Chunks(
        rows_in, rows_out, unit, first, max(0, last - first + 1), count_in, count_out,
        sum(map(sum, meet)), window_in, window_out,
    )  # fmt: skip


def _whole(problem: ConvProblem, config: dict) -> dict:
    """A configuration, of another map perhaps, with tiles that hold a row of this one."""
    block_in, block_out = max(config["BLOCK_IN"], _tile(problem.w_in)), max(config["BLOCK_OUT"], _tile(problem.w_out))
    return config | {"BLOCK_IN": block_in, "BLOCK_OUT": block_out}


def _even(rows: int, most: int) -> int:
    """Rows of a chunk, at most `most`, such that the last chunk has about as many."""
    return math.ceil(rows / math.ceil(rows / most))


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if problem.cin_g != 1:
        return f"{problem.cin_g} input channels a group, not 1"
    if problem.dtype == "bf16x3":
        return "bf16x3 products are implicit_gemm's"
    if problem.dtype == "fp32" or not target.matrix_rate(problem.dtype):
        return f"no {problem.dtype} matrix instructions on {target.arch_name}"
    if min(problem.x_shape[1:] + problem.w_shape) < 1:
        return "a channel or pixel count is zero"
    pixels = max(problem.h_in * problem.w_in, problem.h_out * problem.w_out)
    if pixels > MOST_PIXELS:
        return f"maps of {pixels} pixels, more than {MOST_PIXELS}"
    if pass_ == "backward" and problem.cout_g > 1:
        return f"both gradients of {problem.cout_g} output channels a group"
    return None


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    nhwc = problem.layout == "nhwc"
    maps = set()
    for rows_out in {_even(problem.h_out, most) for most in range(1, problem.h_out + 1)}:
        rows_in = min(problem.h_in, rows_out * problem.stride[0]) if rows_out < problem.h_out else problem.h_in
        maps.add((_tile(rows_in * problem.w_in), _tile(rows_out * problem.w_out)))
    for block_in, block_out in sorted(maps):
        for block_n in (32, 16) if nhwc else (128, 64, 32, 16):
            if block_n > _tile(problem.batch) or max(block_in, block_out) > BLOCKS["BLOCK_IN"][1]:
                continue
            for block_c, warps in itertools.product((8, 16) if nhwc else (1,), (4, 8)):
                tile = {
                    "BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_IN": block_in, "BLOCK_OUT": block_out,
                    "num_warps": warps, "num_stages": 1,
                }  # fmt: skip
                if _possible(problem, pass_, tile, target):
                    yield [tile]


def _tile(pixels: int) -> int:
    return max(16, triton.next_power_of_2(pixels))


def _possible(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> bool:
    """Whether every warp has products of its own, and a step has not too many."""
    warps, shapes = tile["num_warps"], _products(pass_, tile)
    alike = target.backend == "hip" or (target.has_warpgroups and any(64 <= m < 128 for m, _ in shapes))
    if tile["BLOCK_C"] == 1 and warps == 8 and alike:
        return False  # warps would do the same rows,
    if any(tile["BLOCK_C"] * m * n < 128 * warps for m, n in shapes):
        return False  # or these the same tiles
    products = cut(problem, tile).pairs * (problem.cout_g if pass_ == "dgrad" else 1)
    # Each product takes columns of tensor memory, of which there are 512.
    columns = products * sum(n for m, n in shapes if m >= 64 and tile["BLOCK_C"] == 1)
    return products * len(shapes) <= MOST_PRODUCTS[pass_] and (target.matrix_unit != "tcgen05" or columns <= 512)


def _products(pass_: str, config: dict) -> list[tuple[int, int]]:
    """(M, N) of a pass's matrix products."""
    n, block_in, block_out = config["BLOCK_N"], config["BLOCK_IN"], config["BLOCK_OUT"]
    dx, dw = (n, block_in), (block_in, block_out)
    return {"fprop": [(n, block_out)], "dgrad": [dx], "wgrad": [dw], "backward": [dx, dw]}[pass_]


def _slow(pass_: str, config: dict, target: Target) -> float:
    """The share of the products on mma.sync where Hopper and Blackwell have faster instructions for others.

    Those take no 3-D products, nor fewer than 64 rows.
    """
    rows = [m for m, _ in _products(pass_, config)]
    if target.has_warpgroups and config["BLOCK_C"] == 1:
        return sum(m < 64 for m in rows) / len(rows)
    return 1.0


def _tiles(problem: ConvProblem, pass_: str, config: dict, chunks: Chunks) -> tuple[int, int, int]:
    """(elements of the maps that a program holds at once, of its matrices, of its accumulators of dw)."""
    maps_in, maps_out = chunks.window_in * config["BLOCK_IN"], chunks.window_out * config["BLOCK_OUT"]
    multiplier = problem.cout_g if pass_ == "dgrad" else 1
    held = {"fprop": maps_in, "dgrad": maps_out * multiplier}.get(pass_, maps_out + config["BLOCK_IN"])
    entries = chunks.distances * config["BLOCK_IN"] * config["BLOCK_OUT"] * config["BLOCK_C"]
    return (
        held * config["BLOCK_N"] * config["BLOCK_C"],
        0 if pass_ == "wgrad" else entries * multiplier,
        entries if pass_ in ("wgrad", "backward") else 0,
    )


def _result(pass_: str, config: dict) -> int:
    """Elements of a chunk of y or dx."""
    pixels = {"fprop": config["BLOCK_OUT"], "wgrad": 0}.get(pass_, config["BLOCK_IN"])
    return config["BLOCK_N"] * config["BLOCK_C"] * pixels


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    """Maps in registers; in shared memory matrices, the operands of products, and a result on its way to memory, or
    one accumulator to be gathered.
    """
    tile = _whole(problem, tile)
    chunks, size = cut(problem, tile), problem.element_bytes
    maps, entries, sums = _tiles(problem, pass_, tile, chunks)
    words = maps * size / 4
    if tile["BLOCK_C"] > 1:  # operands of mma.sync are in registers,
        words += (maps if sums else entries / 2) * size / 4
    elif _slow(pass_, tile, target):  # those of 2-D products in more than one warp's
        words += maps * size / 8 * tile["num_warps"]
    result = _result(pass_, tile)
    shared = max((maps + entries + result) * size, 4 * sums // max(1, chunks.distances))
    vector = _vector(problem, tile, chunks)
    return Held(tile["num_warps"], shared, sums=sums + result, words=words, accesses=maps / vector)


def _vector(problem: ConvProblem, config: dict, chunks: Chunks) -> int:
    """Elements of a load or store."""
    wide = 16 // problem.element_bytes
    if config["BLOCK_C"] > 1:
        return math.gcd(wide, config["BLOCK_C"], problem.c_out, problem.c_in)
    sizes = (problem.h_in, problem.w_in, chunks.rows_in), (problem.h_out, problem.w_out, chunks.rows_out)
    return math.gcd(wide, *(h * w for h, w, _ in sizes), *(rows * w for _, w, rows in sizes))


def _split(problem: ConvProblem, pass_: str, config: dict) -> tuple[int, int]:
    """(programs that share the images of a channel, blocks of images of each)."""
    sums = pass_ in ("wgrad", "backward")
    most = min(config["SPLITS"], largest_splits(problem, pass_)) if sums else config["SPLITS"]
    return shares(math.ceil(problem.batch / config["BLOCK_N"]), most)


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    blocks = max(1, math.ceil(problem.batch / config["BLOCK_N"]))
    most = min(blocks, MOST_SPLITS)
    if pass_ in ("wgrad", "backward"):
        most = min(most, most_splits(problem, pass_))
    channels = math.ceil((problem.c_out if pass_ in ("fprop", "wgrad") else problem.c_in) / config["BLOCK_C"])
    places = target.multiprocessors * fit
    # Building the matrices takes about as long as a block of images.
    found = {shares(blocks, splits)[0] for splits in range(1, most + 1)}
    shortest = sorted(sorted(found), key=lambda n: math.ceil(channels * n / places) * (math.ceil(blocks / n) + 1))
    return [{"SPLITS": splits} for splits in shortest]


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    config = _whole(problem, config)
    splits, each = _split(problem, pass_, config)
    chunks = cut(problem, config)
    n, c, size = config["BLOCK_N"], config["BLOCK_C"], problem.element_bytes
    block_in, block_out = config["BLOCK_IN"], config["BLOCK_OUT"]
    channels = math.ceil((problem.c_out if pass_ in ("fprop", "wgrad") else problem.c_in) / c)
    multiplier = problem.cout_g if pass_ == "dgrad" else 1
    programs = channels * splits
    steps = programs * each  # blocks of images, those past the batch too
    partials = partial_bytes(problem, splits) if pass_ in ("wgrad", "backward") else 0

    pairs = chunks.pairs * multiplier * c
    operands = {
        "fprop": n * block_in + block_in * block_out, "dgrad": n * block_out + block_in * block_out,
        "wgrad": n * (block_in + block_out),
    }  # fmt: skip
    operands["backward"] = operands["dgrad"] + operands["wgrad"]
    products = 2.0 * pairs * n * block_in * block_out * (2 if pass_ == "backward" else 1)
    slow = _slow(pass_, config, target)

    x, y = problem.h_in * problem.w_in, problem.h_out * problem.w_out
    moved = {"fprop": x + y, "dgrad": x + y * multiplier, "wgrad": x + y, "backward": 2 * x + y}[pass_] * n * c
    run = (c if c > 1 else min(x, y)) * size
    _, entries, sums = _tiles(problem, pass_, config, chunks)
    gathered = 0
    if sums:
        rows, taps = _tap_tile(problem)
        gathered = math.ceil(problem.kh / rows) * min(3, chunks.distances) * taps * block_out * c
    an_element = AN_ELEMENT + A_VECTOR / _vector(problem, config, chunks)
    prologue = (entries + gathered + sums) * AN_ENTRY + A_THREAD * 32 * config["num_warps"]
    return Tiling(
        programs=programs,
        matrix_flops=steps * products * (1 + slow if target.has_warpgroups else 1),
        l2_bytes=steps * moved * size * max(1.0, 32 / run) + partials,
        instructions=steps * (moved * an_element + products / 2 * A_PRODUCT * slow) + programs * prologue,
        shared_bytes=steps * size * (2.0 * moved + pairs * operands[pass_]) + programs * 8.0 * (gathered + sums),
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=2 if partials else 1,
        trips=each,
    )  # fmt: skip


def _tap_tile(problem: ConvProblem) -> tuple[int, int]:
    """(rows of the filter that are summed at once, a tile for their taps)."""
    rows = min(problem.kh, max(1, TAPS // problem.kw))
    return rows, triton.next_power_of_2(rows * problem.kw)


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    config = _whole(problem, config)
    blocks, options = split_config(config)
    splits, each = _split(problem, pass_, config)
    kernel = kernels.fprop_kernel if pass_ == "fprop" else kernels.backward_kernel
    channels = problem.c_out if pass_ in ("fprop", "wgrad") else problem.c_in
    # Offsets of a channel's image are multiples of these; in the 3-D tiles channels are the contiguous axis.
    axes = (0, 1) if config["BLOCK_C"] == 1 else (0, 2, 3)
    x, w, y, dx, dw = (strides[name] for name in ("x", "w", "y", "dx", "dw"))
    dy = strides.get("dy")
    scalars = {
        "batch": problem.batch, "channels": channels, "blocks": each,
        "H_IN": problem.h_in, "W_IN": problem.w_in, "H_OUT": problem.h_out, "W_OUT": problem.w_out,
        "MULTIPLIER": problem.cout_g, "KH": problem.kh, "KW": problem.kw,
        "CONV_STRIDE_H": problem.stride[0], "CONV_STRIDE_W": problem.stride[1],
        "PAD_H": problem.pad[0], "PAD_W": problem.pad[2], "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
        **cut(problem, config).arguments(),
        "EVEN_C": channels % config["BLOCK_C"] == 0,
        "INDEX_64": index_64(problem, strides, splits * problem.params),
        "PRECISION": target.precision(problem.dtype), "EMULATE_BF16": emulate_bf16(kernel, problem),
        **blocks,
    }  # fmt: skip
    tensors = {"x": x, "y": y} if pass_ == "fprop" else {"dy": dy, "x": x, "dx": dx}
    for name, its in tensors.items():
        width = problem.w_out if name in ("y", "dy") else problem.w_in
        scalars |= named_strides(name, its)
        scalars |= {f"{name.upper()}_DENSE": its[2] == width * its[3], f"{name.upper()}_ALIGN": align(its, axes)}
    scalars |= named_strides("wgt", w)
    grid = (math.ceil(channels / config["BLOCK_C"]), splits)
    if pass_ == "fprop":
        launch = launcher.Launch(kernel, grid, scalars | epilogue(problem), **options)
        return Forward(launch, problem, y)
    tap_rows, block_taps = _tap_tile(problem)
    scalars |= {
        "TAP_ROWS": tap_rows, "BLOCK_TAPS": block_taps,
        "WANT_DX": pass_ != "wgrad", "WANT_DW": pass_ != "dgrad",
    }  # fmt: skip
    result = FilterGradient(problem, splits, None if pass_ == "dgrad" else dw)
    launch = launcher.Launch(kernel, grid, scalars | result.depthwise_arguments(), **options)
    return call_of_backward(pass_, launch, problem, result, dx)
