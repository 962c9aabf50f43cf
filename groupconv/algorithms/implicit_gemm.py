"""The general algorithm: one implicit GEMM per group, for every problem and pass (kernels/implicit_gemm.py)."""

from __future__ import annotations

import math

import triton

from .. import launcher
from ..cost import Tiling
from ..devices import Target
from ..kernels import implicit_gemm as kernels
from ..problem import ConvProblem
from .calls import Single, SplitK, align, emulate_bf16, index_64, named_strides, pixels_last, split_config

NAME = "implicit_gemm"
BLOCKS = {"BLOCK_M": (16, 512), "BLOCK_N": (16, 512), "BLOCK_K": (16, 512)}
INSTRUCTIONS_A_LOAD = 8  # a masked load, its address and predicates
MOST_SPLITS = 256


def supports(problem: ConvProblem, pass_: str, target: Target) -> str | None:
    if pass_ == "backward":
        return "no kernel for both gradients"
    if not target.matrix_rate(problem.dtype):
        return f"Triton has no {problem.dtype} matrix instructions on {target.arch_name}"
    if min(problem.x_shape[1:] + problem.w_shape) < 1:
        return "a channel or pixel count is zero"
    return None


def fits(config: dict, dtype: str, target: Target) -> str | None:
    """Why a configuration cannot run on a target, or None. Shared memory counted as the pipeline's tiles."""
    shared = shared_bytes(config, 4 if dtype in ("fp32", "tf32") else 2)
    if shared > target.shared_bytes:
        return f"{shared} bytes of shared memory; {target.arch_name} has {target.shared_bytes}"
    return None


def shared_bytes(config: dict, element_bytes: int) -> int:
    tile = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * element_bytes
    return tile * max(1, config["num_stages"] - 1)


def candidates(problem: ConvProblem, pass_: str, target: Target) -> list[dict]:
    m, n, k = problem.gemm(pass_)

    def tiles(size, most):
        fitting = max(16, triton.next_power_of_2(min(size, most)))
        return sorted({max(16, fitting // 2), fitting})

    found = []
    for block_m in tiles(m, 64 if pass_ == "wgrad" else 256):
        for block_n in tiles(n, 128):
            for block_k in tiles(k, 64):
                warps = 8 if block_m * block_n >= 128 * 128 else 4
                for stages in (3, 4, 2):
                    config = {
                        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
                        "num_warps": warps, "num_stages": stages,
                    }  # fmt: skip
                    if fits(config, problem.dtype, target) is None:
                        found.append(config)
    return found


def _resident(config: dict, problem: ConvProblem, target: Target) -> int:
    """Programs that share a multiprocessor: by shared memory and by registers, accumulators and about 64 more."""
    registers = config["BLOCK_M"] * config["BLOCK_N"] // (32 * config["num_warps"]) + 64
    by_registers = 65536 // (32 * config["num_warps"] * min(255, registers))
    return max(1, min(by_registers, target.shared_bytes // shared_bytes(config, problem.element_bytes), 16))


def _splits(problem: ConvProblem, config: dict, target: Target) -> tuple[int, int]:
    """(splits, pixels a split) of wgrad: two waves of programs, at least 8 steps each, partials small beside x."""
    m, n, k = problem.gemm("wgrad")
    tiles = math.ceil(m / config["BLOCK_M"]) * math.ceil(n / config["BLOCK_N"]) * problem.groups
    wanted = math.ceil(2 * target.multiprocessors * _resident(config, problem, target) / tiles)
    affordable = max(1, problem.min_bytes("wgrad") // (4 * 4 * problem.params))
    steps = max(1, math.ceil(k / config["BLOCK_K"]))
    splits = max(1, min(wanted, affordable, steps // 8, MOST_SPLITS))
    chunk = math.ceil(steps / splits) * config["BLOCK_K"]
    return max(1, math.ceil(k / chunk)), chunk


def tiling(problem: ConvProblem, pass_: str, config: dict, target: Target) -> Tiling:
    m, n, k = problem.gemm(pass_)
    bm, bn, bk = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    size = problem.element_bytes
    splits, partials = 1, 0
    if pass_ == "wgrad":
        splits, _ = _splits(problem, config, target)
        partials = 2 * splits * problem.params * 4
    steps = math.ceil(k / bk)
    tiles = math.ceil(m / bm) * math.ceil(n / bn) * problem.groups
    # A run of channels shorter than a 32-byte sector still moves the sector; loads are as wide as the run, to 16 bytes.
    widths = {"fprop": (problem.cin_g,), "dgrad": (problem.cout_g,), "wgrad": (problem.cout_g, problem.cin_g)}[pass_]
    nhwc = problem.layout == "nhwc"

    def load(elements, width):
        run = math.gcd(width, 16 // size) if nhwc else 1
        return elements * size * (max(1.0, 32 / (width * size)) if nhwc else 1.0), elements / run

    gathered = {"fprop": (bm,), "dgrad": (bm,), "wgrad": (bm, bn)}[pass_]
    l2, loads = 0.0, 0.0
    for rows, width in zip(gathered, widths, strict=True):
        moved, instructions = load(tiles * steps * rows * bk, width)
        l2, loads = l2 + moved, loads + instructions
    if pass_ != "wgrad":  # the weight tile
        l2 += tiles * steps * bn * bk * size
        loads += tiles * steps * bn * bk / (math.gcd(widths[0], 16 // size) if pass_ == "fprop" else 1)
    return Tiling(
        programs=tiles * splits,
        matrix_flops=2.0 * tiles * bm * bn * steps * bk,
        l2_bytes=l2 + partials,
        instructions=loads * INSTRUCTIONS_A_LOAD,
        dram_bytes=problem.min_bytes(pass_) + partials,
        resident=_resident(config, problem, target),
        launches=2 if pass_ == "wgrad" else 1,
    )


def prepare(problem: ConvProblem, pass_: str, config: dict, target: Target, strides: dict):
    top, _, left, _ = problem.pad
    stride_h, stride_w = problem.stride
    dil_h, dil_w = problem.dilation
    x, w, y, dx = (strides[name] for name in ("x", "w", "y", "dx"))
    dy = strides.get("dy")
    splits, chunk = _splits(problem, config, target) if pass_ == "wgrad" else (1, 0)
    blocks, options = split_config(config)
    kernel = {"fprop": kernels.fprop_kernel, "dgrad": kernels.dgrad_kernel, "wgrad": kernels.wgrad_kernel}[pass_]
    scalars = {
        "batch": problem.batch, "h_in": problem.h_in, "w_in": problem.w_in,
        "h_out": problem.h_out, "w_out": problem.w_out,
        "GROUPS": problem.groups, "CIN_G": problem.cin_g, "COUT_G": problem.cout_g,
        "KH": problem.kh, "KW": problem.kw, "CONV_STRIDE_H": stride_h, "CONV_STRIDE_W": stride_w,
        "PAD_H": top, "PAD_W": left, "DIL_H": dil_h, "DIL_W": dil_w,
        "INDEX_64": index_64(problem, strides, splits * problem.params),
        "PRECISION": target.precision(problem.dtype),
        "EMULATE_BF16": emulate_bf16(kernel, problem),
        **blocks,
    }  # fmt: skip
    m, n, _ = problem.gemm(pass_)
    tiles = math.ceil(n / config["BLOCK_N"]) * problem.groups

    if pass_ == "fprop":
        cin_innermost = not pixels_last(x) or not _k_dense(problem, w, cin_innermost=False)
        scalars |= named_strides("x", x) | named_strides("wgt", w) | named_strides("y", y)
        scalars |= {
            "HAS_BIAS": problem.bias,
            "CIN_INNERMOST": cin_innermost,
            "WGT_K_DENSE": _k_dense(problem, w, cin_innermost),
            "X_PIXELS_LAST": pixels_last(x),
            "Y_PIXELS_LAST": pixels_last(y),
            "X_ALIGN": align(x),
            "Y_ALIGN": align(y),
        }
        grid = (math.ceil(m / config["BLOCK_M"]) * tiles,)
        return Single(launcher.Launch(kernel, grid, scalars, **options), problem.y_shape, y)

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
    grid = (math.ceil(m / config["BLOCK_M"]) * tiles * splits,)
    partial = launcher.Launch(kernel, grid, scalars, **options)
    return SplitK(partial, problem, splits, strides["dw"])


def _k_dense(problem: ConvProblem, w, cin_innermost: bool) -> bool:
    """Whether the weight's (kh, kw, cin), or (cin, kh, kw), lie in memory in that order without gaps."""
    c, kh, kw = problem.w_shape[1:]
    order = {1: 1, 3: c, 2: kw * c} if cin_innermost else {3: 1, 2: kw, 1: kh * kw}
    dense = all(w[axis] == stride or problem.w_shape[axis] == 1 for axis, stride in order.items())
    return dense and (w[0] == c * kh * kw or problem.w_shape[0] == 1)
