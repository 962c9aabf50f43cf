"""The grouped convolutions of models, found by calling stand-ins for timm and torchvision; the real ones on a GPU."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from groupconv.common import Layer
from groupconv.perf_reports import layers
from groupconv.problem import ConvProblem

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


class Same(nn.Conv2d):
    """Pads by itself, at the bottom and right, and convolves by a function."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, None, self.stride, 0, self.dilation, self.groups)


class Network(nn.Module):
    """Calls of every kind: ungrouped, grouped, repeated, dilated, padded, depthwise, transposed, 1-D, by a function."""

    def __init__(self):
        super().__init__()
        self.default_cfg = {"input_size": (4, 24, 16)}
        grouped = [nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=bias) for bias in (True, False)]
        self.stem = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.stage = nn.Sequential(*grouped, nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2))
        self.block = nn.Sequential(Same(8, 16, 3, stride=2, groups=4), nn.BatchNorm2d(16), nn.Dropout())
        self.depthwise = nn.Conv2d(16, 16, (2, 3), padding="same", groups=16)
        self.up = nn.ConvTranspose2d(16, 16, 3, groups=4)
        self.line = nn.Conv1d(16, 16, 3, groups=4)
        # Sizes computed from values, as RegNet has them, cannot be had of meta tensors.
        self.classes = int(torch.unique(torch.tensor([3.0, 5.0, 5.0])).max())

    def forward(self, x):
        x = self.up(self.depthwise(self.block(self.stage(self.stem(x)))))
        x = F.conv2d(x, torch.empty(16, 2, 1, 1), groups=8)
        return self.line(x.flatten(2)).mean(2)[:, : self.classes]


class Pyramid(nn.Module):
    """One module at two sizes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 3, 3, groups=3)

    def forward(self, x):
        levels = x, F.max_pool2d(x, 2), x
        return sum(self.head(level).mean((2, 3)) for level in levels)


class ReadsValues(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * x.sum().item()


TIMM = {
    "network": Network,
    "ungrouped": lambda: nn.Conv2d(3, 3, 1),
    "reads_values": lambda: ReadsValues(3, 3, 1, groups=3),
}
TORCHVISION = {"pyramid": Pyramid, "network": Network}


def find(models, **expected):
    """A library's function that makes a model; any other arguments than expected are refused."""

    def make(name, **options):
        assert options == expected
        return models[name]()

    return make


@pytest.fixture(autouse=True)
def libraries(request, monkeypatch):
    """Stand-ins, but for the tests of the real libraries."""
    if request.node.get_closest_marker("gpu"):
        return
    timm = types.ModuleType("timm")
    timm.list_models = lambda: sorted(TIMM)
    timm.create_model = find(TIMM, pretrained=False)
    torchvision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    models.list_models = lambda module: sorted(TORCHVISION) if module is models else ["segmenter", *TORCHVISION]
    models.get_model = find(TORCHVISION, weights=None)
    for module in (timm, torchvision, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_layers_of_a_model():
    """Each distinct problem once, in the order of the calls; a layer's x has the padding that others put there."""
    common = {"dtype": "fp16", "layout": "nchw", "out_layout": "nchw"}
    found = layers.of_model("timm:network", 2, None, "fp16", "nchw")
    assert found == [
        Layer("network.stage.0", ConvProblem(2, 8, 12, 8, 8, 3, 3, pad=(1, 1, 1, 1), groups=2, **common)),
        Layer("network.stage.2", ConvProblem(2, 8, 12, 8, 8, 3, 3, (1, 1), (2, 2, 2, 2), (2, 2), 2, **common)),
        Layer("network.block.0", ConvProblem(2, 8, 13, 9, 16, 3, 3, (2, 2), groups=4, **common)),
        Layer("network.depthwise", ConvProblem(2, 16, 7, 4, 16, 2, 3, pad=(0, 0, 1, 1), groups=16, **common)),
        Layer("network", ConvProblem(2, 16, 8, 6, 16, 1, 1, groups=8, **common)),
    ]
    assert torch.empty(0).device.type == "cpu"


def test_size_and_channels():
    """A size is both sides'; without one it is the model's, or 224 by 224 pixels of 3 channels."""
    assert layers.of_model("timm:network", 5, 32, "bf16", "nhwc")[0].problem.x_shape == (5, 8, 16, 16)
    assert layers.of_model("torchvision:pyramid", 1, None, "bf16", "nhwc")[0].problem.x_shape == (1, 3, 224, 224)


def test_second_problem_of_a_module_has_its_own_name():
    found = layers.of_model("torchvision:pyramid", 1, 20, "bf16", "nhwc")
    assert [(layer.name, layer.problem.h_in) for layer in found] == [("pyramid.head", 20), ("pyramid.head#2", 10)]


def test_built_model_is_for_training():
    torch.manual_seed(0)
    model = layers.builder("timm:network")()
    assert model.training
    assert model.stem.weight.device.type == "cpu"
    torch.manual_seed(0)
    assert torch.equal(layers.builder("torchvision:network")().stem.weight, model.stem.weight)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnext50_32x4d", "'resnext50_32x4d' is not timm:NAME or torchvision:NAME"),
        ("keras:network", "'keras:network' is not timm:NAME or torchvision:NAME"),
        ("timm:netwrok", "'timm:netwrok': timm has no model 'netwrok'; near: network"),
        ("timm:zzz", "'timm:zzz': timm has no model 'zzz'"),
        ("torchvision:segmenter", "'torchvision:segmenter': torchvision has no model 'segmenter'"),
        ("timm:ungrouped", "'timm:ungrouped' has no 2-D convolution with groups"),
    ],
)
def test_refused(spec, said):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        layers.of_model(spec, 1, 16, "bf16", "nhwc")
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("spec", "size", "reason"),
    [("timm:reads_values", 16, "RuntimeError: .*meta"), ("torchvision:pyramid", 1, "RuntimeError: .*size")],
)
def test_model_that_does_not_run(spec, size, reason):
    with pytest.raises(ValueError, match=f"'{spec}' does not run on meta tensors: {reason}"):
        layers.of_model(spec, 1, size, "bf16", "nhwc")


@pytest.mark.parametrize(("library", "module"), [("timm", "timm"), ("torchvision", "torchvision.models")])
def test_library_that_is_not_there(library, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"'{library}:x': {library} cannot be imported: .*; try: pip install {library}"
    with pytest.raises(ValueError, match=message):
        layers.builder(f"{library}:x")


def test_library_that_breaks_on_import(monkeypatch, tmp_path):
    """A torchvision that was made for another torch says so by a RuntimeError."""
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'timm:x': timm cannot be imported: operator torchvision::nms does not exist"):
        layers.builder("timm:x")


SHAPES = {  # of the first layer and the last: x_shape, w_shape, stride, groups
    "resnext50_32x4d": (7, ((8, 128, 56, 56), (128, 4, 3, 3), 1, 32), ((8, 1024, 7, 7), (1024, 32, 3, 3), 1, 32)),
    "convnext_tiny": (4, ((8, 96, 56, 56), (96, 1, 7, 7), 1, 96), ((8, 768, 7, 7), (768, 1, 7, 7), 1, 768)),
    "efficientnet_b0": (12, ((8, 32, 112, 112), (32, 1, 3, 3), 1, 32), ((8, 1152, 7, 7), (1152, 1, 3, 3), 1, 1152)),
    "regnety_032": (7, ((8, 72, 112, 112), (72, 24, 3, 3), 2, 3), ((8, 1512, 14, 14), (1512, 24, 3, 3), 2, 63)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_real_model(name):
    count, *ends = SHAPES[name]
    found = layers.of_model(f"timm:{name}", 8, 224, "bf16", "nhwc")
    assert len(found) == count
    for layer, (x_shape, w_shape, stride, groups) in zip((found[0], found[-1]), ends, strict=True):
        problem = layer.problem
        assert (problem.x_shape, problem.w_shape, problem.groups) == (x_shape, w_shape, groups)
        assert problem.stride == (stride, stride)
        assert layer.name.startswith(f"{name}.")
    assert len({layer.name for layer in found}) == count


@pytest.mark.gpu
def test_real_libraries_agree():
    by_timm, by_torchvision = (
        layers.of_model(f"{library}:resnext50_32x4d", 8, 224, "bf16", "nhwc") for library in ("timm", "torchvision")
    )
    assert by_timm == by_torchvision
    assert by_timm[0].name == "resnext50_32x4d.layer1.0.conv2"
