"""What a call costs on the host: python -m groupconv.perf_reports.host_overhead

With a GPU: microseconds of Python and launch per call, the device left behind, beside F.conv2d. Without one: our own
path only, down to a launch that runs nothing (stub_driver), on CPU tensors. The times are of this machine's CPU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from groupconv import prepared
from groupconv.api import triton_conv
from groupconv.common.files import ENVIRONMENT
from groupconv.compiling import stub_driver

from .rows import Fields

FIELDS = (*ENVIRONMENT, "step", "mode", "provider", "us")
Call = Callable[[Tensor], Tensor]
REPEATS, CALLS = 15, 200
LAYERS = 10  # of a chain: the engine is entered once for a whole network, not once a layer


class _Nothing(torch.autograd.Function):
    """What an autograd.Function costs that computes nothing: it allocates its results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
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


def rows() -> Iterator[Fields]:
    """Rows of FIELDS but the environment: the mean host time of a call, of a small layer whose device time stays under
    it. With a GPU also F.conv2d's, compiled ones and a captured graph's replay; without one, launches run nothing.
    """
    on_gpu = torch.cuda.is_available()
    with contextlib.nullcontext() if on_gpu else stub_driver.active("sm_90"):
        yield from _eager("cuda" if on_gpu else "cpu")
        if on_gpu:
            yield from _compiled_and_graph()


def _tensors(device: str) -> tuple[Tensor, Tensor, Tensor]:
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(2, 32, 8, 8, **options).contiguous(memory_format=torch.channels_last)
    w = torch.randn(32, 4, 3, 3, **options).contiguous(memory_format=torch.channels_last)
    return x, w, torch.randn(32, **options)


def _row(step: str, mode: str, provider: str, us: float) -> Fields:
    return {"step": step, "mode": mode, "provider": provider, "us": us}


def _eager(device: str) -> Iterator[Fields]:
    synchronize: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else _nothing

    def timed(call: Callable[..., object], *given: object, calls: int = CALLS) -> float:
        return microseconds(functools.partial(call, *given), synchronize, calls)

    x, w, bias = _tensors(device)
    arguments = (w, bias, 1, 1, 1, 8)
    providers: dict[str, Call] = {
        "triton_conv": lambda x: triton_conv(x, *arguments, backend="triton"),
        "autograd.Function that computes nothing": lambda x: _Nothing.apply(x, w, bias),
    }
    if device == "cuda":
        providers["F.conv2d"] = lambda x: F.conv2d(x, *arguments)
    yield _row("plan lookup", "eager", "triton_conv", timed(prepared.lookup, x, *arguments, "triton"))
    with torch.no_grad():
        for name, call in providers.items():
            yield _row("forward without gradients", "eager", name, timed(call, x))
    leaves = [tensor.requires_grad_() for tensor in (x, w, bias)]
    for name, call in providers.items():
        yield _row("forward", "eager", name, timed(call, x))
        step = functools.partial(_step, call, x, leaves, torch.randn_like(call(x)))
        yield _row("forward and backward", "eager", name, timed(step, 1))
        chain = timed(step, LAYERS, calls=CALLS // LAYERS)
        yield _row(f"forward and backward, a layer of {LAYERS}", "eager", name, chain / LAYERS)


def _nothing() -> None:
    """There is no device to wait for."""


def _step(call: Call, x: Tensor, leaves: list[Tensor], dy: Tensor, layers: int) -> tuple[Tensor, ...]:
    """A chain of layers forward and backward."""
    y = x
    for _ in range(layers):
        y = call(y)
    return torch.autograd.grad(y, leaves, dy)


def _compiled_and_graph() -> Iterator[Fields]:
    x, w, bias = _tensors("cuda")
    arguments = (w, bias, 1, 1, 1, 8)
    calls: dict[str, Call] = {
        "triton_conv": lambda x: triton_conv(x, *arguments, backend="triton"),
        "F.conv2d": lambda x: F.conv2d(x, *arguments),
    }
    with torch.no_grad():
        for name, call in calls.items():
            compiled = functools.partial(torch.compile(call, dynamic=False, fullgraph=True), x)
            time_us = microseconds(compiled, torch.cuda.synchronize)
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
