"""Convolutions of DTensors whose batch or groups lie on different devices: each device convolves what it has.

No communication but that of the weight's gradient, which a shard of the batch has a part of, where PyTorch adds it up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import ConvArgs, out_channels_last, out_pixels
from .problem import dense_strides


def are_sharded(*tensors: Tensor | None) -> bool:
    """Whether all that are there are DTensors of one mesh."""
    module = sys.modules.get("torch.distributed.tensor")  # where nobody imported it, there are none
    there: list[Any] = [t for t in tensors if t is not None]
    return (
        module is not None
        and all(type(t) in (module.DTensor, torch.nn.Parameter) and isinstance(t.data, module.DTensor) for t in there)
        and all(t.device_mesh == there[0].device_mesh for t in there)
    )


def conv2d(x: Any, w: Any, bias: Any, args: ConvArgs, local: Callable[..., Tensor]) -> Tensor | None:
    """y of `are_sharded` operands, by `local` on each device; None where they are sharded in another way.

    local: of the operands there are, as F.conv2d has them, and ConvArgs.
    """
    from torch.distributed import tensor as dtensor

    mesh, splits = x.device_mesh, 1
    y_placements, w_gradients = [], []
    for axis, (of_x, of_w) in enumerate(zip(x.placements, w.placements, strict=True)):
        of_bias = of_w if bias is None else bias.placements[axis]
        if of_bias != of_w:
            return None
        if of_x == dtensor.Shard(0) and of_w.is_replicate():
            w_gradients.append(dtensor.Partial())
        elif of_x == dtensor.Shard(1) and of_w == dtensor.Shard(0):
            w_gradients.append(of_w)
            splits *= mesh.size(axis)
        elif of_x.is_replicate() and of_w.is_replicate():
            w_gradients.append(of_w)
        else:
            return None
        y_placements.append(of_x)
    if args.groups % splits:
        return None
    operands = (
        x.to_local(grad_placements=x.placements),
        w.to_local(grad_placements=w_gradients),
        None if bias is None else bias.to_local(grad_placements=w_gradients),
    )
    y = local(*operands, args._replace(groups=args.groups // splits))
    shape = torch.Size(
        (x.shape[0], w.shape[0], *out_pixels(x.shape, w.shape, args.stride, args.padding, args.dilation))
    )
    stride = dense_strides(shape, out_channels_last(*operands[:2]))
    return dtensor.DTensor.from_local(y, mesh, y_placements, run_check=False, shape=shape, stride=stride)
