"""Ours in the place of the convolutions of torch.nn.functional, for all code of a process that calls them by name."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from . import eager, torch_private
from .api import triton_conv
from .kinds import conv1d, conv_transpose1d, conv_transpose2d

_LOCK = threading.Lock()
_on = False
_replaced: dict[str, Any] = {}  # by name, of those that ours stand in for, or are called by what stands there now


def _line(ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A 1-D convolution whose result lies as PyTorch's does, which on GPUs is contiguous."""

    def call(*arguments):
        y = ours(*arguments)
        return y.contiguous() if y.is_cuda else y

    return call


_OURS: dict[str, Callable[..., Tensor]] = {
    "conv1d": _line(conv1d),
    "conv2d": triton_conv,
    "conv_transpose1d": _line(conv_transpose1d),
    "conv_transpose2d": conv_transpose2d,
}


def _function(name: str) -> Callable[..., Tensor]:
    """What stands in for a function of torch.nn.functional: grouped calls are ours, the others go on to it."""
    of_torch, axes = getattr(torch, name), int(name[-2])

    def conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if not _on or (type(groups) is int and groups == 1) or _is_torchs(input, weight, bias, padding, groups, axes):
            return _replaced.get(name, of_torch)(input, weight, bias, stride, padding, dilation, groups)
        return _OURS[name](input, weight, bias, stride, padding, dilation, groups)

    def transposed(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        arguments = input, weight, bias, stride, padding, output_padding, groups, dilation
        if not _on or (type(groups) is int and groups == 1) or _is_torchs(input, weight, bias, padding, groups, axes):
            return _replaced.get(name, of_torch)(*arguments)
        return _OURS[name](*arguments)

    function = functools.wraps(of_torch)(transposed if "transpose" in name else conv)
    function.__module__, function.__qualname__ = "torch.nn.functional", name  # by which it is pickled
    if torch_private.register_scripted is not None:
        torch_private.register_scripted(function, f"aten::{name}")
    return function


def _is_torchs(input, weight, bias, padding, groups, axes: int) -> bool:
    """Whether a grouped call is PyTorch's to take: to trace, to hand to an override of its function, or to refuse."""
    if torch_private.functions_are_overridden():  # first, since a mode sees what is read of tensors too
        return True
    for tensor in (input, weight, bias):
        if not eager.knows_operators(tensor) or (tensor is not None and tensor.is_nested):
            return True
    if isinstance(groups, (torch.SymInt, fx.Proxy)):
        return True
    return isinstance(padding, (tuple, list)) and len(padding) > axes  # that of each side has no such function


_FUNCTIONS = {name: _function(name) for name in _OURS}


def enable() -> contextlib.AbstractContextManager[None]:
    """Have torch.nn.functional's conv1d, conv2d, conv_transpose1d and conv_transpose2d take our way where groups > 1.

    That is every grouped convolution of every model that calls them by these names, as torch.nn's layers do and their
    subclasses: no model has to be converted. backend is "auto", so that calls that no kernel of ours serves, of CPU
    tensors say, are PyTorch's to the bit; results lie in memory as PyTorch's do. Ungrouped calls go by.

    What escapes: torch.conv2d and its like by that name, `from torch.nn.functional import conv2d` before, and what is
    compiled already: TorchScript, and graphs of torch.compile made before. Tensor subclasses, and modes other than
    torch.set_default_device's, which may override PyTorch's function, see that one: torch.conv2d, which is not F.conv2d
    as long as this is on. So code that looks F.conv2d itself up meanwhile, or compares with it, misses: the name that
    torch.overrides.resolve_name has for it is None, and PyTorch's gradients of each sample
    (torch.nn.utils._per_sample_grad) raise.

    The switch is the process's: all threads go by it. As a context manager it is put back as it was at the end:

        with groupconv.enable():
            train(model)

    Calling it again changes nothing. `disable` undoes it, and may be a context inside.

    Returns: the context manager, which needs not be entered. Raises: RuntimeError in a function that torch.compile
    takes as one graph; else it breaks the graph. Source: own derivation.
    """
    return _turned("enable", True)


def disable() -> contextlib.AbstractContextManager[None]:
    """`enable` undone: torch.nn.functional's convolutions are what they were. Without it before, nothing is changed.

    Returns: a context manager, which needs not be entered, at whose end it is as before. Raises: as `enable`.
    Source: own derivation.
    """
    return _turned("disable", False)


def is_enabled() -> bool:
    """Whether grouped calls of torch.nn.functional's convolutions take our way."""
    return _on


class _Turned(contextlib.AbstractContextManager):
    def __init__(self, on: bool):
        self._on, self._before = on, _turn(on)

    def __enter__(self) -> None:
        if _on != self._on:  # it was turned in between
            self._before = _turn(self._on)

    def __exit__(self, *_: object) -> None:
        _turn(self._before)


def _turned(function: str, on: bool) -> _Turned:
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{function}: call it outside of what torch.compile compiles")
    return _Turned(on)


def _turn(on: bool) -> bool:
    """Turn the switch; how it was. A function that something else has wrapped stays where it is, and passes on."""
    global _on
    with _LOCK:
        if on and not _replaced:
            torch.overrides.get_overridable_functions()  # PyTorch names what stands there, once: its own functions
        before, _on = _on, on
        for name, function in _FUNCTIONS.items():
            if on and name not in _replaced:
                _replaced[name] = getattr(F, name)
                setattr(F, name, function)
            elif not on and getattr(F, name) is function:
                setattr(F, name, _replaced.pop(name))
        return before
