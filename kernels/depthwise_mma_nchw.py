"""Depthwise convolution of contiguous maps on matrix units, operands going from memory to fragments untouched.

The products are depthwise_mma's: per channel, lanes of a row times a banded matrix T_r[k, j] = w[r, s] where input
column k meets output column j through tap s, and a march down the rows. Here neighbouring columns lie together, and
are what a register of a fragment holds: a thread loads its columns of a lane's window, rows ahead of the products, and
multiplies; what windows share the first-level cache has. wgrad's products sum over lanes, so its fragments are
those of fprop transposed, eight lanes by eight columns at a time, by PTX's movmatrix.
Source: own derivation, no code adapted; the fragments are those of the PTX ISA's mma.m16n8k16 and movmatrix.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .fragments import (
    SIZES,
    along,
    axes,
    below,
    column_of,
    finish,
    index,
    lane,
    spread,
    store_diagonals,
    strides,
    unpacked,
)


@triton.constexpr_function
def unit_of(vector):
    """How many columns a word has: what registers hold while it is on its way."""
    return 2 if vector > 1 else 1


@triton.constexpr_function
def rows_layout(channels, lanes, columns, vector, warps):
    """Of the words of a [channels, lanes, columns] tile whose pairs, in slots, are an operand's; warps: of lanes.

    Of each 8 slots of an operand a thread has two, and in each of those two columns of `vector` that lie together.
    """
    unit = unit_of(vector)
    shape = [channels, lanes, columns // unit]
    c, m, k = axes(*shape)
    mine = (max(vector, 2) // unit).bit_length() - 1
    shared = 4 + warps.bit_length() - 1
    registers = k[:mine] + k[mine + 2 :] + m[3:4] + m[shared:]
    return gl.DistributedLinearLayout(registers, k[mine : mine + 2] + m[:3], m[4:shared] + c, [], shape)


@gluon.jit
def words_of(pointer, VECTOR: gl.constexpr):
    """A pointer to words."""
    return pointer.to(gl.pointer_type(gl.uint32)) if VECTOR > 1 else pointer


@gluon.jit
def units(n, c, h, w, VECTOR: gl.constexpr):
    """Strides, which VECTOR divides, in words, so that the compiler sees it."""
    PART: gl.constexpr = VECTOR // unit_of(VECTOR)
    return n // VECTOR * PART, c // VECTOR * PART, h // VECTOR * PART, 1 if VECTOR > 1 else w


@gluon.jit
def lane_limit(row, height, count, live, DIL_H: gl.constexpr):
    """The row that a lane's rows, `count` from `row` on, end before: at the map's end; 0 if it has none."""
    limit = gl.minimum(height, row + count * DIL_H)
    return gl.where(live & (limit > 0), limit, 0)


@gluon.jit
def rows_of(
    pointer, at, k, known, first_lane, above, count, batch, height, width, segments, col_blocks, rows,
    stride_n, stride_h, stride_w, STRIDE_H: gl.constexpr, DIL_H: gl.constexpr,
    FRESH: gl.constexpr, LEFT: gl.constexpr, BLOCK_M: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """(pointers, first row, `lane_limit`, which words are on the map) of a block's lanes, which march down a map from
    STRIDE_H times their segment's first row less `above` on, at words k from LEFT before FRESH times their block on.
    """
    image, row_class, segment, block = lane(first_lane + along(BLOCK_M, HELD, 1), segments, col_blocks, DIL_H)
    row = (row_class + segment * (rows * DIL_H)) * STRIDE_H - above
    col = block * FRESH - LEFT
    w = spread(col, 1) + spread(k, 2)
    # Not by `below`: the compiler sees that words of one load are in or out together.
    inside = (w >= 0) & (w < width) & known
    place = image * stride_n + row * stride_h + col * stride_w
    return pointer + (spread(place, 1) + at), row, lane_limit(row, height, count, image < batch, DIL_H), inside


@gluon.jit
def load_row(n, at, step, row, limit, inside, DIL_H: gl.constexpr):
    """The words of row n of each lane, from `row` on: zeros where it has no such row."""
    return gl.load(at + n * step, mask=spread(below(row + n * DIL_H, limit), 1) & inside, other=0)


@gluon.jit
def load_step(
    step, dy_lane, dy_step, dy_row, dy_limit, in_dy, x_lane, x_step, x_row, x_limit, in_x,
    CONV_STRIDE_H: gl.constexpr, DIL_H: gl.constexpr,
):  # fmt: skip
    """What a step of wgrad has: one row of dy, and CONV_STRIDE_H of x."""
    x = ()
    for i in gl.static_range(CONV_STRIDE_H):
        x = x + (load_row(step * CONV_STRIDE_H + i, x_lane, x_step, x_row, x_limit, in_x, DIL_H),)
    return load_row(step, dy_lane, dy_step, dy_row, dy_limit, in_dy, DIL_H), x


@gluon.jit
def pairs_of(words, VECTOR: gl.constexpr):
    """Words of columns as pairs of slots (fragments.py)."""
    if VECTOR > 1:
        C: gl.constexpr = words.shape[0]
        M: gl.constexpr = words.shape[1]
        K: gl.constexpr = words.shape[2]
        words = words.reshape([C, M, 2 * K // (4 * VECTOR), 4, VECTOR // 2])
        return words.permute([0, 1, 2, 4, 3]).reshape([C, M, K])
    else:
        words = words.reshape([words.shape[0], words.shape[1], words.shape[2] // 2, 2])
        low, high = gl.split(words.to(gl.uint16, bitcast=True).to(gl.uint32))
        return low | high << 16


@gluon.jit
def left_operand(pairs, dtype: gl.constexpr, OPERAND: gl.constexpr):
    """A left operand [.., M, K] of its pairs along K."""
    low = pairs.to(gl.uint16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(gl.uint16).to(dtype, bitcast=True)
    tile = gl.join(low, high).reshape([pairs.shape[0], pairs.shape[1], 2 * pairs.shape[2]])
    return gl.convert_layout(tile, OPERAND, assert_trivial=True)


@gluon.jit
def transposed(pairs):
    """Of pairs of slots, [channels, lanes, slots // 2], those of lanes, [channels, slots, lanes // 2]."""
    C: gl.constexpr = pairs.shape[0]
    M: gl.constexpr = pairs.shape[1]
    K: gl.constexpr = 2 * pairs.shape[2]
    move: gl.constexpr = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    pairs = gl.inline_asm_elementwise(move, "=r,r", [pairs], gl.uint32, True, 1)
    # In each matrix of 8 x 8 what was lane g, slots 2 t and 2 t + 1 is slot g, lanes 2 t and 2 t + 1.
    return pairs.reshape([C, M // 8, 8, K // 8, 4]).permute([0, 3, 2, 1, 4]).reshape([C, K, M // 2])


@gluon.jit
def matrices_of(
    wgt_ptr, first_channel, stride_wgt_o, stride_wgt_h, stride_wgt_w,
    CHANNELS, KH: gl.constexpr, KW: gl.constexpr, CONV_STRIDE_W: gl.constexpr, PAD_W: gl.constexpr, DIL_W: gl.constexpr,
    TRANSPOSED: gl.constexpr, LEFT: gl.constexpr, VECTOR: gl.constexpr, INDEX_64: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_K: gl.constexpr, MATRIX: gl.constexpr,
):  # fmt: skip
    """The banded matrices by filter row: [channels, slots of the window, output columns]."""
    c = first_channel + along(BLOCK_C, MATRIX, 0)
    k = spread(column_of(along(BLOCK_K, MATRIX, 1), VECTOR), 1)
    j = spread(along(BLOCK_W, MATRIX, 2), 2)
    if TRANSPOSED:
        d = PAD_W + LEFT * CONV_STRIDE_W + j - k * CONV_STRIDE_W
    else:
        d = k - (j * CONV_STRIDE_W + (LEFT - PAD_W))
    tap = below(d, KW * DIL_W) & (d % DIL_W == 0) & spread(c < CHANNELS, 0)
    at = spread(index(c, INDEX_64) * stride_wgt_o, 0) + d // DIL_W * stride_wgt_w
    matrices = ()
    for r in gl.static_range(KH):
        matrices = matrices + (gl.load(wgt_ptr + at + r * stride_wgt_h, mask=tap, other=0.0),)
    return matrices


@gluon.jit(do_not_specialize=SIZES)
def march_kernel(
    x_ptr, wgt_ptr, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out, segments, col_blocks, rows, first, last,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    CHANNELS, MULTIPLIER: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    CONV_STRIDE_H: gl.constexpr, CONV_STRIDE_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    DIL_H: gl.constexpr, DIL_W: gl.constexpr,
    TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
    LEFT: gl.constexpr, WINDOW: gl.constexpr, DRAIN: gl.constexpr,
    X_VECTOR: gl.constexpr, Y_VECTOR: gl.constexpr, INDEX_64: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_K: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of BLOCK_M lanes of y = conv(x), or, TRANSPOSED, of dx (y) from dy (x).

    Per channel and step M = lanes, N = BLOCK_W output columns, K = BLOCK_K input columns, of which WINDOW count, the
    first LEFT before the block. A step has IN rows, adds each to the accumulators of the output rows that it meets, and
    stores the OUT rows that are complete: one of the two is the convolution's stride. Steps `first` to `last`, UNROLL
    a turn, have input rows, loaded a turn ahead, and DRAIN more only store. X_VECTOR, Y_VECTOR: powers of two that
    divide the maps' widths, the strides of images, channels and rows and where windows begin; 1 where columns do not
    lie together.
    """
    IN: gl.constexpr = 1 if TRANSPOSED else CONV_STRIDE_H
    OUT: gl.constexpr = CONV_STRIDE_H if TRANSPOSED else 1
    WARM: gl.constexpr = (KH - 1) // CONV_STRIDE_H
    # Row i of a step meets accumulator a, the row that is complete after a further a / OUT steps, through tap
    # OLDEST + a * NEXT + i.
    OLDEST: gl.constexpr = 0 if TRANSPOSED else WARM * IN
    NEXT: gl.constexpr = 1 if TRANSPOSED else -IN
    ACROSS: gl.constexpr = gl.num_warps() // BLOCK_C
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BLOCK_C, ACROSS, 1], [1, 16, 8])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    MATRIX: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    HELD: gl.constexpr = rows_layout(BLOCK_C, BLOCK_M, BLOCK_K, X_VECTOR, ACROSS)
    UNIT: gl.constexpr = unit_of(X_VECTOR)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    stride_x_n, stride_x_c, stride_x_h, stride_x_w = units(stride_x_n, stride_x_c, stride_x_h, stride_x_w, X_VECTOR)
    stride_y_n, stride_y_c, stride_y_h = strides(stride_y_n, stride_y_c, stride_y_h, Y_VECTOR)
    w_in = w_in // X_VECTOR * (X_VECTOR // UNIT)
    w_out = w_out // Y_VECTOR * Y_VECTOR
    c_blocks = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = gl.program_id(0)
    first_channel = pid % c_blocks * BLOCK_C
    first_lane = index(pid // c_blocks, INDEX_64) * BLOCK_M

    matrices = matrices_of(
        wgt_ptr, first_channel, stride_wgt_o, stride_wgt_h, stride_wgt_w, CHANNELS, KH, KW, CONV_STRIDE_W, PAD_W, DIL_W,
        TRANSPOSED, LEFT, X_VECTOR, INDEX_64, BLOCK_C, BLOCK_W, BLOCK_K, MATRIX,
    )  # fmt: skip

    # Rows on their way in.
    image, row_class, segment, block = lane(first_lane + along(BLOCK_M, HELD, 1), segments, col_blocks, DIL_H)
    in_row = row_class + segment * (rows * OUT * DIL_H) - PAD_H % OUT
    if TRANSPOSED:
        in_row = (in_row + PAD_H) // CONV_STRIDE_H - WARM * DIL_H
        in_col = block * (BLOCK_W // CONV_STRIDE_W // UNIT) - LEFT // UNIT
    else:
        in_row = in_row * CONV_STRIDE_H - PAD_H
        in_col = block * (BLOCK_W * CONV_STRIDE_W // UNIT) - LEFT // UNIT
    in_row += first * (IN * DIL_H)
    c = first_channel + along(BLOCK_C, HELD, 0)
    k = along(BLOCK_K // UNIT, HELD, 2)
    w = spread(in_col, 1) + spread(k, 2)
    # Two comparisons, not `below`: the compiler sees that words of one load are in or out together.
    in_map = (w >= 0) & (w < w_in) & spread(k < WINDOW // UNIT, 2) & spread(c < CHANNELS, 0)
    limit = lane_limit(in_row, h_in, (last - first) * IN, image < batch, DIL_H)
    at = image * stride_x_n + in_row * stride_x_h + in_col * stride_x_w
    at = spread(at, 1) + spread(index(k, INDEX_64) * stride_x_w, 2)
    x_at = words_of(x_ptr, X_VECTOR) + (at + spread(index(c // MULTIPLIER, INDEX_64) * stride_x_c, 0))
    x_step = index(DIL_H, INDEX_64) * stride_x_h

    # And out.
    image, row_class, segment, block = lane(first_lane + along(BLOCK_M, MMA, 1), segments, col_blocks, DIL_H)
    out_row = row_class + segment * (rows * OUT * DIL_H) - PAD_H % OUT
    c = first_channel + along(BLOCK_C, MMA, 0)
    j = along(BLOCK_W, MMA, 2)
    out_col = spread(block * BLOCK_W, 1) + spread(j, 2)
    in_y = (out_col < w_out) & spread(c < CHANNELS, 0)
    above = gl.minimum(out_row, 0)  # rows of a stride's padding
    stored = gl.maximum(lane_limit(out_row, h_out, rows * OUT, image < batch, DIL_H) - (out_row - above), 0)
    at = image * stride_y_n + out_row * stride_y_h + block * BLOCK_W * stride_y_w
    at = spread(at, 1) + spread(index(j, INDEX_64) * stride_y_w, 2)
    y_at = y_ptr + (at + spread(index(c, INDEX_64) * stride_y_c, 0))
    y_step = index(DIL_H, INDEX_64) * stride_y_h

    start = gl.zeros([BLOCK_C, BLOCK_M, BLOCK_W], gl.float32, layout=MMA)
    if HAS_BIAS:
        start += spread(gl.load(bias_ptr + c, mask=c < CHANNELS, other=0.0).to(gl.float32), 0)
    acc = ()
    for _ in gl.static_range(OUT * (WARM + 1)):
        acc = acc + (start,)

    ahead = ()
    for n in gl.static_range(UNROLL * IN):
        ahead = ahead + (load_row(n, x_at, x_step, in_row, limit, in_map, DIL_H),)
    for turn in range(first, last, UNROLL):
        for u in gl.static_range(UNROLL):
            for i in gl.static_range(IN):
                x = left_operand(pairs_of(ahead[0], X_VECTOR), dtype, LEFT_OPERAND)
                due = (turn - first + u + UNROLL) * IN + i
                ahead = ahead[1:] + (load_row(due, x_at, x_step, in_row, limit, in_map, DIL_H),)
                met = ()
                for a in gl.static_range(OUT * (WARM + 1)):
                    product = acc[a]
                    if OLDEST + a * NEXT + i < KH:
                        product = mma_v2(x, matrices[OLDEST + a * NEXT + i], product)
                    met = met + (product,)
                acc = met
            for i in gl.static_range(OUT):
                step = (turn + u - WARM) * OUT + i
                mask = spread(below(above + step * DIL_H, stored), 1) & in_y
                finish(y_at + step * y_step, acc[i], mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION, MMA)
            acc = acc[OUT:]
            for _ in gl.static_range(OUT):
                acc = acc + (start,)
    done = first + (last - first + UNROLL - 1) // UNROLL * UNROLL
    for a in gl.static_range(DRAIN * OUT):
        step = (done - WARM) * OUT + a
        mask = spread(below(above + step * DIL_H, stored), 1) & in_y
        finish(y_at + step * y_step, acc[a], mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION, MMA)


@gluon.jit(do_not_specialize=(*SIZES[:-2], "blocks"))
def wgrad_kernel(
    dy_ptr, x_ptr, dw_ptr,
    batch, h_in, w_in, h_out, w_out, segments, col_blocks, rows, blocks,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_dw_split, stride_dw_o: gl.constexpr,
    stride_dw_h: gl.constexpr, stride_dw_w: gl.constexpr,
    CHANNELS, MULTIPLIER: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    CONV_STRIDE_H: gl.constexpr, CONV_STRIDE_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    DIL_H: gl.constexpr, DIL_W: gl.constexpr,
    TAPS: gl.constexpr, LEFT: gl.constexpr, WINDOW: gl.constexpr,
    X_VECTOR: gl.constexpr, DY_VECTOR: gl.constexpr, INDEX_64: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_K: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """One program: sums of dw for BLOCK_C channels, a warp each, and TAPS filter rows, over `blocks` blocks of lanes.

    Per channel and filter row M = BLOCK_K input columns, of which WINDOW count, N = BLOCK_W output columns, K = lanes
    and steps: the accumulators are the gradients of the banded matrices, and their diagonals' sums those of the filter.
    A step has one row of dy and CONV_STRIDE_H of x, loaded UNROLL steps ahead, and carries the last rows of dy. dw:
    [splits, channels, KH, KW] by strides, the filter gradient itself or partial sums.
    """
    WARM: gl.constexpr = (TAPS - 1) // CONV_STRIDE_H
    T_BLOCKS: gl.constexpr = (KH + TAPS - 1) // TAPS
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BLOCK_C, 1, 1], [1, 16, 8])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT_OPERAND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    X_HELD: gl.constexpr = rows_layout(BLOCK_C, BLOCK_M, BLOCK_K, X_VECTOR, 1)
    DY_HELD: gl.constexpr = rows_layout(BLOCK_C, BLOCK_M, BLOCK_W, DY_VECTOR, 1)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    gl.static_assert(gl.num_warps() == BLOCK_C, "a warp has a channel")
    X_UNIT: gl.constexpr = unit_of(X_VECTOR)
    DY_UNIT: gl.constexpr = unit_of(DY_VECTOR)
    stride_x_n, stride_x_c, stride_x_h, stride_x_w = units(stride_x_n, stride_x_c, stride_x_h, stride_x_w, X_VECTOR)
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w = units(
        stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w, DY_VECTOR
    )
    w_in = w_in // X_VECTOR * (X_VECTOR // X_UNIT)
    w_out = w_out // DY_VECTOR * (DY_VECTOR // DY_UNIT)
    c_blocks = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = gl.program_id(0)
    first_channel = pid % c_blocks * BLOCK_C
    first_tap = pid // c_blocks % T_BLOCKS * TAPS
    split = index(pid // (c_blocks * T_BLOCKS), INDEX_64)

    x_c = first_channel + along(BLOCK_C, X_HELD, 0)
    x_k = along(BLOCK_K // X_UNIT, X_HELD, 2)
    x_known = spread(x_k < WINDOW // X_UNIT, 2) & spread(x_c < CHANNELS, 0)
    x_at = spread(index(x_k, INDEX_64) * stride_x_w, 2) + spread(index(x_c // MULTIPLIER, INDEX_64) * stride_x_c, 0)
    dy_c = first_channel + along(BLOCK_C, DY_HELD, 0)
    dy_j = along(BLOCK_W // DY_UNIT, DY_HELD, 2)
    dy_known = spread(dy_c < CHANNELS, 0)
    dy_at = spread(index(dy_j, INDEX_64) * stride_dy_w, 2) + spread(index(dy_c, INDEX_64) * stride_dy_c, 0)
    x_step = index(DIL_H, INDEX_64) * stride_x_h
    dy_step = index(DIL_H, INDEX_64) * stride_dy_h

    # Steps whose rows of x all lie below the map are left out where every lane starts at its top.
    above = PAD_H - first_tap * DIL_H
    last = gl.where(segments == 1, (h_in + above + CONV_STRIDE_H * DIL_H - 1) // (CONV_STRIDE_H * DIL_H), rows + WARM)
    last = gl.minimum(last, rows + WARM)
    acc = ()
    for _ in gl.static_range(TAPS):
        acc = acc + (gl.zeros([BLOCK_C, BLOCK_K, BLOCK_W], gl.float32, layout=MMA),)
    for b in range(blocks):
        first_lane = (split * blocks + b) * BLOCK_M
        x_lane, x_row, x_limit, in_x = rows_of(
            words_of(x_ptr, X_VECTOR), x_at, x_k, x_known, first_lane, above, last * CONV_STRIDE_H, batch, h_in, w_in,
            segments, col_blocks, rows, stride_x_n, stride_x_h, stride_x_w, CONV_STRIDE_H, DIL_H,
            BLOCK_W * CONV_STRIDE_W // X_UNIT, LEFT // X_UNIT, BLOCK_M, X_HELD,
        )  # fmt: skip
        dy_lane, dy_row, dy_limit, in_dy = rows_of(
            words_of(dy_ptr, DY_VECTOR), dy_at, dy_j, dy_known, first_lane, 0, rows, batch, h_out, w_out,
            segments, col_blocks, rows, stride_dy_n, stride_dy_h, stride_dy_w, 1, DIL_H,
            BLOCK_W // DY_UNIT, 0, BLOCK_M, DY_HELD,
        )  # fmt: skip

        dy_ahead = ()
        x_ahead = ()
        for n in gl.static_range(UNROLL):
            step = load_step(
                n, dy_lane, dy_step, dy_row, dy_limit, in_dy, x_lane, x_step, x_row, x_limit, in_x,
                CONV_STRIDE_H, DIL_H,
            )  # fmt: skip
            dy_ahead = dy_ahead + (step[0],)
            x_ahead = x_ahead + step[1]
        none = gl.zeros_like(transposed(pairs_of(dy_ahead[0], DY_VECTOR)))
        dy = ()
        for _ in gl.static_range(WARM):
            dy = dy + (none,)
        for turn in range(0, last, UNROLL):
            for u in gl.static_range(UNROLL):
                dy = (transposed(pairs_of(dy_ahead[0], DY_VECTOR)),) + dy
                x = ()
                for i in gl.static_range(CONV_STRIDE_H):
                    pairs = transposed(pairs_of(x_ahead[i], X_VECTOR))
                    x = x + (left_operand(pairs, dtype, LEFT_OPERAND),)
                step = load_step(
                    turn + u + UNROLL, dy_lane, dy_step, dy_row, dy_limit, in_dy,
                    x_lane, x_step, x_row, x_limit, in_x, CONV_STRIDE_H, DIL_H,
                )  # fmt: skip
                dy_ahead = dy_ahead[1:] + (step[0],)
                x_ahead = x_ahead[CONV_STRIDE_H:] + step[1]
                met = ()
                for r in gl.static_range(TAPS):
                    right = unpacked(dy[r // CONV_STRIDE_H].permute([0, 2, 1]), dtype, RIGHT_OPERAND)
                    met = met + (mma_v2(x[r % CONV_STRIDE_H], right, acc[r]),)
                acc = met
                dy = dy[:WARM]

    at = column_of(along(BLOCK_W, MMA, 2), DY_VECTOR) * CONV_STRIDE_W + (LEFT - PAD_W)
    store_diagonals(
        acc, at, dw_ptr + split * stride_dw_split, first_channel, first_tap, stride_dw_o, stride_dw_h, stride_dw_w,
        CHANNELS, KH, KW, DIL_W, TAPS, 1, X_VECTOR, INDEX_64, MMA,
    )  # fmt: skip


@gluon.jit(do_not_specialize=(*SIZES, "blocks"))
def backward_kernel(
    dy_ptr, x_ptr, wgt_ptr, dx_ptr, dw_ptr,
    batch, h_in, w_in, h_out, w_out, segments, col_blocks, rows, first, last, blocks,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_dx_n, stride_dx_c, stride_dx_h, stride_dx_w,
    stride_dw_split, stride_dw_o: gl.constexpr,
    stride_dw_h: gl.constexpr, stride_dw_w: gl.constexpr,
    CHANNELS, KH: gl.constexpr, KW: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    DIL_H: gl.constexpr, DIL_W: gl.constexpr,
    LEFT: gl.constexpr, WINDOW: gl.constexpr, FIRST: gl.constexpr, DRAIN: gl.constexpr,
    DY_VECTOR: gl.constexpr, X_VECTOR: gl.constexpr, DX_VECTOR: gl.constexpr, INDEX_64: gl.constexpr,
    BLOCK_C: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_K: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """One program: dx of `blocks` blocks of lanes for BLOCK_C channels, a warp each, and the sums of dw that they give;
    of convolutions without strides.

    The march of dgrad over rows of dy, whose windows, transposed, meet the rows of x of the same columns: a row of dy
    the last KH, of which a lane has `rows`. It begins at step FIRST, `first`. dw: as wgrad_kernel's.
    """
    WARM: gl.constexpr = KH - 1
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [BLOCK_C, 1, 1], [1, 16, 8])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT_OPERAND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    DY_HELD: gl.constexpr = rows_layout(BLOCK_C, BLOCK_M, BLOCK_K, DY_VECTOR, 1)
    X_HELD: gl.constexpr = rows_layout(BLOCK_C, BLOCK_M, BLOCK_W, X_VECTOR, 1)
    DY_UNIT: gl.constexpr = unit_of(DY_VECTOR)
    X_UNIT: gl.constexpr = unit_of(X_VECTOR)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    gl.static_assert(gl.num_warps() == BLOCK_C, "a warp has a channel")
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w = units(
        stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w, DY_VECTOR
    )
    stride_x_n, stride_x_c, stride_x_h, stride_x_w = units(stride_x_n, stride_x_c, stride_x_h, stride_x_w, X_VECTOR)
    stride_dx_n, stride_dx_c, stride_dx_h = strides(stride_dx_n, stride_dx_c, stride_dx_h, DX_VECTOR)
    dy_width = w_out // DY_VECTOR * (DY_VECTOR // DY_UNIT)
    x_width = w_in // X_VECTOR * (X_VECTOR // X_UNIT)
    dx_width = w_in // DX_VECTOR * DX_VECTOR
    c_blocks = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = gl.program_id(0)
    first_channel = pid % c_blocks * BLOCK_C
    split = index(pid // c_blocks, INDEX_64)
    matrices = matrices_of(
        wgt_ptr, first_channel, stride_wgt_o, stride_wgt_h, stride_wgt_w, CHANNELS, KH, KW, 1, PAD_W, DIL_W,
        True, LEFT, DY_VECTOR, INDEX_64, BLOCK_C, BLOCK_W, BLOCK_K, RIGHT_OPERAND,
    )  # fmt: skip

    dy_c = first_channel + along(BLOCK_C, DY_HELD, 0)
    dy_k = along(BLOCK_K // DY_UNIT, DY_HELD, 2)
    dy_known = spread(dy_k < WINDOW // DY_UNIT, 2) & spread(dy_c < CHANNELS, 0)
    dy_at = spread(index(dy_k, INDEX_64) * stride_dy_w, 2) + spread(index(dy_c, INDEX_64) * stride_dy_c, 0)
    x_c = first_channel + along(BLOCK_C, X_HELD, 0)
    x_j = along(BLOCK_W // X_UNIT, X_HELD, 2)
    x_known = spread(x_c < CHANNELS, 0)
    x_at = spread(index(x_j, INDEX_64) * stride_x_w, 2) + spread(index(x_c, INDEX_64) * stride_x_c, 0)
    dx_c = first_channel + along(BLOCK_C, MMA, 0)
    dx_j = along(BLOCK_W, MMA, 2)
    dx_known = spread(dx_c < CHANNELS, 0)
    dx_at = spread(index(dx_j, INDEX_64) * stride_dx_w, 2) + spread(index(dx_c, INDEX_64) * stride_dx_c, 0)
    dy_step = index(DIL_H, INDEX_64) * stride_dy_h
    x_step = index(DIL_H, INDEX_64) * stride_x_h
    dx_step = index(DIL_H, INDEX_64) * stride_dx_h

    zero = gl.zeros([BLOCK_C, BLOCK_M, BLOCK_W], gl.float32, layout=MMA)
    sums = ()
    for _ in gl.static_range(KH):
        sums = sums + (gl.zeros([BLOCK_C, BLOCK_K, BLOCK_W], gl.float32, layout=MMA),)
    for b in range(blocks):
        first_lane = (split * blocks + b) * BLOCK_M
        dy_lane, dy_row, dy_limit, in_dy = rows_of(
            words_of(dy_ptr, DY_VECTOR), dy_at, dy_k, dy_known, first_lane, (WARM - first) * DIL_H - PAD_H,
            last - first, batch, h_out, dy_width, segments, col_blocks, rows, stride_dy_n, stride_dy_h, stride_dy_w,
            1, DIL_H, BLOCK_W // DY_UNIT, LEFT // DY_UNIT, BLOCK_M, DY_HELD,
        )  # fmt: skip
        x_lane, x_row, x_limit, in_x = rows_of(
            words_of(x_ptr, X_VECTOR), x_at, x_j, x_known, first_lane, 0, rows, batch, h_in, x_width,
            segments, col_blocks, rows, stride_x_n, stride_x_h, stride_x_w, 1, DIL_H,
            BLOCK_W // X_UNIT, 0, BLOCK_M, X_HELD,
        )  # fmt: skip
        dx_lane, dx_row, dx_limit, in_dx = rows_of(
            dx_ptr, dx_at, dx_j, dx_known, first_lane, 0, rows, batch, h_in, dx_width,
            segments, col_blocks, rows, stride_dx_n, stride_dx_h, stride_dx_w, 1, DIL_H, BLOCK_W, 0, BLOCK_M, MMA,
        )  # fmt: skip
        stored = gl.maximum(dx_limit - dx_row, 0)

        dy_ahead = ()
        x_ahead = ()
        for n in gl.static_range(UNROLL):
            dy_ahead = dy_ahead + (load_row(n, dy_lane, dy_step, dy_row, dy_limit, in_dy, DIL_H),)
            x_ahead = x_ahead + (load_row(FIRST + n, x_lane, x_step, x_row, x_limit, in_x, DIL_H),)
        none = gl.zeros_like(transposed(pairs_of(x_ahead[0], X_VECTOR)))
        x = ()
        for n in gl.static_range(WARM):
            if n < FIRST:
                row = load_row(FIRST - 1 - n, x_lane, x_step, x_row, x_limit, in_x, DIL_H)
                x = x + (transposed(pairs_of(row, X_VECTOR)),)
            else:
                x = x + (none,)
        acc = ()
        for _ in gl.static_range(KH):
            acc = acc + (zero,)
        for turn in range(first, last, UNROLL):
            for u in gl.static_range(UNROLL):
                step = turn + u
                pairs = pairs_of(dy_ahead[0], DY_VECTOR)
                dy = left_operand(pairs, dtype, LEFT_OPERAND)
                window = left_operand(transposed(pairs), dtype, LEFT_OPERAND)
                x = (transposed(pairs_of(x_ahead[0], X_VECTOR)),) + x
                due = load_row(step - first + UNROLL, dy_lane, dy_step, dy_row, dy_limit, in_dy, DIL_H)
                dy_ahead = dy_ahead[1:] + (due,)
                due = load_row(step + UNROLL, x_lane, x_step, x_row, x_limit, in_x, DIL_H)
                x_ahead = x_ahead[1:] + (due,)
                met = ()
                added = ()
                for r in gl.static_range(KH):
                    met = met + (mma_v2(dy, matrices[r], acc[r]),)
                    right = unpacked(x[WARM - r].permute([0, 2, 1]), dtype, RIGHT_OPERAND)
                    added = added + (mma_v2(window, right, sums[r]),)
                sums = added
                mask = spread(below((step - WARM) * DIL_H, stored), 1) & in_dx
                gl.store(dx_lane + (step - WARM) * dx_step, met[0].to(dtype), mask=mask)
                acc = met[1:] + (zero,)
                x = x[:WARM]
        done = first + (last - first + UNROLL - 1) // UNROLL * UNROLL - WARM
        for a in gl.static_range(DRAIN):
            mask = spread(below((done + a) * DIL_H, stored), 1) & in_dx
            gl.store(dx_lane + (done + a) * dx_step, acc[a].to(dtype), mask=mask)

    at = column_of(along(BLOCK_W, MMA, 2), X_VECTOR) + (LEFT + PAD_W)
    store_diagonals(
        sums, at, dw_ptr + split * stride_dw_split, first_channel, 0, stride_dw_o, stride_dw_h, stride_dw_w,
        CHANNELS, KH, KW, -DIL_W, KH, 1, DY_VECTOR, INDEX_64, MMA,
    )  # fmt: skip
