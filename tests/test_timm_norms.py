"""A batch norm with an activation of its own, as timm's models have them: folded, and fused in training."""

import copy
import logging
import sys
import types

import cases
import pytest
import torch
import torch.nn.functional as F
from test_batch_norm import trained as losses
from test_folding import image, same, trained
from torch import nn

import groupconv
from groupconv import batch_norm
from groupconv.folding import FoldedConv2d
from groupconv.fusing import BatchNormAct2d as Fused


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of this name does."""

    def __init__(self, size, act=nn.ReLU, drop=nn.Identity, **norm):
        super().__init__(size, **norm)
        self.drop, self.act = drop(), act()

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4-D input")
        own = self.training or self.running_mean is None
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        mean, var = (
            (self.running_mean, self.running_var) if not self.training or self.track_running_stats else (None,) * 2
        )
        return self.act(self.drop(F.batch_norm(x, mean, var, self.weight, self.bias, own, self.momentum, self.eps)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    def __init__(self, size):
        super().__init__(size)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    """The classes lie where timm's do."""
    for name in ("timm", "timm.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, kinds in (("norm_act", (BatchNormAct2d, SyncBatchNormAct)), ("activations", (Swish,))):
        module = types.ModuleType(f"timm.layers.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for kind in kinds:
            setattr(module, kind.__name__, kind)
            monkeypatch.setattr(kind, "__module__", module.__name__)


class ConvNormAct(nn.Module):
    def __init__(self, *sizes, groups, norm):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(*sizes, 3, padding=1, groups=groups, bias=False), norm

    def forward(self, x):
        return self.bn(self.conv(x))


def network(norm=BatchNormAct2d, **arguments):
    torch.manual_seed(0)
    return nn.Sequential(
        ConvNormAct(8, 12, groups=4, norm=norm(12, **arguments)),
        ConvNormAct(12, 12, groups=12, norm=BatchNormAct2d(12, Swish)),
    )


def test_folding():
    model = trained(network())
    folded = groupconv.fold_batchnorm(model)
    found = [(type(block.conv), block.conv.activation, type(block.bn)) for block in folded]
    assert found == [(FoldedConv2d, "relu", nn.Identity), (FoldedConv2d, "silu", nn.Identity)]
    assert same(folded, model)


@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.5}], ids=str)
def test_training_is_the_same(norm, monkeypatch):
    model = network(**norm)
    fused = groupconv.convert(copy.deepcopy(model), fuse="bn_act")
    assert all(isinstance(block.bn, Fused) and isinstance(block.bn, BatchNormAct2d) for block in fused)
    exact = copy.deepcopy(model).double()
    assert list(fused.state_dict()) == list(model.state_dict())
    activated = []
    whole = batch_norm.computed
    monkeypatch.setattr(
        batch_norm, "computed", lambda *args, **named: activated.append(args[8]) or whole(*args, **named)
    )
    assert cases.error(losses(fused), losses(exact)) <= 1e-4
    assert activated == ["relu", "silu"] * 3
    for name, tensor in fused.state_dict().items():
        torch.testing.assert_close(tensor.double(), exact.state_dict()[name].double(), rtol=1e-3, atol=1e-4)
    groupconv.revert(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda size: BatchNormAct2d(size, nn.Mish), "its batch norm has an activation that is none of triton_conv's"),
        (lambda size: BatchNormAct2d(size, drop=nn.Dropout2d), "a dropout follows its batch norm"),
        (lambda size: hooked(BatchNormAct2d(size)), "its batch norm's activation has hooks, or a forward of its own"),
        (lambda size: patched(BatchNormAct2d(size)), "its batch norm's activation has hooks, or a forward of its own"),
    ],
    ids=["Mish", "dropout", "hooks", "patched"],
)
def test_what_is_left(norm, reason, caplog):
    model = trained(network(norm))
    with caplog.at_level(logging.INFO, logger="groupconv"):
        folded = groupconv.fold_batchnorm(model)
        fused = groupconv.convert(copy.deepcopy(model), fuse="bn_act")
    assert isinstance(folded[0].conv, FoldedConv2d) is isinstance(fused[0].bn, Fused) is False
    assert caplog.text.count(f"0.conv: left, {reason}") == 2
    assert same(folded, model)
    assert same(fused, model)


class Outside(ConvNormAct):
    """Takes a part of its norm, or reads one."""

    def __init__(self, part):
        super().__init__(8, 8, groups=4, norm=BatchNormAct2d(8, nn.SiLU))
        self.part = part

    def forward(self, x):
        y = super().forward(x)
        if self.part == "act":
            return self.bn.act(y)
        return y + (self.bn.weight if self.part == "weight" else self.bn.running_mean)[:, None, None]


@pytest.mark.parametrize("part", ["act", "weight", "running_mean"])
def test_a_part_that_is_used_from_outside(part, caplog):
    model = trained(nn.Sequential(Outside(part)))
    with caplog.at_level(logging.INFO, logger="groupconv"):
        folded = groupconv.fold_batchnorm(model)
    assert "0.conv: left, it or its batch norm is called or read more than once" in caplog.text
    assert same(folded, model)


def hooked(norm):
    norm.act.register_forward_hook(lambda module, x, y: 2 * y)
    return norm


def patched(norm):
    norm.act.forward = torch.square
    return norm


def test_no_activation_and_sync_batch_norm(caplog):
    """Are folded, but have nothing to gain, or nothing that is certain, in training."""
    for norm, reason in (
        (lambda size: BatchNormAct2d(size, nn.Identity), "its batch norm has no activation"),
        (SyncBatchNormAct, "a SyncBatchNorm follows"),
    ):
        model = trained(network(norm))
        folded = groupconv.fold_batchnorm(model)
        assert isinstance(folded[0].conv, FoldedConv2d)
        assert same(folded, model)
        with caplog.at_level(logging.INFO, logger="groupconv"):
            groupconv.convert(model, fuse="bn_act")
        assert f"0.conv: left, {reason}" in caplog.text
        assert not isinstance(model[0].bn, Fused)


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: hooked(norm),
        lambda norm: patched(norm),
        lambda norm: setattr(norm, "act", nn.Tanh()),
        lambda norm: setattr(norm, "act", nn.SiLU()),
        lambda norm: setattr(norm, "drop", nn.Dropout(1.0)),
        lambda norm: norm.register_forward_hook(lambda module, x, y: 2 * y),
        lambda norm: torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus()),
    ],
    ids=range(7),
)
def test_what_is_changed_afterwards(change):
    plain, fused = network(), groupconv.convert(network(), fuse="bn_act")
    results = []
    for model in (plain, fused):
        change(model[0].bn)
        x = image().requires_grad_()
        y = model(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for out, ref in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(out, ref, rtol=1e-4, atol=1e-4)


def test_copies_states_and_tracers(tmp_path):
    model, plain = groupconv.convert(network(), fuse="bn_act"), network()
    torch.save(model, tmp_path / "model.pt")
    loaded, copied = torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)
    assert type(loaded[0].bn) is type(copied[0].bn) is type(model[0].bn)
    assert copied[0].bn.weight is not model[0].bn.weight
    loaded.load_state_dict(plain.state_dict())
    x = image()
    for each in (model, loaded, copied, plain):
        each.eval()
    for made in (torch.fx.symbolic_trace(model), torch.jit.trace(model, x), loaded, copied):
        torch.testing.assert_close(made(x), plain(x))
    plain.train()
    model.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(model[0].bn.running_var, plain[0].bn.running_var)
