"""A report's rows on a GPU: its limits, then our algorithms and F.conv2d, checked against float64 and timed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton.testing
from torch import Tensor

from .. import compile_check, cost, dispatch, resources
from ..algorithms import REGISTRY
from ..devices import Target
from ..problem import ConvProblem
from .numerics import Operands, operands, poisoned, reference, worst_error
from .passes import reported, taken
from .rows import Layer, Timing, layer_row, limit_row, timing_fields

Timer = Callable[[Callable[[], object]], Timing]
BASELINES = {"torch_contiguous": torch.contiguous_format, "torch_channels_last": torch.channels_last}
COPY_BYTES = 2**30
MATRIX_SIZE = 8192


def do_bench(run: Callable[[], object]) -> Timing:
    """The GPU's time of a call with a cold L2: events around it, the cache cleared before each repetition."""
    p20, p50, p80 = triton.testing.do_bench(run, quantiles=[0.2, 0.5, 0.8])
    return Timing(p50 * 1e3, p20 * 1e3, p80 * 1e3)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What this device reaches: a large copy, in GB/s read and written, and a large matrix product, in TFLOP/s."""

    copy_gbps: float
    matrix_tflops: float

    def floor_us(self, problem: ConvProblem, pass_: str, target: Target) -> float:
        """The floor of a pass by these limits rather than by the target's."""
        rates = ((problem.dtype, self.matrix_tflops),)
        return cost.floor_us(problem, pass_, dataclasses.replace(target, copy_gbps=self.copy_gbps, matrix_tflops=rates))


def limits(
    dtype: str, timer: Timer, device: str = "cuda", copy_bytes: int = COPY_BYTES, matrix_size: int = MATRIX_SIZE
) -> Limits:
    """Measure the limits in a dtype, under `settings(dtype)`."""
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timer(lambda: target.copy_(source))
    a = torch.randn(matrix_size, matrix_size, device=device).to(compile_check.TORCH_DTYPES[dtype])
    b = torch.randn(matrix_size, matrix_size, device=device).to(a.dtype)
    matrix = timer(lambda: a @ b)
    return Limits(2 * copy_bytes / copy.p50 / 1e3, 2 * matrix_size**3 / matrix.p50 / 1e6)


@contextlib.contextmanager
def settings(dtype: str) -> Iterator[None]:
    """PyTorch as a fair baseline: cuDNN searches for its fastest algorithm, and fp32 computes in TF32 only if asked."""
    backends: Any = torch.backends
    before = backends.cudnn.benchmark, backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
    precision = "tf32" if dtype == "tf32" else "ieee"
    backends.cudnn.benchmark = True
    backends.cudnn.conv.fp32_precision = backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        backends.cudnn.benchmark, backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision = before


def count(layers: list[Layer], target: Target) -> int:
    """How many rows `rows` yields."""
    each = (names for layer in layers for _, names in reported(layer.problem, target))
    return 2 + sum(len(names) + len(BASELINES) + 1 for names in each)


def rows(
    layers: list[Layer],
    target: Target,
    device: str = "cuda",
    timer: Timer = do_bench,
    measure_limits: Callable[[str, Timer, str], Limits] = limits,
) -> Generator[dict, None, None]:
    """The device's limits; then, for each layer and pass, each algorithm pinned, F.conv2d, and what "auto" takes.

    `timer` times a call. A provider that fails, or whose numbers are wrong, has a row that says so and no time.
    """
    dtype = layers[0].problem.dtype
    with settings(dtype):
        found = measure_limits(dtype, timer, device)
        yield limit_row("copy_limit", dtype, found.copy_gbps, "measured")
        yield limit_row("matrix_limit", dtype, found.matrix_tflops, "measured")
        for layer in layers:
            bench = _Bench(layer, target, device, timer, found)
            for pass_, names in reported(layer.problem, target):
                yield from bench.rows(pass_, names)


class _Bench:
    """One layer's rows; its tensors are made when the first of them needs them."""

    def __init__(self, layer: Layer, target: Target, device: str, timer: Timer, found: Limits):
        self.layer, self.problem, self.target = layer, layer.problem, target
        self.device, self.timer, self.limits = device, timer, found
        # The first images and the last: an index that overflows does so at the end.
        self.images = sorted({0, min(1, self.problem.batch - 1), self.problem.batch - 1})
        self._expected: tuple[str, Any] | None = None

    @functools.cached_property
    def given(self) -> Operands:
        return operands(self.problem, self.device)

    def expected(self, pass_: str) -> Any:
        if self._expected is None or self._expected[0] != pass_:
            self._expected = pass_, reference(self.problem, self.given, pass_, self.images)
        return self._expected[1]

    def rows(self, pass_: str, names: list[str]) -> Iterator[dict]:
        done: dict[str, dict] = {}
        for name in names:
            plan = dispatch.plan_pass(self.problem, pass_, self.target, f"triton:{name}")
            done[name] = self._ours(pass_, name, plan)
            yield done[name]
        for name in BASELINES:
            done[name] = self._torch(pass_, name)
            yield done[name]
        yield self._auto(pass_, done)

    def _about(self, pass_: str, provider: str, source: str, config: dict | None = None) -> dict:
        ungrouped = dataclasses.replace(self.problem, groups=1)
        images = ", ".join(map(str, self.images))
        return {
            **layer_row(self.layer, pass_, provider),
            "source": source,
            "config": config,
            "floor_us": self.limits.floor_us(self.problem, pass_, self.target),
            "ungrouped_floor_us": self.limits.floor_us(ungrouped, pass_, self.target),
            "err_on": "dw" if pass_ == "wgrad" else f"{'dw, ' * (pass_ == 'backward')}images {images}",
        }

    def _auto(self, pass_: str, done: dict[str, dict]) -> dict:
        """What dispatch chooses: mostly a row that is there already."""
        plan = taken(self.problem, pass_, self.target)
        if plan is None:
            return {**self._about(pass_, "auto", ""), "note": "takes dgrad and wgrad"}
        by_torch = "torch_channels_last" if self.problem.layout == "nhwc" else "torch_contiguous"
        row = done[by_torch if plan.algorithm == "torch" else plan.algorithm]
        if plan.algorithm != "torch" and row["config"] != plan.config:
            row = self._ours(pass_, "auto", plan)
        takes = f"takes {'F.conv2d' if plan.algorithm == 'torch' else plan.algorithm}"
        note = "; ".join(filter(None, [takes, row.get("note")]))
        return {**row, "provider": "auto", "source": plan.source, "note": note}

    def _ours(self, pass_: str, provider: str, plan: dispatch.PassPlan) -> dict:
        row = self._about(pass_, provider, plan.source, plan.config)
        try:
            strides = compile_check.dense_operand_strides(self.problem)
            call = REGISTRY[plan.algorithm].prepare(self.problem, pass_, plan.config, self.target, strides)
            tensors = self.given.of(pass_)
            with poisoned():
                row["max_rel_err"], row["err_bound"] = self._error(pass_, call(*tensors))
            compiled = call.launches[0].compiled
            if compiled is not None:
                row |= _resources(compiled)
                row["compiled_for"] = self.target.arch_name
            if row["max_rel_err"] <= row["err_bound"]:
                row |= self._timed(pass_, lambda: call(*tensors))
            else:
                row["note"] = f"wrong: error {row['max_rel_err']:.2g} above the bound {row['err_bound']:.2g}"
        except Exception as error:  # what it raises is the finding; the other rows may do better
            row["note"] = _failure(error)
        return row

    def _torch(self, pass_: str, provider: str) -> dict:
        """A baseline's error is recorded and not judged by our bound; only a NaN keeps it from being timed."""
        row = self._about(pass_, provider, "baseline")
        try:
            x, w, dy = (
                t.contiguous(memory_format=BASELINES[provider]) for t in (self.given.x, self.given.w, self.given.dy)
            )
            run = _torch_call(self.problem, pass_, x, w, dy)
            row["max_rel_err"], _ = self._error(pass_, run())
            if row["max_rel_err"] < float("inf"):
                row |= self._timed(pass_, run)
            else:
                row["note"] = "wrong: the result is not finite"
        except Exception as error:
            row["note"] = _failure(error)
        return row

    def _error(self, pass_: str, found: Any) -> tuple[float, float]:
        if pass_ == "backward":
            found = found[0][self.images], found[1]
        elif pass_ != "wgrad":
            found = found[self.images]
        return worst_error(self.problem, pass_, found, self.expected(pass_))

    def _timed(self, pass_: str, run: Callable[[], object]) -> dict:
        floor = self.limits.floor_us(self.problem, pass_, self.target)
        return timing_fields(self.problem, pass_, self.timer(run), floor)


def _torch_call(problem: ConvProblem, pass_: str, x: Tensor, w: Tensor, dy: Tensor) -> Callable[[], Any]:
    """F.conv2d or its backward. Padding that is not symmetric is put there first, and is not part of the time."""
    top, bottom, left, right = problem.pad
    symmetric = (top, left) == (bottom, right)
    padding = (top, left) if symmetric else (0, 0)
    if not symmetric:
        x = F.pad(x, (left, right, top, bottom))
    args = (problem.stride, padding, problem.dilation)
    if pass_ == "fprop":
        return lambda: F.conv2d(x, w, None, *args, problem.groups)
    mask = [pass_ != "wgrad", pass_ != "dgrad", False]

    def backward() -> Any:
        dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, w, None, *args, False, (0, 0), problem.groups, mask)
        if dx is not None and not symmetric:
            dx = dx[:, :, top : top + problem.h_in, left : left + problem.w_in]
        return {"dgrad": dx, "wgrad": dw, "backward": (dx, dw)}[pass_]

    return backward


def _resources(compiled) -> dict:
    used = resources.of(compiled)
    return {
        "registers": used.registers,
        "spill_bytes": used.spill_bytes,
        "shared_bytes": used.shared_bytes,
        "matrix": f"{used.matrix} {used.matrix_count}" if used.matrix else "",
    }


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
