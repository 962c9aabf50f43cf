"""Depthwise convolution by multiply-adds, marching down the rows: small kernels, every stride, dilation and layout.

A program holds a tile of columns, flattened over batch and width, by channels, and walks down the rows. Each row is
loaded once per column tap and meets every kernel row while it is in registers: the sums of all output rows that it
touches are carried along, in fp32, and the oldest is stored and dropped at each step. Filters stay in registers.
The shifted loads of one row overlap and come from L1, so the rows' loop is not pipelined: pipelined loads bypass it.

The tile lies with its contiguous axis last: PIXELS_LAST says that this is the columns (NCHW) and not the channels
(NHWC). *_ALIGN is the power of two that divides a tensor's strides of pixels, as in implicit_gemm.py.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl

from .tiles import NOWHERE, as_mask, below, cols, index, narrow, pointers, rows

SIZES = ("batch", "h_in", "w_in", "h_out", "w_out", "steps")


@triton.constexpr_function
def tap_at(reach, dilation, kernel):
    """The tap that lies `reach` pixels from the first, or -1 where the dilation skips that pixel."""
    return reach // dilation if reach % dilation == 0 and 0 <= reach < kernel * dilation else -1


@triton.constexpr_function
def any_tap(residue, stride, dilation, kernel):
    """Whether some tap lies a multiple of `stride` pixels past `residue`."""
    return any((tap * dilation - residue) % stride == 0 for tap in range(kernel))


@triton.constexpr_function
def rows_alive(kernel, stride, dilation):
    """How many input rows, from the first, a step of backward_kernel has to hold."""
    return max((kernel - 1) * dilation + 1, stride)


@triton.constexpr_function
def met(shift, stride, pad, dilation, kernel):
    """Whether any tap joins input columns q * stride, ... q * stride + stride - 1 with output column q + shift."""
    reaches = range(pad - shift * stride, pad - shift * stride + stride)
    return any(reach % dilation == 0 and 0 <= reach < kernel * dilation for reach in reaches)


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


@triton.jit(do_not_specialize=SIZES)
def fprop_kernel(
    x_ptr, wgt_ptr, bias_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out, steps,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    CHANNELS: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, HAS_BIAS: tl.constexpr, PIXELS_LAST: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, INDEX_64: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: `steps` output rows of BLOCK_P output columns (batch x w_out, flattened) by BLOCK_C output channels.

    Step t loads the input rows t * CONV_STRIDE_H - PAD_H and the CONV_STRIDE_H - 1 after it. They meet the output rows
    t - LIVE + 1 .. t, whose sums are `acc`; the first of them is then complete.
    CHANNELS: of y; output channel o reads input channel o // MULTIPLIER.
    """
    LIVE: tl.constexpr = (KH - 1) * DIL_H // CONV_STRIDE_H + 1
    C_TILES: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    MASK_C: tl.constexpr = CHANNELS % BLOCK_C != 0
    pid = tl.program_id(0)
    c = index(pid % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C), INDEX_64)
    p = index(pid // C_TILES, INDEX_64) * BLOCK_P + tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * steps
    image = p // w_out
    ow = p % w_out
    iw = ow * CONV_STRIDE_W - PAD_W

    taps = filter_taps(wgt_ptr, c * stride_wgt_o, c < CHANNELS, stride_wgt_h, stride_wgt_w, KH, KW, PIXELS_LAST)
    x_p = rows(tl.multiple_of(image * stride_x_n + iw * stride_x_w, X_ALIGN), PIXELS_LAST)
    x_at = x_p + cols(c // MULTIPLIER * stride_x_c, PIXELS_LAST)
    y_p = rows(tl.multiple_of(image * stride_y_n + ow * stride_y_w, Y_ALIGN), PIXELS_LAST)
    y_at = y_p + cols(c * stride_y_c, PIXELS_LAST)
    iw = rows(tl.where(image < batch, iw, NOWHERE).to(tl.int32), PIXELS_LAST)
    live_c = cols(c < CHANNELS, PIXELS_LAST)
    live = rows(image < batch, PIXELS_LAST)
    if MASK_C:
        live &= live_c
    if HAS_BIAS:
        bias = cols(tl.load(bias_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32), PIXELS_LAST)

    acc = zeros(LIVE, BLOCK_P, BLOCK_C, PIXELS_LAST)
    last = tl.minimum(first + steps, h_out)
    for t in tl.range(first, last + LIVE - 1, num_stages=1):
        for residue in tl.static_range(CONV_STRIDE_H):
            if any_tap(residue, CONV_STRIDE_H, DIL_H, KH):
                ih = t * CONV_STRIDE_H + residue - PAD_H
                width = tl.where(below(ih, h_in), w_in, 0)
                row = tl.multiple_of(index(ih, INDEX_64) * stride_x_h, X_ALIGN)
                for s in tl.static_range(KW):
                    inside = below(iw + s * DIL_W, width)
                    if MASK_C:
                        inside &= live_c
                    x_s = pointers(x_ptr, x_at, row, s * DIL_W * stride_x_w, X_ALIGN)
                    x = tl.load(x_s, mask=inside, other=0.0).to(tl.float32)
                    acc = plus_column(acc, x, taps, s, residue, LIVE, KH, KW, DIL_H, CONV_STRIDE_H)
        oh = t - (LIVE - 1)
        y = acc[0]
        if HAS_BIAS:
            y += bias
        row = tl.multiple_of(index(oh, INDEX_64) * stride_y_h, Y_ALIGN)
        y = narrow(y, y_ptr.dtype.element_ty, EMULATE_BF16)
        tl.store(y_ptr + (y_at + row), y, mask=as_mask(live & (oh >= first)))
        acc = acc[1:] + zeros(1, BLOCK_P, BLOCK_C, PIXELS_LAST)


@triton.jit
def plus_column(
    acc, x, taps, S: tl.constexpr, RESIDUE: tl.constexpr,
    COUNT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DIL_H: tl.constexpr, CONV_STRIDE_H: tl.constexpr,
):  # fmt: skip
    """The sums of COUNT output rows plus what column S of the taps makes of x, RESIDUE rows into the last's step."""
    summed = ()
    for i in tl.static_range(COUNT):
        if tap_at((COUNT - 1 - i) * CONV_STRIDE_H + RESIDUE, DIL_H, KH) >= 0:
            summed = summed + (
                acc[i] + x * taps[tap_at((COUNT - 1 - i) * CONV_STRIDE_H + RESIDUE, DIL_H, KH) * KW + S],
            )
        else:
            summed = summed + (acc[i],)
    return summed


@triton.jit
def plus_taps(
    dx, d, taps, FIRST: tl.constexpr, PHASE: tl.constexpr,
    COUNT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DIL_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr,
):  # fmt: skip
    """The sums dx, row by row and phase by phase, plus what a column of taps makes of d in the rows of PHASE."""
    summed = ()
    for i in tl.static_range(COUNT):
        if i % CONV_STRIDE_W == PHASE and tap_at(i // CONV_STRIDE_W, DIL_H, KH) >= 0:
            summed = summed + (dx[i] + d * taps[FIRST + tap_at(i // CONV_STRIDE_W, DIL_H, KH) * KW],)
        else:
            summed = summed + (dx[i],)
    return summed


@triton.jit
def plus_products(
    dw, d, xs, FIRST: tl.constexpr, PHASE: tl.constexpr,
    COUNT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DIL_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr,
):  # fmt: skip
    """The sums dw plus, in a column of taps, the products of d with the rows of x that it meets in PHASE."""
    summed = ()
    for i in tl.static_range(COUNT):
        if tap_at(i - FIRST, KW, KH) >= 0:
            summed = summed + (dw[i] + d * xs[tap_at(i - FIRST, KW, KH) * DIL_H * CONV_STRIDE_W + PHASE],)
        else:
            summed = summed + (dw[i],)
    return summed


@triton.jit
def input_rows(
    x_ptr, x_at, iw, live_c, from_row, until_row, h_in, w_in, stride_x_h, stride_x_w,
    first_row, COUNT: tl.constexpr, PHASES: tl.constexpr, MASK_C: tl.constexpr,
    ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
):  # fmt: skip
    """Tiles of x in fp32: COUNT rows from first_row on, PHASES columns from iw on. Rows of other programs are 0."""
    tiles = ()
    for i in tl.static_range(COUNT):
        ih = first_row + i
        width = tl.where(below(ih, h_in) & (ih >= from_row) & (ih < until_row), w_in, 0)
        row = tl.multiple_of(index(ih, INDEX_64) * stride_x_h, ALIGN)
        for phase in tl.static_range(PHASES):
            inside = below(iw + phase, width)
            if MASK_C:
                inside &= live_c
            at = pointers(x_ptr, x_at, row, phase * stride_x_w, ALIGN)
            tiles = tiles + (tl.load(at, mask=inside, other=0.0).to(tl.float32),)
    return tiles


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy_ptr, x_ptr, wgt_ptr, dx_ptr, dw_ptr,
    batch, h_in, w_in, h_out, w_out, steps,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_dx_n, stride_dx_c, stride_dx_h, stride_dx_w,
    stride_dw_split: tl.constexpr, stride_dw_o: tl.constexpr,
    stride_dw_h: tl.constexpr, stride_dw_w: tl.constexpr,
    CHANNELS: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DW: tl.constexpr, PIXELS_LAST: tl.constexpr,
    DY_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr,
    INDEX_64: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: `steps` * CONV_STRIDE_H input rows of BLOCK_P * CONV_STRIDE_W input columns by BLOCK_C channels.

    dgrad (WANT_DX), wgrad (WANT_DW) or both: they read the same rows of dy. Step t loads row t of dy, once per distinct
    column shift. Its taps reach the input rows t * CONV_STRIDE_H - PAD_H and the LIVE - 1 after it: their sums of dx
    and their x are carried along, and the first CONV_STRIDE_H of them are then complete. Columns of one phase
    (column modulo CONV_STRIDE_W) share their taps, and are a tile; no tap of a strided convolution is wasted.
    dw: [programs of one channel tile, CHANNELS * MULTIPLIER, KH, KW] by strides, the filter gradient itself or partial
    sums; each pair of an input and an output pixel belongs to the program that owns the input pixel.
    """
    LIVE: tl.constexpr = rows_alive(KH, CONV_STRIDE_H, DIL_H)
    SHIFT: tl.constexpr = (PAD_W - (KW - 1) * DIL_W) // CONV_STRIDE_W  # the least between columns that a tap joins
    WARM_UP: tl.constexpr = (KH - 1) * DIL_H // CONV_STRIDE_H
    DONE: tl.constexpr = CONV_STRIDE_H * CONV_STRIDE_W  # tiles that each step completes
    TAPS: tl.constexpr = KH * KW
    C_TILES: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    MASK_C: tl.constexpr = CHANNELS % BLOCK_C != 0
    pid = tl.program_id(0)
    c = index(pid % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C), INDEX_64)
    p = index(pid // C_TILES, INDEX_64) * BLOCK_P + tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * steps
    w_phase = (w_in + CONV_STRIDE_W - 1) // CONV_STRIDE_W
    image = p // w_phase
    tw = p % w_phase

    live_c = cols(c < CHANNELS, PIXELS_LAST)
    dy_p = rows(tl.multiple_of(image * stride_dy_n + (tw + SHIFT) * stride_dy_w, DY_ALIGN), PIXELS_LAST)
    dy_at = dy_p + cols(c * MULTIPLIER * stride_dy_c, PIXELS_LAST)
    if WANT_DW:
        x_p = rows(tl.multiple_of(image * stride_x_n + tw * CONV_STRIDE_W * stride_x_w, X_ALIGN), PIXELS_LAST)
        x_at = x_p + cols(c * stride_x_c, PIXELS_LAST)
        dw = zeros(MULTIPLIER * TAPS, BLOCK_P, BLOCK_C, PIXELS_LAST)
    if WANT_DX:
        dx_p = rows(tl.multiple_of(image * stride_dx_n + tw * CONV_STRIDE_W * stride_dx_w, DX_ALIGN), PIXELS_LAST)
        dx_at = dx_p + cols(c * stride_dx_c, PIXELS_LAST)
        taps = ()
        for m in tl.static_range(MULTIPLIER):
            o = (c * MULTIPLIER + m) * stride_wgt_o
            taps = taps + filter_taps(wgt_ptr, o, c < CHANNELS, stride_wgt_h, stride_wgt_w, KH, KW, PIXELS_LAST)
        dx = zeros(LIVE * CONV_STRIDE_W, BLOCK_P, BLOCK_C, PIXELS_LAST)
    iw = rows(tl.where(image < batch, tw * CONV_STRIDE_W, NOWHERE).to(tl.int32), PIXELS_LAST)
    tw = rows(tl.where(image < batch, tw, NOWHERE).to(tl.int32), PIXELS_LAST)

    # Before its own rows a program takes the rows of dy that reach them, as far as there are any.
    start = tl.maximum(first - WARM_UP, 0)
    last = tl.minimum(first + steps, (h_in - 1 + PAD_H) // CONV_STRIDE_H + 1)
    if WANT_DW:
        from_row = first * CONV_STRIDE_H - PAD_H
        until_row = last * CONV_STRIDE_H - PAD_H
        xs = input_rows(
            x_ptr, x_at, iw, live_c, from_row, until_row, h_in, w_in, stride_x_h, stride_x_w,
            start * CONV_STRIDE_H - PAD_H, LIVE - CONV_STRIDE_H, CONV_STRIDE_W, MASK_C, X_ALIGN, INDEX_64,
        )  # fmt: skip
    for t in tl.range(start, last, num_stages=1):
        width = tl.where(below(t, h_out), w_out, 0)
        row = tl.multiple_of(index(t, INDEX_64) * stride_dy_h, DY_ALIGN)
        if WANT_DW:
            xs = xs + input_rows(
                x_ptr, x_at, iw, live_c, from_row, until_row, h_in, w_in, stride_x_h, stride_x_w,
                (t - 1) * CONV_STRIDE_H - PAD_H + LIVE, CONV_STRIDE_H, CONV_STRIDE_W, MASK_C, X_ALIGN, INDEX_64,
            )  # fmt: skip
        for m in tl.static_range(MULTIPLIER):
            # Input column tw * CONV_STRIDE_W + phase meets output column tw + shift by the tap at
            # phase + PAD_W - shift * CONV_STRIDE_W pixels.
            for shift in tl.static_range(SHIFT, (CONV_STRIDE_W - 1 + PAD_W) // CONV_STRIDE_W + 1):
                if met(shift, CONV_STRIDE_W, PAD_W, DIL_W, KW):
                    inside = below(tw + shift, width)
                    if MASK_C:
                        inside &= live_c
                    dy_m = pointers(dy_ptr, dy_at + m * stride_dy_c, row, (shift - SHIFT) * stride_dy_w, DY_ALIGN)
                    d = tl.load(dy_m, mask=inside, other=0.0).to(tl.float32)
                    for phase in tl.static_range(CONV_STRIDE_W):
                        if tap_at(phase + PAD_W - shift * CONV_STRIDE_W, DIL_W, KW) >= 0:
                            if WANT_DX:
                                dx = plus_taps(
                                    dx, d, taps, m * TAPS + tap_at(phase + PAD_W - shift * CONV_STRIDE_W, DIL_W, KW),
                                    phase, LIVE * CONV_STRIDE_W, KH, KW, DIL_H, CONV_STRIDE_W,
                                )  # fmt: skip
                            if WANT_DW:
                                dw = plus_products(
                                    dw, d, xs, m * TAPS + tap_at(phase + PAD_W - shift * CONV_STRIDE_W, DIL_W, KW),
                                    phase, MULTIPLIER * TAPS, KH, KW, DIL_H, CONV_STRIDE_W,
                                )  # fmt: skip
        if WANT_DX:
            for i in tl.static_range(CONV_STRIDE_H):
                ih = t * CONV_STRIDE_H - PAD_H + i
                dx_row = tl.multiple_of(index(ih, INDEX_64) * stride_dx_h, DX_ALIGN)
                mine = (t >= first) & below(ih, h_in)
                for phase in tl.static_range(CONV_STRIDE_W):
                    inside = below(iw + phase, tl.where(mine, w_in, 0))
                    if MASK_C:
                        inside &= live_c
                    dx_i = pointers(dx_ptr, dx_at, dx_row, phase * stride_dx_w, DX_ALIGN)
                    out = narrow(dx[i * CONV_STRIDE_W + phase], dx_ptr.dtype.element_ty, EMULATE_BF16)
                    tl.store(dx_i, out, mask=inside)
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
