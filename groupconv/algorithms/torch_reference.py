"""F.conv2d as the provider of a pass: the fallback of every plan."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def fprop(problem, x, w, bias):
    x, padding = _symmetric(problem, x)
    return F.conv2d(x, w, bias, problem.stride, padding, problem.dilation, problem.groups)


def backward(problem, dy, x, w, need_x: bool, need_w: bool):
    """(dx or None, dw or None) of ATen's convolution_backward."""
    padded, padding = _symmetric(problem, x)
    mask = [need_x, need_w, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, padded, w, None, problem.stride, padding, problem.dilation, False, (0, 0), problem.groups, mask
    )
    if need_x and padded is not x:
        dx = dx[..., : problem.h_in, : problem.w_in]
    return dx, dw


def _symmetric(problem, x):
    """x with the part of its padding that is on one side only, and the padding that is left: F.conv2d's own way."""
    top, bottom, left, right = problem.pad
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (0, right - left, 0, bottom - top)), (top, left)
