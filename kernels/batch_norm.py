"""Batch norm and the activation after it, in training: statistics, both in one pass, and their gradients.

A tensor is dense, [images, channels, pixels] in this order, or, of CHANNELS_LAST, one image of all pixels, each with
its channels. A tile is [BLOCK_C, BLOCK_P]; a step is a tile's pixels, which never are of two images. ALIGN is the power
of two, up to 16, that divides the pixels of an image, or the channels of CHANNELS_LAST. Offsets are int32 unless
INDEX_64 is set. Programs are of a step, or of several, by blocks of channels. All is summed in fp32 in a fixed order.
Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979; own
derivation.
"""

import triton
import triton.language as tl

from .epilogue import HALF_ROOT, TWO_ROOTS, activated
from .tiles import index, narrow

ROOT = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 * pi)
SIZES = ("images", "channels", "pixels", "steps", "steps_each")


@triton.jit
def derivative(u, ACTIVATION: tl.constexpr):
    """That of an activation at u, where PyTorch's has it on either side of a corner."""
    if ACTIVATION == "relu":
        return tl.where(u <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu6":
        return tl.where((u <= 0) | (u >= 6), 0.0, 1.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(u > 0, 1.0, 0.01)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(u)
        return s * (1 + u * (1 - s))
    elif ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(u * HALF_ROOT)) + u * ROOT * tl.exp(-0.5 * u * u)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid((u + 0.044715 * u * u * u) * TWO_ROOTS)
        return s + u * s * (1 - s) * (1 + 3 * 0.044715 * u * u) * TWO_ROOTS
    elif ACTIVATION == "hardswish":
        return tl.where(u <= -3, 0.0, tl.where(u < 3, u * (1 / 3) + 0.5, 1.0))
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(u)
        return s * (1 - s)
    else:
        tl.static_assert(ACTIVATION is None, "no such activation")
        return tl.full(u.shape, 1.0, tl.float32)


@triton.jit
def tile(
    step, c, channels, pixels,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(offsets, mask) of a step's tile of channels c, [BLOCK_C, BLOCK_P]."""
    each = tl.cdiv(pixels, BLOCK_P)
    p = (step % each) * BLOCK_P + tl.arange(0, BLOCK_P)
    if CHANNELS_LAST:  # that ALIGN neighbours are there or not together is what makes an access wide
        mask = (c // ALIGN * ALIGN < channels)[:, None] & (p < pixels)[None, :]
        return c[:, None] + tl.multiple_of(index(p, INDEX_64) * channels, [ALIGN])[None, :], mask
    else:
        mask = (c < channels)[:, None] & (p // ALIGN * ALIGN < pixels)[None, :]
        row = index(step // each, INDEX_64) * channels + c
        return tl.multiple_of(row * pixels, [ALIGN])[:, None] + p[None, :], mask


@triton.jit
def pixels_before(step, pixels, BLOCK_P: tl.constexpr):
    """How many pixels the steps before one have."""
    each = tl.cdiv(pixels, BLOCK_P)
    return (step // each) * pixels + tl.minimum((step % each) * BLOCK_P, pixels)


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    y_ptr, partial_ptr, images, channels, pixels, steps, steps_each,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances from it, of the pixels of some steps: partial[:, split, channel].

    Summed are distances from the first step's mean, so that squares of a mean far from 0 do not cancel.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(0) * steps_each
    last = tl.minimum(first + steps_each, steps)
    at, mask = tile(first, c, channels, pixels, CHANNELS_LAST, ALIGN, INDEX_64, BLOCK_P)
    count = (pixels_before(first + 1, pixels, BLOCK_P) - pixels_before(first, pixels, BLOCK_P)).to(tl.float32)
    shift = tl.sum(tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32), 1) / count
    sums = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for step in range(first, last):
        at, mask = tile(step, c, channels, pixels, CHANNELS_LAST, ALIGN, INDEX_64, BLOCK_P)
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        distance = tl.where(mask, y - shift[:, None], 0.0)
        sums += distance
        squares += distance * distance
    count = (pixels_before(last, pixels, BLOCK_P) - pixels_before(first, pixels, BLOCK_P)).to(tl.float32)
    total = tl.sum(sums, 1)
    to = tl.program_id(0) * channels + c
    tl.store(partial_ptr + to, shift + total / count, mask=c < channels)
    rest = tl.sum(squares, 1) - total * (total / count)
    tl.store(partial_ptr + tl.num_programs(0) * channels + to, tl.where(rest < 0, 0.0, rest), mask=c < channels)


@triton.jit(do_not_specialize=SIZES + ("splits", "eps", "factor"))
def merge_kernel(
    partial_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    images, channels, pixels, steps, steps_each, splits, eps, factor,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of all pixels, of partials; and the running ones, moved there by a factor."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, SPLITS)
    begin = tl.minimum(split * steps_each, steps)
    end = tl.minimum(begin + steps_each, steps)
    counts = pixels_before(end, pixels, BLOCK_P) - pixels_before(begin, pixels, BLOCK_P)
    counts = tl.where(split < splits, counts, 0).to(tl.float32)[:, None]
    total = (images * pixels).to(tl.float32)
    at = split[:, None] * channels + c[None, :]
    mask = (split < splits)[:, None] & (c < channels)[None, :]
    means = tl.load(partial_ptr + at, mask=mask, other=0.0)
    rests = tl.load(partial_ptr + splits * channels + at, mask=mask, other=0.0)
    near = tl.load(partial_ptr + c, mask=c < channels, other=0.0)
    mean = near + tl.sum(counts * (means - near[None, :]), 0) / total
    apart = means - mean[None, :]
    rest = tl.sum(rests + counts * apart * apart, 0)
    tl.store(mean_ptr + c, mean, mask=c < channels)
    tl.store(rstd_ptr + c, 1 / tl.sqrt_rn(rest / total + eps), mask=c < channels)
    if running_mean_ptr is not None:
        before = tl.load(running_mean_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
        tl.store(running_mean_ptr + c, before + factor * (mean - before), mask=c < channels)
    if running_var_ptr is not None:
        before = tl.load(running_var_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
        tl.store(running_var_ptr + c, before + factor * (rest / (total - 1) - before), mask=c < channels)


@triton.jit
def per_channel(ptr, c, channels, otherwise: tl.constexpr):
    """A number a channel as a column, or what is there otherwise."""
    if ptr is None:
        return tl.full((c.shape[0], 1), otherwise, tl.float32)
    else:
        return tl.load(ptr + c, mask=c < channels, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    y_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, z_ptr,
    images, channels, pixels, steps, steps_each,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    EMULATE_BF16: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """z = activation((y - mean) * rstd * gamma + beta)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at, mask = tile(tl.program_id(0), c, channels, pixels, CHANNELS_LAST, ALIGN, INDEX_64, BLOCK_P)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = per_channel(rstd_ptr, c, channels, 1.0) * per_channel(gamma_ptr, c, channels, 1.0)
    u = (y - per_channel(mean_ptr, c, channels, 0.0)) * scale + per_channel(beta_ptr, c, channels, 0.0)
    tl.store(z_ptr + at, narrow(activated(u, ACTIVATION), z_ptr.dtype.element_ty, EMULATE_BF16), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(
    dz_ptr, y_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, partial_ptr,
    images, channels, pixels, steps, steps_each,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The sums that are dbeta and dgamma, of the pixels of some steps: partial[:, split, channel]."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(0) * steps_each
    mean, rstd = per_channel(mean_ptr, c, channels, 0.0), per_channel(rstd_ptr, c, channels, 1.0)
    gamma, beta = per_channel(gamma_ptr, c, channels, 1.0), per_channel(beta_ptr, c, channels, 0.0)
    d_beta = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    d_gamma = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for step in range(first, tl.minimum(first + steps_each, steps)):
        at, mask = tile(step, c, channels, pixels, CHANNELS_LAST, ALIGN, INDEX_64, BLOCK_P)
        normal = (tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        du = tl.load(dz_ptr + at, mask=mask, other=0.0).to(tl.float32) * derivative(normal * gamma + beta, ACTIVATION)
        du = tl.where(mask, du, 0.0)
        d_beta += du
        d_gamma += du * normal
    to = tl.program_id(0) * channels + c
    tl.store(partial_ptr + to, tl.sum(d_beta, 1), mask=c < channels)
    tl.store(partial_ptr + tl.num_programs(0) * channels + to, tl.sum(d_gamma, 1), mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    dz_ptr, y_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, sums_ptr, dy_ptr,
    images, channels, pixels, steps, steps_each,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, INDEX_64: tl.constexpr,
    EMULATE_BF16: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dy. sums: dbeta and dgamma, [2, channels], where y's own statistics normalised it."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at, mask = tile(tl.program_id(0), c, channels, pixels, CHANNELS_LAST, ALIGN, INDEX_64, BLOCK_P)
    rstd, gamma = per_channel(rstd_ptr, c, channels, 1.0), per_channel(gamma_ptr, c, channels, 1.0)
    normal = (tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) - per_channel(mean_ptr, c, channels, 0.0)) * rstd
    u = normal * gamma + per_channel(beta_ptr, c, channels, 0.0)
    du = tl.load(dz_ptr + at, mask=mask, other=0.0).to(tl.float32) * derivative(u, ACTIVATION)
    if sums_ptr is not None:
        count = (images * pixels).to(tl.float32)
        d_beta = per_channel(sums_ptr, c, channels, 0.0)
        d_gamma = per_channel(sums_ptr + channels, c, channels, 0.0)
        du -= (d_beta + normal * d_gamma) / count
    tl.store(dy_ptr + at, narrow(du * (rstd * gamma), dy_ptr.dtype.element_ty, EMULATE_BF16), mask=mask)
