"""Index and tile helpers shared by the kernels."""

import triton
import triton.language as tl

NOWHERE = tl.constexpr(-(2**30))  # a column that no tap reaches


@triton.jit
def mma(a, b, acc, PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """acc + a @ b in fp32. EMULATE_BF16: for the interpreter, whose dot multiplies bf16 operands as bit patterns."""
    if EMULATE_BF16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def touched(tile):
    """The tile as it is, after an operation that costs nothing, but that Triton does not see through.

    Of a product: Triton waits for it, and so for all before it. Of what a loop hands on: it can be pipelined.
    """
    same, _ = tl.split(tl.join(tile, tile))
    return same


@triton.jit
def in_registers(tile, YES: tl.constexpr):
    """The tile, 16 bits an element; if YES, products of warp groups that have it on their left read it from registers.

    A move that ptxas drops hides from Triton that it was loaded. Else it stays in shared memory, where each product
    reads it anew.
    """
    if YES:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=True, pack=2)
    else:
        return tile


@triton.jit
def landed(total, LAST_COLUMNS: tl.constexpr):
    """The sum of a product, waited for if the step's last part of columns is too narrow for a product of warp groups.

    Triton makes that part's product from registers, beside others that read the same tile in shared memory, and has the
    next step's copies overwrite the tile as if these had ended (Triton 3.6 to 3.9 on sm_90).
    """
    return touched(total) if LAST_COLUMNS % 16 != 0 else total


@triton.jit
def narrow(acc, dtype: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """The fp32 `acc` rounded to nearest even in `dtype`. EMULATE_BF16: the interpreter's own cast to bf16 truncates."""
    if EMULATE_BF16 and dtype == tl.bfloat16:
        bits = acc.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        acc = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return acc.to(dtype)


@triton.jit
def index(i, INDEX_64: tl.constexpr):
    """`i` in the type of an element offset: int64 only where a tensor reaches past 2^31 elements."""
    return tl.cast(i, tl.int64) if INDEX_64 else i


@triton.jit
def rows(v, SWAP: tl.constexpr):
    """A vector as the rows of a 2-D tile, or as its columns where the tile is held transposed; a scalar as it is."""
    if len(v.shape) == 0:
        return v
    else:
        return v[None, :] if SWAP else v[:, None]


@triton.jit
def cols(v, SWAP: tl.constexpr):
    """A vector as the columns of a 2-D tile, or as its rows where the tile is held transposed; a scalar as it is."""
    if len(v.shape) == 0:
        return v
    else:
        return v[:, None] if SWAP else v[None, :]


@triton.jit
def turned(tile, SWAP: tl.constexpr):
    """The tile with its rows first, whichever way it is held."""
    return tl.trans(tile) if SWAP else tile


@triton.jit
def pixel(m, batch, height, width, FLAT: tl.constexpr):
    """(image, row, column, whether there is one) of a flat pixel number of a [batch, height, width] map.

    FLAT: all pixels lie evenly apart in memory, so that the number itself does for a column.
    """
    if FLAT:
        return 0, 0, m, m < batch * height * width
    else:
        image = m // (height * width)
        return image, (m // width) % height, m % width, image < batch


@triton.jit
def pixel_offset(image, row, column, stride_n, stride_h, stride_w, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """The offset of a pixel, a multiple of ALIGN; FLAT: as in `pixel`."""
    if FLAT:  # a sum with zeros would be folded, and the hint lost with it
        return tl.multiple_of(column * stride_w, ALIGN)
    else:
        return tl.multiple_of(image * stride_n + row * stride_h + column * stride_w, ALIGN)


@triton.jit
def as_mask(flags):
    """Flags of which some are of a tile and some scalars, as the mask of a load or store.

    Triton's interpreter makes int32 of a scalar flag that meets a tile, which its loads refuse from Triton 3.9 on.
    """
    return flags != 0


@triton.jit
def below(i, size):
    """0 <= i < size, as one comparison."""
    return tl.cast(i, tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def phase_taps(phase, KERNEL: tl.constexpr, CONV_STRIDE: tl.constexpr, PAD: tl.constexpr, COMMON: tl.constexpr,
               INVERSE: tl.constexpr):  # fmt: skip
    """The taps r with (phase + PAD - r * dilation) % CONV_STRIDE == 0: the first, and how many.

    COMMON = gcd(stride, dilation); the taps are CONV_STRIDE // COMMON apart, and INVERSE is the inverse of
    dilation // COMMON modulo that step.
    """
    STEP: tl.constexpr = CONV_STRIDE // COMMON
    reach = phase + PAD
    first = reach // COMMON * INVERSE % STEP
    count = tl.where(reach % COMMON == 0, (KERNEL - first + STEP - 1) // STEP, 0)
    return first, count


@triton.jit
def pointers(ptr, at, row, column, ALIGN: tl.constexpr):
    """A tile's pointers, moved by `row` and `column` elements, multiples of ALIGN; the caller has said so of row."""
    if ALIGN == 1:  # the column becomes an immediate of the load
        return ptr + (at + row) + column
    else:
        return ptr + (at + tl.multiple_of(row + column, ALIGN))


@triton.constexpr_function
def part_sizes(size):
    """The powers of two that add up to `size`, the largest first: a tile is no other width, so 112 is 64 + 32 + 16."""
    return [1 << bit for bit in range(size.bit_length() - 1, -1, -1) if size >> bit & 1]


@triton.constexpr_function
def part_count(size):
    """How many parts a width has."""
    return len(part_sizes(size))


@triton.jit
def part(first, SIZE: tl.constexpr, NUMBER: tl.constexpr):
    """The numbers from `first` on that a part of a width covers."""
    START: tl.constexpr = part_start(SIZE, NUMBER)
    COUNT: tl.constexpr = part_size(SIZE, NUMBER)
    return first + START + tl.arange(0, COUNT)


@triton.constexpr_function
def part_size(size, i):
    """The width of part i."""
    return part_sizes(size)[i]


@triton.constexpr_function
def part_start(size, i):
    """Where part i begins."""
    return sum(part_sizes(size)[:i])


@triton.jit
def part_zeros(ROWS: tl.constexpr, SIZE: tl.constexpr):
    """fp32 zeros, [ROWS, SIZE], as a tuple of tiles, one a part."""
    found = ()
    for i in tl.static_range(part_count(SIZE)):
        found = found + (tl.zeros((ROWS, part_size(SIZE, i)), tl.float32),)
    return found
