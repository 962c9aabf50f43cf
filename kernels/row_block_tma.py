"""The blocks of rows of row_block.py with tensor descriptors: the loads of sm_90 and later that a whole program shares.

One instruction of one thread brings a tile, and what lies outside the map, the group or the batch comes as zeros, so
there are no masks and no addresses. A tile of lanes is BLOCK_I images by BLOCK_M // BLOCK_I neighbouring columns of a
row. A descriptor's axes are (phase and group, row, column, image, channel), or with the image before the row where a
tile has one image: a tile with one axis of lanes is read by the matrix unit where it lies. At a stride, VIEW_W = stride
and a descriptor's columns are every stride-th of the map; the phase counts further groups, since in NHWC a pixel's
groups are followed by those of the next pixel.
Programs are persistent: one takes every `programs`-th tile, and loads those of the next while it stores.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .row_block import first_row, many_zeros, meetings, products, row_step, source_count, source_of, source_row
from .tiles import as_mask, index, mma, narrow, phase_taps, touched

SIZES = ("batch", "h_in", "w_in", "h_out", "w_out", "row_blocks", "column_tiles", "image_tiles", "GROUPS")


@triton.jit
def load_lanes(desc, group, row, column, image, channel, BLOCK_I: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr):
    """The tile [LANES, K] of a source's lanes: lane number = column * BLOCK_I + image."""
    if BLOCK_I == 1:
        return desc.load([group, image, row, column, channel]).reshape(LANES, K)
    else:
        return desc.load([group, row, column, image, channel]).reshape(LANES, K)


@triton.jit
def landed(acc, COUNT: tl.constexpr, LANDED: tl.constexpr):
    """The COUNT sums of a step, LANDED: its products waited for.

    Where the loop over tiles is flattened, a tile's end reads sums that no other wait covers: ptxas then waits after
    each product. And lanes of two axes are read from registers, which the next step loads anew while products run.
    """
    return acc[: COUNT - 1] + (touched(acc[COUNT - 1]),) if LANDED else acc


@triton.jit
def phase_column(first, offset, VIEW_W: tl.constexpr):
    """(phase, column) in a view of every VIEW_W-th column of the column first * VIEW_W + offset."""
    shift = (offset + VIEW_W * 1024) // VIEW_W - 1024  # rounded down; no padding is as wide
    return offset - shift * VIEW_W, first + shift


@triton.jit
def lanes_of(column, image, BLOCK_I: tl.constexpr, LANES: tl.constexpr, INDEX_64: tl.constexpr):
    """(column, image) of every lane of a tile."""
    lane = tl.arange(0, LANES)
    return column + lane // BLOCK_I, index(image + lane % BLOCK_I, INDEX_64)


@triton.jit
def store_rows(
    ptr, residual_ptr, kept_ptr, acc, at, live, first, height, stride_h, stride_c, first_channel, n_first,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, PARTS: tl.constexpr, PART_N: tl.constexpr, STEP: tl.constexpr, ALIGN: tl.constexpr,
    INDEX_64: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Store a block's sums, [lanes, PART_N] each, to the rows from `first` on that are on the map, as `finish` does."""
    for i in tl.static_range(BLOCK_R):
        row = first + i * STEP
        row_ptr = ptr + tl.multiple_of(index(row, INDEX_64) * stride_h, ALIGN)
        for j in tl.static_range(PARTS):
            n = n_first + j * PART_N + tl.arange(0, PART_N)
            mask = as_mask(live[:, None] & (n < WIDTH)[None, :] & (row < height))
            to = row_ptr + (at[:, None] + ((first_channel + n) * stride_c)[None, :])
            finish(to, acc[i * PARTS + j], mask, ptr, residual_ptr, kept_ptr, ACTIVATION, False, EMULATE_BF16)


@triton.jit(do_not_specialize=SIZES + ("programs",))
def fprop_kernel(
    x_desc, wgt_desc, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out, row_blocks, column_tiles, image_tiles, programs,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, VIEW_W: tl.constexpr,
    Y_ALIGN: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    PART_N: tl.constexpr, LANDED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_R rows by BLOCK_M lanes of y by BLOCK_N output channels of one group, in parts of PART_N.

    A step takes BLOCK_T kernel rows, all (rows of x are then loaded once) or one, a column tap and BLOCK_K input
    channels: M = lanes, N = COUT_G, K = CIN_G, for each pair of rows that meets. x_desc: x as above. wgt_desc: the
    weight as [groups, COUT_G, taps, CIN_G].
    """
    CHUNKS: tl.constexpr = (CIN_G + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = KH // BLOCK_T * KW * CHUNKS
    STEP: tl.constexpr = row_step(False, CONV_STRIDE_H, DIL_H)
    MET: tl.constexpr = meetings(False, BLOCK_R, BLOCK_T, CONV_STRIDE_H, PAD_H, DIL_H)
    N_TILES: tl.constexpr = (COUT_G + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = BLOCK_N // PART_N
    tiles = N_TILES * GROUPS * row_blocks * column_tiles * image_tiles
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        n_first = tile % N_TILES * BLOCK_N
        group = tile // N_TILES % GROUPS
        block = tile // (N_TILES * GROUPS)
        ow_first = block % column_tiles * (BLOCK_M // BLOCK_I)
        number = block // column_tiles % row_blocks
        oh = first_row(number, STEP, BLOCK_R)
        image_first = block // column_tiles // row_blocks * BLOCK_I

        acc = many_zeros(BLOCK_R * PARTS, BLOCK_M, PART_N)
        for step in tl.range(0, STEPS):
            c = step % CHUNKS * BLOCK_K
            s = step // CHUNKS % KW
            r = step // (CHUNKS * KW)  # 0 where a step takes all kernel rows
            weights = ()
            for t in tl.static_range(BLOCK_T):
                for i in tl.static_range(PARTS):
                    wgt = wgt_desc.load([group, n_first + i * PART_N, (r + t) * KW + s, c])
                    weights = weights + (tl.trans(wgt.reshape(PART_N, BLOCK_K)),)
            phase, column = phase_column(ow_first * CONV_STRIDE_W // VIEW_W, s * DIL_W - PAD_W, VIEW_W)
            sources = ()
            for j in tl.static_range(source_count(MET)):
                row = oh * CONV_STRIDE_H + r * DIL_H + source_row(MET, j)
                at = phase * GROUPS + group
                sources = sources + (load_lanes(x_desc, at, row, column, image_first, c, BLOCK_I, BLOCK_M, BLOCK_K),)
            acc = products(acc, sources, weights, MET, BLOCK_R, PARTS, PRECISION, EMULATE_BF16)
            acc = landed(acc, BLOCK_R * PARTS, LANDED)

        if HAS_BIAS:
            sums = ()
            for i in tl.static_range(BLOCK_R * PARTS):
                n = n_first + i % PARTS * PART_N + tl.arange(0, PART_N)
                bias = tl.load(bias_ptr + group * COUT_G + n, mask=n < COUT_G, other=0.0).to(tl.float32)
                sums = sums + (acc[i] + bias[None, :],)
            acc = sums
        ow, image = lanes_of(ow_first, image_first, BLOCK_I, BLOCK_M, INDEX_64)
        y_at = tl.multiple_of(image * stride_y_n + ow * stride_y_w, Y_ALIGN)
        store_rows(
            y_ptr, residual_ptr, kept_ptr, acc, y_at, (image < batch) & (ow < w_out), oh, h_out,
            stride_y_h, stride_y_c, group * COUT_G, n_first, ACTIVATION, COUT_G,
            BLOCK_R, PARTS, PART_N, STEP, Y_ALIGN, INDEX_64, EMULATE_BF16,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES + ("programs",))
def dgrad_kernel(
    dy_desc, wgt_desc, dx_ptr,
    batch, h_in, w_in, h_out, w_out, row_blocks, column_tiles, image_tiles, programs,
    stride_dx_n, stride_dx_c, stride_dx_h, stride_dx_w,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, COMMON_W: tl.constexpr, INVERSE_W: tl.constexpr,
    DX_ALIGN: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    PART_N: tl.constexpr, LANDED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_R rows by BLOCK_M lanes of dx, of one column phase, by BLOCK_N input channels of one group.

    As in row_block.dgrad_kernel, with its phases; a step is as in fprop_kernel above. N = CIN_G, K = COUT_G.
    """
    CHUNKS: tl.constexpr = (COUT_G + BLOCK_K - 1) // BLOCK_K
    STEP: tl.constexpr = row_step(True, CONV_STRIDE_H, DIL_H)
    MET: tl.constexpr = meetings(True, BLOCK_R, BLOCK_T, CONV_STRIDE_H, PAD_H, DIL_H)
    N_TILES: tl.constexpr = (CIN_G + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = BLOCK_N // PART_N
    tiles = N_TILES * GROUPS * CONV_STRIDE_W * row_blocks * column_tiles * image_tiles
    # Where the phases differ in their number of steps, the loops stay two.
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=CONV_STRIDE_W == 1):
        n_first = tile % N_TILES * BLOCK_N
        group = tile // N_TILES % GROUPS
        phase = tile // (N_TILES * GROUPS) % CONV_STRIDE_W
        block = tile // (N_TILES * GROUPS * CONV_STRIDE_W)
        t_first = block % column_tiles * (BLOCK_M // BLOCK_I)
        number = block // column_tiles % row_blocks
        ih = first_row(number, STEP, BLOCK_R)
        image_first = block // column_tiles // row_blocks * BLOCK_I

        if CONV_STRIDE_W == 1:
            s_first, s_count = 0, KW
        else:
            s_first, s_count = phase_taps(phase, KW, CONV_STRIDE_W, PAD_W, COMMON_W, INVERSE_W)
        taps_w = tl.maximum(s_count, 1)  # as in implicit_gemm.py: no division by the taps of a phase that has none
        ow = (t_first * CONV_STRIDE_W + phase + PAD_W - s_first * DIL_W) // CONV_STRIDE_W
        acc = many_zeros(BLOCK_R * PARTS, BLOCK_M, PART_N)
        for step in tl.range(0, KH // BLOCK_T * s_count * CHUNKS):
            o = step % CHUNKS * BLOCK_K
            t = step // CHUNKS % taps_w
            r = step // (CHUNKS * taps_w)  # 0 where a step takes all kernel rows
            s = s_first + t * (CONV_STRIDE_W // COMMON_W)
            weights = ()
            for i in tl.static_range(BLOCK_T):
                for j in tl.static_range(PARTS):
                    wgt = wgt_desc.load([group, o, (r + i) * KW + s, n_first + j * PART_N])
                    weights = weights + (wgt.reshape(BLOCK_K, PART_N),)
            sources = ()
            for j in tl.static_range(source_count(MET)):
                row = ih // CONV_STRIDE_H - r * DIL_H + source_row(MET, j)
                column = ow - t * (DIL_W // COMMON_W)
                dy = load_lanes(dy_desc, group, row, column, image_first, o, BLOCK_I, BLOCK_M, BLOCK_K)
                sources = sources + (dy,)
            acc = products(acc, sources, weights, MET, BLOCK_R, PARTS, PRECISION, EMULATE_BF16)
            acc = landed(acc, BLOCK_R * PARTS, LANDED)

        tw, image = lanes_of(t_first, image_first, BLOCK_I, BLOCK_M, INDEX_64)
        iw = tw * CONV_STRIDE_W + phase
        dx_at = tl.multiple_of(image * stride_dx_n + iw * stride_dx_w, DX_ALIGN)
        store_rows(
            dx_ptr, None, None, acc, dx_at, (image < batch) & (iw < w_in), ih, h_in, stride_dx_h, stride_dx_c,
            group * CIN_G, n_first, None, CIN_G, BLOCK_R, PARTS, PART_N, STEP, DX_ALIGN, INDEX_64, EMULATE_BF16,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES + ("chunk",))
def wgrad_kernel(
    dy_desc, x_desc, dw_ptr,
    batch, h_in, w_in, h_out, w_out, row_blocks, column_tiles, image_tiles, chunk,
    stride_dw_split, stride_dw_o: tl.constexpr, stride_dw_c: tl.constexpr,
    stride_dw_h: tl.constexpr, stride_dw_w: tl.constexpr,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, VIEW_W: tl.constexpr,
    INDEX_64: tl.constexpr, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr, PART_N: tl.constexpr,
    LANDED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the sum over `chunk` blocks of pixels of one (group, column tap, channels) tile.

    A block is BLOCK_R rows by BLOCK_K lanes of dy, BLOCK_I images by BLOCK_K // BLOCK_I columns. For each kernel row,
    M = BLOCK_M input channels of one column tap, N = COUT_G, K = lanes, for each pair of rows that meets. All kernel
    rows: BLOCK_T = KH. dw: [splits, c_out, CIN_G, KH, KW] by strides, the filter gradient itself or partial sums.
    """
    STEP: tl.constexpr = row_step(False, CONV_STRIDE_H, DIL_H)
    MET: tl.constexpr = meetings(False, BLOCK_R, KH, CONV_STRIDE_H, PAD_H, DIL_H)
    M_TILES: tl.constexpr = (CIN_G + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (COUT_G + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = BLOCK_N // PART_N
    pid = tl.program_id(0)
    n_first = pid % N_TILES * BLOCK_N
    c_first = pid // N_TILES % M_TILES * BLOCK_M
    s = pid // (N_TILES * M_TILES) % KW
    group = pid // (N_TILES * M_TILES * KW) % GROUPS
    split = pid // (N_TILES * M_TILES * KW * GROUPS)

    acc = many_zeros(KH * PARTS, BLOCK_M, PART_N)
    for b in tl.range(0, chunk):
        block = split * chunk + b
        ow = block % column_tiles * (BLOCK_K // BLOCK_I)
        number = block // column_tiles % row_blocks
        oh = first_row(number, STEP, BLOCK_R)
        image = block // column_tiles // row_blocks * BLOCK_I
        phase, column = phase_column(ow * CONV_STRIDE_W // VIEW_W, s * DIL_W - PAD_W, VIEW_W)
        sources = ()
        for j in tl.static_range(source_count(MET)):
            row = oh * CONV_STRIDE_H + source_row(MET, j)
            at = phase * GROUPS + group
            sources = sources + (load_lanes(x_desc, at, row, column, image, c_first, BLOCK_I, BLOCK_K, BLOCK_M),)
        for i in tl.static_range(BLOCK_R):
            dys = ()
            for j in tl.static_range(PARTS):
                n = n_first + j * PART_N
                dys = dys + (load_lanes(dy_desc, group, oh + i * STEP, ow, image, n, BLOCK_I, BLOCK_K, PART_N),)
            sums = ()
            for r in tl.static_range(KH):
                for j in tl.static_range(PARTS):
                    x = tl.trans(sources[source_of(MET, i, r)])
                    sums = sums + (mma(x, dys[j], acc[r * PARTS + j], PRECISION, EMULATE_BF16),)
            acc = sums
        acc = landed(acc, KH * PARTS, LANDED)

    c = c_first + tl.arange(0, BLOCK_M)
    for r in tl.static_range(KH):
        for j in tl.static_range(PARTS):
            n = n_first + j * PART_N + tl.arange(0, PART_N)
            filters = index(split, INDEX_64) * stride_dw_split + index(group * COUT_G + n, INDEX_64) * stride_dw_o
            at = filters[:, None] + (r * stride_dw_h + s * stride_dw_w + c * stride_dw_c)[None, :]
            dw = narrow(tl.trans(acc[r * PARTS + j]), dw_ptr.dtype.element_ty, EMULATE_BF16)
            tl.store(dw_ptr + at, dw, mask=(n < COUT_G)[:, None] & (c < CIN_G)[None, :])
