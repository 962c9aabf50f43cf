"""Depthwise convolution by multiply-adds, for small kernels (kernels/depthwise_direct.py)."""

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
from ..kernels import depthwise_direct as kernels
from ..occupancy import Held, largest_splits, partial_bytes, shares
from ..problem import ConvProblem
from .calls import (
    FilterGradient,
    Single,
    align,
    call_of_backward,
    emulate_bf16,
    index_64,
    named_strides,
    pixels_last,
    split_config,
)

NAME = "depthwise_direct"
BLOCKS = {"BLOCK_P": (1, 4096), "BLOCK_C": (1, 256)}
MOST_SEGMENTS = 16
DIVISION = {"SEGMENTS": (1, MOST_SEGMENTS, 1)}  # of the rows
MOST_TAPS = 64  # of a filter, and twice as many of all that a channel meets: each is held in a register
UNIFORM_REGISTERS = 63  # of a warp: they hold the taps of a channel that all its threads share
BUSY = 4  # programs that keep a multiprocessor's memory pipeline busy


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if problem.cin_g != 1:
        return f"{problem.cin_g} input channels a group, not 1"
    if min(problem.x_shape[1:] + problem.w_shape) < 1:
        return "a channel or pixel count is zero"
    taps = problem.kh * problem.kw
    met = taps * (1 if pass_ == "fprop" else problem.cout_g)
    if taps > MOST_TAPS or met > 2 * MOST_TAPS:
        return f"{taps} taps, {met} with the channel multiplier, more than {MOST_TAPS} and {2 * MOST_TAPS}"
    return None


@dataclasses.dataclass(frozen=True)
class _March:
    """What the kernel's loop does in one step of a pass, by thread element: one column, or CONV_STRIDE_W in backward.

    Counted in tiles: `loads` of activations, `held` in fp32 from step to step, `sums` of dw, `stores`, multiply-adds.
    """

    columns: int  # batch x columns, flattened
    rows: int  # steps of all row segments
    warm_up: int  # steps that a segment, but the first of backward, spends on its neighbour's rows
    channels: int
    taps: int  # filters in registers
    loads: int
    held: int
    sums: int
    stores: int
    multiply_adds: int


@functools.lru_cache(4096)
def _march(problem: ConvProblem, pass_: str) -> _March:
    stride_h, stride_w = problem.stride
    dil_h, dil_w = problem.dilation
    taps, multiplier = problem.kh * problem.kw, problem.cout_g
    if pass_ == "fprop":
        residues = len({r * dil_h % stride_h for r in range(problem.kh)})
        live = (problem.kh - 1) * dil_h // stride_h + 1
        return _March(
            columns=problem.batch * problem.w_out, rows=problem.h_out, warm_up=live - 1, channels=problem.c_out,
            taps=taps, loads=residues * problem.kw, held=live, sums=0, stores=1, multiply_adds=taps,
        )  # fmt: skip
    want_dx, want_dw = pass_ != "wgrad", pass_ != "dgrad"
    reaches = (problem.pad[2] - s * dil_w + phase for s in range(problem.kw) for phase in range(stride_w))
    shifts = len({reach // stride_w for reach in reaches if reach % stride_w == 0})
    held = max((problem.kh - 1) * dil_h + 1, stride_h) * stride_w
    return _March(
        columns=problem.batch * math.ceil(problem.w_in / stride_w),
        rows=(problem.h_in - 1 + problem.pad[0]) // stride_h + 1,
        warm_up=(problem.kh - 1) * dil_h // stride_h,
        channels=problem.c_in,
        taps=want_dx * taps * multiplier,
        loads=shifts * multiplier + want_dw * stride_h * stride_w,
        held=(want_dx + want_dw) * held,
        sums=want_dw * taps * multiplier,
        stores=want_dx * stride_h * stride_w,
        multiply_adds=(want_dx + want_dw) * taps * multiplier,
    )


def _elements(problem: ConvProblem, config: dict, target: Target) -> tuple[int, int]:
    """(elements a thread, of which so many are neighbouring channels and loaded by one instruction)."""
    elements = max(1, config["BLOCK_P"] * config["BLOCK_C"] // (target.warp_size * config["num_warps"]))
    vector = 16 // problem.element_bytes if problem.layout == "nhwc" else 1
    return elements, math.gcd(vector, elements, problem.c_in, config["BLOCK_C"])


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    """All loads of a step are in flight at once."""
    march, (elements, vector) = _march(problem, pass_), _elements(problem, tile, target)
    threads = target.warp_size * tile["num_warps"]
    if problem.layout == "nhwc":
        taps, words = march.taps * vector, march.loads * problem.element_bytes / 4
    else:
        taps, words = max(0, march.taps - UNIFORM_REGISTERS), march.loads
    return Held(
        tile["num_warps"],
        0,
        sums=threads * elements * (march.held + march.sums),
        words=threads * (taps + words * elements),
        accesses=threads * elements * (march.loads + march.stores) / vector,
    )


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    march = _march(problem, pass_)
    fitting = triton.next_power_of_2(march.channels)
    widths = [c for c in (8, 16, 32, 64, 128) if c <= max(8, fitting)] if problem.layout == "nhwc" else [1]
    for block_c, elements in itertools.product(widths, (1, 2, 4, 8, 16)):
        block_p = elements * 4 * target.warp_size // block_c
        # Programs along the columns and the batch cannot share their sums of dw.
        if block_p and (not march.sums or math.ceil(march.columns / block_p) <= largest_splits(problem, pass_)):
            yield [{"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 1}]


def _tiles(march: _March, config: dict) -> tuple[int, int]:
    """Programs of a row segment: along columns and batch, and along the channels."""
    return math.ceil(march.columns / config["BLOCK_P"]), math.ceil(march.channels / config["BLOCK_C"])


def _most_segments(problem: ConvProblem, pass_: str, config: dict) -> int:
    """The most row segments whose partial sums of dw have room beside the operands."""
    march = _march(problem, pass_)
    most = min(march.rows, MOST_SEGMENTS)
    if march.sums:
        most = min(most, largest_splits(problem, pass_) // max(1, _tiles(march, config)[0]))
    return max(1, most)


def _grid(problem: ConvProblem, pass_: str, config: dict) -> tuple[int, int, int]:
    """(programs of a row segment, segments, steps a segment)."""
    march = _march(problem, pass_)
    segments = min(config["SEGMENTS"], _most_segments(problem, pass_, config))
    return math.prod(_tiles(march, config)), *shares(march.rows, segments)


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    march = _march(problem, pass_)
    tiles = math.prod(_tiles(march, config))
    busy = min(BUSY, fit)

    def end(segments):
        programs = max(busy, math.ceil(tiles * segments / target.multiprocessors))
        return programs * (math.ceil(march.rows / segments) + march.warm_up + 1)

    found = sorted(range(1, _most_segments(problem, pass_, config) + 1), key=end)
    # The one that ends the march soonest, and powers of two.
    tried = dict.fromkeys([found[0], *(segments for segments in found if segments.bit_count() == 1)])
    return [{"SEGMENTS": segments} for segments in tried]


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    march, (elements, vector) = _march(problem, pass_), _elements(problem, config, target)
    tiles, segments, steps = _grid(problem, pass_, config)
    programs, size = tiles * segments, problem.element_bytes
    threads = target.warp_size * config["num_warps"]
    # Steps of all programs; the first row segment of a backward pass has no rows before it.
    walked = programs * (steps + march.warm_up) - tiles * march.warm_up * (pass_ != "fprop")
    # Counted in the compiled loops of sm_90: a load's address, mask and conversions; a rotation of the sums.
    instructions = march.multiply_adds + march.loads * (1 + 6 / vector) + march.held + 2 * march.stores + 1
    once = march.taps * vector * 3 + (march.sums + 12) * elements + 20 * march.sums + 80
    # What is loaded once a tap comes from L1 but for the tile's edges; a row segment re-reads its neighbour's rows.
    again = 1 + march.warm_up / steps * (segments > 1)
    halo = 1 + (problem.kw - 1) * problem.dilation[1] / (config["BLOCK_P"] * problem.stride[1])
    sector = max(1.0, 32 / (config["BLOCK_C"] * size)) if problem.layout == "nhwc" else 1.0
    splits = _tiles(march, config)[0] * segments if march.sums else 1
    partials = partial_bytes(problem, splits)
    # L1 serves a line of 128 bytes a clock: narrow channel tiles touch many.
    split = problem.layout == "nhwc" and config["BLOCK_C"] < march.channels
    lines = max(1.0, 128 / (config["BLOCK_C"] * size)) if split else 1.0
    return Tiling(
        programs=programs,
        matrix_flops=0.0,
        l2_bytes=problem.min_bytes(pass_) * again * halo * sector + partials,
        instructions=walked * threads * elements * instructions + programs * threads * once,
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=1 + (splits > 1),
        shared_bytes=walked * threads * elements * march.loads * max(size * lines, 4 / vector),
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    march, (tiles, segments, steps) = _march(problem, pass_), _grid(problem, pass_, config)
    kernel = kernels.fprop_kernel if pass_ == "fprop" else kernels.backward_kernel
    blocks, options = split_config(config)
    x, w, y, dx, dw, dy = (strides.get(name) for name in ("x", "w", "y", "dx", "dw", "dy"))
    splits = _tiles(march, config)[0] * segments
    scalars = {
        "batch": problem.batch, "h_in": problem.h_in, "w_in": problem.w_in,
        "h_out": problem.h_out, "w_out": problem.w_out, "steps": steps,
        **named_strides("x", x), **named_strides("wgt", w),
        "CHANNELS": march.channels, "MULTIPLIER": problem.cout_g, "KH": problem.kh, "KW": problem.kw,
        "CONV_STRIDE_H": problem.stride[0], "CONV_STRIDE_W": problem.stride[1],
        "PAD_H": problem.pad[0], "PAD_W": problem.pad[2], "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
        "PIXELS_LAST": pixels_last(x if pass_ == "fprop" else dy), "X_ALIGN": align(x),
        "INDEX_64": index_64(problem, strides, splits * problem.params),
        "EMULATE_BF16": emulate_bf16(kernel, problem), **blocks,
    }  # fmt: skip
    if pass_ == "fprop":
        scalars |= {**named_strides("y", y), "HAS_BIAS": problem.bias, "Y_ALIGN": align(y)}
        return Single(launcher.Launch(kernel, (tiles, segments), scalars, **options), problem.y_shape, y)
    result = FilterGradient(problem, splits, dw if march.sums else None)
    scalars |= {
        **result.depthwise_arguments(), **named_strides("dy", dy), **named_strides("dx", dx),
        "DY_ALIGN": align(dy), "DX_ALIGN": align(dx),
        "WANT_DX": pass_ != "wgrad", "WANT_DW": pass_ != "dgrad",
    }  # fmt: skip
    launch = launcher.Launch(kernel, (tiles, segments), scalars, **options)
    return call_of_backward(pass_, launch, problem, result, dx)
