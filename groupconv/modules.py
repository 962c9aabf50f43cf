"""The conversion of a model's grouped convolutions to ours."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from . import fusing
from .layers import LOG, OURS, plain, require_module


@dataclasses.dataclass(frozen=True)
class ConversionSummary:
    """The 1-D and 2-D convolutions of a model by name, transposed ones too: those that are groupconv's, and why each of
    the others is not.
    """

    converted: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        total = len(self.converted) + len(self.left)
        lines = [f"{len(self.converted)} of {total} convolutions by groupconv"]
        for reason in ("converted", *dict.fromkeys(self.left.values())):
            names = self.converted if reason == "converted" else [n for n, why in self.left.items() if why == reason]
            if names:
                lines.append(f"  {reason}: {', '.join(name or 'the model itself' for name in names)}")
        return "\n".join(lines)


def convert(model: nn.Module, fuse: str | None = None) -> nn.Module:
    """Turn every grouped nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d and nn.ConvTranspose2d of `model`, itself included,
    into groupconv's layer of that name, in place. (`enable` is the other way, for whatever calls torch.nn.functional.)

    Only a layer's class changes, so that its parameters, buffers, hooks, names and state dict stay, and so does an
    optimizer made before. Left alone are layers of one group and subclasses: those with a forward of their own,
    quantised ones, and lazy ones until their first call has made them torch.nn's. A parametrization
    (torch.nn.utils.parametrize) makes a layer a subclass too: convert first, then register it.

    `summarize` tells what was converted, and what was left and why; so does a record of the logger "groupconv", at
    level INFO. `revert` undoes it.

    Args:
        model: any module; shapes, dtypes and devices of its layers do not matter, as triton_conv takes all of them.
        fuse: "bn_act" also has each BatchNorm2d that follows a grouped convolution compute the activation after it, as
            `conv_bn_act` does, in training and in eval mode, wherever an nn.Sequential or code whose source is at hand
            calls the one right after the other, with nothing but its result; timm's BatchNormAct2d computes its own so.
            Everywhere else both stay what they were. Parameters, buffers, modes, names and state dict stay, classes do
            not (they are subclasses). SyncBatchNorm is left; the logger tells all that was.

    Returns:
        `model` itself. Converting it again changes nothing. Raises: TypeError for what is no module, ValueError for
        another `fuse`, RuntimeError in a function that torch.compile takes as one graph. Warns: of a model without
        grouped convolutions, and of those that it leaves because they are quantised or sharded already. Source: own
        derivation.
    """
    require_module(model, "convert")
    if fuse not in (None, "bn_act"):
        raise ValueError(f'convert: fuse is {fuse!r}, but must be None or "bn_act"')
    if torch.compiler.is_compiling():
        raise RuntimeError("convert: call it outside of what torch.compile compiles")
    for module in model.modules():
        if _why_left(module) == CONVERTIBLE:
            module.__class__ = OURS[type(module)]
    summary = summarize(model)
    _warn(model, summary)
    if fuse is not None:
        fusing.fuse(model)
    if LOG.isEnabledFor(logging.INFO):
        LOG.info("convert: %s", summary)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Turn every layer of groupconv's in `model`, itself included, into torch.nn's, in place: `convert` undone.

    Subclasses of groupconv's layers stay what they are, parametrized layers among them, and so do layers with padding
    for each side, which torch.nn's have not.

    Returns: `model` itself. Raises: TypeError for what is no module. Source: own derivation.
    """
    require_module(model, "revert")
    for module in model.modules():
        plain(module)
    fusing.unfuse(model)
    return model


def summarize(model: nn.Module) -> ConversionSummary:
    """Which 1-D and 2-D convolutions of `model`, itself included, are groupconv's, and why the others are not.

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
        elif isinstance(module, tuple(OURS.values())):
            converted.append(name)
    return ConversionSummary(tuple(converted), left)


CONVERTIBLE = "not converted yet"
SHARDED = "sharded by itself (fully_shard): convert first, or have enable() take its calls"
QUANTISED = "quantised"


def _warn(model: nn.Module, summary: ConversionSummary) -> None:
    """Of what a user of `convert` hardly wants: that it has nothing to do, or comes too late."""
    modules = dict(model.named_modules())
    late = {
        name: why for name, why in summary.left.items()
        if why in (SHARDED, QUANTISED) and getattr(modules[name], "groups", 1) != 1
    }  # fmt: skip
    if late:
        told = "; ".join(f"{name or 'the model itself'} is {why}" for name, why in late.items())
        warnings.warn(f"convert: {len(late)} grouped convolutions stay as they are: {told}", stacklevel=3)
    elif not summary.converted and all(why == "one group" for why in summary.left.values()):
        warnings.warn("convert: the model has no grouped convolution, and stays as it is", stacklevel=3)


def _why_left(module: nn.Module) -> str | None:
    """Why a convolution of at most two axes is not ours; None where it is, and for any other module."""
    kind: Any = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit" if module.original_name in [native.__name__ for native in OURS] else None
    if kind.__module__.startswith("torch.ao.nn."):
        return QUANTISED if len(getattr(module, "kernel_size", ())) in (1, 2) else None
    native = next((native for native in OURS if isinstance(module, native)), None)
    if native is None or isinstance(module, OURS[native]):
        return None
    if isinstance(module, LazyModuleMixin):
        return "lazy until its first call"
    if module.groups == 1:
        return "one group"
    if parametrize.is_parametrized(module):
        return "parametrized: convert first"
    if kind.__name__ == f"FSDP{native.__name__}" and hasattr(module, "unshard"):
        return SHARDED
    if kind is not native:
        own = any(getattr(kind, name, None) is not getattr(native, name, None) for name in ("forward", "_conv_forward"))
        how = "with its own forward, whose calls enable() takes" if own else "that enable() takes"
        return f"{kind.__module__}.{kind.__qualname__}, a subclass {how}"
    if getattr(module, "qconfig", None) is not None:
        return "to be quantised: it has a qconfig"
    return CONVERTIBLE
