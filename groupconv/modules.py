"""The conversion of a model's grouped convolutions to ours."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import fusing
from .layers import LOG, Conv2d, plain, require_module


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
        fuse: "bn_act" also has each BatchNorm2d that follows a grouped convolution compute the activation after it, as
            `conv_bn_act` does, in training and in eval mode, where the model's code is as certain as `fold_batchnorm`
            wants it; timm's BatchNormAct2d computes its own so. Parameters, buffers, modes, names and state dict stay.
            SyncBatchNorm is left; the logger tells all that was. `revert` before a batch norm is taken out without its
            activation.

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
        plain(module)
    fusing.unfuse(model)
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
