"""timm's models, enabled and converted, on a CPU: every grouped call takes our way, and nothing changes to the bit."""

import contextlib
import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import groupconv
from groupconv import enabling

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="no timm: pip install timm"),
]
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
