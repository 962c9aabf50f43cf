"""Random operands, float64 references and error bounds: what every check of a kernel's numbers starts from."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import ConvProblem, dense_strides

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16} | dict.fromkeys(
    ("fp32", "tf32", "bf16x3"), torch.float32
)
OPERANDS = {"fprop": ("x", "w", None), "dgrad": ("dy", "w"), "wgrad": ("dy", "x"), "backward": ("dy", "x", "w")}
IMAGES_AT_A_TIME = 8  # in float64
PassResult: TypeAlias = "Tensor | tuple[Tensor, Tensor]"  # y, dx or dw; of "backward" (dx, dw)


def dense_operand_strides(problem: ConvProblem) -> dict[str, tuple[int, ...]]:
    """The strides that `prepare` takes, of dense tensors in the problem's layouts; the weight is as x."""
    nhwc, out_nhwc = problem.layout == "nhwc", problem.out_layout == "nhwc"
    x, y, w = problem.x_shape, problem.y_shape, dense_strides(problem.w_shape, nhwc)
    return {
        "x": dense_strides(x, nhwc), "w": w, "y": dense_strides(y, out_nhwc), "dy": dense_strides(y, out_nhwc),
        "dx": dense_strides(x, out_nhwc), "dw": w,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operands:
    """Random tensors of a problem, dense in its layouts."""

    x: Tensor
    w: Tensor
    dy: Tensor

    def of(self, pass_: str) -> tuple[Tensor | None, ...]:
        """What a prepared pass takes."""
        return tuple(None if name is None else getattr(self, name) for name in OPERANDS[pass_])


def operands(problem: ConvProblem, device: str = "cpu", seed: int = 0) -> Operands:
    """Standard normal operands; "meta" ones are without values."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    strides = dense_operand_strides(problem)
    dtype = TORCH_DTYPES[problem.dtype]

    def normal(shape: tuple[int, ...], name: str) -> Tensor:
        tensor = torch.empty_strided(shape, strides[name], dtype=dtype, device=device)
        return tensor.normal_(generator=generator)

    return Operands(normal(problem.x_shape, "x"), normal(problem.w_shape, "w"), normal(problem.y_shape, "dy"))


def reference(problem: ConvProblem, operands: Operands, pass_: str, images: Sequence[int] | None = None) -> PassResult:
    """A pass in float64 by F.conv2d; (dx, dw) of "backward". y and dx: of `images` only; dw: of the whole batch."""
    if pass_ == "backward":
        return _reference(problem, operands, "dgrad", images), _reference(problem, operands, "wgrad", images)
    return _reference(problem, operands, pass_, images)


def _reference(problem: ConvProblem, operands: Operands, pass_: str, images: Sequence[int] | None) -> Tensor:
    top, bottom, left, right = problem.pad
    w = operands.w.double()

    def chunk(x: Tensor, dy: Tensor) -> Tensor:
        x = F.pad(x.double(), (left, right, top, bottom))
        args = (problem.stride, (0, 0), problem.dilation)
        if pass_ == "fprop":
            return F.conv2d(x, w, None, *args, problem.groups)
        mask = [pass_ == "dgrad", pass_ == "wgrad", False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy.double(), x, w, None, *args, False, (0, 0), problem.groups, mask
        )
        return dw if dx is None else dx[:, :, top : top + problem.h_in, left : left + problem.w_in]

    wanted = torch.arange(problem.batch) if images is None or pass_ == "wgrad" else torch.tensor(images)
    parts = (chunk(operands.x[some], operands.dy[some]) for some in wanted.split(IMAGES_AT_A_TIME))
    return functools.reduce(torch.add, parts) if pass_ == "wgrad" else torch.cat(list(parts))


def worst_error(problem: ConvProblem, pass_: str, result: PassResult, expected: PassResult) -> tuple[float, float]:
    """(relative error, its bound) of a pass; in "backward" of (dx, dw), the one that is nearer its bound or past it."""
    passes = ("dgrad", "wgrad") if pass_ == "backward" else (pass_,)
    results, references = (tensors if isinstance(tensors, tuple) else (tensors,) for tensors in (result, expected))
    checked = [
        (relative_error(tensor, reference), problem.error_bound(part))
        for part, tensor, reference in zip(passes, results, references, strict=True)
    ]
    return max(checked, key=lambda error: math.inf if math.isnan(error[0]) else error[0] / error[1])


def relative_error(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||; NaN where anything was left unwritten."""
    return ((result.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
