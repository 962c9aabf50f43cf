"""What the code of models says, read in its source: which calls follow one another, and that nothing of it is run."""

import copy
import functools
import importlib.util
import linecache

import pytest
import torch
from test_batch_norm import Parts, image
from torch import nn

import groupconv
from groupconv import batch_norm, reading
from groupconv.folding import FoldedConv2d
from groupconv.fusing import BatchNormAct2d


def says(function):
    """The paths of a function's runs of two calls and more, and whether all their calls are alone on their lines."""
    found = [
        (tuple(".".join(call.path) for call in run), all(c.alone for c in run))
        for run in reading.runs(function.__code__)
    ]
    return [each for each in found if len(each[0]) > 1]


def nested(m, x):
    return m.act(m.norm(m.inner.conv(x)))


def in_statements(m, x):
    if x is not None:
        x = m.conv(x)
        x = m.norm(x)
    else:
        x = m.other(x)
    x = m.drop(x)
    return m.act(x) + x.sum()


def followed(m, x):
    y = m.conv(x)
    y = m.norm(y)
    return m.act(y)


def read_again(m, x):
    y = m.conv(x)
    z = m.norm(y)
    return z + y


def read_twice(m, x):
    x = m.conv(x)
    x = m.norm(x) + x
    return x


def maybe(m, x):
    try:
        x = m.conv(x)
        x = m.norm(x)
    except ValueError:
        return x
    return x


def repeated(m, x):
    x = m.conv(x)
    return [m.norm(x) for _ in range(2)]


def captured(m, x):
    x = m.conv(x)
    x = m.norm(x)
    return lambda: x


def generated(m, x):
    x = m.conv(x)
    x = m.norm(x)
    yield x


def rebound(m, x):
    for block in m:
        x = block.norm(block.conv(x))
    return x


def with_more(m, x):
    return m.norm(m.conv(x, 1))


def beside(m, x, f):
    return m.norm(m.conv(x)) + f(x)


def decorated(f):
    @functools.wraps(f)
    def wrapper(*args):
        return f(*args)

    return wrapper


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nested, [(("inner.conv", "norm", "act"), True)]),
        (in_statements, [(("conv", "norm"), True)]),
        (followed, [(("conv", "norm", "act"), True)]),
        (beside, [(("conv", "norm"), False)]),
        (decorated(nested).__wrapped__, [(("inner.conv", "norm", "act"), True)]),
        *(
            (function, [])
            for function in (read_again, read_twice, maybe, repeated, captured, generated, rebound, with_more)
        ),
    ],
)
def test_calls_that_follow_one_another(function, expected):
    assert says(function) == expected


def test_a_source_that_is_not_the_code_is_not_believed(tmp_path):
    path = tmp_path / "model.py"
    path.write_text("def f(m, x):\n    return m.norm(m.conv(x))\n")
    spec = importlib.util.spec_from_file_location("model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kept = module.f.__code__
    path.write_text("def f(m, x):\n    return m.conv(m.norm(x))\n")
    linecache.checkcache(str(path))
    assert reading.runs(kept) == ()
    path.write_text("def f(m, x):\n    return m.norm(m.conv(x))\n")
    linecache.clearcache()
    reading.runs.cache_clear()
    reading.function.cache_clear()
    assert len(reading.runs(kept)) == 1
    assert reading.runs(compile("lambda m, x: m.norm(m.conv(x))", "<nowhere>", "eval").co_consts[0]) == ()


# --- Models ----------------------------------------------------------------------------------------------------------

CACHE = {}


class Base(Parts):
    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Running(Base):
    """What must not run when its code is read."""

    def train(self, mode=True):
        self.conv.weight.data.mul_(1.5)
        return super().train(mode)

    def forward(self, x):
        for parameter in self.conv.parameters():
            parameter.data.clamp_(-0.01, 0.01)
        CACHE["x"] = x
        torch.rand(1)
        return super().forward(x)


@pytest.mark.parametrize("change", [lambda m: groupconv.convert(m, fuse="bn_act"), groupconv.fold_batchnorm])
def test_nothing_is_run(change):
    model = Running().eval()
    weight, state = model.conv.weight.clone(), torch.get_rng_state()
    change(model)
    assert torch.equal(model.conv.weight, weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert not CACHE


def undone(function):  # a decorator that does not say what it wraps
    return lambda *args: function(*args)


class Decorated(Base):
    forward = undone(Base.forward)

    @undone
    def features(self, x):
        return self.bn(self.conv(x))


class Wrapped(Base):
    def features(self, x):
        return self.bn(self.conv(x))

    @functools.wraps(features)
    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Asking(Base):
    def forward(self, x):
        if torch.is_grad_enabled() or torch.is_autocast_enabled() or not isinstance(x, torch.Tensor):
            return self.bn(self.conv(x))
        return self.act(self.bn(self.conv(x)))


class OnOneLine(Base):
    def forward(self, x):
        norm = self.bn
        return self.act(self.bn(self.conv(x))) + norm(x[..., 1:-1, 1:-1])


@pytest.mark.parametrize("kind", [Decorated, Wrapped, Asking, OnOneLine])
@pytest.mark.parametrize("part", ["features", "forward"])
def test_only_the_code_that_calls_decides(kind, part):
    plain, fused = kind(), groupconv.convert(kind(), fuse="bn_act")
    call = getattr(kind, part, kind.forward)
    assert isinstance(fused.bn, BatchNormAct2d)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(call(fused, image()), call(plain, image()), rtol=1e-4, atol=1e-4)


def test_code_that_is_changed_after_converting(monkeypatch):
    fused = groupconv.convert(Base(), fuse="bn_act")
    monkeypatch.setattr(Base, "forward", lambda self, x: self.act(2 * self.bn(self.conv(x))))
    torch.testing.assert_close(fused(image()), Base()(image()), rtol=1e-4, atol=1e-4)


class Repeated(Base):
    """Code that torch.compile skips, and what it calls is compiled: the norm, which changes, less often."""

    def forward(self, x):
        for step in range(6):
            x = self.act(self.bn(self.conv(x)))
            torch._dynamo.graph_break()
            x = nn.functional.pad(x[..., 1:, :], (1, 1))
            self.bn.momentum = 0.1 + step / 10
        return x


def test_frames_that_torch_compile_leaves_alone():
    """Where it gives up on the norm, it still compiles the activation, which then lets nothing through."""
    torch._dynamo.reset()
    plain, fused = Repeated(), groupconv.convert(Repeated(), fuse="bn_act")
    x = torch.randn(2, 8, 20, 9)
    with torch._dynamo.config.patch(recompile_limit=2):
        found = torch.compile(fused, backend="eager")(x)
    torch.testing.assert_close(found, plain(x), rtol=1e-4, atol=1e-4)


def eps_of(model):
    return model.bn.eps


# What else a model's code does with a norm, all of which leaves it: (what it has more, its forward).
MORE = {
    "parameters": lambda m, x: Base.forward(m, x) + sum(p.sum() for p in m.parameters()),
    "its kind": lambda m, x: Base.forward(m, x) * (2 if isinstance(m.bn, nn.BatchNorm2d) else 1),
    "an attribute": lambda m, x: Base.forward(m, x) * getattr(m.bn, "eps", 1.0),
    "a name that is made up": lambda m, x: Base.forward(m, x) * getattr(m, "b" + "n").eps,
    "a function that gets it": lambda m, x: Base.forward(m, x) * eps_of(m),
    "a name by unpacking": lambda m, x: Base.forward(m, x) * getattr(*(m.bn, "eps")),
    "a change": lambda m, x: setattr(m.bn, "eps", 0.5) or Base.forward(m, x),
}


@pytest.mark.parametrize("more", MORE)
def test_folding_leaves_what_code_names_besides(more):
    model = type("More", (Base,), {"forward": MORE[more]})().eval()
    folded = groupconv.fold_batchnorm(model)
    assert type(folded.bn) is nn.BatchNorm2d
    torch.testing.assert_close(folded(image()), copy.deepcopy(model)(image()))


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Base()
        self.hidden = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8))

    def forward(self, x):
        return self.block(x)


class ByForwardOfItsOwn(Holder):
    def __init__(self):
        super().__init__()
        self.forward = self.features

    def features(self, x):
        return self.block.bn(self.block.conv(x))


class ByCall(Holder):
    def __call__(self, x):
        return self.block.bn(self.block.conv(x))


class ByPlace(Holder):
    def forward(self, x):
        return self.hidden[0](x)


class BySlice(Holder):
    def forward(self, x):
        return self.hidden[:1](x)


class ByLoop(Holder):
    def forward(self, x):
        for module in self.hidden:
            x = module(x) + 1
        return x


@pytest.mark.parametrize("kind", [ByForwardOfItsOwn, ByCall, ByPlace, BySlice, ByLoop])
def test_folding_leaves_what_code_above_takes_apart(kind):
    torch.manual_seed(0)
    model = kind().eval()
    expected = model(image())
    folded = groupconv.fold_batchnorm(model)
    assert not isinstance(folded.block.conv if kind in (ByForwardOfItsOwn, ByCall) else folded.hidden[0], FoldedConv2d)
    torch.testing.assert_close(folded(image()), expected)


def test_folding_of_what_is_only_called():
    class Whole(Holder):
        def __init__(self):
            super().__init__()
            self.rows = nn.ModuleList(
                [nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8)) for _ in range(2)]
            )

        def forward(self, x):
            if self.hidden is not None:
                x = self.hidden(x)
            for row in self.rows:
                x = row(x)
            return self.rows[0](x)

    model = Whole().eval()
    folded = groupconv.fold_batchnorm(model)
    assert all(isinstance(each[0], FoldedConv2d) for each in (folded.hidden, *folded.rows))
    torch.testing.assert_close(folded(image()), model(image()), rtol=1e-4, atol=1e-5)


def test_a_call_keeps_nothing_alive(monkeypatch):
    """Reading a caller's variable keeps none of the others until it returns."""
    import gc
    import weakref

    seen = []

    class Forgetful(Base):
        def forward(self, x):
            big = torch.ones(1000)
            reference = weakref.ref(big)
            x = self.conv(x)
            x = self.bn(x)
            x = self.act(x)
            del big
            gc.collect()
            seen.append(reference())
            return x

    whole = batch_norm.computed
    activated = []
    monkeypatch.setattr(batch_norm, "computed", lambda *a, **named: activated.append(a[8]) or whole(*a, **named))
    groupconv.convert(Forgetful(), fuse="bn_act")(image())
    assert activated == ["silu"]
    assert seen == [None]
