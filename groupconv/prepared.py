"""Prepared calls: a convolution that is planned, its kernels bound, found again by all that they depend on.

What is checked before a launch is here too: whether kernels of ours can run on the tensors, and for which GPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import algorithms, devices, dispatch, launcher, torch_private
from .algorithms import REGISTRY, torch_reference
from .arguments import ConvArgs, consistent, is_convolution, normalise, plain
from .problem import ConvProblem, channels_innermost, dense_strides, meaningful_strides, suggests_channels_last

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
MOST_CALLS = 4096  # prepared calls kept; a program with more shapes than this starts over
ON_HIP = torch.version.hip is not None


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
    forced = x.device.type in ("cpu", "meta") and backend != "auto"
    if forced and (algorithms.INTERPRETED or launcher.stub_target() is not None):
        return None
    return f"tensors are on {x.device}, and the kernels run on GPUs (forced with TRITON_INTERPRET=1, on CPU tensors)"


def target_of(device: torch.device) -> devices.Target:
    """The GPU to plan for: the tensors' own, the stub driver's, or the default where there is none."""
    if device.type == "cuda" and torch.cuda.is_available():
        return devices.of_device(torch.cuda.current_device() if device.index is None else device.index)
    return launcher.stub_target() or devices.DEFAULT


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


def out_channels_last(x: Tensor, w: Tensor) -> bool:
    """Whether y and dx are channels_last, as F.conv2d has them: ATen's word for it, whatever kernels read."""
    return suggests_channels_last(x.shape, x.stride()) or suggests_channels_last(w.shape, w.stride())


def dx_strides(x: Tensor, w: Tensor) -> tuple[int, int, int, int]:
    """Element strides of the gradient by x, as F.conv2d has them."""
    return dense_strides(x.shape, out_channels_last(x, w))


def dw_strides(w: Tensor) -> tuple[int, int, int, int]:
    """Element strides of the gradient by w, as F.conv2d has them."""
    return dense_strides(w.shape, suggests_channels_last(w.shape, w.stride()))


# --- Prepared calls --------------------------------------------------------------------------------------------------


def _traits(tensor: Tensor | None):
    """All of a tensor that a plan, a compiled kernel or a launch depends on; RuntimeError if it has no memory.

    Triton specialises a pointer on its alignment to 16 bytes, and on AMD on whether 32 bits reach all of its memory.
    """
    if tensor is None:
        return None
    pointer = tensor.data_ptr()
    address: object = pointer & 15 == 0 if pointer else None
    if ON_HIP:
        address = address, tensor.untyped_storage().nbytes() < 2**31
    plain_type = type(tensor) in PLAIN_TYPES
    return plain_type, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, address, tensor.is_neg()


def _is_unreadable(tensor: Tensor | None) -> bool:
    """Whether kernels cannot read a tensor where it lies: it is negated lazily, or its memory was freed."""
    if tensor is None:
        return False
    freed = tensor.data_ptr() == 0 and tensor.numel() > 0 and tensor.device.type != "meta"
    return freed or tensor.is_neg()


def torch_gradients(dy, x, w, args: ConvArgs, needs):
    """(dx, dw, db), each None unless needed, by F.conv2d's own backward, with its exceptions."""
    need_x, need_w, need_b = needs
    dx, dw = torch_reference.backward(args, dy, x, w, need_x, need_w) if need_x or need_w else (None, None)
    return dx, dw, dy.sum((0, 2, 3)) if need_b else None


class Call:
    """A planned convolution with its launches: what all calls of one key share."""

    def __init__(
        self, problem: ConvProblem, plan: dispatch.Plan, args: ConvArgs, backend: str,
        x: Tensor, w: Tensor, bias: Tensor | None,
    ):  # fmt: skip
        self.problem, self.plan, self.args, self.backend = problem, plan, args, backend
        self.device = x.device.index if x.device.type == "cuda" else None
        self.strides = {
            "x": meaningful_strides(x.shape, x.stride()),
            "w": w.stride(),
            "y": dense_strides(problem.y_shape, problem.out_layout == "nhwc"),
            "dx": dx_strides(x, w),
            "dw": dw_strides(w),
        }
        self.copy_bias = bias is not None and not bias.is_contiguous()
        self._x_traits, self._w_traits = _traits(x), _traits(w)
        self._kind = x.dtype, x.device
        self._forward: Callable | None = None
        self._backward: dict[tuple, Callable] = {}

    # Of the backward passes nothing is planned before gradients are wanted.

    @functools.cached_property
    def torch_fprop(self) -> bool:
        return self.plan.fprop.algorithm == "torch"

    @functools.cached_property
    def torch_dgrad(self) -> bool:
        return self.plan.dgrad.algorithm == "torch"

    @functools.cached_property
    def torch_wgrad(self) -> bool:
        return self.plan.wgrad.algorithm == "torch"

    @functools.cached_property
    def all_torch(self) -> bool:
        return self.torch_fprop and self.torch_dgrad and self.torch_wgrad and self.plan.backward is None

    def _prepare(self, pass_: str, **strides):
        plan = getattr(self.plan, pass_)
        prepare = REGISTRY[plan.algorithm].prepare
        return prepare(self.problem, pass_, plan.config, self.plan.target, self.strides | strides)

    def _elsewhere(self) -> bool:
        """Whether the current device is another than that of the tensors, which launches want."""
        return self.device is not None and self.device != torch_private.current_gpu()

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """y of tensors that this call was looked up for."""
        if self.problem.batch == 0:
            return launcher.allocate(self.problem.y_shape, self.strides["y"], x)
        run = self._forward
        if run is None:
            if self.torch_fprop:
                run = functools.partial(torch_reference.fprop, self.args)
            else:
                run = self._prepare("fprop")
            self._forward = run
        if self.copy_bias and bias is not None:
            bias = bias.contiguous()
        try:
            if self._elsewhere():
                with torch.cuda.device(self.device):
                    return run(x, w, bias)
            return run(x, w, bias)
        except launcher.Miscompiled as error:
            self._give_up(error)
            self._forward = functools.partial(torch_reference.fprop, self.args)
            return self._forward(x, w, bias)

    def _give_up(self, error: launcher.Miscompiled) -> None:
        """Warn that F.conv2d serves; of a backend that was asked for, raise."""
        if self.backend != "auto":
            raise error
        warnings.warn(f"{error}; F.conv2d runs instead", stacklevel=4)

    def backward(self, dy: Tensor, x: Tensor | None, w: Tensor | None, needs: tuple[bool, bool, bool]):
        """(dx, dw, db), each None unless needed; None instead of them where no launch of this call is for such tensors.

        Autograd may hand back other tensors than were saved, and any dy: every property that a launch is prepared for
        is compared, in every call. x may be None unless `saves` says otherwise, and so may w.
        """
        try:
            key = needs, _traits(dy), _traits(x), _traits(w)
        except RuntimeError:  # a wrapper, of vmap say
            return None
        run = self._backward.get(key)
        if run is None:
            if not self._fits(dy, x, w):
                return None
            run = self._backward[key] = self._prepare_backward(dy, *needs)
        try:
            if self._elsewhere():
                with torch.cuda.device(self.device):
                    return run(dy, x, w)
            return run(dy, x, w)
        except launcher.Miscompiled as error:
            self._give_up(error)
            self._backward[key] = self._by_torch(needs)
            return self._backward[key](dy, x, w)

    def _by_torch(self, needs: tuple[bool, bool, bool]) -> Callable:
        """F.conv2d's gradients; of an operand that was not saved, as its values are not needed, the shape."""

        def run(dy, x, w):
            return torch_gradients(dy, *self.in_place_of_unsaved(x, w), self.args, needs)

        return run

    def _fits(self, dy: Tensor, x: Tensor | None, w: Tensor | None) -> bool:
        """Whether x and w are as they were in the forward pass, and dy is a plain tensor of y's shape and kind."""
        saved = (x, self._x_traits), (w, self._w_traits)
        if any(tensor is not None and _traits(tensor) != traits for tensor, traits in saved):
            return False
        alike = dy.shape == self.problem.y_shape and (dy.dtype, dy.device) == self._kind
        return alike and type(dy) in PLAIN_TYPES and dy.layout is torch.strided and not _is_unreadable(dy)

    def _prepare_backward(self, dy: Tensor, need_x: bool, need_w: bool, need_b: bool) -> Callable:
        """What makes the gradients that are needed of a dy like this: one launch for two, one each, or F.conv2d."""
        problem = self.problem
        dy_strides = meaningful_strides(dy.shape, dy.stride())
        grads: Callable
        if problem.batch == 0:

            def grads(dy, x, w):
                dx = launcher.allocate(problem.x_shape, self.strides["dx"], dy) if need_x else None
                dw = launcher.allocate(problem.w_shape, self.strides["dw"], dy).zero_() if need_w else None
                return dx, dw

        elif need_x and need_w and self.plan.backward is not None:
            grads = self._prepare("backward", dy=dy_strides)
        else:
            by_torch = need_x and self.torch_dgrad, need_w and self.torch_wgrad
            dgrad = self._prepare("dgrad", dy=dy_strides) if need_x and not by_torch[0] else None
            wgrad = self._prepare("wgrad", dy=dy_strides) if need_w and not by_torch[1] else None

            def grads(dy, x, w):
                dx, dw = torch_reference.backward(self.args, dy, x, w, *by_torch) if any(by_torch) else (None, None)
                return dx if dgrad is None else dgrad(dy, w), dw if wgrad is None else wgrad(dy, x)

        def run(dy, x, w):
            dx, dw = grads(dy, x, w)
            return dx, dw, dy.sum((0, 2, 3)) if need_b else None

        return run

    def saves(self, need_x: bool, need_w: bool) -> tuple[bool, bool]:
        """Which of x and w a backward that needs these gradients reads."""
        return need_w or (need_x and self.torch_dgrad), need_x or (need_w and self.torch_wgrad)

    def in_place_of_unsaved(self, x: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and w; for one that was not saved, a tensor of its shape that takes no memory and has no values."""
        return (
            self._valueless(self.problem.x_shape) if x is None else x,
            self._valueless(self.problem.w_shape) if w is None else w,
        )

    def _valueless(self, shape) -> Tensor:
        dtype, device = self._kind
        return torch.empty((), dtype=dtype, device=device).expand(shape)


# --- Calls by what they depend on ------------------------------------------------------------------------------------

_CALLS: dict[tuple, Call] = {}


def reset() -> None:
    """Forget every plan and prepared call, to plan anew after configuration files changed."""
    _CALLS.clear()


def _key(x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, backend: str) -> tuple:
    """Everything that a plan or a compiled kernel depends on."""
    precision = _fp32_precision() if x.dtype is torch.float32 else None
    return _traits(x), _traits(w), _traits(bias), stride, padding, dilation, groups, backend, precision


def lookup(x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, backend: str) -> Call | None:
    """The prepared call of 4-D tensors and F.conv2d's arguments, planned if it is new.

    None if no prepared call can serve: there is no such convolution, or none that kernels could read as it is.
    """
    # 1, True and 1.0 are equal as keys but not to F.conv2d.
    arguments = plain(stride, padding, dilation, groups)
    if arguments is None:
        return None
    key = _key(x, w, bias, *arguments, backend)
    call = _CALLS.get(key)
    if call is None:
        args = normalise(x.shape, w.shape, *arguments)
        if args is None or any(map(_is_unreadable, (x, w, bias))) or not consistent(x, w, bias):
            return None
        call = _plan_call(key, x, w, bias, args, backend)
    return call


def lookup_of_operator(x: Tensor, w: Tensor, bias: Tensor | None, args: ConvArgs, backend: str) -> Call | None:
    """The prepared call of an operator's arguments; None if they are no convolution, for F.conv2d to say why."""
    if not (x.dim() == w.dim() == 4 and consistent(x, w, bias)):
        return None
    key = _key(x, w, bias, *args, backend)
    call = _CALLS.get(key)
    if call is None and is_convolution(x.shape, w.shape, args) and not any(map(_is_unreadable, (x, w, bias))):
        call = _plan_call(key, x, w, bias, args, backend)
    return call


def _plan_call(key: tuple, x, w, bias, args: ConvArgs, backend: str) -> Call:
    """The call of a new key, planned and kept."""
    problem = make_problem(x, w, bias is not None, args)
    plan = dispatch.plan(problem, target_of(x.device), backend, refusal(x, backend))
    if len(_CALLS) >= MOST_CALLS:
        _CALLS.clear()
    call = _CALLS[key] = Call(problem, plan, args, backend, x, w, bias)
    return call
