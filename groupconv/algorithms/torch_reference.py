"""F.conv2d as the provider of a pass: the fallback of every plan. Padding that is not symmetric is put there first."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..arguments import ConvArgs


def fprop(args: ConvArgs, x, w, bias):
    x, padding = _symmetric(args, x)
    return torch.conv2d(x, w, bias, args.stride, padding, args.dilation, args.groups)


def backward(args: ConvArgs, dy, x, w, need_x: bool, need_w: bool):
    """(dx or None, dw or None) of ATen's convolution_backward."""
    padded, padding = _symmetric(args, x)
    mask = [need_x, need_w, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, padded, w, None, args.stride, padding, args.dilation, False, (0, 0), args.groups, mask
    )
    if need_x and padded is not x:
        above, before = args.padding[0] - padding[0], args.padding[2] - padding[1]
        dx = dx[..., above : above + x.shape[2], before : before + x.shape[3]]
    return dx, dw


def _symmetric(args: ConvArgs, x):
    """x with what one side's padding has more than the other's put there, and the padding that is left."""
    top, bottom, left, right = args.padding
    h, w = min(top, bottom), min(left, right)
    if top == bottom and left == right:
        return x, (h, w)
    return F.pad(x, (left - w, right - w, top - h, bottom - h)), (h, w)
