"""Grouped convolution as one implicit GEMM per group: every problem, every pass.

The three kernels read and write through element strides, so NCHW, NHWC and sliced views need no copy. A tile is
held with its contiguous axis last: *_PIXELS_LAST says that a tensor's pixels (NCHW) and not its channels (NHWC)
are that axis. *_ALIGN is the power of two, up to 16, that divides its strides of pixels, which Triton's own
specialisation sees only from 16 on: without it, NHWC loads of 360 or 696 channels are 2 bytes wide. Offsets are
int32 unless INDEX_64 is set. BLOCK_N may be any sum of powers of two: a program's columns are then as many products as
its parts (tiles.part_sizes), so that a group of 112 or 232 channels need not be padded to 128 or 256. BOUNDED: some tap
reaches past the map; without padding none does. FLAT: a 1x1 layer whose pixels lie evenly apart, images too: a batched
GEMM, without the arithmetic of pixels.
Source: own derivation, no code adapted.
"""

import triton
import triton.language as tl

from .epilogue import finish

from .tiles import (  # isort: skip
    cols, index, landed, mma, narrow, part, part_count, part_zeros, phase_taps, pixel, pixel_offset,
    rows, turned,
)  # fmt: skip

SIZES = ("batch", "h_in", "w_in", "h_out", "w_out", "GROUPS")


@triton.jit(do_not_specialize=SIZES)
def fprop_kernel(
    x_ptr, wgt_ptr, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    FLAT: tl.constexpr, BOUNDED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    CIN_INNERMOST: tl.constexpr, WGT_K_DENSE: tl.constexpr,
    X_PIXELS_LAST: tl.constexpr, Y_PIXELS_LAST: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one (pixel tile, group, output-channel tile) of y.

    Per group M = batch * h_out * w_out, N = COUT_G, K = KH * KW * CIN_G in (kh, kw, cin) order, or in the
    (cin, kh, kw) order of a contiguous weight where not CIN_INNERMOST. WGT_K_DENSE: the weight is dense in that
    order, so its offset in K is k itself and its loads are wide.
    Programs of one pixel tile are neighbours: in NHWC they share the cache lines of x.
    """
    K: tl.constexpr = KH * KW * CIN_G
    ONE_TAP: tl.constexpr = CIN_INNERMOST and CIN_G % BLOCK_K == 0
    N_TILES: tl.constexpr = (COUT_G + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group = index(pid // N_TILES % GROUPS, INDEX_64)
    m = index(pid // (N_TILES * GROUPS), INDEX_64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_first = pid % N_TILES * BLOCK_N

    image, oh, ow, live = pixel(m, batch, h_out, w_out, FLAT)
    ih = oh * CONV_STRIDE_H - PAD_H
    iw = ow * CONV_STRIDE_W - PAD_W
    x_m = pixel_offset(image, ih, iw, stride_x_n, stride_x_h, stride_x_w, FLAT, X_ALIGN)
    x_m = rows(x_m, X_PIXELS_LAST)
    live_m = rows(live, X_PIXELS_LAST)
    ih = rows(ih, X_PIXELS_LAST)
    iw = rows(iw, X_PIXELS_LAST)
    x_ptr += group * CIN_G * stride_x_c

    acc = part_zeros(BLOCK_M, BLOCK_N)
    for k0 in tl.range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if ONE_TAP:  # the tap is a scalar, and so is most of the masking
            c = k - k0 // CIN_G * CIN_G
            r = k0 // CIN_G // KW
            s = k0 // CIN_G % KW
        elif CIN_INNERMOST:
            c = k % CIN_G
            r = k // CIN_G // KW
            s = k // CIN_G % KW
        else:
            c = k // (KH * KW)
            r = k % (KH * KW) // KW
            s = k % KW
        x_tap = tl.multiple_of(r * DIL_H * stride_x_h + s * DIL_W * stride_x_w, X_ALIGN)
        x_k = cols(index(c, INDEX_64) * stride_x_c, X_PIXELS_LAST) + cols(x_tap, X_PIXELS_LAST)
        h = ih + cols(r * DIL_H, X_PIXELS_LAST)
        w = iw + cols(s * DIL_W, X_PIXELS_LAST)
        inside = live_m
        if BOUNDED:
            inside &= (h >= 0) & (h < h_in) & (w >= 0) & (w < w_in)
        if K % BLOCK_K:
            inside &= cols(k < K, X_PIXELS_LAST)
        x = turned(tl.load(x_ptr + (x_m + x_k), mask=inside, other=0.0), X_PIXELS_LAST)
        wgt_k = k if WGT_K_DENSE else c * stride_wgt_c + r * stride_wgt_h + s * stride_wgt_w
        sums = ()
        for i in tl.static_range(part_count(BLOCK_N)):
            n = part(n_first, BLOCK_N, i)
            wgt_n = (group * COUT_G + n) * (K if WGT_K_DENSE else stride_wgt_o)
            in_wgt = (k < K)[:, None] & (n < COUT_G)[None, :]
            wgt = tl.load(wgt_ptr + wgt_n[None, :] + wgt_k[:, None], mask=in_wgt, other=0.0)
            total = mma(x, wgt, acc[i], PRECISION, EMULATE_BF16)
            sums = sums + (landed(total, BLOCK_N),)
        acc = sums

    y_m = pixel_offset(image, oh, ow, stride_y_n, stride_y_h, stride_y_w, FLAT, Y_ALIGN)
    for i in tl.static_range(part_count(BLOCK_N)):
        n = part(n_first, BLOCK_N, i)
        o = group * COUT_G + n
        y = acc[i]
        if HAS_BIAS:
            y += tl.load(bias_ptr + o, mask=n < COUT_G, other=0.0).to(tl.float32)[None, :]
        y_at = rows(y_m, Y_PIXELS_LAST) + cols(o * stride_y_c, Y_PIXELS_LAST)
        mask = rows(live, Y_PIXELS_LAST) & cols(n < COUT_G, Y_PIXELS_LAST)
        finish(y_ptr + y_at, y, mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION, Y_PIXELS_LAST, EMULATE_BF16)


@triton.jit(do_not_specialize=SIZES + ("h_phase", "w_phase"))
def dgrad_kernel(
    dy_ptr, wgt_ptr, dx_ptr,
    batch, h_in, w_in, h_out, w_out, h_phase, w_phase,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_dx_n, stride_dx_c, stride_dx_h, stride_dx_w,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    COMMON_H: tl.constexpr, COMMON_W: tl.constexpr, INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr,
    DY_PIXELS_LAST: tl.constexpr, DX_PIXELS_LAST: tl.constexpr,
    DY_ALIGN: tl.constexpr, WGT_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr,
    FLAT: tl.constexpr, BOUNDED: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one (pixel tile of one phase, group, input-channel tile) of dx.

    The phase of an input pixel is its row and column modulo the convolution's stride: pixels of a phase meet the
    same taps, and only those are visited. h_phase, w_phase: the rows and columns of the largest phase.
    Per group and phase M = batch * h_phase * w_phase, N = CIN_G, K = taps * COUT_G in (kh, kw, cout) order.
    """
    ONE_TAP: tl.constexpr = COUT_G % BLOCK_K == 0
    N_TILES: tl.constexpr = (CIN_G + BLOCK_N - 1) // BLOCK_N
    PHASES: tl.constexpr = CONV_STRIDE_H * CONV_STRIDE_W
    pid = tl.program_id(0)
    group = index(pid // N_TILES % GROUPS, INDEX_64)
    phase = pid // (N_TILES * GROUPS) % PHASES
    m = index(pid // (N_TILES * GROUPS * PHASES), INDEX_64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_first = pid % N_TILES * BLOCK_N

    r_first, r_count = phase_taps(phase // CONV_STRIDE_W, KH, CONV_STRIDE_H, PAD_H, COMMON_H, INVERSE_H)
    s_first, s_count = phase_taps(phase % CONV_STRIDE_W, KW, CONV_STRIDE_W, PAD_W, COMMON_W, INVERSE_W)
    image, th, tw, live = pixel(m, batch, h_phase, w_phase, FLAT)
    ih = th * CONV_STRIDE_H + phase // CONV_STRIDE_W
    iw = tw * CONV_STRIDE_W + phase % CONV_STRIDE_W
    if not FLAT:
        live &= (ih < h_in) & (iw < w_in)
    # The output pixel that the first tap reaches; each further tap reaches one DIL / COMMON before.
    oh = (ih + PAD_H - r_first * DIL_H) // CONV_STRIDE_H
    ow = (iw + PAD_W - s_first * DIL_W) // CONV_STRIDE_W
    BACK_H: tl.constexpr = DIL_H // COMMON_H
    BACK_W: tl.constexpr = DIL_W // COMMON_W
    dy_m = pixel_offset(image, oh, ow, stride_dy_n, stride_dy_h, stride_dy_w, FLAT, DY_ALIGN)
    dy_m = rows(dy_m, DY_PIXELS_LAST)
    live_m = rows(live, DY_PIXELS_LAST)
    oh = rows(oh, DY_PIXELS_LAST)
    ow = rows(ow, DY_PIXELS_LAST)
    dy_ptr += group * COUT_G * stride_dy_c
    wgt_ptr += group * COUT_G * stride_wgt_o

    acc = part_zeros(BLOCK_M, BLOCK_N)
    K = r_count * s_count * COUT_G
    # What a pipelined loop computes ahead is computed for phases without taps too: a division by their zero taps would
    # let the compiler conclude that there are none such.
    taps_w = tl.maximum(s_count, 1)
    for k0 in tl.range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if ONE_TAP:
            o = k - k0 // COUT_G * COUT_G
            i = k0 // COUT_G // taps_w
            j = k0 // COUT_G % taps_w
        else:
            o = k % COUT_G
            i = k // COUT_G // taps_w
            j = k // COUT_G % taps_w
        dy_tap = tl.multiple_of(i * BACK_H * stride_dy_h + j * BACK_W * stride_dy_w, DY_ALIGN)
        dy_k = cols(index(o, INDEX_64) * stride_dy_c, DY_PIXELS_LAST) - cols(dy_tap, DY_PIXELS_LAST)
        h = oh - cols(i * BACK_H, DY_PIXELS_LAST)
        w = ow - cols(j * BACK_W, DY_PIXELS_LAST)
        inside = live_m
        if BOUNDED:
            inside &= (h >= 0) & (h < h_out) & (w >= 0) & (w < w_out)
        if not ONE_TAP:
            inside &= cols(k < K, DY_PIXELS_LAST)
        dy = turned(tl.load(dy_ptr + (dy_m + dy_k), mask=inside, other=0.0), DY_PIXELS_LAST)
        r = r_first + i * (CONV_STRIDE_H // COMMON_H)
        s = s_first + j * (CONV_STRIDE_W // COMMON_W)
        wgt_k = tl.multiple_of(o * stride_wgt_o + r * stride_wgt_h + s * stride_wgt_w, WGT_ALIGN)
        sums = ()
        for part_i in tl.static_range(part_count(BLOCK_N)):
            n = part(n_first, BLOCK_N, part_i)
            wgt_at = wgt_k[:, None] + (n * stride_wgt_c)[None, :]
            wgt = tl.load(wgt_ptr + wgt_at, mask=(k < K)[:, None] & (n < CIN_G)[None, :], other=0.0)
            total = mma(dy, wgt, acc[part_i], PRECISION, EMULATE_BF16)
            sums = sums + (landed(total, BLOCK_N),)
        acc = sums

    dx_m = pixel_offset(image, ih, iw, stride_dx_n, stride_dx_h, stride_dx_w, FLAT, DX_ALIGN)
    for part_i in tl.static_range(part_count(BLOCK_N)):
        n = part(n_first, BLOCK_N, part_i)
        dx_at = rows(dx_m, DX_PIXELS_LAST) + cols((group * CIN_G + n) * stride_dx_c, DX_PIXELS_LAST)
        mask = rows(live, DX_PIXELS_LAST) & cols(n < CIN_G, DX_PIXELS_LAST)
        dx = narrow(acc[part_i], dx_ptr.dtype.element_ty, EMULATE_BF16)
        tl.store(dx_ptr + dx_at, turned(dx, DX_PIXELS_LAST), mask=mask)


@triton.jit(do_not_specialize=SIZES + ("chunk",))
def wgrad_kernel(
    dy_ptr, x_ptr, dw_ptr,
    batch, h_in, w_in, h_out, w_out, chunk,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_dw_split, stride_dw_o: tl.constexpr, stride_dw_c: tl.constexpr,
    stride_dw_h: tl.constexpr, stride_dw_w: tl.constexpr,
    GROUPS, CIN_G: tl.constexpr, COUT_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    CONV_STRIDE_H: tl.constexpr, CONV_STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    DY_PIXELS_LAST: tl.constexpr, X_PIXELS_LAST: tl.constexpr,
    DY_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, FLAT: tl.constexpr, BOUNDED: tl.constexpr, INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the sum over one split of the pixels of one (group, tap and channel, output-channel) tile.

    Per group M = KH * KW * CIN_G in (kh, kw, cin) order, N = COUT_G, K = batch * h_out * w_out pixels, of which this
    program takes `chunk`. dw: [splits, c_out, CIN_G, KH, KW] by strides, the filter gradient itself or partial sums.
    """
    M: tl.constexpr = KH * KW * CIN_G
    M_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (COUT_G + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group = index(pid // (N_TILES * M_TILES) % GROUPS, INDEX_64)
    split = index(pid // (N_TILES * M_TILES * GROUPS), INDEX_64)
    m = pid // N_TILES % M_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    n_first = pid % N_TILES * BLOCK_N

    c = cols(m % CIN_G, X_PIXELS_LAST)
    below_h = cols(m // CIN_G // KW * DIL_H - PAD_H, X_PIXELS_LAST)
    right_w = cols(m // CIN_G % KW * DIL_W - PAD_W, X_PIXELS_LAST)
    m_in = cols(m < M, X_PIXELS_LAST)
    x_m = index(c, INDEX_64) * stride_x_c + tl.multiple_of(
        below_h * stride_x_h + right_w * stride_x_w, (X_ALIGN, X_ALIGN)
    )
    x_ptr += group * CIN_G * stride_x_c
    dy_ptr += group * COUT_G * stride_dy_c

    acc = part_zeros(BLOCK_M, BLOCK_N)
    for p0 in tl.range(0, chunk, BLOCK_K):
        p = split * chunk + p0 + tl.arange(0, BLOCK_K)
        image, oh, ow, live_p = pixel(p, batch, h_out, w_out, FLAT)
        ih = oh * CONV_STRIDE_H
        iw = ow * CONV_STRIDE_W
        x_p = pixel_offset(image, ih, iw, stride_x_n, stride_x_h, stride_x_w, FLAT, X_ALIGN)
        inside = rows(live_p, X_PIXELS_LAST) & m_in
        if BOUNDED:
            h = rows(ih, X_PIXELS_LAST) + below_h
            w = rows(iw, X_PIXELS_LAST) + right_w
            inside &= (h >= 0) & (h < h_in) & (w >= 0) & (w < w_in)
        x = tl.load(x_ptr + (rows(x_p, X_PIXELS_LAST) + x_m), mask=inside, other=0.0)
        x = tl.trans(turned(x, X_PIXELS_LAST))
        dy_p = pixel_offset(image, oh, ow, stride_dy_n, stride_dy_h, stride_dy_w, FLAT, DY_ALIGN)
        sums = ()
        for i in tl.static_range(part_count(BLOCK_N)):
            n = part(n_first, BLOCK_N, i)
            dy_at = rows(dy_p, DY_PIXELS_LAST) + cols(index(n, INDEX_64) * stride_dy_c, DY_PIXELS_LAST)
            live = rows(live_p, DY_PIXELS_LAST) & cols(n < COUT_G, DY_PIXELS_LAST)
            dy = turned(tl.load(dy_ptr + dy_at, mask=live, other=0.0), DY_PIXELS_LAST)
            total = mma(x, dy, acc[i], PRECISION, EMULATE_BF16)
            sums = sums + (landed(total, BLOCK_N),)
        acc = sums

    tap = m // CIN_G
    dw_m = m % CIN_G * stride_dw_c + tap // KW * stride_dw_h + tap % KW * stride_dw_w
    for i in tl.static_range(part_count(BLOCK_N)):
        n = part(n_first, BLOCK_N, i)
        at = (split * stride_dw_split + (group * COUT_G + n) * stride_dw_o)[:, None] + dw_m[None, :]
        dw = narrow(tl.trans(acc[i]), dw_ptr.dtype.element_ty, EMULATE_BF16)
        tl.store(dw_ptr + at, dw, mask=(n < COUT_G)[:, None] & (m < M)[None, :])
