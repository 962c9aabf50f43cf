"""What ends fprop, on its fp32 sums before the one rounding: a residual, and an activation.

Source: own derivation; the activations are PyTorch's, with their default parameters.
"""

import triton
import triton.language as tl

from .tiles import narrow, turned

HALF_ROOT = tl.constexpr(0.7071067811865476)  # 1 / sqrt(2)
TWO_ROOTS = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """An activation of fp32 values, by its name; None leaves them. NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "relu6":
        return tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v))
    elif ACTIVATION == "leaky_relu":
        return tl.where(v < 0, 0.01 * v, v)
    elif ACTIVATION == "silu":
        return v * tl.sigmoid(v)
    elif ACTIVATION == "gelu":
        return 0.5 * v * (1 + tl.erf(v * HALF_ROOT))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        return v * tl.sigmoid((v + 0.044715 * v * v * v) * TWO_ROOTS)
    elif ACTIVATION == "hardswish":
        return v * tl.where(v < -3, 0.0, tl.where(v > 3, 1.0, (v + 3) * (1 / 6)))
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(v)
    else:
        tl.static_assert(ACTIVATION is None, "no such activation")
        return v


@triton.jit
def beside(to, y_ptr, other_ptr):
    """Where `to` points in y, in another tensor of its dtype and strides. Both begin at multiples of 16 bytes."""
    SIZE: tl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth // 8
    distance = (other_ptr.to(tl.int64) - y_ptr.to(tl.int64)) // SIZE
    return to + tl.multiple_of(distance, 16 // SIZE)


@triton.jit
def finish(
    to, v, mask, y_ptr, residual_ptr, kept_ptr, ACTIVATION: tl.constexpr, SWAP: tl.constexpr, EMULATE_BF16: tl.constexpr
):
    """Store activation(v + residual) where `to` points into y, and v + residual there in `kept`; v is turned if SWAP.

    residual_ptr, kept_ptr: of tensors of y's dtype and strides, or None.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if residual_ptr is not None:
        residual = tl.load(beside(to, y_ptr, residual_ptr), mask=mask, other=0.0)
        v += turned(residual, SWAP).to(tl.float32)
    if kept_ptr is not None:
        tl.store(beside(to, y_ptr, kept_ptr), turned(narrow(v, dtype, EMULATE_BF16), SWAP), mask=mask)
    y = narrow(activated(v, ACTIVATION), dtype, EMULATE_BF16)
    tl.store(to, turned(y, SWAP), mask=mask)
