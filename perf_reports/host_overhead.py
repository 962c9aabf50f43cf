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
LAYERS = 10  # of a chain: the engine is entered once for a whole network, not once a layer


class _Nothing(torch.autograd.Function):
    """What an autograd.Function costs that computes nothing: it allocates its results."""

    @staticmethod
    def forward(ctx, x, w, bias):
        ctx.save_for_backward(x, w)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(w), dy.new_empty(w.shape[:1])


def microseconds(call: Callable[[], object], synchronize: Callable[[], object], calls: int = CALLS) -> float:
    """The mean host time of a call, in the repeat that the machine disturbed least."""
    for _ in range(20):
        call()
    times = []
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    synchronize()
    return min(times)


def measure(device: str) -> dict[str, float]:
    """Microseconds by step, of a small layer whose device time stays under its host time."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    options = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(2, 32, 8, 8, **options).contiguous(memory_format=torch.channels_last)
    w = torch.randn(32, 4, 3, 3, **options).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(32, **options)
    arguments = (w, bias, 1, 1, 1, 8)
    providers = {
        "triton_conv": lambda x: triton_conv(x, *arguments, backend="triton"),
        "autograd.Function that computes nothing": lambda x: _Nothing.apply(x, w, bias),
    }
    if device == "cuda":
        providers["F.conv2d"] = lambda x: F.conv2d(x, *arguments)
    found = {"plan lookup": microseconds(lambda: ops.lookup(x, *arguments, "triton"), synchronize)}
    with torch.no_grad():
        for name, call in providers.items():
            found[f"{name}: forward without gradients"] = microseconds(lambda call=call: call(x), synchronize)
    leaves = [tensor.requires_grad_() for tensor in (x, w, bias)]
    for name, call in providers.items():
        dy = torch.randn_like(call(x))
        found[f"{name}: forward"] = microseconds(lambda call=call: call(x), synchronize)

        def step(layers, call=call, dy=dy):
            y = x
            for _ in range(layers):
                y = call(y)
            return torch.autograd.grad(y, leaves, dy)

        found[f"{name}: forward and backward"] = microseconds(lambda step=step: step(1), synchronize)
        chain = microseconds(lambda step=step: step(LAYERS), synchronize, calls=CALLS // LAYERS)
        found[f"{name}: forward and backward, a layer of {LAYERS}"] = chain / LAYERS
    return found


def main() -> int:
    """Print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.nullcontext() if device == "cuda" else stub_driver.active("sm_90"):
        found = measure(device)
    where = torch.cuda.get_device_name() if device == "cuda" else "no GPU: launches run nothing"
    print(f"host time a call, us ({where}; torch {torch.__version__})")
    for name, time_us in found.items():
        print(f"  {name:75} {time_us:7.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
