"""The activations of triton_conv: PyTorch's functions, with their default parameters, and their derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


class Activation(NamedTuple):
    """of: what it makes of a tensor. derivative: the gradient of that tensor, of (the result's gradient, the tensor).

    by_result: the result does for the tensor in `derivative`, so that only the result need be kept.
    """

    of: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]
    by_result: bool


def _silu_derivative(dy: Tensor, v: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.silu_backward(dy, v)
    sigmoid = torch.sigmoid(v)  # in terms that are derivable in turn, which silu_backward is not
    return dy * sigmoid * (1 + v * (1 - sigmoid))


ACTIVATIONS = {
    "relu": Activation(F.relu, lambda dy, y: _aten.threshold_backward(dy, y, 0), True),
    "relu6": Activation(F.relu6, lambda dy, y: _aten.hardtanh_backward(dy, y, 0, 6), True),
    "leaky_relu": Activation(F.leaky_relu, lambda dy, y: _aten.leaky_relu_backward(dy, y, 0.01, False), True),
    "silu": Activation(F.silu, _silu_derivative, False),
    "gelu": Activation(F.gelu, _aten.gelu_backward, False),
    "gelu_tanh": Activation(
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(_aten.gelu_backward, approximate="tanh"), False,
    ),
    "hardswish": Activation(F.hardswish, _aten.hardswish_backward, False),
    "sigmoid": Activation(torch.sigmoid, _aten.sigmoid_backward, True),
}  # fmt: skip


def finished_by_torch(v: Tensor, residual: Tensor | None, activation: str | None, keeps: bool):
    """y = activation(v + residual), or, if it keeps that, (y, what the activation is of)."""
    v = v if residual is None else v + residual
    y = v if activation is None else ACTIVATIONS[activation].of(v)
    return (y, v) if keeps else y


def before_activation(dy: Tensor | None, d_kept: Tensor | None, read: Tensor | None, activation: str | None):
    """The gradient of what an activation is of, from those of its result and of itself, each None if there is none.

    read: what the derivative is of; see `Activation`.
    """
    dv = dy
    if dy is not None and activation is not None:
        assert read is not None
        dv = ACTIVATIONS[activation].derivative(dy, read)
    return dv if d_kept is None else d_kept if dv is None else dv + d_kept
