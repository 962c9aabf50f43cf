"""Depthwise convolution as products with banded Toeplitz matrices (kernels/depthwise_toeplitz.py)."""

from __future__ import annotations

import dataclasses
import math

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels import depthwise_toeplitz as kernels
from ..occupancy import largest_splits, most_splits, partial_bytes, resident, shares
from ..problem import ConvProblem
from .calls import (
    FilterGradient,
    Single,
    SplitK,
    align,
    emulate_bf16,
    index_64,
    named_strides,
    pixels_last,
    split_config,
)

NAME = "depthwise_toeplitz"
BLOCKS = {
    "BLOCK_C": (1, 32), "BLOCK_M": (16, 256), "BLOCK_W": (8, 64), "BLOCK_H": (4, 1024), "BLOCK_T": (1, 32),
    "BLOCK_U": (1, 8, 1), "BLOCK_R": (1, 16),
}  # fmt: skip
# BLOCK_H: the most output rows of a segment, about. BLOCK_T: wgrad's filter rows of a program, and BLOCK_U its steps
# that share a row's change of layout. BLOCK_R: output rows that a program holds at once: 1 marches, 16 holds a whole
# map (map_kernel).
MOST_SPLITS = 4096
DIVISION = {"SPLITS": (1, MOST_SPLITS, 1)}  # of wgrad's blocks of lanes, or map_kernel's of images

LEAST_TAPS = 10
BLOCK_K = 16  # input columns of a product
MOST_UNROLL = 8
MOST_PRODUCTS, MOST_LOADS = 56, 8  # in the body of wgrad's loop
# By `_registers`, past which (march, wgrad) spill; and where ptxas spills a few bytes to fit wgrad's 8 warps in 128.
MOST_REGISTERS = (240, 195)
SQUEEZED = (146, 160)
MOST_WAVES = 4  # of wgrad's programs
TALL = 9  # rows of a filter that map_kernel is for,
SMALL = 16  # and rows and columns of a map that it holds at most
GROUP = 4  # rows of x that it loads together
MOST_MAP = (64, 128)  # registers of its accumulators; the first where it needs many others


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


def lanes(problem: ConvProblem, pass_: str, config: dict, taps: int) -> Lanes:
    transposed = pass_ == "dgrad"
    h_in, w_in = (problem.h_out, problem.w_out) if transposed else (problem.h_in, problem.w_in)
    h_out, w_out = (problem.h_in, problem.w_in) if transposed else (problem.h_out, problem.w_out)
    (stride_h, stride_w), (dil_h, dil_w), (top, _, pad, _) = problem.stride, problem.dilation, problem.pad
    block_w = config["BLOCK_W"]
    col_blocks = math.ceil(w_out / block_w)
    reach = (problem.kw - 1) * dil_w
    if col_blocks == 1:
        left, window = 0, w_in
    elif transposed:
        left = -((pad - reach) // stride_w)
        window = (block_w - 1 + pad) // stride_w + left + 1
    else:
        left, window = pad, (block_w - 1) * stride_w + reach + 1
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
    rows = math.ceil(steps / max(1, round(steps / config["BLOCK_H"])))
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
    if min(problem.x_shape[1:] + problem.w_shape) < 1:
        return "a channel or pixel count is zero"
    if pass_ == "dgrad" and problem.stride[1] not in (1, 2, 4, 8):
        return "dgrad takes column strides of 1, 2, 4 and 8"
    if not any(True for configs in (_map_configs, _configs) for _ in configs(problem, pass_, target)):
        return f"the filter's matrices or accumulators do not fit {target.arch_name}"
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
    taps = min(problem.kh, config["BLOCK_T"]) if pass_ == "wgrad" else problem.kh
    cut = lanes(problem, pass_, config, taps)
    stride = problem.stride[0]
    return Launched(
        cut, taps, *((1, stride) if pass_ == "dgrad" else (stride, 1)), (taps - 1) // stride,
        math.ceil(problem.c_out / config["BLOCK_C"]), math.ceil(cut.count / config["BLOCK_M"]),
        math.ceil(problem.kh / taps),
    )  # fmt: skip


def _unroll(problem: ConvProblem, config: dict, target: Target) -> int:
    """The BLOCK_U of wgrad with the least work for which there are registers, for a configuration whose own is 1."""
    made = _launched(problem, "wgrad", config)
    cut, taps, stride = made.cut, made.taps, problem.stride[0]
    row = config["BLOCK_C"] * config["BLOCK_M"] * config["BLOCK_W"] * problem.element_bytes / 4
    room = MOST_REGISTERS[1] - _registers(problem, "wgrad", config, made, target)
    most = min(MOST_UNROLL, MOST_PRODUCTS // (taps * cut.chunks), MOST_LOADS // (stride * cut.chunks))
    most = min(most, 1 + int(room * target.warp_size * config["num_warps"] / row))
    steps = cut.last - cut.first
    return min(range(1, max(1, most) + 1), key=lambda n: math.ceil(steps / n) * (2 * n + made.warm))


def _wide(problem: ConvProblem) -> bool:
    """Whether a thread's loads are at least 8 bytes."""
    if problem.layout == "nhwc":
        return problem.c_out * problem.element_bytes % 16 == 0 and problem.cout_g == 1
    return problem.w_in * problem.element_bytes % 8 == 0 and problem.w_out * problem.element_bytes % 8 == 0


def _registers(problem: ConvProblem, pass_: str, config: dict, made: Launched, target: Target) -> float:
    """Registers of a thread, from tiles compiled for sm_90 and gfx942: accumulators, rows in flight, addresses."""
    threads = target.warp_size * config["num_warps"]
    lane_columns = config["BLOCK_C"] * config["BLOCK_M"] / threads
    words = problem.element_bytes / 4
    x = lane_columns * BLOCK_K
    y = lane_columns * config["BLOCK_W"]
    addresses = 0 if _wide(problem) else 5 * x
    if pass_ == "wgrad":
        acc = made.taps * made.cut.chunks * x * config["BLOCK_W"] / config["BLOCK_M"]
        rows = words * (made.read * made.cut.chunks * x + (made.warm + config["BLOCK_U"]) * y)
        return 1.15 * acc + rows + addresses + 58
    acc = made.written * (made.warm + 1) * y
    held = 0.0
    if target.backend == "hip":  # keeps the matrices in registers
        held = words * config["BLOCK_C"] * made.taps * made.cut.chunks * BLOCK_K * config["BLOCK_W"] / threads
    return 1.15 * acc + words * made.read * made.cut.chunks * x + addresses + held + 48


def shared_bytes(problem: ConvProblem, pass_: str, config: dict, made: Launched, target: Target) -> int:
    """The Toeplitz matrices, and the rows of a step on their way into the layout of an operand."""
    window = made.cut.chunks * BLOCK_K
    matrices, rows = made.taps * window * config["BLOCK_W"], BLOCK_K
    if pass_ == "wgrad":
        matrices, rows = 0, made.read * window + config["BLOCK_W"]
    if target.backend == "hip":  # the matrices stay in registers, and one row after the other goes through
        matrices, rows = 0, max(BLOCK_K, config["BLOCK_W"])
    rows *= config["BLOCK_M"]
    return config["BLOCK_C"] * (matrices + rows) * problem.element_bytes


def _fits(problem: ConvProblem, pass_: str, config: dict, target: Target) -> bool:
    made = _launched(problem, pass_, config)
    registers = _registers(problem, pass_, config, made, target)
    if registers > min(MOST_REGISTERS[pass_ == "wgrad"], 65536 // (32 * config["num_warps"])):
        return False
    if pass_ == "wgrad" and config["num_warps"] == 8 and SQUEEZED[0] < registers < SQUEEZED[1]:
        return False
    return shared_bytes(problem, pass_, config, made, target) <= target.shared_bytes


@dataclasses.dataclass(frozen=True)
class Maps:
    """A launch of map_kernel: the maps and padding of the convolution that it does, and what is made of them."""

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


def _map_resident(problem: ConvProblem, config: dict, made: Maps, target: Target) -> int:
    """It takes nearly all the registers that a thread can have."""
    return resident(255, _map_shared_bytes(problem, config, made.matrices), config["num_warps"], target)


def _map_shared_bytes(problem: ConvProblem, config: dict, matrices: int) -> int:
    """The Toeplitz matrices, and a group of rows on their way into the layout of an operand."""
    elements = config["BLOCK_C"] * BLOCK_K * (matrices * config["BLOCK_W"] + GROUP * config["BLOCK_M"])
    return elements * problem.element_bytes


def _map_configs(problem: ConvProblem, pass_: str, target: Target):
    if target.backend == "hip" or pass_ == "wgrad" or problem.kh < TALL:
        return
    if problem.stride != (1, 1) or problem.dilation != (1, 1) or problem.batch < 1:
        return
    if max(problem.h_in, problem.w_in, problem.h_out, problem.w_out) > SMALL:
        return
    if problem.element_bytes == 4 and (problem.layout == "nchw" or int(target.arch) < 90):  # it spills
        return
    out = (problem.h_in, problem.w_in) if pass_ == "dgrad" else (problem.h_out, problem.w_out)
    shapes, roomy = [(8, 16, 8), (4, 16, 4), (4, 16, 8)], _wide(problem)
    if problem.layout == "nchw":
        # tcgen05, which takes 64 images, keeps the accumulators of all rows in a tensor memory that is too small.
        shapes = [(1, 32, 2) if target.matrix_unit == "tcgen05" else (1, 64, 4), (1, 32, 4)]
        roomy = (problem.w_in | problem.w_out) % 2 == 0
    for block_c, block_m, warps in shapes:
        config = {
            "BLOCK_C": block_c, "BLOCK_M": block_m, "BLOCK_W": 8 if out[1] <= 8 else 16, "BLOCK_H": SMALL,
            "BLOCK_T": 16, "BLOCK_U": 1, "BLOCK_R": SMALL, "num_warps": warps, "num_stages": 1,
        }  # fmt: skip
        made = _maps(problem, pass_, config)
        acc = out[0] * block_c * block_m * config["BLOCK_W"] / (32 * warps)
        if acc <= MOST_MAP[roomy] and _map_shared_bytes(problem, config, made.matrices) <= target.shared_bytes:
            yield config


def _map_tiling(problem: ConvProblem, pass_: str, config: dict, target: Target) -> Tiling:
    made, size = _maps(problem, pass_, config), problem.element_bytes
    block_c, block_m, block_w = (config[f"BLOCK_{axis}"] for axis in "CMW")
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
        instructions=(4 if _wide(problem) else 8) * (x + y) + products / 64 + 10 * matrices,
        dram_bytes=problem.min_bytes(pass_),
        resident=_map_resident(problem, config, made, target),
        shared_bytes=(2 * (x + y) + fragments) * size,
    )


def candidates(problem: ConvProblem, pass_: str, target: Target) -> list[dict]:
    return [*_map_configs(problem, pass_, target), *_configs(problem, pass_, target)]


def _configs(problem: ConvProblem, pass_: str, target: Target):
    stride = problem.stride[0]
    steps = math.ceil((problem.h_in if pass_ == "dgrad" else problem.h_out) / stride)
    heights = [1024] + [height for height in (32, 16, 8) if height < steps]
    shapes = [(16, 8), (16, 16), (8, 8), (4, 4)]
    if problem.layout == "nchw" and pass_ != "wgrad":
        shapes.append((1, 4))
    widths = (16,) if target.backend == "hip" else (8, 16)  # AMD has no 8 columns wide matrix instruction
    for block_c, warps in shapes:
        for block_m in (32, 16, 64) if block_c > 1 else (64, 128):
            for block_w in widths:
                for block_t in (4, 8, 16) if pass_ == "wgrad" else (16,):
                    for height in heights:
                        config = {
                            "BLOCK_C": block_c, "BLOCK_M": block_m, "BLOCK_W": block_w, "BLOCK_H": height,
                            "BLOCK_T": block_t, "BLOCK_U": 1, "BLOCK_R": 1, "num_warps": warps, "num_stages": 1,
                        }  # fmt: skip
                        if pass_ == "wgrad":
                            config["BLOCK_U"] = _unroll(problem, config, target)
                        if _fits(problem, pass_, config, target):
                            yield config


def _resident(problem: ConvProblem, pass_: str, config: dict, made: Launched, target: Target) -> int:
    shared = shared_bytes(problem, pass_, config, made, target)
    return resident(_registers(problem, pass_, config, made, target), shared, config["num_warps"], target)


def _wgrad_split(problem: ConvProblem, config: dict, made: Launched) -> tuple[int, int]:
    """(splits, blocks of lanes of each); fewer where partial sums would take more memory than the operands."""
    return shares(made.m_blocks, min(config["SPLITS"], largest_splits(problem, "wgrad")))


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target) -> list[dict[str, int]]:
    if config["BLOCK_R"] > 1:
        maps = _maps(problem, pass_, config)
        blocks, tiles, most, prologue = maps.m_blocks, maps.c_blocks, maps.m_blocks, 1
        slots = target.multiprocessors * _map_resident(problem, config, maps, target)
    elif pass_ == "wgrad":
        made = _launched(problem, pass_, config)
        blocks, tiles, prologue = made.m_blocks, made.c_blocks * made.t_blocks, 0
        slots = target.multiprocessors * _resident(problem, pass_, config, made, target)
        most = min(math.ceil(MOST_WAVES * slots / tiles), most_splits(problem, pass_))
    else:
        return [{"SPLITS": 1}]
    most = max(1, min(most, blocks, MOST_SPLITS))

    def rounds(splits):  # of blocks; to build map_kernel's matrices takes about as long as a block
        return math.ceil(splits * tiles / slots) * (math.ceil(blocks / splits) + prologue)

    # Every number of blocks a split that there can be, or nearly: the shortest, and its neighbours.
    few = range(1, math.isqrt(blocks) + 1)
    counts = {min(most, shares(blocks, n)[0]) for n in (*few, *(math.ceil(blocks / n) for n in few))}
    shortest = sorted(sorted(counts), key=rounds)[:4] or [1]
    return [{"SPLITS": splits} for splits in shortest]


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target) -> Tiling:
    if config["BLOCK_R"] > 1:
        return _map_tiling(problem, pass_, config, target)
    made = _launched(problem, pass_, config)
    cut, size = made.cut, problem.element_bytes
    block_c, block_m, block_w = (config[f"BLOCK_{axis}"] for axis in "CMW")
    programs, partials, splits = made.m_blocks * made.c_blocks, 0, 1
    if pass_ == "wgrad":
        splits, blocks = _wgrad_split(problem, config, made)
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
    each = 4 if _wide(problem) else 8
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
        resident=_resident(problem, pass_, config, made, target),
        launches=1 + (splits > 1),
        shared_bytes=shared,
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    top, _, pad, _ = problem.pad
    tiles, options = split_config(config)
    del tiles["BLOCK_H"], tiles["BLOCK_T"], tiles["BLOCK_U"], tiles["BLOCK_R"]
    if config["BLOCK_R"] > 1:
        return _prepare_map(problem, pass_, config, strides, tiles, options, target.precision(problem.dtype))
    transposed, wgrad = pass_ == "dgrad", pass_ == "wgrad"
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
        "CHANNELS": problem.c_out, "MULTIPLIER": problem.cout_g, "KH": problem.kh, "KW": problem.kw,
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
        splits, blocks = _wgrad_split(problem, config, made)
        gradient = FilterGradient(problem, splits, strides["dw"])
        scalars |= gradient.depthwise_arguments()
        scalars |= named_strides("dy", strides["dy"]) | named_strides("x", strides["x"])
        scalars |= {"blocks": blocks, "TAPS": made.taps, "UNROLL": config["BLOCK_U"]}
        scalars["INDEX_64"] = index_64(problem, strides, splits * problem.params)
        grid = (splits * made.c_blocks * made.t_blocks,)
        return SplitK(launcher.Launch(kernel, grid, scalars, **options), gradient)
    scalars |= {"first": cut.first, "last": cut.last, "DRAIN": cut.drain, "TRANSPOSED": transposed}
    scalars |= {"HAS_BIAS": problem.bias and not transposed}
    scalars |= named_strides("x", strides[source]) | named_strides("wgt", strides["w"])
    scalars |= named_strides("y", strides[result])
    launch = launcher.Launch(kernel, (made.m_blocks * made.c_blocks,), scalars, **options)
    if transposed:
        return Single(launch, problem.x_shape, strides["dx"], lambda dy, w, dx: launch(dy, w, None, dx))
    return Single(launch, problem.y_shape, strides["y"])


def _prepare_map(problem: ConvProblem, pass_: str, config: dict, strides: dict, tiles, options, precision: str):
    made, transposed = _maps(problem, pass_, config), pass_ == "dgrad"
    splits, blocks = shares(made.m_blocks, config["SPLITS"])
    source, result = ("dy", "dx") if transposed else ("x", "y")
    scalars = {
        "batch": problem.batch, "blocks": blocks,
        **named_strides("x", strides[source]), **named_strides("wgt", strides["w"]),
        **named_strides("y", strides[result]),
        "H_IN": made.h_in, "W_IN": made.w_in, "H_OUT": made.h_out, "W_OUT": made.w_out,
        "CHANNELS": problem.c_out, "MULTIPLIER": problem.cout_g, "KH": problem.kh, "KW": problem.kw,
        "PAD_H": made.pad_h, "PAD_W": made.pad_w,
        "TRANSPOSED": transposed, "HAS_BIAS": problem.bias and not transposed,
        "INDEX_64": index_64(problem, strides),
        "PRECISION": precision,
        "EMULATE_BF16": emulate_bf16(kernels.map_kernel, problem),
        **tiles, "BLOCK_K": BLOCK_K, "GROUP": GROUP,
    }  # fmt: skip
    for name, memory in (("X", strides[source]), ("Y", strides[result])):
        last = pixels_last(memory)
        scalars |= {f"{name}_PIXELS_LAST": last, f"{name}_ALIGN": align(memory, (0, 1, 2) if last else (0, 2, 3))}
    launch = launcher.Launch(kernels.map_kernel, (made.c_blocks * splits,), scalars, **options)
    if transposed:
        return Single(launch, problem.x_shape, strides["dx"], lambda dy, w, dx: launch(dy, w, None, dx))
    return Single(launch, problem.y_shape, strides["y"])
