"""F.conv2d's arguments: which it takes, in one form, and what the tensors must agree in."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import dense_strides, output_size, suggests_channels_last


class ConvArgs(NamedTuple):
    """F.conv2d's arguments in one form: padding is top, bottom, left, right."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


def integer(value) -> int | None:
    """The value as an int if F.conv2d takes it for one: numpy's and tensors of one integer too, but no bool."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor):
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
        return int(value) if whole and value.numel() == 1 else None
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def pair(value) -> tuple[int, int] | None:
    """An integer, a pair, or a sequence of one, as PyTorch takes them; None for anything else."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    if isinstance(value, (tuple, list)):
        sizes = [integer(v) for v in value]
        return (sizes[0], sizes[-1]) if len(sizes) in (1, 2) and None not in sizes else None  # type: ignore[return-value]
    both = integer(value)
    return None if both is None else (both, both)


def sides(value) -> tuple[int, ...] | None:
    """Padding: an integer or a pair, or each of the four sides; None for anything else."""
    if isinstance(value, (tuple, list)) and len(value) == 4:
        sizes = tuple(integer(v) for v in value)
        return None if None in sizes else sizes  # type: ignore[return-value]
    return pair(value)


def plain(stride, padding, dilation, groups) -> tuple[Any, Any, Any, Any] | None:
    """The arguments as pairs and integers, padding perhaps four or a str; None if one of them is neither."""
    padding = padding if isinstance(padding, str) else sides(padding)
    arguments = pair(stride), padding, pair(dilation), integer(groups)
    return None if None in arguments else arguments


def normalise(x_shape, w_shape, stride, padding, dilation, groups) -> ConvArgs | None:
    """The call's arguments in one form, or None if there is no such convolution of 4-D tensors of these shapes."""
    arguments = plain(stride, padding, dilation, groups)
    if arguments is None or len(x_shape) != 4 or len(w_shape) != 4:
        return None
    stride, padding, dilation, groups = arguments
    if padding == "same":
        if stride != (1, 1):
            return None
        # An even kernel's odd pixel of padding goes to the bottom and right.
        total = [d * (k - 1) for d, k in zip(dilation, w_shape[2:], strict=True)]
        pad = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        both = (0, 0) if padding == "valid" else padding
        if isinstance(both, str):
            return None
        pad = tuple(both) if len(both) == 4 else (both[0], both[0], both[1], both[1])
    args = ConvArgs(stride, pad, dilation, groups)
    return args if is_convolution(x_shape, w_shape, args) else None


class TransposedArgs(NamedTuple):
    """F.conv_transpose2d's arguments in one form."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def convolution(self) -> ConvArgs:
        """The convolution whose gradient by its input this is."""
        top, left = self.padding
        return ConvArgs(self.stride, (top, top, left, left), self.dilation, self.groups)

    def y_shape(self, x_shape, w_shape) -> tuple[int, int, int, int]:
        """That of the result."""
        h, w = (
            (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + more + 1
            for size, kernel, stride, padding, dilation, more in zip(
                x_shape[2:], w_shape[2:], self.stride, self.padding, self.dilation, self.output_padding, strict=True
            )
        )
        return x_shape[0], w_shape[1] * self.groups, h, w


def normalise_transposed(x_shape, w_shape, stride, padding, output_padding, dilation, groups) -> TransposedArgs | None:
    """The call's arguments in one form, or None if 4-D tensors of these shapes have no convolution that it derives."""
    arguments: tuple[Any, ...] = (*map(pair, (stride, padding, output_padding, dilation)), integer(groups))
    if None in arguments or len(x_shape) != 4 or len(w_shape) != 4 or arguments[-1] < 1:
        return None
    args = TransposedArgs(*arguments)
    y_shape = args.y_shape(x_shape, w_shape)
    if x_shape[1] != w_shape[0] or min(args.output_padding) < 0 or min(y_shape[1:]) < 1:
        return None
    if not is_convolution(y_shape, w_shape, args.convolution):
        return None
    # Output padding of a stride or more (which a dilation allows) is no part of such a convolution's input.
    _, padding, dilation, _ = args.convolution
    return args if out_pixels(y_shape, w_shape, args.stride, padding, dilation) == tuple(x_shape[2:]) else None


def is_convolution(x_shape, w_shape, args: ConvArgs) -> bool:
    """Whether 4-D tensors of these shapes can be convolved so."""
    if min(*args.stride, *args.dilation, args.groups, *w_shape) < 1 or min(args.padding) < 0:
        return False
    if x_shape[1] != args.groups * w_shape[1] or w_shape[0] % args.groups or min(x_shape[1:]) < 1:
        return False
    return min(out_pixels(x_shape, w_shape, args.stride, args.padding, args.dilation)) >= 1


def out_pixels(x_shape, w_shape, stride, padding, dilation):
    """(height, width) of the output."""
    top, bottom, left, right = padding
    return (
        output_size(x_shape[2], w_shape[2], stride[0], top + bottom, dilation[0]),
        output_size(x_shape[3], w_shape[3], stride[1], left + right, dilation[1]),
    )


def are_tensors(x, w, bias) -> bool:
    """Whether the operands are tensors, and none of them a nested one, which has no shape; the bias may be None."""
    operands = (x, w) if bias is None else (x, w, bias)
    return all(isinstance(tensor, Tensor) and not tensor.is_nested for tensor in operands)


def consistent(x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Whether dtypes, devices and the bias's shape agree, as F.conv2d demands, and all is dense."""
    if any(t is not None and t.layout is not torch.strided for t in (x, w, bias)):
        return False
    if x.dtype != w.dtype or x.device != w.device:
        return False
    return bias is None or (bias.dtype == x.dtype and bias.device == x.device and bias.shape == w.shape[:1])


def autocast(x: Tensor, w: Tensor, bias: Tensor | None):
    """(x, w, bias) as autocast has F.conv2d take them."""

    def cast(tensor):
        dtype = autocast_dtype(tensor, x.device.type)
        return tensor if dtype is None else tensor.to(dtype)

    return cast(x), cast(w), cast(bias)


def autocast_dtype(tensor: Tensor | None, kind: str) -> torch.dtype | None:
    """What autocast of a kind of devices, where it is on, makes of an operand: floating point, but not double."""
    if tensor is None or tensor.device.type != kind or not tensor.is_floating_point():
        return None
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # of meta tensors torch knows no autocast
        return None
    return None if tensor.dtype == torch.float64 else torch.get_autocast_dtype(kind)


def out_channels_last(x: Tensor, w: Tensor) -> bool:
    """Whether y and dx are channels_last, as F.conv2d has them: ATen's word for it, whatever kernels read."""
    return suggests_channels_last(x.shape, x.stride()) or suggests_channels_last(w.shape, w.stride())


def dx_strides(x: Tensor, w: Tensor) -> tuple[int, int, int, int]:
    """Element strides of the gradient by x, as F.conv2d has them."""
    return dense_strides(x.shape, out_channels_last(x, w))


def dw_strides(w: Tensor) -> tuple[int, int, int, int]:
    """Element strides of the gradient by w, as F.conv2d has them."""
    return dense_strides(w.shape, suggests_channels_last(w.shape, w.stride()))
