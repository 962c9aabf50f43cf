"""Narrow groups of channels_last maps on matrix units, operands going from memory to fragments untouched.

Of a group of 2, 4, 8 or 16 channels a stretch of an input row, columns and channels as they lie in memory, is a vector
of which each stretch of 8 outputs, columns and channels again, meets a part: the product with a banded matrix
T_r[(w', ci), (w, co)] = w[co, ci, r, s] where column w' meets w through tap s, the same for all stretches. So lanes are
M, as in depthwise_toeplitz.py, which also has the march; 16 inputs K, 8 outputs N. A thread of NVIDIA's mma.sync has 2
neighbouring channels in a register: nothing is sorted, and what is loaded once serves all taps of all rows.
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
    strides,
    unpacked,
)


@triton.constexpr_function
def tile_layouts(lanes, columns, channels, group, across, warps, vector):
    """(of registers, of copies, of shared memory) of a [lanes, columns, channels] tile of groups of `group` channels.

    across: warps along channels. vector: channels of a pixel that are copied at once.
    """
    bases = axes(lanes, columns, channels)
    m, w, c = bases
    own = group.bit_length() - 1
    inputs, groups = c[:own] + w, c[own:]  # of a group, as they lie in memory
    inner = len(groups) - (across.bit_length() - 1)  # what is left to a warp
    outer = 4 + (warps // across).bit_length() - 1
    threads, others = inputs[1:3] + m[:3], m[4:outer] + groups[inner:]
    held = [inputs[0], m[3]] + inputs[3:] + groups[:inner] + m[outer:]
    registers = gl.DistributedLinearLayout(held, threads, others, [], [lanes, columns, channels])
    return registers, *shared_layouts(bases, threads, len(others), vector)


@gluon.jit
def eights(tile, GROUP: gl.constexpr, INNER: gl.constexpr, EIGHTS: gl.constexpr):
    """A [lanes, columns, channels] tile as tiles [warps, lanes, 8 inputs], EIGHTS for each of a warp's INNER groups."""
    LANES: gl.constexpr = tile.shape[0]
    WARPS: gl.constexpr = tile.shape[2] // (GROUP * INNER)
    tile = tile.reshape([LANES, tile.shape[1], WARPS, INNER, GROUP]).permute([2, 0, 3, 1, 4])
    tile = tile.reshape([WARPS, LANES, INNER, EIGHTS, 8]).permute([0, 1, 4, 2, 3])
    return parts(tile.reshape([WARPS, LANES, 8, INNER * EIGHTS]), INNER * EIGHTS)


@gluon.jit
def sixteen(low, high, OPERAND: gl.constexpr):
    """Two tiles of `eights` as an operand."""
    tile = gl.join(low, high).permute([0, 1, 3, 2])
    return gl.convert_layout(tile.reshape([low.shape[0], low.shape[1], 16]), OPERAND, assert_trivial=True)


@gluon.jit
def results_together(tiles, GROUP: gl.constexpr, INNER: gl.constexpr, BLOCKS: gl.constexpr):
    """INNER times BLOCKS tiles [warps, lanes, 8 outputs] as one of [lanes, columns, channels]."""
    tile = joined(tiles, INNER * BLOCKS)
    WARPS: gl.constexpr = tile.shape[0]
    LANES: gl.constexpr = tile.shape[1]
    COLUMNS: gl.constexpr = 8 * BLOCKS // GROUP
    tile = tile.reshape([WARPS, LANES, 8, INNER, BLOCKS]).permute([1, 4, 2, 0, 3])
    tile = tile.reshape([LANES, COLUMNS, GROUP, WARPS, INNER]).permute([0, 1, 3, 4, 2])
    return tile.reshape([LANES, COLUMNS, WARPS * INNER * GROUP])


@triton.constexpr_function
def sum_layouts(lanes, columns, channels, group, across, vector):
    """As `tile_layouts`, of an operand of a sum over lanes: a register has two lanes of a channel."""
    bases = axes(lanes, columns, channels)
    m, w, c = bases
    own = group.bit_length() - 1
    values, groups = c[:own] + w, c[own:]
    inner = len(groups) - (across.bit_length() - 1)
    threads = m[1:3] + values[1:4]
    held = [values[0], m[0]] + m[3:] + values[4:] + groups[:inner]
    registers = gl.DistributedLinearLayout(held, threads, groups[inner:], [], [lanes, columns, channels])
    return registers, *shared_layouts(bases, threads, len(groups) - inner, vector)


@gluon.jit
def inputs_by_16(tile, GROUP: gl.constexpr, INNER: gl.constexpr, COUNT: gl.constexpr, OPERAND: gl.constexpr):
    """A [lanes, columns, channels] tile as left operands [warps, 16 inputs, lanes], COUNT for each of INNER groups.

    Even inputs come before odd ones: a thread loads them in pairs.
    """
    LANES: gl.constexpr = tile.shape[0]
    WARPS: gl.constexpr = tile.shape[2] // (GROUP * INNER)
    tile = tile.reshape([LANES, tile.shape[1], WARPS, INNER, GROUP]).permute([2, 3, 1, 4, 0])
    tile = tile.reshape([WARPS, INNER, COUNT, 8, 2, LANES]).permute([0, 4, 3, 5, 1, 2])
    found = parts(tile.reshape([WARPS, 16, LANES, INNER * COUNT]), INNER * COUNT)
    operands = ()
    for i in gl.static_range(INNER * COUNT):
        operands = operands + (gl.convert_layout(found[i], OPERAND),)
    return operands


@gluon.jit
def outputs_by_8(tile, GROUP: gl.constexpr, INNER: gl.constexpr, COUNT: gl.constexpr, OPERAND: gl.constexpr):
    """A [lanes, columns, channels] tile as right operands [warps, lanes, 8 outputs], two for each of COUNT sixteens of
    INNER groups: even ones, and odd ones.
    """
    LANES: gl.constexpr = tile.shape[0]
    WARPS: gl.constexpr = tile.shape[2] // (GROUP * INNER)
    tile = tile.reshape([LANES, tile.shape[1], WARPS, INNER, GROUP]).permute([2, 3, 1, 4, 0])
    tile = tile.reshape([WARPS, INNER, COUNT, 8, 2, LANES]).permute([0, 5, 3, 1, 2, 4])
    found = parts(tile.reshape([WARPS, LANES, 8, INNER * COUNT * 2]), INNER * COUNT * 2)
    operands = ()
    for i in gl.static_range(INNER * COUNT * 2):
        operands = operands + (gl.convert_layout(found[i], OPERAND),)
    return operands


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
    gl.static_assert(STAGES >= 2, "copies go ahead of what is read")
    gl.static_assert(BLOCK_J % OF_A_COLUMN == 0, "a lane has whole columns")
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
    at += spread(index(k, INDEX_64) * stride_x_w, 1)
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
    at += spread(index(j, INDEX_64) * stride_y_w, 1)
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
        stored = spread(in_batch & (t >= WARM) & below(out_row + step * DIL_H, h_out), 0) & in_y
        finish(y_at + step * y_step, total, stored, y_ptr, residual_ptr, kept_ptr, ACTIVATION, RESULT)
        acc = acc[SUMS:] + starts
    async_copy.wait_group(0)
    for a in gl.static_range(DRAIN):
        step = last - WARM + a
        total = results_together(acc[a * SUMS : (a + 1) * SUMS], GROUP, BLOCK_I, BLOCK_J)
        stored = spread(in_batch & below(out_row + step * DIL_H, h_out), 0) & in_y
        finish(y_at + step * y_step, total, stored, y_ptr, residual_ptr, kept_ptr, ACTIVATION, RESULT)


@gluon.jit(do_not_specialize=(*SIZES[:-2], "blocks"))
def wgrad_kernel(
    dy_ptr, x_ptr, dw_ptr,
    batch, h_in, w_in, h_out, w_out, segments, col_blocks, rows, blocks,
    stride_dy_n, stride_dy_c, stride_dy_h, stride_dy_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_dw_split, stride_dw_o: gl.constexpr, stride_dw_c: gl.constexpr,
    stride_dw_h: gl.constexpr, stride_dw_w: gl.constexpr,
    CHANNELS, GROUP: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    CONV_STRIDE_H: gl.constexpr, CONV_STRIDE_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    DIL_H: gl.constexpr, DIL_W: gl.constexpr,
    WINDOW: gl.constexpr, X_VECTOR: gl.constexpr, DY_VECTOR: gl.constexpr, INDEX_64: gl.constexpr,
    BLOCK_J: gl.constexpr, BLOCK_I: gl.constexpr, BLOCK_C: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr,
    UNROLL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: the sums of dw for BLOCK_C channels over `blocks` blocks of lanes.

    A lane has BLOCK_J times 8 outputs of a group, in pairs of eights, and a warp BLOCK_I groups. Per group and filter
    row M = 16 inputs, of as many sixteens as 16 outputs meet, N = 8 outputs, K = lanes, steps and sixteens of outputs:
    the accumulators are the gradients of the banded matrices, and their diagonals' sums those of the filter. A step has
    one row of dy and CONV_STRIDE_H of x, of which WINDOW columns count, and carries the last rows of dy. dw: [splits,
    channels, GROUP, KH, KW] by strides, the filter gradient itself or partial sums.
    """
    WARM: gl.constexpr = (KH - 1) // CONV_STRIDE_H
    COLUMNS: gl.constexpr = 8 * BLOCK_J // GROUP
    PAIRS: gl.constexpr = BLOCK_J // 2
    ACROSS: gl.constexpr = BLOCK_C // (BLOCK_I * GROUP)
    WIDE: gl.constexpr = 16 // GROUP  # columns of 16 outputs
    REACH: gl.constexpr = (WIDE - 1) * CONV_STRIDE_W + (KW - 1) * DIL_W + 1
    MET: gl.constexpr = (REACH * GROUP + 15) // 16  # sixteens of inputs
    SIXTEENS: gl.constexpr = BLOCK_K * GROUP // 16
    EACH: gl.constexpr = MET * 2  # accumulators of a group and filter row
    gl.static_assert(STAGES >= 2, "copies go ahead of what is read")
    gl.static_assert(BLOCK_J % 2 == 0, "outputs are taken by sixteens")
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [ACROSS, 1, 1], [1, 16, 8])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT_OPERAND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    X_LAYOUTS: gl.constexpr = sum_layouts(BLOCK_M, BLOCK_K, BLOCK_C, GROUP, ACROSS, X_VECTOR)
    DY_LAYOUTS: gl.constexpr = sum_layouts(BLOCK_M, COLUMNS, BLOCK_C, GROUP, ACROSS, DY_VECTOR)
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
    split = index(pid // c_blocks, INDEX_64)

    x_c = first_channel + along(BLOCK_C, X_COPIED, 2)
    x_k = along(BLOCK_K, X_COPIED, 1)
    x_known = spread(x_k < WINDOW, 1) & spread(x_c < CHANNELS // X_VECTOR * X_VECTOR, 2)
    x_at = spread(index(x_k, INDEX_64) * stride_x_w, 1) + spread(index(x_c, INDEX_64) * stride_x_c, 2)
    dy_c = first_channel + along(BLOCK_C, DY_COPIED, 2)
    dy_j = along(COLUMNS, DY_COPIED, 1)
    dy_known = spread(dy_c < CHANNELS // DY_VECTOR * DY_VECTOR, 2)
    dy_at = spread(index(dy_j, INDEX_64) * stride_dy_w, 1) + spread(index(dy_c, INDEX_64) * stride_dy_c, 2)
    x_step = index(DIL_H, INDEX_64) * stride_x_h
    dy_step = index(DIL_H, INDEX_64) * stride_dy_h

    # Steps whose rows of x all lie below the map are left out where every lane starts at its top.
    last = gl.where(segments == 1, (h_in + PAD_H + CONV_STRIDE_H * DIL_H - 1) // (CONV_STRIDE_H * DIL_H), rows + WARM)
    last = gl.minimum(last, rows + WARM)
    x_buffers = gl.allocate_shared_memory(dtype, [STAGES * CONV_STRIDE_H, BLOCK_M, BLOCK_K, BLOCK_C], X_SHARED)
    dy_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, COLUMNS, BLOCK_C], DY_SHARED)
    OUTPUTS: gl.constexpr = BLOCK_I * BLOCK_J
    none = ()
    for _ in gl.static_range(OUTPUTS):
        none = none + (gl.zeros([ACROSS, BLOCK_M, 8], dtype, layout=RIGHT_OPERAND),)
    acc = ()
    for _ in gl.static_range(BLOCK_I * KH * EACH):
        acc = acc + (gl.zeros([ACROSS, 16, 8], gl.float32, layout=MMA),)
    for b in range(blocks):
        first_lane = (split * blocks + b) * BLOCK_M
        image, row_class, segment, block = lane(first_lane + along(BLOCK_M, X_COPIED, 0), segments, col_blocks, DIL_H)
        x_row = (row_class + segment * (rows * DIL_H)) * CONV_STRIDE_H - PAD_H
        x_col = block * (COLUMNS * CONV_STRIDE_W) - PAD_W
        x_live = image < batch
        in_x = below(spread(x_col, 0) + spread(x_k, 1), w_in) & x_known
        at = image * stride_x_n + x_row * stride_x_h + x_col * stride_x_w
        x_lane = x_ptr + (spread(at, 0) + x_at)
        image, row_class, segment, block = lane(first_lane + along(BLOCK_M, DY_COPIED, 0), segments, col_blocks, DIL_H)
        dy_row = row_class + segment * (rows * DIL_H)
        dy_col = block * COLUMNS
        dy_live = image < batch
        in_dy = (spread(dy_col, 0) + spread(dy_j, 1) < w_out) & dy_known
        at = image * stride_dy_n + dy_row * stride_dy_h + dy_col * stride_dy_w
        dy_lane = dy_ptr + (spread(at, 0) + dy_at)

        dy = ()
        for _ in gl.static_range(WARM):
            dy = dy + packed(none, OUTPUTS)
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
                tile = dy_buffers.index(slot).load(DY_HELD)
                dy = packed(outputs_by_8(tile, GROUP, BLOCK_I, PAIRS, RIGHT_OPERAND), OUTPUTS) + dy
                x = ()
                for i in gl.static_range(CONV_STRIDE_H):
                    if i < KH:
                        row = x_buffers.index(slot * CONV_STRIDE_H + i).load(X_HELD)
                        x = x + inputs_by_16(row, GROUP, BLOCK_I, SIXTEENS, LEFT_OPERAND)
                met = ()
                for a in gl.static_range(BLOCK_I * KH * EACH):
                    total = acc[a]
                    for j in gl.static_range(PAIRS):
                        left = x[sum_input(a, j, KH, EACH, CONV_STRIDE_H, CONV_STRIDE_W, SIXTEENS, BLOCK_I)]
                        right = dy[sum_output(a, j, KH, EACH, CONV_STRIDE_H, PAIRS, OUTPUTS)]
                        total = mma_v2(left, unpacked(right, dtype, RIGHT_OPERAND), total)
                    met = met + (total,)
                acc = met
                dy = dy[: WARM * OUTPUTS]
        async_copy.wait_group(0)  # and Triton has all threads wait, before the next block's copies

    # Diagonals: row i of a block is tap s and input ci, 16 at a time; summed over the columns of 16 outputs.
    dw_ptr += split * stride_dw_split
    row = along(16, MMA, 1)
    for g in gl.static_range(BLOCK_I):
        for r in gl.static_range(KH):
            for q in gl.static_range(2):
                for first_out in gl.static_range(0, KW * GROUP, 16):
                    out = first_out + row
                    e = along(8, MMA, 2) * 2 + q
                    column = spread(out // GROUP * DIL_W, 1) + spread(e // GROUP * CONV_STRIDE_W, 2)
                    at = column * GROUP + spread(out % GROUP, 1) + gl.zeros([ACROSS, 16, 8], gl.int32, layout=MMA)
                    diagonal = gl.zeros([ACROSS, 16, 8], gl.float32, layout=MMA)
                    for f in gl.static_range(MET):
                        here = at // 16 == f
                        place = at % 16 // 2 + at % 2 * 8
                        moved = gl.gather(acc[(g * KH + r) * EACH + f * 2 + q], place, 1)
                        diagonal += gl.where(here, moved, 0.0)
                    store_sums(
                        dw_ptr, diagonal, first_channel + g * GROUP, first_out, r, q, stride_dw_o, stride_dw_c,
                        stride_dw_h, stride_dw_w, CHANNELS, GROUP, KW, BLOCK_I, INDEX_64,
                    )  # fmt: skip


@triton.constexpr_function
def sum_input(a, j, kh, each, stride_h, stride_w, sixteens, inner):
    """The operand of x that accumulator a's product with the j-th 16 outputs has. Past the last of a window nothing
    that counts is summed.
    """
    row, part = a // each % kh % stride_h, a % each // 2
    return row * inner * sixteens + a // (each * kh) * sixteens + min(j * stride_w + part, sixteens - 1)


@triton.constexpr_function
def sum_output(a, j, kh, each, stride_h, pairs, outputs):
    """And that of dy."""
    back = a // each % kh // stride_h
    return back * outputs + (a // (each * kh) * pairs + j) * 2 + a % 2


@gluon.jit
def store_sums(
    dw_ptr, diagonal, first_channel, FIRST: gl.constexpr, R: gl.constexpr, Q: gl.constexpr,
    stride_o: gl.constexpr, stride_c: gl.constexpr, stride_h: gl.constexpr, stride_w: gl.constexpr,
    CHANNELS, GROUP: gl.constexpr, KW: gl.constexpr, INNER: gl.constexpr, INDEX_64: gl.constexpr,
):  # fmt: skip
    """Store the sums over columns of a tile [warps, taps and inputs from FIRST on, columns and outputs 2 n + Q]."""
    OUT: gl.constexpr = GROUP // 2
    tile = diagonal.reshape([diagonal.shape[0], 16, 8 // OUT, OUT])
    SUM: gl.constexpr = gl.SliceLayout(2, tile.type.layout)
    total = gl.sum(tile, 2)
    co = spread(along(OUT, SUM, 2) * 2 + Q, 2)
    i = FIRST + along(16, SUM, 1)
    c = first_channel + along(diagonal.shape[0], SUM, 0) * (INNER * GROUP)
    at = spread(index(c, INDEX_64) * stride_o, 0) + co * stride_o + R * stride_h
    at = at + spread(i % GROUP * stride_c + i // GROUP * stride_w, 1)
    mask = spread(c < CHANNELS, 0) & spread(i < KW * GROUP, 1) & (co < GROUP)
    gl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=mask)
