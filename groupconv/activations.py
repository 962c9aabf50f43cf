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
