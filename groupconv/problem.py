"""ConvProblem: one grouped convolution, and every size derived from it, once."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property

PASSES = ("fprop", "dgrad", "wgrad")
FINISHED = "finished"  # fprop of a problem that `ends` in more than a sum: a kernel that takes more registers
PLANNED = (*PASSES, "backward")  # what has a plan of its own: the passes, and dgrad and wgrad by one kernel
LAYOUTS = ("nhwc", "nchw")
ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16x3": 4, "fp16": 2, "bf16": 2}


def output_size(size: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """Output pixels along one axis; `pad` counts both ends. Below 1 the convolution does not exist."""
    return (size + pad - dilation * (kernel - 1) - 1) // stride + 1


def suggests_channels_last(shape, strides) -> bool:
    """Whether ATen takes a 4-D tensor of this shape and these strides for channels_last (suggest_memory_format)."""
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2):
        if shape[d] == 0 or strides[d] < least:
            return False
        least = strides[d] * max(1, shape[d])
    # An N111 tensor fits both formats; ATen takes it for contiguous. A batch that only data will tell is not an empty
    # one to PyTorch's compilers.
    empty = isinstance(shape[0], int) and shape[0] == 0
    return not (empty or strides[0] < least or strides[1] == least)


def channels_innermost(shape, strides) -> bool:
    """Whether neighbouring channels are nearer in memory than neighbouring pixels: what kernels read as NHWC.

    An axis of one element has no neighbours, whatever its stride: [N, L, C] seen as [N, C, L, 1] is NHWC.
    """
    _, c, *sizes = shape
    if c == 1 or strides[1] == 0:
        return suggests_channels_last(shape, strides)
    apart = [stride for size, stride in zip(sizes, strides[2:], strict=True) if size > 1 and stride]
    return strides[1] < min(apart) if apart else suggests_channels_last(shape, strides)


def meaningful_strides(shape, strides) -> tuple[int, ...]:
    """The strides, but for axes of one element, whose own mean nothing, as if these were the outermost."""
    beyond = max([1, *(size * stride for size, stride in zip(shape, strides, strict=True) if size > 1)])
    return tuple(stride if size > 1 else beyond for size, stride in zip(shape, strides, strict=True))


def dense_strides(shape, channels_last: bool) -> tuple[int, int, int, int]:
    """Element strides of a dense NCHW tensor of `shape`, in memory order NHWC if `channels_last`."""
    c, h, w = (max(1, size) for size in shape[1:])
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def bucket(value: int) -> int:
    """The power of two nearest to `value` in log space: the granularity at which measurements are kept."""
    value = max(1, value)
    low = 1 << (value.bit_length() - 1)
    return low if value * value < low * low * 2 else low * 2


@dataclasses.dataclass(frozen=True)
class ConvProblem:
    """A grouped 2-D convolution. Sizes in pixels and channels; padding before and after each axis.

    dtype: "fp32" (IEEE arithmetic), "tf32" (fp32 data, TF32 arithmetic), "bf16x3" (fp32 data, three bf16 products for
    one), "fp16" or "bf16".
    layout: memory order of x, "nhwc" (channels_last) or "nchw". out_layout: that of y and dx.
    bias, residual, activation: what fprop adds to its sums, and what becomes of them (kernels/epilogue.py); `keeps`:
    what the activation is of is stored too.
    """

    batch: int
    c_in: int
    h_in: int
    w_in: int
    c_out: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "bf16"
    layout: str = "nhwc"
    out_layout: str = "nhwc"
    bias: bool = False
    activation: str | None = None
    residual: bool = False
    keeps: bool = False

    @cached_property
    def h_out(self) -> int:
        return output_size(self.h_in, self.kh, self.stride[0], self.pad[0] + self.pad[1], self.dilation[0])

    @cached_property
    def w_out(self) -> int:
        return output_size(self.w_in, self.kw, self.stride[1], self.pad[2] + self.pad[3], self.dilation[1])

    def __hash__(self) -> int:  # of a key that is looked up hundreds of times while a pass is planned
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    def __getstate__(self) -> dict:  # without what is cached: hashes of strings are another process's own
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @cached_property
    def cin_g(self) -> int:
        return self.c_in // self.groups

    @cached_property
    def cout_g(self) -> int:
        return self.c_out // self.groups

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.c_in, self.h_in, self.w_in

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.c_out, self.cin_g, self.kh, self.kw

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.c_out, self.h_out, self.w_out

    @cached_property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def out_pixels(self) -> int:
        return self.batch * self.h_out * self.w_out

    def gemm(self, pass_: str) -> tuple[int, int, int]:
        """(M, N, K) of one group's implicit GEMM: N is the channels of the group that the result's pixels or taps have.

        Strided dgrad: M is all of dx, K the mean taps of a pixel.
        """
        taps = self.kh * self.kw
        if pass_ == "fprop":
            return self.out_pixels, self.cout_g, taps * self.cin_g
        if pass_ == "dgrad":
            mean_taps = max(1, round(taps * self.h_out * self.w_out / max(1, self.h_in * self.w_in)))
            return self.batch * self.h_in * self.w_in, self.cin_g, mean_taps * self.cout_g
        return taps * self.cin_g, self.cout_g, self.out_pixels

    def flops(self, pass_: str) -> int:
        """Useful floating-point operations of a pass, a multiply-add as two; taps on the padding count.

        "backward", here and below, is dgrad and wgrad by one kernel.
        """
        once = 2 * self.out_pixels * self.c_out * self.cin_g * self.kh * self.kw
        return 2 * once if pass_ == "backward" else once

    def min_bytes(self, pass_: str) -> int:
        """The fewest bytes a pass moves: each operand read once, the result written once."""
        x = self.batch * self.c_in * self.h_in * self.w_in
        y = self.out_pixels * self.c_out
        if pass_ == "backward":  # reads x, dy and w, writes dx and dw
            return (2 * x + y + 2 * self.params) * self.element_bytes
        return (x + y + self.params) * self.element_bytes

    def ended_bytes(self, apart: bool) -> int:
        """The fewest bytes that fprop moves with the residual and the activation that follow it: by one kernel, or,
        apart, by one for each.
        """
        y = self.out_pixels * self.c_out * self.element_bytes
        if apart:
            return self.min_bytes("fprop") + y * (3 * self.residual + 2 * (self.activation is not None))
        return self.min_bytes("fprop") + y * (self.residual + self.keeps)

    def error_bound(self, pass_: str) -> float:
        """||error|| / ||result|| of one of PASSES, at most: fp32 by its reduction's length, others by rounding."""
        if self.dtype in ("tf32", "fp16", "bf16"):
            return {"tf32": 1e-3, "fp16": 5e-4, "bf16": 4e-3}[self.dtype]
        taps = self.kh * self.kw
        length = {"fprop": self.cin_g * taps, "dgrad": self.cout_g * taps, "wgrad": self.out_pixels}[pass_]
        return 2**-23 * math.sqrt(length) + (1e-5 if self.dtype == "bf16x3" else 0.0)

    @property
    def ends(self) -> bool:
        """Whether an activation or a residual follows the convolution."""
        return self.activation is not None or self.residual or self.keeps

    def kernel_of(self, pass_: str) -> str:
        """The pass, or FINISHED: what registers go by."""
        return FINISHED if pass_ == "fprop" and self.ends else pass_

    @cached_property
    def params(self) -> int:
        """Weights of the layer, without bias."""
        return self.c_out * self.cin_g * self.kh * self.kw

    def intensity(self, pass_: str) -> float:
        """Arithmetic intensity, FLOPs a byte, if every byte moves once."""
        return self.flops(pass_) / max(1, self.min_bytes(pass_))

    def config_key(self, pass_: str) -> dict:
        """The class of problems that share a measured configuration; fields as in autotune_configs/SCHEMA.md."""
        return {
            "pass": pass_,
            "dtype": self.dtype,
            "layout": self.layout,
            "cin_g": self.cin_g,
            "cout_g": self.cout_g,
            "k": [self.kh, self.kw],
            "stride": list(self.stride),
            "dilation": list(self.dilation),
            "groups_bucket": bucket(self.groups),
            "m_bucket": bucket(self.out_pixels),
            "map_bucket": bucket(self.h_out * self.w_out),
        }

    def __str__(self) -> str:
        """`n2-g8-c4x6-h7x7-k3x3-s2x2-p1x1-d1x1-bf16-nhwc`: batch, groups, group widths, map, kernel, ..."""
        top, bottom, left, right = self.pad
        pad = f"{top}x{left}" if (top, left) == (bottom, right) else f"{top}:{bottom}x{left}:{right}"
        return (
            f"n{self.batch}-g{self.groups}-c{self.cin_g}x{self.cout_g}-h{self.h_in}x{self.w_in}"
            f"-k{self.kh}x{self.kw}-s{self.stride[0]}x{self.stride[1]}-p{pad}"
            f"-d{self.dilation[0]}x{self.dilation[1]}-{self.dtype}-{self.layout}"
        )
