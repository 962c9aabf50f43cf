"""The grouped convolutions of published models: what one call of a model, on tensors without values, convolves."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn
from torch.utils.module_tracker import ModuleTracker

from ..arguments import normalise
from ..problem import ConvProblem
from ..torch_private import TorchDispatchMode
from .rows import Layer

INPUT_SIZE = (3, 224, 224)  # channels and pixels, of a model that does not say


def layers(spec: str, batch: int, size: int | None, dtype: str, layout: str) -> list[Layer]:
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
    build = builder(spec)
    try:
        # Built with values, of which some models compute their widths; then without, and so is what forward creates.
        model = build().eval().to("meta")
        with torch.device("meta"), torch.no_grad(), ModuleTracker() as tracker, _Recorder(tracker) as recorder:
            model(torch.empty(input_shape(model, batch, size)))
    except Exception as error:  # whatever it is, the model is at fault
        raise ValueError(f"{spec!r} does not run on meta tensors: {type(error).__name__}: {error}") from error
    if not recorder.modules:
        raise ValueError(f"{spec!r} has no 2-D convolution with groups")
    found, times = [], collections.Counter[str]()
    for problem, module in recorder.modules.items():
        times[module] += 1
        name = ".".join(filter(None, (spec.partition(":")[2], module)))
        number = f"#{times[module]}" if times[module] > 1 else ""
        found.append(Layer(name + number, dataclasses.replace(problem, dtype=dtype, layout=layout, out_layout=layout)))
    return found


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
        self._tracker = tracker

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            x, w, _, stride, padding, dilation, transposed, _, groups = args
            call = normalise(x.shape, w.shape, stride, padding, dilation, groups)
            if call is not None and groups > 1 and not transposed:
                problem = ConvProblem(*x.shape, w.shape[0], *w.shape[2:], *call)
                self.modules.setdefault(problem, self._module())
        return func(*args, **(kwargs or {}))

    def _module(self) -> str:
        """The innermost running module, as its model calls it; the model itself is ""."""
        # The tracker has "Global", and by their paths from the model's class the modules that run, one in the other.
        return max(self._tracker.parents - {"Global"}, key=len).partition(".")[2]
