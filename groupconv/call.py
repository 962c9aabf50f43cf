"""A call: a convolution of operands of one kind that is planned, with its kernels bound or its trials under way."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import assembler, dispatch, launcher, raced, torch_private, trial
from .activations import finished_by_torch
from .algorithms import REGISTRY, torch_reference
from .arguments import ConvArgs, dw_strides, dx_strides
from .problem import ConvProblem, dense_strides, meaningful_strides

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
ON_HIP = torch.version.hip is not None
Choice = dispatch.PassPlan | trial.Trial


def traits(tensor: Tensor | None):
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


def traits_of_new(shape, strides, like: Tensor):
    """`traits` of a dense tensor that is allocated now, of the dtype and on the device of another."""
    size = math.prod(shape)
    address: object = True if size else None
    if ON_HIP:
        address = address, size * like.element_size() < 2**31
    return True, torch.Size(shape), strides, like.dtype, like.device, address, False


def is_unreadable(tensor: Tensor | None) -> bool:
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
        self._x_traits, self._w_traits = traits(x), traits(w)
        self._common = all(self._lies_as_most(name, tensor, self.strides) for name, tensor in (("x", x), ("w", w)))
        self._off = trial.why_off()  # when plans were last concluded from
        self._kind = x.dtype, x.device
        # By pass, and the strides and alignment of dy: what was decided for this call alone.
        self._decided: dict[tuple, dispatch.PassPlan] = {}
        self._trials: dict[tuple, trial.Trial] = {}
        self._forget()

    def _forget(self) -> None:
        """Prepare and conclude anew from plans."""
        self._forward: Callable | None = None
        self._finished: dict[tuple, Callable | None] = {}
        self._backward: dict[tuple, Callable] = {}
        self._unproven: dict[str, bool] = {}
        for concluded in ("torch_fprop", "torch_dgrad", "all_torch"):
            self.__dict__.pop(concluded, None)

    def current(self) -> Call:
        """Itself; concluded anew, if trials were turned on or off since."""
        if self.backend == "auto" and self._off != (off := trial.why_off()):
            self._off = off
            self._forget()
        return self

    # Of the backward passes nothing is planned before gradients are wanted.

    @functools.cached_property
    def torch_fprop(self) -> bool:
        """Whether F.conv2d makes the forward pass, now and later."""
        return self._by_torch("fprop")

    @functools.cached_property
    def torch_dgrad(self) -> bool:
        """Whether it makes the gradient by the input."""
        return self._by_torch("dgrad")

    @functools.cached_property
    def all_torch(self) -> bool:
        """Whether it makes all passes."""
        apart = self.torch_fprop and self.torch_dgrad and self._by_torch("wgrad")
        return apart and not self._is_unproven("backward") and self.plan.backward is None

    def _by_torch(self, pass_: str) -> bool:
        plan = self._decided.get((pass_, None)) or getattr(self.plan, pass_)
        return plan.algorithm == "torch" and not self._is_unproven(pass_)

    def _is_unproven(self, pass_: str) -> bool:
        """Whether a pass has to prove itself, or has, in each form of dy by itself."""
        found = self._unproven.get(pass_)
        if found is None:
            decided = (pass_, None) in self._decided
            found = self._unproven[pass_] = not decided and trial.is_unproven(self.plan, pass_, self._common)
        return found

    def _prepare(self, pass_: str, algorithm: str, config: dict | None, strides: dict) -> Callable:
        return REGISTRY[algorithm].prepare(self.problem, pass_, config, self.plan.target, strides)

    def _elsewhere(self) -> bool:
        """Whether the current device is another than that of the tensors, which launches want."""
        return self.device is not None and self.device != torch_private.current_gpu()

    # --- Forward

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """y of tensors that this call was looked up for."""
        if torch_private.profiler_is_on():
            with torch_private.recorded(self._label("fprop"), [x, w, bias]):
                return self._forward_of(x, w, bias)
        return self._forward_of(x, w, bias)

    def _label(self, *passes: str) -> str:
        """What torch.profiler calls these passes: their algorithms."""
        named = [f"{pass_}: {getattr(self.plan, pass_).algorithm}" for pass_ in passes]
        return f"groupconv::{', '.join(named) or 'the gradient of the bias'}"

    def _forward_of(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if self.problem.batch == 0:
            return launcher.allocate(self.problem.y_shape, self.strides["y"], x)
        if self.copy_bias and bias is not None:
            bias = bias.contiguous()
        run = self._forward
        if run is None:
            run = self._forward = self._prepare_forward(x, w, bias)
        try:
            if self._elsewhere():
                with torch.cuda.device(self.device):
                    return run(x, w, bias)
            return run(x, w, bias)
        except assembler.NoKernel as error:
            self._give_up(error)
            self._forward = functools.partial(torch_reference.fprop, self.args)
            return self._forward(x, w, bias)

    def _prepare_forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Callable:
        choice = self._choice("fprop", x=x, w=w, bias=bias)
        by_torch = functools.partial(torch_reference.fprop, self.args)
        if isinstance(choice, trial.Trial):
            return functools.partial(choice, by_torch)
        if choice.algorithm == "torch":
            return by_torch
        return self._prepare("fprop", choice.algorithm, choice.config, self.strides)

    # --- Forward, and what follows it

    def finisher(self, x, w, bias, activation: str | None, residual: bool, keeps: bool) -> Callable | None:
        """What `finish` runs; None unless a kernel of ours makes the forward pass, is not on trial, and has room."""
        key, finished = (activation, residual, keeps), self._finished  # another thread may forget it
        if key not in finished:
            finished[key] = self._prepare_finished(x, w, bias, *key)
        return finished[key]

    def _prepare_finished(self, x, w, bias, activation, residual, keeps) -> Callable | None:
        choice = self._choice("fprop", x=x, w=w, bias=bias)
        if self.problem.batch == 0 or isinstance(choice, trial.Trial) or choice.algorithm == "torch":
            return None
        problem = dataclasses.replace(self.problem, activation=activation, residual=residual, keeps=keeps)
        config, _ = dispatch.finished(problem, choice, self.plan.target)
        if config is None:
            return None
        return REGISTRY[choice.algorithm].prepare(problem, "fprop", config, self.plan.target, self.strides)

    def finish(self, run: Callable, x, w, bias, residual: Tensor | None, activation: str | None, keeps: bool):
        """y = activation(convolution + residual), or, if it keeps that, (y, what the activation is of), by `finisher`'s
        answer.
        """
        if torch_private.profiler_is_on():
            with torch_private.recorded(f"{self._label('fprop')}, {activation}", [x, w, bias, residual]):
                return self._finish_of(run, x, w, bias, residual, activation, keeps)
        return self._finish_of(run, x, w, bias, residual, activation, keeps)

    def _finish_of(self, run: Callable, x, w, bias, residual: Tensor | None, activation: str | None, keeps: bool):
        if residual is not None:
            residual = self._lying_as_y(residual)
        if self.copy_bias and bias is not None:
            bias = bias.contiguous()
        try:
            if self._elsewhere():
                with torch.cuda.device(self.device):
                    return run(x, w, bias, residual)
            return run(x, w, bias, residual)
        except assembler.NoKernel as error:
            self._give_up(error)
            run = functools.partial(self._finish_by_torch, activation, keeps)
            self._finished[activation, residual is not None, keeps] = run
            return run(x, w, bias, residual)

    def _lying_as_y(self, residual: Tensor) -> Tensor:
        """A residual of y's strides, aligned as new memory is: a copy, if it is not already one."""
        strides = self.strides["y"]
        fits = residual.stride() == strides and residual.data_ptr() & 15 == 0 and not residual.is_neg()
        if fits and not (ON_HIP and residual.untyped_storage().nbytes() >= 2**31):
            return residual
        return launcher.allocate(residual.shape, strides, residual).copy_(residual)

    def _finish_by_torch(self, activation: str | None, keeps: bool, x, w, bias, residual):
        return finished_by_torch(torch_reference.fprop(self.args, x, w, bias), residual, activation, keeps)

    def _give_up(self, error: assembler.NoKernel) -> None:
        """Warn that F.conv2d serves; of a backend that was asked for, raise."""
        if self.backend != "auto":
            raise error
        warnings.warn(f"{error}; F.conv2d runs instead", stacklevel=4)

    # --- Backward

    def backward(self, dy: Tensor, x: Tensor | None, w: Tensor | None, needs: tuple[bool, bool, bool]):
        """(dx, dw, db), each None unless needed; None instead of them where no launch of this call is for such tensors.

        Autograd may hand back other tensors than were saved, and any dy: every property that a launch is prepared for
        is compared, in every call. x may be None unless `saves` says otherwise, and so may w.
        """
        try:
            key = needs, traits(dy), traits(x), traits(w)
        except RuntimeError:  # a wrapper, of vmap say
            return None
        self.current()
        run = self._backward.get(key)
        if run is None:
            if not self._fits(dy, x, w):
                return None
            run = self._backward[key] = self._prepare_backward(dy, x, w, *needs)
        if torch_private.profiler_is_on():
            passes = [pass_ for pass_, needed in zip(("dgrad", "wgrad"), needs[:2], strict=True) if needed]
            if len(passes) == 2 and self.plan.backward is not None:
                passes = ["backward"]
            with torch_private.recorded(self._label(*passes), [dy, x, w]):
                return self._backward_of(run, key, dy, x, w)
        return self._backward_of(run, key, dy, x, w)

    def _backward_of(self, run: Callable, key: tuple, dy: Tensor, x: Tensor | None, w: Tensor | None):
        try:
            if self._elsewhere():
                with torch.cuda.device(self.device):
                    return run(dy, x, w)
            return run(dy, x, w)
        except assembler.NoKernel as error:
            self._give_up(error)
            self._backward[key] = self._backward_by_torch(key[0])
            return self._backward[key](dy, x, w)

    def _backward_by_torch(self, needs: tuple[bool, bool, bool]) -> Callable:
        """F.conv2d's gradients; of an operand that was not saved, as its values are not needed, the shape."""

        def run(dy, x, w):
            return torch_gradients(dy, *self.in_place_of_unsaved(x, w), self.args, needs)

        return run

    def _fits(self, dy: Tensor, x: Tensor | None, w: Tensor | None) -> bool:
        """Whether x and w are as they were in the forward pass, and dy is a plain tensor of y's shape and kind."""
        saved = (x, self._x_traits), (w, self._w_traits)
        if any(tensor is not None and traits(tensor) != then for tensor, then in saved):
            return False
        alike = dy.shape == self.problem.y_shape and (dy.dtype, dy.device) == self._kind
        return alike and type(dy) in PLAIN_TYPES and dy.layout is torch.strided and not is_unreadable(dy)

    def _prepare_backward(self, dy: Tensor, x: Tensor | None, w: Tensor | None, need_x, need_w, need_b) -> Callable:
        """What makes the gradients that are needed of a dy like this: one launch for two, one each, or F.conv2d."""
        problem = self.problem
        grads: Callable
        if problem.batch == 0:

            def grads(dy, x, w):
                dx = launcher.allocate(problem.x_shape, self.strides["dx"], dy) if need_x else None
                dw = launcher.allocate(problem.w_shape, self.strides["dw"], dy).zero_() if need_w else None
                return dx, dw

        else:
            grads = self._gradients(dy, x, w, need_x, need_w)

        def run(dy, x, w):
            dx, dw = grads(dy, x, w)
            return dx, dw, dy.sum((0, 2, 3)) if need_b else None

        return run

    def _gradients(self, dy: Tensor, x: Tensor | None, w: Tensor | None, need_x: bool, need_w: bool) -> Callable:
        """What makes (dx, dw) of a dy like this. Whether one kernel makes both is asked once each has its plan."""
        dgrad = self._choice("dgrad", dy=dy, w=w) if need_x else None
        wgrad = self._choice("wgrad", dy=dy, x=x) if need_w else None
        strides = self._with(dy)
        if isinstance(dgrad, trial.Trial) or isinstance(wgrad, trial.Trial):
            to_x, to_w = self._part(dgrad, 0, strides), self._part(wgrad, 1, strides)
            return lambda dy, x, w: (to_x(dy, x, w), to_w(dy, x, w))
        fused = self._choice("backward", dy=dy, x=x, w=w) if need_x and need_w else None
        if isinstance(fused, dispatch.PassPlan) and fused.algorithm != "torch":
            return self._prepare("backward", fused.algorithm, fused.config, strides)
        apart = self._apart(dgrad, wgrad, strides)
        return functools.partial(fused, apart) if isinstance(fused, trial.Trial) else apart

    def _apart(self, dgrad: dispatch.PassPlan | None, wgrad: dispatch.PassPlan | None, strides: dict) -> Callable:
        """Each gradient that has a plan, by that."""
        by_torch = [plan is not None and plan.algorithm == "torch" for plan in (dgrad, wgrad)]
        to_x, to_w = (
            self._prepare(plan.pass_, plan.algorithm, plan.config, strides)
            if plan is not None and plan.algorithm != "torch"
            else None
            for plan in (dgrad, wgrad)
        )

        def grads(dy, x, w):
            dx, dw = self._by_reference(dy, x, w, *by_torch) if any(by_torch) else (None, None)
            return dx if to_x is None else to_x(dy, w), dw if to_w is None else to_w(dy, x)

        return grads

    def _part(self, choice: Choice | None, which: int, strides: dict) -> Callable:
        """What makes the gradient `which` of (dx, dw) by a plan or on trial."""
        if not isinstance(choice, trial.Trial):
            grads = self._apart(choice, None, strides) if which == 0 else self._apart(None, choice, strides)
            return lambda dy, x, w: grads(dy, x, w)[which]
        mask = which == 0, which == 1

        def run(dy, x, w):
            def by_torch(*_):
                return self._by_reference(dy, x, w, *mask)[which]

            return choice(by_torch, dy, (w, x)[which])

        return run

    def _by_reference(self, dy: Tensor, x: Tensor | None, w: Tensor | None, need_x: bool, need_w: bool):
        """(dx, dw) by F.conv2d's backward; other plans than now may have chosen what was saved."""
        return torch_reference.backward(self.args, dy, *self.in_place_of_unsaved(x, w), need_x, need_w)

    def saves(self, need_x: bool, need_w: bool) -> tuple[bool, bool]:
        """Which of x and w a backward that needs these gradients reads; F.conv2d's reads both.

        Activation checkpointing makes the forward pass again, and wants as many tensors as it saw before.
        """
        if torch_private.saved_tensors_are_packed():
            return True, True
        return need_w or (need_x and self._may_be_torch("dgrad")), need_x or (need_w and self._may_be_torch("wgrad"))

    def _may_be_torch(self, pass_: str) -> bool:
        return self._is_unproven(pass_) or self._by_torch(pass_)

    def in_place_of_unsaved(self, x: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and w; for one that was not saved, a tensor of its shape that takes no memory and has no values."""
        return (
            self._valueless(self.problem.x_shape) if x is None else x,
            self._valueless(self.problem.w_shape) if w is None else w,
        )

    def _valueless(self, shape) -> Tensor:
        dtype, device = self._kind
        return torch.empty((), dtype=dtype, device=device).expand(shape)

    # --- Plans and trials

    def _with(self, dy: Tensor | None) -> dict[str, tuple[int, ...]]:
        """Strides, of dy too if there is one."""
        return self.strides if dy is None else self.strides | {"dy": meaningful_strides(dy.shape, dy.stride())}

    def _choice(self, pass_: str, **operands: Tensor | None) -> Choice:
        """The plan of a pass for operands like these, or the trial that it is on; of "backward" torch's plan, or None,
        where the gradients come apart.
        """
        dy = operands.get("dy")
        form = None if dy is None else (dy.stride(), dy.data_ptr() & 15 == 0)
        decided = self._decided.get((pass_, form)) or self._decided.get((pass_, None))
        if decided is not None:
            return decided
        common = dy is None or self._lies_as_most("dy", dy, self._with(dy))
        if not trial.is_unproven(self.plan, pass_, self._common and common):
            return getattr(self.plan, pass_)
        found = self._trials.get((pass_, form)) or self._new_trial(pass_, form, operands)
        return self._trials.setdefault((pass_, form), found)

    def _new_trial(self, pass_: str, form: tuple | None, operands: dict[str, Tensor | None]) -> trial.Trial:
        dy = operands.get("dy")
        strides = self._with(dy)
        tensors = {name: tensor for name, tensor in operands.items() if tensor is not None}
        unaligned = [name for name, tensor in tensors.items() if tensor.data_ptr() & 15]
        job = {
            "pass_": pass_, "problem": dataclasses.asdict(self.problem), "strides": strides, "unaligned": unaligned,
            "target": self.plan.target.arch_name, "on": dataclasses.asdict(self.plan.target),
        }  # fmt: skip
        common = all(self._lies_as_most(name, tensor, strides) for name, tensor in tensors.items())

        def prepare(algorithm: str, config: dict) -> Callable:
            return self._prepare(pass_, algorithm, config, strides)

        def ended(found: raced.Result | None) -> None:
            self._ended(pass_, form, common, found)

        return trial.Trial(self.problem, pass_, self.plan.target, prepare, job, common, ended)

    def _lies_as_most(self, name: str, tensor: Tensor, strides: dict[str, tuple[int, ...]]) -> bool:
        """Whether an operand lies as in most calls of such a problem: aligned, dense, in the result's memory format."""
        p = self.problem
        shape = {"x": p.x_shape, "w": p.w_shape, "dy": p.y_shape}.get(name)
        aligned = not tensor.data_ptr() & 15
        if shape is None:  # the bias has one axis
            return aligned
        dense = meaningful_strides(shape, dense_strides(shape, p.layout == "nhwc"))
        return aligned and p.layout == p.out_layout and meaningful_strides(shape, strides[name]) == dense

    def _ended(self, pass_: str, form: tuple | None, common: bool, found: raced.Result | None) -> None:
        """A trial is over: plan by what it found, from the next call on."""
        p, target = self.problem, self.plan.target
        self._trials.pop((pass_, form), None)
        if found is None:  # no more trials; if there shall be none, plans are the model's
            if not trial.why_off():
                self._decided[pass_, None] = dispatch.plan_pass(p, pass_, target, "torch")
        elif common:
            self.plan = dispatch.plan(p, target, self.backend, self.plan.refusal)
        else:
            self._decided[pass_, form] = dispatch.plan_pass(p, pass_, target, found=found)
        self._forget()
