"""Wide groups as implicit GEMMs over blocks of rows: each row of the source is loaded once per column tap.

A program owns BLOCK_R rows of the result by BLOCK_M lanes, a lane being an (image, column) of the flattened batch. In
every step of its loop it loads the source's rows that any of its rows meets, and the weights of all kernel rows, and
multiplies each pair that meets: BLOCK_R + KH - 1 loads for BLOCK_R * KH products at stride 1, where the plain implicit
GEMM loads a tile for each product. Which rows meet is known at compile time. The reduction is flattened over the
column taps and channels of a group, so that neither is padded; rows DIL_H apart are a class of their own.
BLOCK_L: whether the source waits for its products in registers (tiles.in_registers).
BLOCK_N may be any sum of powers of two (tiles.part_sizes). A tile lies with its contiguous axis last: *_PIXELS_LAST
says that this is the columns (NCHW) and not the channels (NHWC). *_ALIGN is the power of two that divides a tensor's
strides of pixels, as in implicit_gemm.py.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl

from .epilogue import finish

from .tiles import (  # isort: skip
    NOWHERE, as_mask, below, cols, in_registers, index, landed, mma, narrow, part, part_count, part_zeros, phase_taps,
    rows, touched, turned,
)  # fmt: skip

SIZES = ("batch", "h_in", "w_in", "h_out", "w_out", "row_blocks", "GROUPS")


@triton.constexpr_function
def row_step(dgrad, stride, dilation):
    """How far apart the rows of a block are, so that they share rows of the source."""
    if dgrad:
        return dilation if stride == 1 else 1
    common = max(d for d in range(1, dilation + 1) if stride % d == dilation % d == 0)
    return dilation // common


@triton.constexpr_function
def meetings(dgrad, block, kernel, stride, pad, dilation):
    """The (row of the block, kernel row, row of the source) that meet, by source row and block row.

    Source rows count from stride times the block's first row in fprop, and from a stride-th of it in dgrad, whose
    blocks begin at a multiple of the stride.
    """
    step, found = row_step(dgrad, stride, dilation), []
    for i in range(block):
        for r in range(kernel):
            if not dgrad:
                found.append((i, r, i * step * stride + r * dilation - pad))
            elif (i * step + pad - r * dilation) % stride == 0:
                found.append((i, r, (i * step + pad - r * dilation) // stride))
    return sorted(found, key=lambda met: (met[2], met[0]))


@triton.constexpr_function
def source_rows(met):
    """The rows of the source, ascending."""
    return sorted({row for _, _, row in met})


@triton.constexpr_function
def source_count(met):
    return len(source_rows(met))


@triton.constexpr_function
def source_row(met, number):
    return source_rows(met)[number]


@triton.constexpr_function
def kernel_row(met, source, i):
    """The kernel row by which row i of the block meets source row number `source`, or -1."""
    return next((r for own, r, row in met if own == i and row == source_rows(met)[source]), -1)


@triton.jit
def many_zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """fp32 zeros: COUNT times the parts of a tile [ROWS, COLS], one tuple."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + part_zeros(ROWS, COLS)
    return found


@triton.jit
def first_row(block, STEP: tl.constexpr, BLOCK_R: tl.constexpr):
    """The first row of a block: blocks of one class of rows, STEP apart, are STEP numbers apart."""
    return block // STEP * (BLOCK_R * STEP) + block % STEP


@triton.jit
def load_rows(
    ptr, at, live, first, height, stride_h,
    MET: tl.constexpr, PIXELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Tiles, lanes first, of the source's rows that a block meets; `at` and `live` are those of row 0."""
    tiles = ()
    for j in tl.static_range(source_count(MET)):
        row = first + source_row(MET, j)
        row_ptr = ptr + tl.multiple_of(index(row, INDEX_64) * stride_h, ALIGN)
        tile = tl.load(row_ptr + at, mask=as_mask(live & below(row, height)), other=0.0)
        tiles = tiles + (in_registers(turned(tile, PIXELS_LAST), BLOCK_L),)
    return tiles


@triton.jit
def ended(total, LAST_COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr):
    """The sum of a step's last product, waited for where it must be: with BLOCK_L the next step writes registers that
    products read their left operand from.
    """
    return touched(total) if BLOCK_L else landed(total, LAST_COLUMNS)


@triton.jit
def products(
    acc, tiles, weights, MET: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr, BLOCK_L: tl.constexpr = False,
):  # fmt: skip
    """The sums of a block's rows, each plus tiles of the source times the weights of the kernel row that joins them."""
    sums = ()
    for i in tl.static_range(BLOCK_R):
        for n in tl.static_range(PARTS):
            total = acc[i * PARTS + n]
            for j in tl.static_range(source_count(MET)):
                if kernel_row(MET, j, i) >= 0:
                    wgt = weights[kernel_row(MET, j, i) * PARTS + n]
                    total = mma(tiles[j], wgt, total, PRECISION, EMULATE_BF16)
            sums = sums + (ended(total, weights[PARTS - 1].shape[1], BLOCK_L) if i == BLOCK_R - 1 else total,)
    return sums


@triton.jit(do_not_specialize=SIZES)
def fprop_kernel(
    x_ptr, wgt_ptr, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out, row_blocks,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    WGT_ROW_DENSE: tl.constexpr, X_PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, WGT_ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows by BLOCK_M lanes (batch x w_out) of y by BLOCK_N output channels of one group.

    Per group, M = lanes, a product for each pair of rows that meets; N = COUT_G; K = KW * CIN_G in (kw, cin) order,
    once for all kernel rows. WGT_ROW_DENSE: the weights of a kernel row are dense in that order.
    """
    K: tl.constexpr = KW * CIN_G
    STEP: tl.constexpr = row_step(False, CONV_STRIDE_H, DIL_H)
    MET: tl.constexpr = meetings(False, BLOCK_R, KH, CONV_STRIDE_H, PAD_H, DIL_H)
    N_TILES: tl.constexpr = (COUT_G + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = part_count(BLOCK_N)
    pid = tl.program_id(0)
    n_first = pid % N_TILES * BLOCK_N
    group = index(pid // N_TILES % GROUPS, INDEX_64)
    block = pid // (N_TILES * GROUPS)
    p = index(block // row_blocks, INDEX_64) * BLOCK_M + tl.arange(0, BLOCK_M)
    oh = first_row(block % row_blocks, STEP, BLOCK_R)
    image, ow = p // w_out, p % w_out

    iw = ow * CONV_STRIDE_W - PAD_W
    x_p = rows(tl.multiple_of(image * stride_x_n + iw * stride_x_w, X_ALIGN), X_PIXELS_LAST)
    iw = rows(tl.where(image < batch, iw, NOWHERE).to(tl.int32), X_PIXELS_LAST)
    x_ptr += group * CIN_G * stride_x_c
    wgt_ptr += group * COUT_G * stride_wgt_o

    acc = many_zeros(BLOCK_R, BLOCK_M, BLOCK_N)
    for k0 in tl.range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if CIN_G % BLOCK_K == 0:  # one tap, a scalar
            s = k0 // CIN_G
            c = k - s * CIN_G
        else:
            s = k // CIN_G
            c = k % CIN_G
        x_tap = tl.multiple_of(s * DIL_W * stride_x_w, X_ALIGN)
        x_k = cols(index(c, INDEX_64) * stride_x_c, X_PIXELS_LAST) + cols(x_tap, X_PIXELS_LAST)
        live = below(iw + cols(s * DIL_W, X_PIXELS_LAST), w_in)
        if K % BLOCK_K:
            live &= cols(k < K, X_PIXELS_LAST)
        wgt_k = k if WGT_ROW_DENSE else c * stride_wgt_c + s * stride_wgt_w
        weights = ()
        for r in tl.static_range(KH):
            for i in tl.static_range(PARTS):
                n = part(n_first, BLOCK_N, i)
                wgt_n = tl.multiple_of(tl.multiple_of(n * stride_wgt_o, WGT_ALIGN) + r * stride_wgt_h, WGT_ALIGN)
                inside = (n < COUT_G)[None, :] & (k < K)[:, None]
                weights = weights + (tl.load(wgt_ptr + (wgt_n[None, :] + wgt_k[:, None]), mask=inside, other=0.0),)
        tiles = load_rows(
            x_ptr, x_p + x_k, live, oh * CONV_STRIDE_H, h_in, stride_x_h,
            MET, X_PIXELS_LAST, X_ALIGN, INDEX_64, BLOCK_L,
        )  # fmt: skip
        acc = products(acc, tiles, weights, MET, BLOCK_R, PARTS, PRECISION, EMULATE_BF16, BLOCK_L)

    y_p = rows(tl.multiple_of(image * stride_y_n + ow * stride_y_w, Y_ALIGN), Y_PIXELS_LAST)
    live_p = rows(image < batch, Y_PIXELS_LAST)
    for i in tl.static_range(BLOCK_R):
        row = oh + i * STEP
        row_ptr = y_ptr + tl.multiple_of(index(row, INDEX_64) * stride_y_h, Y_ALIGN)
        for j in tl.static_range(PARTS):
            n = part(n_first, BLOCK_N, j)
            o = group * COUT_G + n
            y = acc[i * PARTS + j]
            if HAS_BIAS:
                y += tl.load(bias_ptr + o, mask=n < COUT_G, other=0.0).to(tl.float32)[None, :]
            mask = as_mask(live_p & cols(n < COUT_G, Y_PIXELS_LAST) & (row < h_out))
            y_at = y_p + cols(o * stride_y_c, Y_PIXELS_LAST)
            finish(row_ptr + y_at, y, mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION, Y_PIXELS_LAST, EMULATE_BF16)


@triton.jit(do_not_specialize=SIZES + ("w_phase",))
def dgrad_kernel(
    dy_ptr, wgt_ptr, dx_ptr,
    batch, h_in, w_in, h_out, w_out, row_blocks, w_phase,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_dx_n, stride_dx_c, stride_dx_h, stride_dx_w,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, COMMON_W: tl.constexpr, INVERSE_W: tl.constexpr,
    DY_PIXELS_LAST: tl.constexpr, DX_PIXELS_LAST: tl.constexpr,
    DY_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr, WGT_ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows by BLOCK_M lanes of dx by BLOCK_N input channels of one group.

    A lane is an (image, column) of one column phase (the column modulo the stride), of w_phase columns: the columns of
    a phase meet the same taps, and only those are visited; so do the rows, whose phases lie in one block at compile
    time. Per group and phase, M = lanes, N = CIN_G, K = column taps * COUT_G in (kw, cout) order.
    """
    STEP: tl.constexpr = row_step(True, CONV_STRIDE_H, DIL_H)
    MET: tl.constexpr = meetings(True, BLOCK_R, KH, CONV_STRIDE_H, PAD_H, DIL_H)
    N_TILES: tl.constexpr = (CIN_G + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = part_count(BLOCK_N)
    BACK: tl.constexpr = DIL_W // COMMON_W
    pid = tl.program_id(0)
    n_first = pid % N_TILES * BLOCK_N
    group = index(pid // N_TILES % GROUPS, INDEX_64)
    phase = pid // (N_TILES * GROUPS) % CONV_STRIDE_W
    block = pid // (N_TILES * GROUPS * CONV_STRIDE_W)
    p = index(block // row_blocks, INDEX_64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ih = first_row(block % row_blocks, STEP, BLOCK_R)
    image = p // w_phase
    iw = p % w_phase * CONV_STRIDE_W + phase
    live_p = (image < batch) & (iw < w_in)

    s_first, s_count = phase_taps(phase, KW, CONV_STRIDE_W, PAD_W, COMMON_W, INVERSE_W)
    ow = (iw + PAD_W - s_first * DIL_W) // CONV_STRIDE_W  # that the first tap reaches; the others, BACK apart, before
    dy_p = rows(tl.multiple_of(image * stride_dy_n + ow * stride_dy_w, DY_ALIGN), DY_PIXELS_LAST)
    ow = rows(tl.where(live_p, ow, NOWHERE).to(tl.int32), DY_PIXELS_LAST)
    dy_ptr += group * COUT_G * stride_dy_c
    wgt_ptr += group * COUT_G * stride_wgt_o

    acc = many_zeros(BLOCK_R, BLOCK_M, BLOCK_N)
    K = s_count * COUT_G
    for k0 in tl.range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if COUT_G % BLOCK_K == 0:  # one tap, a scalar
            t = k0 // COUT_G
            o = k - t * COUT_G
        else:
            t = k // COUT_G
            o = k % COUT_G
        dy_tap = tl.multiple_of(t * BACK * stride_dy_w, DY_ALIGN)
        dy_k = cols(index(o, INDEX_64) * stride_dy_c, DY_PIXELS_LAST) - cols(dy_tap, DY_PIXELS_LAST)
        live = below(ow - cols(t * BACK, DY_PIXELS_LAST), w_out)
        if COUT_G % BLOCK_K:
            live &= cols(k < K, DY_PIXELS_LAST)
        wgt_o = o * stride_wgt_o + (s_first + t * (CONV_STRIDE_W // COMMON_W)) * stride_wgt_w
        wgt_o = tl.multiple_of(wgt_o, WGT_ALIGN)
        weights = ()
        for r in tl.static_range(KH):
            wgt_k = tl.multiple_of(wgt_o + r * stride_wgt_h, WGT_ALIGN)[:, None]
            for i in tl.static_range(PARTS):
                n = part(n_first, BLOCK_N, i)
                inside = (n < CIN_G)[None, :] & (k < K)[:, None]
                weights = weights + (tl.load(wgt_ptr + (wgt_k + (n * stride_wgt_c)[None, :]), mask=inside, other=0.0),)
        tiles = load_rows(
            dy_ptr, dy_p + dy_k, live, ih // CONV_STRIDE_H, h_out, stride_dy_h,
            MET, DY_PIXELS_LAST, DY_ALIGN, INDEX_64, BLOCK_L,
        )  # fmt: skip
        acc = products(acc, tiles, weights, MET, BLOCK_R, PARTS, PRECISION, EMULATE_BF16, BLOCK_L)

    dx_p = rows(tl.multiple_of(image * stride_dx_n + iw * stride_dx_w, DX_ALIGN), DX_PIXELS_LAST)
    live_p = rows(live_p, DX_PIXELS_LAST)
    for i in tl.static_range(BLOCK_R):
        row = ih + i * STEP
        row_ptr = dx_ptr + tl.multiple_of(index(row, INDEX_64) * stride_dx_h, DX_ALIGN)
        for j in tl.static_range(PARTS):
            n = part(n_first, BLOCK_N, j)
            dx = narrow(acc[i * PARTS + j], dx_ptr.dtype.element_ty, EMULATE_BF16)
            mask = as_mask(live_p & cols(n < CIN_G, DX_PIXELS_LAST) & (row < h_in))
            dx_at = dx_p + cols((group * CIN_G + n) * stride_dx_c, DX_PIXELS_LAST)
            tl.store(row_ptr + dx_at, turned(dx, DX_PIXELS_LAST), mask=mask)


@triton.jit(do_not_specialize=SIZES + ("chunk",))
def wgrad_kernel(
    dy_ptr, x_ptr, dw_ptr,
    batch, h_in, w_in, h_out, w_out, row_blocks, chunk,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_dw_split, stride_dw_o: tl.constexpr, stride_dw_c: tl.constexpr,
    stride_dw_h: tl.constexpr, stride_dw_w: tl.constexpr,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    DY_PIXELS_LAST: tl.constexpr, X_PIXELS_LAST: tl.constexpr,
    DY_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program: the sum over `chunk` blocks of pixels of one (group, tap and channel, output-channel) tile.

    A block is BLOCK_R rows by BLOCK_K lanes (batch x w_out) of dy. For each kernel row, M = BLOCK_M of the group's
    KW * CIN_G column taps and channels, N = COUT_G, K = lanes, a product for each pair of rows that meets.
    dw: [splits, c_out, CIN_G, KH, KW] by strides, the filter gradient itself or partial sums.
    """
    M: tl.constexpr = KW * CIN_G
    STEP: tl.constexpr = row_step(False, CONV_STRIDE_H, DIL_H)
    MET: tl.constexpr = meetings(False, BLOCK_R, KH, CONV_STRIDE_H, PAD_H, DIL_H)
    M_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (COUT_G + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = part_count(BLOCK_N)
    pid = tl.program_id(0)
    n_first = pid % N_TILES * BLOCK_N
    m = pid // N_TILES % M_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    group = index(pid // (N_TILES * M_TILES) % GROUPS, INDEX_64)
    split = index(pid // (N_TILES * M_TILES * GROUPS), INDEX_64)

    reach = cols(tl.where(m < M, m // CIN_G * DIL_W - PAD_W, NOWHERE), X_PIXELS_LAST)
    x_tap = tl.multiple_of((m // CIN_G * DIL_W - PAD_W) * stride_x_w, X_ALIGN)
    x_m = cols(index(m % CIN_G, INDEX_64) * stride_x_c, X_PIXELS_LAST) + cols(x_tap, X_PIXELS_LAST)
    x_ptr += group * CIN_G * stride_x_c
    dy_ptr += group * COUT_G * stride_dy_c

    acc = many_zeros(KH, BLOCK_M, BLOCK_N)
    for b in tl.range(0, chunk):
        block = split * chunk + b
        p = index(block // row_blocks, INDEX_64) * BLOCK_K + tl.arange(0, BLOCK_K)
        oh = first_row(block % row_blocks, STEP, BLOCK_R).to(tl.int32)
        image, ow = p // w_out, p % w_out
        iw = ow * CONV_STRIDE_W
        x_p = rows(tl.multiple_of(image * stride_x_n + iw * stride_x_w, X_ALIGN), X_PIXELS_LAST)
        iw = rows(tl.where(image < batch, iw, NOWHERE).to(tl.int32), X_PIXELS_LAST)
        tiles = load_rows(
            x_ptr, x_p + x_m, below(iw + reach, w_in), oh * CONV_STRIDE_H, h_in, stride_x_h,
            MET, X_PIXELS_LAST, X_ALIGN, INDEX_64, BLOCK_L,
        )  # fmt: skip
        dy_p = rows(tl.multiple_of(image * stride_dy_n + ow * stride_dy_w, DY_ALIGN), DY_PIXELS_LAST)
        for i in tl.static_range(BLOCK_R):
            row = oh + i * STEP
            row_ptr = dy_ptr + tl.multiple_of(index(row, INDEX_64) * stride_dy_h, DY_ALIGN)
            live = as_mask(rows(image < batch, DY_PIXELS_LAST) & (row < h_out))
            dys = ()
            for n_part in tl.static_range(PARTS):
                n = part(n_first, BLOCK_N, n_part)
                dy_at = dy_p + cols(index(n, INDEX_64) * stride_dy_c, DY_PIXELS_LAST)
                dy = tl.load(row_ptr + dy_at, mask=live & cols(n < COUT_G, DY_PIXELS_LAST), other=0.0)
                dys = dys + (turned(dy, DY_PIXELS_LAST),)
            sums = ()
            for r in tl.static_range(KH):
                for n_part in tl.static_range(PARTS):
                    x = tl.trans(tiles[source_of(MET, i, r)])
                    total = mma(x, dys[n_part], acc[r * PARTS + n_part], PRECISION, EMULATE_BF16)
                    last = i == BLOCK_R - 1 and r == KH - 1
                    sums = sums + (ended(total, dys[PARTS - 1].shape[1], BLOCK_L) if last else total,)
            acc = sums

    for r in tl.static_range(KH):
        for i in tl.static_range(PARTS):
            n = part(n_first, BLOCK_N, i)
            at = (split * stride_dw_split + (group * COUT_G + n) * stride_dw_o)[:, None]
            at += (m % CIN_G * stride_dw_c + r * stride_dw_h + m // CIN_G * stride_dw_w)[None, :]
            dw = narrow(tl.trans(acc[r * PARTS + i]), dw_ptr.dtype.element_ty, EMULATE_BF16)
            tl.store(dw_ptr + at, dw, mask=(n < COUT_G)[:, None] & (m < M)[None, :])


@triton.constexpr_function
def source_of(met, i, r):
    """The number of the source row by which row i of the block meets kernel row r."""
    return next(source_rows(met).index(row) for own, tap, row in met if (own, tap) == (i, r))
