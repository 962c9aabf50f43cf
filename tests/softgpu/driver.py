"""A Triton driver whose launches run on the CPU, from the PTX that Triton compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from . import machine, machine_code
from .machine import TensorMap, View

# What PTX leaves undefined, but ptxas, which knows the registers of a wgmma in flight, puts right where it serialises;
# the first of them also by a fence of its own.
TOLERATED = ("wgmma", "register in flight")
# The kinds of faults after which a launch can go on.
SOFT = (
    *TOLERATED, "overwrite in flight", "shared race", "read of shared bytes never written", "in flight", "proxy fence",
    "gap between elements",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gpu:
    """multiprocessors: as Triton is told. shared_bytes: of one program. sm_bytes: shared memory and L1 together."""

    arch: int
    multiprocessors: int
    shared_bytes: int
    sm_bytes: int


GPUS = {"sm_80": Gpu(80, 108, 166912, 192 * 1024), "sm_90": Gpu(90, 132, 232448, 256 * 1024)}


class Session:
    """How launches run, and what they did: `results`.

    checks: accesses of shared memory are checked in "all" programs, "some" (first, second, middle, last) or "none";
    global memory always is.
    soft: kinds of faults that are only noted, in a result's `findings`. Those TOLERATED are only noted where ptxas
    serialised the products, "wgmma" also where it fenced them; elsewhere they are faults like others.
    late: a wgmma reads shared memory at its wait, and not when it is issued. PTX allows both.
    edit: (kernel's name, PTX) -> PTX, to plant faults; what ptxas would make of that is not known, so nothing is
    tolerated.
    programs: number of programs -> those to run.
    """

    def __init__(
        self,
        checks: str = "all",
        soft: Iterable[str] = (),
        late: bool = False,
        edit: Callable[[str, str], str] | None = None,
        programs: Callable[[int], Sequence[int]] | None = None,
    ):
        self.checks, self.soft, self.late, self.edit, self.programs = checks, tuple(soft), late, edit, programs
        self.results: list[machine.Result] = []

    def checked(self, programs: Sequence[int]) -> list[int]:
        """For each program that runs, whether its accesses of shared memory are checked."""
        last = len(programs) - 1
        some = {0, 1, last // 3, last // 2, last}
        return [int(self.checks == "all" or (self.checks == "some" and i in some)) for i in range(last + 1)]

    def judge(self, result: machine.Result, code: machine_code.WarpGroupCode | None) -> None:
        """Keep a result, and raise the first of its findings that is neither tolerated nor soft."""
        self.results.append(result)
        tolerated: Sequence[str] = ()
        if code is not None:
            tolerated = TOLERATED if code.serialised else TOLERATED[:1] if code.fenced else ()
        result.faults = [finding for finding in result.findings if finding.kind not in tolerated]
        for fault in result.faults:
            if fault.kind not in self.soft:
                raise fault


@contextlib.contextmanager
def active(target: str = "sm_90", **options):
    """Launches on CPU tensors run as a GPU's; yields their Session, which takes the options."""
    before = triton.runtime.driver._active
    session = Session(**options)
    triton.runtime.driver.set_active(_Driver(GPUS[target], session))
    try:
        with _remembering_code():
            yield session
    finally:
        triton.runtime.driver._active = before


@functools.lru_cache(64)
def load(text: str, threads: int) -> machine.Loaded:
    """The program of a kernel's PTX."""
    return machine.Loaded(text, threads)


# --- The driver ------------------------------------------------------------------------------------------------------

_code: dict[bytes, tuple[str, bytes]] = {}  # hash of a binary, which is all that a driver is given -> PTX and binary


@contextlib.contextmanager
def _remembering_code():
    original = CompiledKernel._init_handles

    def init_handles(kernel):
        if kernel.module is None and "ptx" in kernel.asm:
            _code[hashlib.sha256(kernel.kernel).digest()] = kernel.asm["ptx"], kernel.kernel
        return original(kernel)

    CompiledKernel._init_handles = init_handles
    try:
        yield
    finally:
        CompiledKernel._init_handles = original


class _Utils:
    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def load_binary(self, name, binary, shared, device):
        return 1, _code[hashlib.sha256(binary).digest()], 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {
            "max_shared_mem": self.gpu.shared_bytes,
            "multiprocessor_count": self.gpu.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": 32,
        }


class _Driver:
    def __init__(self, gpu: Gpu, session: Session):
        self.gpu, self.session, self.utils = gpu, session, _Utils(gpu)
        self.launcher_cls = _Launcher

    def is_active(self):
        return True

    def get_current_device(self):
        return 1000 + self.gpu.arch  # kernels remember what they compiled by this number

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.gpu.arch, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, type_):
        return type_


class _Launcher:
    """Takes what Triton hands a compiled kernel's launcher. A kernel outlives a session, so it asks for the driver."""

    def __init__(self, source, metadata):
        self.signature, self.metadata = list(source.signature.values()), metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, exit_, *args):
        if not x * y * z:
            return
        driver, metadata = triton.runtime.driver.active, self.metadata
        session, gpu = driver.session, driver.gpu
        ptx, cubin = function
        text = ptx if session.edit is None else session.edit(metadata.name, ptx)
        loaded = load(text, metadata.num_warps * 32)
        if metadata.global_scratch_size:
            raise NotImplementedError("global scratch")
        values, views = self._arguments(args)
        values += [0] * (len(loaded.kernel.params) - len(values))  # pointers to scratch memory
        programs = range(x * y * z) if session.programs is None else session.programs(x * y * z)
        fit = max(1, min(2048 // loaded.threads, gpu.sm_bytes // (metadata.shared + 1024)))
        result = machine.launch(
            loaded, metadata.name, (x, y, z), values, views, metadata.shared, programs=programs,
            checked=session.checked(programs), l1_bytes=max(16384, gpu.sm_bytes // fit - metadata.shared - 1024),
            soft=(*session.soft, *TOLERATED), late=session.late,
        )  # fmt: skip
        doubtful = text == ptx and any(finding.kind in TOLERATED for finding in result.findings)
        session.judge(result, machine_code.of_cubin(cubin) if doubtful else None)

    def _arguments(self, args) -> tuple[list, list[View]]:
        """The values of the PTX's parameters, and the memory that they give access to."""
        values: list[int | TensorMap] = []
        views = []
        descriptors = iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        for position, (type_, arg) in enumerate(zip(self.signature, args, strict=True)):
            if type_ == "constexpr":
                continue
            if isinstance(type_, tuple):
                raise NotImplementedError("arguments that are tuples")
            if type_.startswith("tensordesc"):
                values += [_tensor_map(arg, next(descriptors)), *map(int, arg.shape), *map(int, arg.strides)]
                views.append(view_of(arg.base, position))
            elif type_.startswith("*"):
                values.append(0 if arg is None else arg.data_ptr())
                if arg is not None:
                    views.append(view_of(arg, position))
            elif type_ in ("fp32", "f32"):
                values.append(struct.unpack("<I", struct.pack("<f", float(arg)))[0])
            elif type_.startswith(("i", "u")):
                values.append(int(arg))
            else:
                raise NotImplementedError(f"arguments of type {type_}")
        return values, views


def view_of(tensor: torch.Tensor, argument: int) -> View:
    """The memory of a tensor's elements."""
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    return View(tensor.data_ptr(), tuple(tensor.shape), strides, size, argument)


def _tensor_map(descriptor, meta) -> TensorMap:
    """A descriptor as cuTensorMapEncodeTiled would take it, with its checks."""
    if meta.get("fp4_padded") or getattr(descriptor, "round_f32_to_tf32", False):
        raise NotImplementedError("tensor maps that convert")
    size, swizzle, box = meta["elem_size"], meta["swizzle"], list(meta["block_size"])
    shape, address = list(descriptor.shape), descriptor.base.data_ptr()
    steps = [stride * size for stride in descriptor.strides]
    inner = box[-1] * size
    checks = {
        f"axes {shape}, strides {steps}, box {box}": steps[-1] == size and len(box) == len(shape) == len(steps),
        "address is no multiple of 16": address % 16 == 0,
        f"strides of {steps} bytes": all(step % 16 == 0 and 0 <= step < 1 << 40 for step in steps[:-1]),
        f"box {box}": all(1 <= n <= 256 for n in box),
        f"shape {shape}": all(1 <= n <= 1 << 32 for n in shape),
        f"inner box of {inner} bytes with swizzle {swizzle}": inner % 16 == 0
        and not (swizzle and inner > 16 << swizzle),
    }
    if wrong := [what for what, right in checks.items() if not right]:
        raise machine.Fault("tensor map: " + "; ".join(wrong), kind="TMA")
    return TensorMap(
        address, tuple(shape[::-1]), tuple(steps[-2::-1]), tuple(box[::-1]), size, swizzle, descriptor.padding == "nan"
    )
