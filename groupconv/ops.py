"""The convolution as PyTorch calls it: the eager path, the registered operators, their autograd and autocast.

Eager calls on plain tensors go from `conv2d` through a dictionary of prepared calls to a launch, inside one
autograd.Function. Everything else (torch.compile, export, functorch, tensor subclasses, dispatch modes) goes through
the operators groupconv::conv2d and groupconv::conv2d_backward, which end in the same prepared calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.autograd.forward_ad
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import devices, dispatch, launcher, stub_driver
from .algorithms import REGISTRY, torch_reference
from .kernels import implicit_gemm as general_kernels
from .problem import ConvProblem, dense_strides, output_size, suggests_channels_last

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PLAIN = (Tensor, torch.nn.Parameter)
MOST_CALLS = 4096  # prepared calls kept; a program with more shapes than this starts over
ON_HIP = torch.version.hip is not None


class ConvArgs(NamedTuple):
    """F.conv2d's arguments in one form: padding is top, bottom, left, right."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


def _pair(value) -> tuple[int, int] | None:
    """An int, a pair, or a sequence of one, as PyTorch takes them; None for anything else."""
    if _is_int(value):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) in (1, 2) and all(_is_int(v) for v in value):
        return value[0], value[-1]
    return None


def _is_int(value) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def normalise(x_shape, w_shape, stride, padding, dilation, groups) -> ConvArgs | None:
    """The call's arguments in one form, or None if there is no such convolution of 4-D tensors of these shapes."""
    stride, dilation = _pair(stride), _pair(dilation)
    if stride is None or dilation is None or not _is_int(groups) or len(x_shape) != 4 or len(w_shape) != 4:
        return None
    if min(*stride, *dilation, groups) < 1 or min(w_shape) < 1:
        return None
    if padding == "same":
        if stride != (1, 1):
            return None
        # An even kernel's odd pixel of padding goes to the bottom and right.
        total = [d * (k - 1) for d, k in zip(dilation, w_shape[2:], strict=True)]
        pad = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        both = (0, 0) if padding == "valid" else _pair(padding)
        if both is None or min(both) < 0:
            return None
        pad = (both[0], both[0], both[1], both[1])
    if x_shape[1] != groups * w_shape[1] or w_shape[0] % groups or min(x_shape[1:]) < 1:
        return None
    h_out, w_out = _out_pixels(x_shape, w_shape, stride, pad, dilation)
    if h_out < 1 or w_out < 1:
        return None
    return ConvArgs(stride, pad, dilation, groups)


def _out_pixels(x_shape, w_shape, stride, padding, dilation):
    top, bottom, left, right = padding
    return (
        output_size(x_shape[2], w_shape[2], stride[0], top + bottom, dilation[0]),
        output_size(x_shape[3], w_shape[3], stride[1], left + right, dilation[1]),
    )


def _consistent(x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Whether dtypes, devices and the bias's shape agree, as F.conv2d demands, and all is dense."""
    if any(t is not None and t.layout is not torch.strided for t in (x, w, bias)):
        return False
    if x.dtype != w.dtype or x.device != w.device:
        return False
    return bias is None or (bias.dtype == x.dtype and bias.device == x.device and bias.shape == w.shape[:1])


def unsupported(x: Tensor) -> str | None:
    """Why no kernel of ours can run on such tensors, on whatever device, or None."""
    if x.dtype not in DTYPES:
        return f"dtype {str(x.dtype).removeprefix('torch.')} has no kernels"
    return None


def refusal(x: Tensor, backend: str) -> str | None:
    """Why no kernel of ours may run on these tensors where they are, or None."""
    why_not = unsupported(x)
    if why_not is not None or x.device.type == "cuda":
        return why_not
    interpreted = launcher.interpreting(general_kernels.fprop_kernel)
    stubbed = isinstance(triton.runtime.driver._active, stub_driver.StubDriver)
    if x.device.type in ("cpu", "meta") and backend != "auto" and (interpreted or stubbed):
        return None
    return f"tensors are on {x.device}, and the kernels run on GPUs (forced with TRITON_INTERPRET=1, on CPU tensors)"


def target_of(device: torch.device) -> devices.Target:
    """The GPU to plan for: the tensors' own, the stub driver's, or the default where there is none."""
    if device.type == "cuda" and torch.cuda.is_available():
        return devices.of_device(torch.cuda.current_device() if device.index is None else device.index)
    driver = triton.runtime.driver._active
    return driver.target if isinstance(driver, stub_driver.StubDriver) else devices.DEFAULT


_fp32_precision: str | None = None  # the user's wish for our kernels, or torch's setting


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
    global _fp32_precision
    if precision not in (None, "bf16x3"):
        raise ValueError(f'set_fp32_precision: precision is {precision!r}, but must be None or "bf16x3"')
    _fp32_precision = precision


def _precision_of_fp32() -> str:
    return _fp32_precision or torch._C._get_fp32_precision_getter("cuda", "conv")


def make_problem(x: Tensor, w: Tensor, has_bias: bool, args: ConvArgs) -> ConvProblem:
    """The problem of 4-D tensors and normalised arguments."""
    nhwc = suggests_channels_last(x.shape, x.stride())
    out_nhwc = nhwc or suggests_channels_last(w.shape, w.stride())
    dtype = DTYPES.get(x.dtype, "fp32")
    if dtype == "fp32" and (precision := _precision_of_fp32()) in ("tf32", "bf16x3"):
        dtype = precision
    return ConvProblem(
        x.shape[0], x.shape[1], x.shape[2], x.shape[3], w.shape[0], w.shape[2], w.shape[3],
        args.stride, args.padding, args.dilation, args.groups, dtype,
        "nhwc" if nhwc else "nchw", "nhwc" if out_nhwc else "nchw", has_bias,
    )  # fmt: skip


def _aligned(tensor: Tensor | None):
    """What Triton specialises a pointer on."""
    if tensor is None:
        return None
    if ON_HIP:
        return tensor.data_ptr() % 16 == 0, tensor.untyped_storage().nbytes() < 2**31
    return tensor.data_ptr() % 16 == 0


class Call:
    """A planned convolution with its launches: what all calls of one key share."""

    def __init__(
        self, problem: ConvProblem, plan: dispatch.Plan, args: ConvArgs, backend: str,
        x: Tensor, w: Tensor, bias: Tensor | None,
    ):  # fmt: skip
        self.problem, self.plan, self.args, self.backend = problem, plan, args, backend
        self.device = x.device.index if x.device.type == "cuda" else None
        self.strides = {
            "x": x.stride(),
            "w": w.stride(),
            "y": dense_strides(problem.y_shape, problem.out_layout == "nhwc"),
            "dx": dense_strides(problem.x_shape, problem.out_layout == "nhwc"),
            "dw": dense_strides(problem.w_shape, suggests_channels_last(w.shape, w.stride())),
        }
        self.all_torch = plan.backward is None and all(p.algorithm == "torch" for p in plan.passes)
        self.torch_dgrad = plan.dgrad.algorithm == "torch"
        self.torch_wgrad = plan.wgrad.algorithm == "torch"
        self.copy_bias = bias is not None and not bias.is_contiguous()
        self._forward: Callable | None = None
        self._backward: dict = {}

    def _prepare(self, pass_: str, **strides):
        plan = getattr(self.plan, pass_)
        prepare = REGISTRY[plan.algorithm].prepare
        return prepare(self.problem, pass_, plan.config, self.plan.target, self.strides | strides)

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if self.problem.batch == 0:
            return launcher.allocate(self.problem.y_shape, self.strides["y"], x)
        run = self._forward
        if run is None:
            if self.plan.fprop.algorithm == "torch":
                run = functools.partial(torch_reference.fprop, self.problem)
            else:
                run = self._prepare("fprop")
            self._forward = run
        if self.copy_bias and bias is not None:
            bias = bias.contiguous()
        if self.device is not None and self.device != torch._C._cuda_getDevice():
            with torch.cuda.device(self.device):
                return run(x, w, bias)
        return run(x, w, bias)

    def backward(self, dy: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool, need_b: bool):
        """(dx, dw, db), each None unless needed. x may be None unless `saves` says otherwise, and so may w."""
        if self.device is not None and self.device != torch._C._cuda_getDevice():
            with torch.cuda.device(self.device):
                return self.backward(dy, x, w, need_x, need_w, need_b)
        dx = dw = None
        if self.problem.batch == 0:
            dx = launcher.allocate(self.problem.x_shape, self.strides["dx"], dy) if need_x else None
            dw = launcher.allocate(self.problem.w_shape, self.strides["dw"], dy).zero_() if need_w else None
        elif need_x and need_w and self.plan.backward is not None:
            dx, dw = self._backward_pass("backward", dy)(dy, x, w)
        else:
            by_torch = (need_x and self.torch_dgrad, need_w and self.torch_wgrad)
            if any(by_torch):
                dx, dw = torch_reference.backward(self.problem, dy, x, w, *by_torch)
            if need_x and dx is None:
                dx = self._backward_pass("dgrad", dy)(dy, w)
            if need_w and dw is None:
                dw = self._backward_pass("wgrad", dy)(dy, x)
        return dx, dw, dy.sum((0, 2, 3)) if need_b else None

    def _backward_pass(self, pass_: str, dy: Tensor):
        key = (pass_, dy.stride(), _aligned(dy))
        run = self._backward.get(key)
        if run is None:
            run = self._backward[key] = self._prepare(pass_, dy=dy.stride())
        return run

    def saves(self, need_x: bool, need_w: bool) -> tuple[bool, bool]:
        """Which of x and w a backward that needs these gradients reads."""
        return need_w or (need_x and self.torch_dgrad), need_x or (need_w and self.torch_wgrad)


_CALLS: dict[tuple, Call] = {}


def reset() -> None:
    """Forget every plan and prepared call, to plan anew after configuration files changed."""
    _CALLS.clear()


def _key(x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, backend: str) -> tuple:
    """Everything that a plan or a compiled kernel depends on."""
    dtype = x.dtype
    precision = _precision_of_fp32() if dtype is torch.float32 else None
    return (
        x.shape, x.stride(), dtype, x.device, w.shape, w.stride(), w.dtype, w.device,
        None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device),
        _aligned(x), _aligned(w), _aligned(bias), stride, padding, dilation, groups, backend, precision,
    )  # fmt: skip


def lookup(x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, backend: str) -> Call | None:
    """The prepared call of a convolution of 4-D tensors, planned if it is new; None if there is no such convolution."""
    # 1, True and 1.0 are equal as keys but not to F.conv2d.
    if not (type(stride) is type(dilation) is type(groups) is int and type(padding) in (int, str)):
        args = _normalised_types(stride, padding, dilation, groups)
        if args is None:
            return None
        stride, padding, dilation, groups = args
    key = _key(x, w, bias, stride, padding, dilation, groups, backend)
    call = _CALLS.get(key)
    if call is None:
        args = normalise(x.shape, w.shape, stride, padding, dilation, groups)
        if args is None or not _consistent(x, w, bias):
            return None
        call = _plan_call(key, x, w, bias, args, backend)
    return call


def _normalised_types(stride, padding, dilation, groups):
    """The arguments as hashable values of the right types, or None."""
    pairs = [_pair(stride), padding if isinstance(padding, str) else _pair(padding), _pair(dilation)]
    return None if None in pairs or not _is_int(groups) else (*pairs, groups)


def _plan_call(key: tuple, x, w, bias, args: ConvArgs, backend: str) -> Call:
    """The call of a new key, planned and kept."""
    problem = make_problem(x, w, bias is not None, args)
    plan = dispatch.plan(problem, target_of(x.device), backend, refusal(x, backend))
    if len(_CALLS) >= MOST_CALLS:
        _CALLS.clear()
    call = _CALLS[key] = Call(problem, plan, args, backend, x, w, bias)
    return call


class _ConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, call):
        need_x, need_w = ctx.needs_input_grad[:2]
        save_x, save_w = call.saves(need_x, need_w)
        ctx.save_for_backward(x if save_x else None, w if save_w else None)
        ctx.call = call
        return call.forward(x, w, bias)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        call = ctx.call
        if not torch.is_grad_enabled():
            return *call.backward(dy, x, w, need_x, need_w, need_b), None
        # create_graph=True: the operator knows its own derivative. It takes the shapes of what was not saved.
        problem = call.problem
        x = dy.new_empty(()).expand(problem.x_shape) if x is None else x
        w = dy.new_empty(()).expand(problem.w_shape) if w is None else w
        mask = [need_x, need_w, need_b]
        found = iter(torch.ops.groupconv.conv2d_backward(dy, x, w, *call.args, mask, call.backend))
        return *(next(found) if needed else None for needed in mask), None


# Function.apply first unwraps torch.func's dead wrappers, which plain tensors are not: a quarter of its time.
_apply_function = super(torch.autograd.Function, _ConvFunction).apply


def conv2d(x, w, bias, stride, padding, dilation, groups, backend) -> Tensor:
    """triton_conv without the fused extras; the arguments are unchecked."""
    if torch.compiler.is_compiling() or not _eager(x, w, bias):
        return _dispatched(x, w, bias, stride, padding, dilation, groups, backend)
    if torch._C._is_any_autocast_enabled():
        x, w, bias = _autocast(x, w, bias)
    if x.dim() == 3 and w.dim() == 4:
        call = lookup(x.unsqueeze(0), w, bias, stride, padding, dilation, groups, backend)
        if call is not None:
            return conv2d(x.unsqueeze(0), w, bias, stride, padding, dilation, groups, backend).squeeze(0)
    elif x.dim() == 4 and w.dim() == 4:
        call = lookup(x, w, bias, stride, padding, dilation, groups, backend)
    else:
        call = None
    if call is None:
        return _not_ours(x, w, bias, stride, padding, dilation, groups, backend)
    if call.all_torch:
        return F.conv2d(x, w, bias, stride, padding, dilation, groups)
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)):
        return _apply_function(x, w, bias, call)
    return call.forward(x, w, bias)


def _eager(x, w, bias) -> bool:
    """Whether the tensors are plain ones that nothing watches: no subclass, mode, transform or lazy negation."""
    return (
        type(x) in PLAIN
        and type(w) in PLAIN
        and (bias is None or (type(bias) in PLAIN and bias.layout is torch.strided))
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and x.layout is w.layout is torch.strided
        and not (x.is_neg() or w.is_neg())
    )


def _autocast(x, w, bias):
    """The operands as autocast has F.conv2d take them: floating point, but not double, in autocast's dtype."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, w, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(t):
        eligible = t is not None and t.device.type == kind and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible else t

    return cast(x), cast(w), cast(bias)


def _dispatched(x, w, bias, stride, padding, dilation, groups, backend) -> Tensor:
    """The call through PyTorch's dispatcher, for whatever traces, transforms or subclasses it."""
    tensors = isinstance(x, Tensor) and isinstance(w, Tensor) and (bias is None or isinstance(bias, Tensor))
    if tensors and backend != "torch":
        x, w, bias = _autocast(x, w, bias)
        unbatched = x.dim() == 3
        batched = x.unsqueeze(0) if unbatched else x
        args = normalise(batched.shape, w.shape, stride, padding, dilation, groups)
        if args is not None and _consistent(x, w, bias):
            why_not = refusal(x, backend)
            if why_not is None and backend == "auto" and not all(map(_known, (x, w, bias))):
                why_not = "a tensor subclass may know F.conv2d, but not an operator of ours"
            if why_not is None and not torch.compiler.is_compiling():
                why_not = _underivable()
            if why_not is None:
                y = torch.ops.groupconv.conv2d(batched, w, bias, *args, backend)
                return y.squeeze(0) if unbatched else y
            if backend != "auto":
                raise NotImplementedError(f"triton_conv: backend={backend!r} cannot run this convolution: {why_not}")
            return F.conv2d(x, w, bias, stride, padding, dilation, groups)
    return _not_ours(x, w, bias, stride, padding, dilation, groups, backend)


def _not_ours(x, w, bias, stride, padding, dilation, groups, backend) -> Tensor:
    """A call that our checks refuse: PyTorch's own exception if it is a bad one, or else its result."""
    y = F.conv2d(x, w, bias, stride, padding, dilation, groups)
    if backend in ("auto", "torch"):
        return y
    raise NotImplementedError(f"triton_conv: backend={backend!r} cannot run this convolution: only F.conv2d takes it")


def _known(tensor) -> bool:
    return tensor is None or type(tensor) in PLAIN or isinstance(tensor, FakeTensor)


def _underivable() -> str | None:
    """Why the operators cannot be derived as the caller is about to, or None."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives are F.conv2d's"
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if any(transform.key() != torch._C._functorch.TransformType.Vmap for transform in transforms):
        return "derivatives inside torch.func are F.conv2d's"
    return None


# --- The operators -------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("groupconv", "DEF")
_ARGS = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups"
_LIBRARY.define(f"conv2d(Tensor input, Tensor weight, Tensor? bias, {_ARGS}, str backend) -> Tensor")
_LIBRARY.define(
    f"conv2d_backward(Tensor grad, Tensor input, Tensor weight, {_ARGS}, bool[3] mask, str backend) -> Tensor[]"
)


def _op_call(x, w, bias, stride, padding, dilation, groups, backend) -> Call:
    """The prepared call of an operator's arguments, whose padding has four sides."""
    key = _key(x, w, bias, tuple(stride), tuple(padding), tuple(dilation), groups, backend)
    call = _CALLS.get(key)
    if call is None:
        args = ConvArgs(tuple(stride), tuple(padding), tuple(dilation), groups)
        call = _plan_call(key, x, w, bias, args, backend)
    return call


def _like(tensor: Tensor, strides) -> Tensor:
    """The tensor with the strides that the operator promises; PyTorch's depthwise kernels answer NHWC with NCHW."""
    if tensor.stride() == strides:
        return tensor
    return launcher.allocate(tensor.shape, strides, tensor).copy_(tensor)


def _conv2d_op(x, w, bias, stride, padding, dilation, groups, backend):
    call = _op_call(x, w, bias, stride, padding, dilation, groups, backend)
    return _like(call.forward(x, w, bias), call.strides["y"])


def _conv2d_backward_op(dy, x, w, stride, padding, dilation, groups, mask, backend):
    call = _op_call(x, w, None, stride, padding, dilation, groups, backend)
    dx, dw, db = call.backward(dy, x, w, *mask)
    dx = None if dx is None else _like(dx, call.strides["dx"])
    dw = None if dw is None else _like(dw, call.strides["dw"])
    return [grad for grad in (dx, dw, db) if grad is not None]


_LIBRARY.impl("conv2d", _conv2d_op, "CompositeExplicitAutograd")
_LIBRARY.impl("conv2d_backward", _conv2d_backward_op, "CompositeExplicitAutograd")


@torch.library.register_fake("groupconv::conv2d", lib=_LIBRARY)
def _conv2d_fake(x, w, bias, stride, padding, dilation, groups, backend):
    shape = (x.shape[0], w.shape[0], *_out_pixels(x.shape, w.shape, stride, padding, dilation))
    return x.new_empty_strided(shape, dense_strides(shape, _out_channels_last(x, w)))


@torch.library.register_fake("groupconv::conv2d_backward", lib=_LIBRARY)
def _conv2d_backward_fake(dy, x, w, stride, padding, dilation, groups, mask, backend):
    grads = []
    if mask[0]:
        grads.append(x.new_empty_strided(x.shape, dense_strides(x.shape, _out_channels_last(x, w))))
    if mask[1]:
        strides = dense_strides(w.shape, suggests_channels_last(w.shape, w.stride()))
        grads.append(w.new_empty_strided(w.shape, strides))
    if mask[2]:
        grads.append(dy.new_empty((w.shape[0],)))
    return grads


def _out_channels_last(x, w) -> bool:
    return suggests_channels_last(x.shape, x.stride()) or suggests_channels_last(w.shape, w.stride())


def _setup_conv2d(ctx, inputs, output):
    x, w, bias, *args, backend = inputs
    ctx.save_for_backward(x, w)
    ctx.args, ctx.backend, ctx.has_bias = args, backend, bias is not None


def _backward_conv2d(ctx, dy):
    x, w = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    found = iter(torch.ops.groupconv.conv2d_backward(dy, x, w, *ctx.args, mask, ctx.backend))
    return *(next(found) if needed else None for needed in mask), *(None,) * 5


def _setup_conv2d_backward(ctx, inputs, output):
    dy, x, w, *args, mask, backend = inputs
    ctx.save_for_backward(dy, x, w)
    ctx.args, ctx.mask, ctx.backend = args, mask, backend


def _backward_conv2d_backward(ctx, grads):
    """The derivative of (dx, dw, db), each bilinear in two of dy, x and w, in convolutions."""
    dy, x, w = ctx.saved_tensors
    incoming = iter(grads)
    to_dx, to_dw, to_db = (next(incoming) if asked else None for asked in ctx.mask)
    need_dy, need_x, need_w = ctx.needs_input_grad[:3]
    ops = torch.ops.groupconv
    args, backend = ctx.args, ctx.backend
    d_dy = d_x = d_w = None
    if need_dy:
        parts = []
        if to_dx is not None:
            parts.append(ops.conv2d(to_dx, w, None, *args, backend))
        if to_dw is not None:
            parts.append(ops.conv2d(x, to_dw, None, *args, backend))
        if to_db is not None:
            parts.append(to_db[None, :, None, None].expand_as(dy))
        d_dy = sum(parts[1:], parts[0]) if parts else None
    if need_x and to_dw is not None:
        (d_x,) = ops.conv2d_backward(dy, x, to_dw, *args, [True, False, False], backend)
    if need_w and to_dx is not None:
        (d_w,) = ops.conv2d_backward(dy, to_dx, w, *args, [False, True, False], backend)
    return d_dy, d_x, d_w, *(None,) * 6


torch.library.register_autograd("groupconv::conv2d", _backward_conv2d, setup_context=_setup_conv2d, lib=_LIBRARY)
torch.library.register_autograd(
    "groupconv::conv2d_backward", _backward_conv2d_backward, setup_context=_setup_conv2d_backward, lib=_LIBRARY
)


def _into_channels(tensor: Tensor | None, dim: int | None, size: int, channel: int) -> Tensor | None:
    """A vmapped tensor with its mapped axis folded into the axis `channel` of the others, as its slower part."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, channel).flatten(channel, channel + 1)


def _conv2d_vmap(info, in_dims, x, w, bias, stride, padding, dilation, groups, backend):
    """A batch of convolutions is one with so many times the groups."""
    size = info.batch_size
    x, w = _into_channels(x, in_dims[0], size, 1), _into_channels(w, in_dims[1], size, 0)
    bias = _into_channels(bias, in_dims[2], size, 0)
    y = torch.ops.groupconv.conv2d(x, w, bias, stride, padding, dilation, groups * size, backend)
    return y.unflatten(1, (size, -1)), 1


def _conv2d_backward_vmap(info, in_dims, dy, x, w, stride, padding, dilation, groups, mask, backend):
    size = info.batch_size
    dy, x = _into_channels(dy, in_dims[0], size, 1), _into_channels(x, in_dims[1], size, 1)
    w = _into_channels(w, in_dims[2], size, 0)
    args = (stride, padding, dilation, groups * size, mask, backend)
    grads = torch.ops.groupconv.conv2d_backward(dy, x, w, *args)
    axes = [axis for axis, needed in zip((1, 0, 0), mask, strict=True) if needed]
    return [grad.unflatten(axis, (size, -1)) for grad, axis in zip(grads, axes, strict=True)], axes


torch.library.register_vmap("groupconv::conv2d", _conv2d_vmap, lib=_LIBRARY)
torch.library.register_vmap("groupconv::conv2d_backward", _conv2d_backward_vmap, lib=_LIBRARY)


def _register_autocast(key: str) -> None:
    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def conv2d_autocast(x, w, bias, *args):
        x, w, bias = _autocast(x, w, bias)
        with torch._C._ExcludeDispatchKeyGuard(without):
            return torch.ops.groupconv.conv2d(x, w, bias, *args)

    _LIBRARY.impl("conv2d", conv2d_autocast, key)


for _autocast_key in ("AutocastCUDA", "AutocastCPU"):
    _register_autocast(_autocast_key)
