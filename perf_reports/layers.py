"""The layers to report on: from the command line, checked before anything runs, from lists, and from models.

A model's are the grouped convolutions of one call of it, on tensors without values.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import difflib
import functools
import importlib
import importlib.resources
import pathlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.module_tracker import ModuleTracker

from groupconv.arguments import normalise
from groupconv.common import Layer
from groupconv.problem import ConvProblem
from groupconv.torch_private import TorchDispatchMode

GROUPS = (1, 2, 4, 8, 16, 32, 64, 128)
UNMEASURED_GROUPS = (1, 2, 8, 32, 128)  # where each count's kernels are compiled and interpreted on a CPU
QUICK_GROUPS = (4, 32)
KERNELS = (1, 3, 5, 7, 9, 11, 13, 17, 21, 27, 31)
QUICK_KERNELS = (3, 7)
QUICK_STEP = 16  # of a list of layers, every 16th
OF_A_LAYER = ("channels", "kernel", "stride", "padding")  # options
INPUT_SIZE = (3, 224, 224)  # channels and pixels, of a model that does not say
COLUMNS = (
    "name", "N", "C_in", "H", "W", "C_out", "KH", "KW", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w",
    "groups",
)  # fmt: skip


def make(args: argparse.Namespace, dtype: str, layout: str, counts: Sequence[int] = GROUPS) -> list[Layer]:
    """The layers that `options.add_layers` asks for; ValueError where they make no convolution.

    counts: the group counts of a layer where no option names any, as far as they divide its channels.
    """
    if args.model is not None:
        return _of_named_model(args, dtype, layout)
    if args.layers == "kernels":
        return _across_kernels(args, dtype, layout)
    if args.kernels:
        raise ValueError(f"--kernels: {_listed(args.kernels)} is for --layers kernels, not --layers {args.layers}")
    if args.layers == "groups":
        return _across_groups(args, dtype, layout, counts)
    if args.layers == "all":
        return [*_across_groups(args, dtype, layout, counts), *_some(suite(dtype, layout), args)]
    _has_its_own(args, "a list of layers", "groups", *OF_A_LAYER)
    return _some(suite(dtype, layout) if args.layers == "suite" else _of_file(args.layers, dtype, layout), args)


def _some(layers: list[Layer], args: argparse.Namespace) -> list[Layer]:
    """The layers of a list: all, or few with --quick."""
    return layers[::QUICK_STEP] if args.quick else layers


def variants(args: argparse.Namespace) -> list[Layer]:
    """`make` in every dtype and layout, one dtype and layout after the other."""
    layers = make(args, args.dtypes[0], args.layouts[0])
    return [
        Layer(layer.name, dataclasses.replace(layer.problem, dtype=dtype, layout=layout, out_layout=layout))
        for dtype in args.dtypes
        for layout in args.layouts
        for layer in layers
    ]


def _has_its_own(args: argparse.Namespace, what: str, *options: str) -> None:
    """Raise for options of a layer that these layers do not take."""
    for option in options:
        if values := getattr(args, option):
            raise ValueError(f"--{option}: {what} has its own; {_listed(values)} is for --layers groups")


def _of_named_model(args: argparse.Namespace, dtype: str, layout: str) -> list[Layer]:
    _has_its_own(args, args.model, "groups", "kernels", *OF_A_LAYER)
    size = None if args.size is None else _pair(args.size, "--size")[0]
    return _some(of_model(args.model, 128 if args.batch is None else args.batch, size, dtype, layout), args)


def _across_groups(args: argparse.Namespace, dtype: str, layout: str, counts: Sequence[int]) -> list[Layer]:
    c_in, c_out = _pair(args.channels or [128], "--channels")
    kh, kw = _pair(args.kernel or [3], "--kernel")
    groups = args.groups
    if groups is None:
        groups = [g for g in (QUICK_GROUPS if args.quick else counts) if c_in % g == 0 and c_out % g == 0] or [1]
    for count in groups:
        if count < 1:
            raise ValueError(f"--groups: {count} is not a positive number")
        for channels, which in ((c_in, "input"), (c_out, "output")):
            if channels % count:
                raise ValueError(f"--groups: {count} does not divide the {channels} {which} channels")
    problem = _problem(args, kh, kw, 128, dtype, layout)
    return [Layer(f"g{count}", dataclasses.replace(problem, groups=count)) for count in sorted(set(groups))]


def _across_kernels(args: argparse.Namespace, dtype: str, layout: str) -> list[Layer]:
    for option, values in (("--groups", args.groups), ("--kernel", args.kernel)):
        if values:
            raise ValueError(f"{option}: {_listed(values)} is not for --layers kernels: depthwise, by --kernels")
    c_in, c_out = _pair(args.channels or [128], "--channels")
    if c_out % c_in:
        raise ValueError(f"--channels: {c_out} depthwise output channels are no multiple of {c_in} input channels")
    sizes = sorted(set(args.kernels or (QUICK_KERNELS if args.quick else KERNELS)))
    for size in sizes:
        _pair([size], "--kernels")
    problems = [_problem(args, size, size, 64, dtype, layout) for size in sizes]
    return [Layer(f"k{problem.kh}", dataclasses.replace(problem, groups=c_in)) for problem in problems]


def _problem(args: argparse.Namespace, kh: int, kw: int, batch: int, dtype: str, layout: str) -> ConvProblem:
    """The layer of the options, ungrouped. `batch`: where the options have none."""
    (c_in, c_out), (height, width) = _pair(args.channels or [128], "--channels"), _pair(args.size or [56], "--size")
    stride = _pair(args.stride or [1], "--stride")
    pad_h, pad_w = (kh // 2, kw // 2) if args.padding is None else _pair(args.padding, "--padding", least=0)
    images, _ = _pair([batch if args.batch is None else args.batch], "--batch")
    problem = ConvProblem(
        images, c_in, height, width, c_out, kh, kw, stride, (pad_h, pad_h, pad_w, pad_w),
        dtype=dtype, layout=layout, out_layout=layout,
    )  # fmt: skip
    if min(problem.h_out, problem.w_out) < 1:
        raise ValueError(f"--size: a {kh}x{kw} kernel does not fit {height}x{width} pixels with this padding")
    return problem


def _pair(values: list[int], option: str, least: int = 1) -> tuple[int, int]:
    if len(values) > 2:
        raise ValueError(f"{option}: {len(values)} numbers, but at most 2 are taken")
    for value in values:
        if value < least:
            raise ValueError(f"{option}: {value} is not {'a positive number' if least else 'zero or more'}")
    return values[0], values[-1]


def _listed(values: list[int]) -> str:
    return " ".join(map(str, values))


def suite(dtype: str, layout: str) -> list[Layer]:
    """The shipped layers of published models."""
    text = importlib.resources.files(__package__).joinpath("suite.csv").read_text(encoding="utf-8")
    return _parsed(text, "suite", dtype, layout)


def _of_file(name: str, dtype: str, layout: str) -> list[Layer]:
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(f'--layers: {name!r} is not "groups", "kernels", "suite" or a CSV file that exists')
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--layers: {name} is not UTF-8: {error}") from None
    return _parsed(text, name, dtype, layout)


def _size(text: str | None, where: str, column: str) -> int:
    """A number of a CSV."""
    least = 0 if column.startswith("pad_") else 1
    try:
        size = int(text or "")
    except ValueError:
        raise ValueError(f"{where}, column {column}: {text!r} is not a whole number") from None
    if size < least:
        raise ValueError(f"{where}, column {column}: {size} is not {'zero or more' if least == 0 else 'positive'}")
    return size


def _parsed(text: str, name: str, dtype: str, layout: str) -> list[Layer]:
    reader = csv.DictReader(text.splitlines())
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"--layers: {name} has no column {', '.join(missing)}")
    layers: list[Layer] = []
    for number, line in enumerate(reader, start=2):
        where = f"--layers: {name}, line {number}"
        sizes = [_size(line[column], where, column) for column in COLUMNS[1:]]
        batch, c_in, h, w, c_out, kh, kw, sh, sw, ph, pw, dh, dw, groups = sizes
        if c_in % groups or c_out % groups:
            raise ValueError(f"{where}: {groups} groups do not divide {c_in} and {c_out} channels")
        problem = ConvProblem(
            batch, c_in, h, w, c_out, kh, kw, (sh, sw), (ph, ph, pw, pw), (dh, dw), groups, dtype, layout, layout
        )
        if min(problem.h_out, problem.w_out) < 1:
            raise ValueError(f"{where}: the kernel does not fit")
        if line["name"] in {layer.name for layer in layers}:
            raise ValueError(f"{where}: a second layer called {line['name']!r}")
        layers.append(Layer(line["name"], problem))
    if not layers:
        raise ValueError(f"--layers: {name} has no layers")
    return layers


# --- Models ----------------------------------------------------------------------------------------------------------


def of_model(spec: str, batch: int, size: int | None, dtype: str, layout: str) -> list[Layer]:
    """The 2-D convolutions with groups that a model in eval mode calls, in that order, each distinct problem once.

    Args:
        spec: "timm:NAME" or "torchvision:NAME", an image classifier; no weights are loaded.
        batch, size: the input is of `batch` images of `size` by `size` pixels, None: as large as the model expects.
        dtype, layout: the ConvProblem's, of every layer.

    Returns:
        Layers named after the model and the module that calls them, "resnext50_32x4d.layer1.0.conv2"; a module's second
        problem ends in "#2". Padding that the model puts around x itself is part of the layer's x. No biases.

    Raises:
        ValueError: no such library or model, a model that does not run on meta tensors, or one without such layers.
    """
    recorder = _recorded(spec, batch, size)
    layers = [
        Layer(name, dataclasses.replace(problem, dtype=dtype, layout=layout, out_layout=layout))
        for problem, name in recorder.names(spec.partition(":")[2]).items()
    ]
    if not layers:
        raise ValueError(f"{spec!r} has no 2-D convolution with groups")
    return layers


def followed_by_groups(spec: str, batch: int, size: int | None) -> dict[str, bool]:
    """Of `of_model`'s layers, whether the convolution that is called next is grouped too, so that no channel of one
    group meets those of the others in between. Raises as `of_model`.
    """
    recorder = _recorded(spec, batch, size)
    names = recorder.names(spec.partition(":")[2])
    return {name: problem in recorder.followed for problem, name in names.items()}


def _recorded(spec: str, batch: int, size: int | None) -> _Recorder:
    """What a model calls."""
    build = builder(spec)
    try:
        # Built with values, of which some models compute their widths; then without, and so is what forward creates.
        model = build().eval().to("meta")
        with torch.device("meta"), torch.no_grad(), ModuleTracker() as tracker, _Recorder(tracker) as recorder:
            model(torch.empty(input_shape(model, batch, size)))
    except Exception as error:  # whatever it is, the model is at fault
        raise ValueError(f"{spec!r} does not run on meta tensors: {type(error).__name__}: {error}") from error
    return recorder


def builder(spec: str) -> Callable[[], nn.Module]:
    """What builds the classifier "timm:NAME" or "torchvision:NAME" on the CPU, in train mode, with random weights.

    ValueError where there is no such library or model; nothing has been built then.
    """
    library, colon, name = spec.partition(":")
    build: Callable[[], nn.Module]
    if colon and library == "timm":
        timm = _imported("timm", library, spec)
        names, build = timm.list_models(), functools.partial(timm.create_model, name, pretrained=False)
    elif colon and library == "torchvision":
        models = _imported("torchvision.models", library, spec)
        # The classifiers: those of its other modules (detection, segmentation) load weights for a part of theirs.
        names, build = models.list_models(module=models), functools.partial(models.get_model, name, weights=None)
    else:
        raise ValueError(f"{spec!r} is not timm:NAME or torchvision:NAME")
    if name not in names:
        near = difflib.get_close_matches(name, names)
        raise ValueError(f"{spec!r}: {library} has no model {name!r}{'; near: ' * bool(near)}{', '.join(near)}")
    return build


def input_shape(model: nn.Module, batch: int, size: int | None) -> tuple[int, int, int, int]:
    """[batch, channels, height, width] of a model's input: `size` pixels square, or None, as the model expects it."""
    channels, *expected = getattr(model, "default_cfg", {}).get("input_size", INPUT_SIZE)
    height, width = expected if size is None else (size, size)
    return batch, channels, height, width


def _imported(module: str, library: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was made for another torch
        raise ValueError(f"{spec!r}: {library} cannot be imported: {error}; try: pip install {library}") from error


class _Recorder(TorchDispatchMode):
    """Keeps the problems of the grouped convolutions called under it, with the module of each one's first call.

    ATen's convolution is where the calls of modules and functions meet, with their real shapes.
    """

    def __init__(self, tracker: ModuleTracker):
        super().__init__()
        self.modules: dict[ConvProblem, str] = {}
        self.followed: set[ConvProblem] = set()  # by another grouped one
        self._last: ConvProblem | None = None
        self._tracker = tracker

    def names(self, model: str) -> dict[ConvProblem, str]:
        """What the problems' layers are called: the model, the module, and of its second problem "#2"."""
        found, times = {}, collections.Counter[str]()
        for problem, module in self.modules.items():
            times[module] += 1
            number = f"#{times[module]}" if times[module] > 1 else ""
            found[problem] = ".".join(filter(None, (model, module))) + number
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, w, _, stride, padding, dilation, transposed, _, groups = args
            call = normalise(x.shape, w.shape, stride, padding, dilation, groups)
            if call is not None and groups > 1 and not transposed:
                problem = ConvProblem(*(*x.shape, w.shape[0], *w.shape[2:], *call))
                self.modules.setdefault(problem, self._module())
                if self._last is not None:
                    self.followed.add(self._last)
                self._last = problem
            else:
                self._last = None
        return func(*args, **(kwargs or {}))

    def _module(self) -> str:
        """The innermost running module, as its model calls it; the model itself is ""."""
        # The tracker has "Global", and by their paths from the model's class the modules that run, one in the other.
        return max(self._tracker.parents - {"Global"}, key=len).partition(".")[2]
