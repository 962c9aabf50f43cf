"""Depthwise convolution of small maps with tall filters on matrix units, whose programs hold all rows of a map.

The banded Toeplitz matrices of depthwise_toeplitz.py, without its march, which would multiply a filter taller than the
map mostly by padding.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl

from .depthwise_toeplitz import along, channels_of, scaled
from .epilogue import finish
from .tiles import as_mask, index, mma


@triton.jit(do_not_specialize=("batch", "blocks", "CHANNELS"))
def fprop_kernel(
    x_ptr, wgt_ptr, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, blocks,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    H_IN: tl.constexpr, W_IN: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr,
    CHANNELS, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    X_PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    INDEX_64: tl.constexpr, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One program: `blocks` blocks of BLOCK_M images of BLOCK_C channels of y = conv(x) at stride 1 on small maps.

    Per channel M = images, N = BLOCK_W output columns, K = BLOCK_K input columns: whole rows. The accumulators are all
    rows of y, so that which row of x meets which of y is known when this is compiled, and only rows of the map are
    multiplied: the march would multiply a tall filter mostly by padding. GROUP rows of x share the reads of a T_r.
    TRANSPOSED: dx (y) from dy (x), which is the convolution with the filter turned round; PAD_H and PAD_W are its.
    """
    TILE: tl.constexpr = (BLOCK_M, BLOCK_W) if BLOCK_C == 1 else (BLOCK_C, BLOCK_M, BLOCK_W)
    C_BLOCKS = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = index(channels_of(pid, CHANNELS, BLOCK_C), INDEX_64)
    in_channel = along(c < CHANNELS, 0, BLOCK_C)
    j = tl.arange(0, BLOCK_W)
    k = tl.arange(0, BLOCK_K)
    d = along(k, 1, BLOCK_C) - along(j, 2, BLOCK_C) + PAD_W
    tap = as_mask((d >= 0) & (d < KW) & in_channel)
    tap_at = along(c * stride_wgt_o, 0, BLOCK_C) + (KW - 1 - d if TRANSPOSED else d) * stride_wgt_w
    matrices = ()
    for r in tl.static_range(KH):
        if r - PAD_H < H_IN and r - PAD_H > -H_OUT:
            wgt_row = wgt_ptr + (KH - 1 - r if TRANSPOSED else r) * stride_wgt_h
            matrices = matrices + (tl.load(wgt_row + tap_at, mask=tap, other=0.0),)
        else:
            matrices = matrices + (0,)  # met by no row; Triton 3.6 has no None in tuples

    x_c = scaled(c // MULTIPLIER, stride_x_c, X_PIXELS_LAST, X_ALIGN)
    x_k = scaled(k, stride_x_w, not X_PIXELS_LAST, X_ALIGN)
    y_c = scaled(c, stride_y_c, Y_PIXELS_LAST, Y_ALIGN)
    y_j = scaled(j, stride_y_w, not Y_PIXELS_LAST, Y_ALIGN)
    x_at = along(x_c, 0, BLOCK_C) + along(x_k, 2, BLOCK_C)
    y_at = along(y_c, 0, BLOCK_C) + along(y_j, 2, BLOCK_C)
    x_mask = as_mask(along(k < W_IN, 2, BLOCK_C) & in_channel)
    y_mask = as_mask(along(j < W_OUT, 2, BLOCK_C) & in_channel)
    if HAS_BIAS:
        bias = along(tl.load(bias_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32), 0, BLOCK_C)

    first_block = index(pid // C_BLOCKS, INDEX_64) * blocks
    for b in tl.range(0, blocks, num_stages=1):
        image = (first_block + b) * BLOCK_M + tl.arange(0, BLOCK_M)
        live = along(image < batch, 1, BLOCK_C)
        x_block = x_ptr + (along(tl.multiple_of(image * stride_x_n, X_ALIGN), 1, BLOCK_C) + x_at)
        acc = ()
        for _ in tl.static_range(H_OUT):
            acc = acc + (tl.zeros(TILE, tl.float32),)
        for first in tl.static_range(0, H_IN, GROUP):
            x = ()
            for h in tl.static_range(first, min(first + GROUP, H_IN)):
                x_row = tl.multiple_of(index(tl.full((), h, tl.int32), INDEX_64) * stride_x_h, X_ALIGN)
                x = x + (tl.load(x_block + x_row, mask=live & x_mask, other=0.0),)
            for r in tl.static_range(KH):
                met = ()
                for h in tl.static_range(H_OUT):
                    if h + r - PAD_H >= first and h + r - PAD_H < first + len(x):
                        x_h = x[h + r - PAD_H - first]
                        met = met + (mma(x_h, matrices[r], acc[h], PRECISION, EMULATE_BF16),)
                    else:
                        met = met + (acc[h],)
                acc = met
        y_block = y_ptr + (along(tl.multiple_of(image * stride_y_n, Y_ALIGN), 1, BLOCK_C) + y_at)
        for h in tl.static_range(H_OUT):
            y = acc[h] + bias if HAS_BIAS else acc[h]
            y_row = tl.multiple_of(index(tl.full((), h, tl.int32), INDEX_64) * stride_y_h, Y_ALIGN)
            finish(y_block + y_row, y, live & y_mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION, False, EMULATE_BF16)
