"""Batch norm and activation folded into the grouped convolutions before them, for inference."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import chains, fusing
from .api import triton_conv
from .layers import Conv2d, require_module


class FoldedConv2d(Conv2d):
    """A Conv2d with the batch norm that followed it in its weight and bias, and its activation in the same kernel.

    Made by `fold_batchnorm`. A state dict of a model that is not folded is refused, however it is loaded: the layer
    would compute something else. `activate` is the activation as a module, for torch.jit.script. Accuracy:
    triton_conv's, of the folded weight, which is rounded once.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not isinstance(input, fx.Proxy) and input.dim() != 4:  # as the batch norm has it
                raise ValueError(f"expected 4D input (got {input.dim()}D input)")
            padding = self.padding
            if self.padding_mode != "zeros":
                input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
                padding = (0, 0)
            return triton_conv(
                input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
                activation=self.activation,  # type: ignore[arg-type]
            )  # fmt: skip
        return self.activate(self._conv_forward(input, self.weight, self.bias))  # type: ignore[operator]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, folded batch norm"

    def get_extra_state(self) -> Tensor:
        return torch.ones((), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing but that there is one: see `_load_from_state_dict`."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        keys = {f"{prefix}weight", f"{prefix}bias"} & state_dict.keys()
        if keys and f"{prefix}_extra_state" not in state_dict:
            errors.append(
                f"{prefix.removesuffix('.')} has its batch norm folded into it, but the state dict is of a layer that"
                " has not: load it before fold_batchnorm."
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )  # fmt: skip


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode whose grouped convolutions have the batch norms that follow them in their weights,
    and the activations that follow those in their kernels: three passes over a layer's output become one.

    Folded is a grouped nn.Conv2d or groupconv.Conv2d whose result only a BatchNorm2d or SyncBatchNorm takes, or timm's
    BatchNormAct2d or SyncBatchNormAct, if the code says so: an nn.Sequential, or a method that forward can reach and
    whose source is at hand, calls the convolution, then the norm, and names them nowhere else, and no other code that
    the model's forward can reach does. That code is read, and never run. nn.Identity may lie between norm and
    activation (timm has one where others drop out). In place of a batch norm and an activation that were folded stands
    nn.Identity. An activation that is called more than once (torchvision's ResNet has one nn.ReLU for three places), or
    that is none of triton_conv's, stays as it is.

    Nothing is certain of methods that only other code calls, and of hooks and functions outside of the model's classes,
    where these call or read a batch norm or its convolution.

    `model` itself stays as it is, its state dict too; the copy refuses that state dict. A record of the logger
    "groupconv", at level INFO, tells what was folded, and what was left and why; print() of the copy, what is folded.

    Args:
        model: any module in eval mode.

    Returns: the copy. Raises: TypeError for what is no module; ValueError for one that is training.
    Source: Markus, "Fusing batch normalization and convolution in runtime", 2018; own derivation.
    """
    require_module(model, "fold_batchnorm")
    if model.training:
        raise ValueError(
            "fold_batchnorm: model is training, but must be in eval mode: a batch norm's statistics change"
        )
    model = copy.deepcopy(model)
    fusing.unfuse(model)
    folded: dict[str, str] = {}
    left: dict[str, str] = {}
    names = {module: name for name, module in model.named_modules()}
    for conv, chain in chains.found(model).items():
        reason = chain if isinstance(chain, str) else _why_left(chain)
        if isinstance(chain, str) or reason is not None:
            left[names[conv]] = str(reason)
        else:
            folded[names[conv]] = _fold(chain)
    chains.tell("fold_batchnorm", folded, left)
    return model


def _why_left(chain: chains.Chain) -> str | None:
    norm: Any = chain.norm
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return "its batch norm goes by the batch's own statistics"
    return chains.doubt_of_timm_norm(norm) if chains.is_timm_norm(norm) else None


def _fold(chain: chains.Chain) -> str:
    """Fold a chain, whatever names its modules go by; what was folded."""
    conv: Any
    conv, norm, activate = chain.conv, chain.norm, chain.activate
    own = chains.is_timm_norm(norm)
    if own:
        activate = norm.act  # type: ignore[assignment]
    activation = None if activate is None else chains.activation_of(activate)
    weight, bias = _folded(conv, norm)
    trained = conv.weight.requires_grad
    conv.weight, conv.bias = nn.Parameter(weight, trained), nn.Parameter(bias, trained)
    conv.__class__ = FoldedConv2d
    conv.activation = activation
    conv.activate = nn.Identity() if activation is None else copy.deepcopy(activate)
    _empty(norm)
    if activate is not None and activation is not None and not own:
        _empty(activate)
    return "batch norm" if activation is None else f"batch norm and {activation}"


def _empty(module: nn.Module) -> None:
    """Make an nn.Identity of a module, wherever it is held."""
    training = module.training
    vars(module).clear()
    module.__class__ = nn.Identity
    nn.Identity.__init__(module)  # type: ignore[arg-type]
    module.train(training)


def _folded(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does what it and a batch norm do, computed in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if conv.bias is not None:
        shift = shift + conv.bias.detach().double() * scale
    weight = conv.weight.detach()
    folded = (weight.double() * scale[:, None, None, None]).to(weight.dtype, memory_format=torch.preserve_format)
    return folded, shift.to(weight.dtype)
