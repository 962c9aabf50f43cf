"""Depthwise convolution of channels_last maps on matrix units, operands going from memory to fragments untouched.

The products are depthwise_toeplitz's: per channel, lanes of a row times a banded matrix T_r[k, j] = w[r, s] where input
column k meets output column j through tap s, and a march down the rows. Written in Gluon, as only explicit layouts let
a thread hold, of each pixel that it loads, BLOCK_V channels, whose bytes lie together: the fragments of BLOCK_V
products of NVIDIA's mma.sync. Rows come by asynchronous copies, num_stages - 1 ahead, in the order in which shared
memory serves 16 bytes a thread without bank conflicts; a byte permutation sorts a pixel pair by channels; nothing else
moves.
Source: own derivation, no code adapted; the fragments are those of the PTX ISA's mma.m16n8k16.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .fragments import (
    SIZES,
    along,
    axes,
    below,
    copy,
    copy_step,
    finish,
    index,
    joined,
    lane,
    packed,
    parts,
    result_layout,
    shared_layouts,
    spread,
    store_diagonals,
    strides,
    unpacked,
)


@triton.constexpr_function
def tile_layouts(fragment, v, vector, swap):
    """(of registers, of copies, of shared memory) of a [lanes, columns, channels] tile.

    fragment: of [warps' channels, lanes, columns], or, if swap, [.., columns, lanes], the linear layout of an operand;
    a thread has v neighbouring channels of each of its elements, and copies `vector` of a pixel at once.
    """
    across, one, other = fragment.shape
    shape = [other, one, across * v] if swap else [one, other, across * v]

    def placed(bases):
        return [[b[2], b[1], b[0] * v] if swap else [b[1], b[2], b[0] * v] for b in bases]

    held, lanes, warps = placed(fragment.reg_bases), placed(fragment.lane_bases), placed(fragment.warp_bases)
    bases = axes(*shape)
    registers = gl.DistributedLinearLayout(bases[2][: v.bit_length() - 1] + held, lanes, warps, [], shape)
    return registers, *shared_layouts(bases, lanes, len(warps), vector)


@gluon.jit
def channels_apart(tile, V: gl.constexpr, SWAP: gl.constexpr, OPERAND: gl.constexpr):
    """A [lanes, columns, channels] tile as V operands [warps' channels, lanes, columns], or, SWAP, [.., columns,
    lanes]: the first has channels 0, V, 2 V, ... Nothing moves between threads.
    """
    tile = tile.reshape([tile.shape[0], tile.shape[1], tile.shape[2] // V, V])
    tiles = parts(tile.permute([2, 1, 0, 3] if SWAP else [2, 0, 1, 3]), V)
    operands = ()
    for v in gl.static_range(V):
        operands = operands + (gl.convert_layout(tiles[v], OPERAND, assert_trivial=True),)
    return operands


@gluon.jit
def channels_together(tiles, V: gl.constexpr):
    """What `channels_apart` makes V tiles of."""
    tile = joined(tiles, V).permute([1, 2, 0, 3])
    return tile.reshape([tile.shape[0], tile.shape[1], tile.shape[2] * V])


@gluon.jit(do_not_specialize=SIZES)
def march_kernel(
    x_ptr, wgt_ptr, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out, segments, col_blocks, rows, first, last,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    CHANNELS, KH: gl.constexpr, KW: gl.constexpr,
    CONV_STRIDE_H: gl.constexpr, CONV_STRIDE_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    DIL_H: gl.constexpr, DIL_W: gl.constexpr,
    TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
    LEFT: gl.constexpr, WINDOW: gl.constexpr, DRAIN: gl.constexpr,
    X_VECTOR: gl.constexpr, Y_VECTOR: gl.constexpr, INDEX_64: gl.constexpr,
    BLOCK_V: gl.constexpr, BLOCK_C: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of BLOCK_M lanes of y = conv(x), or, TRANSPOSED, of dx (y) from dy (x).

    Per channel and step M = lanes, N = 8 output columns, K = BLOCK_K input columns, of which WINDOW count, the first
    LEFT before the block. A step has IN rows, adds each to the accumulators of the output rows that it meets, and
    stores the OUT rows that are complete: one of the two is the convolution's stride. Steps `first` to `last` have
    input rows, and DRAIN more only store. X_VECTOR, Y_VECTOR: powers of two up to 8 that divide CHANNELS and all
    strides but the channels', which is 1 unless they are.
    """
    IN: gl.constexpr = 1 if TRANSPOSED else CONV_STRIDE_H
    OUT: gl.constexpr = CONV_STRIDE_H if TRANSPOSED else 1
    WARM: gl.constexpr = (KH - 1) // CONV_STRIDE_H
    # Row i of a step meets accumulator a, the row that is complete after a further a / OUT steps, through tap
    # OLDEST + a * NEXT + i.
    OLDEST: gl.constexpr = 0 if TRANSPOSED else WARM * IN
    NEXT: gl.constexpr = 1 if TRANSPOSED else -IN
    BLOCK_W: gl.constexpr = 8
    ACROSS: gl.constexpr = BLOCK_C // BLOCK_V
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [ACROSS, gl.num_warps() // ACROSS, 1], [1, 16, 8])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    MATRIX: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    FRAGMENT: gl.constexpr = gl.to_linear_layout(LEFT_OPERAND, [ACROSS, BLOCK_M, BLOCK_K])
    LAYOUTS: gl.constexpr = tile_layouts(FRAGMENT, BLOCK_V, X_VECTOR, False)
    HELD: gl.constexpr = LAYOUTS[0]
    COPIED: gl.constexpr = LAYOUTS[1]
    SHARED: gl.constexpr = LAYOUTS[2]
    RESULT: gl.constexpr = result_layout([BLOCK_M, BLOCK_W, BLOCK_C], Y_VECTOR, gl.num_warps())
    ASYNC: gl.constexpr = X_VECTOR > 1
    gl.static_assert(STAGES >= 2, "copies go ahead of what is read")
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    stride_x_n, stride_x_h, stride_x_w = strides(stride_x_n, stride_x_h, stride_x_w, X_VECTOR)
    stride_y_n, stride_y_h, stride_y_w = strides(stride_y_n, stride_y_h, stride_y_w, Y_VECTOR)
    c_blocks = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = gl.program_id(0)
    first_channel = pid % c_blocks * BLOCK_C
    first_lane = index(pid // c_blocks, INDEX_64) * BLOCK_M

    # Matrices, by channel and row.
    c = first_channel + along(ACROSS, MATRIX, 0) * BLOCK_V
    k = spread(along(BLOCK_K, MATRIX, 1), 1)
    j = spread(along(BLOCK_W, MATRIX, 2), 2)
    if TRANSPOSED:
        d = PAD_W + LEFT * CONV_STRIDE_W + j - k * CONV_STRIDE_W
    else:
        d = k - (j * CONV_STRIDE_W + (LEFT - PAD_W))
    tap = below(d, KW * DIL_W) & (d % DIL_W == 0)
    tap_at = d // DIL_W * stride_wgt_w
    matrices = ()
    for v in gl.static_range(BLOCK_V):
        at = spread(index(c + v, INDEX_64) * stride_wgt_o, 0) + tap_at
        for r in gl.static_range(KH):
            mask = tap & spread(c + v < CHANNELS, 0)
            matrices = matrices + (gl.load(wgt_ptr + at + r * stride_wgt_h, mask=mask, other=0.0),)

    # Rows on their way in.
    m = first_lane + along(BLOCK_M, COPIED, 0)
    image, row_class, segment, block = lane(m, segments, col_blocks, DIL_H)
    in_row = row_class + segment * (rows * OUT * DIL_H) - PAD_H % OUT
    if TRANSPOSED:
        in_row = (in_row + PAD_H) // CONV_STRIDE_H - WARM * DIL_H
        in_col = block * (BLOCK_W // CONV_STRIDE_W) - LEFT
    else:
        in_row = in_row * CONV_STRIDE_H - PAD_H
        in_col = block * (BLOCK_W * CONV_STRIDE_W) - LEFT
    in_row += first * (IN * DIL_H)
    c = first_channel + along(BLOCK_C, COPIED, 2)
    k = along(BLOCK_K, COPIED, 1)
    w = spread(in_col, 0) + spread(k, 1)
    in_map = below(w, w_in) & spread(k < WINDOW, 1) & spread(c < CHANNELS // X_VECTOR * X_VECTOR, 2)
    live = image < batch
    at = image * stride_x_n + in_row * stride_x_h + in_col * stride_x_w
    at = spread(at, 0) + spread(index(k, INDEX_64) * stride_x_w, 1)
    x_at = x_ptr + (at + spread(index(c, INDEX_64) * stride_x_c, 2))
    x_step = index(DIL_H, INDEX_64) * stride_x_h

    # And out.
    m = first_lane + along(BLOCK_M, RESULT, 0)
    image, row_class, segment, block = lane(m, segments, col_blocks, DIL_H)
    out_row = row_class + segment * (rows * OUT * DIL_H) - PAD_H % OUT
    c = first_channel + along(BLOCK_C, RESULT, 2)
    out_col = spread(block * BLOCK_W, 0) + spread(along(BLOCK_W, RESULT, 1), 1)
    in_y = (out_col < w_out) & spread(c < CHANNELS // Y_VECTOR * Y_VECTOR, 2)
    in_batch = image < batch
    at = image * stride_y_n + out_row * stride_y_h + block * BLOCK_W * stride_y_w
    at = spread(at, 0) + spread(index(along(BLOCK_W, RESULT, 1), INDEX_64) * stride_y_w, 1)
    y_at = y_ptr + (at + spread(index(c, INDEX_64) * stride_y_c, 2))
    y_step = index(DIL_H, INDEX_64) * stride_y_h

    zero = gl.zeros([ACROSS, BLOCK_M, BLOCK_W], gl.float32, layout=MMA)
    starts = ()
    for v in gl.static_range(BLOCK_V):
        if HAS_BIAS:
            c = first_channel + along(ACROSS, MMA, 0) * BLOCK_V + v
            bias = gl.load(bias_ptr + c, mask=c < CHANNELS, other=0.0).to(gl.float32)
            starts = starts + (zero + spread(bias, 0),)
        else:
            starts = starts + (zero,)
    acc = ()
    for _ in gl.static_range(OUT * (WARM + 1)):
        acc = acc + starts

    buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K, BLOCK_C], SHARED)
    count = (last - first) * IN
    for s in gl.static_range(STAGES - 1):
        copy(buffers.index(s), x_at + s * x_step, in_row + s * DIL_H, h_in, live & (s < count), in_map, ASYNC)
        async_copy.commit_group()
    for t in range(first, last):
        for i in gl.static_range(IN):
            n = (t - first) * IN + i
            async_copy.wait_group(STAGES - 2)
            ahead = n + STAGES - 1
            due = live & (ahead < count)
            row = in_row + ahead * DIL_H
            copy(buffers.index(ahead % STAGES), x_at + ahead * x_step, row, h_in, due, in_map, ASYNC)
            async_copy.commit_group()
            x = channels_apart(buffers.index(n % STAGES).load(HELD), BLOCK_V, False, LEFT_OPERAND)
            met = ()
            for a in gl.static_range(OUT * (WARM + 1)):
                for v in gl.static_range(BLOCK_V):
                    product = acc[a * BLOCK_V + v]
                    if OLDEST + a * NEXT + i < KH:
                        matrix = matrices[v * KH + OLDEST + a * NEXT + i]
                        product = mma_v2(x[v], matrix, product)
                    met = met + (product,)
            acc = met
        for i in gl.static_range(OUT):
            step = (t - WARM) * OUT + i
            total = channels_together(acc[i * BLOCK_V : (i + 1) * BLOCK_V], BLOCK_V)
            stored = spread(in_batch & (t >= WARM) & below(out_row + step * DIL_H, h_out), 0) & in_y
            finish(y_at + step * y_step, total, stored, y_ptr, residual_ptr, kept_ptr, ACTIVATION, RESULT)
        acc = acc[OUT * BLOCK_V :]
        for _ in gl.static_range(OUT):
            acc = acc + starts
    async_copy.wait_group(0)
    for a in gl.static_range(DRAIN * OUT):
        step = (last - WARM) * OUT + a
        total = channels_together(acc[a * BLOCK_V : (a + 1) * BLOCK_V], BLOCK_V)
        stored = spread(in_batch & below(out_row + step * DIL_H, h_out), 0) & in_y
        finish(y_at + step * y_step, total, stored, y_ptr, residual_ptr, kept_ptr, ACTIVATION, RESULT)


@gluon.jit(do_not_specialize=(*SIZES[:-2], "blocks"))
def wgrad_kernel(
    dy_ptr, x_ptr, dw_ptr,
    batch, h_in, w_in, h_out, w_out, segments, col_blocks, rows, blocks,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_dw_split, stride_dw_o: gl.constexpr,
    stride_dw_h: gl.constexpr, stride_dw_w: gl.constexpr,
    CHANNELS, KH: gl.constexpr, KW: gl.constexpr,
    CONV_STRIDE_H: gl.constexpr, CONV_STRIDE_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    DIL_H: gl.constexpr, DIL_W: gl.constexpr,
    TAPS: gl.constexpr, UNROLL: gl.constexpr, LEFT: gl.constexpr, WINDOW: gl.constexpr,
    X_VECTOR: gl.constexpr, DY_VECTOR: gl.constexpr, INDEX_64: gl.constexpr,
    BLOCK_V: gl.constexpr, BLOCK_C: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: the sums of dw for BLOCK_C channels and TAPS filter rows over `blocks` blocks of lanes.

    Per channel and filter row M = BLOCK_K input columns, of which WINDOW count, N = 8 output columns, K = lanes and
    steps: the accumulators are the gradients of the banded matrices, and their diagonals' sums those of the filter. A
    step has one row of dy and CONV_STRIDE_H of x, and carries the last rows of dy. dw: [splits, channels, KH, KW] by
    strides, the filter gradient itself or partial sums.
    """
    WARM: gl.constexpr = (TAPS - 1) // CONV_STRIDE_H
    T_BLOCKS: gl.constexpr = (KH + TAPS - 1) // TAPS
    BLOCK_W: gl.constexpr = 8
    ACROSS: gl.constexpr = BLOCK_C // BLOCK_V
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [ACROSS, 1, 1], [1, 16, 8])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT_OPERAND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    X_FRAGMENT: gl.constexpr = gl.to_linear_layout(LEFT_OPERAND, [ACROSS, BLOCK_K, BLOCK_M])
    DY_FRAGMENT: gl.constexpr = gl.to_linear_layout(RIGHT_OPERAND, [ACROSS, BLOCK_M, BLOCK_W])
    X_LAYOUTS: gl.constexpr = tile_layouts(X_FRAGMENT, BLOCK_V, X_VECTOR, True)
    DY_LAYOUTS: gl.constexpr = tile_layouts(DY_FRAGMENT, BLOCK_V, DY_VECTOR, False)
    X_HELD: gl.constexpr = X_LAYOUTS[0]
    X_COPIED: gl.constexpr = X_LAYOUTS[1]
    X_SHARED: gl.constexpr = X_LAYOUTS[2]
    DY_HELD: gl.constexpr = DY_LAYOUTS[0]
    DY_COPIED: gl.constexpr = DY_LAYOUTS[1]
    DY_SHARED: gl.constexpr = DY_LAYOUTS[2]
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    stride_dy_n, stride_dy_h, stride_dy_w = strides(stride_dy_n, stride_dy_h, stride_dy_w, DY_VECTOR)
    stride_x_n, stride_x_h, stride_x_w = strides(stride_x_n, stride_x_h, stride_x_w, X_VECTOR)
    c_blocks = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = gl.program_id(0)
    first_channel = pid % c_blocks * BLOCK_C
    first_tap = pid // c_blocks % T_BLOCKS * TAPS
    split = index(pid // (c_blocks * T_BLOCKS), INDEX_64)

    x_c = first_channel + along(BLOCK_C, X_COPIED, 2)
    x_k = along(BLOCK_K, X_COPIED, 1)
    x_known = spread(x_k < WINDOW, 1) & spread(x_c < CHANNELS // X_VECTOR * X_VECTOR, 2)
    x_at = spread(index(x_k, INDEX_64) * stride_x_w, 1) + spread(index(x_c, INDEX_64) * stride_x_c, 2)
    dy_c = first_channel + along(BLOCK_C, DY_COPIED, 2)
    dy_j = along(BLOCK_W, DY_COPIED, 1)
    dy_known = spread(dy_c < CHANNELS // DY_VECTOR * DY_VECTOR, 2)
    dy_at = spread(index(dy_j, INDEX_64) * stride_dy_w, 1) + spread(index(dy_c, INDEX_64) * stride_dy_c, 2)
    x_step = index(DIL_H, INDEX_64) * stride_x_h
    dy_step = index(DIL_H, INDEX_64) * stride_dy_h

    # Steps whose rows of x all lie below the map are left out where every lane starts at its top.
    above = PAD_H - first_tap * DIL_H
    last = gl.where(segments == 1, (h_in + above + CONV_STRIDE_H * DIL_H - 1) // (CONV_STRIDE_H * DIL_H), rows + WARM)
    last = gl.minimum(last, rows + WARM)
    x_buffers = gl.allocate_shared_memory(dtype, [STAGES * CONV_STRIDE_H, BLOCK_M, BLOCK_K, BLOCK_C], X_SHARED)
    dy_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_W, BLOCK_C], DY_SHARED)
    acc = ()
    for _ in gl.static_range(TAPS * BLOCK_V):
        acc = acc + (gl.zeros([ACROSS, BLOCK_K, BLOCK_W], gl.float32, layout=MMA),)
    for b in range(blocks):
        first_lane = (split * blocks + b) * BLOCK_M
        image, row_class, segment, block = lane(first_lane + along(BLOCK_M, X_COPIED, 0), segments, col_blocks, DIL_H)
        x_row = (row_class + segment * (rows * DIL_H)) * CONV_STRIDE_H - above
        x_col = block * (BLOCK_W * CONV_STRIDE_W) - LEFT
        x_live = image < batch
        w = spread(x_col, 0) + spread(x_k, 1)
        in_x = below(w, w_in) & x_known
        at = image * stride_x_n + x_row * stride_x_h + x_col * stride_x_w
        x_lane = x_ptr + (spread(at, 0) + x_at)
        image, row_class, segment, block = lane(first_lane + along(BLOCK_M, DY_COPIED, 0), segments, col_blocks, DIL_H)
        dy_row = row_class + segment * (rows * DIL_H)
        dy_col = block * BLOCK_W
        dy_live = image < batch
        in_dy = (spread(dy_col, 0) + spread(dy_j, 1) < w_out) & dy_known
        at = image * stride_dy_n + dy_row * stride_dy_h + dy_col * stride_dy_w
        dy_lane = dy_ptr + (spread(at, 0) + dy_at)

        none = ()
        for _ in gl.static_range(BLOCK_V):
            none = none + (gl.zeros([ACROSS, BLOCK_M, BLOCK_W], dtype, layout=RIGHT_OPERAND),)
        dy = ()
        for _ in gl.static_range(WARM):
            dy = dy + packed(none, BLOCK_V)
        for s in gl.static_range(STAGES - 1):
            copy_step(
                s, s, dy_buffers, dy_lane, dy_step, dy_row, h_out, dy_live, rows, in_dy, DY_VECTOR > 1,
                x_buffers, x_lane, x_step, x_row, h_in, x_live, last, in_x, X_VECTOR > 1, CONV_STRIDE_H, DIL_H,
            )  # fmt: skip
        for start in range(0, last, UNROLL):
            for u in gl.static_range(UNROLL):
                t = start + u
                async_copy.wait_group(STAGES - 2)
                ahead = t + STAGES - 1
                copy_step(
                    ahead % STAGES, ahead, dy_buffers, dy_lane, dy_step, dy_row, h_out, dy_live, rows, in_dy,
                    DY_VECTOR > 1,
                    x_buffers, x_lane, x_step, x_row, h_in, x_live, last, in_x, X_VECTOR > 1, CONV_STRIDE_H, DIL_H,
                )  # fmt: skip
                slot = t % STAGES
                row = channels_apart(dy_buffers.index(slot).load(DY_HELD), BLOCK_V, False, RIGHT_OPERAND)
                dy = packed(row, BLOCK_V) + dy
                met = ()
                x = ()
                for r in gl.static_range(TAPS):
                    if r < CONV_STRIDE_H:
                        x_row_tile = x_buffers.index(slot * CONV_STRIDE_H + r).load(X_HELD)
                        x = x + channels_apart(x_row_tile, BLOCK_V, True, LEFT_OPERAND)
                    for v in gl.static_range(BLOCK_V):
                        left = x[r % CONV_STRIDE_H * BLOCK_V + v]
                        right = unpacked(dy[r // CONV_STRIDE_H * BLOCK_V + v], dtype, RIGHT_OPERAND)
                        met = met + (mma_v2(left, right, acc[r * BLOCK_V + v]),)
                acc = met
                dy = dy[: WARM * BLOCK_V]
        async_copy.wait_group(0)  # and Triton has all threads wait, before the next block's copies

    at = along(BLOCK_W, MMA, 2) * CONV_STRIDE_W + (LEFT - PAD_W)
    store_diagonals(
        acc, at, dw_ptr + split * stride_dw_split, first_channel, first_tap, stride_dw_o, stride_dw_h, stride_dw_w,
        CHANNELS, KH, KW, DIL_W, TAPS, BLOCK_V, 1, INDEX_64, MMA,
    )  # fmt: skip
