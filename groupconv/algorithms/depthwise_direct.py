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
    Forward,
    align,
    call_of_backward,
    emulate_bf16,
    epilogue,
    index_64,
    known,
    named_strides,
    pixels_last,
    split_config,
)

NAME = "depthwise_direct"
BLOCKS = {"BLOCK_P": (1, 4096), "BLOCK_C": (1, 256), "BLOCK_W": (1, 16), "BLOCK_A": (0, 4)}
MOST_SEGMENTS = 16
DIVISION = {"SEGMENTS": (1, MOST_SEGMENTS, 1)}  # of the rows
MOST_TAPS = 64  # of a filter, and twice as many of all that a channel meets: each is held in a register
UNIFORM_REGISTERS = 63  # of a warp: they hold the taps of a channel that all its threads share
MOST_PADDED = 1.25  # columns of all lanes over those that there are
WAYS = ((4, 1), (2, 1), (4, 2), (4, 0), (2, 2), (2, 0), (8, 1), (8, 2))  # (warps, steps that loads go ahead)
OFTEN = WAYS[:4]  # won on an H200, 2026-11-27
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
    """What the kernel's loop does in one step of a pass, by channel of a lane.

    Counted in pixels: `loads`, `held` in fp32 from step to step, `sums` of dw, `stores`, multiply-adds. `load_accesses`
    and `store_accesses` do it, of dense tensors in NCHW one for a run of neighbours; `asked` are all pixels of these.
    """

    lanes: int
    rows: int  # steps of all row segments
    warm_up: int  # steps that a segment, but the first of backward, spends on its neighbour's rows
    channels: int
    taps: int  # filters in registers
    loads: int
    load_accesses: int
    asked: int
    held: int
    moved: int  # of those that are held, from register to register
    sums: int
    stores: int
    store_accesses: int
    multiply_adds: int


def _runs(problem: ConvProblem, width: int, x=None, y=None) -> tuple[int, int]:
    """How many neighbours an access takes, as the kernel has it, of x and of y in lanes of `width` output columns.

    x, y: strides; None of tensors that are dense in the problem's layouts.
    """

    def run(lane, columns, strides):
        if "nhwc" in (problem.layout, problem.out_layout) or (strides and strides[3] != 1):
            return 1
        return math.gcd(16 // problem.element_bytes, lane, columns, *(strides or ())[:3])

    return run(width * problem.stride[1], problem.w_in, x), run(width, problem.w_out, y)


@functools.lru_cache(4096)
def _march(problem: ConvProblem, pass_: str, width: int) -> _March:
    (stride_h, stride_w), (dil_h, dil_w), kw = problem.stride, problem.dilation, problem.kw
    taps, multiplier = problem.kh * kw, problem.cout_g
    x_run, y_run = _runs(problem, width)
    if pass_ == "fprop":
        rows = len(kernels.input_rows_met(stride_h, dil_h, problem.kh))
        columns = kernels.input_columns_met(width, stride_w, dil_w, kw)
        runs = rows * (len(columns) if x_run == 1 else len(kernels.runs_met(columns, -problem.pad[2], x_run)))
        live = (problem.kh - 1) * dil_h // stride_h + 1
        return _March(
            lanes=problem.batch * math.ceil(problem.w_out / width), rows=problem.h_out, warm_up=live - 1,
            channels=problem.c_out, taps=taps, loads=rows * len(columns), load_accesses=runs, asked=runs * x_run,
            held=live * width, moved=0, sums=0, stores=width, store_accesses=width // y_run, multiply_adds=taps * width,
        )  # fmt: skip
    want_dx, want_dw = pass_ != "wgrad", pass_ != "dgrad"
    columns = kernels.output_columns_met(width, stride_w, problem.pad[2], dil_w, kw)
    least = kernels.least_shift(stride_w, problem.pad[2], dil_w, kw)
    runs = multiplier * (len(columns) if y_run == 1 else len(kernels.runs_met(columns, least, y_run)))
    pixels, live = width * stride_w, kernels.rows_alive(problem.kh, stride_h, dil_h)
    xs = want_dw * stride_h * pixels
    return _March(
        lanes=problem.batch * math.ceil(problem.w_in / pixels),
        rows=(problem.h_in - 1 + problem.pad[0]) // stride_h + 1,
        warm_up=(problem.kh - 1) * dil_h // stride_h,
        channels=problem.c_in,
        taps=want_dx * taps * multiplier,
        loads=len(columns) * multiplier + xs,
        load_accesses=runs + xs // x_run,
        asked=runs * y_run + xs,
        held=(want_dx + want_dw) * live * pixels,
        moved=want_dw * live * pixels,
        sums=want_dw * taps * multiplier,
        stores=want_dx * stride_h * pixels,
        store_accesses=want_dx * stride_h * pixels // x_run,
        multiply_adds=(want_dx + want_dw) * taps * multiplier * width,
    )


def _elements(problem: ConvProblem, config: dict, target: Target) -> tuple[int, int]:
    """(elements of a tile that a thread has, of which so many are neighbours and loaded by one instruction)."""
    elements = max(1, config["BLOCK_P"] * config["BLOCK_C"] // (target.warp_size * config["num_warps"]))
    vector = 16 // problem.element_bytes if problem.layout == "nhwc" else 1
    return elements, math.gcd(vector, elements, problem.c_in, config["BLOCK_C"])


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    """What a step loads is in flight at once, BLOCK_A steps of it."""
    march, (elements, vector) = _march(problem, pass_, tile["BLOCK_W"]), _elements(problem, tile, target)
    threads, size = target.warp_size * tile["num_warps"], problem.element_bytes
    words = march.loads * (tile["BLOCK_A"] + 1) * size / 4
    if problem.layout == "nhwc":
        taps = march.taps * vector
    else:
        taps, words = max(0, march.taps - UNIFORM_REGISTERS), words * 4 / size
    return Held(
        tile["num_warps"],
        0,
        sums=threads * elements * (march.held + march.sums),
        words=threads * (taps + words * elements),
        accesses=threads * elements * (march.load_accesses + march.store_accesses) / vector,
    )


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    for (warps, ahead), (elements, block_c), width in itertools.product(WAYS, *_shapes(problem, pass_)):
        block_p = warps * target.warp_size * elements // block_c
        march = _march(problem, pass_, width)
        # In NCHW neighbouring lanes are neighbours in memory, and the columns of one are not, but in runs.
        if problem.layout == "nchw" and width > 1 and (elements > 2 or min(_runs(problem, width)) == 1):
            continue
        if not block_p or march.lanes * width > MOST_PADDED * _march(problem, pass_, 1).lanes:
            continue
        # Programs along the columns and the batch cannot share their sums of dw.
        if not march.sums or math.ceil(march.lanes / block_p) <= largest_splits(problem, pass_):
            yield [
                {"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_W": width, "BLOCK_A": ahead, "num_warps": warps,
                 "num_stages": 1}
            ]  # fmt: skip


def seldom(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> bool:
    """Whether few tiles like this won, or ptxas would make one with less care than others."""
    way = tile["num_warps"], tile["BLOCK_A"]
    # Offsets of x, dx and dy would be one factor's products, shifted apart: see assembler.shifts_products_apart.
    careful = pass_ == "backward" and target.backend == "cuda" and tile["BLOCK_W"] > 1 and problem.stride[1] % 2 == 0
    return careful or way not in OFTEN or (tile["BLOCK_C"] == 128 and way != OFTEN[0])


def _shapes(problem: ConvProblem, pass_: str) -> tuple[list[tuple[int, int]], list[int]]:
    """(elements of a thread, channels of a program) and columns of a lane to choose from."""
    if problem.layout == "nchw":
        # 16 columns of several rows take Triton several times as long to compile, and win 1 to 2% (modelled).
        one_row = max(problem.h_in, problem.h_out) == 1
        return [(elements, 1) for elements in (1, 2, 4, 8, 16)], [1, 2, 4, 8, 16] if one_row else [1, 2, 4, 8]
    channels = problem.c_out if pass_ == "fprop" else problem.c_in
    fitting = max(8, triton.next_power_of_2(channels))
    vectors = [v for v in (1, 2, 4, 8) if v <= math.gcd(16 // problem.element_bytes, problem.c_in)]
    # One channel a thread where the filters of two would take its registers.
    vectors = vectors if 2 * problem.kh * problem.kw * problem.cout_g > MOST_TAPS else vectors[-3:]
    blocks = [c for c in (16, 32, 64, 128) if c <= fitting] or [8]
    return [(v, c) for c in blocks for v in vectors if v <= c], [1, 2, 4, 8]


def _tiles(march: _March, config: dict) -> tuple[int, int]:
    """Programs of a row segment: along columns and batch, and along the channels."""
    return math.ceil(march.lanes / config["BLOCK_P"]), math.ceil(march.channels / config["BLOCK_C"])


def _most_segments(problem: ConvProblem, pass_: str, config: dict) -> int:
    """The most row segments whose partial sums of dw have room beside the operands."""
    march = _march(problem, pass_, config["BLOCK_W"])
    most = min(march.rows, MOST_SEGMENTS)
    if march.sums:
        most = min(most, largest_splits(problem, pass_) // max(1, _tiles(march, config)[0]))
    return max(1, most)


def _grid(problem: ConvProblem, pass_: str, config: dict) -> tuple[int, int, int]:
    """(programs of a row segment, segments, steps a segment)."""
    march = _march(problem, pass_, config["BLOCK_W"])
    segments = min(config["SEGMENTS"], _most_segments(problem, pass_, config))
    return math.prod(_tiles(march, config)), *shares(march.rows, segments)


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    march = _march(problem, pass_, config["BLOCK_W"])
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
    march, (elements, vector) = _march(problem, pass_, config["BLOCK_W"]), _elements(problem, config, target)
    tiles, segments, steps = _grid(problem, pass_, config)
    programs, size = tiles * segments, problem.element_bytes
    threads, ahead = target.warp_size * config["num_warps"], config["BLOCK_A"]
    # Steps of all programs; the first row segment of a backward pass has no rows before it.
    walked = programs * (steps + march.warm_up) - tiles * march.warm_up * (pass_ != "fprop")
    # Counted in the compiled loops of sm_90: an access takes its address and mask 6 instructions, and each element is
    # converted; what is loaded far ahead, and x in wgrad, is moved from register to register.
    each = march.load_accesses * (7 + 6 * (ahead > 1)) + march.store_accesses * 6
    each += (march.loads + march.stores) * vector
    step = 25 + (each + (march.multiply_adds + march.moved) * vector) * elements / vector
    once = march.taps * vector * 3 + (march.sums + 12) * elements + 20 * march.sums + 80
    # Lanes share what they load in L1, but for the tile's edges; a row segment re-reads its neighbour's rows.
    again = 1 + march.warm_up / steps * (segments > 1)
    halo = 1 + (problem.kw - 1) * problem.dilation[1] / (config["BLOCK_P"] * config["BLOCK_W"] * problem.stride[1])
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
        instructions=walked * threads * step + programs * threads * once,
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=1 + (splits > 1),
        shared_bytes=walked * threads * elements * max(march.asked * size * lines, march.load_accesses * 4 / vector),
        trips=steps + march.warm_up,
        ahead=ahead,
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    march, (tiles, segments, steps) = _march(problem, pass_, config["BLOCK_W"]), _grid(problem, pass_, config)
    kernel = kernels.fprop_kernel if pass_ == "fprop" else kernels.backward_kernel
    blocks, options = split_config(config)
    x, w, y, dx, dw, dy = (strides.get(name) for name in ("x", "w", "y", "dx", "dw", "dy"))
    splits = _tiles(march, config)[0] * segments
    last = pixels_last(x if pass_ == "fprop" else dy)
    # Triton cannot compile a hint on a tile of one element.
    runs = last and config["BLOCK_P"] * config["BLOCK_C"] > 1
    x_run, y_run = _runs(problem, config["BLOCK_W"], x, y if pass_ == "fprop" else dy) if runs else (1, 1)
    scalars = {
        "batch": problem.batch, "h_in": problem.h_in, "w_in": problem.w_in,
        "h_out": problem.h_out, "w_out": problem.w_out, "steps": steps,
        **named_strides("x", x), **named_strides("wgt", w),
        "CHANNELS": known(problem, march.channels), "MULTIPLIER": problem.cout_g, "KH": problem.kh, "KW": problem.kw,
        "CONV_STRIDE_H": problem.stride[0], "CONV_STRIDE_W": problem.stride[1],
        "PAD_H": problem.pad[0], "PAD_W": problem.pad[2], "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
        "MASK_C": march.channels % config["BLOCK_C"] != 0, "PIXELS_LAST": last, "X_ALIGN": align(x),
        "INDEX_64": index_64(problem, strides, splits * problem.params),
        "EMULATE_BF16": emulate_bf16(kernel, problem), **blocks,
    }  # fmt: skip
    if pass_ == "fprop":
        scalars |= {**named_strides("y", y), **epilogue(problem), "X_RUN": x_run, "Y_ALIGN": align(y), "Y_RUN": y_run}
        launch = launcher.Launch(kernel, (tiles, segments), scalars, {"X_RUN": 1}, (0,), **options)
        return Forward(launch, problem, y)
    result = FilterGradient(problem, splits, dw if march.sums else None)
    scalars |= {
        **result.depthwise_arguments(), **named_strides("dy", dy), **named_strides("dx", dx),
        "DY_ALIGN": align(dy), "DX_ALIGN": align(dx),
        "DY_RUN": y_run, "X_RUN": x_run if march.sums else 1,
        "DX_RUN": _runs(problem, config["BLOCK_W"], dx)[0] if runs and pass_ != "wgrad" else 1,
        "WANT_DX": pass_ != "wgrad", "WANT_DW": pass_ != "dgrad",
    }  # fmt: skip
    launch = launcher.Launch(kernel, (tiles, segments), scalars, {"DY_RUN": 1, "X_RUN": 1}, (0, 1), **options)
    return call_of_backward(pass_, launch, problem, result, dx)
