"""A Triton driver for a GPU that is not there: kernels are compiled exactly as they are launched, and nothing runs.

    with stub_driver.active("sm_90"):
        launch(...)                     # CPU or meta tensors

Outputs stay unwritten: it checks compilation and times the host's side of a launch, never numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from .. import devices


class _Utils:
    def __init__(self, target: devices.Target):
        self.target = target

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads of a program

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.target.shared_bytes,
            "multiprocessor_count": self.target.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": self.target.warp_size,
        }


class _Launcher:
    def __init__(self, src: Any, metadata: Any):
        pass

    def __call__(self, *args: Any) -> None:
        pass


_NUMBERS = {slug: number for number, slug in enumerate(devices.BY_SLUG)}


class StubDriver:
    launcher_cls = _Launcher

    def __init__(self, target: devices.Target):
        self.target = target
        self.utils = _Utils(target)
        # A number for each target: kernels remember what they compiled by device number.
        self.number = 1 + _NUMBERS.setdefault(target.slug, len(_NUMBERS))

    def is_active(self) -> bool:
        return True

    def get_current_device(self) -> int:
        return self.number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def target() -> devices.Target | None:
    """The GPU that is pretended, None while Triton's own driver is active."""
    driver = triton.runtime.driver._active
    return driver.target if isinstance(driver, StubDriver) else None


@contextlib.contextmanager
def active(target: str | devices.Target) -> Iterator[None]:
    """Launch into the void for a target, or one of a name; Triton's own driver is back afterwards."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(StubDriver(devices.named(target) if isinstance(target, str) else target))
    try:
        yield
    finally:
        triton.runtime.driver._active = before
