"""What follows the convolution in a call: a residual, an activation and a channel shuffle.

By the kernel that convolves, where a plan of ours makes the forward pass of plain tensors (kernels/epilogue.py), and
else by torch's functions. The shuffle is always torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, eager, torch_private
from .activations import ACTIVATIONS
from .arguments import autocast, autocast_dtype
from .call import Call
from .prepared import lookup


def applied(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """activation(y + residual), by torch; see triton_conv.

    Raises ValueError for an activation that there is not and a residual unlike y, TypeError for one that is no tensor.
    """
    _check(activation)
    if residual is not None:
        y = y + _like(y.shape, y.dtype, y.device, residual)
    return y if activation is None else ACTIVATIONS[activation].of(y)


def shuffled(y: Tensor, shuffle_groups: int) -> Tensor:
    """What nn.ChannelShuffle makes of [C, H, W] or [N, C, H, W]. ValueError and TypeError for groups that y has not."""
    if isinstance(shuffle_groups, bool) or not isinstance(shuffle_groups, int):
        raise TypeError(f"triton_conv: shuffle_groups is {shuffle_groups!r}, but must be an int")
    if shuffle_groups < 1 or y.shape[-3] % shuffle_groups:
        raise ValueError(f"triton_conv: shuffle_groups is {shuffle_groups}, but must divide the {y.shape[-3]} channels")
    if shuffle_groups == 1:
        return y
    return F.channel_shuffle(y if y.dim() == 4 else y.unsqueeze(0), shuffle_groups).reshape(y.shape)


def _check(activation: str | None) -> None:
    if activation is not None and activation not in tuple(ACTIVATIONS):
        raise ValueError(f"triton_conv: activation is {activation!r}, but must be one of {', '.join(ACTIVATIONS)}")


def _like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, residual: Tensor) -> Tensor:
    """A residual, under autocast in its dtype; ValueError if it is not of this shape, dtype and device."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"triton_conv: residual is of type {type(residual).__name__}, but must be a tensor or None")
    cast = autocast_dtype(residual, residual.device.type)
    residual = residual if cast is None else residual.to(cast)
    for name, theirs, ours in (
        ("shape", tuple(residual.shape), tuple(shape)),
        ("dtype", residual.dtype, dtype),
        ("device", residual.device, device),
    ):
        if theirs != ours:
            raise ValueError(f"triton_conv: residual's {name} is {theirs}, but must be y's, {ours}")
    return residual


# --- By the kernel that convolves ------------------------------------------------------------------------------------


def fused(
    x, w, bias, stride, padding, dilation, groups, backend: str, activation: str | None, residual: Tensor | None
) -> Tensor | None:
    """activation(convolution + residual) by one kernel, and derivable; None where torch's functions have to follow."""
    plain = not torch.compiler.is_compiling() and torch_private.being_traced() is None
    if not plain or not eager.is_plain(x, w, bias) or not eager.is_plain(x, w, residual):
        return None
    _check(activation)
    if torch_private.any_autocast():
        x, w, bias = autocast(x, w, bias)
    if backend not in dispatch.BACKENDS or not x.dim() == w.dim() == 4:
        return None
    call = lookup(x, w, bias, stride, padding, dilation, groups, backend)
    if call is None or call.torch_fprop:
        return None
    if residual is not None:
        residual = _like(call.problem.y_shape, x.dtype, x.device, residual)
    operands = (x, w, bias, residual)
    derived = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    keeps = derived and activation is not None and not ACTIVATIONS[activation].by_result
    run = call.finisher(x, w, bias, activation, residual is not None, keeps)
    if run is None:
        return None
    if derived:
        found = _apply_function(x, w, bias, residual, call, run, activation, keeps)
        return found[0] if keeps else found
    return call.finish(run, x, w, bias, residual, activation, False)


class _FinishedFunction(torch.autograd.Function):
    """y, and what its activation is of where the derivative wants that: a result too, so that it is derivable."""

    @staticmethod
    def forward(ctx, x, w, bias, residual, call: Call, run, activation, keeps):
        ctx.set_materialize_grads(False)
        found = call.finish(run, x, w, bias, residual, activation, keeps)
        read = found[1] if keeps else found if activation is not None else None
        save_x, save_w = call.saves(*ctx.needs_input_grad[:2])
        ctx.save_for_backward(x if save_x else None, w if save_w else None, read)
        ctx.call, ctx.activation = call, activation
        return found

    @staticmethod
    def backward(ctx, dy, d_kept=None):
        x, w, read = ctx.saved_tensors
        dv = dy if dy is None or ctx.activation is None else ACTIVATIONS[ctx.activation].derivative(dy, read)
        if d_kept is not None:
            dv = d_kept if dv is None else dv + d_kept
        if dv is None:
            return (None,) * 8
        needs = eager.wanted(ctx)
        grads = eager.gradients(ctx.call, dv, x, w, needs) if any(needs) else (None, None, None)
        return *grads, dv if ctx.needs_input_grad[3] else None, None, None, None, None


_apply_function = torch_private.direct_apply(_FinishedFunction)
