"""nn.Conv2d by triton_conv, and the conversion of a model's grouped convolutions to it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

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
                call = _call_module(self, input)
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
            revert(self)


def _call_module(layer: Conv2d, input: Any) -> Any:
    """What a tracer of torch.fx makes of a call of nn.Conv2d where it does not look inside, or None.

    Its own question, whether the layer's class is one of torch.nn, was answered for ours already.
    """
    tracer = input.tracer
    if not isinstance(tracer, fx.Tracer) or getattr(layer.forward, "__func__", None) is not Conv2d.forward:
        return None
    native = revert(copy.copy(layer))
    path = tracer.path_of_module(layer)
    if not path or not tracer.is_leaf_module(native, path):
        return None
    return tracer.create_proxy("call_module", path, (input,), {})


@dataclasses.dataclass(frozen=True)
class ConversionSummary:
    """The 2-D convolutions of a model by name: those that are groupconv's, and why each of the others is not."""

    converted: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        total = len(self.converted) + len(self.left)
        lines = [f"{len(self.converted)} of {total} 2-D convolutions by groupconv"]
        for reason in ("converted", *dict.fromkeys(self.left.values())):
            names = self.converted if reason == "converted" else [n for n, why in self.left.items() if why == reason]
            if names:
                lines.append(f"  {reason}: {', '.join(name or 'the model itself' for name in names)}")
        return "\n".join(lines)


def convert(model: nn.Module, fuse: str | None = None) -> nn.Module:
    """Turn every grouped nn.Conv2d of `model`, itself included, into groupconv.Conv2d, in place.

    Only a layer's class changes, so that its parameters, buffers, hooks, names and state dict stay, and so does an
    optimizer made before. Left alone are layers of one group and subclasses of nn.Conv2d: those with a forward of their
    own, quantised ones, and lazy ones until their first call has made them nn.Conv2d. A parametrization
    (torch.nn.utils.parametrize) makes a layer a subclass too: convert first, then register it.

    `summarize` tells what was converted, and what was left and why; so does a record of the logger "groupconv", at
    level INFO. `revert` undoes it.

    Args:
        model: any module; shapes, dtypes and devices of its layers do not matter, as triton_conv takes all of them.
        fuse: "bn_act" has converted layers compute the BatchNorm2d that follows them, and the activation after that, by
            `conv_bn_act`, in training and in eval mode: where `fold_batchnorm` is certain that they do. Parameters,
            buffers, modes and state dict stay where they are. Left are SyncBatchNorm, and norms with an activation of
            their own; the logger tells which.

    Returns:
        `model` itself. Converting it again changes nothing. Raises: TypeError for what is no module, ValueError for
        another `fuse`. Source: own derivation.
    """
    require_module(model, "convert")
    if fuse not in (None, "bn_act"):
        raise ValueError(f'convert: fuse is {fuse!r}, but must be None or "bn_act"')
    for module in model.modules():
        if _why_left(module) == CONVERTIBLE:
            module.__class__ = Conv2d
    if fuse is not None:
        from . import fusing  # which has layers that are ours

        fusing.fuse(model)
    if LOG.isEnabledFor(logging.INFO):
        LOG.info("convert: %s", summarize(model))
    return model


def revert(model: nn.Module) -> nn.Module:
    """Turn every groupconv.Conv2d of `model`, itself included, into nn.Conv2d, in place: `convert` undone.

    Subclasses of groupconv.Conv2d stay what they are, parametrized layers among them.

    Returns: `model` itself. Raises: TypeError for what is no module. Source: own derivation.
    """
    require_module(model, "revert")
    for module in model.modules():
        if "_followers" in vars(module):
            from . import fusing

            fusing.unfuse(cast("fusing.ConvBatchNorm2d", module))
        if type(module) is Conv2d:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return model


def summarize(model: nn.Module) -> ConversionSummary:
    """Which 2-D convolutions of `model`, itself included, are groupconv's, and why the others are not.

    Args:
        model: any module, converted or not; a layer that it holds twice has the first of its names.

    Returns: a ConversionSummary, `converted` and `left`; print() shows it. Raises: TypeError for what is no module.
    Source: own derivation.
    """
    require_module(model, "summarize")
    converted, left = [], {}
    for name, module in model.named_modules():
        reason = _why_left(module)
        if reason is not None:
            left[name] = reason
        elif isinstance(module, Conv2d):
            converted.append(name)
    return ConversionSummary(tuple(converted), left)


def require_module(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is {model!r}, but must be a torch.nn.Module")


CONVERTIBLE = "not converted yet"


def _why_left(module: nn.Module) -> str | None:
    """Why a 2-D convolution is not ours; None where it is, and for any other module."""
    kind: Any = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit" if module.original_name == "Conv2d" else None
    if kind.__module__.startswith("torch.ao.nn."):
        planar = len(getattr(module, "kernel_size", ())) == 2 and not getattr(module, "transposed", False)
        return "quantised" if planar else None
    if isinstance(module, Conv2d) or not isinstance(module, nn.Conv2d):
        return None
    if isinstance(module, nn.LazyConv2d):
        return "lazy until its first call"
    if module.groups == 1:
        return "one group"
    if parametrize.is_parametrized(module):
        return "parametrized: convert first"
    if kind is not nn.Conv2d:
        own = kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward
        return f"{kind.__module__}.{kind.__qualname__}, a subclass{' with its own forward' if own else ''}"
    if getattr(module, "qconfig", None) is not None:
        return "to be quantised: it has a qconfig"
    return CONVERTIBLE


def _register_fusers() -> None:
    """Have torch.ao.quantization.fuse_modules fuse our layers as it fuses nn.Conv2d, which it looks up by type."""
    fusers = torch_private.fusers_of_quantization or {}
    for types, fuser in list(fusers.items()):
        if types[0] is nn.Conv2d:
            fusers[(Conv2d,) + types[1:]] = functools.partial(_fuse, fuser)


def _fuse(fuser, is_qat: bool, conv: Conv2d, *others: nn.Module) -> nn.Module:
    return fuser(is_qat, revert(conv), *others)


_register_fusers()
