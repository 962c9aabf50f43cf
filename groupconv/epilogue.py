"""What follows the convolution in a call: a residual, an activation and a channel shuffle.

By the kernel that convolves, where a plan of ours makes the forward pass of plain tensors (kernels/epilogue.py), and
else by torch's functions. The shuffle is always torch's.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, eager, operators, torch_private
from .activations import ACTIVATIONS, before_activation, finished_by_torch
from .arguments import are_tensors, autocast, autocast_dtype, consistent, normalise, out_pixels
from .call import Call
from .prepared import lookup, refusal


def applied(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """activation(y + residual), by torch; see triton_conv.

    Raises ValueError for an activation that there is not and a residual unlike y, TypeError for one that is no tensor.
    """
    check_activation(activation)
    if residual is not None:
        residual = _like(y.shape, y.dtype, y.device, residual)
    return finished_by_torch(y, residual, activation, False)


def shuffled(y: Tensor, shuffle_groups: int) -> Tensor:
    """What nn.ChannelShuffle makes of [C, H, W] or [N, C, H, W]. ValueError and TypeError for groups that y has not."""
    _check_shuffle(shuffle_groups, y.shape[-3])
    if shuffle_groups == 1:
        return y
    return F.channel_shuffle(y if y.dim() == 4 else y.unsqueeze(0), shuffle_groups).reshape(y.shape)


def check_activation(activation: str | None, function: str = "triton_conv") -> None:
    """ValueError for one that there is not."""
    if activation is not None and activation not in tuple(ACTIVATIONS):
        raise ValueError(f"{function}: activation is {activation!r}, but must be one of {', '.join(ACTIVATIONS)}")


def _check_shuffle(groups: int, channels: int) -> None:
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"triton_conv: shuffle_groups is {groups!r}, but must be an int")
    if groups < 1 or (groups > 1 and channels % groups):  # torch.jit traces sizes, and warns of a question
        raise ValueError(f"triton_conv: shuffle_groups is {groups}, but must divide the {channels} channels")


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


def told(
    plan: dispatch.Plan, x, w, bias, activation: str | None, residual: Tensor | None, shuffle_groups: int
) -> str:  # fmt: skip
    """How what follows a planned convolution is computed. Raises what triton_conv does for the same arguments."""
    check_activation(activation)
    _check_shuffle(shuffle_groups, plan.problem.c_out)
    if residual is not None:
        residual = _like(plan.problem.y_shape[-x.dim() :], w.dtype, x.device, residual)
    kept = _keeps((x, w, bias, residual), activation)
    ended = dataclasses.replace(plan.problem, activation=activation, residual=residual is not None, keeps=kept)
    parts = []
    if ended.ends:
        names = [*(["the residual"] if ended.residual else []), *([activation] if activation else [])]
        config, how = None, "by torch's functions, as for one image without its axis"
        if x.dim() == 4:
            config, how = dispatch.finished(ended, plan.fprop, plan.target)
        mb = (f"{ended.ended_bytes(apart) / 1e6:.2f} MB" for apart in (config is None, True))
        moved = " where functions apart move ".join(dict.fromkeys(mb))
        parts.append(f"then {' and '.join(names)} {how}, {moved} together (modelled)")
    if shuffle_groups != 1:
        parts.append("the shuffle by nn.ChannelShuffle's copy")
    return "; ".join(parts)


# --- By the kernel that convolves ------------------------------------------------------------------------------------


def fused(
    x, w, bias, stride, padding, dilation, groups, backend: str, activation: str | None, residual: Tensor | None
) -> Tensor | None:
    """activation(convolution + residual) by one kernel, and derivable; None where torch's functions have to follow."""
    if torch.compiler.is_compiling():
        return _in_a_graph(x, w, bias, stride, padding, dilation, groups, backend, activation, residual)
    if torch_private.being_traced() is not None or not eager.is_plain(x, w, bias) or not eager.is_plain(x, w, residual):
        return None
    check_activation(activation)
    if torch_private.any_autocast():
        x, w, bias = autocast(x, w, bias)
    if backend not in dispatch.BACKENDS or not x.dim() == w.dim() == 4:
        return None
    call = lookup(x, w, bias, stride, padding, dilation, groups, backend)
    if call is None or call.torch_fprop:
        return None
    if residual is not None:
        residual = _like(call.problem.y_shape, x.dtype, x.device, residual)
    derived, keeps = _derived((x, w, bias, residual)), _keeps((x, w, bias, residual), activation)
    run = call.finisher(x, w, bias, activation, residual is not None, keeps)
    if run is None:
        return None
    if derived:
        found = _apply_function(x, w, bias, residual, call, run, activation, keeps)
        return found[0] if keeps else found
    return call.finish(run, x, w, bias, residual, activation, False)


def _in_a_graph(
    x, w, bias, stride, padding, dilation, groups, backend: str, activation: str | None, residual: Tensor | None
) -> Tensor | None:  # fmt: skip
    """`fused` as one operator of a graph that is compiled for a GPU; None where functions have to follow."""
    check_activation(activation)
    if torch_private.is_transformed():
        return None
    forced = backend.startswith("triton")
    if not are_tensors(x, w, bias) or not x.dim() == w.dim() == 4 or not (forced or (x.is_cuda and backend == "auto")):
        return None
    x, w, bias = autocast(x, w, bias)
    args = normalise(x.shape, w.shape, stride, padding, dilation, groups)
    if args is None or not consistent(x, w, bias) or refusal(x, backend) is not None:
        return None
    if residual is not None:
        shape = (x.shape[0], w.shape[0], *out_pixels(x.shape, w.shape, args.stride, args.padding, args.dilation))
        residual = _like(shape, x.dtype, x.device, residual)
    keeps = _keeps((x, w, bias, residual), activation)
    return operators.conv2d_finished(x, w, bias, residual, activation, keeps, *args, backend)[0]


def _derived(operands: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)


def _keeps(operands: tuple[Tensor | None, ...], activation: str | None) -> bool:
    """Whether what the activation is of has to be stored, for its derivative."""
    return activation is not None and not ACTIVATIONS[activation].by_result and _derived(operands)


class GroupedConv2dFinished(torch.autograd.Function):
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
        dv = before_activation(dy, d_kept, read, ctx.activation)
        if dv is None:
            return (None,) * 8
        needs = eager.wanted(ctx)
        grads = eager.gradients(ctx.call, dv, x, w, needs) if any(needs) else (None, None, None)
        return *grads, dv if ctx.needs_input_grad[3] else None, None, None, None, None


_apply_function = torch_private.direct_apply(GroupedConv2dFinished)
