"""Launching: kernels bound to a grid and to their scalar arguments, and the memory they write to."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from . import devices

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor


def interpreting(kernel) -> bool:
    """Whether a kernel runs in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    from triton.runtime import JITFunction

    return not isinstance(kernel, JITFunction)


def stub_target() -> devices.Target | None:
    """The GPU that launches pretend to run on, None where they run: a driver that pretends has it as `target`."""
    drivers = sys.modules.get("triton.runtime.driver")
    pretended = None if drivers is None else getattr(drivers.driver._active, "target", None)
    return pretended if isinstance(pretended, devices.Target) else None


_LOCK = threading.Lock()
_poisoners = 0  # that are at work


def allocate(shape, strides, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised memory on the device of `like`, and of its dtype unless another is named."""
    if _poisoners:
        return like.new_empty_strided(shape, strides, dtype=dtype or like.dtype).fill_(math.nan)
    if dtype is None:
        return like.new_empty_strided(shape, strides)
    return like.new_empty_strided(shape, strides, dtype=dtype)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated is NaN, in all threads, so that what a kernel leaves unwritten shows."""
    global _poisoners
    with _LOCK:
        _poisoners += 1
    try:
        yield
    finally:
        with _LOCK:
            _poisoners -= 1


class Miscompiled(RuntimeError):
    """A kernel that NVIDIA's assembler would get wrong in every way that was tried."""


def adds_half_a_constant(ptx: str) -> bool:
    """Whether code adds a constant of two 16-bit halves, one of them zero, to two numbers at once.

    ptxas 12.8 to 13.0 may then add nothing on sm_90 (13.4 adds it): one tap in 16 was wrong on an H200, 2026-11-26.
    """
    if ".s16x2" not in ptx:
        return False
    constants = {name: int(value) for name, value in re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx)}
    added = re.findall(r"add\.s16x2\s+%r\d+, (%r\d+), (%r\d+);", ptx)
    addends = {constants[name] for names in added for name in names if name in constants}
    return any(value & 0xFFFF == 0 or value >> 16 & 0xFFFF == 0 for value in addends)


def shifts_products_apart(ptx: str) -> bool:
    """Whether code shifts three products of one factor or more, and not all by as much.

    ptxas 12.8 to 13.4 may then shift the factor once for all of them (docs/ptxas_shifts.md): gradients of strided
    depthwise layers were wrong on an H200, 2026-11-27. At its optimisation level 1 it does not.
    """
    factors = {name: pair for name, *pair in re.findall(r"mul\.lo\.[su]32\s+(%r\d+), (%r\d+), (%r\d+);", ptx)}
    shifts: dict[str, list[str]] = {}
    for product, amount in re.findall(r"shl\.b32\s+%r\d+, (%r\d+), (\d+);", ptx):
        for factor in factors.get(product, ()):
            shifts.setdefault(factor, []).append(amount)
    return any(len(amounts) > 2 and len({*amounts}) > 1 for amounts in shifts.values())


class View:
    """How kernels see tensors of one layout through a descriptor: axes, strides in elements, and the box of a load.

    The innermost axis has stride 1, the strides of the others and the tensor's own address are multiples of 16 bytes.
    """

    __slots__ = ("_descriptor", "_fields")

    def __init__(self, shape, strides, box, element_bytes: int):
        assert strides[-1] == 1, strides
        assert all(stride * element_bytes % 16 == 0 for stride in strides[:-1]), strides
        from triton.tools.tensor_descriptor import TensorDescriptor

        self._descriptor = TensorDescriptor
        self._fields = {
            "shape": list(shape), "strides": list(strides), "block_shape": list(box),
            "padding": "zero", "round_f32_to_tf32": False,
        }  # fmt: skip

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        """The descriptor of a tensor: without the checks of its class, which cost more than a launch."""
        descriptor = self._descriptor.__new__(self._descriptor)
        vars(descriptor).update(self._fields, base=tensor)
        return descriptor


def cache_folder() -> str:
    """Where Triton looks now for what was compiled before."""
    import triton

    return str(triton.knobs.cache.dir)


class Launch:
    """One kernel with its grid, scalar arguments and compile options fixed; calling it takes the tensors.

    The first call compiles (or finds) the kernel through Triton's own dispatch; later ones launch the compiled
    kernel directly. So a Launch serves only calls that agree in all that Triton specialises on: dtypes, 16-byte
    alignment of each pointer, and on AMD which tensors are under 2 GiB. `prepared` keys its calls by these.
    """

    __slots__ = ("_run", "compiled", "grid", "kernel", "options", "scalars")

    def __init__(self, kernel, grid: tuple[int, ...], scalars: dict, **options):
        names = kernel.arg_names[-len(scalars) :]
        assert set(names) == set(scalars), sorted(set(names) ^ set(scalars))
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.scalars = tuple(scalars[name] for name in names)
        self.options = {"enable_fp_fusion": True, **options}  # the default up to Triton 3.9; later ones differ
        self.compiled = None
        self._run = None

    def __call__(self, *tensors) -> None:
        if self._run is not None:
            self._run(*tensors, *self.scalars)
            return
        self._compile(tensors)
        if self.compiled is None:  # the interpreter returns nothing
            return
        if adds_half_a_constant(self.compiled.asm.get("ptx", "")):  # not pipelined, its arithmetic is another
            self._compile(tensors, num_stages=1)
            if adds_half_a_constant(self.compiled.asm["ptx"]):
                raise Miscompiled(f"groupconv: ptxas would miscompile {self.kernel.fn.__name__}; backend='torch' works")
        if shifts_products_apart(self.compiled.asm.get("ptx", "")):
            self._compile(tensors, ptx_options="--opt-level 1")
        self._run = self.compiled[self.grid]

    def _compile(self, tensors, **options) -> None:
        """Launch what these options make of the kernel, for what was launched before."""
        self.options |= options
        self.compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.options)
