"""conv_bn_act and convert(fuse="bn_act"): batch norm and activation with the convolution, in training."""

import copy
import itertools
import logging

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import groupconv
from groupconv import batch_norm
from groupconv.activations import ACTIVATIONS
from groupconv.batch_norm import apply
from groupconv.fusing import BatchNormAct2d, PassingReLU, PassingSiLU

pytestmark = pytest.mark.usefixtures("ieee")
SHAPES = {"odd": (3, 6, 5, 7), "many channels": (2, 70, 4, 3), "one row": (1, 3, 1, 5), "one image": (1, 1, 40, 70)}
NAMES = ("z", "dy", "dweight", "dbias", "running mean", "running var")


def operands(shape, dtype=torch.float32, view="nchw", offset=0.0, affine=True):
    """y, running mean and variance, weight and bias; those that are differentiable want gradients."""
    generator = torch.Generator().manual_seed(0)
    y = (2 * torch.randn(shape, generator=generator) + offset).to(dtype)
    mean, weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(3))
    var = torch.rand(shape[1], generator=generator) + 0.5
    y = cases.lay_out(y, view).requires_grad_()
    return y, mean, var, *((weight.requires_grad_(), bias.requires_grad_()) if affine else (None, None))


def computed(function, tensors, training, activation, dz, momentum=0.1, eps=1e-5):
    """What a function makes of copies of operands: its result, gradients, and running statistics, by name."""
    y, mean, var, weight, bias = (
        None if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in tensors
    )
    wanted = [t.requires_grad_() for t in (y, weight, bias) if t is not None]
    z = function(y, mean, var, weight, bias, training, momentum, eps, activation)
    grads = torch.autograd.grad(z, wanted, dz.to(z.dtype))
    return dict(zip(NAMES, (z.detach(), *grads, *[None] * (3 - len(grads)), mean, var), strict=True))


def exact(tensors):
    return [None if t is None else t.detach().double() for t in tensors]


def worst(outs, refs):
    errors = {name: cases.error(out, refs[name]) for name, out in outs.items() if out is not None}
    return max(errors.values()), errors


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("view", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, view, training, device):
    number = list(itertools.product(SHAPES, ("nchw", "nhwc"), (True, False))).index((shape, view, training))
    activation = (None, *ACTIVATIONS)[number % (len(ACTIVATIONS) + 1)]
    tensors = [t.to(device) for t in operands(SHAPES[shape], view=view)]
    dz = torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(1)).to(device)
    assert batch_norm.serves(*tensors, training, 0.1, 1e-5)
    outs = computed(apply, tensors, training, activation, dz)
    refs = computed(batch_norm._by_torch, exact(tensors), training, activation, dz.double())
    assert outs["z"].stride() == outs["dy"].stride() == tensors[0].stride()
    assert worst(outs, refs)[0] <= 1e-5, worst(outs, refs)[1]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, device):
    tensors = [t.to(device) for t in operands((2, 4, 5, 6), view="nhwc")]
    dz = torch.randn((2, 4, 5, 6), generator=torch.Generator().manual_seed(1)).to(device)
    outs = computed(apply, tensors, True, activation, dz)
    refs = computed(batch_norm._by_torch, exact(tensors), True, activation, dz.double())
    assert worst(outs, refs)[0] <= 1e-5, worst(outs, refs)[1]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("affine", [True, False])
def test_half_precision(dtype, affine, device):
    tensors = operands((2, 40, 6, 5), cases.MODES[dtype], "nhwc", affine=affine)
    tensors = [None if t is None else t.to(device) for t in tensors]
    dz = torch.randn((2, 40, 6, 5), generator=torch.Generator().manual_seed(1)).to(device, cases.MODES[dtype])
    outs = computed(apply, tensors, True, "silu", dz)
    refs = computed(batch_norm._by_torch, exact(tensors), True, "silu", dz.double())
    assert worst(outs, refs)[0] <= cases.bound(dtype, 64), worst(outs, refs)[1]


@pytest.mark.parametrize("offset", [1e3, -3e4])
@pytest.mark.parametrize("view", ["nchw", "nhwc"])
def test_variance_far_from_zero(offset, view, device):
    """Where the mean is thousands of standard deviations away, squares would have nothing left of the variance."""
    y, *_ = operands((4, 5, 17, 13), view=view, offset=offset)
    mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
    apply(y.detach().to(device), mean, var, None, None, True, 1.0, 1e-5, None)
    exact_ = y.detach().double().transpose(0, 1).reshape(5, -1)
    assert cases.error(var, exact_.var(1)) <= 1e-5
    assert cases.error(mean, exact_.mean(1)) <= 1e-6


def test_what_no_kernel_takes_is_torchs(device):
    """Layouts with gaps, fp64, and what is wrong, with torch's own error."""
    y, mean, var, weight, bias = (t.detach().to(device) for t in operands((2, 4, 6, 6)))
    for other in (y[:, :, ::2], y.double(), y.transpose(2, 3)):
        same = [other, *(t.to(other.dtype) for t in (mean, var, weight, bias))]
        assert not batch_norm.serves(*same, True, 0.1, 1e-5)
        ours, theirs = ([t.clone() if i in (1, 2) else t for i, t in enumerate(same)] for _ in range(2))
        assert torch.equal(
            apply(*ours, True, 0.1, 1e-5, "relu"), batch_norm._by_torch(*theirs, True, 0.1, 1e-5, "relu")
        )
        assert torch.equal(ours[1], theirs[1])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        apply(y[:1, :, :1, :1], mean, var, weight, bias, True, 0.1, 1e-5, None)
    with pytest.raises(RuntimeError, match="running_mean"):
        apply(y, None, None, weight, bias, False, 0.1, 1e-5, None)
    with pytest.raises(ValueError, match="eps must be positive"):
        apply(y, mean, var, weight, bias, True, 0.1, 0.0, None)
    negated = torch._neg_view(-weight)
    found, expected = (apply(y, None, None, gamma, bias, True, 0.1, 1e-5, None) for gamma in (negated, weight))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_second_derivative(activation, training, device):
    y, mean, var, weight, bias = (
        t.detach().to(device).requires_grad_(i in (0, 3, 4)) for i, t in enumerate(operands((2, 3, 4, 5)))
    )
    exact_ = [t.detach().double().requires_grad_(t.requires_grad) for t in (y, mean, var, weight, bias)]
    dz = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def second(function, tensors, dz):
        leaves = [tensors[i] for i in (0, 3, 4)]
        z = function(*tensors, training, 0.0, 1e-5, activation)
        first = torch.autograd.grad(z, leaves, dz, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves, allow_unused=True)

    outs = second(apply, (y, mean, var, weight, bias), dz)
    refs = second(batch_norm._by_torch, exact_, dz.double())
    for out, ref in zip(outs, refs, strict=True):
        assert (out is None) == (ref is None)
        assert ref is None or cases.error(out, ref) <= 1e-4
    assert gradcheck(lambda y: apply(y, None, None, None, None, True, 0.1, 1e-5, activation), exact_[0])


@pytest.mark.parametrize("axes", [1, 4])
def test_what_autograd_hands_back_is_read_anew(axes, device):
    """Saved-tensor hooks may hand back another layout, of vectors or of y."""
    y, mean, var, weight, bias = (t.detach().to(device) for t in operands((2, 4, 5, 6), view="nhwc"))
    wanted = [t.requires_grad_() for t in (y, weight, bias)]
    dz = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    expected = torch.autograd.grad(apply(y, mean, var, weight, bias, True, 0.1, 1e-5, "relu"), wanted, dz)
    gaps = lambda t: torch.stack((t, t), -1)[..., 0] if t.dim() == axes else t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, gaps):
        z = apply(y, mean, var, weight, bias, True, 0.1, 1e-5, "relu")
    for out, ref in zip(torch.autograd.grad(z, wanted, dz), expected, strict=True):
        torch.testing.assert_close(out, ref)


def test_it_is_repeatable_and_keeps_little(device):
    tensors = [t.to(device) for t in operands((3, 24, 9, 8), view="nhwc")]
    dz = torch.randn((3, 24, 9, 8), generator=torch.Generator().manual_seed(1)).to(device)
    first, second = (computed(apply, tensors, True, "silu", dz) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
    z = apply(*tensors, True, 0.1, 1e-5, "silu")
    large = [t for t in z.grad_fn.saved_tensors if t is not None and t.numel() > 24]
    assert [t.data_ptr() for t in large] == [tensors[0].data_ptr()]


# --- conv_bn_act -----------------------------------------------------------------------------------------------------


def test_conv_bn_act(device):
    generator = torch.Generator().manual_seed(2)
    x, w, b = (
        torch.randn(s, generator=generator).to(device).requires_grad_() for s in ((2, 8, 6, 5), (12, 4, 3, 3), (12,))
    )
    statistics = {"running_mean": torch.zeros(12, device=device), "running_var": torch.ones(12, device=device)}
    gamma, beta = (torch.randn(12, generator=generator).to(device).requires_grad_() for _ in range(2))
    leaves = (x, w, b, gamma, beta)
    y = groupconv.conv_bn_act(
        x, w, b, padding=1, groups=2, bn_weight=gamma, bn_bias=beta, training=True, activation="relu", **statistics
    )
    exact_ = [t.detach().double().requires_grad_() for t in leaves]
    mean, var = torch.zeros(12, dtype=torch.float64, device=device), torch.ones(12, dtype=torch.float64, device=device)
    expected = F.relu(F.batch_norm(F.conv2d(*exact_[:3], padding=1, groups=2), mean, var, *exact_[3:], True))
    assert cases.error(y, expected) <= 1e-5
    dz = torch.randn(y.shape, generator=generator).to(device)
    for leaf, out, ref in zip(
        leaves, torch.autograd.grad(y, leaves, dz), torch.autograd.grad(expected, exact_, dz.double()), strict=True
    ):
        if leaf is b:  # a bias before batch norm has no gradient
            assert out.abs().max() <= 1e-4
        else:
            assert cases.error(out, ref) <= 1e-5
    assert cases.error(statistics["running_var"], var) <= 1e-5
    with pytest.raises(ValueError, match=r"^conv_bn_act: expected 4D input \(got 3D input\)$"):
        groupconv.conv_bn_act(x[0], w, padding=1, groups=2, training=True)


# --- Modules ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Chains by name, two of which share an activation with the head."""

    def __init__(self, **norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(12, **norm)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12, **norm)
        self.conv3, self.bn3 = nn.Conv2d(12, 12, 3, groups=2), nn.SyncBatchNorm(12)
        self.act1, self.relu = nn.SiLU(), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.conv3(x) - 0.1)


def trained(model, steps=3):
    """The losses of some steps of training, one of them in eval mode."""
    generator, losses = torch.Generator().manual_seed(3), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        model.train(step != 1)
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8, 7, 6, generator=generator).to(next(model.parameters()).dtype)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize(
    "norm",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1, "momentum": 0.5}],
    ids=str,
)
def test_training_is_the_same(norm, monkeypatch):
    torch.manual_seed(0)
    model = Net(**norm)
    fused = groupconv.convert(copy.deepcopy(model), fuse="bn_act")
    assert [type(m) for m in (fused.bn1, fused.act1)] == [BatchNormAct2d, PassingSiLU]
    assert [type(m) for m in (fused.bn2, fused.relu)] == [BatchNormAct2d, PassingReLU]
    exact_ = copy.deepcopy(model).double()
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in model.named_parameters()]
    activated = []
    whole = batch_norm.computed
    monkeypatch.setattr(
        batch_norm, "computed", lambda *args, **named: activated.append(args[8]) or whole(*args, **named)
    )
    assert cases.error(trained(fused), trained(exact_)) <= 1e-4
    assert activated == ["silu", "relu"] * 3
    for name, tensor in fused.state_dict().items():
        torch.testing.assert_close(tensor.double(), exact_.state_dict()[name].double(), rtol=1e-3, atol=1e-4)


def test_summary_and_revert(caplog):
    model = Net()
    before = {name: type(module) for name, module in model.named_modules()}
    with caplog.at_level(logging.INFO, logger="groupconv"):
        groupconv.convert(model, fuse="bn_act")
    assert "convert: 2 of 3 grouped convolutions" in caplog.text
    assert "conv1: batch norm and silu" in caplog.text
    assert "conv3: left, no batch norm takes its result alone" in caplog.text
    classes = [type(module) for module in model.modules()]
    groupconv.convert(model, fuse="bn_act")
    assert [type(module) for module in model.modules()] == classes
    groupconv.revert(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match=r'^convert: fuse is True, but must be None or "bn_act"$'):
        groupconv.convert(model, fuse=True)


def block(norm=nn.BatchNorm2d, activate=nn.SiLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), norm(8), activate())


def image():
    return torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(1))


def test_sync_batch_norm_is_left(caplog):
    model = block(nn.SyncBatchNorm)
    with caplog.at_level(logging.INFO, logger="groupconv"):
        groupconv.convert(model, fuse="bn_act")
    assert type(model[1]) is nn.SyncBatchNorm
    assert "0: left, a SyncBatchNorm follows" in caplog.text


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def wrapped(model, forward):
    model[1].forward = lambda x: 2 * forward(x)
    return model


def hooked(model, name, hook):
    getattr(model[1], name)(hook)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: hooked(model, "register_forward_hook", lambda module, x, y: 2 * y),
        lambda model: hooked(model, "register_full_backward_pre_hook", lambda module, grads: (0 * grads[0],)),
        lambda model: model[2].register_forward_pre_hook(lambda module, x: (x[0] + 1,)) and model,
        lambda model: setattr(model, "1", nn.BatchNorm2d(8)) or model,
        lambda model: setattr(model, "1", nn.Identity()) or model,
        lambda model: setattr(model, "2", nn.Tanh()) or model,
        lambda model: wrapped(model, model[1].forward),
        lambda model: setattr(model, "1", Doubled(model[1])) or model,
        lambda model: model[2].compile(backend="eager") or model,
        lambda model: model[0].register_forward_hook(lambda module, x, y: 2 * y) and model,
        lambda model: nn.Sequential(*copy.deepcopy(list(model))),
        lambda model: copy.deepcopy(model),
        lambda model: model.half().float(),
        lambda model: torch.nn.utils.parametrizations.weight_norm(model[0]) and model,
    ],
    ids=range(14),
)
def test_what_is_changed_afterwards(change):
    """Values and gradients as if the model had never been converted."""
    plain, fused = change(block()), change(groupconv.convert(block(), fuse="bn_act"))
    results = []
    for model in (plain, fused):
        x = image().requires_grad_()
        y = model(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for out, ref in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(out, ref, rtol=1e-4, atol=1e-4)
    assert len(list(groupconv.revert(fused).modules())) == len(list(plain.modules()))


class Bottleneck(nn.Module):
    """As timm has it: what may be a DropBlock is an nn.Identity."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.drop, self.act = (
            nn.Conv2d(8, 8, 3, groups=4),
            nn.BatchNorm2d(8),
            nn.Identity(),
            nn.SiLU(),
        )

    def forward(self, x):
        return self.act(self.drop(self.bn(self.conv(x))))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda model: None, "silu"),
        (lambda model: setattr(model, "drop", nn.Dropout(1.0)), None),
        (lambda model: setattr(model, "act", nn.Tanh()), None),
        (lambda model: model.drop.register_forward_hook(lambda module, x, y: 2 * y), None),
    ],
    ids=["none", "dropout", "Tanh", "hook"],
)
def test_an_identity_before_the_activation(change, expected):
    plain, fused = Bottleneck(), groupconv.convert(Bottleneck(), fuse="bn_act")
    assert isinstance(fused.bn, BatchNormAct2d)
    results = []
    for model in (plain, fused):
        change(model)
        x = image().requires_grad_()
        y = model(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for out, ref in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(out, ref, rtol=1e-4, atol=1e-4)
    folded = groupconv.fold_batchnorm(plain.eval())
    assert folded.conv.activation == expected
    torch.testing.assert_close(folded(image()), plain(image()), rtol=1e-4, atol=1e-4)


class Parts(nn.Module):
    """A chain of which other code takes parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.SiLU()

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        return self.act(x)

    def inner(self, x):
        return self.bn(self.conv(x))


class Recomputed(Parts):
    """Of which a part is computed again."""

    def forward(self, x):
        def part(x):
            return self.act(self.bn(self.conv(x)))

        return checkpoint(part, x, use_reentrant=False)


@pytest.mark.parametrize(
    "part",
    [
        Parts.inner,
        lambda model, x: nn.Sequential(model.conv, model.bn)(x),
        lambda model, x: nn.Sequential(model.conv, model.bn, nn.Tanh(), model.act)(x),
        lambda model, x: model.bn(x),
        lambda model, x: torch.fx.GraphModule(model, ends_at_the_norm(model))(x),
        lambda model, x: torch.fx.GraphModule(model, torch.fx.Tracer().trace(model))(x),
    ],
    ids=["method", "sequence", "other", "norm", "graph", "whole graph"],
)
@pytest.mark.parametrize("kind", [Parts, Recomputed])
def test_parts_of_a_chain(kind, part, monkeypatch):
    """Only the code that was read has the norm activate; whatever else calls it has what the norm says."""
    activated = []
    whole = batch_norm.computed
    monkeypatch.setattr(
        batch_norm, "computed", lambda *args, **named: activated.append(args[8]) or whole(*args, **named)
    )
    results = []
    for model in (kind(), groupconv.convert(kind(), fuse="bn_act")):
        whole_x, x = image().requires_grad_(), image().requires_grad_()
        y, taken = model(whole_x), part(model, x)
        results.append((y, taken, *torch.autograd.grad(y.square().sum() + taken.sin().sum(), (whole_x, x))))
    for out, ref in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(out, ref, rtol=1e-4, atol=1e-4)
    assert activated == ["silu"] * (1 if kind is Parts else 2)


def ends_at_the_norm(model):
    graph = torch.fx.Tracer().trace(model)
    *_, activation, output = graph.nodes
    output.args = activation.args
    graph.erase_node(activation)
    return graph


def test_a_leaky_relu_of_another_slope():
    plain, fused = block(activate=nn.LeakyReLU), groupconv.convert(block(activate=nn.LeakyReLU), fuse="bn_act")
    assert isinstance(fused[1], BatchNormAct2d)
    for model in (plain, fused):
        model[2].negative_slope = 0.3
    torch.testing.assert_close(fused(image()), plain(image()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    plain, fused = block(), groupconv.convert(block(), fuse="bn_act")
    grads = []
    for model in (plain, fused):
        x = image().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_gradients_in_batches():
    plain, fused = block(), groupconv.convert(block(), fuse="bn_act")
    dz = torch.randn(3, 2, 8, 4, 3, generator=torch.Generator().manual_seed(2))
    grads = []
    for model in (plain, fused):
        x = image().requires_grad_()
        grads += torch.autograd.grad(model(x), x, dz, is_grads_batched=True)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_momentum_none_leaves_no_launches_behind():
    model = groupconv.convert(block(lambda size: nn.BatchNorm2d(size, momentum=None)), fuse="bn_act")
    sizes = []
    for _ in range(3):
        model(image())
        sizes.append(batch_norm._launch.cache_info().currsize)
    assert sizes[0] == sizes[2]


def test_copies_states_and_tracers(tmp_path):
    """What traces gets the model's own functions."""
    model, plain = groupconv.convert(block(), fuse="bn_act"), block()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.save(model[1], tmp_path / "norm.pt")
    assert (tmp_path / "norm.pt").stat().st_size < 5000  # without what is around it
    loaded.load_state_dict(plain.state_dict())
    x = image()
    with pytest.raises(torch.jit.Error, match=r"groupconv\.revert\(model\) first"):
        torch.jit.script(model)(x)
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    for each in (model, loaded, plain):
        each.eval()
    for made in (graph.eval(), torch.jit.trace(model, x), loaded):
        torch.testing.assert_close(made(x), plain(x))
    plain.train()
    model.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(model[1].running_var, plain[1].running_var)
    assert model[1].num_batches_tracked == plain[1].num_batches_tracked == 1
