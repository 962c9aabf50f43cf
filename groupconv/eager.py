"""The way of a call: plain tensors go straight to a prepared call, all others through PyTorch's dispatcher.

Straight: one dictionary lookup and one launch, inside one autograd.Function where gradients will be wanted. Whatever
traces, transforms, watches or subclasses a call takes the operators, which end in the same prepared calls.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import native, operators, sharded, torch_private, transforms
from .arguments import ConvArgs, are_tensors, autocast, consistent, normalise
from .call import PLAIN_TYPES, Call, torch_gradients
from .prepared import lookup, refusal


def conv2d(x, w, bias, stride, padding, dilation, groups, backend) -> Tensor:
    """triton_conv without the fused extras; the arguments are unchecked."""
    if torch.compiler.is_compiling() or not is_plain(x, w, bias):
        return _dispatched(x, w, bias, stride, padding, dilation, groups, backend)
    if torch_private.any_autocast():
        x, w, bias = autocast(x, w, bias)
    if x.dim() == 3 and w.dim() == 4 and not x.is_nested:
        call = lookup(x.unsqueeze(0), w, bias, stride, padding, dilation, groups, backend)
        if call is not None:
            return conv2d(x.unsqueeze(0), w, bias, stride, padding, dilation, groups, backend).squeeze(0)
    elif x.dim() == 4 and w.dim() == 4:
        call = lookup(x, w, bias, stride, padding, dilation, groups, backend)
    else:
        call = None
    if call is None:
        return _dispatched(x, w, bias, stride, padding, dilation, groups, backend)
    derived = x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and derived:
        if not call.all_torch:
            return _apply_function(x, w, bias, call)
    elif not call.torch_fprop:
        return call.forward(x, w, bias)
    return native.conv2d(x, w, bias, stride, padding, dilation, groups)


def is_plain(x, w, bias) -> bool:
    """Whether the operands are plain dense tensors that nothing watches: no subclass, mode or transform."""
    return (
        type(x) in PLAIN_TYPES
        and type(w) in PLAIN_TYPES
        and (bias is None or (type(bias) in PLAIN_TYPES and bias.layout is torch.strided))
        and x.layout is w.layout is torch.strided
        and not torch_private.is_watched()
    )


# --- Plain tensors: autograd -----------------------------------------------------------------------------------------


class GroupedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, call):
        need_x, need_w = ctx.needs_input_grad[:2]
        save_x, save_w = call.saves(need_x, need_w)
        ctx.save_for_backward(x if save_x else None, w if save_w else None)
        ctx.call = call
        return call.forward(x, w, bias)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return *gradients(ctx.call, dy, x, w, wanted(ctx)), None


_apply_function = torch_private.direct_apply(GroupedConv2d)


def wanted(ctx) -> tuple[bool, bool, bool]:
    """Which of dx, dw and db the engine is going to use: autograd.grad(y, x) has no need of dw."""
    need_x, need_w, need_b, *others = ctx.needs_input_grad
    if need_x + need_w + need_b + sum(others) > 1:  # it would not have come for nothing
        nodes = ctx.next_functions
        need_x = need_x and torch_private.is_going_to_run(nodes[0][0])
        need_w = need_w and torch_private.is_going_to_run(nodes[1][0])
        need_b = need_b and torch_private.is_going_to_run(nodes[2][0])
    return need_x, need_w, need_b


def gradients(call: Call, dy, x, w, needs: tuple[bool, bool, bool]):
    """(dx, dw, db), each None unless needed, of what a call saved; by its own launches where they can be."""
    if not torch.is_grad_enabled() and not torch_private.dispatch_modes():
        grads = call.backward(dy, x, w, needs)
        if grads is not None:
            return grads
    # The operator knows its own derivative, and any tensor. It takes the shapes of what was not saved.
    return _dispatched_gradients(dy, *call.in_place_of_unsaved(x, w), call.args, needs, call.backend)


def _dispatched_gradients(dy, x, w, args: ConvArgs, needs, backend: str):
    """(dx, dw, db), each None unless needed, through PyTorch's dispatcher."""
    if not all(map(knows_operators, (dy, x, w))):
        return torch_gradients(dy, x, w, args, needs)
    grads = iter(operators.conv2d_backward(dy, x, w, *args, list(needs), backend))
    return tuple(next(grads) if needed else None for needed in needs)


# --- All others: PyTorch's dispatcher --------------------------------------------------------------------------------


def _dispatched(x, w, bias, stride, padding, dilation, groups, backend) -> Tensor:
    """The call through PyTorch's dispatcher, for whatever traces, transforms or subclasses it."""
    if are_tensors(x, w, bias) and backend != "torch":
        x, w, bias = autocast(x, w, bias)
        unbatched = x.dim() == 3
        batched = x.unsqueeze(0) if unbatched else x
        args = normalise(batched.shape, w.shape, stride, padding, dilation, groups)
        if args is not None and consistent(x, w, bias):
            why_not = refusal(x, backend)
            if why_not is None and sharded.are_sharded(x, w, bias):
                y = sharded.conv2d(batched, w, bias, args, functools.partial(_local, backend=backend))
                if y is not None:
                    return y.squeeze(0) if unbatched else y
                why_not = "DTensors that are sharded so are F.conv2d's"
            why_not = why_not or why_not_by_operator(x, w, bias, backend)
            if why_not is None:
                if is_derived():
                    y = transforms.conv2d(batched, w, bias, args, backend)
                else:
                    y = operators.conv2d(batched, w, bias, *args, backend)
                return y.squeeze(0) if unbatched else y
            if backend != "auto":
                raise NotImplementedError(f"triton_conv: backend={backend!r} cannot run this convolution: {why_not}")
            return native.conv2d(x, w, bias, stride, padding, dilation, groups)
    return _refused(x, w, bias, stride, padding, dilation, groups, backend)


def _local(x, w, bias, args: ConvArgs, backend: str) -> Tensor:
    return conv2d(x, w, bias, *args, backend)


def why_not_by_operator(x, w, bias, backend: str) -> str | None:
    """Why tensors that are not plain, or that something watches, cannot go by an operator of ours, or None."""
    if backend == "auto" and not all(map(knows_operators, (x, w, bias))):
        return "a tensor subclass may know F.conv2d, but not an operator of ours"
    if torch.compiler.is_compiling() and torch_private.is_transformed():
        return "transforms and forward-mode derivatives inside a compiled function are F.conv2d's"  # graphs know it
    return None


def _refused(x, w, bias, stride, padding, dilation, groups, backend) -> Tensor:
    """A call that our checks refuse: PyTorch's own exception if it is a bad one, or else its result."""
    y = native.conv2d(x, w, bias, stride, padding, dilation, groups)
    if backend in ("auto", "torch"):
        return y
    raise NotImplementedError(f"triton_conv: backend={backend!r} cannot run this convolution: only F.conv2d takes it")


def knows_operators(tensor: Tensor | None) -> bool:
    """Whether a tensor is of a type that takes any operator, as PyTorch's own do."""
    return tensor is None or type(tensor) in PLAIN_TYPES or isinstance(tensor, torch_private.FakeTensor)


def is_derived() -> bool:
    """Whether derivatives are taken as only `transforms` has them, which no compiled function can hold."""
    if torch.compiler.is_compiling():
        return False
    return torch_private.forward_mode_is_on() or torch_private.is_being_derived()
