"""Calls found again by all that their plans and kernels depend on.

What is checked before a launch is here too: whether kernels of ours can run on the tensors, and for which GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import algorithms, devices, dispatch, launcher, torch_private, trial
from .arguments import ConvArgs, consistent, is_convolution, normalise, out_channels_last, plain
from .call import Call, is_unreadable, traits, traits_of_new
from .problem import ConvProblem, channels_innermost, dense_strides

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MOST_CALLS = 4096  # prepared calls kept; a program with more shapes than this starts over


# --- What is checked before a launch ---------------------------------------------------------------------------------


def unsupported(x: Tensor) -> str | None:
    """Why no kernel of ours can run on such tensors, on whatever device, or None."""
    if algorithms.UNUSABLE is not None:
        return algorithms.UNUSABLE
    if x.dtype not in DTYPES:
        return f"dtype {str(x.dtype).removeprefix('torch.')} has no kernels"
    return None


def refusal(x: Tensor, backend: str) -> str | None:
    """Why no kernel of ours may run on these tensors where they are, or None."""
    why_not = unsupported(x)
    if why_not is not None or x.device.type == "cuda":
        return why_not
    interpreted = x.device.type == "cpu" and algorithms.INTERPRETED
    stubbed = x.device.type in ("cpu", "meta") and launcher.stub_target() is not None  # which reads no values
    if backend != "auto" and (interpreted or stubbed):
        return None
    return f"tensors are on {x.device}, and the kernels run on GPUs (forced with TRITON_INTERPRET=1, on CPU tensors)"


def target_of(device: torch.device) -> devices.Target:
    """The GPU to plan for: the tensors' own, the stub driver's, or the default where there is none."""
    if device.type == "cuda" and torch.cuda.is_available():
        return devices.of_device(torch.cuda.current_device() if device.index is None else device.index)
    return launcher.stub_target() or devices.DEFAULT


def set_trials(wanted: bool | None) -> None:
    """Choose whether plans that nobody measured on this GPU prove themselves in your own calls, before they are taken.

    A kind of call goes on trial when it is seen for the fourth time. Until its trial is over F.conv2d serves it, and no
    call waits: our kernels are compiled in other processes, of the lowest priority; run once beside F.conv2d on the
    same tensors, to be compared; then take turns with F.conv2d, between events on the stream. What is 3% faster than
    F.conv2d is taken from then on, in later processes too (DEVICE.trials.jsonl in the user's configuration folder).

    Args:
        wanted: None, the default, follows PyTorch: on where torch.backends.cudnn.benchmark is True, and neither
            torch.backends.cudnn.deterministic nor torch.use_deterministic_algorithms. True and False decide. The flags
            are read, never written, in each call; while trials are off, those that are under way rest.

    Raises: ValueError for anything else.
    Accuracy: the result of a call on trial is F.conv2d's or that of a kernel whose result differed from F.conv2d's by
        no more than both may be off; which of them, the clock decides. Results are bitwise repeatable without trials.
    Source: own derivation. `groupconv.trials` and `groupconv.explain` show the state, `groupconv trials` the file.
    """
    trial.wish(wanted)


# --- The problem of a call -------------------------------------------------------------------------------------------

_wished_fp32_precision: str | None = None  # None: torch's setting decides


def set_fp32_precision(precision: str | None) -> None:
    """Choose how our kernels multiply fp32 operands, from the next call on, in all threads.

    Args:
        precision: None, the default, follows torch.backends.cudnn.conv.fp32_precision (TF32 or IEEE). "bf16x3" splits
            each operand into two bf16 numbers and makes three bf16 products of one: several times the rate of IEEE
            arithmetic, where there are matrix units. Depthwise kernels keep to IEEE arithmetic, which costs them less.
            F.conv2d, where a plan takes it, follows torch's setting.

    Raises: ValueError for anything else.
    Accuracy: of bf16x3, ||error|| / ||result|| against float64 at most 1e-5 + 2^-23 * sqrt(terms).
    Source: Triton's input_precision="bf16x3".
    """
    global _wished_fp32_precision
    if precision not in (None, "bf16x3"):
        raise ValueError(f'set_fp32_precision: precision is {precision!r}, but must be None or "bf16x3"')
    _wished_fp32_precision = precision


def _fp32_precision() -> str:
    return _wished_fp32_precision or torch_private.fp32_precision_of_convolutions()


def make_problem(x: Tensor, w: Tensor, has_bias: bool, args: ConvArgs) -> ConvProblem:
    """The problem of 4-D tensors and normalised arguments."""
    dtype = DTYPES.get(x.dtype, "fp32")
    if dtype == "fp32" and (precision := _fp32_precision()) in ("tf32", "bf16x3"):
        dtype = precision
    return ConvProblem(
        x.shape[0], x.shape[1], x.shape[2], x.shape[3], w.shape[0], w.shape[2], w.shape[3],
        args.stride, args.padding, args.dilation, args.groups, dtype,
        "nhwc" if channels_innermost(x.shape, x.stride()) else "nchw",
        "nhwc" if out_channels_last(x, w) else "nchw", has_bias,
    )  # fmt: skip


# --- Calls by what they depend on ------------------------------------------------------------------------------------

_CALLS: dict[tuple, Call] = {}


def reset() -> None:
    """Forget every plan and prepared call, to plan anew after configuration files changed."""
    _CALLS.clear()


def _key(x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, backend: str) -> tuple:
    """Everything that a plan or a compiled kernel depends on."""
    precision = _fp32_precision() if x.dtype is torch.float32 else None
    return traits(x), traits(w), traits(bias), stride, padding, dilation, groups, backend, precision


def lookup(x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, backend: str) -> Call | None:
    """The prepared call of 4-D tensors and F.conv2d's arguments, planned if it is new.

    None if no prepared call can serve: there is no such convolution, or none that kernels could read as it is.
    """
    # 1, True and 1.0 are equal as keys but not to F.conv2d.
    arguments = plain(stride, padding, dilation, groups)
    if arguments is None:
        return None
    try:
        key = _key(x, w, bias, *arguments, backend)
    except RuntimeError:  # a nested tensor has no shape
        return None
    call = _CALLS.get(key)
    if call is None:
        args = normalise(x.shape, w.shape, *arguments)
        if args is None or any(map(is_unreadable, (x, w, bias))) or not consistent(x, w, bias):
            return None
        return _plan_call(key, x, w, bias, args, backend)
    return call.current()


def lookup_of_operator(x: Tensor, w: Tensor, bias: Tensor | None, args: ConvArgs, backend: str) -> Call | None:
    """The prepared call of an operator's arguments; None if they are no convolution, for F.conv2d to say why."""
    if not (x.dim() == w.dim() == 4 and consistent(x, w, bias)):
        return None
    key = _key(x, w, bias, *args, backend)
    call = _CALLS.get(key)
    if call is None and is_convolution(x.shape, w.shape, args) and not any(map(is_unreadable, (x, w, bias))):
        call = _plan_call(key, x, w, bias, args, backend)
    return None if call is None else call.current()


def lookup_transposed(dy: Tensor, w: Tensor, shape, args: ConvArgs, backend: str) -> Call | None:
    """The prepared call of the convolution of a tensor of this shape whose gradient is asked for, of its result's dy.

    The tensor is one that is allocated, in the memory format of dy or w.
    """
    if any(map(is_unreadable, (dy, w))) or not consistent(dy, w, None):
        return None
    strides = dense_strides(shape, out_channels_last(dy, w))
    precision = _fp32_precision() if dy.dtype is torch.float32 else None
    key = traits_of_new(shape, strides, dy), traits(w), None, *args, backend, precision
    call = _CALLS.get(key)
    if call is None:
        return _plan_call(key, launcher.allocate(shape, strides, dy), w, None, args, backend)
    return call.current()


def _plan_call(key: tuple, x, w, bias, args: ConvArgs, backend: str) -> Call:
    """The call of a new key, planned and kept."""
    problem = make_problem(x, w, bias is not None, args)
    plan = dispatch.plan(problem, target_of(x.device), backend, refusal(x, backend))
    if len(_CALLS) >= MOST_CALLS:
        _CALLS.clear()
    call = _CALLS[key] = Call(problem, plan, args, backend, x, w, bias)
    return call
