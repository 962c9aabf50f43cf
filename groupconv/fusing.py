"""Batch norms behind grouped convolutions that also compute the activation after them, in training too."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import batch_norm, chains, torch_private
from .layers import call_module

MARK = "_groupconv_activated"  # of a tensor to which the activation that comes next was applied already


class BatchNormAct2d(nn.BatchNorm2d):
    """An nn.BatchNorm2d that also computes the activation that follows it, which lets its result through.

    Made by `convert(model, fuse="bn_act")`, by its class alone: parameters, buffers, mode and name stay. Where hooks
    watch either of the two, where another module has taken the activation's place, where other code calls it than the
    forward of the module that did, in compiled code and for what conv_bn_act's kernels do not take, both are what they
    were.
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
        if torch.compiler.is_compiling() or "forward" in vars(self):
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
        places = vars(self)["_following"]
        holder, name = vars(self)["_held"]
        if holder._modules.get(name) is not self:  # but something that wraps it
            return None
        for holder, name, module in places:  # which the holder may have replaced
            if holder._modules.get(name) is not module or "forward" in vars(module) or torch_private.has_hooks(module):
                return None
            if module._compiled_call_impl is not None:  # in compiled code it does not let through
                return None
        activate = places[-1][-1]
        if not isinstance(activate, Passing) or torch_private.has_hooks(self) or not _is_running(vars(self)["_caller"]):
            return None
        return chains.activation_of(activate, activate.native())

    def _activated(self, result: Any) -> Any:
        setattr(result, MARK, True)
        return result


def _is_running(module: nn.Module) -> bool:
    """Whether what calls the caller is, at any depth, a module's own forward.

    Of all code that can call a norm, that alone is known to call the activation next: another nn.Sequential of the
    same modules may not.
    """
    code = inspect.unwrap(type(module).forward).__code__
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code is code and frame.f_locals.get(code.co_varnames[0]) is module:
            return True
    return False


class _OfTimm(BatchNormAct2d):
    """One of timm's, whose activation is its own part. Its class, which is made where timm is, is found anew by what
    copies and unpickles it.
    """

    def _activation(self) -> str | None:
        if torch_private.has_hooks(self) or chains.doubt_of_timm_norm(self) is not None:
            return None
        return chains.activation_of(self.act)

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

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self._passed(input)
        raise NotImplementedError("torch.jit.script does not take this model: groupconv.revert(model) first")

    @torch.jit.unused
    def _passed(self, input: Any) -> Any:
        if isinstance(input, fx.Proxy):
            call = call_module(self, input, Passing, self.native())
            return self.native().forward(self, input) if call is None else call
        if not torch.compiler.is_compiling() and vars(input).pop(MARK, False):
            return input
        return self.native().forward(self, input)

    @classmethod
    def native(cls) -> type[nn.Module]:
        """The activation's own class."""
        return cls.__mro__[2]


class PassingReLU(Passing, nn.ReLU): ...


class PassingReLU6(Passing, nn.ReLU6): ...


class PassingLeakyReLU(Passing, nn.LeakyReLU): ...


class PassingSiLU(Passing, nn.SiLU): ...


class PassingGELU(Passing, nn.GELU): ...


class PassingHardswish(Passing, nn.Hardswish): ...


class PassingSigmoid(Passing, nn.Sigmoid): ...


PASSING = {kind.native(): kind for kind in Passing.__subclasses__()}


def fuse(model: nn.Module) -> None:
    """Have the batch norms that follow a model's grouped convolutions compute the activations that follow them."""
    unfuse(model)  # what has become another module since, or is called in other places, is seen anew
    taken: dict[str, str] = {}
    left: dict[str, str] = {}
    names = {module: name for name, module in model.named_modules()}
    for conv, chain in chains.found(model, (True, False)).items():
        reason = chain if isinstance(chain, str) else _why_left(chain)
        if isinstance(chain, str) or reason is not None:
            left[names[conv]] = str(reason)
            continue
        norm: Any
        activate: Any
        norm, activate = chain.norm, chain.activate
        if chains.is_timm_norm(norm):
            norm.__class__ = _of_timm(type(norm))  # type: ignore[arg-type]
            taken[names[conv]] = f"batch norm and {chains.activation_of(norm.act)}"
            continue
        if not isinstance(activate, Passing):  # which another convolution has too
            activate.__class__ = PASSING[type(activate)]
        state = vars(norm)  # what is here is no child of its own
        state["_following"], state["_held"], state["_caller"] = chain.places, chain.held[:2], chain.caller
        norm.__class__ = BatchNormAct2d
        taken[names[conv]] = f"batch norm and {chains.activation_of(activate, activate.native())}"
    chains.tell("convert", taken, left)


def _why_left(chain: chains.Chain) -> str | None:
    if isinstance(chain.norm, nn.SyncBatchNorm):
        return "a SyncBatchNorm follows, whose statistics are of all processes"
    if chains.is_timm_norm(chain.norm):
        none = "its batch norm has no activation" if chains.activation_of(chain.norm.act) is None else None
        return chains.doubt_of_timm_norm(chain.norm) or none
    if chain.recomputed:
        return "a part of a module's code is computed again in its backward pass"
    activate = chain.activate
    native = activate.native() if isinstance(activate, Passing) else type(activate)
    if activate is None or native not in PASSING or chains.activation_of(activate, native) is None:
        return "no activation of triton_conv's takes its batch norm's result alone"
    return None


def unfuse(model: nn.Module) -> None:
    """`fuse` undone. What is a subclass by now, parametrized say, stays."""
    module: Any
    for module in model.modules():
        if isinstance(module, BatchNormAct2d) and "_native" in vars(type(module)):
            for name in ("_following", "_held", "_caller"):
                vars(module).pop(name, None)
            module.__class__ = module._native  # type: ignore[assignment]
        elif type(module) in PASSING.values():
            module.__class__ = module.native()
