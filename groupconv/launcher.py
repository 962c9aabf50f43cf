"""Launching: kernels bound to a grid and to their scalar arguments, and the memory they write to."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from . import assembler, devices

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor


def interpreting(kernel) -> bool:
    """Whether a kernel runs in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    from triton.runtime import JITFunction

    return not isinstance(kernel, JITFunction)


def stub_target() -> devices.Target | None:
    """The GPU that launches pretend to run on, None where they run: a driver that pretends has it as `target`."""
    drivers = sys.modules.get("triton.runtime.driver")
    pretended = None if drivers is None else getattr(getattr(drivers.driver, "_active", None), "target", None)
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


_VERDICTS: dict[str, bool] = {}  # by Triton's hash of what it compiled: whether ptxas got it wrong


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

    The first call compiles (or finds) the kernel through Triton's own dispatch; it is launched directly. So a Launch
    serves only calls that agree in all that Triton specialises on: dtypes, 16-byte alignment of each pointer, and on
    AMD which tensors are under 2 GiB. `prepared` keys its calls by these.
    """

    __slots__ = ("_places", "_run", "_unaligned", "compiled", "grid", "kernel", "options", "scalars")

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        scalars: dict,
        unaligned: dict[str, int] | None = None,
        places: tuple[int, ...] = (),
        **options,
    ):
        """unaligned: what scalars are instead, unless all tensors at these places begin at multiples of 16 bytes."""
        names = kernel.arg_names[-len(scalars) :]
        assert set(names) == set(scalars), sorted(set(names) ^ set(scalars))
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.scalars = tuple(scalars[name] for name in names)
        self._unaligned = {names.index(name): value for name, value in (unaligned or {}).items()}
        self._places = places
        self.options = {"enable_fp_fusion": True, **options}  # the default up to Triton 3.9; later ones differ
        self.compiled = None
        self._run: Callable | None = None

    def __call__(self, *tensors) -> None:
        run = self._run
        if run is None:
            if interpreting(self.kernel):
                self.kernel[self.grid](*tensors, *self.scalars, **self.options)
                return
            try:
                run = self._compile(tensors)
            except (OSError, subprocess.SubprocessError) as error:
                # A full disk, a read-only home, no headers of Python: Triton compiles into files, its launchers by C.
                said = f"groupconv: {self.kernel.fn.__name__} cannot be compiled into {cache_folder()}: {error}"
                raise assembler.NoKernel(f"{said}; TRITON_CACHE_DIR names another, backend='torch' works") from error
        if run is not None:
            run(*tensors, *self.scalars)

    def _compile(self, tensors) -> Callable | None:
        """Compile, without a launch, so that the assembler makes what the PTX says. Miscompiled where it never does;
        None where a hook of Triton's keeps the kernel from being compiled.
        """
        given = (tensors[place] for place in self._places)
        if any(tensor is not None and tensor.data_ptr() & 15 for tensor in given):
            self.scalars = tuple(self._unaligned.get(i, scalar) for i, scalar in enumerate(self.scalars))
        compiled = self._made(tensors)
        if compiled is None:
            return None
        if assembler.adds_half_a_constant(_ptx(compiled)):
            compiled = self._made(tensors, num_stages=1)  # not pipelined, its arithmetic is another
        if assembler.shifts_products_apart(_ptx(compiled)):
            compiled = self._made(tensors, ptx_options=assembler.careful())
        if compiled.hash not in _VERDICTS:
            ptx, cubin = _ptx(compiled), compiled.asm.get("cubin", b"")
            _VERDICTS[compiled.hash] = assembler.adds_half_a_constant(ptx) or assembler.loses_an_address(ptx, cubin)
        if _VERDICTS[compiled.hash]:
            name = self.kernel.fn.__name__
            raise assembler.Miscompiled(f"groupconv: ptxas would miscompile {name}; backend='torch' works")
        run = compiled[self.grid]
        self.compiled, self._run = compiled, run
        return run

    def _made(self, tensors, **options):
        """What Triton compiles, or has compiled before, with more options."""
        self.options |= options
        return self.kernel.run(*tensors, *self.scalars, grid=self.grid, warmup=True, **self.options)


def _ptx(compiled) -> str:
    """The code for NVIDIA's assembler, if that is what a kernel is compiled by."""
    return compiled.asm.get("ptx", "")
