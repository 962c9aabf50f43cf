"""The general algorithm: one implicit GEMM per group, for every problem and pass (kernels/implicit_gemm.py)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import triton

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels import implicit_gemm as kernels
from ..occupancy import Held, partial_bytes
from ..problem import ConvProblem
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
    pixels_last,
    precision,
    split_config,
)
from .gemm import MOST_SPLITS, column_tiles, parts, pipelined_bytes, product, split, splits_to_try, starved, waits

NAME = "implicit_gemm"
BLOCKS = {"BLOCK_M": (16, 512), "BLOCK_N": (8, 512, 8), "BLOCK_K": (16, 512)}
DIVISION = {"SPLITS": (1, MOST_SPLITS, 1)}  # of wgrad's pixels
INSTRUCTIONS_A_LOAD = 8  # a masked load, its address and predicates
INSTRUCTIONS_A_STEP = 60  # of each thread, to wait and to go on


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if pass_ == "backward":
        return "no kernel for both gradients"
    if not target.matrix_rate(problem.dtype):
        return f"Triton has no {problem.dtype} matrix instructions on {target.arch_name}"
    if min(problem.x_shape[1:] + problem.w_shape) < 1:
        return "a channel or pixel count is zero"
    return None


def tiles(problem: ConvProblem, pass_: str, target: Target) -> Iterator[list[dict]]:
    m, n, k = problem.gemm(pass_)
    narrow = min(_runs(problem, pass_)[:2]) < 4
    for block_m, block_n in itertools.product(_row_tiles(m), column_tiles(n, problem, target)):
        for block_k, warps, stages in itertools.product(_deep_tiles(k, narrow), (4, 8), (3, 4, 2)):
            if warps == 8 and block_m < 128:  # fewer than 16 rows a warp
                continue
            # No more stages than a loop has steps; two serve them all.
            if stages > max(2, math.ceil(k / block_k)) or _crowded(block_n, block_k, warps, problem, target):
                continue
            if (narrow or block_k >= k) and _unlike(block_n, problem, target):  # which one buffer then holds
                continue
            yield [
                {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
            ]


def _crowded(block_n: int, block_k: int, warps: int, problem: ConvProblem, target: Target) -> bool:
    """Whether columns in several parts are too many for one step, or the narrowest part is too few."""
    *_, last = parts(block_n)
    if last == block_n:
        return False
    # Without warp groups the operands of all the products are in registers.
    return (block_k > 32 and not target.has_warpgroups) or starved(
        block_n, block_k, warps, problem.element_bytes, target
    )


def _unlike(block_n: int, problem: ConvProblem, target: Target) -> bool:
    """Whether parts of the columns lie in shared memory in unlike ways: see assembler.loses_an_address."""
    return (
        target.matrix_unit == "wgmma" and len({min(size * problem.element_bytes, 128) for size in parts(block_n)}) > 1
    )


def _row_tiles(m: int) -> list[int]:
    fitting = max(16, triton.next_power_of_2(min(m, 256)))
    return [fitting] if fitting <= 64 else [size for size in (64, 128, 256) if size <= fitting]


def _deep_tiles(k: int, narrow: bool) -> list[int]:
    """Shallow ones only where each element of a tile is a load of its own."""
    fitting = max(16, triton.next_power_of_2(min(k, 64)))
    return sorted({max(16, fitting // each) for each in ((1, 2, 4) if narrow else (1, 2))})


@functools.lru_cache(4096)
def _runs(problem: ConvProblem, pass_: str) -> tuple[int, int, int]:
    """Elements of one access: of the gathered operand, of the other, and of the result."""
    wide = 16 // problem.element_bytes
    cin, cout = (math.gcd(width, wide) for width in (problem.cin_g, problem.cout_g))
    dense = math.gcd(problem.kh * problem.kw * problem.cin_g, wide)
    if problem.layout == "nhwc":
        return {"fprop": (cin, cin, cout), "dgrad": (cout, cin, cin), "wgrad": (cin, cout, dense)}[pass_]
    return {"fprop": (1, dense, 1), "dgrad": (1, 1, 1), "wgrad": (1, 1, dense)}[pass_]


def held(problem: ConvProblem, pass_: str, tile: dict, target: Target) -> Held:
    block_m, block_n, block_k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    gathered, other, stored = _runs(problem, pass_)
    sums, loaded = block_m * block_n, (block_m + block_n) * block_k
    operands = ((block_m * block_k, gathered), (block_n * block_k, other))
    return Held(
        tile["num_warps"],
        pipelined_bytes(operands, tile, problem.element_bytes, target),
        sums=sums,
        words=loaded * problem.element_bytes / 4,
        # Of a step, or of the stores in the end.
        accesses=max((block_m / gathered + block_n / other) * block_k, sums / stored),
    )


def divisions(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> list[dict[str, int]]:
    if pass_ != "wgrad":
        return [{"SPLITS": 1}]
    m, n, k = problem.gemm("wgrad")
    tiles = math.ceil(m / config["BLOCK_M"]) * math.ceil(n / config["BLOCK_N"]) * problem.groups
    tried = splits_to_try(problem, math.ceil(k / config["BLOCK_K"]), tiles, fit, target)
    return [{"SPLITS": splits} for splits in tried]


def _split(problem: ConvProblem, pass_: str, config: dict) -> tuple[int, int]:
    """(splits, pixels of each)."""
    if pass_ != "wgrad":
        return 1, 0
    splits, steps = split(problem, math.ceil(problem.out_pixels / config["BLOCK_K"]), config["SPLITS"])
    return splits, steps * config["BLOCK_K"]


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int) -> Tiling:
    splits, _ = _split(problem, pass_, config)
    m, n, k = problem.gemm(pass_)
    bm, bn, bk = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    size, nhwc = problem.element_bytes, problem.layout == "nhwc"
    partials = partial_bytes(problem, splits)
    columns = math.ceil(n / bn)
    steps = math.ceil(k / bk)
    tiles = math.ceil(m / bm) * columns * problem.groups

    def load(elements, width):
        """(bytes, instructions). Runs of channels move whole sectors of 32 bytes, in loads of up to 16."""
        run = math.gcd(width, 16 // size) if nhwc else 1
        return elements * size * (max(1.0, 32 / (width * size)) if nhwc else 1.0), elements / run

    width = problem.cout_g if pass_ == "dgrad" else problem.cin_g
    l2, loads = load(tiles * bm * k, width)  # the operand that is gathered
    if pass_ == "wgrad":
        moved, issued = load(tiles * k * bn, problem.cout_g)
    else:  # the weight
        moved, issued = tiles * k * bn * size, tiles * k * bn / (math.gcd(width, 16 // size) if pass_ == "fprop" else 1)
    each = product(bm, bn, bk, config["num_warps"], size, target)
    threads = target.warp_size * config["num_warps"]
    stepping = tiles * (steps * (threads * INSTRUCTIONS_A_STEP + each.instructions) + splits * bm * bn * 4)
    return Tiling(
        programs=tiles * splits,
        matrix_flops=tiles * steps * each.flops,
        l2_bytes=l2 + moved + partials,
        instructions=(loads + issued) * INSTRUCTIONS_A_LOAD + stepping,
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=fit,
        launches=1 + (splits > 1),
        shared_bytes=tiles * steps * (bk * size * (bm + bn) + each.shared_bytes),
        trips=steps / splits,
        ahead=config["num_stages"] - 1 if nhwc else 0,
        waits=waits(each, tiles * splits, tiles * steps, 0, config["num_warps"], fit, problem.dtype, target),
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    stride_h, stride_w = problem.stride
    dil_h, dil_w = problem.dilation
    x, w, y, dx = (strides[name] for name in ("x", "w", "y", "dx"))
    dy = strides.get("dy")
    splits, chunk = _split(problem, pass_, config)
    blocks, options = split_config(config)
    kernel = {"fprop": kernels.fprop_kernel, "dgrad": kernels.dgrad_kernel, "wgrad": kernels.wgrad_kernel}[pass_]
    scalars = {
        **convolution(problem),
        "FLAT": _flat(problem, pass_, strides),
        "BOUNDED": _bounded(problem, pass_),
        "INDEX_64": index_64(problem, strides, splits * problem.params),
        "PRECISION": precision(kernel, problem, target),
        "EMULATE_BF16": emulate_bf16(kernel, problem),
        **blocks,
    }  # fmt: skip
    m, n, _ = problem.gemm(pass_)
    tiles = math.ceil(n / config["BLOCK_N"]) * problem.groups

    if pass_ == "fprop":
        cin_innermost = not pixels_last(x) or not _k_dense(problem, w, cin_innermost=False)
        scalars |= named_strides("x", x) | named_strides("wgt", w) | named_strides("y", y)
        scalars |= {
            **epilogue(problem),
            "CIN_INNERMOST": cin_innermost,
            "WGT_K_DENSE": _k_dense(problem, w, cin_innermost),
            "X_PIXELS_LAST": pixels_last(x),
            "Y_PIXELS_LAST": pixels_last(y),
            "X_ALIGN": align(x),
            "Y_ALIGN": align(y),
        }
        grid = (math.ceil(m / config["BLOCK_M"]) * tiles,)
        return Forward(launcher.Launch(kernel, grid, scalars, **options), problem, y)

    if pass_ == "dgrad":
        h_phase, w_phase = math.ceil(problem.h_in / stride_h), math.ceil(problem.w_in / stride_w)
        common_h, common_w = math.gcd(stride_h, dil_h), math.gcd(stride_w, dil_w)
        scalars |= named_strides("dy", dy) | named_strides("wgt", w) | named_strides("dx", dx)
        scalars |= {
            "h_phase": h_phase,
            "w_phase": w_phase,
            "COMMON_H": common_h,
            "COMMON_W": common_w,
            "INVERSE_H": pow(dil_h // common_h, -1, stride_h // common_h),
            "INVERSE_W": pow(dil_w // common_w, -1, stride_w // common_w),
            "DY_PIXELS_LAST": pixels_last(dy),
            "DX_PIXELS_LAST": pixels_last(dx),
            "DY_ALIGN": align(dy),
            "WGT_ALIGN": align(w),
            "DX_ALIGN": align(dx),
        }
        m_tiles = math.ceil(problem.batch * h_phase * w_phase / config["BLOCK_M"])
        grid = (m_tiles * stride_h * stride_w * tiles,)
        return Single(launcher.Launch(kernel, grid, scalars, **options), problem.x_shape, dx)

    scalars |= named_strides("dy", dy) | named_strides("x", x)
    scalars |= {
        "chunk": chunk,
        "DY_PIXELS_LAST": pixels_last(dy),
        "X_PIXELS_LAST": pixels_last(x),
        "DY_ALIGN": align(dy),
        "X_ALIGN": align(x),
    }
    result = FilterGradient(problem, splits, strides["dw"])
    grid = (math.ceil(m / config["BLOCK_M"]) * tiles * splits,)
    return SplitK(launcher.Launch(kernel, grid, scalars | result.arguments, **options), result)


def _flat(problem: ConvProblem, pass_: str, strides: dict) -> bool:
    """Whether a pass is a matrix product of pixels that lie evenly apart: of a 1x1 layer, channels_last and dense."""
    if (problem.kh, problem.kw, *problem.stride) != (1, 1, 1, 1) or any(problem.pad):
        return False
    touched = {"fprop": ("x", "y"), "dgrad": ("dy", "dx"), "wgrad": ("dy", "x")}[pass_]
    return all(
        (n == problem.h_in * h or problem.batch == 1) and (h == problem.w_in * w or problem.h_in == 1)
        for n, _, h, w in (strides[name] for name in touched)
    )


def _bounded(problem: ConvProblem, pass_: str) -> bool:
    """Whether some tap of some pixel lies off the map."""
    if pass_ == "dgrad":
        return (problem.kh, problem.kw, *problem.stride) != (1, 1, 1, 1) or any(problem.pad)
    return any(problem.pad)


def _k_dense(problem: ConvProblem, w, cin_innermost: bool) -> bool:
    """Whether the weight's (kh, kw, cin), or (cin, kh, kw), lie in memory in that order without gaps."""
    c, kh, kw = problem.w_shape[1:]
    order = {1: 1, 3: c, 2: kw * c} if cin_innermost else {3: 1, 2: kw, 1: kh * kw}
    dense = all(w[axis] == stride or problem.w_shape[axis] == 1 for axis, stride in order.items())
    return dense and (w[0] == c * kh * kw or problem.w_shape[0] == 1)
