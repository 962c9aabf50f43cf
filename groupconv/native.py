"""PyTorch's own convolutions, whatever has taken their names in torch.nn.functional since, with each side's padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def conv2d(x, w, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv2d, whose padding may also be (top, bottom, left, right)."""
    x, padding = _each_side(x, padding, 2)
    return torch.conv2d(x, w, bias, stride, padding, dilation, groups)


def _each_side(x, padding, axes: int):
    """x with what zeros are not the same on both sides of each axis put there, and the padding that is left."""
    if not isinstance(padding, (tuple, list)) or len(padding) != 2 * axes or not isinstance(x, torch.Tensor):
        return x, padding
    before, after = padding[::2], padding[1::2]
    if tuple(before) == tuple(after):
        return x, tuple(before)
    if min(padding) < 0:
        raise RuntimeError("negative padding is not supported")
    sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    return F.pad(x, sides), (0,) * axes


def conv1d(x, w, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv1d, whose padding may also be (left, right)."""
    x, padding = _each_side(x, padding, 1)
    return torch.conv1d(x, w, bias, stride, padding, dilation, groups)
