"""groupconv.Conv2d beside nn.Conv2d, and the conversion of models in place."""

import copy
import functools
import pickle

import cases
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import groupconv
from groupconv import convert, modules, triton_conv

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
FORMS = {
    "plain": {},
    "no_bias": {"bias": False},
    "strided": {"stride": (2, 1), "padding": (1, 0)},
    "dilated": {"dilation": (1, 2), "padding": 2},
    "valid": {"padding": "valid"},
    "same": {"padding": "same", "dilation": 2},
    "same_even": {"padding": "same", "kernel_size": (2, 4)},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "same_reflect": {"padding": "same", "padding_mode": "reflect", "kernel_size": (2, 3)},
}


class Scaled(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input):
        return 2 * super().forward(input)


def pair(**options):
    """nn.Conv2d and ours with the same parameters."""
    torch.manual_seed(0)
    theirs = nn.Conv2d(6, 4, **{"kernel_size": 3, "groups": 2, **options})
    ours = groupconv.Conv2d(6, 4, **{"kernel_size": 3, "groups": 2, **options})
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 1),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        Scaled(8, 8, 3, groups=2),
    )


def pixels(channels=4):
    return torch.randn(2, channels, 7, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """The keywords of each call that a module makes of triton_conv."""
    found = []

    def recorded(input, weight, bias, stride, padding, dilation, groups):
        found.append({"shape": tuple(input.shape), "padding": padding, "groups": groups})
        return triton_conv(input, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(modules, "triton_conv", recorded)
    return found


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_same_numbers_as_nn_conv2d(options):
    """On CPU tensors both are F.conv2d, to the bit."""
    theirs, ours = pair(**options)
    for x in (pixels(6), pixels(6).contiguous(memory_format=torch.channels_last), pixels(6)[0]):
        for out, ref in zip(cases.step(ours, ours, x), cases.step(theirs, theirs, x), strict=True):
            assert torch.equal(out, ref)
    assert repr(ours) == repr(theirs)


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("options", [FORMS["strided"], FORMS["same_even"], FORMS["circular"]], ids=str)
def test_same_numbers_by_our_kernels(options, device, monkeypatch):
    monkeypatch.setattr(modules, "triton_conv", functools.partial(triton_conv, backend="triton"))
    theirs, ours = (layer.to(device) for layer in pair(**options))
    x = pixels(6).to(device)
    for out, ref in zip(cases.step(ours, ours, x), cases.step(theirs, theirs, x), strict=True):
        torch.testing.assert_close(out, ref)


def test_what_is_called(calls):
    """Zeros are the convolution's own padding; any other padding is there before it."""
    pair(padding=1)[1](pixels(6))
    pair(padding=1, padding_mode="circular")[1](pixels(6))
    assert calls == [
        {"shape": (2, 6, 7, 6), "padding": (1, 1), "groups": 2},
        {"shape": (2, 6, 9, 8), "padding": (0, 0), "groups": 2},
    ]


def test_bad_input_raises_as_nn_conv2d():
    theirs, ours = pair()
    with pytest.raises(RuntimeError) as expected:
        theirs(pixels(5))
    with pytest.raises(RuntimeError) as found:
        ours(pixels(5))
    assert str(found.value) == str(expected.value)


def test_module_compiles():
    torch._dynamo.reset()
    _, ours = pair(padding=1)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for out, ref in zip(cases.step(compiled, ours, pixels(6)), cases.step(ours, ours, pixels(6)), strict=True):
        torch.testing.assert_close(out, ref)


def test_convert_takes_grouped_layers_alone(calls):
    model = network()
    expected = cases.step(model, model, pixels())
    kept = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    names, before = list(model.state_dict()), dict(model.named_modules())
    assert convert(model) is model
    assert dict(model.named_modules()) == before
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == kept
    assert list(model.state_dict()) == names
    assert [type(m) for m in model.modules() if isinstance(m, nn.Conv2d)] == [
        nn.Conv2d, groupconv.Conv2d, groupconv.Conv2d, Scaled,
    ]  # fmt: skip
    assert not calls
    for out, ref in zip(cases.step(model, model, pixels()), expected, strict=True):
        assert torch.equal(out, ref)
    assert [call["groups"] for call in calls] == [4, 8]
    convert(model)
    assert type(model[2]) is groupconv.Conv2d


def test_convert_of_a_lone_layer():
    layer = nn.Conv2d(4, 4, 3, groups=2)
    assert convert(layer) is layer
    assert type(layer) is groupconv.Conv2d
    ungrouped = nn.Conv2d(4, 4, 3)
    assert type(convert(ungrouped)) is nn.Conv2d
    assert type(convert(nn.Conv1d(4, 4, 3, groups=2))) is nn.Conv1d


def test_lazy_layer_is_converted_once_it_has_its_channels():
    layer = nn.LazyConv2d(4, 3, groups=2)
    assert type(convert(layer)) is nn.LazyConv2d
    layer(pixels())
    assert type(convert(layer)) is groupconv.Conv2d


def test_parametrized_layer_is_left_alone():
    """Its class is a subclass of the layer's; a layer converted first keeps ours below its own."""
    layer = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=2))
    parametrized = type(layer)
    assert type(convert(layer)) is parametrized
    assert not isinstance(layer, groupconv.Conv2d)
    assert isinstance(parametrizations.weight_norm(convert(nn.Conv2d(4, 4, 3, groups=2))), groupconv.Conv2d)


def test_hooks_and_optimizer_go_on():
    layer = nn.Conv2d(4, 4, 3, groups=2)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    convert(layer)
    before = layer.weight.detach().clone()
    layer(pixels()).sum().backward()
    optimizer.step()
    assert seen == ["before", (2, 4, 5, 4)]
    torch.testing.assert_close(layer.weight, before - 0.1 * layer.weight.grad)
    assert layer.weight.grad.norm() > 0


def test_state_dict_goes_both_ways():
    theirs, ours = network(), convert(network())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(-1, 1)
    ours.load_state_dict(theirs.state_dict())
    back = network()
    back.load_state_dict(ours.state_dict())
    expected = theirs(pixels())
    assert torch.equal(ours(pixels()), expected)
    assert torch.equal(back(pixels()), expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies_are_ours(copied, calls):
    model = convert(network()).eval()
    copy_ = copied(model)
    assert type(copy_[2]) is groupconv.Conv2d
    assert copy_[2].weight is not model[2].weight
    assert torch.equal(copy_(pixels()), model(pixels()))
    assert len(calls) == 4
