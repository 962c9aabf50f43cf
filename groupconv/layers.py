"""The convolutions of torch.nn by ours."""

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
from .kinds import conv1d, conv_transpose1d, conv_transpose2d

LOG = logging.getLogger("groupconv")


_Mixin: Any = object  # of which mypy asks no attributes


class _Layer(_Mixin):
    """What our layers share: what they are without us, and that quantization gets that."""

    _native: type[nn.Module]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # torch.ao.quantization gives a qconfig to what it will replace, and looks replacements up by exact type.
        if name == "qconfig" and value is not None:
            plain(self)


class _Convolution(_Layer):
    def forward(self, input: Tensor) -> Tensor:
        # torch.jit.script leaves out the block, but would read a longer condition.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if isinstance(input, fx.Proxy):
                call = call_module(self, input, _Convolution, self._native)
                if call is not None:
                    return call
        return self._conv_forward(input, self.weight, self.bias)

    # None or not, torch.jit.script knows when it compiles, and only compiles what follows.
    __jit_unused_properties__ = ("_sides",)

    @property
    def _sides(self) -> tuple[int, ...] | None:
        """Padding of each side as F.pad has it, or None of other padding."""
        axes = len(self.kernel_size)
        if isinstance(self.padding, str) or len(self.padding) <= axes:
            return None
        pairs = [self.padding[2 * axis : 2 * axis + 2] for axis in range(axes)]
        return tuple(side for pair in reversed(pairs) for side in pair)


class Conv2d(_Convolution, nn.Conv2d):
    """nn.Conv2d whose convolution is triton_conv.

    Constructor, parameters, state_dict, shapes, dtypes and errors are nn.Conv2d's. A `padding_mode` other than "zeros"
    pads first, as there, and convolves what is padded; of zeros `padding` may also be (top, bottom, left, right). What
    torch.jit, torch.fx and torch.ao.quantization make of it is what they make of nn.Conv2d. Accuracy: triton_conv's.
    Source: own derivation.
    """

    _native = nn.Conv2d
    __constants__ = [*nn.Conv2d.__constants__, "_sides"]  # noqa: RUF012

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        zeros = self.padding_mode == "zeros"
        if not zeros:
            if not torch.jit.is_scripting():
                _require_pairs(self)
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        if not torch.jit.is_scripting():
            padding = self.padding if zeros else (0, 0)
            return triton_conv(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        # A script has one type for each name, so padding cannot be a string or a pair.
        if zeros:
            if self._sides is None:
                return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
            input = F.pad(input, self._sides)
        return F.conv2d(input, weight, bias, self.stride, (0, 0), self.dilation, self.groups)


def _require_pairs(layer: Any) -> None:
    """ValueError for padding of each side, which torch.nn's other modes have not."""
    if layer._sides is not None:
        raise ValueError(
            f"{type(layer).__name__}: padding is {layer.padding}, but of each side it must be of padding_mode='zeros'"
            f", not {layer.padding_mode!r}"
        )


class DepthWiseConv2dImplicitGEMM(Conv2d):
    """A depthwise Conv2d of stride 1 whose padding is half the kernel, so that odd kernels keep the map's size.

    By the name, signature, parameters and state dict of the layer that RepLKNet, SLaK and their followers import from
    depthwise_conv2d_implicit_gemm: `from groupconv import DepthWiseConv2dImplicitGEMM` is all that changes. Every dtype
    and device of triton_conv's, where that one takes fp32 and fp16 on GPUs.

    Args:
        channels: in and out. kernel: its side, or (height, width). bias: whether there is one.
    """

    def __init__(self, channels: int, kernel: int | tuple[int, int], bias: bool = False):
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = height // 2, width // 2
        super().__init__(channels, channels, (height, width), padding=padding, groups=channels, bias=bias)


class Conv1d(_Convolution, nn.Conv1d):
    """nn.Conv1d whose convolution is groupconv.conv1d, as Conv2d is nn.Conv2d: the result lies in memory as the input
    does, [N, L, C] transposed if that is so. Of zeros `padding` may also be (left, right): (K - 1, 0) is causal.
    """

    _native = nn.Conv1d
    __constants__ = [*nn.Conv1d.__constants__, "_sides"]  # noqa: RUF012

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        zeros = self.padding_mode == "zeros"
        if not zeros:
            if not torch.jit.is_scripting():
                _require_pairs(self)
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        if not torch.jit.is_scripting():
            padding = self.padding if zeros else (0,)
            return conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        if zeros:
            if self._sides is None:
                return F.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
            input = F.pad(input, self._sides)
        return F.conv1d(input, weight, bias, self.stride, (0,), self.dilation, self.groups)


class _Transposed(_Layer):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102
            if isinstance(input, fx.Proxy) and output_size is None:
                call = call_module(self, input, _Transposed, self._native)
                if call is not None:
                    return call
        if self.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for transposed convolutions")
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        return self._transposed(input, output_padding)


class ConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """nn.ConvTranspose2d whose convolution is groupconv.conv_transpose2d, as Conv2d is nn.Conv2d."""

    _native = nn.ConvTranspose2d

    def _transposed(self, input: Tensor, output_padding: list[int]) -> Tensor:
        if not torch.jit.is_scripting():
            return conv_transpose2d(
                input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
            )
        return F.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding,  # type: ignore[arg-type]
            output_padding, self.groups, self.dilation,
        )  # fmt: skip


class ConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """nn.ConvTranspose1d whose convolution is groupconv.conv_transpose1d, as Conv2d is nn.Conv2d."""

    _native = nn.ConvTranspose1d

    def _transposed(self, input: Tensor, output_padding: list[int]) -> Tensor:
        if not torch.jit.is_scripting():
            return conv_transpose1d(
                input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
            )
        return F.conv_transpose1d(
            input, self.weight, self.bias, self.stride, self.padding,  # type: ignore[arg-type]
            output_padding, self.groups, self.dilation,
        )  # fmt: skip


OURS: dict[Any, Any] = {kind._native: kind for kind in (Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d)}


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
    """A layer as torch.nn's, if it is one of ours, no subclass, and pads in a way that torch.nn's can."""
    if type(layer) in OURS.values() and getattr(layer, "_sides", None) is None:
        layer.__class__ = layer._native
    return layer


def require_module(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is {model!r}, but must be a torch.nn.Module")


def _register_fusers() -> None:
    """Have torch.ao.quantization.fuse_modules fuse our layers as it fuses torch.nn's, which it looks up by type."""
    fusers = torch_private.fusers_of_quantization or {}
    for types, fuser in list(fusers.items()):
        if types[0] in OURS:
            fusers[(OURS[types[0]],) + types[1:]] = functools.partial(_fuse, fuser)


def _fuse(fuser, is_qat: bool, conv: nn.Module, *others: nn.Module) -> nn.Module:
    return fuser(is_qat, plain(conv), *others)


_register_fusers()
