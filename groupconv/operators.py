"""The operators groupconv::conv2d, conv2d_backward, conv_transpose2d, and conv2d_finished, which a residual and an
activation follow, for all of PyTorch that reads or transforms programs.

torch.compile and export, tensor subclasses, dispatch modes, vmap, autocast, derivatives of derivatives. All end in the
prepared calls that eager calls take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launcher, torch_private
from ._ops import add_op_namespace_prefix, ops
from .activations import before_activation, finished_by_torch
from .algorithms import torch_reference
from .arguments import ConvArgs, TransposedArgs, autocast, dw_strides, dx_strides, out_channels_last, out_pixels
from .call import torch_gradients
from .prepared import lookup_of_operator, lookup_transposed
from .problem import dense_strides

# --- What they are and compute ---------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")
_ARGS = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups"
for _schema in (
    f"conv2d(Tensor input, Tensor weight, Tensor? bias, {_ARGS}, str backend) -> Tensor",
    f"conv2d_backward(Tensor grad, Tensor input, Tensor weight, {_ARGS}, bool[3] mask, str backend) -> Tensor[]",
    "conv2d_finished(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str? activation, bool keeps,"
    f" {_ARGS}, str backend) -> (Tensor, Tensor)",
    "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding,"
    " SymInt[2] output_padding, SymInt[2] dilation, SymInt groups, str backend) -> Tensor",
):
    # Operands lie as Inductor likes best, which kernels read in any layout: untagged, it would copy them back.
    _LIBRARY.define(_schema, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))


def _like(tensor: Tensor, strides) -> Tensor:
    """The tensor with the strides that the operator promises; PyTorch's depthwise kernels answer NHWC with NCHW."""
    if tensor.stride() == strides:
        return tensor
    return launcher.allocate(tensor.shape, strides, tensor).copy_(tensor)


def _conv_args(stride, padding, dilation, groups) -> ConvArgs:
    """The lists that an operator is given, as a key that can be looked up."""
    return ConvArgs(tuple(stride), tuple(padding), tuple(dilation), groups)


def _conv2d_op(x, w, bias, stride, padding, dilation, groups, backend):
    args = _conv_args(stride, padding, dilation, groups)
    call = lookup_of_operator(x, w, bias, args, backend)
    if call is None:
        return torch_reference.fprop(args, x, w, bias)
    return _like(call.forward(x, w, bias), call.strides["y"])


def _conv2d_backward_op(dy, x, w, stride, padding, dilation, groups, mask, backend):
    args, needs = _conv_args(stride, padding, dilation, groups), tuple(mask)
    fitting = dy.dtype is x.dtype and dy.device == x.device
    call = lookup_of_operator(x, w, None, args, backend) if fitting else None
    grads = None if call is None else call.backward(dy, x, w, needs)
    dx, dw, db = torch_gradients(dy, x, w, args, needs) if grads is None else grads
    if dx is not None:
        dx = _like(dx, dx_strides(x, w) if call is None else call.strides["dx"])
    if dw is not None:
        dw = _like(dw, dw_strides(w) if call is None else call.strides["dw"])
    return [grad for grad in (dx, dw, db) if grad is not None]


def _conv2d_finished_op(x, w, bias, residual, activation, keeps, stride, padding, dilation, groups, backend):
    """y, and what the activation is of where the derivative wants that, else nothing."""
    args = _conv_args(stride, padding, dilation, groups)
    call = lookup_of_operator(x, w, bias, args, backend)
    run = None if call is None else call.finisher(x, w, bias, activation, residual is not None, keeps)
    if call is not None and run is not None:
        found = call.finish(run, x, w, bias, residual, activation, keeps)
    else:
        v = torch_reference.fprop(args, x, w, bias) if call is None else call.forward(x, w, bias)
        found = finished_by_torch(v, residual, activation, keeps)
    y, kept = found if keeps else (found, x.new_empty(0))
    strides = dense_strides(y.shape, out_channels_last(x, w))
    return _like(y, strides), _like(kept, strides) if keeps else kept


def _conv_transpose2d_op(x, w, bias, stride, padding, output_padding, dilation, groups, backend):
    args = _transposed_args(stride, padding, output_padding, dilation, groups)
    shape = args.y_shape(x.shape, w.shape)
    call = lookup_transposed(x, w, shape, args.convolution, backend)
    grads = None if call is None else call.backward(x, None, w, (True, False, False))
    if grads is None:
        y = torch.conv_transpose2d(x, w, None, stride, padding, output_padding, groups, dilation)
    else:
        y = grads[0]
    if bias is not None:
        y += bias[:, None, None]
    return _like(y, dense_strides(shape, out_channels_last(x, w)))


def _transposed_args(stride, padding, output_padding, dilation, groups) -> TransposedArgs:
    return TransposedArgs(tuple(stride), tuple(padding), tuple(output_padding), tuple(dilation), groups)


conv2d, conv2d_backward = ops.conv2d, ops.conv2d_backward
conv2d_finished, conv_transpose2d = ops.conv2d_finished, ops.conv_transpose2d
_LIBRARY.impl("conv2d", _conv2d_op, "CompositeExplicitAutograd")
_LIBRARY.impl("conv2d_backward", _conv2d_backward_op, "CompositeExplicitAutograd")
_LIBRARY.impl("conv2d_finished", _conv2d_finished_op, "CompositeExplicitAutograd")
_LIBRARY.impl("conv_transpose2d", _conv_transpose2d_op, "CompositeExplicitAutograd")


def _conv2d_backward_batched(dy, x, w, stride, padding, dilation, groups, mask, backend):
    """By F.conv2d's: what autograd batches itself (is_grads_batched) has no rule for operators that return lists."""
    args = _conv_args(stride, padding, dilation, groups)
    return [grad for grad in torch_gradients(dy, x, w, args, tuple(mask)) if grad is not None]


_LIBRARY.impl("conv2d_backward", _conv2d_backward_batched, "Batched")


@torch.library.register_fake(add_op_namespace_prefix("conv2d"), lib=_LIBRARY)
def _conv2d_fake(x, w, bias, stride, padding, dilation, groups, backend):
    torch_private.call_from_inductor(add_op_namespace_prefix("conv2d"))
    shape = (x.shape[0], w.shape[0], *out_pixels(x.shape, w.shape, stride, padding, dilation))
    return x.new_empty_strided(shape, dense_strides(shape, out_channels_last(x, w)))


@torch.library.register_fake(add_op_namespace_prefix("conv2d_finished"), lib=_LIBRARY)
def _conv2d_finished_fake(x, w, bias, residual, activation, keeps, stride, padding, dilation, groups, backend):
    torch_private.call_from_inductor(add_op_namespace_prefix("conv2d_finished"))
    y = _conv2d_fake(x, w, bias, stride, padding, dilation, groups, backend)
    return y, torch.empty_like(y) if keeps else y.new_empty(0)


@torch.library.register_fake(add_op_namespace_prefix("conv_transpose2d"), lib=_LIBRARY)
def _conv_transpose2d_fake(x, w, bias, *args):
    torch_private.call_from_inductor(add_op_namespace_prefix("conv_transpose2d"))
    shape = _transposed_args(*args[:-1]).y_shape(x.shape, w.shape)
    return x.new_empty_strided(shape, dense_strides(shape, out_channels_last(x, w)))


@torch.library.register_fake(add_op_namespace_prefix("conv2d_backward"), lib=_LIBRARY)
def _conv2d_backward_fake(dy, x, w, stride, padding, dilation, groups, mask, backend):
    grads = []
    if mask[0]:
        grads.append(x.new_empty_strided(x.shape, dx_strides(x, w)))
    if mask[1]:
        grads.append(w.new_empty_strided(w.shape, dw_strides(w)))
    if mask[2]:
        grads.append(dy.new_empty((w.shape[0],)))
    return grads


# --- Their derivatives -----------------------------------------------------------------------------------------------


def _setup_conv2d(ctx, inputs, output):
    x, w, bias, *args, backend = inputs
    ctx.save_for_backward(x, w)
    ctx.args, ctx.backend, ctx.has_bias = args, backend, bias is not None


def _backward_conv2d(ctx, dy):
    x, w = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = iter(conv2d_backward(dy, x, w, *ctx.args, mask, ctx.backend))
    return *(next(grads) if needed else None for needed in mask), *(None,) * 5


def _setup_conv2d_finished(ctx, inputs, output):
    x, w, bias, _, activation, keeps, *args, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, output[1] if keeps else None if activation is None else output[0])
    ctx.activation, ctx.args, ctx.backend, ctx.has_bias = activation, args, backend, bias is not None
    if not keeps:
        ctx.mark_non_differentiable(output[1])


def _backward_conv2d_finished(ctx, dy, d_kept):
    x, w, read = ctx.saved_tensors
    dv = before_activation(dy, d_kept, read, ctx.activation)
    if dv is None:
        return (None,) * 11
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = iter(conv2d_backward(dv, x, w, *ctx.args, mask, ctx.backend) if any(mask) else ())
    of_operands = [next(grads) if needed else None for needed in mask]
    return *of_operands, dv if ctx.needs_input_grad[3] else None, *(None,) * 7


def _setup_conv_transpose2d(ctx, inputs, output):
    x, w, bias, *args, ctx.backend = inputs
    ctx.save_for_backward(x, w)
    ctx.args, ctx.has_bias = _transposed_args(*args).convolution, bias is not None


def _backward_conv_transpose2d(ctx, dy):
    """By x the convolution itself, by w that one's gradient, of which x is the result's."""
    x, w = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    if out_channels_last(x, w) and not out_channels_last(dy, w):
        dy = dy.contiguous(memory_format=torch.channels_last)  # dx lies as y does
    dx = conv2d(dy, w, None, *ctx.args, ctx.backend) if need_x else None
    (dw,) = conv2d_backward(x, dy, w, *ctx.args, [False, True, False], ctx.backend) if need_w else (None,)
    return dx, dw, dy.sum((0, 2, 3)) if ctx.has_bias and need_b else None, *(None,) * 6


def _setup_conv2d_backward(ctx, inputs, output):
    dy, x, w, *args, mask, backend = inputs
    ctx.save_for_backward(dy, x, w)
    ctx.args, ctx.mask, ctx.backend = args, mask, backend


def _backward_conv2d_backward(ctx, grads):
    """The derivative of (dx, dw, db), dx and dw bilinear in two of dy, x and w: convolutions again."""
    dy, x, w = ctx.saved_tensors
    incoming = iter(grads)
    to_dx, to_dw, to_db = (next(incoming) if asked else None for asked in ctx.mask)
    need_dy, need_x, need_w = ctx.needs_input_grad[:3]
    args, backend = ctx.args, ctx.backend
    d_dy = d_x = d_w = None
    if need_dy:
        parts = []
        if to_dx is not None:
            parts.append(conv2d(to_dx, w, None, *args, backend))
        if to_dw is not None:
            parts.append(conv2d(x, to_dw, None, *args, backend))
        if to_db is not None:
            parts.append(to_db[None, :, None, None].expand_as(dy))
        d_dy = sum(parts[1:], parts[0]) if parts else None
    if need_x and to_dw is not None:
        (d_x,) = conv2d_backward(dy, x, to_dw, *args, [True, False, False], backend)
    if need_w and to_dx is not None:
        (d_w,) = conv2d_backward(dy, to_dx, w, *args, [False, True, False], backend)
    return d_dy, d_x, d_w, *(None,) * 6


torch.library.register_autograd(
    add_op_namespace_prefix("conv2d"), _backward_conv2d, setup_context=_setup_conv2d, lib=_LIBRARY
)
torch.library.register_autograd(
    add_op_namespace_prefix("conv2d_finished"),
    _backward_conv2d_finished,
    setup_context=_setup_conv2d_finished,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    add_op_namespace_prefix("conv_transpose2d"),
    _backward_conv_transpose2d,
    setup_context=_setup_conv_transpose2d,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    add_op_namespace_prefix("conv2d_backward"),
    _backward_conv2d_backward,
    setup_context=_setup_conv2d_backward,
    lib=_LIBRARY,
)


# --- vmap and autocast -----------------------------------------------------------------------------------------------


def into_channels(tensor: Tensor | None, dim: int | None, size: int, channel: int) -> Tensor | None:
    """A vmapped tensor with its mapped axis folded into the axis `channel` of the others, as its slower part."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, channel).flatten(channel, channel + 1)


def _conv2d_vmap(info, in_dims, x, w, bias, stride, padding, dilation, groups, backend):
    """A batch of convolutions is one with so many times the groups."""
    size = info.batch_size
    x, w = into_channels(x, in_dims[0], size, 1), into_channels(w, in_dims[1], size, 0)
    bias = into_channels(bias, in_dims[2], size, 0)
    y = conv2d(x, w, bias, stride, padding, dilation, groups * size, backend)
    return y.unflatten(1, (size, -1)), 1


def _conv_transpose2d_vmap(info, in_dims, x, w, bias, *args):
    size = info.batch_size
    x, w = into_channels(x, in_dims[0], size, 1), into_channels(w, in_dims[1], size, 0)
    *args, groups, backend = args
    y = conv_transpose2d(x, w, into_channels(bias, in_dims[2], size, 0), *args, groups * size, backend)
    return y.unflatten(1, (size, -1)), 1


def _conv2d_finished_vmap(
    info, in_dims, x, w, bias, residual, activation, keeps, stride, padding, dilation, groups, backend
):
    size = info.batch_size
    x, w = into_channels(x, in_dims[0], size, 1), into_channels(w, in_dims[1], size, 0)
    bias, residual = into_channels(bias, in_dims[2], size, 0), into_channels(residual, in_dims[3], size, 1)
    args = (stride, padding, dilation, groups * size, backend)
    y, kept = conv2d_finished(x, w, bias, residual, activation, keeps, *args)
    return (y.unflatten(1, (size, -1)), kept.unflatten(1, (size, -1)) if keeps else kept), (1, 1 if keeps else None)


def _conv2d_backward_vmap(info, in_dims, dy, x, w, stride, padding, dilation, groups, mask, backend):
    size = info.batch_size
    dy, x = into_channels(dy, in_dims[0], size, 1), into_channels(x, in_dims[1], size, 1)
    w = into_channels(w, in_dims[2], size, 0)
    args = (stride, padding, dilation, groups * size, mask, backend)
    grads = conv2d_backward(dy, x, w, *args)
    axes = [axis for axis, needed in zip((1, 0, 0), mask, strict=True) if needed]
    return [grad.unflatten(axis, (size, -1)) for grad, axis in zip(grads, axes, strict=True)], axes


torch.library.register_vmap(add_op_namespace_prefix("conv2d"), _conv2d_vmap, lib=_LIBRARY)
torch.library.register_vmap(add_op_namespace_prefix("conv2d_finished"), _conv2d_finished_vmap, lib=_LIBRARY)
torch.library.register_vmap(add_op_namespace_prefix("conv_transpose2d"), _conv_transpose2d_vmap, lib=_LIBRARY)
torch.library.register_vmap(add_op_namespace_prefix("conv2d_backward"), _conv2d_backward_vmap, lib=_LIBRARY)


def _register_autocast(key: str) -> None:
    without_autocast = torch_private.without_dispatch_key(key)

    def conv2d_autocast(x, w, bias, *args):
        x, w, bias = autocast(x, w, bias)
        with without_autocast():
            return conv2d(x, w, bias, *args)

    def conv_transpose2d_autocast(x, w, bias, *args):
        x, w, bias = autocast(x, w, bias)
        with without_autocast():
            return conv_transpose2d(x, w, bias, *args)

    def conv2d_finished_autocast(x, w, bias, residual, *args):
        x, w, bias = autocast(x, w, bias)
        residual = None if residual is None else residual.to(x.dtype)
        with without_autocast():
            return conv2d_finished(x, w, bias, residual, *args)

    _LIBRARY.impl("conv2d", conv2d_autocast, key)
    _LIBRARY.impl("conv2d_finished", conv2d_finished_autocast, key)
    _LIBRARY.impl("conv_transpose2d", conv_transpose2d_autocast, key)


_register_autocast("AutocastCUDA")
_register_autocast("AutocastCPU")
