"""The convolution where torch.func or forward-mode differentiation derives it, whose formulas PyTorch takes from here.

A convolution, its gradient by the input and that by the weight are linear in each of their two operands, and each one's
derivatives are the other two: three functions, closed under derivatives of any order and kind, and under vmap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import operators
from .arguments import ConvArgs
from .problem import dense_strides, suggests_channels_last


class _Call(NamedTuple):
    """What is no operand: shapes are of x and w, whichever is the result."""

    args: ConvArgs
    backend: str
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]

    def folded(self, size: int) -> _Call:
        """Of a batch of convolutions as one with so many times the groups."""
        (n, c, *map_), (k, *filter_) = self.x_shape, self.w_shape
        args = self.args._replace(groups=self.args.groups * size)
        return self._replace(args=args, x_shape=(n, c * size, *map_), w_shape=(k * size, *filter_))


class _Bilinear(torch.autograd.Function):
    """`product` of two operands. axes: where a batch of it is folded, in the first, the second and the result."""

    axes: tuple[int, int, int]

    @staticmethod
    def setup_context(ctx, inputs, output):
        first, second, ctx.call = inputs
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)

    @classmethod
    def vmap(cls, info, in_dims, first, second, call: _Call):
        size, (one, two, of_result) = info.batch_size, cls.axes
        first = operators.into_channels(first, in_dims[0], size, one)
        second = operators.into_channels(second, in_dims[1], size, two)
        return cls.apply(first, second, call.folded(size)).unflatten(of_result, (size, -1)), of_result

    @classmethod
    def jvp(cls, ctx, first_tangent, second_tangent, _):
        """The derivative along tangents, of which one may be None."""
        first, second = ctx.saved_tensors
        parts = []
        if first_tangent is not None:
            parts.append(cls.apply(first_tangent, second, ctx.call))
        if second_tangent is not None:
            parts.append(cls.apply(first, second_tangent, ctx.call))
        return sum(parts[1:], parts[0])


class Convolution(_Bilinear):
    """y of x and w."""

    axes = (1, 0, 1)

    @staticmethod
    def forward(x, w, call: _Call):
        return operators.conv2d(x, w, None, *call.args, call.backend)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        need_x, need_w, _ = ctx.needs_input_grad
        dx = GradientByInput.apply(dy, w, ctx.call) if need_x else None
        return dx, GradientByWeight.apply(dy, x, ctx.call) if need_w else None, None


class GradientByInput(_Bilinear):
    """dx of dy and w."""

    axes = (1, 0, 1)

    @staticmethod
    def forward(dy, w, call: _Call):
        channels_last = suggests_channels_last(dy.shape, dy.stride())
        x = dy.new_empty_strided(call.x_shape, dense_strides(call.x_shape, channels_last))  # read for its layout alone
        (dx,) = operators.conv2d_backward(dy, x, w, *call.args, [True, False, False], call.backend)
        return dx

    @staticmethod
    def backward(ctx, ddx):
        dy, w = ctx.saved_tensors
        need_dy, need_w, _ = ctx.needs_input_grad
        ddy = Convolution.apply(ddx, w, ctx.call) if need_dy else None
        return ddy, GradientByWeight.apply(dy, ddx, ctx.call) if need_w else None, None


class GradientByWeight(_Bilinear):
    """dw of dy and x."""

    axes = (1, 1, 0)

    @staticmethod
    def forward(dy, x, call: _Call):
        w = dy.new_empty(call.w_shape)
        (dw,) = operators.conv2d_backward(dy, x, w, *call.args, [False, True, False], call.backend)
        return dw

    @staticmethod
    def backward(ctx, ddw):
        dy, x = ctx.saved_tensors
        need_dy, need_x, _ = ctx.needs_input_grad
        ddy = Convolution.apply(x, ddw, ctx.call) if need_dy else None
        return ddy, GradientByInput.apply(dy, ddw, ctx.call) if need_x else None, None


def conv2d(x: Tensor, w: Tensor, bias: Tensor | None, args: ConvArgs, backend: str) -> Tensor:
    """The operator of this name."""
    return _plus(Convolution.apply(x, w, _Call(args, backend, tuple(x.shape), tuple(w.shape))), bias)


def conv_transpose2d(x: Tensor, w: Tensor, bias: Tensor | None, y_shape, args: ConvArgs, backend: str) -> Tensor:
    """The operator of this name, which is the gradient by the input of the convolution that `args` are of."""
    return _plus(GradientByInput.apply(x, w, _Call(args, backend, tuple(y_shape), tuple(w.shape))), bias)


def _plus(y: Any, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias[:, None, None]
