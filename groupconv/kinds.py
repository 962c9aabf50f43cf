"""The other kinds of grouped convolution, by the kernels of the 2-D one: 1-D, and transposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import eager, epilogue, native, operators, prepared, torch_private, transforms
from .api import check_backend, triton_conv
from .arguments import are_tensors, autocast, consistent, integer, normalise, normalise_transposed


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Grouped 1-D convolution: F.conv1d, by triton_conv of maps one pixel high.

    Args:
        input: [N, C_in, L] or [C_in, L], where it lies: [N, L, C_in] transposed is read without a copy.
        weight: [C_out, C_in / groups, K]. bias: [C_out] or None.
        stride, dilation: an int. groups: as triton_conv has it.
        padding: zeros on both sides, an int, or (left, right): ((K - 1) * dilation, 0) is causal; "valid" or "same".
        activation, residual, backend: as triton_conv has them.

    Returns:
        [N, C_out, L_out] or [C_out, L_out]. Of kernels it lies as input does, [N, L_out, C_out] transposed if that is
        so; F.conv1d's is contiguous. Differentiable twice and more.

    Raises: what F.conv1d and triton_conv do. Accuracy: triton_conv's. Source: own derivation.
    """
    arguments = stride, padding, dilation, groups
    tensors = input, weight, bias, residual
    if has_torch_function_variadic(*tensors) and torch_private.overrides_are_on():
        return _overridden(conv1d, native.conv1d, tensors, arguments, activation, residual, backend)
    check_backend(backend, "conv1d")
    planar = None
    fitting = _may_serve("conv1d", backend, input, weight, bias) and input.dim() in (2, 3) and weight.dim() == 3
    if fitting and (torch_private.any_autocast() or consistent(input, weight, bias)):
        planar = _planar(input, weight, *arguments)
    if planar is None:
        epilogue.check_activation(activation, "conv1d")
        y = native.conv1d(input, weight, bias, *arguments)
        _refuse_rest("conv1d", backend)
        return epilogue.applied(y, activation, residual)
    x, w, planar_arguments = planar
    residual = residual.unsqueeze(-2) if isinstance(residual, Tensor) else residual
    y = triton_conv(x, w, bias, *planar_arguments, activation=activation, residual=residual, backend=backend)
    return y.squeeze(-2)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    output_padding=0,
    groups: int = 1,
    dilation=1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Grouped transposed 2-D convolution: F.conv_transpose2d, by the kernels of a convolution's gradients.

    Args:
        input: [N, C_in, H, W] or [C_in, H, W]; dtypes and layouts as triton_conv takes them.
        weight: [C_in, C_out / groups, KH, KW]. bias: [C_out] or None.
        stride, padding, output_padding, dilation: an int or (vertical, horizontal), as F.conv_transpose2d has them.
        groups, backend: as triton_conv has them; "triton:ALGORITHM" is asked for dgrad, and for fprop and wgrad where
            gradients are.

    Returns:
        [N, C_out, (H - 1) * stride - 2 * padding + dilation * (KH - 1) + output_padding + 1, ...] of input's dtype,
        channels_last if input or weight is. Differentiable twice and more.

    Raises: what F.conv_transpose2d does; ValueError and NotImplementedError for `backend` as triton_conv does.
    Accuracy: as triton_conv's gradients have it; a bias is added to what was rounded. Source: own derivation.
    """
    arguments = stride, padding, output_padding, groups, dilation
    return _conv_transpose(conv_transpose2d, torch.conv_transpose2d, (input, weight, bias), arguments, backend)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    output_padding=0,
    groups: int = 1,
    dilation=1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Grouped transposed 1-D convolution: F.conv_transpose1d, as `conv_transpose2d` of maps one pixel high.

    Args:
        input: [N, C_in, L] or [C_in, L]. weight: [C_in, C_out / groups, K]. bias: [C_out] or None.
        stride, padding, output_padding, dilation: an int. groups, backend: as conv_transpose2d has them.

    Returns: [N, C_out, L_out] or [C_out, L_out]; of kernels it lies as input does. Raises: what F.conv_transpose1d and
        conv_transpose2d do. Accuracy: conv_transpose2d's. Source: own derivation.
    """
    arguments = stride, padding, output_padding, groups, dilation
    return _conv_transpose(conv_transpose1d, torch.conv_transpose1d, (input, weight, bias), arguments, backend)


def _conv_transpose(function, of_torch, tensors, arguments, backend: str) -> Tensor:
    """A transposed convolution by ours, or by PyTorch's function of its name."""
    if has_torch_function_variadic(*tensors) and torch_private.overrides_are_on():
        return _overridden(function, of_torch, tensors, arguments, None, None, backend)
    name = function.__name__
    check_backend(backend, name)
    if _may_serve(name, backend, *tensors):
        by_ours: Callable[..., Tensor | None] = _transposed if function is conv_transpose2d else _transposed_line
        y = by_ours(*tensors, *arguments, backend)
        if y is not None:
            return y
    y = of_torch(*tensors, *arguments)
    _refuse_rest(name, backend)
    return y


def _transposed_line(x, w, bias, stride, padding, output_padding, groups, dilation, backend: str) -> Tensor | None:
    """`_transposed` of maps one pixel high."""
    lines = [_line(value) for value in (stride, padding, output_padding, dilation)]
    if x.dim() not in (2, 3) or w.dim() != 3 or None in lines:
        return None
    s, p, more, d = lines
    y = _transposed(x.unsqueeze(-2), w.unsqueeze(-2), bias, (1, s), (0, p), (0, more), groups, (1, d), backend)
    return None if y is None else y.squeeze(-2)


def _overridden(function, of_torch, tensors, arguments, activation, residual, backend: str) -> Tensor:
    """The call by __torch_function__; of a type that knows PyTorch's function, but not ours, by that one."""
    extras: dict[str, Any] = {"backend": backend}
    if function is conv1d:
        extras |= {"activation": activation, "residual": residual}
    try:
        return handle_torch_function(function, tensors, *tensors[:3], *arguments, **extras)
    except TypeError as error:
        if backend != "auto" or not str(error).startswith("no implementation found for"):
            raise
        return epilogue.applied(of_torch(*tensors[:3], *arguments), activation, residual)


def _may_serve(function: str, backend: str, x, w, bias) -> bool:
    """Whether kernels may run on such operands; NotImplementedError if they cannot but must."""
    if torch_private.being_traced() is not None:
        why_not: str | None = "torch.jit traces PyTorch's own functions"
    elif backend == "torch" or not are_tensors(x, w, bias) or x.layout is not torch.strided:
        return False
    else:
        why_not = prepared.refusal(x, backend)
    if why_not is not None and backend.startswith("triton"):
        raise NotImplementedError(f"{function}: backend={backend!r} cannot run this convolution: {why_not}")
    return why_not is None


def _refuse_rest(function: str, backend: str) -> None:
    """NotImplementedError of a backend that must run what PyTorch alone takes."""
    if backend.startswith("triton"):
        raise NotImplementedError(
            f"{function}: backend={backend!r} cannot run this convolution: only PyTorch's own function takes it"
        )


def _line(value) -> int | None:
    """An integer, or a sequence of one."""
    if isinstance(value, (tuple, list)):
        return integer(value[0]) if len(value) == 1 else None
    return integer(value)


def _planar(x: Tensor, w: Tensor, stride, padding, dilation, groups):
    """x and w as maps and kernels one pixel high, and triton_conv's arguments; None if there is no such convolution."""
    stride, dilation, groups = _line(stride), _line(dilation), integer(groups)
    if not isinstance(padding, str):
        both = isinstance(padding, (tuple, list)) and len(padding) == 2
        sides = [integer(side) for side in padding] if both else [_line(padding)] * 2
        padding = None if None in sides else (0, 0, *sides)
    if None in (stride, padding, dilation, groups):
        return None
    x, w = x.unsqueeze(-2), w.unsqueeze(-2)
    arguments = (1, stride), padding, (1, dilation), groups
    shape = x.shape if x.dim() == 4 else (1, *x.shape)
    return None if normalise(shape, w.shape, *arguments) is None else (x, w, arguments)


def _transposed(x, w, bias, stride, padding, output_padding, groups, dilation, backend: str) -> Tensor | None:
    """By the operator, but for what PyTorch's own function has to take, or to refuse."""
    unbatched = x.dim() == 3
    x, w, bias = autocast(x.unsqueeze(0) if unbatched else x, w, bias)
    args = normalise_transposed(x.shape, w.shape, stride, padding, output_padding, dilation, groups)
    if args is None or not _agree(x, w, bias, args.groups):
        return None
    if torch.compiler.is_compiling():
        if eager.why_not_by_operator(x, w, bias, backend) is not None:
            return None
    else:
        if eager.is_plain(x, w, bias):
            call = prepared.lookup_transposed(x, w, args.y_shape(x.shape, w.shape), args.convolution, backend)
            if backend == "auto" and (call is None or call.torch_dgrad):
                return None
        elif eager.why_not_by_operator(x, w, bias, backend) is not None:
            return None
    if eager.is_derived():
        y_shape = args.y_shape(x.shape, w.shape)
        y = transforms.conv_transpose2d(x, w, bias, y_shape, args.convolution, backend)
    else:
        y = operators.conv_transpose2d(x, w, bias, *args, backend)
    return y.squeeze(0) if unbatched else y


def _agree(x: Tensor, w: Tensor, bias: Tensor | None, groups: int) -> bool:
    """Whether dtypes, devices and the bias's shape do, as F.conv_transpose2d demands, and all is dense."""
    for tensor in (w, bias):
        if tensor is None:
            continue
        if tensor.layout is not torch.strided or tensor.dtype is not x.dtype or tensor.device != x.device:
            return False
    return bias is None or bias.shape == (w.shape[1] * groups,)
