"""fold_batchnorm: what it folds, what it leaves, and that a folded model computes the same."""

import collections
import copy
import logging
import random
import types

import cases
import pytest
import torch
from torch import nn

import groupconv
from groupconv.folding import FoldedConv2d

ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True), "relu6": nn.ReLU6(), "leaky_relu": nn.LeakyReLU(), "silu": nn.SiLU(),
    "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "hardswish": nn.Hardswish(), "sigmoid": nn.Sigmoid(),
}  # fmt: skip


def trained(model):
    """A model in eval mode whose batch norms have seen and learned something."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            for tensor, least in (
                (norm.running_mean, None),
                (norm.running_var, 0.1),
                (norm.weight, 0.5),
                (norm.bias, None),
            ):
                if tensor is not None:
                    values = torch.randn(tensor.shape, generator=generator)
                    tensor.data.copy_(values if least is None else values.abs() + least)
    return model.eval()


def sequence(norm=None, activate=None, **arguments):
    arguments = {"kernel_size": 3, "padding": 1, "groups": 4} | arguments
    return trained(nn.Sequential(nn.Conv2d(8, 16, **arguments), norm or nn.BatchNorm2d(16), activate or nn.ReLU()))


def image(dtype=torch.float32):
    return torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(1), dtype=dtype)


def same(folded, model, x=None):
    """Whether a folded model computes what the model does in float64."""
    x = image() if x is None else x
    return cases.error(folded(x), copy.deepcopy(model).double()(x.double())) <= 4 * cases.bound("fp32", 64)


class Block(nn.Module):
    """As torchvision's Bottleneck: modules by name, one activation for all; subclasses are less plain."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.relu, self.act2 = nn.ReLU(), nn.SiLU()

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(y)
        y = self.bn2(y)
        y = self.act2(y)
        return self.conv3(y) + x


class Shared(Block):
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y))) + x


class ByFunction(Block):
    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(x)))


class ReadTwice(Block):
    def forward(self, x):
        y = self.conv2(x)
        return self.bn2(y) + y


class CalledTwice(Block):
    def forward(self, x):
        return self.bn2(self.conv2(self.bn2(self.conv2(x))))


class Sometimes(Block):
    def forward(self, x):
        y = self.conv2(x)
        if y.sum() > 1e6:
            return y
        return self.act2(self.bn2(y))


class OfTwoWays(Block):
    def forward(self, x, mask=None):
        y = self.conv2(x)
        return self.bn2(y) if mask is None else y * mask


class Data(Block):
    """Whatever it does, a norm follows the convolution at once."""

    def forward(self, x, mask=None):
        if x.sum() > 0 or isinstance(x, tuple):
            x = -x
        x = self.act2(self.bn2(self.conv2(x)))
        return x if mask is None else x * mask


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    model = sequence(activate=ACTIVATIONS[name])
    folded = groupconv.fold_batchnorm(model)
    assert [type(module) for module in folded] == [FoldedConv2d, nn.Identity, nn.Identity]
    assert folded[0].activation == name
    assert same(folded, model)


@pytest.mark.parametrize(
    ("norm", "arguments"),
    [
        (nn.BatchNorm2d(16, affine=False), {}),
        (nn.BatchNorm2d(16, eps=0.1), {"bias": False, "stride": 2}),
        (nn.SyncBatchNorm(16), {"dilation": 2, "padding": "same"}),
        (nn.BatchNorm2d(16), {"padding_mode": "reflect"}),
        (nn.BatchNorm2d(16), {"groups": 8, "kernel_size": (1, 3), "padding": (0, 1)}),
    ],
)
def test_convolutions_and_norms(norm, arguments):
    model = sequence(norm, **arguments)
    folded = groupconv.fold_batchnorm(model)
    assert isinstance(folded[0], FoldedConv2d)
    assert same(folded, model)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_rounded_once(dtype):
    """The folded weight is the nearest to the exact one, and the kernel's result that of this weight."""
    model = sequence().to(cases.MODES[dtype])
    folded, x = groupconv.fold_batchnorm(model), image(cases.MODES[dtype])
    conv, norm = model[0], model[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert torch.equal(folded[0].weight, (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype))
    assert folded(x).dtype == x.dtype
    assert cases.error(folded(x), copy.deepcopy(folded).double()(x.double())) <= cases.bound(dtype, 18)
    assert cases.error(folded(x), copy.deepcopy(model).double()(x.double())) <= 4 * cases.bound(dtype, 18)


def test_a_block_by_its_code():
    model = trained(nn.Sequential(Block(), Shared(), ByFunction(), Data()))
    folded = groupconv.fold_batchnorm(model)
    assert same(folded, model)
    found = {name: m.activation for name, m in folded.named_modules() if isinstance(m, FoldedConv2d)}
    assert found == {"0.conv2": "silu", "1.conv2": None, "2.conv2": None, "3.conv2": "silu"}
    assert isinstance(folded[1].relu, nn.ReLU)
    assert [type(block.bn1) for block in folded] == [nn.BatchNorm2d] * 4


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ReadTwice(), "no batch norm takes its result alone"),
        (CalledTwice(), "it or its batch norm is called or read more than once"),
        (Sometimes(), "no batch norm takes its result alone"),
        (OfTwoWays(), "no batch norm takes its result alone"),
        (sequence(nn.BatchNorm2d(16, track_running_stats=False)), "its batch norm goes by the batch's own statistics"),
        (sequence(nn.GroupNorm(4, 16)), "no batch norm takes its result alone"),
    ],
)
def test_what_is_left(model, reason, caplog):
    model = trained(model)
    with caplog.at_level(logging.INFO, logger="groupconv"):
        folded = groupconv.fold_batchnorm(model)
    assert not any(isinstance(module, FoldedConv2d) for module in folded.modules())
    assert f"left, {reason}" in caplog.text
    with torch.no_grad():
        assert torch.equal(folded(image()), model(image()))


def test_hooks_and_statistics_in_training_are_left():
    hooked, training = sequence(), sequence()
    hooked[1].register_forward_hook(lambda *_: None)
    training[1].train()
    for model in (hooked, training):
        assert not any(isinstance(module, FoldedConv2d) for module in groupconv.fold_batchnorm(model).modules())
    acting = sequence()
    acting[2].register_forward_hook(lambda module, arguments, result: result + 1)
    folded = groupconv.fold_batchnorm(acting)
    assert folded[0].activation is None
    assert same(folded, acting)


def test_the_model_stays_and_the_copy_refuses_its_state():
    """Whether it is loaded strictly or not; its own state it takes."""
    model = sequence()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = groupconv.fold_batchnorm(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"0 has its batch norm folded into it.*load it before fold_batchnorm"):
            folded.load_state_dict(state, strict=strict)
    assert same(folded, model)
    other = groupconv.fold_batchnorm(sequence(activate=nn.SiLU()))
    other.load_state_dict(folded.state_dict())
    assert torch.equal(other[0].weight, folded[0].weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(folded.state_dict())


def test_it_is_saved_copied_scripted_and_traced(tmp_path):
    model = sequence(activate=nn.SiLU())
    folded = groupconv.fold_batchnorm(model)
    torch.save(folded, tmp_path / "folded.pt")
    torch.save(folded.state_dict(), tmp_path / "state.pt")
    folded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for other in (
        torch.load(tmp_path / "folded.pt", weights_only=False),
        copy.deepcopy(folded),
        torch.jit.script(folded),
        torch.fx.symbolic_trace(folded),
        torch.jit.trace(folded, image()),
        groupconv.fold_batchnorm(folded),
    ):
        assert same(other, model)


def test_converted_models_are_folded_too():
    model = groupconv.convert(sequence(nn.BatchNorm2d(16)))
    folded = groupconv.fold_batchnorm(model)
    assert same(folded, model)
    assert groupconv.summarize(folded).converted == ("0",)


def test_arguments():
    with pytest.raises(TypeError, match=r"^fold_batchnorm: model is 1, but must be a torch\.nn\.Module$"):
        groupconv.fold_batchnorm(1)
    with pytest.raises(ValueError, match=r"^fold_batchnorm: model is training, but must be in eval mode"):
        groupconv.fold_batchnorm(sequence().train())


def test_gradients_reach_the_folded_weight():
    folded = groupconv.fold_batchnorm(sequence())
    folded(image()).sum().backward()
    assert folded[0].weight.grad is not None
    assert folded[0].bias.grad is not None


RESULTS = []  # that code keeps outside its modules
KEEPERS = {"kept": list, "kept last": lambda: collections.deque(maxlen=1), "kept by name": types.SimpleNamespace}


class Reader(nn.Module):
    """Reads what another module has, which no tracer sees: it takes two arguments."""

    def __init__(self, *read):
        super().__init__()
        self.read = read

    def forward(self, x, times=1):
        tensor = self.read[0]
        return x + times * (tensor(torch.ones(2, 8, 1, 1)) if isinstance(tensor, nn.Module) else tensor).sum()


class Hostile(nn.Module):
    """A chain in a module whose code has more to it."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU()
        if way == "alias":
            self.alias, self.norms, self.acts = self.conv, nn.ModuleList([self.bn]), [self.act]
        if way in ("part", "whole"):
            self.seq = nn.Sequential(self.conv, self.bn, self.act)
        if way == "head":
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 7 * 5, 8), self.act)
        if way in KEEPERS:
            self.seen = KEEPERS[way]()
        if way == "tied":
            self.reader = Reader(self.conv.weight)
        if way == "shared":
            self.reader = Reader(self.bn)

    def forward(self, x):
        if self.way == "alias":
            return self.acts[0](self.norms[0](self.alias(x)))
        if self.way == "part":
            return self.seq[0](x) if x.sum() > 1e6 else self.seq[0](x) + 1
        if self.way == "weight":
            return self.bn(self.conv(x)) * self.conv.weight.abs().sum()
        if self.way == "mode" and self.training:
            return self.act(2 * self.bn(self.conv(x)))
        if self.way == "frozen":
            with torch.no_grad():
                x = self.conv(x)
            return self.act(self.bn(x))
        y = self.conv(x)
        if self.way in ("kept", "kept last"):
            self.seen.append(y)
        if self.way == "kept by name":
            self.seen.last = y
        if self.way == "outside":
            RESULTS.append(y)
        y = self.act(self.bn(y))
        if self.way == "gradients" and not torch.is_grad_enabled():
            return self.bn(y)
        if self.way == "random" and random.random() < 0.5:
            return self.act(self.bn(self.conv(x)))
        if self.way == "drawn" and torch.rand(()) < 0.5:
            return self.act(self.bn(self.conv(x)))
        if self.way == "bias" and self.conv.bias is None:
            return 2 * y
        if self.way == "features":
            return y * self.bn.num_features
        if self.way in ("tied", "shared"):
            return self.reader(y)
        return self.head(y) if self.way == "head" else y


HOSTILE = (
    "alias", "part", "whole", "head", "patched", "patched norm", "weight", "mode", "frozen", "kept", "kept last",
    "kept by name", "outside", "gradients", "random", "drawn", "bias", "features", "tied", "shared",
)  # fmt: skip
LEFT = ("part", "patched", "weight", "kept", "kept last", "kept by name", "outside", "random", "drawn", "bias", "tied")


def made(way):
    """A model, and with some ways functions of it in place of its code."""
    torch.manual_seed(0)
    model = trained(Hostile(way))
    if way == "patched":
        model.forward = lambda x: model.act(model.conv(x))
    if way == "patched norm":
        model.bn.forward = lambda x: 3 * nn.BatchNorm2d.forward(model.bn, x)
    return model


@pytest.mark.parametrize("way", HOSTILE)
def test_code_that_has_more_to_it(way):
    """Folded or left, fused or left: the same numbers and gradients, and nothing kept of a look."""
    for training in (False, True):
        results = []
        for change in ("none", "fuse", "fold"):
            model = made(way)
            if change == "fuse":
                groupconv.convert(model, fuse="bn_act")
            elif change == "fold" and not training and way != "patched norm":  # whose function is of the first model
                model = groupconv.fold_batchnorm(model)
            x = image().requires_grad_()
            random.seed(0)
            y = model.train(training)(x)
            with torch.no_grad():
                other = model(x)
            y.square().sum().backward()
            norm = model.bn if isinstance(model.bn, nn.BatchNorm2d) else None
            results.append((y.detach(), other, x.grad, None if norm is None else norm.bias.grad))
            seen = getattr(model, "seen", [])
            assert not any(isinstance(kept, torch.fx.Proxy) for kept in getattr(seen, "__dict__", seen))
            if change == "fold":
                assert (way in LEFT) <= (type(model.bn) is nn.BatchNorm2d)
        for others in results[1:]:
            for out, ref in zip(others, results[0], strict=True):
                if out is not None:
                    torch.testing.assert_close(out, ref, rtol=1e-3, atol=1e-3)


def test_a_fused_model_can_be_folded():
    model = sequence(activate=nn.SiLU())
    fused = groupconv.convert(copy.deepcopy(model), fuse="bn_act")
    folded = groupconv.fold_batchnorm(fused)
    assert isinstance(folded[0], FoldedConv2d)
    assert same(folded, model)
    assert same(fused, model)


def test_a_state_dict_of_other_layers_is_taken():
    folded = groupconv.fold_batchnorm(nn.Sequential(sequence(), nn.Conv2d(16, 4, 1)).eval())
    folded.load_state_dict({"1.bias": torch.ones(4)}, strict=False)
    assert torch.equal(folded[1].bias, torch.ones(4))
    assert all(isinstance(value, torch.Tensor) for value in folded.state_dict().values())
