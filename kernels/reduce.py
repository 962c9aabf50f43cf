"""Fixed-order sums of split-K partials."""

import triton
import triton.language as tl

from .tiles import narrow


@triton.jit(do_not_specialize=("splits", "size"))
def sum_splits_kernel(
    part_ptr, dw_ptr,
    splits, size,
    stride_dw_o, stride_dw_c, stride_dw_h, stride_dw_w,
    CIN_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    EMULATE_BF16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dw = the sum over splits of part, in order, so that the result does not depend on the machine's timing.

    part: [splits, c_out, KH, KW, CIN_G] fp32, dense, with `size` elements a split; dw through its strides.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part_ptr += i
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(0, splits):
        acc += tl.load(part_ptr, mask=i < size, other=0.0)
        part_ptr += size
    tap = i // CIN_G % (KH * KW)
    at = i // (CIN_G * KH * KW) * stride_dw_o + i % CIN_G * stride_dw_c
    at += tap // KW * stride_dw_h + tap % KW * stride_dw_w
    tl.store(dw_ptr + at, narrow(acc, dw_ptr.dtype.element_ty, EMULATE_BF16), mask=i < size)
