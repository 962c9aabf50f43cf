"""What the algorithms share in `prepare`: strides by name, what they tell the compiler, launches into new memory."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .. import launcher
from ..devices import Target
from ..kernels.reduce import sum_splits_kernel
from ..problem import ConvProblem, dense_strides

SUM_TILE = 2048  # partials that a program of the sum reads at once,
SUM_ROWS = 64  # of at most this many splits


def named_strides(tensor: str, strides) -> dict[str, int]:
    """Kernel arguments of a tensor's strides: stride_x_n, ... of an activation, stride_wgt_o, ... of a weight."""
    axes = "ochw" if tensor in ("wgt", "dw") else "nchw"
    return {f"stride_{tensor}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)}


def pixels_last(strides) -> bool:
    """Whether neighbours along a row are nearer in memory than neighbouring channels."""
    return strides[3] < strides[1]


def align(strides, axes=(0, 2, 3)) -> int:
    """The largest power of two, up to 16, that divides the strides of `axes`: by default all but the channels'."""
    return math.gcd(16, *(strides[axis] for axis in axes))


def reach(shape, strides) -> int:
    """The offset of a tensor's last element."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def index_64(problem: ConvProblem, strides: dict, *counts: int) -> bool:
    """Whether an element offset, or one of `counts`, can pass 2^31. A tile's last rows lie past the end by < 2^20, and
    what marches down a map may begin above it, by the padding or by the filter's rows.
    """
    shapes = {
        "x": problem.x_shape, "dx": problem.x_shape, "w": problem.w_shape,
        "y": problem.y_shape, "dy": problem.y_shape,
    }  # fmt: skip
    above = max(*problem.pad, problem.kh * problem.dilation[0])
    reaches = [
        reach(shape, strides[name]) + (above * strides[name][2] if name != "w" else 0)
        for name, shape in shapes.items()
        if strides.get(name) is not None
    ]
    return max(*reaches, problem.out_pixels, problem.batch * problem.h_in * problem.w_in, *counts) + 2**20 >= 2**31


def emulate_bf16(kernel, problem: ConvProblem) -> bool:
    """Whether the interpreter's arithmetic on bf16 must be done for it (kernels/tiles.py)."""
    return launcher.interpreting(kernel) and problem.dtype == "bf16"


def known(problem: ConvProblem, number: int):
    """A count of groups or channels as a kernel's argument: known when it is compiled, but of a single image. Batches
    whose images have weights of their own are folded into the groups of one, and their number varies from call to call.
    """
    if problem.batch == 1 or launcher.interpreting(sum_splits_kernel):  # to the interpreter a constant is any number
        return number
    return tl.constexpr(number)


def convolution(problem: ConvProblem) -> dict[str, int]:
    """Kernel arguments that say which convolution it is."""
    return {
        "batch": problem.batch, "h_in": problem.h_in, "w_in": problem.w_in,
        "h_out": problem.h_out, "w_out": problem.w_out,
        "GROUPS": known(problem, problem.groups), "CIN_G": problem.cin_g, "COUT_G": problem.cout_g,
        "KH": problem.kh, "KW": problem.kw,
        "CONV_STRIDE_H": problem.stride[0], "CONV_STRIDE_W": problem.stride[1],
        "PAD_H": problem.pad[0], "PAD_W": problem.pad[2], "DIL_H": problem.dilation[0], "DIL_W": problem.dilation[1],
    }  # fmt: skip


def precision(kernel, problem: ConvProblem, target: Target) -> str:
    """The precision of a kernel's products; the interpreter, which has no bf16x3, computes them in fp32."""
    found = target.precision(problem.dtype)
    return "ieee" if found == "bf16x3" and launcher.interpreting(kernel) else found


def split_config(config: dict) -> tuple[dict, dict]:
    """A configuration's kernel arguments (BLOCK_...) and its compile options."""
    blocks = {name: value for name, value in config.items() if name.startswith("BLOCK_")}
    return blocks, {name: value for name, value in config.items() if name.islower()}


def epilogue(problem: ConvProblem) -> dict:
    """Kernel arguments of fprop that say what follows the products."""
    return {"HAS_BIAS": problem.bias, "ACTIVATION": problem.activation}


NO_EPILOGUE = {"HAS_BIAS": False, "ACTIVATION": None}


class Single:
    """One launch into one new tensor. `run`: how to call it with (*operands, out), where that is not its own order."""

    __slots__ = ("launches", "run", "shape", "strides")

    def __init__(self, launch: launcher.Launch, shape, strides, run=None):
        self.launches = (launch,)
        self.run, self.shape, self.strides = run or launch, shape, strides

    def __call__(self, *operands):
        out = launcher.allocate(self.shape, self.strides, operands[0])
        self.run(*operands, out)
        return out


class Forward:
    """fprop by a launch of (x, w, bias, residual, kept, y), and its arguments in `epilogue`.

    Called with (x, w, bias, residual): y, or (y, kept) of a problem that keeps what its activation is of. `run`: how to
    call the launch so, where that is not its own order.
    """

    __slots__ = ("keeps", "launches", "run", "shape", "strides")

    def __init__(self, launch: launcher.Launch, problem: ConvProblem, strides, run=None):
        self.launches = (launch,)
        self.run, self.keeps = run or launch, problem.keeps
        self.shape, self.strides = problem.y_shape, strides

    def __call__(self, x, w, bias=None, residual=None):
        y = launcher.allocate(self.shape, self.strides, x)
        if not self.keeps:
            self.run(x, w, bias, residual, None, y)
            return y
        kept = launcher.allocate(self.shape, self.strides, x)
        self.run(x, w, bias, residual, kept, y)
        return y, kept


class FilterGradient:
    """Where wgrad's sums go: into dw itself, or, of several splits, into fp32 partials that a second launch adds up.

    arguments: a kernel's, of the strides of [splits, c_out, CIN_G, KH, KW].
    """

    __slots__ = ("arguments", "launches", "partials", "shape", "splits", "strides")

    def __init__(self, problem: ConvProblem, splits: int, strides):
        """strides: dw's; None where the kernel is not asked for it."""
        self.splits, self.shape, self.strides = splits, problem.w_shape, strides
        self.partials = splits, problem.params
        if splits == 1 or strides is None:
            self.arguments = {"stride_dw_split": known(problem, 0), **named_strides("dw", strides or (0, 0, 0, 0))}
            self.launches: tuple[launcher.Launch, ...] = ()
        else:
            self.arguments = {"stride_dw_split": known(problem, problem.params)}
            self.arguments |= named_strides("dw", dense_strides(problem.w_shape, True))
            self.launches = (sum_of_splits(problem, splits, strides),)

    def depthwise_arguments(self) -> dict[str, int]:
        """Those of kernels of one input channel a group."""
        return {name: stride for name, stride in self.arguments.items() if name != "stride_dw_c"}

    def new(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what a kernel writes its sums to, dw), one and the same where there is one split."""
        dw = launcher.allocate(self.shape, self.strides, like)
        if not self.launches:
            return dw, dw
        return launcher.allocate(self.partials, (self.partials[1], 1), like, torch.float32), dw

    def added(self, sums: torch.Tensor, dw: torch.Tensor) -> torch.Tensor:
        """dw, once the kernel has written its sums."""
        for launch in self.launches:
            launch(sums, dw)
        return dw


class SplitK:
    """wgrad by a launch of (dy, x, dw). `run`: how to call it so, where that is not its own order."""

    __slots__ = ("launches", "result", "run")

    def __init__(self, launch: launcher.Launch, result: FilterGradient, run=None):
        self.run, self.result = run or launch, result
        self.launches = (launch, *result.launches)

    def __call__(self, dy, x):
        sums, dw = self.result.new(x)
        self.run(dy, x, sums)
        return self.result.added(sums, dw)


class Fused:
    """dgrad and wgrad by a launch of (dy, x, w, dx, dw)."""

    __slots__ = ("launches", "result", "shape", "strides")

    def __init__(self, launch: launcher.Launch, problem: ConvProblem, result: FilterGradient, dx_strides):
        self.launches, self.result = (launch, *result.launches), result
        self.shape, self.strides = problem.x_shape, dx_strides

    def __call__(self, dy, x, w):
        dx = launcher.allocate(self.shape, self.strides, dy)
        sums, dw = self.result.new(x)
        self.launches[0](dy, x, w, dx, sums)
        return dx, self.result.added(sums, dw)


def call_of_backward(pass_: str, launch: launcher.Launch, problem: ConvProblem, result: FilterGradient, dx_strides):
    """How a backward pass calls a kernel of (dy, x, w, dx, dw) that does dgrad, wgrad or both."""
    if pass_ == "dgrad":
        return Single(launch, problem.x_shape, dx_strides, lambda dy, w, dx: launch(dy, None, w, dx, None))
    if pass_ == "wgrad":
        return SplitK(launch, result, lambda dy, x, dw: launch(dy, x, None, None, dw))
    return Fused(launch, problem, result, dx_strides)


def sum_of_splits(problem: ConvProblem, splits: int, strides) -> launcher.Launch:
    """The launch (part, dw) that sums wgrad's partials, in an order that only the number of splits decides."""
    rows = min(SUM_ROWS, triton.next_power_of_2(splits))
    block = SUM_TILE // rows
    scalars = {
        "splits": splits, "size": problem.params, **named_strides("dw", strides),
        "CIN_G": problem.cin_g, "KH": problem.kh, "KW": problem.kw,
        "EMULATE_BF16": emulate_bf16(sum_splits_kernel, problem),
        "ROWS": rows, "BLOCK": block,
    }  # fmt: skip
    grid = (math.ceil(problem.params / block),)
    return launcher.Launch(sum_splits_kernel, grid, scalars, num_warps=4)
