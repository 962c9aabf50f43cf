"""Narrow groups on matrix units: several groups to a channel tile, marching down the rows.

The channels of a tile of the result belong to several groups, and their filters lie on the diagonal of one weight tile,
which is zero elsewhere: a wider matrix product, mostly of zeros, instead of many that fill a corner of an instruction.
A program holds a tile of columns, flattened over batch and width, and walks down the rows: each row is loaded once per
column tap and meets every kernel row, the sums of all result rows that it touches being carried along in fp32. Weight
tiles are made once, before the loop.

BLOCK_S column taps lie side by side in one tile: they lengthen the reduction of fprop and dgrad, and are the rows of
wgrad's product, which would be too few of one tap.
BLOCK_R tiles of the result that meet a row of the source are made by one product, their weights side by side, and added
to the sums carried along. So no sum is moved between registers while a product makes it, which would have ptxas wait
after every product of a warp group. With BLOCK_R = 1 products add to the carried sums themselves.
Rows DIL_H apart are a class of their own, and a lane of the tile is one (image, class, column).
A tile lies with its contiguous axis last: *_PIXELS_LAST says that this is the columns (NCHW) and not the channels
(NHWC). *_ALIGN is the power of two that divides a tensor's strides of pixels, as in implicit_gemm.py, and C_ALIGN that
of the first of the READ_C channels that a tile reads: it may read some of the neighbouring groups for wider loads.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl

from .tiles import NOWHERE, as_mask, below, cols, in_registers, index, mma, narrow, pointers, rows, touched, turned

SIZES = ("batch", "h_in", "w_in", "h_out", "w_out", "segments", "steps")


@triton.constexpr_function
def ceil_div(a, b):
    return -(-a // b)


@triton.constexpr_function
def least_shift(stride, pad, dilation, kernel):
    """The least q by which output column tw + q can lie from the input columns tw * stride + phase that it meets."""
    return (pad - (kernel - 1) * dilation) // stride


@triton.constexpr_function
def shift_count(stride, pad, dilation, kernel):
    """How many such shifts there are: `dilation` apart at stride 1, else (where the dilation is 1) one apart."""
    return kernel if stride == 1 else (stride - 1 + pad) // stride - (pad - kernel + 1) // stride + 1


@triton.constexpr_function
def any_met(first, count, phase, stride, pad, dilation, kernel):
    """Whether a tap joins a phase with one of the shifts numbered from `first`."""
    step = dilation if stride == 1 else 1
    least = (pad - (kernel - 1) * dilation) // stride
    reaches = [phase + pad - (least + number * step) * stride for number in range(first, first + count)]
    return any(reach % dilation == 0 and 0 <= reach < kernel * dilation for reach in reaches)


@triton.jit
def apart(tile, ROWS: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr):
    """The COUNT tiles, a power of two of them, that lie side by side in one."""
    if COUNT == 1:
        return (tile,)
    else:
        halves = tl.permute(tl.reshape(tile, (ROWS, 2, COUNT // 2 * COLS)), (0, 2, 1))
        left, right = tl.split(halves)
        return apart(left, ROWS, COUNT // 2, COLS) + apart(right, ROWS, COUNT // 2, COLS)


@triton.constexpr_function
def beside(product, tiles, most):
    """How many of `tiles` tiles lie side by side in a product: `most`, or in the last as many as hold the rest."""
    return min(most, triton.next_power_of_2(tiles - product * most))


@triton.jit
def wide_zeros(TILES: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """fp32 zeros for the sums of TILES tiles, as many side by side as `beside` says."""
    sums = ()
    for product in tl.static_range(ceil_div(TILES, MOST)):
        sums = sums + (tl.zeros((ROWS, beside(product, TILES, MOST) * COLS), tl.float32),)
    return sums


@triton.jit
def added(tiles, sums, TILES: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tiles with the sums of products added, which lie side by side as `beside` says."""
    parts = ()
    for product in tl.static_range(ceil_div(TILES, MOST)):
        parts = parts + apart(sums[product], ROWS, beside(product, TILES, MOST), COLS)
    total = ()
    for i in tl.static_range(TILES):
        total = total + (tiles[i] + parts[i],)
    return total


@triton.jit
def lane(p, width, DIL_H: tl.constexpr):
    """(image, class of rows, column) of a lane number."""
    return p // (width * DIL_H), p // width % DIL_H if DIL_H > 1 else 0, p % width


@triton.jit
def first_channel(tile, STEP_C: tl.constexpr, WIDTH: tl.constexpr, OTHER_WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    """The first channel that a tile of STEP_C result channels reads: of the group of its first, rounded down."""
    return tl.multiple_of(tile * STEP_C // WIDTH * OTHER_WIDTH // ALIGN * ALIGN, ALIGN)


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """COUNT tiles of fp32 zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS, COLS), tl.float32),)
    return tiles


@triton.jit
def store_output_row(
    y_ptr, y_at, live_y, y, u, first, last, row_class, h_out, stride_y_h,
    DIL_H: tl.constexpr, PIXELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Store y, [lanes, channels], as row u of each class, if that is one of the rows first to last - 1."""
    mask = as_mask(live_y & rows((u >= first) & (u < last) & (row_class + u * DIL_H < h_out), PIXELS_LAST))
    row = tl.multiple_of(index(u * DIL_H, INDEX_64) * stride_y_h, ALIGN)
    y = turned(narrow(y, y_ptr.dtype.element_ty, EMULATE_BF16), PIXELS_LAST)
    tl.store(y_ptr + (y_at + row), y, mask=mask)


@triton.constexpr_function
def row_met(product, most, live, i, conv_stride, kernel):
    """Whether any of the result rows of a product meets source row i of a step, in fprop."""
    last = min((product + 1) * most, live) - 1
    return (live - 1 - last) * conv_stride + i < kernel


@triton.jit
def fprop_weights(
    wgt_ptr, tile, c, number, stride_wgt_o, stride_wgt_c, stride_wgt_h: tl.constexpr, stride_wgt_w: tl.constexpr,
    GROUPS: tl.constexpr, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, LIVE: tl.constexpr, INDEX_64: tl.constexpr,
    STEP_C: tl.constexpr, BLOCK_C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, TAP: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """Weights from the taps TAP + `number` of a source row ROW to COUNT result rows side by side, from FIRST on."""
    n = tl.arange(0, COUNT * BLOCK_C)
    o = tile * STEP_C + n % BLOCK_C
    LAST_R: tl.constexpr = (LIVE - 1 - FIRST) * CONV_STRIDE_H + ROW  # the kernel row of the first of them
    MISSED: tl.constexpr = ceil_div(max(0, LAST_R + 1 - KH), CONV_STRIDE_H)  # of them, that ROW does not reach
    live = (n % BLOCK_C < STEP_C) & (o < GROUPS * COUT_G) & (n >= MISSED * BLOCK_C) & (n < (LIVE - FIRST) * BLOCK_C)
    own = below(o[None, :] - (c // CIN_G * COUT_G)[:, None], COUT_G) & live[None, :] & (number < KW - TAP)[:, None]
    at = (c % CIN_G * stride_wgt_c + (number + TAP) * stride_wgt_w)[:, None]
    at += (index(o, INDEX_64) * stride_wgt_o - n // BLOCK_C * (CONV_STRIDE_H * stride_wgt_h))[None, :]
    return tl.load(wgt_ptr + LAST_R * stride_wgt_h + at, mask=own, other=0.0)


@triton.constexpr_function
def stages(ahead):
    """Of the pipeline of a loop whose loads go so many steps ahead by themselves: none, or as the launch says."""
    return 1 if ahead else None


@triton.jit
def source_tile(
    x_ptr, x_at, iw, read, number, row, in_row, h_in, w_in, stride_x_h, stride_x_w,
    TAP: tl.constexpr, KW: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PIXELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
):  # fmt: skip
    """A row of each class of x as it lies in memory, from column tap TAP on."""
    width = rows(tl.where(below(in_row + row * DIL_H, h_in), w_in, 0), PIXELS_LAST)
    to_row = tl.multiple_of(index(row * DIL_H, INDEX_64) * stride_x_h, ALIGN)
    inside = below(iw + TAP * DIL_W, width)
    inside &= cols(read & (number < KW - TAP), PIXELS_LAST)
    return tl.load(pointers(x_ptr, x_at, to_row, TAP * DIL_W * stride_x_w, ALIGN), mask=inside, other=0.0)


@triton.jit(do_not_specialize=SIZES + ("begin", "end"))
def fprop_kernel(
    x_ptr, wgt_ptr, bias_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out, segments, steps, begin, end,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h: tl.constexpr, stride_wgt_w: tl.constexpr,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    GROUPS: tl.constexpr, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, HAS_BIAS: tl.constexpr,
    X_PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    STEP_C: tl.constexpr, READ_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    """One program: `steps` output rows of BLOCK_P lanes (batch x classes x w_out) by STEP_C of y's channels.

    M = lanes, N = BLOCK_C output channels, K = BLOCK_S taps of BLOCK_K input channels. Step t loads the rows
    t * CONV_STRIDE_H and the CONV_STRIDE_H - 1 after it, counted from the top padding within a class. They meet the
    output rows t - LIVE + 1 .. t, whose sums are `acc`; the first of them is then complete. Steps before `begin` and
    from `end` on have rows of padding only.
    """
    LIVE: tl.constexpr = (KH - 1) // CONV_STRIDE_H + 1
    ROWS: tl.constexpr = min(CONV_STRIDE_H, KH)  # of x that a step meets
    CHUNKS: tl.constexpr = ceil_div(KW, BLOCK_S)
    PRODUCTS: tl.constexpr = ceil_div(LIVE, BLOCK_R)
    C_TILES: tl.constexpr = ceil_div(GROUPS * COUT_G, STEP_C)
    pid = tl.program_id(0)
    tile = pid % C_TILES
    segment = pid // C_TILES % segments
    o = tile * STEP_C + tl.arange(0, BLOCK_C)
    live_o = (tl.arange(0, BLOCK_C) < STEP_C) & (o < GROUPS * COUT_G)
    k = tl.arange(0, BLOCK_S * BLOCK_K)
    c = first_channel(tile, STEP_C, COUT_G, CIN_G, C_ALIGN) + k % BLOCK_K
    number = k // BLOCK_K
    read = (k % BLOCK_K < READ_C) & (c < GROUPS * CIN_G)
    p = index(pid // (C_TILES * segments), INDEX_64) * BLOCK_P + tl.arange(0, BLOCK_P)
    image, row_class, ow = lane(p, w_out, DIL_H)
    first = segment * steps
    last = tl.minimum(first + steps, (h_out + DIL_H - 1) // DIL_H)

    weights = ()
    for i in tl.static_range(ROWS):
        for chunk in tl.static_range(CHUNKS):
            for j in tl.static_range(PRODUCTS):
                weights = weights + (
                    fprop_weights(
                        wgt_ptr, tile, c, number, stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
                        GROUPS, CIN_G, COUT_G, KH, KW, CONV_STRIDE_H, LIVE, INDEX_64, STEP_C, BLOCK_C,
                        j * BLOCK_R, beside(j, LIVE, BLOCK_R), chunk * BLOCK_S, i,
                    ),
                )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=live_o, other=0.0).to(tl.float32)[None, :]

    iw = ow * CONV_STRIDE_W - PAD_W
    in_row = row_class * CONV_STRIDE_H - PAD_H
    x_p = tl.multiple_of(image * stride_x_n + in_row * stride_x_h + iw * stride_x_w, X_ALIGN)
    x_k = index(c, INDEX_64) * stride_x_c
    x_k += tl.multiple_of(number * (DIL_W * stride_x_w), X_ALIGN)
    x_at = rows(x_p, X_PIXELS_LAST) + cols(x_k, X_PIXELS_LAST)
    iw = rows(tl.where(image < batch, iw, NOWHERE).to(tl.int32), X_PIXELS_LAST)
    iw += cols(number * DIL_W, X_PIXELS_LAST)
    y_p = tl.multiple_of(image * stride_y_n + row_class * stride_y_h + ow * stride_y_w, Y_ALIGN)
    y_at = rows(y_p, Y_PIXELS_LAST) + cols(index(o, INDEX_64) * stride_y_c, Y_PIXELS_LAST)
    live_y = rows(image < batch, Y_PIXELS_LAST) & cols(live_o, Y_PIXELS_LAST)

    acc = zeros(LIVE, BLOCK_P, BLOCK_C)
    stop = tl.minimum(last + LIVE - 1, end)
    start = tl.maximum(first, begin)
    ahead = ()
    for a in tl.static_range(BLOCK_A):
        for i in tl.static_range(ROWS):
            for chunk in tl.static_range(CHUNKS):
                ahead = ahead + (
                    source_tile(
                        x_ptr, x_at, iw, read, number, (start + a) * CONV_STRIDE_H + i, in_row,
                        h_in, w_in, stride_x_h, stride_x_w,
                        chunk * BLOCK_S, KW, DIL_H, DIL_W, X_PIXELS_LAST, X_ALIGN, INDEX_64,
                    ),
                )  # fmt: skip
    for t in tl.range(start, stop, num_stages=stages(BLOCK_A)):
        sums = acc if BLOCK_R == 1 else wide_zeros(LIVE, BLOCK_R, BLOCK_P, BLOCK_C)
        for i in tl.static_range(ROWS):
            for chunk in tl.static_range(CHUNKS):
                ahead = ahead + (
                    source_tile(
                        x_ptr, x_at, iw, read, number, (t + BLOCK_A) * CONV_STRIDE_H + i, in_row,
                        h_in, w_in, stride_x_h, stride_x_w,
                        chunk * BLOCK_S, KW, DIL_H, DIL_W, X_PIXELS_LAST, X_ALIGN, INDEX_64,
                    ),
                )  # fmt: skip
                x = turned(ahead[i * CHUNKS + chunk], X_PIXELS_LAST)
                met = ()
                for j in tl.static_range(PRODUCTS):
                    if row_met(j, BLOCK_R, LIVE, i, CONV_STRIDE_H, KH):
                        wgt = weights[(i * CHUNKS + chunk) * PRODUCTS + j]
                        met = met + (mma(x, wgt, sums[j], PRECISION, EMULATE_BF16),)
                    else:
                        met = met + (sums[j],)
                sums = met
        ahead = ahead[ROWS * CHUNKS :]
        acc = sums if BLOCK_R == 1 else added(acc, sums, LIVE, BLOCK_R, BLOCK_P, BLOCK_C)
        y = acc[0] + bias if HAS_BIAS else acc[0]
        store_output_row(
            y_ptr, y_at, live_y, y, t - (LIVE - 1), first, last, row_class, h_out, stride_y_h,
            DIL_H, Y_PIXELS_LAST, Y_ALIGN, INDEX_64, EMULATE_BF16,
        )  # fmt: skip
        acc = acc[1:] + zeros(1, BLOCK_P, BLOCK_C)
    for a in tl.static_range(LIVE - 1):
        y = acc[a] + bias if HAS_BIAS else acc[a]
        store_output_row(
            y_ptr, y_at, live_y, y, stop - (LIVE - 1) + a, first, last, row_class, h_out, stride_y_h,
            DIL_H, Y_PIXELS_LAST, Y_ALIGN, INDEX_64, EMULATE_BF16,
        )  # fmt: skip


@triton.jit
def input_rows(
    x_ptr, x_at, iw, live_c, in_row, from_row, until_row, h_in, w_in, stride_x_h, stride_x_w,
    first_row, COUNT: tl.constexpr, PHASES: tl.constexpr, DIL_H: tl.constexpr,
    PIXELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
):  # fmt: skip
    """Tiles of x as they lie in memory: COUNT rows of each class, PHASES columns of each; 0 where rows are others'."""
    tiles = ()
    for i in tl.static_range(COUNT):
        v = first_row + i
        mine = (v >= from_row) & (v < until_row)
        width = rows(tl.where(mine & below(in_row + v * DIL_H, h_in), w_in, 0), PIXELS_LAST)
        row = tl.multiple_of(index(v * DIL_H, INDEX_64) * stride_x_h, ALIGN)
        for phase in tl.static_range(PHASES):
            inside = below(iw + phase, width) & live_c
            at = pointers(x_ptr, x_at, row, phase * stride_x_w, ALIGN)
            tiles = tiles + (tl.load(at, mask=inside, other=0.0),)
    return tiles


@triton.jit
def gradient_row(
    t, row_class, h_out, w_out, stride_dy_h,
    DIL_H: tl.constexpr, PIXELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
):  # fmt: skip
    """Of row t of each class of dy: (the columns that there are, its offset)."""
    width = rows(tl.where(below(row_class + t * DIL_H, h_out), w_out, 0), PIXELS_LAST)
    return width, tl.multiple_of(index(t * DIL_H, INDEX_64) * stride_dy_h, ALIGN)


@triton.jit
def gradient_tile(
    dy_ptr, dy_at, ow, live_o, number, width, row, stride_dy_w,
    SHIFT: tl.constexpr, COUNT: tl.constexpr, SHIFTS: tl.constexpr, SHIFT_STEP: tl.constexpr,
    PIXELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A row of dy as it lies in memory, COUNT of the SHIFTS column shifts from number SHIFT on."""
    inside = below(ow + SHIFT * SHIFT_STEP, width) & live_o
    if SHIFT + COUNT > SHIFTS:
        inside &= cols(number < SHIFTS - SHIFT, PIXELS_LAST)
    return tl.load(pointers(dy_ptr, dy_at, row, SHIFT * SHIFT_STEP * stride_dy_w, ALIGN), mask=inside, other=0.0)


@triton.jit
def store_input_rows(
    dx_ptr, dx_at, dx, iw, live_c, in_row, from_row, until_row, h_in, w_in, stride_dx_h, stride_dx_w,
    first_row, COUNT: tl.constexpr, PHASES: tl.constexpr, DIL_H: tl.constexpr,
    PIXELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Store the first tiles [lanes, channels] of dx: COUNT rows of each class, PHASES columns of each."""
    for i in tl.static_range(COUNT):
        v = first_row + i
        mine = (v >= from_row) & (v < until_row)
        width = rows(tl.where(mine & below(in_row + v * DIL_H, h_in), w_in, 0), PIXELS_LAST)
        row = tl.multiple_of(index(v * DIL_H, INDEX_64) * stride_dx_h, ALIGN)
        for phase in tl.static_range(PHASES):
            at = pointers(dx_ptr, dx_at, row, phase * stride_dx_w, ALIGN)
            out = turned(narrow(dx[i * PHASES + phase], dx_ptr.dtype.element_ty, EMULATE_BF16), PIXELS_LAST)
            tl.store(at, out, mask=below(iw + phase, width) & live_c)


@triton.constexpr_function
def tile_met(product, most, tiles, first_shift, shifts, conv_stride, pad, dilation, kernel):
    """Whether a tap joins the shifts numbered from `first_shift` with any result tile of a product, in dgrad."""
    phases = {i % conv_stride for i in range(product * most, min((product + 1) * most, tiles))}
    return any(any_met(first_shift, shifts, phase, conv_stride, pad, dilation, kernel) for phase in phases)


@triton.jit
def dgrad_weights(
    wgt_ptr, tile, o, q, stride_wgt_o, stride_wgt_c, stride_wgt_h: tl.constexpr, stride_wgt_w: tl.constexpr,
    GROUPS: tl.constexpr, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_W: tl.constexpr, PAD_W: tl.constexpr, DIL_W: tl.constexpr, INDEX_64: tl.constexpr,
    STEP_C: tl.constexpr, BLOCK_C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Weights from output columns shifted by q to COUNT tiles of dx side by side, from number FIRST on."""
    n = tl.arange(0, COUNT * BLOCK_C)
    c = tile * STEP_C + n % BLOCK_C
    i = FIRST + n // BLOCK_C
    r = i // CONV_STRIDE_W
    reach = (i % CONV_STRIDE_W + PAD_W)[None, :] - (q * CONV_STRIDE_W)[:, None]
    live = (n % BLOCK_C < STEP_C) & (c < GROUPS * CIN_G) & (r < KH)
    inner = c[None, :] - (o // COUT_G * CIN_G)[:, None]  # the number of a channel in its group
    own = below(inner, CIN_G) & live[None, :] & (reach >= 0) & (reach < KW * DIL_W)
    at = (index(o, INDEX_64) * stride_wgt_o)[:, None] + (inner * stride_wgt_c + (r * stride_wgt_h)[None, :])
    return tl.load(wgt_ptr + (at + reach // DIL_W * stride_wgt_w), mask=own, other=0.0)


@triton.jit(do_not_specialize=SIZES + ("end", "blocks"))
def backward_kernel(
    dy_ptr, x_ptr, wgt_ptr, dx_ptr, dw_ptr,
    batch, h_in, w_in, h_out, w_out, segments, steps, end, blocks,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h: tl.constexpr, stride_wgt_w: tl.constexpr,
    stride_dx_n, stride_dx_c, stride_dx_h, stride_dx_w,
    stride_dw_split: tl.constexpr, stride_dw_o: tl.constexpr, stride_dw_c: tl.constexpr,
    stride_dw_h: tl.constexpr, stride_dw_w: tl.constexpr,
    GROUPS: tl.constexpr, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, WANT_DX: tl.constexpr, WANT_DW: tl.constexpr,
    DY_PIXELS_LAST: tl.constexpr, X_PIXELS_LAST: tl.constexpr, DX_PIXELS_LAST: tl.constexpr,
    DY_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr,
    INDEX_64: tl.constexpr, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    STEP_C: tl.constexpr, READ_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program: STEP_C input channels of `steps` * CONV_STRIDE_H input rows, in `blocks` blocks of BLOCK_P lanes.

    dgrad (WANT_DX), wgrad (WANT_DW) or both: they read the same rows of dy. A lane is an (image, class, tw), and stands
    for the input columns tw * CONV_STRIDE_W + phase. Step t loads row t of dy (within a class), once per distinct
    column shift, BLOCK_S shifts side by side. Its taps reach the input rows t * CONV_STRIDE_H (counted from the top
    padding) and the LIVE - 1 after it: their sums of dx and their x are carried along, and the first CONV_STRIDE_H of
    them are then complete. Per phase and kernel row
      dx: M = lanes, N = BLOCK_C input channels, K = BLOCK_S shifts of BLOCK_K output channels;
      dw: M = BLOCK_S shifts of BLOCK_K output channels, N = BLOCK_C input channels, K = lanes.
    BLOCK_L: whether dy waits for dw's products, which all read it, in registers (tiles.in_registers).
    Steps from `end` on have no rows of dy. Strides and dilations above 1 do not meet on an axis.
    dw: [programs of one channel tile, c_out, CIN_G, KH, KW] by strides, the filter gradient itself or partial sums;
    each pair of an input and an output pixel belongs to the program that owns the input pixel.
    """
    LIVE: tl.constexpr = max(KH, CONV_STRIDE_H)
    FRESH: tl.constexpr = min(KH, CONV_STRIDE_H)  # rows of x that each step meets first
    WARM_UP: tl.constexpr = (KH - 1) // CONV_STRIDE_H
    DONE: tl.constexpr = CONV_STRIDE_H * CONV_STRIDE_W  # tiles of dx that each step completes
    DRAIN: tl.constexpr = ceil_div(LIVE - CONV_STRIDE_H, CONV_STRIDE_H)
    SHIFT: tl.constexpr = least_shift(CONV_STRIDE_W, PAD_W, DIL_W, KW)
    SHIFT_STEP: tl.constexpr = DIL_W if CONV_STRIDE_W == 1 else 1
    SHIFTS: tl.constexpr = shift_count(CONV_STRIDE_W, PAD_W, DIL_W, KW)
    CHUNKS: tl.constexpr = ceil_div(SHIFTS, BLOCK_S)
    C_TILES: tl.constexpr = ceil_div(GROUPS * CIN_G, STEP_C)
    DW_TILES: tl.constexpr = KH * CONV_STRIDE_W * CHUNKS
    DX_TILES: tl.constexpr = LIVE * CONV_STRIDE_W
    PRODUCTS: tl.constexpr = ceil_div(DX_TILES, BLOCK_R)
    pid = tl.program_id(0)
    tile = pid % C_TILES
    segment = pid // C_TILES % segments
    c = tile * STEP_C + tl.arange(0, BLOCK_C)
    in_tile = (tl.arange(0, BLOCK_C) < STEP_C) & (c < GROUPS * CIN_G)
    k = tl.arange(0, BLOCK_S * BLOCK_K)
    o = first_channel(tile, STEP_C, CIN_G, COUT_G, C_ALIGN) + k % BLOCK_K
    number = k // BLOCK_K
    live_o = cols((k % BLOCK_K < READ_C) & (o < GROUPS * COUT_G), DY_PIXELS_LAST)

    if WANT_DX:
        weights = ()
        for chunk in tl.static_range(CHUNKS):
            for j in tl.static_range(PRODUCTS):
                weights = weights + (
                    dgrad_weights(
                        wgt_ptr, tile, o, SHIFT + (chunk * BLOCK_S + number) * SHIFT_STEP,
                        stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
                        GROUPS, CIN_G, COUT_G, KH, KW, CONV_STRIDE_W, PAD_W, DIL_W, INDEX_64, STEP_C, BLOCK_C,
                        j * BLOCK_R, beside(j, DX_TILES, BLOCK_R),
                    ),
                )  # fmt: skip
    if WANT_DW:
        dw = zeros(DW_TILES, BLOCK_S * BLOCK_K, BLOCK_C)

    # Before its own rows a program takes the rows of dy that reach them, as far as there are any.
    first = segment * steps
    last = tl.minimum(first + steps, ((h_in - 1 + PAD_H) // DIL_H + CONV_STRIDE_H) // CONV_STRIDE_H)
    start = tl.maximum(first - WARM_UP, 0)
    stop = tl.minimum(last, end)
    w_phase = (w_in + CONV_STRIDE_W - 1) // CONV_STRIDE_W
    dy_k = index(o, INDEX_64) * stride_dy_c
    dy_k += tl.multiple_of(number * (SHIFT_STEP * stride_dy_w), DY_ALIGN)
    group = index(pid // (C_TILES * segments), INDEX_64)
    for b in tl.range(0, blocks, num_stages=1):
        p = (group * blocks + b) * BLOCK_P + tl.arange(0, BLOCK_P)
        image, row_class, tw = lane(p, w_phase, DIL_H)
        in_row = row_class * CONV_STRIDE_H - PAD_H
        dy_p = image * stride_dy_n + row_class * stride_dy_h + (tw + SHIFT) * stride_dy_w
        dy_at = rows(tl.multiple_of(dy_p, DY_ALIGN), DY_PIXELS_LAST) + cols(dy_k, DY_PIXELS_LAST)
        ow = rows(tl.where(image < batch, tw + SHIFT, NOWHERE).to(tl.int32), DY_PIXELS_LAST)
        ow += cols(number * SHIFT_STEP, DY_PIXELS_LAST)
        iw = tl.where(image < batch, tw * CONV_STRIDE_W, NOWHERE).to(tl.int32)
        if WANT_DX:
            dx_p = image * stride_dx_n + in_row * stride_dx_h + tw * CONV_STRIDE_W * stride_dx_w
            dx_p = rows(tl.multiple_of(dx_p, DX_ALIGN), DX_PIXELS_LAST)
            dx_at = dx_p + cols(index(c, INDEX_64) * stride_dx_c, DX_PIXELS_LAST)
            dx = zeros(DX_TILES, BLOCK_P, BLOCK_C)
        if WANT_DW:
            x_p = image * stride_x_n + in_row * stride_x_h + tw * CONV_STRIDE_W * stride_x_w
            x_p = rows(tl.multiple_of(x_p, X_ALIGN), X_PIXELS_LAST)
            x_at = x_p + cols(index(c, INDEX_64) * stride_x_c, X_PIXELS_LAST)
            x_ahead = input_rows(
                x_ptr, x_at, rows(iw, X_PIXELS_LAST), cols(in_tile, X_PIXELS_LAST), in_row,
                first * CONV_STRIDE_H, last * CONV_STRIDE_H, h_in, w_in, stride_x_h, stride_x_w,
                start * CONV_STRIDE_H, KH - FRESH, CONV_STRIDE_W, DIL_H, X_PIXELS_LAST, X_ALIGN, INDEX_64,
            )  # fmt: skip
            xs = ()
            for i in tl.static_range((KH - FRESH) * CONV_STRIDE_W):
                xs = xs + (turned(x_ahead[i], X_PIXELS_LAST),)
            x_ahead = ()
            for a in tl.static_range(BLOCK_A):
                x_ahead = x_ahead + input_rows(
                    x_ptr, x_at, rows(iw, X_PIXELS_LAST), cols(in_tile, X_PIXELS_LAST), in_row,
                    first * CONV_STRIDE_H, last * CONV_STRIDE_H, h_in, w_in, stride_x_h, stride_x_w,
                    (start + a) * CONV_STRIDE_H + KH - FRESH, FRESH, CONV_STRIDE_W, DIL_H,
                    X_PIXELS_LAST, X_ALIGN, INDEX_64,
                )  # fmt: skip
        dy_ahead = ()
        for a in tl.static_range(BLOCK_A):
            width, dy_row = gradient_row(
                start + a, row_class, h_out, w_out, stride_dy_h, DIL_H, DY_PIXELS_LAST, DY_ALIGN, INDEX_64
            )
            for chunk in tl.static_range(CHUNKS):
                dy_ahead = dy_ahead + (
                    gradient_tile(
                        dy_ptr, dy_at, ow, live_o, number, width, dy_row, stride_dy_w,
                        chunk * BLOCK_S, BLOCK_S, SHIFTS, SHIFT_STEP, DY_PIXELS_LAST, DY_ALIGN,
                    ),
                )  # fmt: skip
        for t in tl.range(start, stop, num_stages=stages(BLOCK_A)):
            width, dy_row = gradient_row(
                t + BLOCK_A, row_class, h_out, w_out, stride_dy_h, DIL_H, DY_PIXELS_LAST, DY_ALIGN, INDEX_64
            )
            if WANT_DW:
                x_ahead = x_ahead + input_rows(
                    x_ptr, x_at, rows(iw, X_PIXELS_LAST), cols(in_tile, X_PIXELS_LAST), in_row,
                    first * CONV_STRIDE_H, last * CONV_STRIDE_H, h_in, w_in, stride_x_h, stride_x_w,
                    (t + BLOCK_A) * CONV_STRIDE_H + KH - FRESH, FRESH, CONV_STRIDE_W, DIL_H,
                    X_PIXELS_LAST, X_ALIGN, INDEX_64,
                )  # fmt: skip
                for i in tl.static_range(FRESH * CONV_STRIDE_W):
                    xs = xs + (turned(x_ahead[i], X_PIXELS_LAST),)
                x_ahead = x_ahead[FRESH * CONV_STRIDE_W :]
            if WANT_DX:
                sums = dx if BLOCK_R == 1 else wide_zeros(DX_TILES, BLOCK_R, BLOCK_P, BLOCK_C)
            for chunk in tl.static_range(CHUNKS):
                dy_ahead = dy_ahead + (
                    gradient_tile(
                        dy_ptr, dy_at, ow, live_o, number, width, dy_row, stride_dy_w,
                        chunk * BLOCK_S, BLOCK_S, SHIFTS, SHIFT_STEP, DY_PIXELS_LAST, DY_ALIGN,
                    ),
                )  # fmt: skip
                d = in_registers(turned(dy_ahead[chunk], DY_PIXELS_LAST), WANT_DW and BLOCK_L)
                if WANT_DX:
                    met = ()
                    for j in tl.static_range(PRODUCTS):
                        if tile_met(
                            j, BLOCK_R, KH * CONV_STRIDE_W, chunk * BLOCK_S, BLOCK_S, CONV_STRIDE_W, PAD_W, DIL_W, KW
                        ):
                            wgt = weights[chunk * PRODUCTS + j]
                            met = met + (mma(d, wgt, sums[j], PRECISION, EMULATE_BF16),)
                        else:
                            met = met + (sums[j],)
                    sums = met
                if WANT_DW:
                    # The last rows first: theirs is the tile of x that came in this step, which Triton refills as if
                    # the product that reads it had ended. The waits for the products of carried tiles see to that.
                    met = ()
                    for back in tl.static_range(1, DW_TILES + 1):
                        if (DW_TILES - back) % CHUNKS == chunk and any_met(
                            chunk * BLOCK_S, BLOCK_S, (DW_TILES - back) // CHUNKS % CONV_STRIDE_W,
                            CONV_STRIDE_W, PAD_W, DIL_W, KW,
                        ):  # fmt: skip
                            x = xs[(DW_TILES - back) // CHUNKS]
                            met = (mma(tl.trans(d), x, dw[DW_TILES - back], PRECISION, EMULATE_BF16),) + met
                        else:
                            met = (dw[DW_TILES - back],) + met
                    dw = met
            dy_ahead = dy_ahead[CHUNKS:]
            if WANT_DW and BLOCK_L:  # the next step writes registers that products read their left operand from
                met = ()
                for i in tl.static_range(DW_TILES):
                    met = met + (touched(dw[i]),)
                dw = met
            if WANT_DX:
                dx = sums if BLOCK_R == 1 else added(dx, sums, DX_TILES, BLOCK_R, BLOCK_P, BLOCK_C)
                store_input_rows(
                    dx_ptr, dx_at, dx, rows(iw, DX_PIXELS_LAST), cols(in_tile, DX_PIXELS_LAST), in_row,
                    first * CONV_STRIDE_H, last * CONV_STRIDE_H, h_in, w_in, stride_dx_h, stride_dx_w,
                    t * CONV_STRIDE_H, CONV_STRIDE_H, CONV_STRIDE_W, DIL_H,
                    DX_PIXELS_LAST, DX_ALIGN, INDEX_64, EMULATE_BF16,
                )  # fmt: skip
                dx = dx[DONE:] + zeros(DONE, BLOCK_P, BLOCK_C)
            if WANT_DW:
                kept = ()
                for i in tl.static_range(FRESH * CONV_STRIDE_W, KH * CONV_STRIDE_W):
                    kept = kept + (xs[i] if BLOCK_A > 0 else touched(xs[i]),)
                xs = kept
        if WANT_DX:
            store_input_rows(
                dx_ptr, dx_at, dx, rows(iw, DX_PIXELS_LAST), cols(in_tile, DX_PIXELS_LAST), in_row,
                first * CONV_STRIDE_H, last * CONV_STRIDE_H, h_in, w_in, stride_dx_h, stride_dx_w,
                stop * CONV_STRIDE_H, DRAIN * CONV_STRIDE_H, CONV_STRIDE_W, DIL_H,
                DX_PIXELS_LAST, DX_ALIGN, INDEX_64, EMULATE_BF16,
            )  # fmt: skip

    if WANT_DW:
        own = ((o // COUT_G)[:, None] == (c // CIN_G)[None, :]) & in_tile[None, :]
        filters = index(pid // C_TILES, INDEX_64) * stride_dw_split + index(o, INDEX_64) * stride_dw_o
        for i in tl.static_range(DW_TILES):
            q = SHIFT + (i % CHUNKS * BLOCK_S + number) * SHIFT_STEP
            reach = i // CHUNKS % CONV_STRIDE_W + PAD_W - q * CONV_STRIDE_W
            tap = own & ((reach >= 0) & (reach < KW * DIL_W))[:, None]
            at = filters + i // CHUNKS // CONV_STRIDE_W * stride_dw_h + reach // DIL_W * stride_dw_w
            at = at[:, None] + (c % CIN_G * stride_dw_c)[None, :]
            tl.store(dw_ptr + at, narrow(dw[i], dw_ptr.dtype.element_ty, EMULATE_BF16), mask=tap)
