"""enable() and disable(): what calls torch.nn.functional's convolutions takes our way; all else is as it was."""

import concurrent.futures
import copy
import pickle
import subprocess
import sys

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import groupconv
from groupconv import enabling

NAMES = ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    groupconv.disable()
    assert all(getattr(F, name) is getattr(torch, name) for name in NAMES)


@pytest.fixture
def forced(monkeypatch):
    """Our kernels instead of what "auto" takes of CPU tensors; the names of the calls."""
    calls = []

    def recorded(name, ours):
        def call(*arguments):
            calls.append(name)
            return ours(*arguments, backend="triton")

        return call

    for name in NAMES:
        ours = getattr(groupconv, {"conv2d": "triton_conv"}.get(name, name))
        monkeypatch.setitem(enabling._OURS, name, recorded(name, ours))
    return calls


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Same(nn.Conv2d):
    """As TensorFlow pads, by the size of the image."""

    def forward(self, x):
        short = [
            max((-(-n // s) - 1) * s + k - n, 0)
            for n, s, k in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        x = F.pad(x, [short[1] // 2, short[1] - short[1] // 2, short[0] // 2, short[0] - short[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """As NFNets have their weights."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / self.weight.std((1, 2, 3), keepdim=True), self.bias)


class Conditional(nn.Module):
    """Each image has filters of its own: a group of a batch of one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(random(2, 8, 8, 3, 3, seed=3))

    def forward(self, x):
        w = self.weight[torch.arange(len(x)) % 2].flatten(0, 1)
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), w, padding=1, groups=len(x))
        return y.view(x.shape)


class Blur(nn.Module):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), torch.ones(x.shape[1], 1, 3, 3).to(x) / 9, groups=x.shape[1])


class Lines(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv1d(8, 8, 3, groups=4, padding=1), nn.ConvTranspose1d(8, 8, 3, groups=2, padding=1)

    def forward(self, x):
        y = self.up(self.down(x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)))
        return y.view(x.shape)  # of what is contiguous alone


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), Same(8, 8, 3, stride=2, groups=4), Standardised(8, 8, 3, padding=1, groups=2),
        Conditional(), Blur(), Lines(), nn.ConvTranspose2d(8, 8, 2, groups=8), nn.Conv2d(8, 4, 3, groups=4),
    )  # fmt: skip


OF_OURS = ["conv2d", "conv2d", "conv2d", "conv2d", "conv1d", "conv_transpose1d", "conv_transpose2d", "conv2d"]


@pytest.mark.usefixtures("ieee", "few_programs")
def test_every_grouped_call_is_ours(forced):
    """Values and gradients of layers that no conversion takes."""
    model, x = network(), random(2, 3, 9, 10)
    plain = [t.double() for t in cases.step(model, model, x)]
    assert forced == []
    with groupconv.enable():
        ours = cases.step(model, model, x)
    assert forced == OF_OURS
    for out, ref in zip(ours, plain, strict=True):
        assert cases.error(out, ref) <= 1e-5
    cases.step(model, model, x)
    assert forced == OF_OURS


def test_of_cpu_tensors_nothing_changes():
    """To the bit, and neither do errors: what no kernel serves reaches PyTorch's own function."""
    model, x = network(), random(2, 3, 9, 10)
    plain = cases.step(model, model, x)
    with groupconv.enable():
        for out, ref in zip(cases.step(model, model, x), plain, strict=True):
            assert torch.equal(out, ref)
            assert out.stride() == ref.stride()
        double = F.conv2d(random(1, 4, 5, 5).double(), random(4, 2, 3, 3).double(), groups=2)
    assert torch.equal(double, torch.conv2d(random(1, 4, 5, 5).double(), random(4, 2, 3, 3).double(), groups=2))
    for arguments in ({"groups": 3}, {"groups": 2, "stride": 0}, {"groups": 2, "padding": (1, 2, 3)}, {"groups": "2"}):
        with pytest.raises((RuntimeError, TypeError)) as native:
            F.conv2d(random(1, 4, 5, 5), random(4, 2, 3, 3), **arguments)
        with groupconv.enable(), pytest.raises(type(native.value)) as ours:
            F.conv2d(random(1, 4, 5, 5), random(4, 2, 3, 3), **arguments)
        assert str(ours.value).split("(")[0] == str(native.value).split("(")[0]


def test_the_switch():
    assert not groupconv.is_enabled()
    groupconv.disable()
    groupconv.enable()
    groupconv.enable()
    assert groupconv.is_enabled()
    assert F.conv2d is not torch.conv2d
    with groupconv.disable():
        assert F.conv2d is torch.conv2d
        with groupconv.enable(), groupconv.enable():
            assert groupconv.is_enabled()
        assert not groupconv.is_enabled()
    assert groupconv.is_enabled()
    with pytest.raises(KeyError), groupconv.disable():
        raise KeyError
    assert groupconv.is_enabled()
    groupconv.disable()
    assert F.conv2d is torch.conv2d
    assert not groupconv.is_enabled()
    later = groupconv.enable()
    groupconv.disable()
    with later:
        assert groupconv.is_enabled()
    assert not groupconv.is_enabled()


def test_others_who_replace_the_function(forced, monkeypatch):
    """One who came before goes on to see ungrouped calls; one who came after goes on to call ours, or PyTorch's."""
    seen = []

    def before(*arguments):
        seen.append("before")
        return torch.conv2d(*arguments)

    monkeypatch.setattr(F, "conv2d", before)
    x, w = random(1, 4, 5, 5), random(4, 2, 3, 3)
    groupconv.enable()
    ours = F.conv2d
    F.conv2d(x, random(4, 4, 3, 3))
    F.conv2d(x, w, groups=2)
    assert (seen, forced) == (["before"], ["conv2d"])

    def after(*arguments, **named):
        seen.append("after")
        return ours(*arguments, **named)

    F.conv2d = after
    groupconv.disable()
    assert F.conv2d is after
    F.conv2d(x, w, groups=2)
    assert (seen, forced) == (["before", "after", "before"], ["conv2d"])
    groupconv.enable()
    F.conv2d(x, w, groups=2)
    assert forced == ["conv2d"] * 2
    F.conv2d = ours
    groupconv.disable()
    assert F.conv2d is before
    monkeypatch.undo()


def test_threads(monkeypatch):
    """All go by the switch."""
    calls = []
    ours = enabling._OURS["conv2d"]
    monkeypatch.setitem(enabling._OURS, "conv2d", lambda *arguments: calls.append(1) or ours(*arguments))
    model, x = network().eval(), random(2, 3, 9, 10)
    expected = model(x)
    with groupconv.enable(), concurrent.futures.ThreadPoolExecutor(4) as pool:
        for y in pool.map(model, [x] * 8):
            assert torch.equal(y, expected)
    assert len(calls) == 8 * OF_OURS.count("conv2d")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tools():
    """Scripts, traces and graphs hold PyTorch's functions, and run the same once it is off."""
    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3, groups=2)), random(1, 4, 7, 7)
    w = [layer.weight.detach() for layer in model]
    expected = model(x)

    def functional(x):
        return F.conv_transpose2d(F.conv2d(x, w[0], groups=2), w[1], groups=2)

    with groupconv.enable():
        graph = torch.fx.symbolic_trace(functional).graph
        made = [
            torch.jit.script(model), torch.jit.trace(model, x), torch.fx.symbolic_trace(model),
            torch.compile(model, backend="aot_eager", fullgraph=True), copy.deepcopy(model),
        ]  # fmt: skip
        within = [each(x) for each in made]
    assert "aten::conv2d" in str(made[0].inlined_graph)
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [torch.conv2d, torch.conv_transpose2d]
    for y in (*within, *(each(x) for each in made)):
        assert torch.equal(y, expected)


def test_what_is_pytorchs_own_to_take():
    """Proxies in any place, overrides by types and modes, padding that is none; and it is pickled by its name."""

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), keywords=None):
            return function if function is torch.conv2d else super().__torch_function__(function, types, arguments)

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            return function

    class Depthwise(nn.Module):
        def forward(self, x):
            return F.conv2d(x, torch.ones(4, 1, 3, 3), groups=x.shape[1])

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("image", random(1, 4, 5, 5))

        def forward(self, w):
            return F.conv2d(self.image, w, groups=2)

    x, w = random(1, 4, 5, 5), random(4, 2, 3, 3)
    with groupconv.enable():
        for module in (Depthwise(), Weighted()):
            nodes = torch.fx.symbolic_trace(module).graph.nodes
            assert torch.conv2d in [node.target for node in nodes]
        assert F.conv2d(x.as_subclass(Own), w, groups=2) is torch.conv2d
        with Mode():
            assert F.conv2d(x, w, groups=2) is torch.conv2d
        with pytest.raises(RuntimeError, match="expected padding to be a single integer value or a list of 2 values"):
            F.conv2d(x, w, padding=(1, 1, 1, 1), groups=2)
        assert pickle.loads(pickle.dumps(F.conv2d)) is F.conv2d


def test_what_overrides_see(forced):
    """PyTorch's function, as without enable(), and nothing of what we ask of tensors."""
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            seen.append(function)
            return function(*arguments, **keywords or {})

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), keywords=None):
            seen.append(function)
            return super().__torch_function__(function, types, arguments, keywords)

    with groupconv.enable():
        for name in NAMES:
            x, w = random(1, 4, *[5] * int(name[-2])), random(4, 2, *[3] * int(name[-2]))
            for weight, groups in ((w, 2), (torch.cat([w, w], 1), 1)):
                with Mode():
                    getattr(F, name)(x, weight, groups=groups)
                getattr(F, name)(x.as_subclass(Own), weight, groups=groups)
                getattr(F, name)(x, weight.as_subclass(Own), groups=groups)
                assert seen == [getattr(torch, name)] * 3
                seen.clear()
    assert forced == []


NAMED = """
import torch, torch.nn.functional as F, groupconv
of = lambda module: [torch.overrides.resolve_name(getattr(module, name)) for name in NAMES]
with groupconv.enable():
    assert of(torch) == ["torch.nn.functional." + name for name in NAMES], of(torch)
    assert of(F) == [None] * 4
assert of(F) == ["torch.nn.functional." + name for name in NAMES]
"""


def test_names():
    """PyTorch's functions have theirs, even where nobody has asked before; ours have none."""
    script = f"NAMES = {NAMES}{NAMED}"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_looks_the_function_up():
    """Finds ours in the place of what overrides see, as long as it is on."""
    gradients = pytest.importorskip("torch.nn.utils._per_sample_grad")
    model, x = nn.Conv2d(4, 4, 3), random(2, 4, 5, 5)
    with groupconv.enable(), pytest.raises(AssertionError, match=r"Expected func to be F\.conv1d, F\.conv2d"):
        gradients.call_for_per_sample_grads(model)(x)
    gradients.call_for_per_sample_grads(model)(x).sum().backward()
    assert model.weight.grad_sample.shape == (2, 4, 4, 3, 3)


def test_a_default_device_is_no_override(forced):
    with groupconv.enable(), torch.device("cpu"):
        F.conv2d(random(1, 4, 5, 5), random(4, 2, 3, 3), groups=2)
    assert forced == ["conv2d"]


def test_operators_are_in_compiled_graphs(forced):
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    model, x = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1)), random(1, 4, 7, 7)
    expected = model(x)
    with groupconv.enable():
        y = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(y, expected)
    assert graphs[0].count("groupconv.conv2d") == graphs[0].count("torch.conv2d") == 1


def test_in_what_is_compiled():
    def turn(x):
        groupconv.enable()
        return x + 1

    with pytest.raises(Exception, match=r"enable: call it outside of what torch\.compile compiles"):
        torch.compile(turn, backend="eager", fullgraph=True)(torch.zeros(1))
    assert not groupconv.is_enabled()
    assert torch.compile(turn, backend="eager")(torch.zeros(1)) == 1
    assert groupconv.is_enabled()
