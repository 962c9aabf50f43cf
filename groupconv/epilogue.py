"""What follows the convolution in a call: a residual, an activation and a channel shuffle, by torch's functions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import autocast_dtype

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}


def applied(y: Tensor, activation: str | None, residual: Tensor | None, shuffle_groups: int) -> Tensor:
    """shuffle(activation(y + residual)), y being [C, H, W] or [N, C, H, W]; see triton_conv.

    Raises ValueError for an activation that there is not, a residual unlike y, and groups that y has not; TypeError for
    a residual that is no tensor, and groups that are no int.
    """
    if activation is not None and activation not in tuple(ACTIVATIONS):
        raise ValueError(f"triton_conv: activation is {activation!r}, but must be one of {', '.join(ACTIVATIONS)}")
    if isinstance(shuffle_groups, bool) or not isinstance(shuffle_groups, int):
        raise TypeError(f"triton_conv: shuffle_groups is {shuffle_groups!r}, but must be an int")
    if shuffle_groups < 1 or y.shape[-3] % shuffle_groups:
        raise ValueError(f"triton_conv: shuffle_groups is {shuffle_groups}, but must divide the {y.shape[-3]} channels")
    if residual is not None:
        y = y + _like(y, residual)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if shuffle_groups == 1:
        return y
    return F.channel_shuffle(y if y.dim() == 4 else y.unsqueeze(0), shuffle_groups).reshape(y.shape)


def _like(y: Tensor, residual: Tensor) -> Tensor:
    """A residual, under autocast in its dtype; ValueError if it is not of y's shape, dtype and device."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"triton_conv: residual is of type {type(residual).__name__}, but must be a tensor or None")
    dtype = autocast_dtype(residual, residual.device.type)
    residual = residual if dtype is None else residual.to(dtype)
    for name in ("shape", "dtype", "device"):
        theirs, ours = getattr(residual, name), getattr(y, name)
        if theirs != ours:
            shown = [tuple(value) if name == "shape" else value for value in (theirs, ours)]
            raise ValueError(f"triton_conv: residual's {name} is {shown[0]}, but must be y's, {shown[1]}")
    return residual
