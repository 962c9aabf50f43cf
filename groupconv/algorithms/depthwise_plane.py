"""Depthwise convolution of small maps as matrix products over the batch (kernels/depthwise_plane.py)."""

from __future__ import annotations

import dataclasses
import functools
import math

import triton

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels import depthwise_plane as kernels
from ..occupancy import largest_splits, most_splits, partial_bytes, resident, shares
from ..problem import ConvProblem
from .calls import (
    FilterGradient,
    Single,
    align,
    call_of_backward,
    emulate_bf16,
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
MOST_REGISTERS = {"fprop": 150, "dgrad": 150, "wgrad": 116, "backward": 90}  # as estimated: more spill


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
    if not candidates(problem, pass_, target):
        return f"no tile of {problem.layout} maps fits the memory and registers of {target.arch_name}"
    return None


@functools.lru_cache(256)  # `supports` and the plan both ask
def candidates(problem: ConvProblem, pass_: str, target: Target) -> list[dict]:
    found = []
    nhwc = problem.layout == "nhwc"
    rows = {_even(problem.h_out, most) for most in range(1, problem.h_out + 1)}
    tiles = set()
    for rows_out in rows:
        rows_in = min(problem.h_in, rows_out * problem.stride[0]) if rows_out < problem.h_out else problem.h_in
        tiles.add((_tile(rows_in * problem.w_in), _tile(rows_out * problem.w_out)))
    for block_in, block_out in sorted(tiles):
        for block_n in (32, 16) if nhwc else (128, 64, 32, 16):
            if block_n > _tile(problem.batch):
                continue
            for block_c in (8, 16) if nhwc else (1,):
                for warps in (4, 8):
                    config = {
                        "BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_IN": block_in, "BLOCK_OUT": block_out,
                        "num_warps": warps, "num_stages": 1,
                    }  # fmt: skip
                    if _fits(problem, pass_, config, target):
                        found.append(config)
    return found


def _tile(pixels: int) -> int:
    return max(16, triton.next_power_of_2(pixels))


def _fits(problem: ConvProblem, pass_: str, config: dict, target: Target) -> bool:
    chunks = cut(problem, config)
    warps, rows = config["num_warps"], [m for m, _ in _products(pass_, config)]
    alike = target.backend == "hip" or (target.has_warpgroups and any(64 <= m < 128 for m in rows))
    if config["BLOCK_C"] == 1 and warps == 8 and alike:
        return False  # warps would do the same rows,
    if any(config["BLOCK_C"] * m * n < 128 * warps for m, n in _products(pass_, config)):
        return False  # or these the same tiles
    products = chunks.pairs * (problem.cout_g if pass_ == "dgrad" else 1)
    if (
        target.matrix_unit == "tcgen05" and config["BLOCK_C"] == 1
    ):  # each product takes columns of tensor memory, of which 512 are
        columns = products * sum(n for m, n in _products(pass_, config) if m >= 64)
        if columns > 512:
            return False
    most = MOST_REGISTERS[pass_]
    if pass_ in ("wgrad", "backward") and config["BLOCK_C"] == 1 and _slow(pass_, config, target):
        most -= 10
    return (
        max(config["BLOCK_IN"], config["BLOCK_OUT"]) <= BLOCKS["BLOCK_IN"][1]
        and products * len(rows) <= MOST_PRODUCTS[pass_]
        and _registers(problem, pass_, config, chunks, target) <= most
        and shared_bytes(problem, pass_, config, chunks) <= target.shared_bytes
    )


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


def _registers(problem: ConvProblem, pass_: str, config: dict, chunks: Chunks, target: Target) -> float:
    """An estimate of what a thread holds in the loop. Elements loaded singly, or by two, need addresses; operands of
    mma.sync are in registers, those of 2-D products in more than one warp's."""
    held, entries, sums = _tiles(problem, pass_, config, chunks)
    words = problem.element_bytes / 4
    loaded = held * (words if _vector(problem, config, chunks) > 2 else 2)
    registers = (loaded + sums + _result(pass_, config)) / (32 * config["num_warps"])
    if config["BLOCK_C"] > 1:
        registers += (held if sums else entries / 2) * words / (32 * config["num_warps"])
    elif _slow(pass_, config, target):
        registers += held * words / 64
    return registers


def shared_bytes(problem: ConvProblem, pass_: str, config: dict, chunks: Chunks) -> int:
    """Matrices, the operands of products, and a result on its way to memory; or one accumulator to be gathered."""
    held, entries, sums = _tiles(problem, pass_, config, chunks)
    loop = (held + entries + _result(pass_, config)) * problem.element_bytes
    return max(loop, 4 * sums // max(1, chunks.distances))


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


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target) -> list[dict[str, int]]:
    whole = _whole(problem, config)
    blocks = max(1, math.ceil(problem.batch / config["BLOCK_N"]))
    most = min(blocks, MOST_SPLITS)
    if pass_ in ("wgrad", "backward"):
        most = min(most, most_splits(problem, pass_))
    channels = math.ceil((problem.c_out if pass_ in ("fprop", "wgrad") else problem.c_in) / config["BLOCK_C"])
    places = target.multiprocessors * _resident(problem, pass_, whole, cut(problem, whole), target)
    # Building the matrices takes about as long as a block of images.
    found = {shares(blocks, splits)[0] for splits in range(1, most + 1)}
    shortest = sorted(sorted(found), key=lambda n: math.ceil(channels * n / places) * (math.ceil(blocks / n) + 1))
    return [{"SPLITS": splits} for splits in shortest]


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target) -> Tiling:
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
        resident=_resident(problem, pass_, config, chunks, target),
        launches=2 if partials else 1,
    )  # fmt: skip


def _resident(problem: ConvProblem, pass_: str, config: dict, chunks: Chunks, target: Target) -> int:
    """Programs that share a multiprocessor."""
    registers = _registers(problem, pass_, config, chunks, target) + 56
    return resident(registers, shared_bytes(problem, pass_, config, chunks), config["num_warps"], target)


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
        launch = launcher.Launch(kernel, grid, scalars | {"HAS_BIAS": problem.bias}, **options)
        return Single(launch, problem.y_shape, y)
    tap_rows, block_taps = _tap_tile(problem)
    scalars |= {
        "TAP_ROWS": tap_rows, "BLOCK_TAPS": block_taps,
        "WANT_DX": pass_ != "wgrad", "WANT_DW": pass_ != "dgrad",
    }  # fmt: skip
    result = FilterGradient(problem, splits, None if pass_ == "dgrad" else dw)
    launch = launcher.Launch(kernel, grid, scalars | result.depthwise_arguments(), **options)
    return call_of_backward(pass_, launch, problem, result, dx)
