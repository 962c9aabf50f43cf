"""timm's models on a CPU, where every grouped call takes our way: whole ones enabled and converted, by F.conv2d to the
bit, and small ones enabled, by interpreted kernels.
"""

import contextlib
import copy
import functools
import importlib.util

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import groupconv
from groupconv import enabling, launcher

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="no timm: pip install timm")
# Of each, how many of its grouped calls no converted layer makes: of subclasses, or by functions.
MODELS = {
    "resnext50_32x4d": 0, "regnetx_002": 0, "regnety_002": 0, "regnetz_b16": 0, "resnest14d": 0, "resnest26d": 0,
    "seresnext26d_32x4d": 0, "skresnext50_32x4d": 0, "mobilenetv2_050": 0, "mobilenetv3_small_050": 0,
    "mobilenetv4_conv_small": 0, "mnasnet_small": 0, "semnasnet_075": 0, "spnasnet_100": 0, "fbnetc_100": 0,
    "lcnet_050": 0, "tinynet_e": 0, "hardcorenas_a": 0, "rexnet_100": 0, "efficientnet_b0": 0,
    "tf_efficientnet_b0": 4, "tf_efficientnetv2_b0": 2, "tf_mobilenetv3_small_075": 4, "tf_mixnet_s": 12,
    "tf_efficientnet_cc_b0_4e": 27, "mixnet_s": 0, "convnext_atto": 0, "convnextv2_atto": 0, "convmixer_768_32": 0,
    "nf_regnet_b0": 16, "eca_nfnet_l0": 22, "dm_nfnet_f0": 22, "tresnet_m": 3, "resnetblur50": 4, "ghostnet_050": 0,
    "ghostnetv2_100": 0, "fastvit_t8": 0, "mobileone_s0": 0, "coatnet_nano_rw_224": 0, "maxvit_nano_rw_256": 0,
    "mobilevit_xxs": 0, "repvit_m0_9": 0, "efficientvit_b0": 0, "xception41": 0, "inception_next_atto": 0, "dpn68": 0,
}  # fmt: skip
# Small ones, by timm's name, or by the class where names leave no choice of arguments: of 32 pixels, channels_last, in
# which the interpreter has fewer programs to run for depthwise layers, where "size" and "layout" do not say otherwise.
SMALL = {
    "resnext50_32x4d": {"layers": (1,) * 4, "channels": (16, 32, 64, 128), "cardinality": 4, "base_width": 16},
    "regnety_002": {"depth": 4, "w0": 16, "wa": 12.0, "wm": 1.5, "group_size": 8, "layout": "nchw"},
    "resnest14d": {"channels": (16, 32, 64, 128), "stem_width": 4, "layout": "nchw"},
    "mobilenetv4": {
        "kind": "MobileNetV3",
        "stages": ("cn_r1_k3_s2_e1_c8", "uir_r1_a5_k5_s2_e3_c16", "uir_r1_a0_k3_s1_e2_c16"),
    },
    "tf_efficientnet": {
        "kind": "EfficientNet", "stages": ("ds_r1_k3_s2_e1_c8_se0.5", "ir_r1_k5_s2_e4_c16_se0.5"), "pad_type": "same",
    },
    "tf_mixnet": {
        "kind": "EfficientNet", "stages": ("ds_r1_k3_s2_e1_c8", "ir_r1_k3.5.7_s2_e3_c12_se0.5_nsw"), "pad_type": "same",
    },
    "test_convnext": {"depths": (1,) * 4, "dims": (16, 24, 32, 40)},
    "convmixer": {"kind": "ConvMixer", "dim": 16, "depth": 1, "patch_size": 4},
    "nf_regnet_b0": {"depths": (1,) * 4, "channels": (16, 16, 32, 32)},
    "tresnet_m": {"layers": (1,) * 4, "width_factor": 0.125, "size": 64},
    "ghostnet": {"kind": "GhostNet", "cfgs": [[[5, 24, 16, 0.25, 2]]], "width": 0.5, "size": 16},
    "fastvit_t8": {"layers": (1,), "embed_dims": (16,), "size": 16},
    "test_coatnet": {
        "img_size": 32, "embed_dim": (32, 64), "depths": (1, 1), "stem_width": (8, 16), "block_type": ("C", "T"),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def timm():
    """timm imports torchvision, which looks up two operators that may not load beside a PyTorch of another build."""
    library = None
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    yield timm
    del library


@pytest.fixture
def counted(monkeypatch):
    """How many grouped calls there were of PyTorch's functions, and how many of ours."""
    counts = {"all": 0, "enabled": 0, "converted": 0}
    for name, ours in list(enabling._OURS.items()):

        def enabled(*arguments, ours=ours):
            counts["enabled"] += 1
            return ours(*arguments)

        monkeypatch.setitem(enabling._OURS, name, enabled)
    whole = groupconv.Conv2d._conv_forward

    def converted(self, *arguments):
        counts["converted"] += 1
        return whole(self, *arguments)

    monkeypatch.setattr(groupconv.Conv2d, "_conv_forward", converted)

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            keywords = keywords or {}
            if function in (torch.conv1d, torch.conv2d):
                groups = keywords.get("groups", arguments[6] if len(arguments) > 6 else 1)
                counts["all"] += groups > 1
            return function(*arguments, **keywords)

    counts["mode"] = Count
    return counts


def step(model: nn.Module, x: torch.Tensor, state: dict):
    """The output of a step of training and the gradients, from the same state and the same chances."""
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_model(name, timm, counted):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    fixed = model.default_cfg.get("fixed_input_size")
    x = torch.randn(2, *(model.default_cfg["input_size"] if fixed else (3, 64, 64)))
    state = copy.deepcopy(model.state_dict())
    with counted["mode"]():
        plain = step(model, x, state)
    with groupconv.enable():
        enabled = step(model, x, state)
    converted = step(groupconv.convert(model), x, state)
    assert F.conv2d is torch.conv2d
    for found in (enabled, converted):
        for out, ref in zip(found, plain, strict=True):
            assert torch.equal(out, ref)
    assert counted["all"] == counted["enabled"] > 0
    assert counted["all"] - counted["converted"] == MODELS[name]


@pytest.fixture
def forced(monkeypatch):
    """Our kernels instead of what "auto" takes of CPU tensors; how many results are theirs, y, dx and dw of each call,
    and how much memory was had for results.
    """
    counts, allocate = {"results": 0, "written": 0}, launcher.allocate

    def call(input, weight, *rest):
        counts["results"] += 2 + weight.requires_grad
        return groupconv.triton_conv(input, weight, *rest, backend="triton")

    def allocated(*arguments):
        counts["written"] += 1
        return allocate(*arguments)

    monkeypatch.setitem(enabling._OURS, "conv2d", call)
    monkeypatch.setattr(launcher, "allocate", allocated)
    return counts


def small(timm, name, kind=None, stages=None, **arguments):
    """A model whose every parameter has a gradient that is not zero, in eval mode: by the statistics of a batch, those
    of what comes before a norm are in part zero but for rounding.
    """
    if stages is not None:
        decoded = timm.models._efficientnet_builder.decode_arch_def([[stage] for stage in stages])
        arguments |= {"block_args": decoded, "stem_size": 8, "num_features": 32}
    make = functools.partial(timm.create_model, name) if kind is None else getattr(timm.models, kind)
    torch.manual_seed(0)
    model = make(**arguments, num_classes=10).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max():  # scales that begin at zero or one, biases
                parameter.copy_(torch.rand_like(parameter) + 0.5)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.skipif(not cases.INTERPRETED, reason="operands are on the CPU, where kernels are interpreted")
@pytest.mark.usefixtures("ieee", "few_programs")
@pytest.mark.parametrize("name", SMALL)
def test_by_kernels(name, timm, forced, counted):
    """Output and all gradients against float64."""
    arguments = dict(SMALL[name])
    size, layout = arguments.pop("size", 32), arguments.pop("layout", "nhwc")
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    model = small(timm, name, **arguments).to(memory_format=memory_format)
    x = torch.randn(2, 3, size, size).to(memory_format=memory_format)
    exact = copy.deepcopy(model).double()
    with counted["mode"]():
        refs = cases.step(exact, exact, x.double())
    with groupconv.enable():
        found = cases.step(model, model, x)
    assert counted["all"] == counted["enabled"] > 0
    assert forced["written"] >= forced["results"]
    for out, ref in zip(found, refs, strict=True):
        assert ref.any()
        assert cases.error(out, ref) <= 1e-5
