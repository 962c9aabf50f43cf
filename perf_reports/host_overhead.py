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
        yield from _rows(on_gpu)


def _rows(on_gpu: bool) -> Iterator[Fields]:
    options: dict[str, Any] = {"device": "cuda" if on_gpu else "cpu", "dtype": torch.bfloat16}
    x = torch.randn(2, 32, 8, 8, **options).contiguous(memory_format=torch.channels_last)
    w = torch.randn(32, 4, 3, 3, **options).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(32, **options)
    arguments = (w, bias, 1, 1, 1, 8)
    convolutions: dict[str, Call] = {"triton_conv": lambda x: triton_conv(x, *arguments, backend="triton")}
    if on_gpu:
        convolutions["F.conv2d"] = lambda x: F.conv2d(x, *arguments)
    providers = convolutions | {"autograd.Function that computes nothing": lambda x: _Nothing.apply(x, w, bias)}

    def row(step: str, provider: str, call: Callable[[], object], mode: str = "eager", layers: int = 1) -> Fields:
        synchronize = torch.cuda.synchronize if on_gpu else lambda: None
        us = microseconds(call, synchronize, CALLS // layers) / layers
        return {"step": step, "mode": mode, "provider": provider, "us": us}

    yield row("plan lookup", "triton_conv", lambda: prepared.lookup(x, *arguments, "triton"))
    with torch.no_grad():
        for name, provider in providers.items():
            yield row("forward without gradients", name, functools.partial(provider, x))
    leaves = [tensor.requires_grad_() for tensor in (x, w, bias)]
    for name, provider in providers.items():
        yield row("forward", name, functools.partial(provider, x))
        step = functools.partial(_step, provider, x, leaves, torch.randn_like(provider(x)))
        yield row("forward and backward", name, functools.partial(step, 1))
        chain = functools.partial(step, LAYERS)
        yield row(f"forward and backward, a layer of {LAYERS}", name, chain, layers=LAYERS)
    with torch.no_grad():
        for name, convolution in convolutions.items() if on_gpu else ():
            compiled = torch.compile(convolution, dynamic=False, fullgraph=True)
            yield row("forward without gradients", name, functools.partial(compiled, x), "compiled")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                convolution(x)
            yield row("forward without gradients", name, graph.replay, "graph")


def _step(call: Call, x: Tensor, leaves: list[Tensor], dy: Tensor, layers: int) -> tuple[Tensor, ...]:
    """A chain of layers forward and backward."""
    y = x
    for _ in range(layers):
        y = call(y)
    return torch.autograd.grad(y, leaves, dy)


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
