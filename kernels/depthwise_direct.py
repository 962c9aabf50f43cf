"""Depthwise convolution by multiply-adds, marching down the rows: small kernels, every stride, dilation and layout.

A program holds a tile of lanes by channels and walks down the rows. A lane is BLOCK_W neighbouring columns of the
result's map (in backward, BLOCK_W * CONV_STRIDE_W of the input's), and lanes are flattened over batch and width. Every
pixel that a lane needs of a row is loaded and converted once, and meets each column of the lane and each kernel row
while it is in registers: the sums of all output rows that it touches are carried along, in fp32, and the oldest is
stored and dropped at each step. Filters stay in registers.

A step takes no longer than memory to answer only if its loads were made before: they are, BLOCK_A steps ahead, into
registers. Neighbouring lanes share pixels, which come from L1; Triton's pipelined loads would bypass it.

The tile lies with its contiguous axis last: PIXELS_LAST says that this is the lanes (NCHW) and not the channels
(NHWC). *_ALIGN is the power of two that divides a tensor's strides of pixels, as in implicit_gemm.py. *_RUN: how many
neighbours in a row are loaded or stored at once, a power of two; if not 1, PIXELS_LAST, columns are contiguous, and it
divides a lane's columns, the map's width and all other strides.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .runs import columns_of, count, item, place, run_of, run_pointers, runs_met
from .tiles import NOWHERE, below, cols, index, narrow, pointers, rows

SIZES = ("batch", "h_in", "w_in", "h_out", "w_out", "steps", "CHANNELS")


# What meets what, as tuples of numbers that the compiler knows.


@triton.constexpr_function
def all_below(number):
    return tuple(range(number))


@triton.constexpr_function
def tap_at(reach, dilation, kernel):
    """The tap that lies `reach` pixels from the first, or -1 where the dilation skips that pixel."""
    return reach // dilation if reach % dilation == 0 and 0 <= reach < kernel * dilation else -1


@triton.constexpr_function
def input_rows_met(stride, dilation, kernel):
    """Of the `stride` input rows of a step of fprop_kernel, those that meet a tap."""
    return tuple(row for row in range(stride) if any((r * dilation - row) % stride == 0 for r in range(kernel)))


@triton.constexpr_function
def input_columns_met(width, stride, dilation, kernel):
    """The input columns, counted from the first tap of a lane's first column, that meet its `width` output columns."""
    return tuple(sorted({o * stride + s * dilation for o in range(width) for s in range(kernel)}))


@triton.constexpr_function
def forward_taps(down, along, live, width, stride_h, stride_w, kh, kw, dil_h, dil_w):
    """By row and column of `live` output rows of a lane, the tap that joins it with the input pixel `down` rows into
    the last one's step and `along` columns from the lane's first tap; -1 where there is none.
    """
    found = []
    for i in range(live * width):
        r = tap_at((live - 1 - i // width) * stride_h + down, dil_h, kh)
        s = tap_at(along - i % width * stride_w, dil_w, kw)
        found.append(r * kw + s if min(r, s) >= 0 else -1)
    return tuple(found)


@triton.constexpr_function
def least_shift(stride, pad, dilation, kernel):
    """The least q by which output column p + q can lie from the input columns p * stride ... that it meets."""
    return (pad - (kernel - 1) * dilation) // stride


@triton.constexpr_function
def output_columns_met(width, stride, pad, dilation, kernel):
    """The output columns, counted from a lane's first plus `least_shift`, that meet its input columns."""
    reaches = {z + pad - s * dilation for z in range(width * stride) for s in range(kernel)}
    least = least_shift(stride, pad, dilation, kernel)
    return tuple(sorted(reach // stride - least for reach in reaches if reach % stride == 0))


@triton.constexpr_function
def backward_taps(along, first, live, width, stride, pad, kh, kw, dil_h, dil_w):
    """By row and column of `live` input rows of a lane, the tap that joins it with output column `along` of
    `output_columns_met`, counted from `first` on; -1 where there is none.
    """
    shift = least_shift(stride, pad, dil_w, kw) + along
    found = []
    for i in range(live * width * stride):
        r = tap_at(i // (width * stride), dil_h, kh)
        s = tap_at(i % (width * stride) + pad - shift * stride, dil_w, kw)
        found.append(first + r * kw + s if min(r, s) >= 0 else -1)
    return tuple(found)


@triton.constexpr_function
def joined_pixels(along, first, total, width, stride, pad, kh, kw, dil_h, dil_w):
    """By tap of `total`, those of one output channel from `first` on, the pixel of a lane's input rows that it joins
    with output column `along`, as in `backward_taps`; -1 where there is none.
    """
    shift = least_shift(stride, pad, dil_w, kw) + along
    found = [-1] * total
    for tap in range(kh * kw):
        z = shift * stride - pad + tap % kw * dil_w
        if 0 <= z < width * stride:
            found[first + tap] = tap // kw * dil_h * width * stride + z
    return tuple(found)


@triton.constexpr_function
def rows_alive(kernel, stride, dilation):
    """How many input rows, from the first, a step of backward_kernel has to hold."""
    return max((kernel - 1) * dilation + 1, stride)


@triton.jit
def filter_taps(
    wgt_ptr, o, live, stride_wgt_h, stride_wgt_w,
    KH: tl.constexpr, KW: tl.constexpr, PIXELS_LAST: tl.constexpr,
):  # fmt: skip
    """The filters of a tile's channels, one fp32 vector a tap; `o`: their offsets, [BLOCK_C]."""
    taps = ()
    for tap in tl.static_range(KH * KW):
        at = o + tap // KW * stride_wgt_h + tap % KW * stride_wgt_w
        taps = taps + (cols(tl.load(wgt_ptr + at, mask=live, other=0.0).to(tl.float32), PIXELS_LAST),)
    return taps


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """COUNT tiles of fp32 zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        if PIXELS_LAST:
            tiles = tiles + (tl.zeros((BLOCK_C, BLOCK_P), tl.float32),)
        else:
            tiles = tiles + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    return tiles


@triton.jit
def plus_products(sums, tile, factors, WHICH: tl.constexpr):
    """The sums, plus the product of the tile with the factor whose number WHICH has for it, if that is not -1."""
    summed = ()
    for i in tl.static_range(count(WHICH)):
        if item(WHICH, i) >= 0:
            summed = summed + (sums[i] + tile * factors[item(WHICH, i)],)
        else:
            summed = summed + (sums[i],)
    return summed


@triton.jit
def row_columns(
    ptr, at, first_column, live_c, row, wanted, height, width, stride_h, stride_w,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr, MASK_C: tl.constexpr, ALIGN: tl.constexpr, RUN: tl.constexpr,
    INDEX_64: tl.constexpr,
):  # fmt: skip
    """Tiles of the COLUMNS of a row, as they lie in memory; 0 where there are none, or the row is not `wanted`.

    COLUMNS are counted from the first_column, to which `at` points, plus FIRST, which is 0 where RUN is 1.
    """
    tiles = ()
    columns = tl.where(below(row, height) & wanted, width, 0)
    if RUN > 1:
        RUNS: tl.constexpr = runs_met(COLUMNS, FIRST, RUN)
        for i in tl.static_range(count(RUNS)):
            inside = below(first_column + item(RUNS, i) * RUN, columns)
            if MASK_C:
                inside &= live_c
            at_run = run_pointers(ptr, at, index(row, INDEX_64) * stride_h, item(RUNS, i) * RUN, RUN)
            tiles = tiles + columns_of(tl.load(at_run, mask=inside[:, :, None], other=0.0), RUN)
        met = ()
        for i in tl.static_range(count(COLUMNS)):
            met = met + (tiles[place(RUNS, FIRST + item(COLUMNS, i), RUN)],)
        return met
    else:
        to_row = tl.multiple_of(index(row, INDEX_64) * stride_h, ALIGN)
        for i in tl.static_range(count(COLUMNS)):
            inside = below(first_column + item(COLUMNS, i), columns)
            if MASK_C:
                inside &= live_c
            at_column = pointers(ptr, at, to_row, item(COLUMNS, i) * stride_w, ALIGN)
            tiles = tiles + (tl.load(at_column, mask=inside, other=0.0),)
        return tiles


@triton.jit
def source_step(
    x_ptr, x_at, iw, live_c, t, h_in, w_in, stride_x_h, stride_x_w,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, CONV_STRIDE_H: tl.constexpr, PAD_H: tl.constexpr,
    MASK_C: tl.constexpr, ALIGN: tl.constexpr, RUN: tl.constexpr, INDEX_64: tl.constexpr,
):  # fmt: skip
    """What step t of fprop_kernel meets of x."""
    tiles = ()
    for i in tl.static_range(count(ROWS)):
        tiles = tiles + row_columns(
            x_ptr, x_at, iw, live_c, t * CONV_STRIDE_H - PAD_H + item(ROWS, i), True, h_in, w_in,
            stride_x_h, stride_x_w, COLUMNS, FIRST, MASK_C, ALIGN, RUN, INDEX_64,
        )  # fmt: skip
    return tiles


@triton.jit(do_not_specialize=SIZES)
def fprop_kernel(
    x_ptr, wgt_ptr, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out, steps,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    CHANNELS, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    MASK_C: tl.constexpr, PIXELS_LAST: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, X_RUN: tl.constexpr, Y_RUN: tl.constexpr,
    INDEX_64: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """One program: `steps` output rows of BLOCK_P lanes, of BLOCK_W output columns each, by BLOCK_C output channels.

    Step t meets the input rows t * CONV_STRIDE_H - PAD_H and the CONV_STRIDE_H - 1 after it. They meet the output rows
    t - LIVE + 1 .. t, whose sums are `acc`; the first of them is then complete.
    CHANNELS: of y; output channel o reads input channel o // MULTIPLIER.
    """
    LIVE: tl.constexpr = (KH - 1) * DIL_H // CONV_STRIDE_H + 1
    C_TILES = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    ROWS: tl.constexpr = input_rows_met(CONV_STRIDE_H, DIL_H, KH)
    COLUMNS: tl.constexpr = input_columns_met(BLOCK_W, CONV_STRIDE_W, DIL_W, KW)
    FIRST: tl.constexpr = 0 if X_RUN == 1 else -PAD_W  # runs begin where lanes do
    MET: tl.constexpr = count(ROWS) * count(COLUMNS)
    pid = tl.program_id(0)
    c = index(pid % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C), INDEX_64)
    p = index(pid // C_TILES, INDEX_64) * BLOCK_P + tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * steps
    lanes = (w_out + BLOCK_W - 1) // BLOCK_W
    image = p // lanes
    ow = p % lanes * BLOCK_W
    iw = ow * CONV_STRIDE_W - (PAD_W if X_RUN == 1 else 0)

    taps = filter_taps(wgt_ptr, c * stride_wgt_o, c < CHANNELS, stride_wgt_h, stride_wgt_w, KH, KW, PIXELS_LAST)
    x_p = rows(tl.multiple_of(image * stride_x_n + iw * stride_x_w, X_ALIGN), PIXELS_LAST)
    x_at = x_p + cols(c // MULTIPLIER * stride_x_c, PIXELS_LAST)
    y_p = rows(tl.multiple_of(image * stride_y_n + ow * stride_y_w, Y_ALIGN), PIXELS_LAST)
    y_at = y_p + cols(c * stride_y_c, PIXELS_LAST)
    iw = rows(tl.where(image < batch, iw, NOWHERE).to(tl.int32), PIXELS_LAST)
    ow = rows(tl.where(image < batch, ow, NOWHERE).to(tl.int32), PIXELS_LAST)
    live_c = cols(c < CHANNELS, PIXELS_LAST)
    if HAS_BIAS:
        bias = cols(tl.load(bias_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32), PIXELS_LAST)

    ahead = ()
    for a in tl.static_range(BLOCK_A):
        ahead = ahead + source_step(
            x_ptr, x_at, iw, live_c, first + a, h_in, w_in, stride_x_h, stride_x_w,
            ROWS, COLUMNS, FIRST, CONV_STRIDE_H, PAD_H, MASK_C, X_ALIGN, X_RUN, INDEX_64,
        )  # fmt: skip
    acc = zeros(LIVE * BLOCK_W, BLOCK_P, BLOCK_C, PIXELS_LAST)
    last = tl.minimum(first + steps, h_out)
    for t in tl.range(first, last + LIVE - 1, num_stages=1):
        ahead = ahead + source_step(
            x_ptr, x_at, iw, live_c, t + BLOCK_A, h_in, w_in, stride_x_h, stride_x_w,
            ROWS, COLUMNS, FIRST, CONV_STRIDE_H, PAD_H, MASK_C, X_ALIGN, X_RUN, INDEX_64,
        )  # fmt: skip
        for i in tl.static_range(MET):
            acc = plus_products(
                acc, ahead[i].to(tl.float32), taps,
                forward_taps(
                    item(ROWS, i // count(COLUMNS)), item(COLUMNS, i % count(COLUMNS)), LIVE, BLOCK_W,
                    CONV_STRIDE_H, CONV_STRIDE_W, KH, KW, DIL_H, DIL_W,
                ),
            )  # fmt: skip
        ahead = ahead[MET:]
        oh = t - (LIVE - 1)
        row = tl.multiple_of(index(oh, INDEX_64) * stride_y_h, Y_ALIGN)
        for o in tl.static_range(0, BLOCK_W, Y_RUN):
            y = acc[o]
            if Y_RUN > 1:
                y = run_of(acc[o : o + Y_RUN], Y_RUN)
            if HAS_BIAS:
                y += bias[:, :, None] if Y_RUN > 1 else bias
            inside = below(ow + o, tl.where(oh >= first, w_out, 0))
            if MASK_C:
                inside &= live_c
            if Y_RUN > 1:
                to, inside = run_pointers(y_ptr, y_at, row, o, Y_RUN), inside[:, :, None]
            else:
                to = pointers(y_ptr, y_at, row, o * stride_y_w, Y_ALIGN)
            finish(to, y, inside, y_ptr, residual_ptr, kept_ptr, ACTIVATION, False, EMULATE_BF16)
        acc = acc[BLOCK_W:] + zeros(BLOCK_W, BLOCK_P, BLOCK_C, PIXELS_LAST)


@triton.jit
def gradient_step(
    dy_ptr, dy_at, ow, live_c, t, h_out, w_out, stride_dy_c, stride_dy_h, stride_dy_w,
    MULTIPLIER: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr,
    MASK_C: tl.constexpr, ALIGN: tl.constexpr, RUN: tl.constexpr, INDEX_64: tl.constexpr,
):  # fmt: skip
    """What step t of backward_kernel meets of dy, by output channel."""
    tiles = ()
    for m in tl.static_range(MULTIPLIER):
        tiles = tiles + row_columns(
            dy_ptr, dy_at + m * stride_dy_c, ow, live_c, t, True, h_out, w_out, stride_dy_h, stride_dy_w,
            COLUMNS, FIRST, MASK_C, ALIGN, RUN, INDEX_64,
        )  # fmt: skip
    return tiles


@triton.jit
def input_rows(
    x_ptr, x_at, iw, live_c, first_row, from_row, until_row, h_in, w_in, stride_x_h, stride_x_w,
    COUNT: tl.constexpr, COLUMNS: tl.constexpr, MASK_C: tl.constexpr, ALIGN: tl.constexpr, RUN: tl.constexpr,
    INDEX_64: tl.constexpr,
):  # fmt: skip
    """COUNT rows of x from first_row on. Rows of other programs are 0."""
    tiles = ()
    for i in tl.static_range(COUNT):
        ih = first_row + i
        tiles = tiles + row_columns(
            x_ptr, x_at, iw, live_c, ih, (ih >= from_row) & (ih < until_row), h_in, w_in, stride_x_h, stride_x_w,
            COLUMNS, 0, MASK_C, ALIGN, RUN, INDEX_64,
        )  # fmt: skip
    return tiles


@triton.jit
def floats(tiles, COUNT: tl.constexpr):
    """The first COUNT tiles in fp32."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tiles[i].to(tl.float32),)
    return found


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy_ptr, x_ptr, wgt_ptr, dx_ptr, dw_ptr,
    batch, h_in, w_in, h_out, w_out, steps,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_dx_n, stride_dx_c, stride_dx_h, stride_dx_w,
    stride_dw_split, stride_dw_o: tl.constexpr,
    stride_dw_h: tl.constexpr, stride_dw_w: tl.constexpr,
    CHANNELS, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DW: tl.constexpr, MASK_C: tl.constexpr, PIXELS_LAST: tl.constexpr,
    DY_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr,
    DY_RUN: tl.constexpr, X_RUN: tl.constexpr, DX_RUN: tl.constexpr,
    INDEX_64: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """One program: `steps` * CONV_STRIDE_H input rows of BLOCK_P lanes, of BLOCK_W * CONV_STRIDE_W input columns each,
    by BLOCK_C channels.

    dgrad (WANT_DX), wgrad (WANT_DW) or both: they read the same rows of dy. Step t meets row t of dy. Its taps reach
    the input rows t * CONV_STRIDE_H - PAD_H and the LIVE - 1 after it: their sums of dx and their x are carried along,
    and the first CONV_STRIDE_H of them are then complete. No tap of a strided convolution is wasted.
    dw: [programs of one channel tile, CHANNELS * MULTIPLIER, KH, KW] by strides, the filter gradient itself or partial
    sums; each pair of an input and an output pixel belongs to the program that owns the input pixel.
    """
    LIVE: tl.constexpr = rows_alive(KH, CONV_STRIDE_H, DIL_H)
    LEAST: tl.constexpr = least_shift(CONV_STRIDE_W, PAD_W, DIL_W, KW)
    SHIFT: tl.constexpr = LEAST if DY_RUN == 1 else 0  # runs begin where lanes do
    WARM_UP: tl.constexpr = (KH - 1) * DIL_H // CONV_STRIDE_H
    WIDTH: tl.constexpr = BLOCK_W * CONV_STRIDE_W
    DONE: tl.constexpr = CONV_STRIDE_H * WIDTH  # pixels of a lane that each step completes
    COLUMNS: tl.constexpr = output_columns_met(BLOCK_W, CONV_STRIDE_W, PAD_W, DIL_W, KW)
    MET: tl.constexpr = MULTIPLIER * count(COLUMNS)
    TAPS: tl.constexpr = KH * KW
    C_TILES = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = index(pid % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C), INDEX_64)
    p = index(pid // C_TILES, INDEX_64) * BLOCK_P + tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * steps
    lanes = (w_in + WIDTH - 1) // WIDTH
    image = p // lanes
    ow = p % lanes * BLOCK_W
    iw = ow * CONV_STRIDE_W

    live_c = cols(c < CHANNELS, PIXELS_LAST)
    dy_p = rows(tl.multiple_of(image * stride_dy_n + (ow + SHIFT) * stride_dy_w, DY_ALIGN), PIXELS_LAST)
    dy_at = dy_p + cols(c * MULTIPLIER * stride_dy_c, PIXELS_LAST)
    if WANT_DW:
        x_p = rows(tl.multiple_of(image * stride_x_n + iw * stride_x_w, X_ALIGN), PIXELS_LAST)
        x_at = x_p + cols(c * stride_x_c, PIXELS_LAST)
        dw = zeros(MULTIPLIER * TAPS, BLOCK_P, BLOCK_C, PIXELS_LAST)
    if WANT_DX:
        dx_p = rows(tl.multiple_of(image * stride_dx_n + iw * stride_dx_w, DX_ALIGN), PIXELS_LAST)
        dx_at = dx_p + cols(c * stride_dx_c, PIXELS_LAST)
        taps = ()
        for m in tl.static_range(MULTIPLIER):
            o = (c * MULTIPLIER + m) * stride_wgt_o
            taps = taps + filter_taps(wgt_ptr, o, c < CHANNELS, stride_wgt_h, stride_wgt_w, KH, KW, PIXELS_LAST)
        dx = zeros(LIVE * WIDTH, BLOCK_P, BLOCK_C, PIXELS_LAST)
    iw = rows(tl.where(image < batch, iw, NOWHERE).to(tl.int32), PIXELS_LAST)
    ow = rows(tl.where(image < batch, ow + SHIFT, NOWHERE).to(tl.int32), PIXELS_LAST)

    # Before its own rows a program takes the rows of dy that reach them, as far as there are any.
    start = tl.maximum(first - WARM_UP, 0)
    last = tl.minimum(first + steps, (h_in - 1 + PAD_H) // CONV_STRIDE_H + 1)
    if WANT_DW:
        from_row = first * CONV_STRIDE_H - PAD_H
        until_row = last * CONV_STRIDE_H - PAD_H
        x_row = start * CONV_STRIDE_H - PAD_H
        x_ahead = input_rows(
            x_ptr, x_at, iw, live_c, x_row, from_row, until_row, h_in, w_in, stride_x_h, stride_x_w,
            LIVE + (BLOCK_A - 1) * CONV_STRIDE_H, all_below(WIDTH), MASK_C, X_ALIGN, X_RUN, INDEX_64,
        )  # fmt: skip
        xs = floats(x_ahead, (LIVE - CONV_STRIDE_H) * WIDTH)
        x_ahead = x_ahead[(LIVE - CONV_STRIDE_H) * WIDTH :]
    dy_ahead = ()
    for a in tl.static_range(BLOCK_A):
        dy_ahead = dy_ahead + gradient_step(
            dy_ptr, dy_at, ow, live_c, start + a, h_out, w_out, stride_dy_c, stride_dy_h, stride_dy_w,
            MULTIPLIER, COLUMNS, LEAST - SHIFT, MASK_C, DY_ALIGN, DY_RUN, INDEX_64,
        )  # fmt: skip
    for t in tl.range(start, last, num_stages=1):
        dy_ahead = dy_ahead + gradient_step(
            dy_ptr, dy_at, ow, live_c, t + BLOCK_A, h_out, w_out, stride_dy_c, stride_dy_h, stride_dy_w,
            MULTIPLIER, COLUMNS, LEAST - SHIFT, MASK_C, DY_ALIGN, DY_RUN, INDEX_64,
        )  # fmt: skip
        if WANT_DW:
            x_ahead = x_ahead + input_rows(
                x_ptr, x_at, iw, live_c, (t + BLOCK_A - 1) * CONV_STRIDE_H - PAD_H + LIVE, from_row, until_row,
                h_in, w_in, stride_x_h, stride_x_w, CONV_STRIDE_H, all_below(WIDTH), MASK_C, X_ALIGN, X_RUN, INDEX_64,
            )  # fmt: skip
            xs = xs + floats(x_ahead, DONE)
            x_ahead = x_ahead[DONE:]
        for i in tl.static_range(MET):
            d = dy_ahead[i].to(tl.float32)
            if WANT_DX:
                dx = plus_products(
                    dx, d, taps,
                    backward_taps(
                        item(COLUMNS, i % count(COLUMNS)), i // count(COLUMNS) * TAPS, LIVE, BLOCK_W,
                        CONV_STRIDE_W, PAD_W, KH, KW, DIL_H, DIL_W,
                    ),
                )  # fmt: skip
            if WANT_DW:
                dw = plus_products(
                    dw, d, xs,
                    joined_pixels(
                        item(COLUMNS, i % count(COLUMNS)), i // count(COLUMNS) * TAPS, MULTIPLIER * TAPS, BLOCK_W,
                        CONV_STRIDE_W, PAD_W, KH, KW, DIL_H, DIL_W,
                    ),
                )  # fmt: skip
        dy_ahead = dy_ahead[MET:]
        if WANT_DX:
            for i in tl.static_range(CONV_STRIDE_H):
                ih = t * CONV_STRIDE_H - PAD_H + i
                dx_row = tl.multiple_of(index(ih, INDEX_64) * stride_dx_h, DX_ALIGN)
                width = tl.where((t >= first) & below(ih, h_in), w_in, 0)
                for z in tl.static_range(0, WIDTH, DX_RUN):
                    inside = below(iw + z, width)
                    if MASK_C:
                        inside &= live_c
                    out = dx[i * WIDTH + z]
                    if DX_RUN > 1:
                        out = run_of(dx[i * WIDTH + z : i * WIDTH + z + DX_RUN], DX_RUN)
                    out = narrow(out, dx_ptr.dtype.element_ty, EMULATE_BF16)
                    if DX_RUN > 1:
                        to, inside = run_pointers(dx_ptr, dx_at, dx_row, z, DX_RUN), inside[:, :, None]
                    else:
                        to = pointers(dx_ptr, dx_at, dx_row, z * stride_dx_w, DX_ALIGN)
                    tl.store(to, out, mask=inside)
            dx = dx[DONE:] + zeros(DONE, BLOCK_P, BLOCK_C, PIXELS_LAST)
        if WANT_DW:
            xs = xs[DONE:]

    if WANT_DW:
        split = index(tl.program_id(1) * (tl.num_programs(0) // C_TILES) + pid // C_TILES, INDEX_64)
        at = split * stride_dw_split + c * (MULTIPLIER * stride_dw_o)
        for i in tl.static_range(MULTIPLIER * TAPS):
            tap = i // TAPS * stride_dw_o + i % TAPS // KW * stride_dw_h + i % KW * stride_dw_w
            total = narrow(tl.sum(dw[i], 1 if PIXELS_LAST else 0), dw_ptr.dtype.element_ty, EMULATE_BF16)
            tl.store(dw_ptr + at + tap, total, mask=c < CHANNELS)
