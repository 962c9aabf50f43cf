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
Rows DIL_H apart are a class of their own, and a lane of the tile is one (image, class, BLOCK_W columns side by side).
With BLOCK_W > 1 the columns of the source that several of a lane's columns meet are loaded once: each is a tile of its
own, which needs BLOCK_S = 1 and DIL_W = 1.
A tile lies with its contiguous axis last: *_PIXELS_LAST says that this is the columns (NCHW) and not the channels
(NHWC). *_ALIGN is the power of two that divides a tensor's strides of pixels, as in implicit_gemm.py, and C_ALIGN that
of the first of the READ_C channels that a tile reads: it may read some of the neighbouring groups for wider loads.
RUN: how many neighbours of a row an access takes (runs.py); of x and dx in backward, as many times the stride, 1 or 2.
If it is not 1, the columns of all tensors are contiguous, and a lane has one; loads and stores go by RUN lanes. The
runs that a row's taps meet are loaded once, and the columns of each tap are moved together in registers.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .runs import columns_of, count, item, place, run_of, run_pointers, runs_met
from .tiles import NOWHERE, as_mask, below, cols, in_registers, index, mma, narrow, pointers, rows, touched, turned

SIZES = ("batch", "h_in", "w_in", "h_out", "w_out", "segments", "steps", "GROUPS")


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
def columns_met(run, taps, stride, apart, first):
    """The columns of the source, by those of a run of the result, that their taps meet, the first one `first` on."""
    return tuple(column * stride + tap * apart + first for tap in range(taps) for column in range(run))


@triton.jit
def run_tile(ptr, at, first_column, live, width, row, NUMBER: tl.constexpr, RUN: tl.constexpr):
    """Run NUMBER of each lane, counted from its first column, as it lies in memory: [channels, lanes, RUN].

    width: by lane, the columns that there are.
    """
    inside = below(first_column + NUMBER * RUN, width) & live
    return tl.load(run_pointers(ptr, at, row, NUMBER * RUN, RUN), mask=inside[:, :, None], other=0.0)


@triton.jit
def flat(tile):
    """[channels, lanes, RUN] as [channels, columns]."""
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] * tile.shape[2]))


@triton.jit
def tap_tile(
    columns, MET: tl.constexpr, RUN: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """The columns that COUNT of TAPS taps meet, a power of two from number FIRST on: [taps and channels, columns].

    columns: those of the runs that have the columns MET. Taps past the last have zeros.
    """
    RUNS: tl.constexpr = runs_met(MET, 0, RUN)
    CHANNELS: tl.constexpr = columns[0].shape[0]
    LANES: tl.constexpr = columns[0].shape[1]
    met = ()
    for i in tl.static_range(RUN):
        aside = ()
        for tap in tl.static_range(FIRST, FIRST + COUNT):
            if tap < TAPS:
                aside = aside + (columns[place(RUNS, item(MET, tap * RUN + i), RUN)],)
            else:
                aside = aside + (tl.zeros_like(columns[0]),)
        if COUNT == 1:
            met = met + aside
        else:  # the taps between lanes and run, so that a run stays together in registers
            met = met + (tl.reshape(run_of(aside, COUNT), (CHANNELS, LANES * COUNT)),)
    tile = run_of(met, RUN)
    if COUNT == 1:
        return flat(tile)
    else:
        tile = tl.permute(tl.reshape(tile, (CHANNELS, LANES, COUNT, RUN)), (2, 0, 1, 3))
        return tl.reshape(tile, (COUNT * CHANNELS, LANES * RUN))


@triton.jit
def all_columns(runs, COUNT: tl.constexpr, RUN: tl.constexpr):
    """The columns of the first COUNT tiles of runs."""
    columns = ()
    for i in tl.static_range(COUNT):
        columns = columns + columns_of(runs[i], RUN)
    return columns


@triton.jit
def phase_tiles(tile, PHASES: tl.constexpr):
    """Every PHASES-th (1 or 2) column of a [channels, lanes, columns] tile from each of its first ones on."""
    if PHASES == 1:
        return (flat(tile),)
    else:
        even, odd = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2)))
        return (flat(even), flat(odd))


@triton.jit
def lane_runs(tiles, PHASES: tl.constexpr, RUN: tl.constexpr):
    """What `phase_tiles` takes apart, of tiles [columns, channels]."""
    LANES: tl.constexpr = tiles[0].shape[0] // RUN
    CHANNELS: tl.constexpr = tiles[0].shape[1]
    even = tl.reshape(tl.trans(tiles[0]), (CHANNELS, LANES, RUN))
    if PHASES == 1:
        return even
    else:
        odd = tl.reshape(tl.trans(tiles[1]), (CHANNELS, LANES, RUN))
        return tl.reshape(tl.join(even, odd), (CHANNELS, LANES, RUN * 2))


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
def lane_columns(width, BLOCK_W: tl.constexpr):
    """How many lanes it takes for the columns of a row."""
    return width if BLOCK_W == 1 else (width + BLOCK_W - 1) // BLOCK_W


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
    y_ptr, residual_ptr, kept_ptr, y_at, live_y, y, u, column: tl.constexpr, first, last, row_class, h_out,
    stride_y_h, stride_y_w, ACTIVATION: tl.constexpr, DIL_H: tl.constexpr,
    PIXELS_LAST: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """`finish` y, [lanes, channels], as row u of each class, if that is one of the rows first to last - 1; of the
    lanes' columns as number `column`.
    """
    mask = as_mask(live_y & rows((u >= first) & (u < last) & (row_class + u * DIL_H < h_out), PIXELS_LAST))
    row = tl.multiple_of(index(u * DIL_H, INDEX_64) * stride_y_h, ALIGN)
    if RUN > 1:
        to = run_pointers(y_ptr, y_at, row, 0, RUN)
        y, mask = lane_runs((y,), 1, RUN), mask[:, :, None]
        finish(to, y, mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION, False, EMULATE_BF16)
    else:
        to = pointers(y_ptr, y_at, row, column * stride_y_w, ALIGN)
        finish(to, y, mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION, PIXELS_LAST, EMULATE_BF16)


@triton.constexpr_function
def row_met(product, most, live, i, conv_stride, kernel):
    """Whether any of the result rows of a product meets source row i of a step, in fprop."""
    last = min((product + 1) * most, live) - 1
    return (live - 1 - last) * conv_stride + i < kernel


@triton.constexpr_function
def all_there(row, chunk, column, rows, conv_stride, taps):
    """Whether `chunk` of source row `row` is the last of a step that a lane's result column number `column` meets."""
    return row == rows - 1 and chunk == column * conv_stride + taps - 1


@triton.jit
def joined(
    x, weights, sums, ROW: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_R: tl.constexpr, LIVE: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, KH: tl.constexpr, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """fprop's sums with the products of a tile of source row ROW of a step."""
    met = ()
    for j in tl.static_range(PRODUCTS):
        if row_met(j, BLOCK_R, LIVE, ROW, CONV_STRIDE_H, KH):
            met = met + (mma(x, weights[j], sums[j], PRECISION, EMULATE_BF16),)
        else:
            met = met + (sums[j],)
    return met


@triton.jit
def fprop_weights(
    wgt_ptr, tile, c, number, stride_wgt_o, stride_wgt_c, stride_wgt_h: tl.constexpr, stride_wgt_w: tl.constexpr,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
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


@triton.constexpr_function
def loaded_before(chunk, loads, run):
    """How many of a row's loads come before a chunk's own: one a chunk, or with the first one all runs."""
    return chunk if run == 1 else loads if chunk else 0


@triton.jit
def source_tile(
    x_ptr, x_at, iw, read, number, row, in_row, h_in, w_in, stride_x_h, stride_x_w,
    LOAD: tl.constexpr, BLOCK_S: tl.constexpr, KW: tl.constexpr, MET: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PIXELS_LAST: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
):  # fmt: skip
    """A row of each class of x as it lies in memory: number LOAD of its chunks of BLOCK_S column taps, or of its runs
    that have the columns MET.
    """
    TAP: tl.constexpr = LOAD * BLOCK_S
    width = rows(tl.where(below(in_row + row * DIL_H, h_in), w_in, 0), PIXELS_LAST)
    to_row = tl.multiple_of(index(row * DIL_H, INDEX_64) * stride_x_h, ALIGN)
    if RUN > 1:
        return run_tile(x_ptr, x_at, iw, cols(read, PIXELS_LAST), width, to_row, item(runs_met(MET, 0, RUN), LOAD), RUN)
    else:
        inside = below(iw + TAP * DIL_W, width)
        inside &= cols(read & (number < KW - TAP), PIXELS_LAST)
        return tl.load(pointers(x_ptr, x_at, to_row, TAP * DIL_W * stride_x_w, ALIGN), mask=inside, other=0.0)


@triton.jit(do_not_specialize=SIZES + ("begin", "end"))
def fprop_kernel(
    x_ptr, wgt_ptr, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out, segments, steps, begin, end,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h: tl.constexpr, stride_wgt_w: tl.constexpr,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    X_PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr, RUN: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    STEP_C: tl.constexpr, READ_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: `steps` output rows of BLOCK_P lanes by STEP_C of y's channels.

    A lane is an (image, class, BLOCK_W output columns). Per column M = lanes, N = BLOCK_C output channels, K = BLOCK_S
    taps of BLOCK_K input channels. Step t loads the rows t * CONV_STRIDE_H and the CONV_STRIDE_H - 1 after it, counted
    from the top padding within a class. They meet the output rows t - LIVE + 1 .. t, whose sums are `acc`; the first of
    them is then complete. Steps before `begin` and from `end` on have rows of padding only.
    """
    tl.static_assert(BLOCK_W == 1 or (BLOCK_S == 1 and DIL_W == 1))
    LIVE: tl.constexpr = (KH - 1) // CONV_STRIDE_H + 1
    ROWS: tl.constexpr = min(CONV_STRIDE_H, KH)  # of x that a step meets
    REACH: tl.constexpr = (BLOCK_W - 1) * CONV_STRIDE_W + KW  # columns of x that a lane meets
    CHUNKS: tl.constexpr = ceil_div(REACH, BLOCK_S)
    TAPS: tl.constexpr = ceil_div(KW, BLOCK_S)  # of the chunks, those that an output column meets
    PRODUCTS: tl.constexpr = ceil_div(LIVE, BLOCK_R)
    MET: tl.constexpr = columns_met(RUN, KW, CONV_STRIDE_W, DIL_W, -PAD_W)
    LOADS: tl.constexpr = CHUNKS if RUN == 1 else count(runs_met(MET, 0, RUN))  # of a row
    C_TILES = (GROUPS * COUT_G + STEP_C - 1) // STEP_C
    pid = tl.program_id(0)
    tile = pid % C_TILES
    segment = pid // C_TILES % segments
    o = tile * STEP_C + tl.arange(0, BLOCK_C)
    live_o = (tl.arange(0, BLOCK_C) < STEP_C) & (o < GROUPS * COUT_G)
    k = tl.arange(0, BLOCK_S * BLOCK_K)
    c = first_channel(tile, STEP_C, COUT_G, CIN_G, C_ALIGN) + k % BLOCK_K
    number = k // BLOCK_K
    read = (k % BLOCK_K < READ_C) & (c < GROUPS * CIN_G)
    p = index(pid // (C_TILES * segments), INDEX_64) * BLOCK_P + tl.arange(0, BLOCK_P // RUN) * RUN
    image, row_class, ow = lane(p, lane_columns(w_out, BLOCK_W), DIL_H)
    ow = ow * BLOCK_W
    first = segment * steps
    last = tl.minimum(first + steps, (h_out + DIL_H - 1) // DIL_H)

    weights = ()
    for i in tl.static_range(ROWS):
        for chunk in tl.static_range(TAPS):
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

    iw = ow * CONV_STRIDE_W - (PAD_W if RUN == 1 else 0)  # runs begin where lanes do
    in_row = row_class * CONV_STRIDE_H - PAD_H
    x_p = tl.multiple_of(image * stride_x_n + in_row * stride_x_h + iw * stride_x_w, X_ALIGN)
    x_k = index(c, INDEX_64) * stride_x_c
    x_k += tl.multiple_of(number * (DIL_W * stride_x_w), X_ALIGN)
    x_at = rows(x_p, X_PIXELS_LAST) + cols(x_k, X_PIXELS_LAST)
    iw = rows(tl.where(image < batch, iw, NOWHERE).to(tl.int32), X_PIXELS_LAST)
    iw += cols(number * DIL_W, X_PIXELS_LAST)
    y_p = tl.multiple_of(image * stride_y_n + row_class * stride_y_h + ow * stride_y_w, Y_ALIGN)
    y_at = rows(y_p, Y_PIXELS_LAST) + cols(index(o, INDEX_64) * stride_y_c, Y_PIXELS_LAST)
    live_y = (rows(image < batch, Y_PIXELS_LAST) & cols(live_o, Y_PIXELS_LAST),)
    for w in tl.static_range(1, BLOCK_W):
        live_y = live_y + (live_y[0] & rows(ow + w < w_out, Y_PIXELS_LAST),)

    acc = zeros(BLOCK_W * LIVE, BLOCK_P, BLOCK_C)
    stop = tl.minimum(last + LIVE - 1, end)
    start = tl.maximum(first, begin)
    ahead = ()
    for a in tl.static_range(BLOCK_A):
        for i in tl.static_range(ROWS):
            for load in tl.static_range(LOADS):
                ahead = ahead + (
                    source_tile(
                        x_ptr, x_at, iw, read, number, (start + a) * CONV_STRIDE_H + i, in_row,
                        h_in, w_in, stride_x_h, stride_x_w,
                        load, BLOCK_S, REACH, MET, DIL_H, DIL_W, X_PIXELS_LAST, RUN, X_ALIGN, INDEX_64,
                    ),
                )  # fmt: skip
    for t in tl.range(start, stop, num_stages=stages(BLOCK_A)):
        sums = ()
        for w in tl.static_range(BLOCK_W):
            own = acc[w * LIVE : (w + 1) * LIVE]
            sums = sums + (own if BLOCK_R == 1 else wide_zeros(LIVE, BLOCK_R, BLOCK_P, BLOCK_C),)
        for i in tl.static_range(ROWS):
            for chunk in tl.static_range(CHUNKS):
                for load in tl.static_range(loaded_before(chunk, LOADS, RUN), loaded_before(chunk + 1, LOADS, RUN)):
                    ahead = ahead + (
                        source_tile(
                            x_ptr, x_at, iw, read, number, (t + BLOCK_A) * CONV_STRIDE_H + i, in_row,
                            h_in, w_in, stride_x_h, stride_x_w,
                            load, BLOCK_S, REACH, MET, DIL_H, DIL_W, X_PIXELS_LAST, RUN, X_ALIGN, INDEX_64,
                        ),
                    )  # fmt: skip
                if RUN > 1 and chunk == 0:
                    columns = all_columns(ahead[i * LOADS : (i + 1) * LOADS], LOADS, RUN)
                # Of several columns, the sums of one after another are made.
                for w in tl.static_range(BLOCK_W):
                    if BLOCK_W == 1 or all_there(i, chunk, w, ROWS, CONV_STRIDE_W, TAPS):
                        met = sums[w]
                        for row in tl.static_range(i if BLOCK_W == 1 else 0, i + 1):
                            for tap in tl.static_range(chunk if BLOCK_W == 1 else 0, chunk + 1 - w * CONV_STRIDE_W):
                                if RUN > 1:
                                    x = tap_tile(columns, MET, RUN, tap, 1, KW)
                                else:
                                    x = ahead[row * CHUNKS + w * CONV_STRIDE_W + tap]
                                met = joined(
                                    turned(x, X_PIXELS_LAST),
                                    weights[(row * TAPS + tap) * PRODUCTS : (row * TAPS + tap + 1) * PRODUCTS],
                                    met, row, PRODUCTS, BLOCK_R, LIVE, CONV_STRIDE_H, KH, PRECISION, EMULATE_BF16,
                                )  # fmt: skip
                        sums = sums[:w] + (met,) + sums[w + 1 :]
                        if all_there(i, chunk, w, ROWS, CONV_STRIDE_W, TAPS):
                            if BLOCK_R > 1:
                                met = added(acc[w * LIVE : (w + 1) * LIVE], met, LIVE, BLOCK_R, BLOCK_P, BLOCK_C)
                            acc = acc[: w * LIVE] + met + acc[(w + 1) * LIVE :]
        ahead = ahead[ROWS * LOADS :]
        kept = ()
        for w in tl.static_range(BLOCK_W):
            y = acc[w * LIVE] + bias if HAS_BIAS else acc[w * LIVE]
            store_output_row(
                y_ptr, residual_ptr, kept_ptr, y_at, live_y[w], y, t - (LIVE - 1), w, first, last, row_class, h_out,
                stride_y_h, stride_y_w, ACTIVATION, DIL_H, Y_PIXELS_LAST, RUN, Y_ALIGN, INDEX_64, EMULATE_BF16,
            )  # fmt: skip
            kept = kept + acc[w * LIVE + 1 : (w + 1) * LIVE] + zeros(1, BLOCK_P, BLOCK_C)
        acc = kept
    for a in tl.static_range(LIVE - 1):
        for w in tl.static_range(BLOCK_W):
            y = acc[w * LIVE + a] + bias if HAS_BIAS else acc[w * LIVE + a]
            store_output_row(
                y_ptr, residual_ptr, kept_ptr, y_at, live_y[w], y, stop - (LIVE - 1) + a, w, first, last, row_class,
                h_out, stride_y_h, stride_y_w, ACTIVATION, DIL_H, Y_PIXELS_LAST, RUN, Y_ALIGN, INDEX_64, EMULATE_BF16,
            )  # fmt: skip


@triton.jit
def input_rows(
    x_ptr, x_at, iw, live_c, in_row, from_row, until_row, h_in, w_in, stride_x_h, stride_x_w,
    first_row, COUNT: tl.constexpr, COLUMNS: tl.constexpr, DIL_H: tl.constexpr,
    PIXELS_LAST: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
):  # fmt: skip
    """Tiles of x as they lie in memory: COUNT rows of each class, COLUMNS of each; 0 where rows are others'.

    One tile a row, of runs with their columns, where RUN is not 1.
    """
    tiles = ()
    for i in tl.static_range(COUNT):
        v = first_row + i
        mine = (v >= from_row) & (v < until_row)
        width = rows(tl.where(mine & below(in_row + v * DIL_H, h_in), w_in, 0), PIXELS_LAST)
        row = tl.multiple_of(index(v * DIL_H, INDEX_64) * stride_x_h, ALIGN)
        if RUN > 1:
            tiles = tiles + (run_tile(x_ptr, x_at, iw, live_c, width, row, 0, RUN * COLUMNS),)
        else:
            for column in tl.static_range(COLUMNS):
                inside = below(iw + column, width) & live_c
                at = pointers(x_ptr, x_at, row, column * stride_x_w, ALIGN)
                tiles = tiles + (tl.load(at, mask=inside, other=0.0),)
    return tiles


@triton.jit
def turned_rows(tiles, COUNT: tl.constexpr, COLUMNS: tl.constexpr, PIXELS_LAST: tl.constexpr, RUN: tl.constexpr):
    """The first COUNT rows of `input_rows` by row and column, lanes first."""
    found = ()
    if RUN > 1:
        for i in tl.static_range(COUNT):
            phases = phase_tiles(tiles[i], COLUMNS)
            for column in tl.static_range(COLUMNS):
                found = found + (turned(phases[column], PIXELS_LAST),)
    else:
        for i in tl.static_range(COUNT * COLUMNS):
            found = found + (turned(tiles[i], PIXELS_LAST),)
    return found


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
    LOAD: tl.constexpr, COUNT: tl.constexpr, SHIFTS: tl.constexpr, SHIFT_STEP: tl.constexpr, MET: tl.constexpr,
    PIXELS_LAST: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A row of dy as it lies in memory: number LOAD of its chunks of COUNT of the SHIFTS column shifts, or of its runs
    that have the columns MET.
    """
    SHIFT: tl.constexpr = LOAD * COUNT
    if RUN > 1:
        return run_tile(dy_ptr, dy_at, ow, live_o, width, row, item(runs_met(MET, 0, RUN), LOAD), RUN)
    else:
        inside = below(ow + SHIFT * SHIFT_STEP, width) & live_o
        if SHIFT + COUNT > SHIFTS:
            inside &= cols(number < SHIFTS - SHIFT, PIXELS_LAST)
        return tl.load(pointers(dy_ptr, dy_at, row, SHIFT * SHIFT_STEP * stride_dy_w, ALIGN), mask=inside, other=0.0)


@triton.jit
def store_input_rows(
    dx_ptr, dx_at, dx, iw, live_c, in_row, from_row, until_row, h_in, w_in, stride_dx_h, stride_dx_w,
    first_row, COUNT: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, DIL_H: tl.constexpr,
    PIXELS_LAST: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Store the first tiles [lanes, channels] of dx: COUNT rows of each class, COLUMNS of each from number FIRST on."""
    for i in tl.static_range(COUNT):
        v = first_row + i
        mine = (v >= from_row) & (v < until_row)
        width = rows(tl.where(mine & below(in_row + v * DIL_H, h_in), w_in, 0), PIXELS_LAST)
        row = tl.multiple_of(index(v * DIL_H, INDEX_64) * stride_dx_h, ALIGN)
        if RUN > 1:
            out = lane_runs(dx[i * COLUMNS : (i + 1) * COLUMNS], COLUMNS, RUN)
            at = run_pointers(dx_ptr, dx_at, row, 0, RUN * COLUMNS)
            inside = (below(iw, width) & live_c)[:, :, None]
            tl.store(at, narrow(out, dx_ptr.dtype.element_ty, EMULATE_BF16), mask=inside)
        else:
            for column in tl.static_range(COLUMNS):
                at = pointers(dx_ptr, dx_at, row, (FIRST + column) * stride_dx_w, ALIGN)
                out = turned(narrow(dx[i * COLUMNS + column], dx_ptr.dtype.element_ty, EMULATE_BF16), PIXELS_LAST)
                tl.store(at, out, mask=below(iw + (FIRST + column), width) & live_c)


@triton.constexpr_function
def tile_met(product, most, tiles, first_shift, shifts, conv_stride, pad, dilation, kernel):
    """Whether a tap joins the shifts numbered from `first_shift` with any result tile of a product, in dgrad."""
    phases = {i % conv_stride for i in range(product * most, min((product + 1) * most, tiles))}
    return any(any_met(first_shift, shifts, phase, conv_stride, pad, dilation, kernel) for phase in phases)


@triton.constexpr_function
def meets(tile, chunk, block_s, taps, block_w, conv_stride, pad, dilation, kernel):
    """Whether a tap joins the shifts of a chunk with a tile of x, numbered by row and column, in wgrad."""
    column = tile % (block_w * conv_stride)
    tap, phase = chunk - column // conv_stride, column % conv_stride
    return 0 <= tap < taps and any_met(tap * block_s, block_s, phase, conv_stride, pad, dilation, kernel)


@triton.constexpr_function
def sum_number(tile, chunk, taps, block_w, conv_stride):
    """The number of the sums of dw, by row, phase and tap, that `meets` speaks of."""
    row, column = divmod(tile, block_w * conv_stride)
    return (row * conv_stride + column % conv_stride) * taps + chunk - column // conv_stride


@triton.jit
def gathered(
    d, weights, sums, SHIFT: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_R: tl.constexpr, TILES: tl.constexpr,
    BLOCK_S: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_W: tl.constexpr, DIL_W: tl.constexpr, KW: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """dgrad's sums with the products of a tile of dy whose shifts are numbered from SHIFT on."""
    met = ()
    for j in tl.static_range(PRODUCTS):
        if tile_met(j, BLOCK_R, TILES, SHIFT, BLOCK_S, CONV_STRIDE_W, PAD_W, DIL_W, KW):
            met = met + (mma(d, weights[j], sums[j], PRECISION, EMULATE_BF16),)
        else:
            met = met + (sums[j],)
    return met


@triton.jit
def correlated(d, x, dw, NUMBER: tl.constexpr, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """wgrad's sums, number NUMBER with the product of a tile of dy and one of x."""
    total = mma(tl.trans(d), x, dw[NUMBER], PRECISION, EMULATE_BF16)
    return dw[:NUMBER] + (total,) + dw[NUMBER + 1 :]


@triton.jit
def dgrad_weights(
    wgt_ptr, tile, o, q, stride_wgt_o, stride_wgt_c, stride_wgt_h: tl.constexpr, stride_wgt_w: tl.constexpr,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
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
    stride_dw_split, stride_dw_o: tl.constexpr, stride_dw_c: tl.constexpr,
    stride_dw_h: tl.constexpr, stride_dw_w: tl.constexpr,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, WANT_DX: tl.constexpr, WANT_DW: tl.constexpr,
    DY_PIXELS_LAST: tl.constexpr, X_PIXELS_LAST: tl.constexpr, DX_PIXELS_LAST: tl.constexpr, RUN: tl.constexpr,
    DY_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr,
    INDEX_64: tl.constexpr, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    STEP_C: tl.constexpr, READ_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: STEP_C input channels of `steps` * CONV_STRIDE_H input rows, in `blocks` blocks of BLOCK_P lanes.

    dgrad (WANT_DX), wgrad (WANT_DW) or both: they read the same rows of dy. A lane is an (image, class, BLOCK_W numbers
    tw), each of which stands for the input columns tw * CONV_STRIDE_W + phase. Step t loads row t of dy (within a
    class), once per distinct column shift of a lane, BLOCK_S shifts side by side. Its taps reach the input rows
    t * CONV_STRIDE_H (counted from the top padding) and the LIVE - 1 after it: their sums of dx and their x are carried
    along, and the first CONV_STRIDE_H of them are then complete. Per phase and kernel row
      dx: M = lanes, N = BLOCK_C input channels, K = BLOCK_S shifts of BLOCK_K output channels;
      dw: M = BLOCK_S shifts of BLOCK_K output channels, N = BLOCK_C input channels, K = lanes.
    BLOCK_L: whether dy waits for dw's products, which all read it, in registers (tiles.in_registers).
    Steps from `end` on have no rows of dy. Strides and dilations above 1 do not meet on an axis.
    dw: [programs of one channel tile, c_out, CIN_G, KH, KW] by strides, the filter gradient itself or partial sums;
    each pair of an input and an output pixel belongs to the program that owns the input pixel.
    """
    tl.static_assert(BLOCK_W == 1 or (BLOCK_S == 1 and DIL_W == 1))
    LIVE: tl.constexpr = max(KH, CONV_STRIDE_H)
    FRESH: tl.constexpr = min(KH, CONV_STRIDE_H)  # rows of x that each step meets first
    WARM_UP: tl.constexpr = (KH - 1) // CONV_STRIDE_H
    DONE: tl.constexpr = CONV_STRIDE_H * CONV_STRIDE_W  # tiles of dx that each step completes
    DRAIN: tl.constexpr = ceil_div(LIVE - CONV_STRIDE_H, CONV_STRIDE_H)
    SHIFT: tl.constexpr = least_shift(CONV_STRIDE_W, PAD_W, DIL_W, KW)
    SHIFT_STEP: tl.constexpr = DIL_W if CONV_STRIDE_W == 1 else 1
    SHIFTS: tl.constexpr = shift_count(CONV_STRIDE_W, PAD_W, DIL_W, KW)
    REACH: tl.constexpr = BLOCK_W - 1 + SHIFTS  # columns of dy that a lane meets
    CHUNKS: tl.constexpr = ceil_div(REACH, BLOCK_S)
    TAPS: tl.constexpr = ceil_div(SHIFTS, BLOCK_S)  # of the chunks, those that a tw meets
    COLUMNS: tl.constexpr = BLOCK_W * CONV_STRIDE_W  # of x
    MET: tl.constexpr = columns_met(RUN, SHIFTS, 1, SHIFT_STEP, SHIFT)
    DY_LOADS: tl.constexpr = CHUNKS if RUN == 1 else count(runs_met(MET, 0, RUN))  # of a row
    X_LOADS: tl.constexpr = COLUMNS if RUN == 1 else 1
    ASIDE: tl.constexpr = BLOCK_S if RUN == 1 else 1  # shifts that a load of dy has side by side
    BEGIN: tl.constexpr = SHIFT if RUN == 1 else 0  # of loads of dy: runs begin where lanes do
    C_TILES = (GROUPS * CIN_G + STEP_C - 1) // STEP_C
    DW_TILES: tl.constexpr = KH * CONV_STRIDE_W * TAPS
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
    loaded = tl.arange(0, ASIDE * BLOCK_K)
    loaded_o = first_channel(tile, STEP_C, CIN_G, COUT_G, C_ALIGN) + loaded % BLOCK_K
    loaded_number = loaded // BLOCK_K
    live_o = cols((loaded % BLOCK_K < READ_C) & (loaded_o < GROUPS * COUT_G), DY_PIXELS_LAST)

    if WANT_DX:
        weights = ()
        for chunk in tl.static_range(TAPS):
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
    w_phase = lane_columns((w_in + CONV_STRIDE_W - 1) // CONV_STRIDE_W, BLOCK_W)
    dy_k = index(loaded_o, INDEX_64) * stride_dy_c
    dy_k += tl.multiple_of(loaded_number * (SHIFT_STEP * stride_dy_w), DY_ALIGN)
    group = index(pid // (C_TILES * segments), INDEX_64)
    for b in tl.range(0, blocks, num_stages=1):
        p = (group * blocks + b) * BLOCK_P + tl.arange(0, BLOCK_P // RUN) * RUN
        image, row_class, tw = lane(p, w_phase, DIL_H)
        tw = tw * BLOCK_W
        in_row = row_class * CONV_STRIDE_H - PAD_H
        dy_p = image * stride_dy_n + row_class * stride_dy_h + (tw + BEGIN) * stride_dy_w
        dy_at = rows(tl.multiple_of(dy_p, DY_ALIGN), DY_PIXELS_LAST) + cols(dy_k, DY_PIXELS_LAST)
        ow = rows(tl.where(image < batch, tw + BEGIN, NOWHERE).to(tl.int32), DY_PIXELS_LAST)
        ow += cols(loaded_number * SHIFT_STEP, DY_PIXELS_LAST)
        iw = tl.where(image < batch, tw * CONV_STRIDE_W, NOWHERE).to(tl.int32)
        if WANT_DX:
            dx_p = image * stride_dx_n + in_row * stride_dx_h + tw * CONV_STRIDE_W * stride_dx_w
            dx_p = rows(tl.multiple_of(dx_p, DX_ALIGN), DX_PIXELS_LAST)
            dx_at = dx_p + cols(index(c, INDEX_64) * stride_dx_c, DX_PIXELS_LAST)
            dx = zeros(BLOCK_W * DX_TILES, BLOCK_P, BLOCK_C)
        if WANT_DW:
            x_p = image * stride_x_n + in_row * stride_x_h + tw * CONV_STRIDE_W * stride_x_w
            x_p = rows(tl.multiple_of(x_p, X_ALIGN), X_PIXELS_LAST)
            x_at = x_p + cols(index(c, INDEX_64) * stride_x_c, X_PIXELS_LAST)
            x_ahead = input_rows(
                x_ptr, x_at, rows(iw, X_PIXELS_LAST), cols(in_tile, X_PIXELS_LAST), in_row,
                first * CONV_STRIDE_H, last * CONV_STRIDE_H, h_in, w_in, stride_x_h, stride_x_w,
                start * CONV_STRIDE_H, KH - FRESH, COLUMNS, DIL_H, X_PIXELS_LAST, RUN, X_ALIGN, INDEX_64,
            )  # fmt: skip
            xs = turned_rows(x_ahead, KH - FRESH, COLUMNS, X_PIXELS_LAST, RUN)
            x_ahead = ()
            for a in tl.static_range(BLOCK_A):
                x_ahead = x_ahead + input_rows(
                    x_ptr, x_at, rows(iw, X_PIXELS_LAST), cols(in_tile, X_PIXELS_LAST), in_row,
                    first * CONV_STRIDE_H, last * CONV_STRIDE_H, h_in, w_in, stride_x_h, stride_x_w,
                    (start + a) * CONV_STRIDE_H + KH - FRESH, FRESH, COLUMNS, DIL_H,
                    X_PIXELS_LAST, RUN, X_ALIGN, INDEX_64,
                )  # fmt: skip
        dy_ahead = ()
        for a in tl.static_range(BLOCK_A):
            width, dy_row = gradient_row(
                start + a, row_class, h_out, w_out, stride_dy_h, DIL_H, DY_PIXELS_LAST, DY_ALIGN, INDEX_64
            )
            for load in tl.static_range(DY_LOADS):
                dy_ahead = dy_ahead + (
                    gradient_tile(
                        dy_ptr, dy_at, ow, live_o, loaded_number, width, dy_row, stride_dy_w,
                        load, BLOCK_S, REACH, SHIFT_STEP, MET, DY_PIXELS_LAST, RUN, DY_ALIGN,
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
                    (t + BLOCK_A) * CONV_STRIDE_H + KH - FRESH, FRESH, COLUMNS, DIL_H,
                    X_PIXELS_LAST, RUN, X_ALIGN, INDEX_64,
                )  # fmt: skip
                xs = xs + turned_rows(x_ahead, FRESH, COLUMNS, X_PIXELS_LAST, RUN)
                x_ahead = x_ahead[FRESH * X_LOADS :]
            if WANT_DX:
                sums = ()
                for w in tl.static_range(BLOCK_W):
                    own = dx[w * DX_TILES : (w + 1) * DX_TILES]
                    sums = sums + (own if BLOCK_R == 1 else wide_zeros(DX_TILES, BLOCK_R, BLOCK_P, BLOCK_C),)
            ds = ()
            for chunk in tl.static_range(CHUNKS):
                for load in tl.static_range(
                    loaded_before(chunk, DY_LOADS, RUN), loaded_before(chunk + 1, DY_LOADS, RUN)
                ):
                    dy_ahead = dy_ahead + (
                        gradient_tile(
                            dy_ptr, dy_at, ow, live_o, loaded_number, width, dy_row, stride_dy_w,
                            load, BLOCK_S, REACH, SHIFT_STEP, MET, DY_PIXELS_LAST, RUN, DY_ALIGN,
                        ),
                    )  # fmt: skip
                if RUN > 1 and chunk == 0:
                    columns = all_columns(dy_ahead, DY_LOADS, RUN)
                d = tap_tile(columns, MET, RUN, chunk * BLOCK_S, BLOCK_S, SHIFTS) if RUN > 1 else dy_ahead[chunk]
                ds = ds + (in_registers(turned(d, DY_PIXELS_LAST), WANT_DW and BLOCK_L),)
                if WANT_DX:
                    for w in tl.static_range(BLOCK_W):
                        if BLOCK_W == 1 or all_there(0, chunk, w, 1, 1, TAPS):
                            met = sums[w]
                            for tap in tl.static_range(chunk if BLOCK_W == 1 else 0, chunk + 1 - w):
                                met = gathered(
                                    ds[w + tap], weights[tap * PRODUCTS : (tap + 1) * PRODUCTS], met, tap * BLOCK_S,
                                    PRODUCTS, BLOCK_R, KH * CONV_STRIDE_W, BLOCK_S, CONV_STRIDE_W, PAD_W, DIL_W, KW,
                                    PRECISION, EMULATE_BF16,
                                )  # fmt: skip
                            sums = sums[:w] + (met,) + sums[w + 1 :]
                if WANT_DW:
                    # The last rows first: theirs is the tile of x that came in this step, which Triton refills as if
                    # the product that reads it had ended. The waits for the products of carried tiles see to that.
                    for back in tl.static_range(1, KH * COLUMNS + 1):
                        if meets(KH * COLUMNS - back, chunk, BLOCK_S, TAPS, BLOCK_W, CONV_STRIDE_W, PAD_W, DIL_W, KW):
                            dw = correlated(
                                ds[chunk], xs[KH * COLUMNS - back], dw,
                                sum_number(KH * COLUMNS - back, chunk, TAPS, BLOCK_W, CONV_STRIDE_W),
                                PRECISION, EMULATE_BF16,
                            )  # fmt: skip
                if WANT_DX:
                    for w in tl.static_range(BLOCK_W):
                        if all_there(0, chunk, w, 1, 1, TAPS):
                            met = sums[w]
                            if BLOCK_R > 1:
                                own = dx[w * DX_TILES : (w + 1) * DX_TILES]
                                met = added(own, met, DX_TILES, BLOCK_R, BLOCK_P, BLOCK_C)
                            dx = dx[: w * DX_TILES] + met + dx[(w + 1) * DX_TILES :]
            dy_ahead = dy_ahead[DY_LOADS:]
            if WANT_DW and BLOCK_L:  # the next step writes registers that products read their left operand from
                met = ()
                for i in tl.static_range(DW_TILES):
                    met = met + (touched(dw[i]),)
                dw = met
            if WANT_DX:
                left = ()
                for w in tl.static_range(BLOCK_W):
                    own = dx[w * DX_TILES : (w + 1) * DX_TILES]
                    store_input_rows(
                        dx_ptr, dx_at, own, rows(iw, DX_PIXELS_LAST), cols(in_tile, DX_PIXELS_LAST), in_row,
                        first * CONV_STRIDE_H, last * CONV_STRIDE_H, h_in, w_in, stride_dx_h, stride_dx_w,
                        t * CONV_STRIDE_H, CONV_STRIDE_H, w * CONV_STRIDE_W, CONV_STRIDE_W, DIL_H,
                        DX_PIXELS_LAST, RUN, DX_ALIGN, INDEX_64, EMULATE_BF16,
                    )  # fmt: skip
                    left = left + own[DONE:] + zeros(DONE, BLOCK_P, BLOCK_C)
                dx = left
            if WANT_DW:
                kept = ()
                for i in tl.static_range(FRESH * COLUMNS, KH * COLUMNS):
                    kept = kept + (xs[i] if BLOCK_A > 0 else touched(xs[i]),)
                xs = kept
        if WANT_DX:
            for w in tl.static_range(BLOCK_W):
                store_input_rows(
                    dx_ptr, dx_at, dx[w * DX_TILES : (w + 1) * DX_TILES], rows(iw, DX_PIXELS_LAST),
                    cols(in_tile, DX_PIXELS_LAST), in_row,
                    first * CONV_STRIDE_H, last * CONV_STRIDE_H, h_in, w_in, stride_dx_h, stride_dx_w,
                    stop * CONV_STRIDE_H, DRAIN * CONV_STRIDE_H, w * CONV_STRIDE_W, CONV_STRIDE_W, DIL_H,
                    DX_PIXELS_LAST, RUN, DX_ALIGN, INDEX_64, EMULATE_BF16,
                )  # fmt: skip

    if WANT_DW:
        own = ((o // COUT_G)[:, None] == (c // CIN_G)[None, :]) & in_tile[None, :]
        filters = index(pid // C_TILES, INDEX_64) * stride_dw_split + index(o, INDEX_64) * stride_dw_o
        for i in tl.static_range(DW_TILES):
            q = SHIFT + (i % TAPS * BLOCK_S + number) * SHIFT_STEP
            reach = i // TAPS % CONV_STRIDE_W + PAD_W - q * CONV_STRIDE_W
            tap = own & ((reach >= 0) & (reach < KW * DIL_W))[:, None]
            at = filters + i // TAPS // CONV_STRIDE_W * stride_dw_h + reach // DIL_W * stride_dw_w
            at = at[:, None] + (c % CIN_G * stride_dw_c)[None, :]
            tl.store(dw_ptr + at, narrow(dw[i], dw_ptr.dtype.element_ty, EMULATE_BF16), mask=tap)
