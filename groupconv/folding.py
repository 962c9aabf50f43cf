"""Batch norm and activation folded into the grouped convolutions before them, for inference."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .api import triton_conv
from .layers import LOG, Conv2d, require_module

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
TIMM_NORM = "BatchNormAct2d"  # a BatchNorm2d with a dropout and an activation
PLAIN: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Sigmoid: "sigmoid",
}  # fmt: skip
TIMM = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "Swish": "silu", "Sigmoid": "sigmoid"}


class FoldedConv2d(Conv2d):
    """A Conv2d with the batch norm that followed it in its weight and bias, and its activation in the same kernel.

    Made by `fold_batchnorm`. A state dict of a model that is not folded is refused, however it is loaded: the layer
    would compute something else. Accuracy: triton_conv's, of the folded weight, which is rounded once.
    """

    def __init__(self, conv: Any, norm: nn.Module, activate: nn.Module, activation: str | None):
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, True, conv.padding_mode, device="meta", dtype=conv.weight.dtype,
        )  # fmt: skip
        weight, bias = _folded(conv, norm)
        self.weight = nn.Parameter(weight, conv.weight.requires_grad)
        self.bias = nn.Parameter(bias, conv.weight.requires_grad)
        self.activate, self.activation = activate, activation
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            padding = self.padding
            if self.padding_mode != "zeros":
                input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
                padding = (0, 0)
            return triton_conv(
                input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
                activation=self.activation,
            )  # fmt: skip
        return self.activate(self._conv_forward(input, self.weight, self.bias))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, folded batch norm"

    def get_extra_state(self) -> str:
        return "folded batch norm"

    def set_extra_state(self, state: str) -> None:
        """Nothing but that there is one: see `_load_from_state_dict`."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        if f"{prefix}_extra_state" not in state_dict:
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

    Folded is a grouped nn.Conv2d or groupconv.Conv2d whose result only a BatchNorm2d, SyncBatchNorm or timm's
    BatchNormAct2d takes, by the code of a module without optional arguments that torch.fx can trace with its children
    as they are. Both have to be called in one place only. In place of a batch norm and an activation that were folded
    stands nn.Identity. An activation that is called more than once (torchvision's ResNet has one nn.ReLU for three
    places), or that is none of triton_conv's, stays as it is.

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
    folded, left = {}, {}
    chains, calls = chains_of(model)
    names = {module: name for name, module in model.named_modules()}
    for conv in [module for module in names if type(module) in (nn.Conv2d, Conv2d) and module.groups > 1]:
        chain = chains.get(conv)
        reason = why_left(chain, calls) or _varies(chain)
        if chain is None or reason is not None:
            left[names[conv]] = reason
        else:
            folded[names[conv]] = _fold(chain, calls, model)
    tell("fold_batchnorm", folded, left)
    return model


def tell(function: str, taken: dict[str, str], left: dict[str, str | None]) -> None:
    """Log which convolutions have what followed them now, and why others have not."""
    if LOG.isEnabledFor(logging.INFO):
        lines = [*(f"{name}: {what}" for name, what in taken.items()), *(f"{n}: left, {w}" for n, w in left.items())]
        total = len(taken) + len(left)
        LOG.info("%s", "\n  ".join([f"{function}: {len(taken)} of {total} grouped convolutions", *lines]))


def _varies(chain: Any) -> str | None:
    """Why the batch norm of a chain is not the same for all batches, or None."""
    varies = chain.norm.training or chain.norm.running_mean is None or chain.norm.running_var is None
    return "its batch norm goes by the batch's own statistics" if varies else None


@dataclasses.dataclass(frozen=True)
class Chain:
    """A convolution and what takes its result: modules, and their paths from the model."""

    conv: nn.Conv2d
    conv_path: str
    norm: nn.Module | None
    norm_path: str
    activate: nn.Module | None
    activate_path: str


class _Shallow(fx.Tracer):
    """Traces one module's own code."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True


def chains_of(model: nn.Module) -> tuple[dict[nn.Module, Chain], dict[nn.Module, int]]:
    """The chains of a model's convolutions, and how often its code calls each module."""
    chains: dict[nn.Module, Chain] = {}
    calls: dict[nn.Module, int] = collections.Counter()
    for path, module in model.named_modules():
        if not any(isinstance(child, nn.Conv2d) and child is not module for child in module.modules()):
            continue
        for node in _calls(module):
            called = module.get_submodule(str(node.target))
            calls[called] += 1
            if isinstance(called, nn.Conv2d):
                chains[called] = _chain(module, f"{path}." if path else "", node, called)
    return chains, calls


def _calls(module: nn.Module) -> Iterator[fx.Node]:
    """The calls of other modules that a module's code has; none if it cannot be traced, or takes options."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
        if any(p.default is not p.empty for p in parameters):
            return
        graph = _Shallow().trace(module)
    except Exception:  # whatever code does with what is no tensor
        return
    yield from (node for node in graph.nodes if node.op == "call_module")


def _chain(module: nn.Module, path: str, node: fx.Node, conv: nn.Conv2d) -> Chain:
    def next_of(node: fx.Node | None) -> tuple[fx.Node | None, nn.Module | None, str]:
        users = [] if node is None else list(node.users)
        if len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,) or users[0].kwargs:
            return None, None, ""
        return users[0], module.get_submodule(str(users[0].target)), f"{path}{users[0].target}"

    follower, norm, norm_path = next_of(node)
    _, activate, activate_path = next_of(follower)
    return Chain(conv, f"{path}{node.target}", norm, norm_path, activate, activate_path)


def why_left(chain: Chain | None, calls: dict[nn.Module, int]) -> str | None:
    """Why a chain's batch norm is not certain to follow its convolution; None if it is."""
    if chain is None:
        return "no code that torch.fx can trace calls it"
    norm = chain.norm
    if norm is None or not (type(norm) in NORMS or is_timm_norm(norm)):
        return "no batch norm takes its result alone"
    if calls[chain.conv] > 1 or calls[norm] > 1:
        return "it or its batch norm is called more than once"
    if is_timm_norm(norm) and not isinstance(norm.drop, nn.Identity):
        return "a dropout follows its batch norm"
    if any(has_hooks(module) for module in (chain.conv, norm)):
        return "it or its batch norm has hooks"
    if getattr(chain.conv, "qconfig", None) is not None:
        return "it is to be quantised"
    return None


def activated(chain: Chain, calls: dict[nn.Module, int]) -> tuple[nn.Module | None, str | None]:
    """The activation that a chain may take with it, and triton_conv's name of it; (None, None) if there is none."""
    norm: Any = chain.norm
    activate = norm.act if is_timm_norm(norm) else chain.activate
    once = is_timm_norm(norm) or activate is None or calls[activate] == 1
    activation = None if activate is None or not once or has_hooks(activate) else activation_of(activate)
    return (None, None) if activation is None else (activate, activation)


def _fold(chain: Chain, calls: dict[nn.Module, int], model: nn.Module) -> str:
    """Fold a chain into its first place in the model; what was folded."""
    norm: Any = chain.norm
    own, (activate, activation) = is_timm_norm(norm), activated(chain, calls)
    model.set_submodule(chain.conv_path, FoldedConv2d(chain.conv, norm, activate or nn.Identity(), activation))
    model.set_submodule(chain.norm_path, norm.act if own and activation is None else nn.Identity())
    if activation is not None and not own:
        model.set_submodule(chain.activate_path, nn.Identity())
    return "batch norm" if activation is None else f"batch norm and {activation}"


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


def is_timm_norm(module: nn.Module | None) -> bool:
    kind = type(module)
    return kind.__name__ == TIMM_NORM and kind.__module__.startswith("timm.") and isinstance(module, nn.BatchNorm2d)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def activation_of(module: Any) -> str | None:
    """triton_conv's name of what an activation module computes."""
    kind = type(module)
    if kind in PLAIN:
        return PLAIN[kind]
    if kind is nn.LeakyReLU and module.negative_slope == 0.01:
        return "leaky_relu"
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return TIMM.get(kind.__name__) if kind.__module__ == "timm.layers.activations" else None
