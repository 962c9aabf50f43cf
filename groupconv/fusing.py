"""Batch norm and activation computed with the grouped convolutions before them, in training too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import folding
from .api import conv_bn_act
from .layers import Conv2d


class ConvBatchNorm2d(Conv2d):
    """A Conv2d that also computes the batch norm, and the activation, that follow it: conv_bn_act.

    Made by `convert(model, fuse="bn_act")`, by its class alone: the batch norm keeps its place, parameters, buffers and
    mode, and lets through what is normalised already; so does the activation. torch.jit.script takes no such layer,
    torch.fx only in eval mode. `revert` undoes it.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self._computed(input)
        raise NotImplementedError("this model has batch norms in its convolutions: groupconv.revert(model) first")

    @torch.jit.unused
    def _computed(self, input: Tensor) -> Tensor:
        norm, _, activation = vars(self)["_followers"]
        if isinstance(input, fx.Proxy) and norm.training:
            raise NotImplementedError("torch.fx would count this batch only: groupconv.revert(model) first")
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        momentum = norm.momentum
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        tracked = norm.running_mean is not None and norm.running_var is not None
        kept = tracked and (not norm.training or norm.track_running_stats)
        return conv_bn_act(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
            running_mean=norm.running_mean if kept else None, running_var=norm.running_var if kept else None,
            bn_weight=norm.weight, bn_bias=norm.bias, training=norm.training or not tracked,
            momentum=0.0 if momentum is None else momentum, eps=norm.eps, activation=activation,
        )  # fmt: skip


class PassedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that the convolution before it computes."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class Passed(nn.Module):
    """An activation that the convolution before it computes."""

    def forward(self, input: Tensor) -> Tensor:
        return input


def fuse(model: nn.Module) -> None:
    """Have groupconv's convolutions of a model compute the batch norms and activations that follow them."""
    taken: dict[str, str] = {}
    left: dict[str, str | None] = {}
    chains, calls = folding.chains_of(model)
    for name, conv in model.named_modules():
        if type(conv) is not Conv2d or conv.groups == 1:
            continue
        chain = chains.get(conv)
        reason = folding.why_left(chain, calls)
        if chain is not None and reason is None and isinstance(chain.norm, nn.SyncBatchNorm):
            reason = "a SyncBatchNorm follows, whose statistics are of all processes"
        if chain is not None and reason is None and folding.is_timm_norm(chain.norm):
            reason = "a batch norm with an activation of its own"
        if chain is None or reason is not None:
            left[name] = reason
            continue
        activate, activation = folding.activated(chain, calls)
        conv.__dict__["_followers"] = (chain.norm, activate, activation)
        conv.__class__ = ConvBatchNorm2d
        _pass(chain.norm, PassedBatchNorm2d)
        if activate is not None:
            _pass(activate, Passed)
        taken[name] = "batch norm" if activation is None else f"batch norm and {activation}"
    folding.tell("convert", taken, left)


def unfuse(conv: ConvBatchNorm2d) -> None:
    """The layer a Conv2d again, and what follows it what it was."""
    for module in conv.__dict__.pop("_followers")[:2]:
        if module is not None:
            module.__class__ = module.__dict__.pop("_was")
    conv.__class__ = Conv2d  # type: ignore[assignment]


def _pass(module: Any, kind: type[nn.Module]) -> None:
    module.__dict__["_was"] = type(module)
    module.__class__ = kind
