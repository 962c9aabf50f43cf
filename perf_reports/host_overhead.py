"""What a call costs on the host: python -m groupconv.perf_reports.host_overhead

With a GPU: microseconds of Python and launch per call, the device left behind, beside F.conv2d. Without one: our own
path only, down to a launch that runs nothing (stub_driver), on CPU tensors. The times are of this machine's CPU.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import ops, stub_driver
from ..api import triton_conv

REPEATS, CALLS = 30, 200


class _Nothing(torch.autograd.Function):
    """What an autograd.Function costs that does nothing."""

    @staticmethod
    def forward(ctx, x, w, bias, call):
        return x.new_empty(1)

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, None


def microseconds(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """The mean host time of a call, in the repeat that the machine disturbed least."""
    for _ in range(20):
        call()
    times = []
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    synchronize()
    return min(times)


def measure(device: str) -> dict[str, float]:
    """Microseconds by step, of a small layer whose device time stays under its host time."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    options = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(2, 32, 8, 8, **options).contiguous(memory_format=torch.channels_last)
    w = torch.randn(32, 4, 3, 3, **options).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(32, **options)
    found = {
        "plan lookup": microseconds(lambda: ops.lookup(x, w, bias, 1, 1, 1, 8, "triton"), synchronize),
        "autograd.Function that does nothing": 0.0,
    }

    def ours():
        return triton_conv(x, w, bias, 1, 1, 1, 8, backend="triton")

    def theirs():
        return F.conv2d(x, w, bias, 1, 1, 1, 8)

    providers = {"triton_conv": ours, "F.conv2d": theirs} if device == "cuda" else {"triton_conv": ours}
    with torch.no_grad():
        for name, call in providers.items():
            found[f"{name}, forward without gradients"] = microseconds(call, synchronize)
    for tensor in (x, w, bias):
        tensor.requires_grad_()
    found["autograd.Function that does nothing"] = microseconds(lambda: _Nothing.apply(x, w, bias, None), synchronize)
    for name, call in providers.items():
        grad = torch.randn_like(call())
        found[f"{name}, forward"] = microseconds(call, synchronize)

        def step(call=call, grad=grad):
            return torch.autograd.grad(call(), (x, w, bias), grad)

        found[f"{name}, forward and backward"] = microseconds(step, synchronize)
    return found


def main() -> int:
    """Print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.nullcontext() if device == "cuda" else stub_driver.active("sm_90"):
        found = measure(device)
    where = torch.cuda.get_device_name() if device == "cuda" else "no GPU: launches run nothing"
    print(f"host time a call, us ({where}; torch {torch.__version__})")
    for name, time_us in found.items():
        print(f"  {name:45} {time_us:7.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
