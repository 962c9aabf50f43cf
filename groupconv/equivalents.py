"""What our operators are equivalent to, for tools that read a program's operators: FLOP counters, ONNX's exporter."""

from __future__ import annotations

import torch

from . import native, torch_private
from ._ops import ops
from .activations import finished_by_torch

try:
    from torch.utils import flop_counter
except Exception:  # it imports Triton, and fails where that is broken: then nobody counts
    flop_counter = None  # type: ignore[assignment]


def register() -> None:
    """Tell PyTorch of the operators' FLOPs and of the convolution in the other terms; they must be defined by now."""
    if torch_private.register_decomposition is not None:
        torch_private.register_decomposition(ops.conv2d.default)(_decomposed)
        torch_private.register_decomposition(ops.conv2d_finished.default)(_decomposed_finished)
        torch_private.register_decomposition(ops.conv_transpose2d.default)(_decomposed_transposed)
    if flop_counter is not None:
        flop_counter.register_flop_formula(ops.conv2d)(_forward_flops)
        flop_counter.register_flop_formula(ops.conv2d_finished)(_finished_flops)
        flop_counter.register_flop_formula(ops.conv2d_backward)(_backward_flops)
        flop_counter.register_flop_formula(ops.conv_transpose2d)(_transposed_flops)


def _forward_flops(x_shape, w_shape, *_, out_shape) -> int:
    return flop_counter.conv_flop_count(x_shape, w_shape, out_shape)


def _finished_flops(x_shape, w_shape, *_, out_shape) -> int:
    return flop_counter.conv_flop_count(x_shape, w_shape, out_shape[0])


def _transposed_flops(x_shape, w_shape, *_, out_shape) -> int:
    return flop_counter.conv_flop_count(x_shape, w_shape, out_shape, transposed=True)


def _backward_flops(dy_shape, x_shape, w_shape, stride, padding, dilation, groups, mask, backend, *, out_shape) -> int:
    """PyTorch's own formula, which leaves the groups out of wgrad: figures are there to be compared with F.conv2d's."""
    shapes = iter(out_shape)
    grads = [next(shapes) if needed else None for needed in mask]
    return flop_counter.flop_registry[torch.ops.aten.convolution_backward](
        dy_shape, x_shape, w_shape, None, stride, (0, 0), dilation, False, (0, 0), groups, mask, out_val=grads
    )


def _decomposed(x, w, bias, stride, padding, dilation, groups, backend):
    return native.conv2d(x, w, bias, stride, padding, dilation, groups)


def _decomposed_finished(x, w, bias, residual, activation, keeps, stride, padding, dilation, groups, backend):
    v = _decomposed(x, w, bias, stride, padding, dilation, groups, backend)
    found = finished_by_torch(v, residual, activation, keeps)
    return found if keeps else (found, x.new_empty(0))


def _decomposed_transposed(x, w, bias, stride, padding, output_padding, dilation, groups, backend):
    return torch.conv_transpose2d(x, w, bias, stride, padding, output_padding, groups, dilation)
