"""Training steps with and without our layers: of stand-ins by a pretended clock, and of a real model on a GPU."""

import functools
import gc
import itertools
import types
import weakref

import pytest
import torch
from torch import nn

import groupconv
from groupconv import layers as layers_of_ours
from groupconv import triton_conv
from groupconv.common import files
from groupconv.perf_reports import layers, training

MADE = []


class Network(nn.Module):
    """A small classifier with two grouped convolutions; the second is in a branch that begins at zero."""

    def __init__(self):
        super().__init__()
        MADE.append(weakref.ref(self))
        self.num_classes = 5
        self.stem = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8))
        nn.init.zeros_(self.branch[1].weight)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 5)

    def forward(self, x):
        x = self.grouped(self.stem(x).relu())
        return self.head(self.drop(x + self.branch(x)).relu().mean((2, 3)))


class Broken(Network):
    def forward(self, x):
        raise RuntimeError("no such\nmodel")


class Infinite(Network):
    def forward(self, x):
        return super().forward(x) * float("inf")


class Steps:
    """Times that are pretended: it runs three steps and keeps what they return, and the settings that they run with."""

    def __init__(self):
        self.losses, self.benchmark, self.alive = [], [], []

    def __call__(self, step):
        self.losses.append([step().item() for _ in range(3)])
        self.benchmark.append(torch.backends.cudnn.benchmark)
        gc.collect()
        self.alive.append(sum(made() is not None for made in MADE))
        return 18.0, 20.0, 25.0


@pytest.fixture
def steps(monkeypatch):
    MADE.clear()
    models = {"small": Network, "broken": Broken, "infinite": Infinite}
    monkeypatch.setattr(layers, "builder", models.__getitem__)
    return Steps()


def found(steps, *models, layouts=("nhwc",), size=12):
    return list(training.rows(models, layouts, 4, size, "cpu", steps))


def test_rows_of_a_model(steps):
    made = found(steps, "small", layouts=("nhwc", "nchw"))
    assert [(row["layout"], row["provider"], row["converted"]) for row in made] == [
        ("nhwc", "torch", 0), ("nhwc", "groupconv", 2), ("nchw", "torch", 0), ("nchw", "groupconv", 2),
    ]  # fmt: skip
    environment = {"utc", *files.environment("modelled", "none")}
    assert set(training.FIELDS) == environment | set(made[0])
    for row in made:
        assert row.keys() <= set(training.FIELDS)
        assert (row["model"], row["batch"], row["size"], row["dtype"], row["note"]) == ("small", 4, 12, "bf16", "")
        assert (row["ms_p20"], row["ms_p50"], row["ms_p80"], row["images_per_s"]) == (18.0, 20.0, 25.0, 200.0)
        assert row["peak_bytes"] is None
        assert row["loss"] == row["loss_of_torch"] > 0
    # On CPU tensors ours is F.conv2d: with the same weights, images and dropout, training goes the same way.
    assert steps.losses[0] == steps.losses[1]
    assert len({*steps.losses[0]}) == 3
    assert steps.benchmark == [True] * 4
    assert steps.alive == [1] * 4  # the provider before is gone


def test_our_kernels_pass(steps, monkeypatch):
    monkeypatch.setattr(layers_of_ours, "triton_conv", functools.partial(triton_conv, backend="triton"))
    right, ours = found(lambda step: (1.0, 1.0, 1.0), "small", size=6)
    assert (ours["note"], ours["converted"]) == ("", 2)
    assert abs(ours["loss"] - right["loss"]) <= 5e-3 * right["loss"]


@pytest.mark.parametrize("ends", [True, False])
def test_trials_come_first(ends, monkeypatch):
    """Steps go on until those of this model have ended, and those that then began."""
    racing, raced, stopped = (types.SimpleNamespace(state=state) for state in ("racing", "raced", "stopped"))
    states, count, seen = [racing, racing], itertools.count(1), training.trial.SEEN
    monkeypatch.setattr(training.trial, "trials", lambda: list(states))
    monkeypatch.setattr(training.trial, "why_off", str)
    monkeypatch.setattr(training, "SETTLE_SECONDS", 60.0 if ends else 0.2)
    run = training._Training.__new__(training._Training)
    run.converted, run.earlier = {"grouped": None}, 1
    run.images = types.SimpleNamespace(device=torch.device("cuda"))

    def step():
        steps = next(count)
        if ends and steps == 3:
            states[1] = raced
        if ends and steps == 3 + seen:  # both gradients in one kernel
            states.append(racing)
        if ends and steps == 20:
            states[2] = stopped

    run.step = step
    assert run.settle() == ("1 plans stopped without a result" if ends else "1 plans still on trial")
    if ends:
        assert next(count) == 20 + seen + 1


def test_settings_are_put_back(steps, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    run = training.rows(["small"], ["nhwc"], 4, 12, "cpu", steps)
    next(run)
    assert torch.backends.cudnn.benchmark is True
    run.close()
    assert torch.backends.cudnn.benchmark is False


def test_layouts_and_precision_of_a_step(steps, monkeypatch):
    seen = []

    def recorded(input, weight, *rest):
        seen.append((input.is_contiguous(memory_format=torch.channels_last), torch.get_autocast_dtype("cpu")))
        assert torch.is_autocast_enabled("cpu")
        return triton_conv(input, weight, *rest)

    monkeypatch.setattr(layers_of_ours, "triton_conv", recorded)
    found(steps, "small")
    assert set(seen) == {(True, torch.bfloat16)}
    seen.clear()
    found(steps, "small", layouts=["nchw"])
    assert set(seen) == {(False, torch.bfloat16)}


def test_model_that_fails_does_not_end_the_run(steps):
    made = found(steps, "broken", "infinite", "small")
    assert [(row["model"], row["provider"]) for row in made] == [
        (model, provider) for model in ("broken", "infinite", "small") for provider in training.PROVIDERS
    ]
    assert [row["note"] for row in made] == [
        "failed: RuntimeError: no such", "failed: RuntimeError: no such",
        "wrong: the loss is nan", "wrong: the loss is nan", "", "",
    ]  # fmt: skip
    assert ["ms_p50" in row for row in made] == [False] * 4 + [True] * 2
    assert len(steps.losses) == 2


def test_step_that_cannot_be_timed(steps):
    def out_of_memory(step):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    for row in found(out_of_memory, "small"):
        assert row["note"] == "failed: out of memory"
        assert row["loss"] == row["loss_of_torch"]
        assert "ms_p50" not in row


def test_nothing_to_compare_with(steps, monkeypatch):
    monkeypatch.setattr(training, "convert", lambda model: groupconv.convert(Network()))
    _, ours = found(steps, "broken")
    assert ours["note"] == "failed: the model as it is has no loss to compare with"


def test_wrong_conversion_is_found_by_the_loss(steps, monkeypatch):
    def wrong(model):
        nn.init.constant_(model.head.bias[:1], 3.0)
        return groupconv.convert(model)

    monkeypatch.setattr(training, "convert", wrong)
    right, wrong_ = found(steps, "small")
    assert right["note"] == ""
    assert wrong_["note"].startswith("wrong: the loss is ")
    assert wrong_["note"].endswith(f", but {right['loss']:.6g} by the model as it is")
    assert "ms_p50" not in wrong_


class Negated(torch.autograd.Function):
    """The identity, with a gradient that is not its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return -dy


@pytest.mark.parametrize("fault", [lambda y: 1.05 * y, Negated.apply])
def test_wrong_layer_is_found_where_the_loss_hides_it(fault, steps, monkeypatch):
    """A fault in the branch that begins at zero, or in a gradient, leaves the first loss as it is."""

    def faulty(input, weight, bias, stride, padding, dilation, groups):
        y = triton_conv(input, weight, bias, stride, padding, dilation, groups)
        return fault(y) if groups == 8 else y

    monkeypatch.setattr(layers_of_ours, "triton_conv", faulty)
    right, wrong = found(steps, "small")
    assert right["note"] == ""
    assert wrong["loss"] == right["loss"]
    assert wrong["note"].startswith("wrong: branch.0 differs from nn.Conv2d by ")
    assert "ms_p50" not in wrong
    assert len(steps.losses) == 1


@pytest.mark.gpu
def test_real_model():
    made = list(training.rows(["timm:resnext26ts"], ["nhwc", "nchw"], 8, 64))
    assert len(made) == 4
    for row in made:
        assert row["note"] == ""
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["images_per_s"] == pytest.approx(8000 / row["ms_p50"])
        assert row["peak_bytes"] > 2**20
        assert row["converted"] == (8 if row["provider"] == "groupconv" else 0)
