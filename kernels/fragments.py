"""What kernels in Gluon share: vectors along the axes of tiles, lanes, copies ahead, and what ends fprop.

Tiles are [lanes, columns, channels], of contiguous maps [channels, lanes, columns]: a lane is one (image, class of
rows, segment of rows, block of columns), as in depthwise_toeplitz.py.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .epilogue import activated as activated_
from .epilogue import beside as beside_

# What kernels are not compiled anew for: of march kernels; of wgrad's all but the last two.
SIZES = ("batch", "h_in", "w_in", "h_out", "w_out", "segments", "col_blocks", "rows", "CHANNELS", "first", "last")

# Triton 3.9 has another name for it.
async_load = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)
activated = gluon.jit(activated_.fn)
beside = gluon.jit(beside_.fn)


@triton.constexpr_function
def axes(*shape):
    """Of each of a tile's three axes the bases of a linear layout, one a bit."""
    return [
        [[1 << i if axis == a else 0 for a in range(3)] for i in range(shape[axis].bit_length() - 1)]
        for axis in range(3)
    ]


@triton.constexpr_function
def shared_layouts(bases, read, warps, vector):
    """(of copies, of shared memory) of a tile of these `axes`.

    read: what tells the threads of a warp apart that read it. Eight that read together read from eight places of 16
    bytes, as far as their channels are not neighbours; `vector` channels of a pixel are copied at once. warps: in bits.
    """
    lanes, columns, channels = bases
    order = channels[:3] + [base for base in read if base not in channels[:3]][:3]
    order += [base for base in channels + columns + lanes if base not in order]
    width = vector.bit_length() - 1
    copied, shape = order[width:], [1 << len(axis) for axis in bases]
    copies = gl.DistributedLinearLayout(
        order[:width] + copied[5 + warps :], copied[:5], copied[5 : 5 + warps], [], shape
    )
    return copies, gl.SharedLinearLayout(order)


@triton.constexpr_function
def result_layout(shape, vector, warps):
    """Of a [lanes, columns, channels] tile on its way to memory, `vector` channels of a pixel at once."""
    channels = min(32, shape[2] // vector)
    columns = min(shape[1], 32 // channels)
    return gl.BlockedLayout([1, 1, vector], [32 // (channels * columns), columns, channels], [warps, 1, 1], [2, 1, 0])


@triton.constexpr_function
def sliced(layout, axis):
    """The layout of a vector along an axis of tiles of a layout."""
    for other in (2, 1, 0):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def along(size: gl.constexpr, layout: gl.constexpr, AXIS: gl.constexpr):
    """0, 1, ... along an axis of tiles of a layout, as a vector."""
    return gl.arange(0, size, layout=sliced(layout, AXIS))


@gluon.jit
def spread(v, AXIS: gl.constexpr):
    """A vector along an axis of a tile."""
    return v[:, None, None] if AXIS == 0 else v[None, :, None] if AXIS == 1 else v[None, None, :]


@gluon.jit
def below(i, size):
    """0 <= i < size, as one comparison."""
    return gl.cast(i, gl.uint32) < gl.cast(size, gl.uint32)


@gluon.jit
def index(i, INDEX_64: gl.constexpr):
    """`i` in the type of an element offset: int64 only where a tensor reaches past 2^31 elements."""
    return gl.cast(i, gl.int64) if INDEX_64 else i


@gluon.jit
def strides(n, h, w, VECTOR: gl.constexpr):
    """The strides, which VECTOR divides, so that the compiler sees it."""
    return n // VECTOR * VECTOR, h // VECTOR * VECTOR, w // VECTOR * VECTOR


@gluon.jit
def lane(m, segments, col_blocks, DIL_H: gl.constexpr):
    """(image, class of rows, segment of rows, block of columns) of a lane number."""
    of_rows = m // col_blocks
    of_classes = of_rows // segments
    image = of_classes // DIL_H
    return image, of_classes - image * DIL_H, of_rows - of_classes * segments, m - of_rows * col_blocks


@gluon.jit
def copy(to, source, row, height, live, inside, ASYNC: gl.constexpr):
    """Begin to copy a row of each lane into shared memory: zeros where a lane is not live, or has no such row.

    What is too narrow to be copied asynchronously is copied now.
    """
    mask = spread(live & below(row, height), 0) & inside
    if ASYNC:
        async_load(to, source, mask=mask)
    else:
        to.store(gl.load(source, mask=mask, other=0.0))


@gluon.jit
def copy_step(
    slot, step, dy_buffers, dy_lane, dy_step, dy_row, h_out, dy_live, rows, in_dy, DY_ASYNC: gl.constexpr,
    x_buffers, x_lane, x_step, x_row, h_in, x_live, last, in_x, X_ASYNC: gl.constexpr,
    CONV_STRIDE_H: gl.constexpr, DIL_H: gl.constexpr,
):  # fmt: skip
    """Begin to copy what a step of wgrad has: one row of dy, and CONV_STRIDE_H of x."""
    copy(
        dy_buffers.index(slot), dy_lane + step * dy_step, dy_row + step * DIL_H, h_out,
        dy_live & (step < rows), in_dy, DY_ASYNC,
    )  # fmt: skip
    for i in gl.static_range(CONV_STRIDE_H):
        row = step * CONV_STRIDE_H + i
        copy(
            x_buffers.index(slot * CONV_STRIDE_H + i), x_lane + row * x_step, x_row + row * DIL_H, h_in,
            x_live & (step < last), in_x, X_ASYNC,
        )  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def even_and_odd(tile, COUNT: gl.constexpr):
    """The halves of the last of four axes, of length COUNT: its even and its odd elements."""
    if COUNT > 2:
        return gl.split(tile.reshape([tile.shape[0], tile.shape[1], tile.shape[2], COUNT // 2, 2]))
    else:
        return gl.split(tile)


@gluon.jit
def parts(tile, COUNT: gl.constexpr):
    """COUNT tiles of one that has them along the last of four axes."""
    tiles = (tile,) if COUNT > 1 else (tile.reshape([tile.shape[0], tile.shape[1], tile.shape[2]]),)
    for level in gl.static_range(COUNT.bit_length() - 1):
        even = ()
        odd = ()
        for i in gl.static_range(1 << level):
            pair = even_and_odd(tiles[i], COUNT >> level)
            even = even + (pair[0],)
            odd = odd + (pair[1],)
        tiles = even + odd
    return tiles


@gluon.jit
def joined(tiles, COUNT: gl.constexpr):
    """COUNT tiles as one that has them along the last of four axes."""
    for level in gl.static_range(COUNT.bit_length() - 1):
        halves = ()
        for i in gl.static_range(COUNT >> level + 1):
            halves = halves + (gl.join(tiles[i], tiles[i + (COUNT >> level + 1)]),)
        tiles = halves
    tile = tiles[0]
    return tile.reshape([tile.shape[0], tile.shape[1], tile.shape[2], COUNT])


@gluon.jit
def packed(operands, V: gl.constexpr):
    """Of V right operands [.., K, N] the pairs of rows that fragments have in a register, as int32 [.., K // 2, N].

    What a loop carries as pairs, it need not sort anew.
    """
    pairs = ()
    for v in gl.static_range(V):
        tile = operands[v]
        tile = tile.reshape([tile.shape[0], tile.shape[1] // 2, 2, tile.shape[2]]).permute([0, 1, 3, 2])
        low, high = gl.split(tile.to(gl.uint16, bitcast=True).to(gl.uint32))
        pairs = pairs + (low | (high << 16),)
    return pairs


@gluon.jit
def unpacked(pair, dtype: gl.constexpr, OPERAND: gl.constexpr):
    """A right operand of its `packed` pairs."""
    low = pair.to(gl.uint16).to(dtype, bitcast=True)
    high = (pair >> 16).to(gl.uint16).to(dtype, bitcast=True)
    tile = gl.join(low, high).permute([0, 1, 3, 2])
    return gl.convert_layout(
        tile.reshape([pair.shape[0], 2 * pair.shape[1], pair.shape[2]]), OPERAND, assert_trivial=True
    )


@gluon.jit
def column_of(slot, VECTOR: gl.constexpr):
    """Which column of a window is in a slot of an operand: of each 8 slots a thread has two, and in those of several
    eights `VECTOR` columns that lie together. Up to 2 of them, the columns' own order.
    """
    PAIRS: gl.constexpr = max(VECTOR // 2, 1)
    return slot // (8 * PAIRS) * (8 * PAIRS) + slot // 2 % 4 * (2 * PAIRS) + slot // 8 % PAIRS * 2 + slot % 2


@gluon.jit
def slot_of(column, VECTOR: gl.constexpr):
    """The inverse."""
    PAIRS: gl.constexpr = max(VECTOR // 2, 1)
    return column // (8 * PAIRS) * (8 * PAIRS) + column // 2 % PAIRS * 8 + column // (2 * PAIRS) % 4 * 2 + column % 2


@gluon.jit
def store_diagonals(
    sums, at, dw_ptr, first_channel, first_tap, stride_dw_o, stride_dw_h, stride_dw_w,
    CHANNELS, KH: gl.constexpr, KW: gl.constexpr, STEP: gl.constexpr, TAPS: gl.constexpr,
    V: gl.constexpr, VECTOR: gl.constexpr, INDEX_64: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """dw of TAPS filter rows from `first_tap` on: of row r and channels v, v + V, ... in column s the sum of
    sums[r * V + v], [channels, slots, columns], over what is in the slots of window columns at[columns] + s STEP.
    """
    C: gl.constexpr = sums[0].shape[0]
    K: gl.constexpr = sums[0].shape[1]
    SUM: gl.constexpr = gl.SliceLayout(2, MMA)
    c = first_channel + gl.arange(0, C, layout=gl.SliceLayout(1, SUM)) * V
    for block in gl.static_range((KW + K - 1) // K):  # a narrow map meets more taps than it has columns
        met = spread(at, 2) + spread(block * K + along(K, MMA, 1), 1) * STEP
        met = met + gl.zeros(sums[0].shape, gl.int32, layout=MMA)
        here = below(met, K)
        met = slot_of(gl.where(here, met, 0), VECTOR)
        s = block * K + gl.arange(0, K, layout=gl.SliceLayout(0, SUM))
        for r in gl.static_range(TAPS):
            for v in gl.static_range(V):
                diagonal = gl.sum(gl.where(here, gl.gather(sums[r * V + v], met, 1), 0.0), 2)
                mask = ((c + v < CHANNELS) & (first_tap + r < KH))[:, None] & (s < KW)[None, :]
                tap = (first_tap + r) * stride_dw_h + s * stride_dw_w
                to = dw_ptr + ((index(c + v, INDEX_64) * stride_dw_o)[:, None] + tap[None, :])
                gl.store(to, diagonal.to(dw_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def finish(
    to, total, mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION: gl.constexpr, RESULT: gl.constexpr,
):  # fmt: skip
    """Store a row of each lane: activation(total + residual) where `to` points into y, and total + residual there in
    `kept`, as epilogue.py's. total: fp32, in any layout; RESULT: that of `to` and `mask`.
    """
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    if residual_ptr is None and kept_ptr is None:
        gl.store(to, gl.convert_layout(activated(total, ACTIVATION).to(dtype), RESULT), mask=mask)
    else:
        total = gl.convert_layout(total, RESULT)
        if residual_ptr is not None:
            total += gl.load(beside(to, y_ptr, residual_ptr), mask=mask, other=0.0).to(gl.float32)
        if kept_ptr is not None:
            gl.store(beside(to, y_ptr, kept_ptr), total.to(dtype), mask=mask)
        gl.store(to, activated(total, ACTIVATION).to(dtype), mask=mask)
