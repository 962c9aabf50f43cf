"""A Triton driver for a GPU that is not there: kernels are compiled exactly as they are launched, and nothing runs.

    with stub_driver.active("sm_90"):
        launch(...)                     # CPU or meta tensors

Outputs stay unwritten: it checks compilation and times the host's side of a launch, never numbers.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from triton.backends.compiler import GPUTarget

from . import devices


class _Utils:
    def __init__(self, target: devices.Target):
        self.target = target

    def load_binary(self, name, binary, shared, device):
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads of a program

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {
            "max_shared_mem": self.target.shared_bytes,
            "multiprocessor_count": self.target.multiprocessors,
            "max_num_regs": 65536,
            "warpSize": self.target.warp_size,
        }


class _Launcher:
    def __init__(self, src, metadata):
        pass

    def __call__(self, *args):
        pass


class StubDriver:
    launcher_cls = _Launcher

    def __init__(self, target: devices.Target):
        self.target = target
        self.utils = _Utils(target)
        # A number for each target: kernels remember what they compiled by device number.
        self.number = 1 + list(devices.BY_SLUG).index(target.slug)

    def is_active(self):
        return True

    def get_current_device(self):
        return self.number

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, ty):
        return ty


def target() -> devices.Target | None:
    """The GPU that is pretended, None while Triton's own driver is active."""
    driver = triton.runtime.driver._active
    return driver.target if isinstance(driver, StubDriver) else None


@contextlib.contextmanager
def active(target: str):
    """Launch into the void for a named target; Triton's own driver is back afterwards."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(StubDriver(devices.named(target)))
    try:
        yield
    finally:
        triton.runtime.driver._active = before
