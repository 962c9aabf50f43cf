"""Depthwise convolution of small maps: a product with one banded matrix per channel.

A map is cut into chunks of whole rows, ROWS_IN of the input and ROWS_OUT of the output, each flat in a tile of
BLOCK_IN or BLOCK_OUT pixels. What a chunk of the input gives to one of the output is a matrix product whose matrix,
[BLOCK_IN, BLOCK_OUT], holds taps of the filter and depends only on the chunks' distance: the input row where the one
starts less that where the other does. Kernel size, stride, dilation and padding only decide which entries are filled.
UNIT divides all distances, and those of UNIT * FIRST, UNIT * (FIRST + 1), ... meet the filter, DISTANCES in all. A map
that fits one chunk has one distance, and its matrix is the whole convolution.

The matrices are built once per program, which then runs over images: x, y and their gradients move exactly once.
BLOCK_C = 1 is for maps whose pixels are neighbours in memory (NCHW): plain products, images by pixels. More channels
are the batch of a 3-D product, so that loads of NHWC are wide. *_DENSE: the rows of a map follow each other without
gaps. *_ALIGN: the power of two, up to 16, that divides the strides of all axes but the contiguous one.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .tiles import index, mma, narrow


@triton.constexpr_function
def chunks(SIZE, ROWS):
    return (SIZE + ROWS - 1) // ROWS


@triton.constexpr_function
def position(i, j, ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES):
    """Which of the distances lies between chunk i of the input and chunk j of the output; -1 where they do not meet."""
    d = (i * ROWS_IN - j * STEP_OUT) // UNIT - FIRST
    return d if 0 <= d < DISTANCES else -1


@triton.constexpr_function
def inputs_for(j, COUNT, ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES):
    """How many of the COUNT chunks of the input must have been loaded for chunk j of the output."""
    return max([0] + [i + 1 for i in range(COUNT) if position(i, j, ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES) >= 0])


@triton.constexpr_function
def outputs_for(i, COUNT, ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES):
    """How many of the COUNT chunks of the output must have been loaded for chunk i of the input."""
    return max([0] + [j + 1 for j in range(COUNT) if position(i, j, ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES) >= 0])


@triton.constexpr_function
def reaches(first, TAP_ROWS, DISTANCE, KH, CONV_STRIDE_H, PAD_H, DIL_H, ROWS_IN, ROWS_OUT):
    """Whether rows `first` ... of the filter lie between some rows of two chunks DISTANCE apart."""
    last = min(first + TAP_ROWS, KH) - 1
    return (
        first * DIL_H - PAD_H - DISTANCE < ROWS_IN and (ROWS_OUT - 1) * CONV_STRIDE_H + last * DIL_H - PAD_H >= DISTANCE
    )


@triton.jit
def lift(v, BLOCK_C: tl.constexpr):
    """A 2-D tile, with an axis for the channels before it where there are several."""
    return v if BLOCK_C == 1 else v[None, :, :]


@triton.jit
def turned(v, BLOCK_C: tl.constexpr):
    """A tile with its last two axes exchanged."""
    return tl.trans(v) if BLOCK_C == 1 else tl.permute(v, (0, 2, 1))


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr):
    return tl.zeros((ROWS, COLS) if BLOCK_C == 1 else (BLOCK_C, ROWS, COLS), tl.float32)


@triton.jit
def channel_numbers(BLOCK_C: tl.constexpr, INDEX_64: tl.constexpr):
    """The channels of a program: one, or the batch of its 3-D tiles."""
    first = index(tl.program_id(0) * BLOCK_C, INDEX_64)
    return first if BLOCK_C == 1 else (first + tl.arange(0, BLOCK_C))[:, None, None]


@triton.jit
def maps_at(n, c, stride_n, stride_c, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of the maps of images `n` and channels `c`."""
    at_n = lift(tl.multiple_of(n * stride_n, ALIGN)[:, None], BLOCK_C)
    at_c = c * stride_c
    return at_n + (tl.multiple_of(at_c, ALIGN) if BLOCK_C == 1 else at_c)


@triton.jit
def pixels_at(CHUNK: tl.constexpr, stride_h, stride_w, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
              DENSE: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
              BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """(offsets of a chunk's pixels in their map, which of them exist)."""
    p = index(tl.arange(0, BLOCK), INDEX_64)
    if DENSE:
        at = (CHUNK * ROWS * W + p) * stride_w
    else:
        at = (CHUNK * ROWS + p // W) * stride_h + p % W * stride_w
    if BLOCK_C > 1:
        at = tl.multiple_of(at, ALIGN)
    live = p < min(ROWS, H - CHUNK * ROWS) * W
    return lift(at[None, :], BLOCK_C), lift(live[None, :], BLOCK_C)


@triton.jit
def load_chunk(ptr, at, live, CHUNK: tl.constexpr, stride_h, stride_w, H: tl.constexpr, W: tl.constexpr,
               ROWS: tl.constexpr, DENSE: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
               BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """A chunk of the maps at `at`: [images, BLOCK]."""
    pixels, exist = pixels_at(CHUNK, stride_h, stride_w, H, W, ROWS, DENSE, ALIGN, INDEX_64, BLOCK, BLOCK_C)
    return tl.load(ptr + at + pixels, mask=live & exist, other=0.0)


@triton.jit
def matrices(wgt_ptr, at, live, stride_wgt_h, stride_wgt_w,
             W_IN: tl.constexpr, W_OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
             CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
             DIL_H: tl.constexpr, DIL_W: tl.constexpr, ROWS_IN: tl.constexpr, ROWS_OUT: tl.constexpr,
             UNIT: tl.constexpr, FIRST: tl.constexpr, DISTANCES: tl.constexpr, TRANSPOSED: tl.constexpr,
             BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """The matrix of each distance, [BLOCK_IN, BLOCK_OUT], or the other way round where TRANSPOSED."""
    k = tl.arange(0, BLOCK_IN)
    j = tl.arange(0, BLOCK_OUT)
    k = k[None, :] if TRANSPOSED else k[:, None]
    j = j[:, None] if TRANSPOSED else j[None, :]
    s = k % W_IN - j % W_OUT * CONV_STRIDE_W + PAD_W
    inside = (k < ROWS_IN * W_IN) & (j < ROWS_OUT * W_OUT) & (s >= 0) & (s < KW * DIL_W) & (s % DIL_W == 0)
    found = ()
    for d in tl.static_range(DISTANCES):
        r = k // W_IN - j // W_OUT * CONV_STRIDE_H + ((FIRST + d) * UNIT + PAD_H)
        mask = inside & (r >= 0) & (r < KH * DIL_H) & (r % DIL_H == 0)
        tap = r // DIL_H * stride_wgt_h + s // DIL_W * stride_wgt_w
        found = found + (tl.load(wgt_ptr + (at + lift(tap, BLOCK_C)), mask=lift(mask, BLOCK_C) & live, other=0.0),)
    return found


@triton.jit(do_not_specialize=("batch", "channels", "blocks"))
def fprop_kernel(
    x_ptr, wgt_ptr, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, channels, blocks,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    H_IN: tl.constexpr, W_IN: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    ROWS_IN: tl.constexpr, ROWS_OUT: tl.constexpr,
    UNIT: tl.constexpr, FIRST: tl.constexpr, DISTANCES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    X_DENSE: tl.constexpr, Y_DENSE: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    EVEN_C: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """One program: y of BLOCK_C output channels, for `blocks` times BLOCK_N images.

    Per channel and pair of chunks that meet, [BLOCK_N, BLOCK_IN] @ [BLOCK_IN, BLOCK_OUT].
    Programs of neighbouring channels are neighbours: in NHWC they share the cache lines of x.
    """
    STEP_OUT: tl.constexpr = ROWS_OUT * CONV_STRIDE_H
    o = channel_numbers(BLOCK_C, INDEX_64)
    live_o = EVEN_C | (o < channels)
    wgt = matrices(
        wgt_ptr, o * stride_wgt_o, live_o, stride_wgt_h, stride_wgt_w, W_IN, W_OUT, KH, KW,
        CONV_STRIDE_H, CONV_STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, ROWS_IN, ROWS_OUT, UNIT, FIRST, DISTANCES,
        False, BLOCK_IN, BLOCK_OUT, BLOCK_C,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=live_o, other=0.0).to(tl.float32)
    for block in tl.range(0, blocks, num_stages=1):
        n = index(tl.program_id(1) * blocks + block, INDEX_64) * BLOCK_N + tl.arange(0, BLOCK_N)
        live = lift((n < batch)[:, None], BLOCK_C) & live_o
        x_at = maps_at(n, o // MULTIPLIER, stride_x_n, stride_x_c, X_ALIGN, BLOCK_C)
        y_at = maps_at(n, o, stride_y_n, stride_y_c, Y_ALIGN, BLOCK_C)
        x = ()
        for j in tl.static_range(chunks(H_OUT, ROWS_OUT)):
            for i in tl.static_range(
                len(x), inputs_for(j, chunks(H_IN, ROWS_IN), ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES)
            ):
                x = x + (
                    load_chunk(
                        x_ptr, x_at, live, i, stride_x_h, stride_x_w, H_IN, W_IN, ROWS_IN,
                        X_DENSE, X_ALIGN, INDEX_64, BLOCK_IN, BLOCK_C,
                    ),
                )  # fmt: skip
            acc = zeros(BLOCK_N, BLOCK_OUT, BLOCK_C)
            for i in tl.static_range(chunks(H_IN, ROWS_IN)):
                if position(i, j, ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES) >= 0:
                    t = wgt[position(i, j, ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES)]
                    acc = mma(x[i], t, acc, PRECISION, EMULATE_BF16)
            if HAS_BIAS:
                acc += bias
            at, exist = pixels_at(
                j, stride_y_h, stride_y_w, H_OUT, W_OUT, ROWS_OUT, Y_DENSE, Y_ALIGN, INDEX_64, BLOCK_OUT, BLOCK_C
            )
            to, mask = y_ptr + y_at + at, live & exist
            finish(to, acc, mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION, False, EMULATE_BF16)


@triton.jit
def store_taps(dw_ptr, at, live, acc, stride_h: tl.constexpr, stride_w: tl.constexpr,
               W_IN: tl.constexpr, W_OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
               CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
               DIL_H: tl.constexpr, DIL_W: tl.constexpr, ROWS_IN: tl.constexpr, ROWS_OUT: tl.constexpr,
               UNIT: tl.constexpr, FIRST: tl.constexpr, DISTANCES: tl.constexpr, TAP_ROWS: tl.constexpr,
               BLOCK_TAPS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_C: tl.constexpr,
               EMULATE_BF16: tl.constexpr):  # fmt: skip
    """Sum the accumulators' entries by tap, TAP_ROWS rows of the filter at once, and store them.

    An output pixel and a tap name one input pixel: one row of one accumulator's column, if that chunk has it.
    """
    AXIS: tl.constexpr = 0 if BLOCK_C == 1 else 1
    SHAPE: tl.constexpr = (BLOCK_TAPS, BLOCK_OUT) if BLOCK_C == 1 else (BLOCK_C, BLOCK_TAPS, BLOCK_OUT)
    j = tl.arange(0, BLOCK_OUT)[None, :]
    t = tl.arange(0, BLOCK_TAPS)[:, None]
    for first in tl.static_range(0, KH, TAP_ROWS):
        r = first + t // KW
        iw = j % W_OUT * CONV_STRIDE_W + t % KW * DIL_W - PAD_W
        taps = min(TAP_ROWS, KH - first) * KW
        inside = (t < taps) & (j < ROWS_OUT * W_OUT) & (iw >= 0) & (iw < W_IN)
        total = zeros(BLOCK_TAPS, 1, BLOCK_C)
        for d in tl.static_range(DISTANCES):
            if reaches(first, TAP_ROWS, (FIRST + d) * UNIT, KH, CONV_STRIDE_H, PAD_H, DIL_H, ROWS_IN, ROWS_OUT):
                ih = j // W_OUT * CONV_STRIDE_H + r * DIL_H - ((FIRST + d) * UNIT + PAD_H)
                there = inside & (ih >= 0) & (ih < ROWS_IN)
                k = tl.broadcast_to(lift(tl.where(there, ih * W_IN + iw, 0), BLOCK_C), SHAPE)
                entries = tl.where(lift(there, BLOCK_C), tl.gather(acc[d], k, AXIS), 0.0)
                total += tl.sum(entries, AXIS + 1, keep_dims=True)
        dw = narrow(total, dw_ptr.dtype.element_ty, EMULATE_BF16)
        tap = lift(r * stride_h + t % KW * stride_w, BLOCK_C)
        tl.store(dw_ptr + (at + tap), dw, mask=lift(t < taps, BLOCK_C) & live)


@triton.jit(do_not_specialize=("batch", "channels", "blocks"))
def backward_kernel(
    dy_ptr, x_ptr, wgt_ptr, dx_ptr, dw_ptr,
    batch, channels, blocks,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_dx_n, stride_dx_c, stride_dx_h, stride_dx_w,
    stride_dw_split, stride_dw_o: tl.constexpr,
    stride_dw_h: tl.constexpr, stride_dw_w: tl.constexpr,
    H_IN: tl.constexpr, W_IN: tl.constexpr, H_OUT: tl.constexpr, W_OUT: tl.constexpr,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    ROWS_IN: tl.constexpr, ROWS_OUT: tl.constexpr,
    UNIT: tl.constexpr, FIRST: tl.constexpr, DISTANCES: tl.constexpr,
    TAP_ROWS: tl.constexpr, BLOCK_TAPS: tl.constexpr, WANT_DX: tl.constexpr, WANT_DW: tl.constexpr,
    DY_DENSE: tl.constexpr, X_DENSE: tl.constexpr, DX_DENSE: tl.constexpr,
    DY_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr,
    EVEN_C: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """One program: dx of BLOCK_C channels for `blocks` times BLOCK_N images, their share of dw, or both.

    Per channel and pair of chunks that meet, dx is [BLOCK_N, BLOCK_OUT] @ [BLOCK_OUT, BLOCK_IN]; dw is a
    [BLOCK_IN, BLOCK_OUT] sum of x^T dy for each distance, of which the diagonals are summed by tap in the end.
    `channels` are input channels if WANT_DX and output channels otherwise: dx sums over the output channels of its
    own, dw does not. dw: [splits, c_out, KH, KW] by strides, the filter gradient itself or partial sums.
    """
    STEP_OUT: tl.constexpr = ROWS_OUT * CONV_STRIDE_H
    OUT_OF_ONE: tl.constexpr = MULTIPLIER if WANT_DX else 1  # output channels of one of the program's channels
    IN_OF_ONE: tl.constexpr = MULTIPLIER // OUT_OF_ONE  # of the program's channels, those that share an input channel
    c = channel_numbers(BLOCK_C, INDEX_64)
    live_c = EVEN_C | (c < channels)
    wgt = ()
    if WANT_DX:
        for m in tl.static_range(OUT_OF_ONE):
            wgt = wgt + matrices(
                wgt_ptr, (c * OUT_OF_ONE + m) * stride_wgt_o, live_c, stride_wgt_h, stride_wgt_w, W_IN, W_OUT, KH, KW,
                CONV_STRIDE_H, CONV_STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, ROWS_IN, ROWS_OUT, UNIT, FIRST, DISTANCES,
                True, BLOCK_IN, BLOCK_OUT, BLOCK_C,
            )  # fmt: skip
    sums = ()
    if WANT_DW:
        for _ in tl.static_range(DISTANCES):
            sums = sums + (zeros(BLOCK_IN, BLOCK_OUT, BLOCK_C),)
    for block in tl.range(0, blocks, num_stages=1):
        n = index(tl.program_id(1) * blocks + block, INDEX_64) * BLOCK_N + tl.arange(0, BLOCK_N)
        live = lift((n < batch)[:, None], BLOCK_C) & live_c
        x_at = maps_at(n, c // IN_OF_ONE, stride_x_n, stride_x_c, X_ALIGN, BLOCK_C)
        dx_at = maps_at(n, c, stride_dx_n, stride_dx_c, DX_ALIGN, BLOCK_C)
        dy = ()  # OUT_OF_ONE tiles a chunk
        for i in tl.static_range(chunks(H_IN, ROWS_IN)):
            for j in tl.static_range(
                len(dy) // OUT_OF_ONE,
                outputs_for(i, chunks(H_OUT, ROWS_OUT), ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES),
            ):
                for m in tl.static_range(OUT_OF_ONE):
                    dy_at = maps_at(n, c * OUT_OF_ONE + m, stride_dy_n, stride_dy_c, DY_ALIGN, BLOCK_C)
                    dy = dy + (
                        load_chunk(
                            dy_ptr, dy_at, live, j, stride_dy_h, stride_dy_w, H_OUT, W_OUT, ROWS_OUT,
                            DY_DENSE, DY_ALIGN, INDEX_64, BLOCK_OUT, BLOCK_C,
                        ),
                    )  # fmt: skip
            if WANT_DW:
                x = load_chunk(
                    x_ptr, x_at, live, i, stride_x_h, stride_x_w, H_IN, W_IN, ROWS_IN,
                    X_DENSE, X_ALIGN, INDEX_64, BLOCK_IN, BLOCK_C,
                )  # fmt: skip
                new = ()
                for d in tl.static_range(DISTANCES):
                    total = sums[d]
                    for j in tl.static_range(len(dy)):
                        if position(i, j, ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES) == d:
                            total = mma(turned(x, BLOCK_C), dy[j], total, PRECISION, EMULATE_BF16)
                    new = new + (total,)
                sums = new
            if WANT_DX:
                acc = zeros(BLOCK_N, BLOCK_IN, BLOCK_C)
                for j in tl.static_range(len(dy) // OUT_OF_ONE):
                    if position(i, j, ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES) >= 0:
                        for m in tl.static_range(OUT_OF_ONE):
                            t = wgt[m * DISTANCES + position(i, j, ROWS_IN, STEP_OUT, UNIT, FIRST, DISTANCES)]
                            acc = mma(dy[j * OUT_OF_ONE + m], t, acc, PRECISION, EMULATE_BF16)
                at, exist = pixels_at(
                    i, stride_dx_h, stride_dx_w, H_IN, W_IN, ROWS_IN, DX_DENSE, DX_ALIGN, INDEX_64, BLOCK_IN, BLOCK_C
                )
                dx = narrow(acc, dx_ptr.dtype.element_ty, EMULATE_BF16)
                tl.store(dx_ptr + dx_at + at, dx, mask=live & exist)
    if WANT_DW:
        at = index(tl.program_id(1), INDEX_64) * stride_dw_split + c * stride_dw_o
        store_taps(
            dw_ptr, at, live_c, sums, stride_dw_h, stride_dw_w, W_IN, W_OUT, KH, KW,
            CONV_STRIDE_H, CONV_STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, ROWS_IN, ROWS_OUT, UNIT, FIRST, DISTANCES,
            TAP_ROWS, BLOCK_TAPS, BLOCK_OUT, BLOCK_C, EMULATE_BF16,
        )  # fmt: skip
