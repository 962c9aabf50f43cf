"""The convolution as PyTorch calls it: the eager path, the registered operators, their autograd and autocast.

Eager calls on plain tensors go from `conv2d` through a dictionary of prepared calls to a launch, inside one
autograd.Function. Everything else (torch.compile, export, functorch, tensor subclasses, dispatch modes) goes through
the operators groupconv::conv2d and groupconv::conv2d_backward, which end in the same prepared calls.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.autograd.forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import algorithms, devices, dispatch, launcher
from .algorithms import REGISTRY, torch_reference
from .arguments import ConvArgs, consistent, is_convolution, normalise, out_pixels, plain
from .problem import ConvProblem, channels_innermost, dense_strides, meaningful_strides, suggests_channels_last

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PLAIN = (Tensor, torch.nn.Parameter)
MOST_CALLS = 4096  # prepared calls kept; a program with more shapes than this starts over
ON_HIP = torch.version.hip is not None


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
    nhwc = channels_innermost(x.shape, x.stride())
    out_nhwc = out_channels_last(x, w)
    dtype = DTYPES.get(x.dtype, "fp32")
    if dtype == "fp32" and (precision := _precision_of_fp32()) in ("tf32", "bf16x3"):
        dtype = precision
    return ConvProblem(
        x.shape[0], x.shape[1], x.shape[2], x.shape[3], w.shape[0], w.shape[2], w.shape[3],
        args.stride, args.padding, args.dilation, args.groups, dtype,
        "nhwc" if nhwc else "nchw", "nhwc" if out_nhwc else "nchw", has_bias,
    )  # fmt: skip


def out_channels_last(x: Tensor, w: Tensor) -> bool:
    """Whether y and dx are channels_last, as F.conv2d has them: ATen's word for it, whatever kernels read."""
    return suggests_channels_last(x.shape, x.stride()) or suggests_channels_last(w.shape, w.stride())


def _seen(tensor: Tensor | None):
    """All of a tensor that a plan, a compiled kernel or a launch depends on; RuntimeError if it has no memory.

    Triton specialises a pointer on its alignment to 16 bytes, and on AMD on whether 32 bits reach all of its memory.
    """
    if tensor is None:
        return None
    address: object = tensor.data_ptr() & 15 == 0
    if ON_HIP:
        address = address, tensor.untyped_storage().nbytes() < 2**31
    return type(tensor) in PLAIN, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, address, tensor.is_neg()


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
            "dx": _dx_strides(x, w),
            "dw": _dw_strides(w),
        }
        self.all_torch = plan.backward is None and all(p.algorithm == "torch" for p in plan.passes)
        self.torch_dgrad = plan.dgrad.algorithm == "torch"
        self.torch_wgrad = plan.wgrad.algorithm == "torch"
        self.copy_bias = bias is not None and not bias.is_contiguous()
        self._x, self._w = _seen(x), _seen(w)
        self._kind = x.dtype, x.device
        self._forward: Callable | None = None
        self._backward: dict[tuple, Callable] = {}

    def _prepare(self, pass_: str, **strides):
        plan = getattr(self.plan, pass_)
        prepare = REGISTRY[plan.algorithm].prepare
        return prepare(self.problem, pass_, plan.config, self.plan.target, self.strides | strides)

    def _elsewhere(self) -> bool:
        """Whether the current device is another than that of the tensors, which launches want."""
        return self.device is not None and self.device != torch._C._cuda_getDevice()

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """y of tensors that this call was looked up for."""
        if self.problem.batch == 0:
            return launcher.allocate(self.problem.y_shape, self.strides["y"], x)
        run = self._forward
        if run is None:
            if self.plan.fprop.algorithm == "torch":
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
            key = needs, _seen(dy), _seen(x), _seen(w)
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
            x = self.unread(self.problem.x_shape) if x is None else x
            w = self.unread(self.problem.w_shape) if w is None else w
            return _torch_gradients(dy, x, w, self.args, needs)

        return run

    def _fits(self, dy: Tensor, x: Tensor | None, w: Tensor | None) -> bool:
        """Whether x and w are as they were in the forward pass, and dy is a plain tensor of y's shape and kind."""
        if any(t is not None and _seen(t) != seen for t, seen in ((x, self._x), (w, self._w))):
            return False
        alike = dy.shape == self.problem.y_shape and (dy.dtype, dy.device) == self._kind
        return alike and type(dy) in PLAIN and dy.layout is torch.strided and not dy.is_neg()

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

    def unread(self, shape) -> Tensor:
        """A tensor of an operand's shape that takes no memory and has no values."""
        dtype, device = self._kind
        return torch.empty((), dtype=dtype, device=device).expand(shape)

    def saves(self, need_x: bool, need_w: bool) -> tuple[bool, bool]:
        """Which of x and w a backward that needs these gradients reads."""
        return need_w or (need_x and self.torch_dgrad), need_x or (need_w and self.torch_wgrad)


_CALLS: dict[tuple, Call] = {}


def reset() -> None:
    """Forget every plan and prepared call, to plan anew after configuration files changed."""
    _CALLS.clear()


def _key(x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, backend: str) -> tuple:
    """Everything that a plan or a compiled kernel depends on."""
    precision = _precision_of_fp32() if x.dtype is torch.float32 else None
    return _seen(x), _seen(w), _seen(bias), stride, padding, dilation, groups, backend, precision


def lookup(x: Tensor, w: Tensor, bias: Tensor | None, stride, padding, dilation, groups, backend: str) -> Call | None:
    """The prepared call of a convolution of 4-D tensors, planned if it is new; None if no prepared call can serve."""
    # 1, True and 1.0 are equal as keys but not to F.conv2d.
    given = plain(stride, padding, dilation, groups)
    if given is None:
        return None
    key = _key(x, w, bias, *given, backend)
    call = _CALLS.get(key)
    if call is None:
        args = normalise(x.shape, w.shape, *given)
        negated = any(t is not None and t.is_neg() for t in (x, w, bias))  # until the dispatcher makes it so
        if args is None or negated or not consistent(x, w, bias):
            return None
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
        call, needs = ctx.call, _wanted(ctx)
        if not torch.is_grad_enabled() and not torch._C._len_torch_dispatch_stack():
            grads = call.backward(dy, x, w, needs)
            if grads is not None:
                return *grads, None
        # The operator knows its own derivative, and any tensor. It takes the shapes of what was not saved.
        x = call.unread(call.problem.x_shape) if x is None else x
        w = call.unread(call.problem.w_shape) if w is None else w
        return *_gradients(dy, x, w, call.args, needs, call.backend), None


def _wanted(ctx) -> tuple[bool, bool, bool]:
    """Which of dx, dw and db the engine is going to use: autograd.grad(y, x) has no need of dw."""
    need_x, need_w, need_b, _ = ctx.needs_input_grad
    if need_x + need_w + need_b > 1:  # it would not have come for nothing
        nodes = ctx.next_functions
        need_x = need_x and _runs(nodes[0][0])
        need_w = need_w and _runs(nodes[1][0])
        need_b = need_b and _runs(nodes[2][0])
    return need_x, need_w, need_b


def _runs(node) -> bool:
    """Whether the engine is going to execute a node of the graph."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf that autograd.grad was asked for; or there is no engine
        return True


def _gradients(dy, x, w, args: ConvArgs, needs, backend: str):
    """(dx, dw, db), each None unless needed, through PyTorch's dispatcher."""
    if all(map(_known, (dy, x, w))):
        found = iter(torch.ops.groupconv.conv2d_backward(dy, x, w, *args, list(needs), backend))
        return tuple(next(found) if needed else None for needed in needs)
    return _torch_gradients(dy, x, w, args, needs)


def _torch_gradients(dy, x, w, args: ConvArgs, needs):
    """(dx, dw, db), each None unless needed, by F.conv2d's own backward, with its exceptions."""
    need_x, need_w, need_b = needs
    dx, dw = torch_reference.backward(args, dy, x, w, need_x, need_w) if need_x or need_w else (None, None)
    return dx, dw, dy.sum((0, 2, 3)) if need_b else None


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
        return _dispatched(x, w, bias, stride, padding, dilation, groups, backend)
    if call.all_torch:
        return F.conv2d(x, w, bias, stride, padding, dilation, groups)
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)):
        return _apply_function(x, w, bias, call)
    return call.forward(x, w, bias)


def _eager(x, w, bias) -> bool:
    """Whether the tensors are plain ones that nothing watches: no subclass, mode or transform."""
    return (
        type(x) in PLAIN
        and type(w) in PLAIN
        and (bias is None or (type(bias) in PLAIN and bias.layout is torch.strided))
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and x.layout is w.layout is torch.strided
    )


def _autocast(x, w, bias):
    """The operands as autocast has F.conv2d take them: floating point, but not double, in autocast's dtype."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # of meta tensors torch knows no autocast
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
        if args is not None and consistent(x, w, bias):
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


def _op_call(x, w, bias, args: ConvArgs, backend: str) -> Call | None:
    """The prepared call of an operator's arguments; None if they are no convolution, for F.conv2d to say why."""
    if not (x.dim() == w.dim() == 4 and consistent(x, w, bias)):
        return None
    key = _key(x, w, bias, *args, backend)
    call = _CALLS.get(key)
    if call is None and is_convolution(x.shape, w.shape, args):
        call = _plan_call(key, x, w, bias, args, backend)
    return call


def _like(tensor: Tensor, strides) -> Tensor:
    """The tensor with the strides that the operator promises; PyTorch's depthwise kernels answer NHWC with NCHW."""
    if tensor.stride() == strides:
        return tensor
    return launcher.allocate(tensor.shape, strides, tensor).copy_(tensor)


def _conv2d_op(x, w, bias, stride, padding, dilation, groups, backend):
    args = ConvArgs(tuple(stride), tuple(padding), tuple(dilation), groups)
    call = _op_call(x, w, bias, args, backend)
    if call is None:
        return torch_reference.fprop(args, x, w, bias)
    return _like(call.forward(x, w, bias), call.strides["y"])


def _conv2d_backward_op(dy, x, w, stride, padding, dilation, groups, mask, backend):
    args, needs = ConvArgs(tuple(stride), tuple(padding), tuple(dilation), groups), tuple(mask)
    fitting = dy.dtype is x.dtype and dy.device == x.device
    call = _op_call(x, w, None, args, backend) if fitting else None
    grads = None if call is None else call.backward(dy, x, w, needs)
    dx, dw, db = _torch_gradients(dy, x, w, args, needs) if grads is None else grads
    strides = {"dx": _dx_strides(x, w), "dw": _dw_strides(w)} if call is None else call.strides
    dx = None if dx is None else _like(dx, strides["dx"])
    dw = None if dw is None else _like(dw, strides["dw"])
    return [grad for grad in (dx, dw, db) if grad is not None]


def _dx_strides(x, w):
    return dense_strides(x.shape, out_channels_last(x, w))


def _dw_strides(w):
    return dense_strides(w.shape, suggests_channels_last(w.shape, w.stride()))


_LIBRARY.impl("conv2d", _conv2d_op, "CompositeExplicitAutograd")
_LIBRARY.impl("conv2d_backward", _conv2d_backward_op, "CompositeExplicitAutograd")


def _conv2d_backward_batched(dy, x, w, stride, padding, dilation, groups, mask, backend):
    """By F.conv2d's: what autograd batches itself (is_grads_batched) has no rule for operators that return lists."""
    args = ConvArgs(tuple(stride), tuple(padding), tuple(dilation), groups)
    return [grad for grad in _torch_gradients(dy, x, w, args, tuple(mask)) if grad is not None]


_LIBRARY.impl("conv2d_backward", _conv2d_backward_batched, "Batched")


@torch.library.register_fake("groupconv::conv2d", lib=_LIBRARY)
def _conv2d_fake(x, w, bias, stride, padding, dilation, groups, backend):
    shape = (x.shape[0], w.shape[0], *out_pixels(x.shape, w.shape, stride, padding, dilation))
    return x.new_empty_strided(shape, dense_strides(shape, out_channels_last(x, w)))


@torch.library.register_fake("groupconv::conv2d_backward", lib=_LIBRARY)
def _conv2d_backward_fake(dy, x, w, stride, padding, dilation, groups, mask, backend):
    grads = []
    if mask[0]:
        grads.append(x.new_empty_strided(x.shape, _dx_strides(x, w)))
    if mask[1]:
        grads.append(w.new_empty_strided(w.shape, _dw_strides(w)))
    if mask[2]:
        grads.append(dy.new_empty((w.shape[0],)))
    return grads


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
