"""Batch norm and the activation after it in one pass, in training too, behind a convolution.

Of plain tensors by kernels/batch_norm.py: two passes over y (statistics; normalise and activate), and two in backward,
of which only y and two numbers a channel are kept. Of all others by torch's functions.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import launcher, prepared, torch_private
from .activations import ACTIVATIONS
from .algorithms import INTERPRETED, REGISTRY
from .call import PLAIN_TYPES, is_unreadable, traits

TILE = 4096  # elements that a program has at once: two accesses of 16 bytes of each of its threads, of 16-bit types
WARPS = 8
CHANNELS = 64  # of a tile whose channels lie side by side: 128 bytes
WAVES = 4  # programs for each multiprocessor, of a sum
# Tensors of y's size that a step of training moves: read for the statistics; read and written with the activation; dz
# and y read for the sums, and again for dy. And of torch: y read twice and the norm written; read and written by the
# activation; dz, its result and its gradient; that and y read for the sums, and again for dy.
MOVED, MOVED_BY_TORCH = 1 + 2 + 2 + 3, 3 + 2 + 3 + 2 + 3
MOST_SPLITS = 512  # partials of a channel, which one program reads at once
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _power_of_2(size: int) -> int:
    """The next."""
    return 1 << (size - 1).bit_length()


class _Shape(NamedTuple):
    """A tensor as the kernels see it, and how its work is divided."""

    images: int
    channels: int
    pixels: int
    channels_last: bool
    block_c: int
    block_p: int

    @property
    def steps(self) -> int:
        return self.images * math.ceil(self.pixels / self.block_p)


def apply(
    y: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    """activation(F.batch_norm(y, ...)), whose running statistics are updated. Raises what F.batch_norm does."""
    arguments = (y, running_mean, running_var, weight, bias, training, momentum, eps)
    return (computed if serves(*arguments) else _by_torch)(*arguments, activation)


def computed(
    y, running_mean, running_var, weight, bias, training, momentum, eps, activation, *, once: bool = False
) -> Tensor:  # fmt: skip
    """`apply` by the kernels, which serve. once: this momentum will not come again."""
    if training:
        mean, rstd = _statistics(y, running_mean, running_var, momentum, eps, once)
    else:
        mean, rstd = running_mean, (running_var.float() + eps).rsqrt()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, weight, bias)):
        return _apply_function(y, weight, bias, mean, rstd, training, eps, activation)
    return _applied(y, weight, bias, mean, rstd, activation)


def _by_torch(y, running_mean, running_var, weight, bias, training, momentum, eps, activation) -> Tensor:
    z = F.batch_norm(y, running_mean, running_var, weight, bias, training, momentum, eps)
    return z if activation is None else ACTIVATIONS[activation].of(z)


def serves(y, running_mean, running_var, weight, bias, training: bool, momentum: float, eps: float) -> bool:
    """Whether the kernels can do it: of what they cannot, and of what is wrong, torch knows what is to be said."""
    if torch.compiler.is_compiling() or torch_private.being_traced() is not None or not REGISTRY:
        return False
    if not _are_readable(y, (running_mean, running_var, weight, bias)) or y.numel() <= y.shape[1]:
        return False
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return False
    if any(t is not None and t.requires_grad for t in (running_mean, running_var)):
        return False
    return isinstance(momentum, (int, float)) and isinstance(eps, (int, float)) and eps > 0


def _are_readable(y, vectors: tuple) -> bool:
    """Whether the kernels can read y and what there is of vectors of a number a channel where they lie."""
    there = [t for t in vectors if t is not None]
    if not all(type(t) in PLAIN_TYPES and t.layout is torch.strided for t in (y, *there)) or torch_private.is_watched():
        return False
    if not (y.is_cuda or INTERPRETED) or y.dim() != 4 or y.dtype not in _DTYPES or _shape(y) is None:
        return False
    if any(map(is_unreadable, (y, *there))):
        return False
    dtypes = (y.dtype, torch.float32)
    return all(
        t.shape == y.shape[1:2] and t.device == y.device and t.is_contiguous() and t.dtype in dtypes for t in there
    )


def _shape(y: Tensor) -> _Shape | None:
    """None of a tensor with gaps, or of another order than NCHW or NHWC."""
    n, c, h, w = y.shape
    if y.is_contiguous(memory_format=torch.channels_last):
        block_c = min(CHANNELS, _power_of_2(c))
        return _Shape(1, c, n * h * w, True, block_c, TILE // block_c)
    if y.is_contiguous():
        block_p = min(TILE, _power_of_2(h * w))
        return _Shape(n, c, h * w, False, min(TILE // block_p, _power_of_2(c)), block_p)
    return None


# --- Launches --------------------------------------------------------------------------------------------------------


@functools.lru_cache(4096)
def _launch(name: str, shape: _Shape, programs: int, specialised: tuple, **scalars) -> launcher.Launch:
    """A kernel bound to a shape. programs: of a block of channels; specialised: all that Triton compiles for, of each
    tensor.
    """
    from .kernels import batch_norm as kernels

    kernel = getattr(kernels, name)
    steps = shape.steps
    each = math.ceil(steps / programs)
    scalars |= {
        "images": shape.images, "channels": shape.channels, "pixels": shape.pixels, "steps": steps, "steps_each": each,
        "BLOCK_P": shape.block_p, "BLOCK_C": shape.block_c,
    }  # fmt: skip
    names = kernel.arg_names
    if "ALIGN" in names:
        scalars["CHANNELS_LAST"] = shape.channels_last
        scalars["ALIGN"] = math.gcd(16, shape.channels if shape.channels_last else shape.pixels)
        scalars["INDEX_64"] = shape.images * shape.channels * shape.pixels + 2**20 >= 2**31
    if "EMULATE_BF16" in names:
        scalars["EMULATE_BF16"] = launcher.interpreting(kernel) and any(
            torch.bfloat16 in of for of in specialised if of
        )
    blocks = math.ceil(shape.channels / shape.block_c)
    grid = (blocks,) if name == "merge_kernel" else (programs, blocks)
    return launcher.Launch(kernel, grid, {key: scalars[key] for key in names if key in scalars}, num_warps=WARPS)


def _run(name: str, shape: _Shape, programs: int, *tensors: Tensor | None, once: bool = False, **scalars) -> None:
    make = _launch.__wrapped__ if once else _launch
    launch = make(name, shape, programs, tuple(map(traits, tensors)), **scalars)
    with _on(tensors[0]):
        launch(*tensors)


def _on(tensor: Tensor | None):
    """Where a tensor's kernels are launched."""
    assert tensor is not None
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _splits(y: Tensor, shape: _Shape) -> int:
    """Among how many programs the steps of a block of channels are divided; none of them is without."""
    blocks = math.ceil(shape.channels / shape.block_c)
    wanted = math.ceil(WAVES * prepared.target_of(y.device).multiprocessors / blocks)
    each = math.ceil(shape.steps / max(1, min(wanted, MOST_SPLITS, shape.steps)))
    return math.ceil(shape.steps / each)


def _vector(y: Tensor, *sizes: int) -> Tensor:
    return launcher.allocate(sizes, tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes))), y, torch.float32)


def _statistics(
    y: Tensor, running_mean, running_var, momentum: float, eps: float, once: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel, in fp32; the running ones are moved, and as by F.batch_norm
    keep their version: autograd holds nothing against calls of F.batch_norm that saved them.
    """
    shape = _shape(y)
    assert shape is not None
    splits, c = _splits(y, shape), shape.channels
    partial, mean, rstd = _vector(y, 2, splits, c), _vector(y, c), _vector(y, c)
    _run("statistics_kernel", shape, splits, y, partial)
    merge = shape._replace(block_c=max(1, min(TILE // _power_of_2(splits), _power_of_2(c), 32)))
    _run(
        "merge_kernel", merge, splits, partial, mean, rstd, running_mean, running_var,
        splits=splits, eps=float(eps), factor=float(momentum), SPLITS=_power_of_2(splits), once=once,
    )  # fmt: skip
    return mean, rstd


def _applied(y, weight, bias, mean, rstd, activation) -> Tensor:
    shape, z = _shape(y), launcher.allocate(y.shape, y.stride(), y)
    assert shape is not None
    _run("apply_kernel", shape, shape.steps, y, mean, rstd, weight, bias, z, ACTIVATION=activation)
    return z


def _gradients(dz, y, weight, bias, mean, rstd, training: bool, activation, needs) -> tuple:
    """(dy, dweight, dbias), each None unless needed."""
    shape = _shape(y)
    assert shape is not None
    if dz.stride() != y.stride() or dz.is_neg():
        dz = launcher.allocate(y.shape, y.stride(), y).copy_(dz)
    need_y, need_w, need_b = needs
    sums = None
    if training or need_w or need_b:
        splits = _splits(y, shape)
        partial = _vector(y, 2, splits, shape.channels)
        _run("reduce_kernel", shape, splits, dz, y, mean, rstd, weight, bias, partial, ACTIVATION=activation)
        sums = partial.sum(1)
    dy = None
    if need_y:
        dy, of_y = launcher.allocate(y.shape, y.stride(), y), sums if training else None
        _run(
            "gradient_kernel", shape, shape.steps, dz, y, mean, rstd, weight, bias, of_y, dy, ACTIVATION=activation
        )  # fmt: skip
    d_weight = sums[1].to(weight.dtype) if need_w and sums is not None else None
    return dy, d_weight, sums[0].to(bias.dtype) if need_b and sums is not None else None


class BatchNormActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, bias, mean, rstd, training, eps, activation):
        ctx.save_for_backward(y, weight, bias, mean, rstd)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        return _applied(y, weight, bias, mean, rstd, activation)

    @staticmethod
    def backward(ctx, dz):
        # What was saved may have been handed back as other tensors. (Of NHWC with strided weights torch 2.13's own
        # gradient is wrong, on a CPU.)
        y, *vectors = ctx.saved_tensors
        weight, bias, mean, rstd = (t if t is None else t.contiguous() for t in vectors)
        needs = ctx.needs_input_grad[:3]
        plain = type(dz) in PLAIN_TYPES and dz.layout is torch.strided and not torch_private.is_batched(dz)
        if torch.is_grad_enabled() or not plain or not _are_readable(y, (weight, bias, mean, rstd)):
            grads = _derived(dz, y, weight, bias, mean, rstd, ctx.training, ctx.eps, ctx.activation, needs)
        else:
            grads = _gradients(dz, y, weight, bias, mean, rstd, ctx.training, ctx.activation, needs)
        return *grads, None, None, None, None, None


def _derived(dz, y, weight, bias, mean, rstd, training: bool, eps: float, activation, needs) -> tuple:
    """`_gradients` by torch's own functions, which are derivable in turn."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            y, weight, bias = (t if t is None else t.detach().requires_grad_() for t in (y, weight, bias))
        var = None if training else rstd.pow(-2) - eps
        z = _by_torch(y, None if training else mean, var, weight, bias, training, 0.0, eps, activation)
        wanted = [t for t, need in zip((y, weight, bias), needs, strict=True) if need]
        grads = iter(torch.autograd.grad(z, wanted, dz, create_graph=create_graph))
    return tuple(next(grads) if need else None for need in needs)


_apply_function: Callable[..., Tensor] = torch_private.direct_apply(BatchNormActivation)
