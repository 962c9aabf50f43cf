"""What the library takes of PyTorch that PyTorch does not promise to keep: every such name is used in this file alone.

A PyTorch that lost a name which calls need fails to import this file, and the ImportError says which name it was. A
name is None where it serves one of PyTorch's tools, which then does without.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

OLDEST_TORCH, TESTED_TORCH = "2.11", "2.13"

try:
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _are_functorch_transforms_active,
        _ExcludeDispatchKeyGuard,
        _get_cudnn_benchmark,
        _get_cudnn_deterministic,
        _get_deterministic_algorithms,
        _get_fp32_precision_getter,
        _get_tracing_state,
        _is_any_autocast_enabled,
        _is_torch_function_enabled,
        _is_torch_function_mode_enabled,
        _len_torch_dispatch_stack,
        _will_engine_execute_node,
    )
    from torch._C._autograd import _profiler_enabled, _top_saved_tensors_default_hooks
    from torch._C._dynamo.eval_frame import get_eval_frame_callback
    from torch._C._functorch import (
        TransformType,
        get_interpreter_stack,
        is_batchedtensor,
        is_legacy_batchedtensor,
        maybe_current_level,
    )
    from torch._C._profiler import _RecordFunctionFast
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.autograd import forward_ad
    from torch.nn.modules.module import _has_any_global_hook
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError as error:
    needed = f"PyTorch {OLDEST_TORCH} or newer is needed, and {TESTED_TORCH} was tried"
    raise ImportError(f"groupconv: {needed}; of {torch.__version__}: {error}") from error

__all__ = [
    "CODES_OF_MODULE_CALLS", "FakeTensor", "TorchDispatchMode", "any_autocast", "being_traced",
    "call_from_inductor", "cudnn_is_deterministic", "cudnn_searches", "current_gpu", "determinism_is_asked_for",
    "direct_apply", "dispatch_modes", "forward_mode_is_on", "fp32_precision_of_convolutions",
    "functions_are_overridden", "fusers_of_quantization", "has_hooks", "is_batched", "is_being_derived",
    "is_going_to_run", "is_transformed", "is_watched", "overrides_are_on", "profiler_is_on", "recorded",
    "register_decomposition", "register_scripted", "saved_tensors_are_packed", "without_dispatch_key",
]  # fmt: skip

any_autocast: Callable[[], bool] = _is_any_autocast_enabled
being_traced: Callable[[], object | None] = _get_tracing_state  # by torch.jit, or None
# torch.backends.cudnn.benchmark and .deterministic, and torch.are_deterministic_algorithms_enabled, without a detour.
cudnn_searches: Callable[[], bool] = _get_cudnn_benchmark
cudnn_is_deterministic: Callable[[], bool] = _get_cudnn_deterministic
determinism_is_asked_for: Callable[[], bool] = _get_deterministic_algorithms
profiler_is_on: Callable[[], bool] = _profiler_enabled
# A context that is an event of a name, and of tensors whose shapes are told.
recorded: Callable[[str, list], contextlib.AbstractContextManager] = _RecordFunctionFast
dispatch_modes: Callable[[], int] = _len_torch_dispatch_stack  # how many are on
# "ieee", "tf32" or "none": torch.backends.cudnn.conv.fp32_precision without its class.
fp32_precision_of_convolutions: Callable[[], str] = functools.partial(_get_fp32_precision_getter, "cuda", "conv")

current_gpu: Callable[[], int]
try:
    from torch._C import _cuda_getDevice as current_gpu
except ImportError:  # a PyTorch for CPUs; where it was renamed, the public function does the same more slowly
    current_gpu = torch.cuda.current_device

# What torch.export knows of an operator in the terms of others.
register_decomposition: Any
try:
    from torch._decomp import register_decomposition
except ImportError:
    register_decomposition = None

# Have torch.jit.script take a Python function for the operator of a name.
register_scripted: Callable[[Callable, str], object] | None
try:
    from torch.jit._builtins import _register_builtin as register_scripted
except ImportError:  # then it says that it cannot read the function
    register_scripted = None

# torch.ao.quantization's table: types of layers in a row to the function that fuses them.
fusers_of_quantization: dict | None
try:
    from torch.ao.quantization.fuser_method_mappings import _DEFAULT_OP_LIST_TO_FUSER_METHOD as fusers_of_quantization
except ImportError:  # PyTorch is about to move quantization to another package
    fusers_of_quantization = None


# The code through which nn.Module calls forward, as far as it goes by these names.
CODES_OF_MODULE_CALLS = tuple(
    function.__code__
    for name, function in vars(torch.nn.Module).items()
    if name in ("_wrapped_call_impl", "_call_impl")
)


def is_among_compiled() -> bool:
    """Whether torch.compile is taking the functions that are called now, or was told to go by those it has taken."""
    return get_eval_frame_callback() is not None


def call_from_inductor(operator: str) -> None:
    """Have Inductor, where it is loaded, call an operator as it is, which it refuses for one with a decomposition
    where the environment has a variable CI, as on most services that run tests.
    """
    allowed = getattr(sys.modules.get("torch._inductor.lowering"), "FALLBACK_ALLOW_LIST", None)
    if allowed is not None:
        allowed.add(operator)


def overrides_are_on() -> bool:
    """What has_torch_function_variadic has asked already, but not under torch.compile: __torch_function__'s own
    implementation calls the function again with overrides off.
    """
    return _is_torch_function_enabled() or _is_torch_function_mode_enabled()


def functions_are_overridden() -> bool:
    """Whether a mode is on that may take PyTorch's functions: any but torch.device's, which only makes tensors."""
    if torch.compiler.is_compiling() or not _is_torch_function_mode_enabled():
        return False
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def is_watched() -> bool:
    """Whether every operator must be seen by something: a dispatch mode, torch.func, or forward-mode derivatives."""
    return bool(_len_torch_dispatch_stack()) or maybe_current_level() is not None or forward_mode_is_on()


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for many, as autograd (is_grads_batched) and torch.vmap have it."""
    return is_batchedtensor(tensor) or is_legacy_batchedtensor(tensor)


def forward_mode_is_on() -> bool:
    """Whether forward-mode derivatives are taken."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether torch.func applies any transform, or forward-mode derivatives are taken; torch.compile can ask it."""
    return _are_functorch_transforms_active() or forward_mode_is_on()


def is_being_derived() -> bool:
    """Whether torch.func applies a transform other than vmap, which are those that take derivatives."""
    return any(transform.key() != TransformType.Vmap for transform in get_interpreter_stack() or ())


def has_hooks(*modules: torch.nn.Module) -> bool:
    """Whether anything watches or changes what modules take and give, forward or backward."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return _has_any_global_hook() or any(getattr(module, name) for module in modules for name in names)


def saved_tensors_are_packed() -> bool:
    """Whether hooks take what autograd saves, to offload it, or to compute it again in the backward pass."""
    return _top_saved_tensors_default_hooks(True) is not None


def is_going_to_run(node) -> bool:
    """Whether the backward pass in progress is going to execute a node of autograd's graph."""
    try:
        return _will_engine_execute_node(node)
    except RuntimeError:  # of a leaf that autograd.grad was asked for; or there is no engine
        return True


def without_dispatch_key(name: str) -> Callable[[], contextlib.AbstractContextManager]:
    """What makes contexts in which PyTorch's dispatcher skips a key; AttributeError for one that it does not have."""
    return functools.partial(_ExcludeDispatchKeyGuard, DispatchKeySet(getattr(DispatchKey, name)))


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Function.apply without its first step, a quarter of its time: to unwrap what torch.func left behind.

    For plain tensors alone, which have nothing of it.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
