"""nn.Conv2d by triton_conv."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import torch_private
from .api import triton_conv

LOG = logging.getLogger("groupconv")


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose convolution is triton_conv.

    Constructor, parameters, state_dict, shapes, dtypes and errors are nn.Conv2d's. A `padding_mode` other than "zeros"
    pads first, as there, and convolves what is padded. What torch.jit, torch.fx and torch.ao.quantization make of it is
    what they make of nn.Conv2d. Accuracy: triton_conv's. Source: own derivation.
    """

    def forward(self, input: Tensor) -> Tensor:
        # torch.jit.script leaves out the block, but would read a longer condition.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if isinstance(input, fx.Proxy):
                call = call_module(self, input, Conv2d, nn.Conv2d)
                if call is not None:
                    return call
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        zeros = self.padding_mode == "zeros"
        if not zeros:
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        if not torch.jit.is_scripting():
            padding = self.padding if zeros else (0, 0)
            return triton_conv(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        # A script has one type for each name, so padding cannot be a string or a pair.
        if zeros:
            return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(input, weight, bias, self.stride, (0, 0), self.dilation, self.groups)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # torch.ao.quantization gives a qconfig to what it will replace, and looks replacements up by exact type.
        if name == "qconfig" and value is not None:
            plain(self)


def call_module(layer: nn.Module, input: Any, own: type[nn.Module], native: type[nn.Module]) -> Any:
    """What a tracer of torch.fx makes of a call of a layer's native class where it does not look inside, or None.

    own: the class whose forward asks; a subclass that has another is looked into.

    Its own question, whether the layer's class is one of torch.nn, was answered for ours already.
    """
    tracer = input.tracer
    if not isinstance(tracer, fx.Tracer) or "forward" in vars(layer) or type(layer).forward is not own.forward:
        return None
    twin = copy.copy(layer)
    twin.__class__ = native
    path = tracer.path_of_module(layer)
    if not path or not tracer.is_leaf_module(twin, path):
        return None
    return tracer.create_proxy("call_module", path, (input,), {})


def plain(layer: Any) -> Any:
    """A layer as nn.Conv2d, if it is a Conv2d of ours and no subclass."""
    if type(layer) is Conv2d:
        layer.__class__ = nn.Conv2d  # type: ignore[assignment]
    return layer


def require_module(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is {model!r}, but must be a torch.nn.Module")


def _register_fusers() -> None:
    """Have torch.ao.quantization.fuse_modules fuse our layers as it fuses nn.Conv2d, which it looks up by type."""
    fusers = torch_private.fusers_of_quantization or {}
    for types, fuser in list(fusers.items()):
        if types[0] is nn.Conv2d:
            fusers[(Conv2d,) + types[1:]] = functools.partial(_fuse, fuser)


def _fuse(fuser, is_qat: bool, conv: Conv2d, *others: nn.Module) -> nn.Module:
    return fuser(is_qat, plain(conv), *others)


_register_fusers()
