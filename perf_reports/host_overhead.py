"""What a call costs on the host: python -m groupconv.perf_reports.host_overhead

With a GPU: microseconds of Python and launch per call, the device left behind, beside F.conv2d. Without one: our own
path only, down to a launch that runs nothing (stub_driver), on CPU tensors. The times are of this machine's CPU.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .. import prepared, stub_driver
from ..api import triton_conv

FIELDS = ("utc", "commit", "gpu", "driver", "torch", "triton", "cudnn", "kind", "step", "mode", "provider", "us")
REPEATS, CALLS = 15, 200
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


def rows() -> Iterator[dict]:
    """Rows of FIELDS but the environment: the mean host time of a call, of a small layer whose device time stays under
    it. With a GPU also F.conv2d's, compiled ones and a captured graph's replay; without one, launches run nothing.
    """
    on_gpu = torch.cuda.is_available()
    with contextlib.nullcontext() if on_gpu else stub_driver.active("sm_90"):
        yield from _eager("cuda" if on_gpu else "cpu")
        if on_gpu:
            yield from _compiled_and_graph()


def _tensors(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(2, 32, 8, 8, **options).contiguous(memory_format=torch.channels_last)
    w = torch.randn(32, 4, 3, 3, **options).contiguous(memory_format=torch.channels_last)
    return x, w, torch.randn(32, **options)


def _row(step: str, mode: str, provider: str, us: float) -> dict:
    return {"step": step, "mode": mode, "provider": provider, "us": us}


def _eager(device: str) -> Iterator[dict]:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    x, w, bias = _tensors(device)
    arguments = (w, bias, 1, 1, 1, 8)
    providers: dict[str, Callable] = {
        "triton_conv": lambda x: triton_conv(x, *arguments, backend="triton"),
        "autograd.Function that computes nothing": lambda x: _Nothing.apply(x, w, bias),
    }
    if device == "cuda":
        providers["F.conv2d"] = lambda x: F.conv2d(x, *arguments)
    lookup = microseconds(lambda: prepared.lookup(x, *arguments, "triton"), synchronize)
    yield _row("plan lookup", "eager", "triton_conv", lookup)
    with torch.no_grad():
        for name, call in providers.items():
            time_us = microseconds(lambda call=call: call(x), synchronize)
            yield _row("forward without gradients", "eager", name, time_us)
    leaves = [tensor.requires_grad_() for tensor in (x, w, bias)]
    for name, call in providers.items():
        dy = torch.randn_like(call(x))
        yield _row("forward", "eager", name, microseconds(lambda call=call: call(x), synchronize))

        def step(layers, call=call, dy=dy):
            y = x
            for _ in range(layers):
                y = call(y)
            return torch.autograd.grad(y, leaves, dy)

        both = microseconds(lambda step=step: step(1), synchronize)
        yield _row("forward and backward", "eager", name, both)
        chain = microseconds(lambda step=step: step(LAYERS), synchronize, calls=CALLS // LAYERS)
        yield _row(f"forward and backward, a layer of {LAYERS}", "eager", name, chain / LAYERS)


def _compiled_and_graph() -> Iterator[dict]:
    x, w, bias = _tensors("cuda")
    arguments = (w, bias, 1, 1, 1, 8)
    calls: dict[str, Callable] = {
        "triton_conv": lambda x: triton_conv(x, *arguments, backend="triton"),
        "F.conv2d": lambda x: F.conv2d(x, *arguments),
    }
    with torch.no_grad():
        for name, call in calls.items():
            compiled = torch.compile(call, dynamic=False, fullgraph=True)
            time_us = microseconds(lambda compiled=compiled: compiled(x), torch.cuda.synchronize)
            yield _row("forward without gradients", "compiled", name, time_us)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call(x)
            yield _row("forward without gradients", "graph", name, microseconds(graph.replay, torch.cuda.synchronize))


def main() -> int:
    """Print the table."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: launches run nothing"
    print(f"host time a call, us ({where}; torch {torch.__version__})")
    for row in rows():
        what = f"{row['provider']}, {row['mode']}: {row['step']}"
        print(f"  {what:85} {row['us']:7.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
