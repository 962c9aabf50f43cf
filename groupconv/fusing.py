"""Batch norms behind grouped convolutions that also compute the activation after them, in training too."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import batch_norm, chains, reading, torch_private
from .layers import call_module

SYNCHRONISED = "a SyncBatchNorm follows, whose statistics are of all processes"
MARK = "_groupconv_activated"  # of a tensor to which the activation that comes next was applied already


class BatchNormAct2d(nn.BatchNorm2d):
    """An nn.BatchNorm2d that also computes the activation that follows it, which lets its result through.

    Made by `convert(model, fuse="bn_act")`, by its class alone: parameters, buffers, mode and name stay. It activates
    where the very code that calls it says that an activation alone takes the result; everywhere else, where hooks watch
    either of the two, in compiled code and for what conv_bn_act's kernels do not take, both are what they were.
    """

    _native: type[nn.BatchNorm2d] = nn.BatchNorm2d

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self._computed(input)
        raise NotImplementedError("torch.jit.script does not take this model: groupconv.revert(model) first")

    @torch.jit.unused
    def _computed(self, input: Any) -> Any:
        native: Any = self._native
        if isinstance(input, fx.Proxy):
            call = call_module(self, input, BatchNormAct2d, native)
            return native.forward(self, input) if call is None else call
        if torch.compiler.is_compiling() or "forward" in vars(self) or torch_private.has_hooks(self):
            return native.forward(self, input)
        activation = self._activation()
        own = self.training or (self.running_mean is None and self.running_var is None)
        tensors = (input, self.running_mean, self.running_var, self.weight, self.bias)
        if activation is None or not batch_norm.serves(*tensors, own, self.momentum or 0.0, self.eps):
            return native.forward(self, input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        kept = not self.training or self.track_running_stats
        return self._activated(batch_norm.computed(
            input, self.running_mean if kept else None, self.running_var if kept else None, self.weight, self.bias,
            own, momentum, self.eps, activation, once=self.momentum is None,
        ))  # fmt: skip

    def _activation(self) -> str | None:
        """triton_conv's name of the activation to compute; None to leave it to its module."""
        if torch_private.is_among_compiled():  # code that would not let through what is activated
            return None
        for module in reading.followers(self, depth=3):  # up are: this one, _computed and forward
            if "forward" in vars(module) or torch_private.has_hooks(module) or module._compiled_call_impl is not None:
                return None
            if isinstance(module, Passing):
                return chains.activation_of(module, module._native) if type(module) in PASSING.values() else None
            if type(module) is not nn.Identity:
                return None
        return None

    def _activated(self, result: Any) -> Any:
        setattr(result, MARK, True)
        return result


class _OfTimm(BatchNormAct2d):
    """One of timm's, whose activation is its own part. Its class, which is made where timm is, is found anew by what
    copies and unpickles it.
    """

    def forward(self, x: Any) -> Any:  # as timm names it
        return super().forward(x)

    def _activation(self) -> str | None:
        return chains.activation_of(self.act) if chains.doubt_of_timm_norm(self) is None else None

    def _activated(self, result: Any) -> Any:
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made_of_timm, (self._native,), self.__getstate__()


@functools.cache
def _of_timm(native: type) -> Any:
    return type(native.__name__, (_OfTimm, native), {"_native": native, "__module__": __name__})


def _made_of_timm(native: type) -> Any:
    return object.__new__(_of_timm(native))


class Passing(nn.Module):
    """An activation that lets through what the batch norm before it has activated."""

    _native: type[nn.Module]

    def __init_subclass__(cls) -> None:
        if cls.__bases__[0] is Passing:
            cls._native = cls.__bases__[1]

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self._passed(input)
        raise NotImplementedError("torch.jit.script does not take this model: groupconv.revert(model) first")

    @torch.jit.unused
    def _passed(self, input: Any) -> Any:
        if isinstance(input, fx.Proxy):
            call = call_module(self, input, Passing, self._native)
            return self._native.forward(self, input) if call is None else call
        if not torch.compiler.is_compiling() and vars(input).pop(MARK, False):
            return input
        return self._native.forward(self, input)


class PassingReLU(Passing, nn.ReLU): ...


class PassingReLU6(Passing, nn.ReLU6): ...


class PassingLeakyReLU(Passing, nn.LeakyReLU): ...


class PassingSiLU(Passing, nn.SiLU): ...


class PassingGELU(Passing, nn.GELU): ...


class PassingHardswish(Passing, nn.Hardswish): ...


class PassingSigmoid(Passing, nn.Sigmoid): ...


PASSING = {kind._native: kind for kind in Passing.__subclasses__()}


def fuse(model: nn.Module) -> None:
    """Have the batch norms that follow a model's grouped convolutions compute the activations that follow them."""
    names = {module: name for name, module in model.named_modules()}
    places: dict[nn.Module, list[tuple[chains.Row, int]]] = {}
    for owner in model.modules():
        for row in chains.rows(owner):
            for at, step in enumerate(row[:-1]):
                places.setdefault(step.module, []).append((row, at))
    taken: dict[str, str] = {}
    left: dict[str, str] = {}
    for conv in chains.grouped(model):
        outcomes = [_fused(row, at) for row, at in places.get(conv, ())] or [(chains.NO_NORM, False)]
        what, is_taken = max(outcomes, key=lambda outcome: (outcome[1], outcome[0] != chains.NO_NORM))
        (taken if is_taken else left)[names[conv]] = what
    chains.tell("convert", taken, left)


def _fused(row: chains.Row, at: int) -> tuple[str, bool]:
    """Fuse the norm after a convolution in a row: (what was taken, True), or (why nothing was, False)."""
    norm: Any = row[at + 1].module
    if isinstance(norm, _OfTimm) or chains.is_timm_norm(norm):
        activation, doubt = chains.activation_of(norm.act), chains.doubt_of_timm_norm(norm)
        if isinstance(norm, nn.SyncBatchNorm):
            return SYNCHRONISED, False
        if doubt is not None or activation is None:
            return doubt or "its batch norm has no activation", False
        if not isinstance(norm, _OfTimm):
            norm.__class__ = _of_timm(type(norm))  # type: ignore[arg-type]
        return f"batch norm and {activation}", True
    if type(norm) is nn.SyncBatchNorm:
        return SYNCHRONISED, False
    if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
        return chains.NO_NORM, False
    following = chains.after(row, at + 1)
    activate: Any = None if following is None else following.module
    native = activate._native if type(activate) in PASSING.values() else type(activate)
    activation = chains.activation_of(activate, native) if native in PASSING else None
    if activation is None:
        return "no activation of triton_conv's takes its batch norm's result alone", False
    activate.__class__, norm.__class__ = PASSING[native], BatchNormAct2d
    return f"batch norm and {activation}", True


def unfuse(model: nn.Module) -> None:
    """`fuse` undone. What is a subclass by now, parametrized say, stays."""
    module: Any
    for module in model.modules():
        if isinstance(module, BatchNormAct2d) and "_native" in vars(type(module)):
            module.__class__ = module._native  # type: ignore[assignment]
        elif type(module) in PASSING.values():
            module.__class__ = module._native
