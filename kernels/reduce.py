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
    EMULATE_BF16: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dw = the sum over splits of part, in an order of its own, so that the machine's timing does not decide it.

    part: [splits, c_out, KH, KW, CIN_G] fp32, dense, with `size` elements a split; dw through its strides.
    ROWS splits are read at once: one after the other, each would wait for memory.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(0, splits, ROWS):
        split = first + row
        at = split.to(tl.int64)[:, None] * size + i[None, :]
        acc += tl.load(part_ptr + at, mask=(split < splits)[:, None] & (i < size)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    tap = i // CIN_G % (KH * KW)
    at = i // (CIN_G * KH * KW) * stride_dw_o + i % CIN_G * stride_dw_c
    at += tap // KW * stride_dw_h + tap % KW * stride_dw_w
    tl.store(dw_ptr + at, narrow(total, dw_ptr.dtype.element_ty, EMULATE_BF16), mask=i < size)
