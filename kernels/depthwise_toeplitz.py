"""Depthwise convolution on matrix units: rows of the map times banded Toeplitz matrices.

The convolution of a stretch of an input row with filter row r is the product with T_r [window, columns], T_r[k, j] =
w[r, s] where input column k meets output column j through tap s. Per channel M = lanes: a lane is one (image, class
of rows, segment of rows, block of columns), rows DIL_H apart being a class, and all lanes share the T_r. A program
marches down the rows of BLOCK_M lanes of BLOCK_C channels: the channels are the batch of a 3-D dot, or, where BLOCK_C
is 1, the dots are 2-D. A lane's windows overlap its neighbours', whose loads L1 serves; they go BLOCK_A steps ahead of
the march, into registers.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .tiles import as_mask, index, mma, narrow

SIZES = ("batch", "h_in", "w_in", "h_out", "w_out", "segments", "col_blocks", "rows", "CHANNELS", "first", "last")


@triton.jit
def along(v, AXIS: tl.constexpr, BLOCK_C: tl.constexpr):
    """A vector along axis AXIS of a [channels, rows, columns] tile, which lacks its axis 0 where BLOCK_C is 1."""
    if BLOCK_C == 1:
        return v if AXIS == 0 else v[:, None] if AXIS == 1 else v[None, :]
    else:
        return v[:, None, None] if AXIS == 0 else v[None, :, None] if AXIS == 1 else v[None, None, :]


@triton.jit
def scaled(i, stride, ALIGNED: tl.constexpr, ALIGN: tl.constexpr):
    """i * stride, which ALIGN divides where ALIGNED: along the axis that is not the contiguous one."""
    if ALIGNED:
        return tl.multiple_of(i * stride, ALIGN)
    else:
        return i * stride


@triton.jit
def lane(m, segments, col_blocks, DIL_H: tl.constexpr):
    """(image, class of rows, segment of rows, block of columns) of a lane number."""
    image = m // (col_blocks * segments * DIL_H)
    return image, m // (col_blocks * segments) % DIL_H, m // col_blocks % segments, m % col_blocks


@triton.jit
def channels_of(pid, CHANNELS, BLOCK_C: tl.constexpr):
    """The channels of a program."""
    if BLOCK_C == 1:
        return pid % CHANNELS
    else:
        return pid % ((CHANNELS + BLOCK_C - 1) // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def input_tile(
    x_ptr, x_at, in_row, col, live, in_channel, step, h_in, w_in, stride_x_h, stride_x_w,
    FIRST: tl.constexpr, X_ALIGN: tl.constexpr, X_RUN: tl.constexpr, INDEX_64: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The row `step` rows into the march, from column FIRST of each lane's window on."""
    h = in_row + step
    in_map = along(live & (h >= 0) & (h < h_in), 1, BLOCK_C) & along(in_channel, 0, BLOCK_C)
    w = col + FIRST
    x_row = x_ptr + tl.multiple_of(index(step, INDEX_64) * stride_x_h, X_ALIGN)
    inside = as_mask(in_map & (w >= 0) & (w < w_in // X_RUN * X_RUN))
    return tl.load(x_row + FIRST * stride_x_w + x_at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def march_kernel(
    x_ptr, wgt_ptr, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out, segments, col_blocks, rows, first, last,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    CHANNELS, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    LEFT: tl.constexpr, CHUNKS: tl.constexpr, DRAIN: tl.constexpr,
    X_PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    X_RUN: tl.constexpr, Y_RUN: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of BLOCK_M lanes of y = conv(x), or, TRANSPOSED, of dx (y) from dy (x).

    Per channel and step M = lanes, N = BLOCK_W output columns, K = CHUNKS * BLOCK_K input columns, the first of which
    lies LEFT before the block. A step loads IN rows, adds each to the accumulators of the output rows that it meets,
    and stores the OUT rows that are complete: one of the two is the convolution's stride. Steps `first` to `last`
    have input rows, and DRAIN more only store. X_RUN, Y_RUN: powers of two that divide the maps' widths where rows
    are contiguous.
    """
    IN: tl.constexpr = 1 if TRANSPOSED else CONV_STRIDE_H
    OUT: tl.constexpr = CONV_STRIDE_H if TRANSPOSED else 1
    WARM: tl.constexpr = (KH - 1) // CONV_STRIDE_H
    # Row i of a step meets accumulator a, the row that is complete after a further a / OUT steps, through tap
    # OLDEST + a * NEXT + i.
    OLDEST: tl.constexpr = 0 if TRANSPOSED else WARM * IN
    NEXT: tl.constexpr = 1 if TRANSPOSED else -IN
    C_BLOCKS = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = index(channels_of(pid, CHANNELS, BLOCK_C), INDEX_64)
    m = index(pid // C_BLOCKS, INDEX_64) * BLOCK_M + tl.arange(0, BLOCK_M)
    image, row_class, segment, block = lane(m, segments, col_blocks, DIL_H)
    out_row = row_class + segment * (rows * OUT * DIL_H) - PAD_H % OUT  # of the first row stored
    if TRANSPOSED:
        in_row = (out_row + PAD_H) // CONV_STRIDE_H - WARM * DIL_H
        in_col = block * (BLOCK_W // CONV_STRIDE_W) - LEFT
    else:
        in_row = out_row * CONV_STRIDE_H - PAD_H
        in_col = block * (BLOCK_W * CONV_STRIDE_W) - LEFT
    live = image < batch

    j = tl.arange(0, BLOCK_W)
    k = tl.arange(0, BLOCK_K)
    in_channel = c < CHANNELS
    if TRANSPOSED:
        distance = along(PAD_W + LEFT * CONV_STRIDE_W + j, 2, BLOCK_C) - along(k * CONV_STRIDE_W, 1, BLOCK_C)
    else:
        # Not a number minus j: Triton 3.6 believes that all of such a vector is aligned, and loads taps in pairs.
        distance = along(k, 1, BLOCK_C) - along(j * CONV_STRIDE_W + (LEFT - PAD_W), 2, BLOCK_C)
    wgt_ptr += along(c * stride_wgt_o, 0, BLOCK_C)
    matrices = ()
    for r in tl.static_range(KH):
        for chunk in tl.static_range(CHUNKS):
            d = distance + (-chunk * BLOCK_K * CONV_STRIDE_W if TRANSPOSED else chunk * BLOCK_K)
            tap = as_mask((d >= 0) & (d < KW * DIL_W) & (d % DIL_W == 0) & along(in_channel, 0, BLOCK_C))
            at = r * stride_wgt_h + d // DIL_W * stride_wgt_w
            matrices = matrices + (tl.load(wgt_ptr + at, mask=tap, other=0.0),)

    x_lane = tl.multiple_of(image * stride_x_n + in_row * stride_x_h + in_col * stride_x_w, X_ALIGN)
    x_c = scaled(c // MULTIPLIER, stride_x_c, X_PIXELS_LAST, X_ALIGN)
    x_k = scaled(k, stride_x_w, not X_PIXELS_LAST, X_ALIGN)
    x_at = along(x_c, 0, BLOCK_C) + along(x_lane, 1, BLOCK_C) + along(x_k, 2, BLOCK_C)
    y_lane = tl.multiple_of(image * stride_y_n + out_row * stride_y_h + block * BLOCK_W * stride_y_w, Y_ALIGN)
    y_c = scaled(c, stride_y_c, Y_PIXELS_LAST, Y_ALIGN)
    y_j = scaled(j, stride_y_w, not Y_PIXELS_LAST, Y_ALIGN)
    y_at = along(y_c, 0, BLOCK_C) + along(y_lane, 1, BLOCK_C) + along(y_j, 2, BLOCK_C)
    col = along(in_col, 1, BLOCK_C) + along(k, 2, BLOCK_C)
    out_col = along(block * BLOCK_W, 1, BLOCK_C) + along(j, 2, BLOCK_C)
    y_mask = (out_col < w_out // Y_RUN * Y_RUN) & along(in_channel, 0, BLOCK_C)
    zero = tl.zeros((BLOCK_M, BLOCK_W) if BLOCK_C == 1 else (BLOCK_C, BLOCK_M, BLOCK_W), tl.float32)
    if HAS_BIAS:
        bias = along(tl.load(bias_ptr + c, mask=in_channel, other=0.0).to(tl.float32), 0, BLOCK_C)

    acc = ()
    for _ in tl.static_range(OUT * (WARM + 1)):
        acc = acc + (zero,)
    ahead = ()
    for i in tl.static_range(BLOCK_A * IN):
        for chunk in tl.static_range(CHUNKS):
            ahead = ahead + (
                input_tile(
                    x_ptr, x_at, in_row, col, live, in_channel, (first * IN + i) * DIL_H, h_in, w_in,
                    stride_x_h, stride_x_w, chunk * BLOCK_K, X_ALIGN, X_RUN, INDEX_64, BLOCK_C,
                ),
            )  # fmt: skip
    for t in tl.range(first, last, num_stages=1):
        for i in tl.static_range(IN):
            for chunk in tl.static_range(CHUNKS):
                ahead = ahead + (
                    input_tile(
                        x_ptr, x_at, in_row, col, live, in_channel, ((t + BLOCK_A) * IN + i) * DIL_H, h_in, w_in,
                        stride_x_h, stride_x_w, chunk * BLOCK_K, X_ALIGN, X_RUN, INDEX_64, BLOCK_C,
                    ),
                )  # fmt: skip
                x = ahead[i * CHUNKS + chunk]
                met = ()
                for a in tl.static_range(OUT * (WARM + 1)):
                    if OLDEST + a * NEXT + i < KH:
                        matrix = matrices[(OLDEST + a * NEXT + i) * CHUNKS + chunk]
                        met = met + (mma(x, matrix, acc[a], PRECISION, EMULATE_BF16),)
                    else:
                        met = met + (acc[a],)
                acc = met
        ahead = ahead[IN * CHUNKS :]
        for i in tl.static_range(OUT):
            step = ((t - WARM) * OUT + i) * DIL_H
            h = out_row + step
            mask = as_mask(along(live & (h >= 0) & (h < h_out) & (t >= WARM), 1, BLOCK_C) & y_mask)
            y = acc[i] + bias if HAS_BIAS else acc[i]
            y_row = y_ptr + tl.multiple_of(index(step, INDEX_64) * stride_y_h, Y_ALIGN)
            finish(y_row + y_at, y, mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION, False, EMULATE_BF16)
            acc = acc + (zero,)
        acc = acc[OUT:]
    for a in tl.static_range(DRAIN * OUT):
        step = ((last - WARM) * OUT + a) * DIL_H
        h = out_row + step
        mask = as_mask(along(live & (h >= 0) & (h < h_out), 1, BLOCK_C) & y_mask)
        y = acc[a] + bias if HAS_BIAS else acc[a]
        y_row = y_ptr + tl.multiple_of(index(step, INDEX_64) * stride_y_h, Y_ALIGN)
        finish(y_row + y_at, y, mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION, False, EMULATE_BF16)


@triton.jit(do_not_specialize=SIZES[:-2] + ("blocks",))
def wgrad_kernel(
    dy_ptr, x_ptr, dw_ptr,
    batch, h_in, w_in, h_out, w_out, segments, col_blocks, rows, blocks,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_dw_split, stride_dw_o: tl.constexpr,
    stride_dw_h: tl.constexpr, stride_dw_w: tl.constexpr,
    CHANNELS, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    TAPS: tl.constexpr, UNROLL: tl.constexpr, LEFT: tl.constexpr, CHUNKS: tl.constexpr,
    DY_PIXELS_LAST: tl.constexpr, X_PIXELS_LAST: tl.constexpr, DY_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr,
    DY_RUN: tl.constexpr, X_RUN: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the sums of dw for BLOCK_C channels and TAPS filter rows over `blocks` blocks of lanes.

    Per channel and filter row M = CHUNKS * BLOCK_K input columns, N = BLOCK_W output columns, K = lanes and steps: the
    accumulators are the gradients of the Toeplitz matrices, and their diagonals' sums those of the filter. A step
    loads one row of dy and CONV_STRIDE_H of x, and carries the last rows of dy, which turn into the layout of an
    operand once in each UNROLL steps. dw: [splits, channels, KH, KW] by strides, the filter gradient itself or partial
    sums.
    """
    WARM: tl.constexpr = (TAPS - 1) // CONV_STRIDE_H
    C_BLOCKS = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    T_BLOCKS: tl.constexpr = (KH + TAPS - 1) // TAPS
    TILE: tl.constexpr = (BLOCK_K, BLOCK_W) if BLOCK_C == 1 else (BLOCK_C, BLOCK_K, BLOCK_W)
    pid = tl.program_id(0)
    c = index(channels_of(pid, CHANNELS, BLOCK_C), INDEX_64)
    in_channel = along(c < CHANNELS, 0, BLOCK_C)
    first_tap = pid // C_BLOCKS % T_BLOCKS * TAPS
    split = index(pid // (C_BLOCKS * T_BLOCKS), INDEX_64)
    j = tl.arange(0, BLOCK_W)
    k = tl.arange(0, BLOCK_K)
    x_c = scaled(c // MULTIPLIER, stride_x_c, X_PIXELS_LAST, X_ALIGN)
    x_k = scaled(k, stride_x_w, not X_PIXELS_LAST, X_ALIGN)
    dy_c = scaled(c, stride_dy_c, DY_PIXELS_LAST, DY_ALIGN)
    dy_j = scaled(j, stride_dy_w, not DY_PIXELS_LAST, DY_ALIGN)

    # Steps whose rows of x all lie in the padding are left out where every lane starts at the top of its map.
    above = PAD_H - first_tap * DIL_H
    first = tl.where(segments == 1, tl.maximum(above, 0) // (CONV_STRIDE_H * DIL_H), 0)
    last = tl.where(segments == 1, tl.cdiv(h_in + above, CONV_STRIDE_H * DIL_H), rows + WARM)
    last = tl.minimum(last, rows + WARM)
    acc = ()
    for _ in tl.static_range(TAPS * CHUNKS):
        acc = acc + (tl.zeros(TILE, tl.float32),)
    for b in tl.range(0, blocks, num_stages=1):
        m = (split * blocks + b) * BLOCK_M + tl.arange(0, BLOCK_M)
        image, row_class, segment, block = lane(m, segments, col_blocks, DIL_H)
        out_row = row_class + segment * (rows * DIL_H)
        in_row = out_row * CONV_STRIDE_H - above
        in_col = block * (BLOCK_W * CONV_STRIDE_W) - LEFT
        live = image < batch
        x_lane = tl.multiple_of(image * stride_x_n + in_row * stride_x_h + in_col * stride_x_w, X_ALIGN)
        x_at = x_ptr + (along(x_c, 0, BLOCK_C) + along(x_k, 1, BLOCK_C) + along(x_lane, 2, BLOCK_C))
        col = along(k, 1, BLOCK_C) + along(in_col, 2, BLOCK_C)
        dy_lane = image * stride_dy_n + out_row * stride_dy_h + block * BLOCK_W * stride_dy_w
        dy_lane = tl.multiple_of(dy_lane, DY_ALIGN)
        dy_at = dy_ptr + (along(dy_c, 0, BLOCK_C) + along(dy_lane, 1, BLOCK_C) + along(dy_j, 2, BLOCK_C))
        out_col = along(block * BLOCK_W, 1, BLOCK_C) + along(j, 2, BLOCK_C)
        in_dy = (out_col < w_out // DY_RUN * DY_RUN) & in_channel

        dy = ()
        for back in tl.static_range(1, WARM + 1):
            mask = along(live & (first >= back) & (first - back < rows), 1, BLOCK_C) & in_dy
            mask = as_mask(mask & along(out_row + (first - back) * DIL_H < h_out, 1, BLOCK_C))
            dy_row = tl.multiple_of(index((first - back) * DIL_H, INDEX_64) * stride_dy_h, DY_ALIGN)
            dy = dy + (tl.load(dy_at + dy_row, mask=mask, other=0.0),)
        for start in tl.range(first, last, UNROLL, num_stages=1):
            for u in tl.static_range(UNROLL):
                t = start + u
                mask = as_mask(along(live & (t < rows) & (out_row + t * DIL_H < h_out), 1, BLOCK_C) & in_dy)
                dy_row = tl.multiple_of(index(t * DIL_H, INDEX_64) * stride_dy_h, DY_ALIGN)
                dy = (tl.load(dy_at + dy_row, mask=mask, other=0.0),) + dy
                x = ()
                for i in tl.static_range(CONV_STRIDE_H):
                    step = (t * CONV_STRIDE_H + i) * DIL_H
                    h = in_row + step
                    in_map = along(live & (h >= 0) & (h < h_in), 2, BLOCK_C) & in_channel
                    x_row = tl.multiple_of(index(step, INDEX_64) * stride_x_h, X_ALIGN)
                    for chunk in tl.static_range(CHUNKS):
                        w = col + chunk * BLOCK_K
                        inside = as_mask(in_map & (w >= 0) & (w < w_in // X_RUN * X_RUN))
                        x = x + (tl.load(x_at + x_row + chunk * BLOCK_K * stride_x_w, mask=inside, other=0.0),)
                met = ()
                for i in tl.static_range(TAPS * CHUNKS):
                    x_i = x[i // CHUNKS % CONV_STRIDE_H * CHUNKS + i % CHUNKS]
                    met = met + (mma(x_i, dy[i // CHUNKS // CONV_STRIDE_H], acc[i], PRECISION, EMULATE_BF16),)
                acc = met
                dy = dy[:WARM]

    # Diagonal s, moved to row s and summed over its columns.
    dw_c = split * stride_dw_split + c * stride_dw_o
    dw_ptr += dw_c if BLOCK_C == 1 else dw_c[:, None]
    in_channel = c < CHANNELS if BLOCK_C == 1 else (c < CHANNELS)[:, None]
    for r in tl.static_range(TAPS):
        for s in tl.static_range(0, KW, BLOCK_K):
            at = along((s + k) * DIL_W, 1, BLOCK_C) + along(j * CONV_STRIDE_W - PAD_W + LEFT, 2, BLOCK_C)
            total = tl.zeros(TILE, tl.float32)
            for chunk in tl.static_range(CHUNKS):
                row = at - chunk * BLOCK_K + tl.zeros(TILE, tl.int32)
                here = (row >= 0) & (row < BLOCK_K)
                moved = tl.gather(acc[r * CHUNKS + chunk], tl.where(here, row, 0), len(TILE) - 2)
                total += tl.where(here, moved, 0.0)
            tap = (first_tap + r) * stride_dw_h + (s + k) * stride_dw_w
            mask = (s + k < KW) & (first_tap + r < KH)
            sums = narrow(tl.sum(total, len(TILE) - 1), dw_ptr.dtype.element_ty, EMULATE_BF16)
            if BLOCK_C == 1:
                tl.store(dw_ptr + tap, sums, mask=as_mask(mask & in_channel))
            else:
                tl.store(dw_ptr + tap[None, :], sums, mask=as_mask(mask[None, :] & in_channel))
