"""A pass by PyTorch's ways, or by another library: what our kernels are measured beside."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.numerics import Operands, PassResult
from ..problem import ConvProblem
from .contenders import same_layout

FORMATS = {"torch_contiguous": torch.contiguous_format, "torch_channels_last": torch.channels_last}


def call(problem: ConvProblem, pass_: str, provider: str, operands: Operands) -> Callable[[], PassResult]:
    """What runs a pass by a provider that is not ours. Padding that is not symmetric is put there first, not timed."""
    like = FORMATS[same_layout(problem).provider]
    x, w, dy = (t.contiguous(memory_format=FORMATS.get(provider, like)) for t in (operands.x, operands.w, operands.dy))
    top, bottom, left, right = problem.pad
    padding = (top, left) if (top, left) == (bottom, right) else (0, 0)
    if (top, left) != (bottom, right):
        x = F.pad(x, (left, right, top, bottom))
    args = (problem.stride, padding, problem.dilation)

    def trimmed(dx: Tensor) -> Tensor:
        same = dx.shape[2:] == (problem.h_in, problem.w_in)
        return dx if same else dx[:, :, top : top + problem.h_in, left : left + problem.w_in]

    if provider == "flag_gems":
        return _flag_gems(problem, pass_, x, w, dy, args, trimmed)

    def fprop(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, *args, problem.groups)

    def backward(dy: Tensor, x: Tensor, w: Tensor) -> Any:
        mask = [pass_ != "wgrad", pass_ != "dgrad", False]
        dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, w, None, *args, False, (0, 0), problem.groups, mask)
        dx = None if dx is None else trimmed(dx)
        return {"dgrad": dx, "wgrad": dw, "backward": (dx, dw)}[pass_]

    run: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    run, tensors = (fprop, (x, w)) if pass_ == "fprop" else (backward, (dy, x, w))
    if provider == "torch_compile":
        run = torch.compile(run, dynamic=False, options={"max_autotune": True})
    elif provider == "torch_native":
        run = _without_cudnn(run)
    return functools.partial(run, *tensors)


def _without_cudnn(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*tensors: Tensor) -> Any:
        before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
        try:
            return call(*tensors)
        finally:
            torch.backends.cudnn.enabled = before

    return run


def _flag_gems(
    problem: ConvProblem, pass_: str, x: Tensor, w: Tensor, dy: Tensor, args: tuple[Any, ...],
    trimmed: Callable[[Tensor], Tensor],
) -> Callable[[], PassResult]:  # fmt: skip
    conv2d = importlib.import_module("flag_gems").conv2d
    if pass_ == "fprop":
        return lambda: conv2d(x, w, None, *args, problem.groups)
    x, w = x.detach().requires_grad_(pass_ != "wgrad"), w.detach().requires_grad_(pass_ != "dgrad")
    y = conv2d(x, w, None, *args, problem.groups)

    def backward() -> PassResult:
        gradients = torch.autograd.grad(y, [t for t in (x, w) if t.requires_grad], dy, retain_graph=True)
        if pass_ == "wgrad":
            return gradients[0]
        dx = trimmed(gradients[0])
        return (dx, gradients[1]) if pass_ == "backward" else dx

    return backward
