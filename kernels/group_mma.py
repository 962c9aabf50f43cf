"""Narrow groups of channels_last maps on matrix units, operands going from memory to fragments untouched.

Of a group of 2, 4, 8 or 16 channels a stretch of an input row, columns and channels as they lie in memory, is a vector of
which each stretch of 8 outputs, columns and channels again, meets a part: the product with a banded matrix
T_r[(w', ci), (w, co)] = w[co, ci, r, s] where column w' meets w through tap s, the same for all stretches. So lanes are
M, as in depthwise_toeplitz.py, which also has the march; 16 inputs K, 8 outputs N. A thread of NVIDIA's mma.sync holds
2 neighbouring channels of a register: nothing is sorted, and what is loaded once serves all taps of all rows.
Source: own derivation, no code adapted; the fragments are those of the PTX ISA's mma.m16n8k16.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .fragments import along, below, copy, finish, index, lane, result_layout, spread, strides

SIZES = ("batch", "h_in", "w_in", "h_out", "w_out", "segments", "col_blocks", "rows", "CHANNELS", "first", "last")


@triton.constexpr_function
def tile_layouts(lanes, columns, channels, group, across, warps, vector):
    """(of registers, of copies, of shared memory) of a [lanes, columns, channels] tile of groups of `group` channels.

    across: warps along channels. vector: channels of a pixel that are copied at once.
    """
    shape = [lanes, columns, channels]

    def bits(axis):
        return [[1 << i if axis == a else 0 for a in range(3)] for i in range(shape[axis].bit_length() - 1)]

    lanes, channels = bits(0), bits(2)
    own = group.bit_length() - 1
    inputs = channels[:own] + bits(1)  # of a group, as they lie in memory
    groups = channels[own:]
    inner = len(groups) - (across.bit_length() - 1)  # what is left to a warp
    outer = 4 + (warps // across).bit_length() - 1
    threads = inputs[1:3] + lanes[:3]
    registers = gl.DistributedLinearLayout(
        [inputs[0], lanes[3]] + inputs[3:] + groups[:inner] + lanes[outer:], threads, lanes[4:outer] + groups[inner:],
        [], shape,
    )  # fmt: skip
    # Eight threads that read together read from eight places of 16 bytes, as far as their channels are not neighbours.
    order = channels[:3] + [base for base in threads if base not in channels[:3]][:3]
    order += [base for base in channels + bits(1) + lanes if base not in order]
    width, count = vector.bit_length() - 1, 5 + len(groups) - inner + outer - 4
    copied = order[width:]
    copies = gl.DistributedLinearLayout(order[:width] + copied[count:], copied[:5], copied[5:count], [], shape)
    return registers, copies, gl.SharedLinearLayout(order)


@gluon.jit
def even_and_odd(tile, COUNT: gl.constexpr):
    """The halves of the last of four axes, of length COUNT: its even and its odd elements."""
    if COUNT > 2:
        return gl.split(tile.reshape([tile.shape[0], tile.shape[1], tile.shape[2], COUNT // 2, 2]))
    else:
        return gl.split(tile)


@gluon.jit
def eights(tile, GROUP: gl.constexpr, INNER: gl.constexpr, EIGHTS: gl.constexpr):
    """A [lanes, columns, channels] tile as tiles [warps, lanes, 8 inputs], EIGHTS for each of a warp's INNER groups."""
    LANES: gl.constexpr = tile.shape[0]
    WARPS: gl.constexpr = tile.shape[2] // (GROUP * INNER)
    tile = tile.reshape([LANES, tile.shape[1], WARPS, INNER, GROUP]).permute([2, 0, 3, 1, 4])
    tile = tile.reshape([WARPS, LANES, INNER, EIGHTS, 8]).permute([0, 1, 4, 2, 3])
    tiles = (tile.reshape([WARPS, LANES, 8, INNER * EIGHTS]),)
    for level in gl.static_range((INNER * EIGHTS).bit_length() - 1):
        even = ()
        odd = ()
        for i in gl.static_range(1 << level):
            pair = even_and_odd(tiles[i], INNER * EIGHTS >> level)
            even = even + (pair[0],)
            odd = odd + (pair[1],)
        tiles = even + odd
    return tiles


@gluon.jit
def sixteen(low, high, OPERAND: gl.constexpr):
    """Two tiles of `eights` as an operand."""
    tile = gl.join(low, high).permute([0, 1, 3, 2])
    return gl.convert_layout(tile.reshape([low.shape[0], low.shape[1], 16]), OPERAND, assert_trivial=True)


@gluon.jit
def results_together(tiles, GROUP: gl.constexpr, INNER: gl.constexpr, BLOCKS: gl.constexpr):
    """INNER times BLOCKS tiles [warps, lanes, 8 outputs] as one of [lanes, columns, channels]."""
    for level in gl.static_range((INNER * BLOCKS).bit_length() - 1):
        joined = ()
        for i in gl.static_range(INNER * BLOCKS >> level + 1):
            joined = joined + (gl.join(tiles[i], tiles[i + (INNER * BLOCKS >> level + 1)]),)
        tiles = joined
    WARPS: gl.constexpr = tiles[0].shape[0]
    LANES: gl.constexpr = tiles[0].shape[1]
    COLUMNS: gl.constexpr = 8 * BLOCKS // GROUP
    tile = tiles[0].reshape([WARPS, LANES, 8, INNER, BLOCKS]).permute([1, 4, 2, 0, 3])
    tile = tile.reshape([LANES, COLUMNS, GROUP, WARPS, INNER]).permute([0, 1, 3, 4, 2])
    return tile.reshape([LANES, COLUMNS, WARPS * INNER * GROUP])


@gluon.jit
def taps(
    c, k, n, stride_o, stride_c, stride_w, CHANNELS, GROUP: gl.constexpr, KW: gl.constexpr, CONV_STRIDE_W: gl.constexpr,
    DIL_W: gl.constexpr, OFFSET: gl.constexpr, TRANSPOSED: gl.constexpr, INDEX_64: gl.constexpr,
):  # fmt: skip
    """Where the taps lie by which inputs k of a group, from channel c on, meet outputs n; and whether they do."""
    if TRANSPOSED:
        d = spread(n // GROUP + OFFSET, 2) - spread(k // GROUP, 1)
        at = spread(k % GROUP * stride_o, 1) + spread(n % GROUP * stride_c, 2)
    else:
        d = spread(k // GROUP, 1) - spread(n // GROUP * CONV_STRIDE_W - OFFSET, 2)
        at = spread(n % GROUP * stride_o, 2) + spread(k % GROUP * stride_c, 1)
    at += spread(index(c, INDEX_64) * stride_o, 0) + d // DIL_W * stride_w
    return at, below(d, KW * DIL_W) & (d % DIL_W == 0) & spread(c < CHANNELS, 0)


@triton.constexpr_function
def met_by(b, p, blocks, of_a_column, apart, eights):
    """The first of the two `eights` that product p of accumulator b has."""
    return b // blocks * eights + min(b % blocks // of_a_column * apart + 2 * p, eights - 1)


@gluon.jit(do_not_specialize=SIZES)
def march_kernel(
    x_ptr, wgt_ptr, bias_ptr, residual_ptr, kept_ptr, y_ptr,
    batch, h_in, w_in, h_out, w_out, segments, col_blocks, rows, first, last,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_wgt_o, stride_wgt_c, stride_wgt_h, stride_wgt_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    CHANNELS, GROUP: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    CONV_STRIDE_H: gl.constexpr, CONV_STRIDE_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    DIL_H: gl.constexpr, DIL_W: gl.constexpr,
    TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
    LEFT: gl.constexpr, WINDOW: gl.constexpr, DRAIN: gl.constexpr,
    X_VECTOR: gl.constexpr, Y_VECTOR: gl.constexpr, INDEX_64: gl.constexpr,
    BLOCK_J: gl.constexpr, BLOCK_I: gl.constexpr, BLOCK_C: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of BLOCK_M lanes of y = conv(x), or, TRANSPOSED, of dx (y) from dy (x), whose
    strides are 1.

    A lane has BLOCK_J times 8 outputs of a group, and a warp BLOCK_I groups. Of the BLOCK_K columns of a step WINDOW
    count, the first LEFT before the lane's own. A step has CONV_STRIDE_H rows, adds each to the accumulators of the
    output rows that it meets, and stores the row that is complete. Steps `first` to `last` have input rows, and DRAIN
    more only store. X_VECTOR, Y_VECTOR: powers of two up to 8 that divide CHANNELS and all strides but the channels',
    which is 1 unless they are.
    """
    IN: gl.constexpr = CONV_STRIDE_H
    WARM: gl.constexpr = (KH - 1) // CONV_STRIDE_H
    # Row i of a step meets accumulator a, the row that is complete after a further a steps, through tap
    # OLDEST + a * NEXT + i.
    OLDEST: gl.constexpr = 0 if TRANSPOSED else WARM * IN
    NEXT: gl.constexpr = 1 if TRANSPOSED else -IN
    COLUMNS: gl.constexpr = 8 * BLOCK_J // GROUP
    ACROSS: gl.constexpr = BLOCK_C // (BLOCK_I * GROUP)
    # Of 8 outputs: columns, or of a column's channels how many such parts; and the inputs that they meet, by eights.
    OF_A_COLUMN: gl.constexpr = GROUP // 8 if GROUP > 8 else 1
    WIDE: gl.constexpr = 8 // GROUP if GROUP < 8 else 1
    REACH: gl.constexpr = (WIDE - 1) * CONV_STRIDE_W + (KW - 1) * DIL_W + 1
    PRODUCTS: gl.constexpr = (REACH * GROUP + 15) // 16
    EIGHTS: gl.constexpr = BLOCK_K * GROUP // 8
    APART: gl.constexpr = WIDE * CONV_STRIDE_W * GROUP // 8
    SUMS: gl.constexpr = BLOCK_I * BLOCK_J
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [ACROSS, gl.num_warps() // ACROSS, 1], [1, 16, 8])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    MATRIX: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    LAYOUTS: gl.constexpr = tile_layouts(BLOCK_M, BLOCK_K, BLOCK_C, GROUP, ACROSS, gl.num_warps(), X_VECTOR)
    HELD: gl.constexpr = LAYOUTS[0]
    COPIED: gl.constexpr = LAYOUTS[1]
    SHARED: gl.constexpr = LAYOUTS[2]
    RESULT: gl.constexpr = result_layout([BLOCK_M, COLUMNS, BLOCK_C], Y_VECTOR, gl.num_warps())
    ASYNC: gl.constexpr = X_VECTOR > 1
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    stride_x_n, stride_x_h, stride_x_w = strides(stride_x_n, stride_x_h, stride_x_w, X_VECTOR)
    stride_y_n, stride_y_h, stride_y_w = strides(stride_y_n, stride_y_h, stride_y_w, Y_VECTOR)
    c_blocks = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = gl.program_id(0)
    first_channel = pid % c_blocks * BLOCK_C
    first_lane = index(pid // c_blocks, INDEX_64) * BLOCK_M

    # Matrices, by group, row, part of a column's channels, and product.
    group = first_channel + along(ACROSS, MATRIX, 0) * (BLOCK_I * GROUP)
    matrices = ()
    for g in gl.static_range(BLOCK_I):
        for r in gl.static_range(KH):
            for part in gl.static_range(OF_A_COLUMN):
                for p in gl.static_range(PRODUCTS):
                    at, tap = taps(
                        group + g * GROUP, along(16, MATRIX, 1) + p * 16, along(8, MATRIX, 2) + part * 8,
                        stride_wgt_o, stride_wgt_c, stride_wgt_w, CHANNELS, GROUP, KW, CONV_STRIDE_W, DIL_W,
                        PAD_W + LEFT if TRANSPOSED else PAD_W - LEFT, TRANSPOSED, INDEX_64,
                    )  # fmt: skip
                    matrices = matrices + (gl.load(wgt_ptr + at + r * stride_wgt_h, mask=tap, other=0.0),)

    # Rows on their way in.
    m = first_lane + along(BLOCK_M, COPIED, 0)
    image, row_class, segment, block = lane(m, segments, col_blocks, DIL_H)
    in_row = row_class + segment * (rows * DIL_H)
    if TRANSPOSED:
        in_row = in_row + PAD_H - WARM * DIL_H
    else:
        in_row = in_row * CONV_STRIDE_H - PAD_H
    in_col = block * (COLUMNS * CONV_STRIDE_W) - LEFT
    in_row += first * (IN * DIL_H)
    c = first_channel + along(BLOCK_C, COPIED, 2)
    k = along(BLOCK_K, COPIED, 1)
    w = spread(in_col, 0) + spread(k, 1)
    in_map = below(w, w_in) & spread(k < WINDOW, 1) & spread(c < CHANNELS // X_VECTOR * X_VECTOR, 2)
    live = image < batch
    at = spread(image * stride_x_n + in_row * stride_x_h + in_col * stride_x_w, 0)
    at += spread(k * stride_x_w, 1)
    x_at = x_ptr + (at + spread(index(c, INDEX_64) * stride_x_c, 2))
    x_step = index(DIL_H, INDEX_64) * stride_x_h

    # And out.
    m = first_lane + along(BLOCK_M, RESULT, 0)
    image, row_class, segment, block = lane(m, segments, col_blocks, DIL_H)
    out_row = row_class + segment * (rows * DIL_H)
    c = first_channel + along(BLOCK_C, RESULT, 2)
    j = along(COLUMNS, RESULT, 1)
    in_y = (spread(block * COLUMNS, 0) + spread(j, 1) < w_out) & spread(c < CHANNELS // Y_VECTOR * Y_VECTOR, 2)
    in_batch = image < batch
    at = spread(image * stride_y_n + out_row * stride_y_h + block * COLUMNS * stride_y_w, 0)
    at += spread(j * stride_y_w, 1)
    y_at = y_ptr + (at + spread(index(c, INDEX_64) * stride_y_c, 2))
    y_step = index(DIL_H, INDEX_64) * stride_y_h

    zero = gl.zeros([ACROSS, BLOCK_M, 8], gl.float32, layout=MMA)
    starts = ()
    for i in gl.static_range(SUMS):
        if HAS_BIAS:
            at = spread(along(ACROSS, MMA, 0) * (BLOCK_I * GROUP) + first_channel + i // BLOCK_J * GROUP, 0)
            at = at + spread((along(8, MMA, 2) + i % OF_A_COLUMN * 8) % GROUP, 2)
            starts = starts + (zero + gl.load(bias_ptr + at, mask=at < CHANNELS, other=0.0).to(gl.float32),)
        else:
            starts = starts + (zero,)
    acc = ()
    for _ in gl.static_range(WARM + 1):
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
            x = eights(buffers.index(n % STAGES).load(HELD), GROUP, BLOCK_I, EIGHTS)
            operands = ()
            for e in gl.static_range(BLOCK_I * EIGHTS):
                # What follows the last of a window meets zeros: anything does.
                operands = operands + (sixteen(x[e], x[e + 1 if (e + 1) % EIGHTS else e], LEFT_OPERAND),)
            met = ()
            for a in gl.static_range(WARM + 1):
                for b in gl.static_range(SUMS):
                    product = acc[a * SUMS + b]
                    if OLDEST + a * NEXT + i < KH:
                        for p in gl.static_range(PRODUCTS):
                            operand = operands[met_by(b, p, BLOCK_J, OF_A_COLUMN, APART, EIGHTS)]
                            matrix = matrices[
                                ((b // BLOCK_J * KH + OLDEST + a * NEXT + i) * OF_A_COLUMN + b % OF_A_COLUMN) * PRODUCTS
                                + p
                            ]
                            product = mma_v2(operand, matrix, product)
                    met = met + (product,)
            acc = met
        step = t - WARM
        total = results_together(acc[:SUMS], GROUP, BLOCK_I, BLOCK_J)
        finish(
            y_at + step * y_step, total, out_row + step * DIL_H, h_out, in_batch & (t >= WARM), in_y,
            y_ptr, residual_ptr, kept_ptr, ACTIVATION, RESULT,
        )  # fmt: skip
        acc = acc[SUMS:] + starts
    async_copy.wait_group(0)
    for a in gl.static_range(DRAIN):
        step = last - WARM + a
        total = results_together(acc[a * SUMS : (a + 1) * SUMS], GROUP, BLOCK_I, BLOCK_J)
        finish(
            y_at + step * y_step, total, out_row + step * DIL_H, h_out, in_batch, in_y,
            y_ptr, residual_ptr, kept_ptr, ACTIVATION, RESULT,
        )  # fmt: skip
