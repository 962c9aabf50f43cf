"""Named problems, and what the numeric tests share: operands in every layout, the reference, guarded memory, bounds."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import importlib.resources
import itertools
import math
import random

import torch
import torch.nn.functional as F
import triton
from torch import nn
from torch._prims_common import suggest_memory_format

from groupconv import launcher, prepared, triton_conv
from groupconv.algorithms import REGISTRY, calls, candidates, divided, interpretable, lack, row_march, tiling
from groupconv.common.numerics import TORCH_DTYPES
from groupconv.kernels import implicit_gemm as general_kernels
from groupconv.problem import PASSES, ConvProblem

INTERPRETED = launcher.interpreting(general_kernels.fprop_kernel)
# The algorithms whose kernels run here.
RUNNING = [name for name in REGISTRY if interpretable(name) or not INTERPRETED]
MODES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RESULTS = {"fprop": "y", "dgrad": "dx", "wgrad": "dw"}
PRODUCES = {"backward": ("dgrad", "wgrad")}  # the passes that a pass does, where it is not its own
GUARD = 256  # elements
MANY = 6  # programs
SENTINEL = 768.0  # exact in every type


def set_precision(value: str) -> None:
    """torch's setting for fp32 convolutions, "ieee" or "tf32". cuDNN's two settings must agree for older readers."""
    torch.backends.cudnn.conv.fp32_precision = value
    torch.backends.cudnn.rnn.fp32_precision = value


def terms(problem: ConvProblem, pass_: str) -> int:
    """The length of a pass's reduction."""
    taps = problem.kh * problem.kw
    return {"fprop": problem.cin_g * taps, "dgrad": problem.cout_g * taps, "wgrad": problem.out_pixels}[pass_]


def bound(dtype: str, length: int) -> float:
    """The most that ||out - ref|| / ||ref|| may be. The interpreter computes TF32 products in fp32."""
    if dtype == "tf32" and not INTERPRETED:
        return 1e-3
    exact = 2**-23 * math.sqrt(length)
    return {"fp16": 5e-4, "bf16": 4e-3, "bf16x3": 1e-5 + exact}.get(dtype, exact)


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref||, and ||out|| where ref is zero."""
    assert out.shape == ref.shape
    norm = ref.norm().item()
    return (out.double().to(ref.device) - ref).norm().item() / (norm or 1.0)


def reference(x, w, bias, stride=1, pad=(0, 0, 0, 0), dilation=1, groups=1, dy=None):
    """y of the same operands in float64, and (dx, dw) if there is a dy."""
    x, w = (t.detach().double().contiguous().requires_grad_(dy is not None) for t in (x, w))
    bias = None if bias is None else bias.detach().double()
    top, bottom, left, right = pad
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), w, bias, stride, 0, dilation, groups)
    return y if dy is None else (y.detach(), *torch.autograd.grad(y, (x, w), dy.double()))


# --- Layouts: the same values, lying differently ---------------------------------------------------------------------

VIEWS = ("nchw", "nhwc", "slice", "nhwc-slice", "permuted", "turned", "batches")


def lay_out(values: torch.Tensor, view: str) -> torch.Tensor:
    """A tensor equal to `values`. Whatever of its storage is no part of it holds NaN."""
    n, c, h, w = values.shape

    def inside(*shape):
        return values.new_full(shape, math.nan)

    if view == "nchw":
        return values.contiguous()
    if view == "nhwc":
        return values.contiguous(memory_format=torch.channels_last)
    found = {
        "slice": lambda: inside(n, c + 5, h, w)[:, 3 : 3 + c],
        "nhwc-slice": lambda: inside(n, h, w, c + 5).permute(0, 3, 1, 2)[:, 2 : 2 + c],
        "nhwc-padded": lambda: inside(n, h, w, c + 16).permute(0, 3, 1, 2)[:, 8 : 8 + c],  # as aligned as nhwc
        "permuted": lambda: inside(n, h, w, c).permute(0, 3, 1, 2),
        "turned": lambda: inside(n, c, w, h).transpose(2, 3),
        "batches": lambda: inside(2 * n, c, h + 1, w + 2)[::2, :, 1:, 1:-1],
        "rows+1": lambda: inside(n, c, h, w + 1)[..., :w],
        "rows+2": lambda: inside(n, c, h, w + 2)[..., :w],
        "rows+8": lambda: inside(n, c, h, w + 8)[..., :w],
    }[view]()
    return found.copy_(values)


def is_channels_last(t: torch.Tensor) -> bool:
    return suggest_memory_format(t) == torch.channels_last


def format_strides(shape, *sources: torch.Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor as F.conv2d returns it: channels_last if any source is."""
    nhwc = any(map(is_channels_last, sources))
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(shape, device="meta", memory_format=memory_format).stride()


def runs_of_columns(launch) -> dict[str, int]:
    """By argument of the kernel, how many neighbouring columns a launch takes at once."""
    scalars = dict(zip(launch.kernel.arg_names[-len(launch.scalars) :], launch.scalars, strict=True))
    return {name.removesuffix("_RUN"): value for name, value in scalars.items() if name.endswith("RUN")}


# --- Guarded memory --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def guarded():
    """Everything that the library allocates lies, full of NaN, between guards that must be untouched in the end."""
    allocate, buffers = launcher.allocate, []

    def guarded_allocate(shape, strides, like, dtype=None):
        assert like.dtype.is_floating_point
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype or like.dtype, device=like.device)
        buffer[GUARD : GUARD + size] = math.nan
        buffers.append(buffer)
        return buffer.as_strided(shape, strides, GUARD)

    launcher.allocate = guarded_allocate
    try:
        yield buffers
    finally:
        launcher.allocate = allocate
    for buffer in buffers:
        assert (buffer[:GUARD] == SENTINEL).all(), "written before the start of an output"
        assert (buffer[-GUARD:] == SENTINEL).all(), "written past the end of an output"


# --- Named cases -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem with the layouts of its operands. tiles: "few" large ones, or "many" small ones."""

    problem: ConvProblem
    x: str = "nhwc"
    w: str = "nchw"
    dy: str = "nhwc"
    tiles: str = "few"

    def __str__(self) -> str:
        extras = "-bias" if self.problem.bias else ""
        extras += f"-x_{self.x}-w_{self.w}-dy_{self.dy}"
        return f"{self.problem}{extras}" + ("-tiles" if self.tiles == "many" else "")


@dataclasses.dataclass(frozen=True)
class Operands:
    x: torch.Tensor
    w: torch.Tensor
    bias: torch.Tensor | None
    dy: torch.Tensor

    def of(self, pass_: str) -> tuple:
        return {
            "fprop": (self.x, self.w, self.bias), "dgrad": (self.dy, self.w), "wgrad": (self.dy, self.x),
            "backward": (self.dy, self.x, self.w),
        }[pass_]  # fmt: skip

    def strides(self, problem: ConvProblem) -> dict:
        """Strides by name, those of results as F.conv2d lays them out."""
        return {
            "x": self.x.stride(),
            "w": self.w.stride(),
            "y": format_strides(problem.y_shape, self.x, self.w),
            "dy": self.dy.stride(),
            "dx": format_strides(problem.x_shape, self.x, self.w),
            "dw": format_strides(problem.w_shape, self.w),
        }


def operands(case: Case, device: str = "cpu", seed: int = 0) -> Operands:
    """Random operands of a case; the same on every device."""
    p, dtype = case.problem, TORCH_DTYPES[case.problem.dtype]
    generator = torch.Generator().manual_seed(seed)

    def random(shape, view):
        values = torch.randn(shape, generator=generator).to(device, dtype)
        if view == "expanded":  # one number everywhere, as y.sum().backward() gives it
            return values.flatten()[0].expand(shape)
        return lay_out(values, view)

    bias = torch.randn(p.c_out, generator=generator).to(device, dtype) if p.bias else None
    return Operands(random(p.x_shape, case.x), random(p.w_shape, case.w), bias, random(p.y_shape, case.dy))


@functools.cache  # a cover asks some 100,000 times, of few shapes
def _lies_channels_last(shape: tuple[int, ...], view: str) -> bool:
    return is_channels_last(lay_out(torch.empty(shape, device="meta"), view))


def actual(case: Case) -> ConvProblem:
    """The case's problem with the layouts that PyTorch sees in its operands."""
    nhwc = _lies_channels_last(case.problem.x_shape, case.x)
    out_nhwc = nhwc or _lies_channels_last(case.problem.w_shape, case.w)
    layouts = {"layout": "nhwc" if nhwc else "nchw", "out_layout": "nhwc" if out_nhwc else "nchw"}
    return dataclasses.replace(case.problem, **layouts)


def references(problem: ConvProblem, given: Operands) -> dict[str, torch.Tensor]:
    args = problem.stride, problem.pad, problem.dilation, problem.groups
    return dict(zip(PASSES, reference(given.x, given.w, given.bias, *args, given.dy), strict=True))


def target(device: str):
    return prepared.target_of(torch.device(device))


def machine(device: str, tiles: str):
    """The target to prepare for. The interpreter's is small, so that the host cuts little work into few programs."""
    on = target(device)
    return dataclasses.replace(on, multiprocessors=1 if tiles == "few" else 4) if INTERPRETED else on


def config(algorithm, problem: ConvProblem, pass_: str, on, tiles: str) -> dict:
    """A configuration of few or of many tiles. The interpreter's time goes by tiles, whatever their size.

    In the interpreter many tiles are divided in two or three where the problem has as many: by itself no small problem
    would be, and the last part is to be ragged.
    """
    found = divided(algorithm.NAME, problem, pass_, _tiles(algorithm, problem, pass_, on, tiles), on)[0]
    if INTERPRETED and tiles == "many":
        found |= {field: 3 if len(bounds) == 3 else 2 for field, bounds in algorithm.DIVISION.items()}
    return found


def _extent(size: int, tiles: str) -> int:
    """A tile's extent along an axis of a product: of few tiles all that fits, of many about half."""
    whole = max(16, min(512, triton.next_power_of_2(size)))
    if tiles == "few":
        return min(256, whole)
    return max(16, whole // 2) if INTERPRETED else 16


def _columns(size: int, tiles: str) -> int:
    """As above, of columns, whose few tiles have one, two or more parts."""
    return min(256, max(16, -(-size // 8) * 8)) if tiles == "few" else _extent(size, tiles)


def _tiles(algorithm, problem: ConvProblem, pass_: str, on, tiles: str) -> dict:
    if algorithm.NAME == "implicit_gemm" and (INTERPRETED or tiles == "many"):
        m, n, k = problem.gemm(pass_)
        blocks = (_extent(m, tiles), _columns(n, tiles), _extent(k, tiles))
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        return dict(zip(names, blocks, strict=True)) | {"num_warps": 4, "num_stages": 2}

    if algorithm.NAME == "row_block" and (INTERPRETED or tiles == "many"):
        m, n, k = algorithm.axes(problem, pass_)
        step = problem.stride[0] if pass_ == "dgrad" else 1
        high = step * max(1, min(4, problem.h_out) // step) if tiles == "few" else 2 * step
        blocks = (high, _extent(m, tiles), _columns(n, tiles), _extent(round(k), tiles), 0)
        return dict(zip(algorithm.BLOCKS, blocks, strict=True)) | {"num_warps": 4, "num_stages": 2}

    if algorithm.NAME == "row_block_tma" and (INTERPRETED or tiles == "many"):
        step = problem.stride[0] if pass_ == "dgrad" else 1
        one_row = tiles == "many" and pass_ != "wgrad" and step == 1
        high = step * max(1, min(4, problem.h_out) // step) if tiles == "few" else 2 * step
        # Lanes of images, of columns, or of both.
        odd = pass_ != "dgrad" and problem.w_in % problem.stride[1]
        images = 16 if odd or not INTERPRETED else (1, 16)[problem.h_in % 2]
        columns = 1 if odd or (tiles == "many" and not INTERPRETED) else triton.next_power_of_2(problem.w_in)
        lanes = max(16, images * (columns if tiles == "few" else max(1, columns // 2)))
        channels = _extent(max(problem.cin_g, problem.cout_g), tiles)
        blocks = (high, 1 if one_row else problem.kh, lanes, images, channels, channels)
        if pass_ == "wgrad":  # whose lanes are its K
            blocks = (*blocks[:2], channels, images, channels, lanes)
        return dict(zip(algorithm.BLOCKS, blocks, strict=True)) | {"num_warps": 4, "num_stages": 2}

    if algorithm.NAME == "depthwise_direct" and INTERPRETED:
        width, ahead = (1, 2, 4)[(problem.h_in + problem.groups) % 3], (problem.w_in + problem.kw) % 3
        lanes = problem.batch * math.ceil(max(problem.w_in, problem.w_out) / width)
        channels = triton.next_power_of_2(max(problem.c_in, problem.c_out)) // (1 if tiles == "few" else 2)
        blocks = {
            "BLOCK_P": _extent(lanes, tiles), "BLOCK_C": max(1, channels), "BLOCK_W": width, "BLOCK_A": ahead,
        }  # fmt: skip
        return blocks | {"num_warps": 4, "num_stages": 1}

    if algorithm.NAME == "row_march" and INTERPRETED and tiles == "few":
        in_runs = row_march._longest_run(problem, pass_) > 1
        alone = in_runs or problem.dilation[1] > 1
        abreast = 1 if alone else (1, 1, 2, 4)[(problem.h_out + problem.kh) % 4]
        lanes = problem.batch * problem.dilation[0] * math.ceil(max(problem.w_in, problem.w_out) / abreast)
        lanes = min(256, max(16, triton.next_power_of_2(lanes)))
        beside = 1 if pass_ == "wgrad" else (1, 2, 4, 8)[(problem.h_in + problem.groups) % 4]
        ahead = (problem.w_in + problem.kw) % 3
        return {
            "BLOCK_P": lanes, "BLOCK_C": 64, "BLOCK_S": 1 if abreast > 1 or (in_runs and pass_ == "fprop") else 4,
            "BLOCK_R": beside, "BLOCK_A": ahead, "BLOCK_L": 0, "BLOCK_W": abreast,
            "num_warps": 4, "num_stages": 1 if ahead else 2,
        }  # fmt: skip

    def programs(candidate):
        config = divided(algorithm.NAME, problem, pass_, candidate, on)[0]
        return tiling(algorithm.NAME, problem, pass_, config, on).programs

    found = sorted(candidates(algorithm.NAME, problem, pass_, on), key=programs)
    tile = found[0] if tiles == "few" else next((c for c in found if programs(c) >= MANY), found[-1])
    if algorithm.NAME == "depthwise_toeplitz" and pass_ != "wgrad" and INTERPRETED:
        tile |= {"BLOCK_A": (problem.w_in + problem.kw) % 3}
    return tile


@contextlib.contextmanager
def wide_reduction(tiles: str):
    """Split-K sums in a few large programs where the interpreter runs them, unless many tiles are wanted."""
    tile = calls.SUM_TILE
    if INTERPRETED and tiles == "few":
        calls.SUM_TILE = 2**16
    try:
        yield
    finally:
        calls.SUM_TILE = tile


def run(case: Case, pass_: str, name: str, device: str) -> tuple[dict[str, torch.Tensor], Operands, ConvProblem]:
    """One pass by an algorithm's own entry, its results guarded: (results by pass, operands, problem)."""
    given = operands(case, device)
    problem, on, algorithm = actual(case), machine(device, case.tiles), REGISTRY[name]
    strides = given.strides(problem)
    with guarded(), wide_reduction(case.tiles):
        prepared = algorithm.prepare(problem, pass_, config(algorithm, problem, pass_, on, case.tiles), on, strides)
        out = prepared(*given.of(pass_))
    produced = PRODUCES.get(pass_, (pass_,))
    found = dict(zip(produced, out if isinstance(out, tuple) else (out,), strict=True))
    for each, result in found.items():
        assert result.stride() == strides[RESULTS[each]]
        assert result.dtype == MODES[problem.dtype]
    return found, given, problem


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _problem(cin_g, cout_g, kernel, hw, groups, batch, stride, pad, dilation, dtype, layout, bias) -> ConvProblem:
    pad = _pair(pad)
    return ConvProblem(
        batch, cin_g * groups, *_pair(hw), cout_g * groups, *_pair(kernel), _pair(stride),
        pad if len(pad) == 4 else (pad[0], pad[0], pad[1], pad[1]), _pair(dilation), groups,
        dtype, layout, layout, bias,
    )  # fmt: skip


def _suite() -> list[Case]:
    """The layers of perf_reports/suite.csv with small maps, batches and group counts."""
    text = importlib.resources.files("groupconv.perf_reports").joinpath("suite.csv").read_text(encoding="utf-8")
    found = []
    for i, row in enumerate(csv.DictReader(text.splitlines())):
        row = {k: int(v) if v.isdigit() else v for k, v in row.items()}
        groups, kernel = row["groups"], (row["KH"], row["KW"])
        stride, pad = (row["stride_h"], row["stride_w"]), (row["pad_h"], row["pad_w"])
        cin_g, cout_g = row["C_in"] // groups, row["C_out"] // groups
        hw = (5 + row["H"] % 5, 5 + row["W"] % 4)
        layout = ("nhwc", "nchw")[(i + i // 4) % 2]
        problem = _problem(
            cin_g, cout_g, kernel, hw, min(groups, 3 if cin_g < 64 else 2), 1 + i % 2,
            stride, pad, (row["dil_h"], row["dil_w"]), list(MODES)[i % 4], layout, i % 3 == 0,
        )  # fmt: skip
        found.append(Case(problem, layout, ("nchw", "nhwc")[i // 2 % 2], layout))
    return found


# (cin_g, cout_g, kernel), then what differs from groups=2, batch=2, hw=(7, 6), stride=1, pad=1, dilation=1.
_ARGUMENTS = [
    # Group widths.
    (8, 16, 3, {}), (10, 40, 3, {}), (12, 45, 3, {}), (160, 40, 3, {}), (3, 3, 3, {"groups": 5}),
    (6, 6, 3, {"groups": 3}), (8, 8, 3, {"groups": 45, "batch": 1, "hw": 5}), (5, 7, 3, {}), (7, 13, 3, {}),
    (13, 29, 3, {}), (29, 5, 3, {}), (7, 7, 5, {"pad": 2}), (3, 32, 7, {"groups": 1, "stride": 2, "pad": 3, "hw": 9}),
    (1, 1, 3, {"groups": 7}), (1, 2, 3, {"groups": 4}), (1, 3, 3, {"groups": 3}), (2, 1, 3, {"groups": 3}),
    # Wide groups that are no power of two, at every stride.
    (328, 328, 3, {"stride": 2, "batch": 1, "hw": 5}), (112, 232, 3, {"stride": 2, "hw": 5}),
    (56, 72, 3, {"stride": 4, "hw": (9, 8)}), (264, 168, 1, {"pad": 0, "batch": 1}),
    (48, 120, 1, {"stride": 2, "pad": 0}),
    # Strides.
    (4, 4, 3, {"stride": 2}), (4, 6, 3, {"stride": 3}), (6, 4, 3, {"stride": 4, "hw": (11, 9)}),
    (4, 8, 3, {"stride": (2, 1)}), (4, 4, 3, {"stride": (1, 3)}), (8, 4, 1, {"stride": 2, "pad": 0}),
    (4, 4, 2, {"stride": 3, "pad": 0}), (1, 1, 5, {"stride": (3, 2), "pad": 2, "groups": 3}),
    # Dilations, and strides that share a factor with them.
    (4, 4, 3, {"dilation": 2, "pad": 2}), (4, 4, 3, {"dilation": (1, 3), "pad": (0, 3), "hw": 8}),
    (4, 4, 3, {"stride": 2, "dilation": 2, "pad": 1}), (4, 6, 3, {"stride": 4, "dilation": 2, "pad": 3, "hw": (10, 9)}),
    (4, 4, 3, {"stride": 2, "dilation": 4, "pad": 4, "hw": 8}), (6, 4, 3, {"stride": 3, "dilation": 2, "pad": 2}),
    (4, 4, (3, 2), {"stride": (2, 3), "dilation": (4, 2), "pad": (3, 1), "hw": 8}),
    (1, 1, 3, {"stride": (6, 2), "dilation": (4, 2), "pad": 5, "hw": (9, 8)}),
    # Kernels.
    (4, 4, 2, {"pad": 0}), (4, 4, 4, {"pad": 2}), (4, 4, (2, 4), {}), (8, 8, 1, {"pad": 0}),
    (4, 4, (1, 5), {"pad": (0, 2)}), (4, 4, (5, 1), {"pad": (2, 0)}),
    (1, 1, (1, 11), {"pad": (0, 5), "groups": 3}), (1, 1, (11, 1), {"pad": (5, 0)}),
    (4, 4, 7, {"pad": 3, "hw": 3}), (1, 1, 9, {"pad": 4, "hw": 7, "groups": 3}), (4, 4, 5, {"pad": 2, "hw": 2}),
    # Padding: one side only, both by different amounts, more than the kernel.
    (4, 4, 2, {"pad": (0, 1, 0, 1)}), (4, 4, 4, {"pad": (1, 2, 1, 2)}), (4, 4, 3, {"pad": (2, 0, 0, 3), "stride": 2}),
    (4, 4, (3, 4), {"pad": (2, 2, 3, 3), "dilation": (2, 2)}), (4, 4, 1, {"pad": 3}), (4, 4, 3, {"pad": (5, 2)}),
    # Maps.
    (16, 16, 3, {"hw": 7}), (8, 8, 3, {"hw": 7, "stride": 2}), (4, 4, 3, {"hw": 1}), (4, 4, 3, {"hw": (1, 9)}),
    (4, 4, 3, {"hw": (9, 1)}), (4, 4, 3, {"hw": 3, "pad": 0}), (4, 4, 3, {"hw": (8, 9), "stride": 3, "pad": 0}),
    (4, 4, 3, {"batch": 1}), (4, 4, 3, {"batch": 3, "groups": 1}),
]  # fmt: skip

_MANY_TILES = [
    (20, 36, 3, {"groups": 1, "batch": 1, "hw": 6}), (5, 7, 3, {"batch": 3}),
    (4, 4, (3, 2), {"stride": 2, "dilation": (2, 1), "hw": (9, 11)}),
    (32, 32, 1, {"pad": 0}), (1, 1, 3, {"groups": 2, "batch": 4, "hw": 12}), (16, 33, 3, {"groups": 1, "hw": 5}),
    (2, 2, 2, {"batch": 4, "hw": (16, 13), "pad": (0, 1, 0, 1)}), (48, 16, (1, 3), {"pad": (0, 1), "stride": (1, 2)}),
]  # fmt: skip


def _named(arguments, tiles: str, first: int) -> list[Case]:
    """Cases of a list, each value of the other axes in turn."""
    found = []
    for i, (cin_g, cout_g, kernel, given) in enumerate(arguments, first):
        values = {"groups": 2, "batch": 2, "hw": (7, 6), "stride": 1, "pad": 1, "dilation": 1} | given
        layout = ("nhwc", "nchw")[(i + i // 4) % 2]
        dtype, bias = list(MODES)[i % 4], i % 5 < 2
        problem = _problem(cin_g, cout_g, kernel, dtype=dtype, layout=layout, bias=bias, **values)
        # Most gradients come in y's layout; some do not.
        found.append(Case(problem, layout, ("nhwc", "nchw")[i // 3 % 2], VIEWS[i % 2] if i % 3 else layout, tiles))
    return found


def _views() -> list[Case]:
    """Every layout of x, of dy and of w, in every type, on a problem that treats both axes differently."""
    found = []
    for i, view in enumerate(VIEWS):
        for j, dtype in enumerate(MODES):
            if (i + j) % 2 == 0 or dtype == "bf16":
                layout = ("nhwc", "nchw")[j % 2]
                problem = _problem(6, 4, (3, 2), (6, 8), 3, 2, (2, 1), (1, 0), (1, 2), dtype, layout, bool(i % 2))
                dy = (*VIEWS, "expanded")[(i + 3 * j) % 8]
                found.append(Case(problem, view, VIEWS[(2 * i + j) % 7], dy, "few" if i % 3 else "many"))
    problem = _problem(4, 4, 3, 6, 2, 2, 1, 1, 1, "fp32", "nchw", False)
    found += [Case(problem, "nchw", "nchw", "expanded"), Case(problem, "nhwc", "nhwc", "expanded")]
    return found


# Depthwise: kernel and what differs from groups=9 (channels), batch=2, hw=(9, 10), stride=1, pad=k//2, dilation=1.
_DEPTHWISE = [
    # Every kernel size, odd channel counts, maps wider than a tile and narrower than the kernel.
    (1, {}), (2, {"pad": 0, "hw": 15}), (3, {"groups": 57, "hw": 7}), (3, {"groups": 36, "hw": (5, 70), "batch": 1}),
    (5, {"groups": 18}), (5, {"hw": (7, 40)}), (7, {"groups": 12}), (7, {"hw": (6, 35), "groups": 8}), (9, {"hw": 14}),
    (11, {"hw": 13}), (13, {"hw": (14, 7), "groups": 3}), (17, {"hw": 7, "groups": 3}), (27, {"hw": 14, "groups": 2}),
    (31, {"hw": (9, 33), "groups": 2, "batch": 1}), (31, {"hw": 18, "groups": 8, "batch": 1}),
    ((1, 11), {"hw": (5, 21), "groups": 12}), ((11, 1), {"hw": (21, 5), "groups": 12}), ((7, 4), {"pad": 2}),
    ((1, 21), {"groups": 3, "hw": (4, 24)}), ((51, 5), {"groups": 2, "hw": (14, 13)}), ((5, 7), {}), (6, {}),
    (4, {"groups": 16}),
    # Strides.
    (3, {"stride": 2, "groups": 90}), (3, {"stride": 4, "hw": 13}), (3, {"stride": 2, "pad": 0, "hw": (13, 17)}),
    (5, {"stride": 2}), (5, {"stride": 2, "hw": (9, 40), "groups": 8}), (7, {"stride": 2, "hw": (12, 38)}),
    (11, {"stride": 2, "hw": 14, "groups": 3}), (7, {"stride": (1, 2)}), (7, {"stride": (2, 1), "hw": (9, 36)}),
    (5, {"stride": (3, 2)}), (9, {"stride": 4, "hw": 20, "groups": 3}), (1, {"stride": 2}),
    (2, {"stride": 2, "pad": 0}),
    # Dilations, and strides with them.
    (3, {"dilation": 2}), (3, {"dilation": 4, "hw": 12}), (5, {"dilation": 2, "hw": (11, 37), "groups": 8}),
    (7, {"dilation": 3, "hw": 14}), (3, {"dilation": (1, 3), "hw": 14}), (5, {"dilation": (2, 1), "hw": 14}),
    (3, {"dilation": 2, "stride": 2}), (5, {"dilation": 3, "stride": 2, "hw": 16}), (3, {"dilation": 3, "stride": 2}),
    # Channel multipliers.
    (3, {"multiplier": 2, "groups": 8}), (7, {"multiplier": 2, "stride": 2, "groups": 8}), (5, {"multiplier": 3}),
    (7, {"multiplier": 4, "hw": (6, 34), "groups": 4}), (9, {"multiplier": 2, "groups": 4, "hw": 8}),
    # Padding: none, one-sided, more than the kernel, between the phases of a stride.
    (5, {"pad": 0, "hw": 12}), (3, {"pad": (0, 1, 0, 1), "stride": 2}), (7, {"pad": (3, 0, 1, 4)}), (3, {"pad": 5}),
    (5, {"pad": (1, 4), "stride": 2}), (7, {"pad": 9, "hw": 6}), (5, {"pad": (0, 3, 4, 0), "hw": (8, 33)}),
    # Batches: one image, and more than a tile of them.
    (3, {"batch": 1, "groups": 8, "hw": 16}), (5, {"batch": 1, "hw": 16}), (7, {"batch": 40, "groups": 1, "hw": 7}),
    (5, {"batch": 19, "groups": 8, "hw": 5}),
]  # fmt: skip


def _depthwise() -> list[Case]:
    found = []
    for i, (kernel, given) in enumerate(_DEPTHWISE):
        kh, kw = _pair(kernel)
        dilation = _pair(given.get("dilation", 1))
        pad = (kh // 2 * dilation[0], kw // 2 * dilation[1])
        values = {"groups": 9, "batch": 2, "hw": (9, 10), "stride": 1, "pad": pad, "dilation": 1} | given
        multiplier = values.pop("multiplier", 1)
        for j, layout in enumerate(("nhwc", "nchw")):
            dtype = list(MODES)[(i + 2 * j + i // 4) % 4]
            problem = _problem(1, multiplier, kernel, dtype=dtype, layout=layout, bias=(i + j) % 3 == 0, **values)
            # Gradients and inputs in other layouts, and tiles by the dozen, in turn.
            x = layout if i % 4 else VIEWS[(i // 4 + j) % 7]
            dy = layout if i % 3 else VIEWS[(i // 3 + 3 * j) % 7]
            found.append(Case(problem, x, ("nchw", "nhwc")[(i + j) % 2], dy, "many" if (i + j) % 5 == 0 else "few"))
    return found


# What tensor descriptors can serve: (cin_g, cout_g, kernel) and what differs, as above; channels_last, 16-bit types.
_DESCRIPTORS = [
    # Strides: an even number of columns is seen by phases, an odd one column by column.
    (16, 16, 3, {"stride": 2, "hw": (8, 10)}), (24, 40, 3, {"stride": 2, "hw": (9, 7)}),
    (8, 16, 3, {"stride": (1, 2)}), (16, 24, 3, {"stride": (2, 1)}),
    (8, 8, 5, {"stride": 4, "pad": 2, "hw": (9, 8)}), (8, 8, 3, {"stride": 3, "hw": 9}),
    # Dilations, kernels, padding.
    (16, 8, 3, {"dilation": 2, "pad": 2, "hw": 8}), (8, 24, (3, 2), {"dilation": (1, 3), "pad": (1, 3), "hw": 8}),
    (8, 8, 3, {"stride": 2, "dilation": 2, "hw": 8}), (16, 16, 1, {"pad": 0}), (24, 8, (1, 5), {"pad": (0, 2)}),
    (8, 16, (5, 1), {"pad": (2, 0)}), (8, 8, 4, {"pad": (1, 2, 1, 2)}), (16, 16, 3, {"pad": (2, 0, 0, 3)}),
    (8, 8, 3, {"pad": 5, "hw": 4}), (8, 8, 2, {"stride": 2, "pad": 0}), (40, 112, 3, {"groups": 1, "hw": (7, 5)}),
]  # fmt: skip
_DESCRIPTORS_MANY_TILES = [
    (8, 24, 3, {"hw": (3, 4)}), (8, 8, 3, {"stride": 2, "hw": 6}), (24, 8, (3, 2), {"dilation": (2, 1), "hw": 4}),
    (40, 8, 1, {"pad": 0, "hw": 4}), (8, 8, 3, {"batch": 17, "hw": 3}), (8, 16, 3, {"batch": 1, "hw": (3, 21)}),
]  # fmt: skip


def _descriptors() -> list[Case]:
    """Operands lie as a descriptor sees them, or have to be copied first."""
    found = []
    for i, case in enumerate(_named(_DESCRIPTORS, "few", 0) + _named(_DESCRIPTORS_MANY_TILES, "many", 0)):
        layouts = {"dtype": ("fp16", "bf16")[i % 2], "layout": "nhwc", "out_layout": "nhwc", "bias": i % 3 == 0}
        x, w = ("nhwc-slice" if i % 7 == 1 else "nhwc"), ("nhwc", "nchw")[i % 5 == 2]
        dy = ("nchw", "expanded")[i // 6 % 2] if i % 6 == 4 else "nhwc"
        problem = dataclasses.replace(case.problem, **layouts)
        found.append(dataclasses.replace(case, problem=problem, x=x, w=w, dy=dy))
    return found


# Two of the suite's layers are one layer when their maps shrink.
CASES = list(dict.fromkeys(_suite() + _named(_ARGUMENTS, "few", 0) + _named(_MANY_TILES, "many", 1) + _views()))
DEPTHWISE = dict.fromkeys(case for case in _depthwise() if case not in CASES)
DESCRIPTORS = dict.fromkeys(case for case in _descriptors() if case not in CASES)


def runs(on, cases=(*CASES, *DEPTHWISE, *DESCRIPTORS)) -> list[tuple[Case, str, str]]:
    """(case, pass, algorithm) for every algorithm that can serve it on a target; by default of all named cases.

    The cases for depthwise algorithms are not run by the general one, which has its own, nor are those for descriptors
    by any without. Those that have both gradients by one kernel run half of the cases so, and dgrad and wgrad, by the
    same code, in the rest.
    """
    return _runs(on, tuple(cases))


@functools.cache
def _runs(on, cases: tuple[Case, ...]) -> list[tuple[Case, str, str]]:
    found = []
    for i, case in enumerate(cases):
        problem = actual(case)
        for name in RUNNING:
            if (name == "implicit_gemm" and case in DEPTHWISE) or (name != "row_block_tma" and case in DESCRIPTORS):
                continue
            able = [pass_ for pass_ in (*PASSES, *PRODUCES) if lack(name, problem, pass_, on) is None]
            if name.startswith("depthwise") and "backward" in able:
                left_out = ("dgrad", "wgrad") if i // 2 % 2 else ("backward",)  # layouts alternate
                able = [pass_ for pass_ in able if pass_ not in left_out]
            found += [(case, pass_, name) for pass_ in able]
    return found


# --- A cover: every pair of values meets in some run of every algorithm ----------------------------------------------

# What a run chooses. map: (groups, batch, (rows, columns)). pad: "same" keeps the map's size at stride 1; "lopsided"
# pads the top and the right alone, "beyond" by more than the kernel's reach.
AXES = {
    "width": (
        (1, 1), (1, 3), (3, 1), (4, 4), (5, 7), (8, 8), (8, 24), (13, 29), (24, 16), (40, 112),
    ),
    "kernel": (1, 2, 3, (3, 2), (1, 5), (4, 1), (7, 3), 9),
    "stride": (1, 2, (2, 1), (1, 3), 4),
    "dilation": (1, 2, (1, 3)),
    "pad": ("none", "same", "lopsided", "beyond"),
    "map": ((2, 2, (7, 6)), (3, 1, (9, 5)), (1, 3, (4, 11)), (1, 17, (3, 4)), (9, 2, (8, 7)), (2, 1, (4, 21))),
    "dtype": tuple(MODES),
    "x": ("nchw", "nhwc", "slice", "nhwc-slice", "turned", "batches"),
    "w": ("nchw", "nhwc", "slice", "nhwc-slice", "turned"),
    "dy": ("nchw", "nhwc", "nhwc-slice", "turned", "batches", "expanded"),
    "tiles": ("few", "many"),
    "bias": (False, True),
    "pass_": (*PASSES, *PRODUCES),
}  # fmt: skip
UNREAD = {"fprop": {"dy"}, "dgrad": {"x", "bias"}, "wgrad": {"w", "bias"}, "backward": {"bias"}}
FIRST = 20000  # draws, of which the first that are served show the way
DRAWS = 60  # of the other values, before a pair counts as one that no problem of an algorithm's has


def chosen(choice: dict) -> Case:
    """The case of a choice of values. Wide groups are few, since the interpreter takes its time for each tile."""
    groups, batch, hw = choice["map"]
    if max(choice["width"]) > 16:
        groups, batch = min(groups, 2), min(batch, 3)
    kernel, dilation = _pair(choice["kernel"]), _pair(choice["dilation"])
    high, wide = ((taps - 1) * apart for taps, apart in zip(kernel, dilation, strict=True))
    pad = {
        "none": 0, "same": (high // 2, high - high // 2, wide // 2, wide - wide // 2),
        "lopsided": (high, 0, 0, wide), "beyond": (high + 1, wide + 2),
    }[choice["pad"]]  # fmt: skip
    layout = "nhwc" if choice["x"].startswith("nhwc") else "nchw"
    problem = _problem(
        *choice["width"], kernel, hw, groups, batch, choice["stride"], pad, dilation,
        choice["dtype"], layout, choice["bias"],
    )  # fmt: skip
    return Case(problem, *(choice[axis] for axis in ("x", "w", "dy", "tiles")))


def serves(name: str, choice: dict, on) -> bool:
    """Whether there is such a problem, and the algorithm takes it."""
    case = chosen(choice)
    if min(case.problem.y_shape) < 1:
        return False
    return lack(name, actual(case), choice["pass_"], on) is None


def pairs(choice: dict) -> set:
    """The pairs of values, each with its axis, that a choice's pass reads."""
    read = [(axis, value) for axis, value in choice.items() if axis not in UNREAD[choice["pass_"]]]
    return set(itertools.combinations(read, 2))


@functools.cache
def cover(name: str, on) -> list[dict]:
    """Choices that an algorithm serves, few of them, in which every pair of values that it serves at all occurs.

    For each pair that no choice has yet, those of the most values first: of some draws of the other values, the one
    with the most such pairs.
    """
    generator, axes = random.Random(name), dict(AXES)

    def drawn(count, **given):
        return ({axis: generator.choice(values) for axis, values in axes.items()} | given for _ in range(count))

    # First leave out what it never serves, on its own or in the place of a value that it does.
    served = list(itertools.islice((choice for choice in drawn(FIRST) if serves(name, choice, on)), 20))
    for axis, values in AXES.items():
        axes[axis] = [
            value for value in values
            if any(serves(name, choice | {axis: value}, on) for choice in (*served, *drawn(400)))
        ]  # fmt: skip
        if not axes[axis]:
            return []
    two_axes = sorted(itertools.combinations(axes, 2), key=lambda two: -len(axes[two[0]]) * len(axes[two[1]]))
    wanted = [tuple(zip(two, both, strict=True)) for two in two_axes for both in itertools.product(*map(axes.get, two))]
    missing, found = set(wanted), []
    for pair in wanted:
        if pair in missing:
            axes_of_pair = {axis for axis, _ in pair}
            choices = [choice for choice in drawn(DRAWS, **dict(pair)) if not axes_of_pair & UNREAD[choice["pass_"]]]
            choices.sort(key=lambda choice: -len(pairs(choice) & missing))
            best = next((choice for choice in choices if serves(name, choice, on)), None)
            if best is not None:
                found.append(best)
                missing -= pairs(best)
    return found


# What takes more than two values to reach: filters taller than the map, 1x1 layers whose pixels lie evenly apart, and
# contiguous rows that are loaded in runs, of 8 columns or 4.
UNREACHED = tuple(
    Case(_problem(1, 1, (11, 9), (7, 6), 9, 2, 1, (5, 4), 1, "bf16", layout, True), layout, "nchw", layout)
    for layout in ("nhwc", "nchw")
) + (
    Case(_problem(8, 24, 1, (5, 4), 2, 3, 1, 0, 1, "fp16", "nhwc", True), w="nhwc"),
    Case(_problem(4, 4, 3, (5, 16), 3, 2, 1, 1, 1, "bf16", "nchw", True), "nchw", "nchw", "nchw"),
    Case(_problem(4, 8, 3, (6, 32), 2, 2, 2, 1, 1, "fp16", "nchw", False), "rows+8", "nchw", "nchw"),
    Case(_problem(8, 4, (2, 5), (4, 24), 2, 1, 1, (1, 4), (1, 2), "tf32", "nchw", True), "nchw", "nchw", "rows+8"),
)  # fmt: skip


def covering_runs(on) -> list[tuple[Case, str, str]]:
    """(case, pass, algorithm) of the covers of all algorithms, and of what these do not reach."""
    covered = [(chosen(choice), choice["pass_"], name) for name in RUNNING for choice in cover(name, on)]
    return covered + runs(on, UNREACHED)


# --- A model ---------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A small ResNeXt bottleneck whose 3x3 convolution is ours."""

    def __init__(self, channels=8, width=8, groups=4, backend="triton"):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, width, 1, bias=False), nn.Conv2d(width, channels, 1, bias=False)
        self.weight = nn.Parameter(torch.randn(width, width // groups, 3, 3) / 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(n) for n in (width, width, channels)])
        self.groups, self.backend = groups, backend

    def forward(self, x):
        y = self.norms[0](self.reduce(x)).relu()
        y = self.norms[1](triton_conv(y, self.weight, padding=1, groups=self.groups, backend=self.backend)).relu()
        return (x + self.norms[2](self.expand(y))).relu()


def step(module, block, x):
    """(output, gradient of x, gradients of parameters) of one step; `module` is the block, compiled or not."""
    block.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    y.square().mean().backward()
    return y.detach(), x.grad, *(p.grad.clone() for p in block.parameters())
