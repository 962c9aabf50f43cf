"""groupconv.Conv2d beside nn.Conv2d, and the conversion of models in place."""

import copy
import functools
import logging
import pickle
import warnings

import cases
import pytest
import torch
from torch import nn
from torch.ao.nn import quantized
from torch.nn.utils import parametrizations, parametrize

import groupconv
from groupconv import ConversionSummary, convert, layers, revert, summarize, triton_conv

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
    recorded_calls = []

    def recorded(input, weight, bias, stride, padding, dilation, groups):
        recorded_calls.append({"shape": tuple(input.shape), "padding": padding, "groups": groups})
        return triton_conv(input, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(layers, "triton_conv", recorded)
    return recorded_calls


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
    monkeypatch.setattr(layers, "triton_conv", functools.partial(triton_conv, backend="triton"))
    theirs, ours = (layer.to(device) for layer in pair(**options))
    x = pixels(6).to(device)
    for out, ref in zip(cases.step(ours, ours, x), cases.step(theirs, theirs, x), strict=True):
        torch.testing.assert_close(out, ref)


OTHERS = {
    "conv1d": (nn.Conv1d, {"stride": 2, "padding": 2}),
    "conv1d_same": (nn.Conv1d, {"padding": "same", "dilation": 2}),
    "conv1d_reflect": (nn.Conv1d, {"padding": 1, "padding_mode": "reflect", "bias": False}),
    "transposed1d": (nn.ConvTranspose1d, {"stride": 2, "padding": 1, "output_padding": 1}),
    "transposed2d": (nn.ConvTranspose2d, {"stride": 2, "dilation": (1, 2)}),
}


def other(name, device="cpu"):
    """A layer of torch.nn, ours with the same parameters, and an input."""
    kind, options = OTHERS[name]
    torch.manual_seed(0)
    theirs = kind(6, 4, 3, groups=2, **options).to(device)
    ours = getattr(groupconv, kind.__name__)(6, 4, 3, groups=2, **options).to(device)
    ours.load_state_dict(theirs.state_dict())
    x = pixels(6).to(device)
    return theirs, ours, x if kind is nn.ConvTranspose2d else x[..., 0]


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_kinds(name):
    """On CPU tensors they are torch.nn's to the bit, for tools too; conversion changes the class alone."""
    theirs, ours, x = other(name)
    for values in (x, x[0]):
        for out, ref in zip(cases.step(ours, ours, values), cases.step(theirs, theirs, values), strict=True):
            assert torch.equal(out, ref)
    assert repr(ours) == repr(theirs)
    expected = theirs(x)
    model = nn.Sequential(theirs)
    assert type(convert(model)[0]) is type(ours)
    for made in (model, copy.deepcopy(model), torch.jit.trace(model, x), torch.jit.script(model)):
        assert torch.equal(made(x), expected)
    graph = torch.fx.symbolic_trace(model).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    assert type(revert(model)[0]) is OTHERS[name][0]
    if isinstance(theirs, nn.modules.conv._ConvTransposeNd):
        size = [size + 1 for size in nn.Sequential(theirs)(x).shape[2:]]
        if name == "transposed2d":
            assert torch.equal(ours(x, size), theirs(x, size))
        with pytest.raises(ValueError, match="requested an output size of"):
            ours(x, [100] * (x.dim() - 2))


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_kinds_by_our_kernels(name, device, monkeypatch):
    theirs, ours, x = other(name, device)
    function = {nn.Conv1d: "conv1d", nn.ConvTranspose1d: "conv_transpose1d"}.get(type(theirs), "conv_transpose2d")
    monkeypatch.setattr(layers, function, functools.partial(getattr(groupconv, function), backend="triton"))
    for out, ref in zip(cases.step(ours, ours, x), cases.step(theirs, theirs, x), strict=True):
        torch.testing.assert_close(out, ref)


@pytest.mark.parametrize("kernel", [5, (7, 3), 4], ids=str)
def test_the_drop_in_of_large_kernels(kernel):
    """Its parameters are those of the layer whose name it has: a depthwise convolution's."""
    layer = groupconv.DepthWiseConv2dImplicitGEMM(6, kernel, bias=True)
    weight, bias = layer.weight, layer.bias
    assert list(layer.state_dict()) == ["weight", "bias"]
    padding = [size // 2 for size in weight.shape[2:]]
    expected = nn.functional.conv2d(pixels(6), weight, bias, padding=padding, groups=6)
    assert torch.equal(layer(pixels(6)), expected)
    assert groupconv.DepthWiseConv2dImplicitGEMM(6, kernel).bias is None
    assert summarize(revert(layer)).converted == ("",)
    assert torch.equal(copy.deepcopy(layer)(pixels(6)), expected)


def test_padding_of_each_side():
    x = pixels(6)
    ours = groupconv.Conv2d(6, 4, 3, padding=(2, 0, 1, 0), groups=2)
    assert torch.equal(ours(x), nn.Conv2d._conv_forward(
        groupconv.Conv2d(6, 4, 3, groups=2), nn.functional.pad(x, (1, 0, 2, 0)), ours.weight, ours.bias
    ))  # fmt: skip
    for layer, x_ in (
        (groupconv.Conv2d(6, 6, 3, padding=(1, 0, 0, 0), groups=6, padding_mode="reflect"), x),
        (groupconv.Conv1d(6, 6, 3, padding=(1, 0), groups=6, padding_mode="circular"), x[..., 0]),
    ):
        with pytest.raises(
            ValueError, match=r"padding is \(1, 0.*\), but of each side it must be of padding_mode='zeros'"
        ):
            layer(x_)
    assert torch.equal(revert(nn.Sequential(ours))(x), ours(x))
    assert type(ours) is groupconv.Conv2d  # torch.nn's has no such padding
    causal = groupconv.Conv1d(6, 6, 4, padding=(3, 0), groups=6)
    y = causal(x[..., 0])
    assert y.shape == x[..., 0].shape
    assert torch.equal(causal(x[..., :4, 0]), y[..., :4])
    for layer, x_ in ((ours, x), (causal, x[..., 0])):
        for made in (torch.jit.script(layer), torch.jit.script(nn.Sequential(layer)), torch.jit.trace(layer, x_)):
            torch.testing.assert_close(made(x_), layer(x_))


def test_what_is_called(calls):
    """Zeros are the convolution's own padding; any other padding is there before it."""
    pair(padding=1)[1](pixels(6))
    pair(padding=1, padding_mode="circular")[1](pixels(6))
    assert calls == [
        {"shape": (2, 6, 7, 6), "padding": (1, 1), "groups": 2},
        {"shape": (2, 6, 9, 8), "padding": (0, 0), "groups": 2},
    ]


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
    assert type(convert(nn.Conv3d(4, 4, 3, groups=2))) is nn.Conv3d
    assert summarize(groupconv.Conv2d(4, 4, 3)) == ConversionSummary(("",), {})


def test_lazy_layer_is_converted_once_it_has_its_channels():
    layer = nn.LazyConv2d(4, 3, groups=2)
    assert type(convert(layer)) is nn.LazyConv2d
    layer(pixels())
    assert type(convert(layer)) is groupconv.Conv2d


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


# --- What was converted, and back ------------------------------------------------------------------------------------


class Bare(nn.Conv2d):
    """A subclass without a forward of its own."""


class Unpadded(nn.Conv2d):
    """A subclass that overrides what forward calls."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias)


def every_kind():
    """A model of layers that are ours to convert and of all that are not, some in two places."""
    grouped = functools.partial(nn.Conv2d, 4, 4, 3, groups=2)
    shared = grouped()
    waiting = grouped()
    waiting.qconfig = object()
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(4, 4, 1),
            "block": nn.Sequential(grouped(), nn.Sequential(shared, nn.ReLU())),
            "again": shared,
            "scaled": Scaled(4, 4, 3, groups=2),
            "bare": Bare(4, 4, 3, groups=2),
            "unpadded": Unpadded(4, 4, 3, groups=2),
            "normed": parametrizations.weight_norm(grouped()),
            "lazy": nn.LazyConv2d(4, 3, groups=2),
            "quantised": quantized.Conv2d(4, 4, 3, groups=2),
            "waiting": waiting,
            "scripted": torch.jit.script(grouped()),
            "script": torch.jit.script(nn.Sequential(grouped(), nn.ReLU())),
            "others": nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3, groups=2)),
            "volumes": nn.Sequential(nn.Conv3d(4, 4, 3, groups=2), quantized.Conv3d(4, 4, 3)),
            "others_quantised": nn.Sequential(quantized.Conv1d(4, 4, 3), quantized.ConvTranspose2d(4, 4, 3)),
        }
    )


LEFT = {
    "stem": "one group",
    "scaled": "test_modules.Scaled, a subclass with its own forward, whose calls enable() takes",
    "bare": "test_modules.Bare, a subclass that enable() takes",
    "unpadded": "test_modules.Unpadded, a subclass with its own forward, whose calls enable() takes",
    "normed": "parametrized: convert first",
    "lazy": "lazy until its first call",
    "quantised": "quantised",
    "waiting": "to be quantised: it has a qconfig",
    "scripted": "compiled by torch.jit",
    "script.0": "compiled by torch.jit",
    "others_quantised.0": "quantised",
    "others_quantised.1": "quantised",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Lazy modules")
def test_summary_of_every_kind():
    model = every_kind()
    mine = ("block.0", "block.1.0", "others.0", "others.1")
    kinds = [type(module) for module in model.modules()]
    before = summarize(model)
    assert before == ConversionSummary((), LEFT | dict.fromkeys(mine, "not converted yet"))
    assert summarize(convert(model)) == ConversionSummary(mine, LEFT)
    assert model["again"] is model["block"][1][0]
    assert type(model["again"]) is groupconv.Conv2d
    assert revert(model) is model
    assert [type(module) for module in model.modules()] == kinds
    assert summarize(model) == before


def test_summary_in_words():
    assert str(summarize(convert(network()))) == (
        "2 of 4 convolutions by groupconv\n"
        "  converted: 1.0, 2\n"
        "  one group: 0\n"
        "  test_modules.Scaled, a subclass with its own forward, whose calls enable() takes: 3"
    )
    assert str(summarize(convert(nn.Conv2d(4, 4, 3, groups=2)))) == (
        "1 of 1 convolutions by groupconv\n  converted: the model itself"
    )
    assert str(summarize(nn.Linear(2, 2))) == "0 of 0 convolutions by groupconv"


def test_convert_says_so_once_to_the_logger(caplog, capfd):
    with caplog.at_level(logging.INFO, "groupconv"):
        model = convert(network())
        (record,) = caplog.records
        summarize(model)
        revert(model)
        assert len(caplog.records) == 1
    assert (record.name, record.levelno) == ("groupconv", logging.INFO)
    assert record.getMessage() == f"convert: {summarize(convert(network()))}"
    with caplog.at_level(logging.WARNING, "groupconv"):
        convert(network())
    assert len(caplog.records) == 1
    assert capfd.readouterr() == ("", "")


def test_revert_keeps_everything_but_the_class(calls):
    model = convert(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept, names = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()], list(model.state_dict())
    expected = model(pixels())
    assert len(calls) == 2
    assert torch.equal(revert(model)(pixels()), expected)
    assert len(calls) == 2
    assert [id(tensor) for tensor in model.state_dict(keep_vars=True).values()] == kept
    assert list(model.state_dict()) == names
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))
    assert [type(m) for m in model.modules()] == [type(m) for m in network().modules()]
    assert summarize(revert(convert(model))) == summarize(network())


def test_layer_converted_and_then_parametrized_counts_as_ours():
    layer = parametrizations.weight_norm(convert(nn.Conv2d(4, 4, 3, groups=2)))
    assert summarize(layer).converted == ("",)
    assert isinstance(revert(layer), groupconv.Conv2d)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(revert(layer)) is nn.Conv2d


def test_warnings_of_what_is_not_converted():
    with pytest.warns(UserWarning, match=r"^convert: the model has no grouped convolution, and stays as it is$"):
        convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    with pytest.warns(UserWarning, match="no grouped convolution"):
        convert(nn.Linear(2, 2))
    quantised = torch.ao.nn.quantized.Conv2d(4, 4, 1, groups=2)
    with pytest.warns(UserWarning, match=r"^convert: 1 grouped convolutions stay as they are: 0 is quantised$"):
        convert(nn.Sequential(quantised, nn.Conv2d(4, 4, 1, groups=2)))
    sharded = type("FSDPConv2d", (nn.Conv2d,), {"unshard": lambda self: None})(4, 4, 1, groups=2)  # as PyTorch makes it
    with pytest.warns(UserWarning, match=r"0 is sharded by itself \(fully_shard\): convert first"):
        convert(nn.Sequential(sharded))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(convert(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), torch.ao.nn.quantized.Conv2d(4, 4, 1))))


def test_conversion_in_what_is_compiled():
    """Outside of one graph it breaks the graph."""

    def call(x):
        return convert(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)))(x)

    x = torch.ones(1, 4, 2, 2)
    with pytest.raises(Exception, match=r"convert: call it outside of what torch\.compile compiles|Dynamo|Unsupported"):
        torch.compile(call, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    assert torch.compile(call, backend="eager")(x).shape == x.shape
