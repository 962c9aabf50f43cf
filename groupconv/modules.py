"""nn.Conv2d by triton_conv, and the conversion of a model's grouped convolutions to it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .api import triton_conv


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose convolution is triton_conv.

    Constructor, parameters, state_dict, shapes, dtypes and errors are nn.Conv2d's. A `padding_mode` other than "zeros"
    pads first, as there, and convolves what is padded. Accuracy: triton_conv's. Source: own derivation.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return triton_conv(input, weight, bias, self.stride, padding, self.dilation, self.groups)


def convert(model: nn.Module) -> nn.Module:
    """Turn every grouped nn.Conv2d of `model`, itself included, into groupconv.Conv2d, in place.

    Only a layer's class changes, so that its parameters, buffers, hooks, names and state dict stay, and so does an
    optimizer made before. Left alone are layers of one group and subclasses of nn.Conv2d: those with a forward of their
    own, quantised ones, and lazy ones until their first call has made them nn.Conv2d. A parametrization
    (torch.nn.utils.parametrize) makes a layer a subclass too: convert first, then register it.

    Args:
        model: any module; shapes, dtypes and devices of its layers do not matter, as triton_conv takes all of them.

    Returns:
        `model` itself. Converting it again changes nothing. Source: own derivation.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups > 1:
            module.__class__ = Conv2d
    return model
