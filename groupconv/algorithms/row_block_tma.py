"""The blocks of rows of row_block with tensor descriptors, for sm_90 and later (kernels/row_block_tma.py)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import torch

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels import row_block_tma as kernels
from ..occupancy import Held, partial_bytes
from ..problem import ConvProblem, dense_strides
from .calls import (
    FilterGradient,
    Forward,
    Single,
    SplitK,
    align,
    convolution,
    emulate_bf16,
    epilogue,
    index_64,
    named_strides,
    split_config,
)
from .gemm import MOST_SPLITS, product, registers_for_all, split, splits_to_try, waits
from .row_block import heights, met_counts, row_blocks, work_of

NAME = "row_block_tma"
BLOCKS = {
    "BLOCK_R": (1, 16, 1), "BLOCK_T": (1, 16, 1), "BLOCK_M": (16, 256), "BLOCK_I": (1, 256),
    "BLOCK_N": (16, 256, 16), "BLOCK_K": (16, 256),
}  # fmt: skip
# SPLITS: of wgrad's blocks. RESIDENT: programs of a multiprocessor, in the other passes, which are persistent.
DIVISION = {"SPLITS": (1, MOST_SPLITS, 1), "RESIDENT": (1, 32, 1)}
NARROW = 40  # channels of a group: up to there it took 1.2 to 9 times as long as the best on an H200, 2026-11-27
MOST_TAPS = 7  # kernel rows
TENSOR_MEMORY = 512  # columns of tcgen05's, half of them for the tile that comes next
INSTRUCTIONS_A_LOAD = 40  # of the one warp that asks for a tile
INSTRUCTIONS_A_STEP = 120  # of each thread, to wait and to go on
MOST_PADDING = 1.25  # of lanes
FEW_BLOCKS = 3  # of rows in a map


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if pass_ == "backward":
        return "no kernel for both gradients"
    if not target.has_descriptors:
        return f"{target.arch_name} has no tensor descriptors"
    if problem.element_bytes != 2:
        return f"{problem.dtype}: descriptors are for fp16 and bf16"
    if problem.layout != "nhwc":
        return "descriptors need channels_last"
    if min(problem.x_shape[1:] + problem.w_shape) < 1:
        return "a channel or pixel count is zero"
    if problem.cin_g % 8 or problem.cout_g % 8:
        return f"groups of {problem.cin_g} and {problem.cout_g} channels do not begin at multiples of 16 bytes"
    if problem.kh > MOST_TAPS:
        return f"{problem.kh} kernel rows, more than {MOST_TAPS}"
    if pass_ == "dgrad":
        for size, stride, dilation in zip((problem.kh, problem.kw), problem.stride, problem.dilation, strict=True):
            if size < stride or (stride > 1 and dilation > 1):
                return "some phase of the stride meets no tap"
    return None


@dataclasses.dataclass(frozen=True)
class _Lanes:
    """The pixels of a row as lanes of tiles: their columns and images, and how many tiles of each."""

    columns: int
    column_tiles: int
    image_tiles: int


def _lanes(problem: ConvProblem, pass_: str, config: dict) -> _Lanes:
    width = math.ceil(problem.w_in / problem.stride[1]) if pass_ == "dgrad" else problem.w_out
    images = config["BLOCK_I"]
    columns = config["BLOCK_K" if pass_ == "wgrad" else "BLOCK_M"] // images
    return _Lanes(columns, math.ceil(width / columns), math.ceil(problem.batch / images))


@functools.lru_cache(1024)
def _images(problem: ConvProblem, pass_: str, lanes: int) -> list[int]:
    """The images that a tile of so many lanes may have: fewest tiles, and, of about as few, one axis of lanes."""
    found = []
    for images in (2**i for i in range(lanes.bit_length())):
        made = _lanes(problem, pass_, {"BLOCK_I": images, "BLOCK_M": lanes, "BLOCK_K": lanes})
        strided = pass_ != "dgrad" and problem.stride[1] > 1
        if strided and made.columns > 1 and problem.w_in % problem.stride[1]:
            continue  # in a view of every second column the last one would be followed by the next row's first
        found.append((made.column_tiles * made.image_tiles, images))
    fewest, images = min(found)
    one_axis = [(tiles, n) for tiles, n in found if n in (1, lanes) and tiles <= MOST_PADDING * fewest]
    return sorted({images} | ({min(one_axis)[1]} if one_axis else set()))


def _part(block_n: int) -> int:
    """The largest power of two that divides a width: its parts are alike, and one descriptor brings them."""
    return block_n & -block_n


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one step of a program's loop handles, in elements of tiles; how many loads, products, and sums."""

    source: int
    other: int
    loads: int
    products: int
    sums: int


def _step(problem: ConvProblem, pass_: str, config: dict) -> _Step:
    block_r, taps, bm, bn, bk = map(config.__getitem__, ("BLOCK_R", "BLOCK_T", "BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return _step_of(problem, pass_, block_r, taps, bm, bn, bk)


@functools.lru_cache(4096)
def _step_of(problem: ConvProblem, pass_: str, block_r: int, taps: int, bm: int, bn: int, bk: int) -> _Step:
    parts = bn // _part(bn)
    products, _, rows = met_counts(problem, pass_, block_r)
    if taps == 1 and problem.kh > 1:  # one kernel row in a step
        sources, products, weights = block_r, block_r, 1
    else:
        sources, weights = rows, problem.kh
    if pass_ == "wgrad":
        other = block_r * bn * bk
        return _Step(sources * bm * bk, other, sources + block_r * parts, products, problem.kh * bm * bn)
    return _Step(sources * bm * bk, weights * bn * bk, sources + weights * parts, products, block_r * bm * bn)


def _steps(problem: ConvProblem, pass_: str, config: dict) -> float:
    """Steps of a tile, but in wgrad of one split of all; the mean over the phases of a stride."""
    chunked, phases = (problem.cout_g, problem.stride[1]) if pass_ == "dgrad" else (problem.cin_g, 1)
    taps = problem.kw / phases
    return math.ceil(chunked / config["BLOCK_K"]) * taps * (problem.kh // config["BLOCK_T"])


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    work = work_of(problem, pass_)
    kernel_rows = {problem.kh} if pass_ == "wgrad" or (pass_ == "dgrad" and problem.stride[0] > 1) else {problem.kh, 1}
    depths = (32,) if target.matrix_unit == "mma.sync" else (64, 32)  # mma.sync has its operands in registers
    for block_r, taps, bn in itertools.product(_heights(problem, pass_), sorted(kernel_rows), _columns(work.n)):
        for bm, bk in itertools.product((128, 64), depths):
            for images in _images(problem, pass_, bk if pass_ == "wgrad" else bm):
                tile = {
                    "BLOCK_R": block_r, "BLOCK_T": taps, "BLOCK_M": bm, "BLOCK_I": images, "BLOCK_N": bn, "BLOCK_K": bk,
                    "num_warps": 4 if target.matrix_unit == "tcgen05" else bm // 16,
                }  # fmt: skip
                if target.matrix_unit == "tcgen05" and not _in_tensor_memory(problem, pass_, tile):
                    continue
                a_stage = _shared_bytes(problem, pass_, tile | {"num_stages": 1}, target)
                once = _shared_bytes(problem, pass_, tile | {"num_stages": 0}, target)
                stages = min(4, (target.shared_bytes - once) // (a_stage - once))  # as many as there is room for
                if stages >= 2:
                    yield [tile | {"num_stages": stages}]


def seldom(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> bool:
    """Whether it is one of many for narrow groups, for which no tile of this algorithm is much good."""
    narrow = max(problem.cin_g, problem.cout_g) <= NARROW
    return target.matrix_unit == "wgmma" and narrow and tile["BLOCK_R"] > _heights(problem, pass_)[0]


@functools.lru_cache(1024)  # asked for each tile of narrow groups
def _heights(problem: ConvProblem, pass_: str) -> list[int]:
    """Rows of a block: powers of two, what divides a map evenly, and what divides it into few blocks."""
    work = work_of(problem, pass_)

    def good(rows):
        blocks = row_blocks(work, rows)
        return rows.bit_count() == 1 or blocks * rows == work.rows or blocks <= FEW_BLOCKS

    return [rows for rows in heights(problem, pass_, work) if good(rows)]


def _in_tensor_memory(problem: ConvProblem, pass_: str, tile: dict) -> bool:
    """Whether the sums of two tiles fit; and a product takes about 1.5 columns of tensor memory for each of N."""
    step = _step(problem, pass_, tile)
    return max(2 * step.sums // tile["BLOCK_M"], step.products * tile["BLOCK_N"] * 3 // 2) <= TENSOR_MEMORY


def _columns(n: int) -> list[int]:
    """Columns of a tile, in parts of at least 32: for each number of tiles that may share N, the least."""
    found = set()
    for tiles in range(math.ceil(n / 256), math.ceil(n / 64) + 1):
        for part in (32, 64, 128, 256):
            size = math.ceil(n / tiles / part) * part
            if size <= 256 and size // _part(size) <= 4:
                found.add(size)
    return sorted(found)


def _shared_bytes(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> int:
    """The pipeline's tiles, and in the passes that store while they load, a tile of the result."""
    step = _step(problem, pass_, tile)
    stored = 0 if pass_ == "wgrad" else tile["BLOCK_M"] * _part(tile["BLOCK_N"])
    shared = ((step.source + step.other) * tile["num_stages"] + stored) * problem.element_bytes
    return 1024 + (shared * 3 // 2 if target.matrix_unit == "tcgen05" else shared)


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    step, part = _step(problem, pass_, tile), _part(tile["BLOCK_N"])
    return Held(
        tile["num_warps"],
        _shared_bytes(problem, pass_, tile, target),
        sums=step.sums,
        words=step.source * problem.element_bytes / 4 * _two_axes(pass_, tile),  # rows of products are in registers
        accesses=target.warp_size * tile["num_warps"] * (tile["BLOCK_N"] // part),  # an address for each part
    )


def _tiles(problem: ConvProblem, pass_: str, config: dict) -> int:
    """Tiles of the result; in wgrad, of one split."""
    work, lanes = work_of(problem, pass_), _lanes(problem, pass_, config)
    columns = math.ceil(work.n / config["BLOCK_N"]) * problem.groups
    if pass_ == "wgrad":
        return columns * math.ceil(problem.cin_g / config["BLOCK_M"]) * problem.kw
    return columns * work.phases * row_blocks(work, config["BLOCK_R"]) * lanes.column_tiles * lanes.image_tiles


def _blocks(problem: ConvProblem, config: dict) -> int:
    """Blocks of pixels that wgrad reduces over."""
    lanes = _lanes(problem, "wgrad", config)
    return row_blocks(work_of(problem, "wgrad"), config["BLOCK_R"]) * lanes.column_tiles * lanes.image_tiles


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    if pass_ != "wgrad":
        return [{"SPLITS": 1, "RESIDENT": fit}]
    tiles = _tiles(problem, "wgrad", config)
    tried = splits_to_try(problem, _blocks(problem, config), tiles, fit, target)
    return [{"SPLITS": splits, "RESIDENT": 1} for splits in tried]


def _split(problem: ConvProblem, pass_: str, config: dict) -> tuple[int, int]:
    """(splits, blocks of each)."""
    return split(problem, _blocks(problem, config), config["SPLITS"]) if pass_ == "wgrad" else (1, 0)


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    splits, _ = _split(problem, pass_, config)
    step, tiles = _step(problem, pass_, config), _tiles(problem, pass_, config)
    size, threads = problem.element_bytes, target.warp_size * config["num_warps"]
    steps = tiles * (_blocks(problem, config) if pass_ == "wgrad" else _steps(problem, pass_, config))
    partials = partial_bytes(problem, splits)
    each = product(config["BLOCK_M"], _part(config["BLOCK_N"]), config["BLOCK_K"], config["num_warps"], size, target)
    parts = config["BLOCK_N"] // _part(config["BLOCK_N"])
    chained = steps * parts * max(0, step.products - (problem.kh if pass_ == "wgrad" else config["BLOCK_R"]))
    starts = tiles * splits if pass_ == "wgrad" else 0  # the other kernels are persistent
    return Tiling(
        programs=tiles * splits,
        matrix_flops=steps * step.products * parts * each.flops,
        l2_bytes=steps * (step.source + step.other) * size * _inside(problem, pass_, config) + partials,
        instructions=steps * (32 * step.loads * INSTRUCTIONS_A_LOAD + threads * INSTRUCTIONS_A_STEP)
        + steps * step.products * parts * each.instructions
        + 4.0 * tiles * splits * step.sums,
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=1 + (splits > 1),
        shared_bytes=steps * ((step.source + step.other) * size + step.products * parts * each.shared_bytes),
        trips=steps / max(1, tiles * splits),
        ahead=config["num_stages"] - 1,
        waits=waits(each, starts, steps, chained, config["num_warps"], fit, problem.dtype, target),
    )


def _inside(problem: ConvProblem, pass_: str, config: dict) -> float:
    """The share of what loads ask for that lies in the group: L2 is not asked for the rest."""
    chunk = config["BLOCK_M" if pass_ == "wgrad" else "BLOCK_K"]
    width = problem.cout_g if pass_ == "dgrad" else problem.cin_g
    return width / (math.ceil(width / chunk) * chunk)


class _Operand:
    """A tensor as kernels see it: through a view, and copied first where its strides or address do not allow one."""

    __slots__ = ("copy", "dense", "shape", "view")

    def __init__(self, shape, strides, view, packed: bool = False):
        """view: made of strides. packed: pixels must lie next to each other, too."""
        self.shape, self.dense = shape, dense_strides(shape, True)
        # What an axis of one element has for a stride means nothing.
        strides = tuple(d if n == 1 else s for n, s, d in zip(shape, strides, self.dense, strict=True))
        good = strides[1] == 1 and all(s > 0 and s % 8 == 0 for s in (strides[0], *strides[2:]))
        self.copy = not good or (packed and strides != self.dense)
        self.view = view(self.dense if self.copy else strides)

    def of(self, tensor: torch.Tensor):
        if self.copy or tensor.data_ptr() % 16:
            tensor = launcher.allocate(self.shape, self.dense, tensor).copy_(tensor)
        return self.view.of(tensor)


def _pixels(problem: ConvProblem, shape, strides, lanes: int, images: int, channels: int, view_w: int = 1) -> _Operand:
    """An activation; see kernels/row_block_tma.py. channels: of a load."""
    n, c, h, w = shape
    width = c // problem.groups

    def view(strides):
        columns = (w // view_w, strides[3] * view_w, lanes // images)
        axes = [(problem.groups * view_w, width, 1), (h, strides[2], 1), columns]
        axes.insert(1 if images == 1 else 3, (n, strides[0], images))
        sizes, steps, box = zip(*axes, (width, 1, channels), strict=True)
        return launcher.View(sizes, steps, box, problem.element_bytes)

    return _Operand(shape, strides, view, packed=view_w > 1)


def _weights(problem: ConvProblem, strides, outs: int, ins: int) -> _Operand:
    """The weight as [groups, COUT_G, taps, CIN_G]; a load brings outs x ins of a tap."""

    def view(strides):
        sizes = (problem.groups, problem.cout_g, problem.kh * problem.kw, problem.cin_g)
        steps = (problem.cout_g * strides[0], strides[0], strides[3], 1)
        return launcher.View(sizes, steps, (1, outs, 1, ins), problem.element_bytes)

    return _Operand(problem.w_shape, strides, view, packed=True)


def _two_axes(pass_: str, config: dict) -> bool:
    """Whether lanes have two axes: a product's rows are then in registers."""
    return config["BLOCK_I"] not in (1, config["BLOCK_K" if pass_ == "wgrad" else "BLOCK_M"])


def _landed(problem: ConvProblem, pass_: str, config: dict, target: Target) -> bool:
    """Whether a step's products must be waited for; see kernels/row_block_tma.py."""
    flattened = pass_ == "fprop" or (pass_ == "dgrad" and problem.stride[1] == 1)
    return target.matrix_unit == "wgmma" and (flattened or _two_axes(pass_, config))


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    splits, chunk = _split(problem, pass_, config)
    lanes, part = _lanes(problem, pass_, config), _part(config["BLOCK_N"])
    blocks, options = split_config(config)
    kernel = {"fprop": kernels.fprop_kernel, "dgrad": kernels.dgrad_kernel, "wgrad": kernels.wgrad_kernel}[pass_]
    options = registers_for_all(options, target)
    images, bm, bk = config["BLOCK_I"], config["BLOCK_M"], config["BLOCK_K"]
    scalars = {
        **convolution(problem),
        "row_blocks": row_blocks(work_of(problem, pass_), config["BLOCK_R"]),
        "column_tiles": lanes.column_tiles, "image_tiles": lanes.image_tiles,
        "INDEX_64": index_64(problem, strides, splits * problem.params),
        "PRECISION": target.precision(problem.dtype),
        "EMULATE_BF16": emulate_bf16(kernel, problem),
        "PART_N": part, "LANDED": _landed(problem, pass_, config, target), **blocks,
    }  # fmt: skip
    tiles = _tiles(problem, pass_, config)
    programs = min(tiles, target.multiprocessors * config["RESIDENT"])
    view_w = problem.stride[1] if lanes.columns > 1 else 1
    if pass_ == "fprop":
        x = _pixels(problem, problem.x_shape, strides["x"], bm, images, bk, view_w)
        w = _weights(problem, strides["w"], part, bk)
        scalars |= named_strides("y", strides["y"])
        scalars |= {
            "programs": programs, **epilogue(problem), "VIEW_W": view_w, "Y_ALIGN": align(strides["y"])
        }  # fmt: skip
        launch = launcher.Launch(kernel, (programs,), scalars, **options)
        return Forward(
            launch, problem, strides["y"], lambda a, b, *others: launch(x.of(a), w.of(b), *others)
        )  # fmt: skip
    of_lanes, of_channels = (bk, part) if pass_ == "wgrad" else (bm, bk)
    dy = _pixels(problem, problem.y_shape, strides["dy"], of_lanes, images, of_channels)
    if pass_ == "dgrad":
        w = _weights(problem, strides["w"], bk, part)
        common = math.gcd(problem.stride[1], problem.dilation[1])
        scalars |= named_strides("dx", strides["dx"])
        scalars |= {
            "programs": programs,
            "COMMON_W": common,
            "INVERSE_W": pow(problem.dilation[1] // common, -1, problem.stride[1] // common),
            "DX_ALIGN": align(strides["dx"]),
        }
        launch = launcher.Launch(kernel, (programs,), scalars, **options)
        return Single(launch, problem.x_shape, strides["dx"], lambda a, b, dx: launch(dy.of(a), w.of(b), dx))
    x = _pixels(problem, problem.x_shape, strides["x"], bk, images, bm, view_w)
    result = FilterGradient(problem, splits, strides["dw"])
    scalars |= {"chunk": chunk, "VIEW_W": view_w, **result.arguments}
    launch = launcher.Launch(kernel, (tiles * splits,), scalars, **options)
    return SplitK(launch, result, lambda a, b, dw: launch(dy.of(a), x.of(b), dw))
