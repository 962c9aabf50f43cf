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
        above, before = problem.pad[0] - padding[0], problem.pad[2] - padding[1]
        dx = dx[..., above : above + problem.h_in, before : before + problem.w_in]
    return dx, dw


def _symmetric(problem, x):
    """x with what one side's padding has more than the other's put there, and the padding that is left."""
    top, bottom, left, right = problem.pad
    h, w = min(top, bottom), min(left, right)
    if top == bottom and left == right:
        return x, (h, w)
    return F.pad(x, (left - w, right - w, top - h, bottom - h)), (h, w)
