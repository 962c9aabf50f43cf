"""Training steps of whole models, as they are and with our layers: checked against each other, then timed."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupconv import trial
from groupconv.common.files import ENVIRONMENT
from groupconv.layers import Conv2d
from groupconv.measuring.lab import DeviceLost, failure, settings
from groupconv.modules import convert

from . import layers
from .rows import Fields

Timer = Callable[[Callable[[], object]], tuple[float, float, float]]

# size: the input's height. converted: layers that convert changed. loss: the first step's; loss_of_torch: without them.
FIELDS = (
    *ENVIRONMENT, "model", "batch", "size", "dtype", "layout", "provider", "ms_p20", "ms_p50", "ms_p80",
    "images_per_s", "peak_bytes", "loss", "loss_of_torch", "converted", "note",
)  # fmt: skip
PROVIDERS = ("torch", "groupconv")
FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
CLASSES = 1000  # of a model that does not say
SEED = 0
WARM_UP, STEPS = 3, 20
SETTLE_SECONDS = 300.0  # until a model's plans have proven themselves
TOLERANCE = 2e-2  # of a loss and of a layer's result and gradients, relative: several times bf16's rounding


def by_events(step: Callable[[], object]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of a step's time in ms, from event to event in a run of steps without a stop."""
    for _ in range(WARM_UP):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) for start, end in itertools.pairwise(marks)])
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return p20, p50, p80


def rows(
    models: Sequence[str],
    layouts: Sequence[str],
    batch: int,
    size: int | None,
    device: str = "cuda",
    timer: Timer = by_events,
) -> Iterator[Fields]:
    """A row for each model, layout ("nhwc" or "nchw") and provider: "torch", the model as it is, and "groupconv", after
    `convert`. Rows lack the fields of the environment.

    A step is forward under bf16 autocast, cross entropy, backward and SGD with momentum, on a batch of random images of
    `size` by `size` pixels (None: as large as the model expects). Both providers have the same weights and images, and
    `timer` times a step. The first step comes before: its losses must agree. So must each converted layer's result and
    gradients with nn.Conv2d's, then and once no plan is on trial any more. A provider that fails or is wrong has a row
    that says so and no time.

    Raises:
        ValueError: models that layers.builder refuses, before any work. DeviceLost: the GPU answers no more.
    """
    builders = {spec: layers.builder(spec) for spec in models}
    with settings("bf16"):
        for (spec, build), layout in itertools.product(builders.items(), layouts):
            loss_of_torch = None
            for provider in PROVIDERS:
                row: Fields = {"model": spec, "batch": batch, "size": size, "dtype": "bf16", "layout": layout}
                row |= {"provider": provider, "loss_of_torch": loss_of_torch}
                _fill(row, build, device, timer)
                _free(device)
                loss_of_torch = row["loss_of_torch"]
                yield row


def _fill(row: Fields, build: Callable[[], nn.Module], device: str, timer: Timer) -> None:
    """Add to a row what there is to find out, up to what fails."""
    try:
        training = _Training(build, row["provider"], row["batch"], row["size"], row["layout"], device)
        row |= {"size": training.images.shape[2], "converted": len(training.converted)}
        row["loss"], differences = training.checked_step()
        if row["provider"] == "torch":
            row["loss_of_torch"] = row["loss"]
        row["note"] = _fault(row["loss"], row["loss_of_torch"]) or _difference_fault(differences)
        if not row["note"]:
            unproven = training.settle()
            if len(trial.trials()) > training.earlier:  # and so other kernels than in the first step
                row["note"] = _difference_fault(training.checked_step()[1])
        if not row["note"]:
            row["note"] = unproven
            p20, p50, p80 = timer(training.step)
            row |= {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "images_per_s": row["batch"] / p50 * 1e3}
            row["peak_bytes"] = _peak_bytes(training.step, device)
    except Exception as error:  # what it raises is the finding; the other rows may do better
        row["note"] = failure(error)


class _Training:
    """A model in training, with or without our layers, on one batch of random images and classes."""

    def __init__(
        self, build: Callable[[], nn.Module], provider: str, batch: int, size: int | None, layout: str, device: str
    ):
        torch.manual_seed(SEED)
        model = build()
        if provider == "groupconv":
            model = convert(model)
        self.converted = {name: layer for name, layer in model.named_modules() if isinstance(layer, Conv2d)}
        self.model = model.to(device).to(memory_format=FORMATS[layout])  # type: ignore[call-overload]
        self.images = torch.randn(layers.input_shape(model, batch, size))
        self.images = self.images.to(device, memory_format=FORMATS[layout])
        self.classes = torch.randint(getattr(model, "num_classes", CLASSES), (batch,)).to(device)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.earlier = len(trial.trials())  # trials, of models before

    def step(self) -> Tensor:
        """The loss before the step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.images.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.model(self.images), self.classes)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def settle(self) -> str:
        """Go on until no plan of the model is on trial any more, as in a long training: F.conv2d serves until then.
        What there is to say of plans that have not proven themselves by SETTLE_SECONDS.
        """
        if not self.converted or self.images.device.type != "cuda" or trial.why_off():
            return ""
        end, begun, calm = time.monotonic() + SETTLE_SECONDS, -1, 0
        while calm <= trial.SEEN and time.monotonic() < end:  # what ends may let others begin, so many calls later
            self.step()
            mine = trial.trials()[self.earlier :]
            still = sum(one.state not in trial.ENDED for one in mine)
            calm = 0 if still or len(mine) != begun else calm + 1
            begun = len(mine)
        stopped = sum(one.state == "stopped" for one in mine)
        told = ((still, "still on trial"), (stopped, "stopped without a result"))
        return ", ".join(f"{count} plans {words}" for count, words in told if count)

    def checked_step(self) -> tuple[float, list[tuple[str, float]]]:
        """The loss, and how much each converted layer, by name, differs from nn.Conv2d on what it was called with.

        The loss alone would not tell: networks whose residual branches begin at zero hide there what these compute.
        """
        differences: list[tuple[str, Tensor]] = []

        def compare(name: str, layer: Conv2d, args: tuple[Tensor], output: Tensor) -> None:
            differences.append((name, _difference(layer, *args)))

        hooks = [
            layer.register_forward_hook(functools.partial(compare, name)) for name, layer in self.converted.items()
        ]
        loss = self.step().item()
        for hook in hooks:
            hook.remove()
        return loss, [(name, difference.item()) for name, difference in differences]


def _difference(layer: Conv2d, x: Tensor) -> Tensor:
    """The largest of y, dx, dw and db: ||a layer's - nn.Conv2d's|| / ||nn.Conv2d's||, of the same x and dy; or NaN."""
    leaves = [x.detach().requires_grad_(), *layer.parameters()]
    expected = nn.Conv2d._conv_forward(layer, leaves[0], layer.weight, layer.bias)
    y = layer._conv_forward(leaves[0], layer.weight, layer.bias)
    dy = expected.detach()
    pairs = zip(
        (y, *torch.autograd.grad(y, leaves, dy)), (expected, *torch.autograd.grad(expected, leaves, dy)),
        strict=True,
    )  # fmt: skip
    return torch.stack([(a - b).float().norm() / b.float().norm().clamp_min(1e-30) for a, b in pairs]).max()


def _fault(loss: float, loss_of_torch: float | None) -> str:
    """Why a model's first loss is not right; nothing if it is."""
    if loss_of_torch is None:
        return "failed: the model as it is has no loss to compare with"
    if not math.isfinite(loss):
        return f"wrong: the loss is {loss}"
    if not abs(loss - loss_of_torch) <= TOLERANCE * abs(loss_of_torch):
        return f"wrong: the loss is {loss:.6g}, but {loss_of_torch:.6g} by the model as it is"
    return ""


def _difference_fault(differences: list[tuple[str, float]]) -> str:
    """Why a model is not to be timed; nothing if its layers are right."""
    for name, difference in differences:
        if not difference <= TOLERANCE:  # NaN too
            return f"wrong: {name} differs from nn.Conv2d by {difference:.2g}"
    return ""


def _peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """The most memory that tensors take at a time during a step; None on the CPU."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


def _free(device: str) -> None:
    """Return what a provider took before the next one begins."""
    gc.collect()
    if torch.device(device).type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error
