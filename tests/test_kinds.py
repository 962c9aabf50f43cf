"""1-D and transposed convolutions: values, every gradient, layouts, forms of arguments, errors, and PyTorch's tools."""

import functools
import warnings

import cases
import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import groupconv
from groupconv import conv1d, conv_transpose1d, conv_transpose2d

pytestmark = [
    pytest.mark.usefixtures("ieee", "few_programs"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
NATIVE = {conv1d: F.conv1d, conv_transpose1d: F.conv_transpose1d, conv_transpose2d: F.conv_transpose2d}


def random(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def lines(tensor, view):
    """The same values, [N, C, L], lying otherwise."""
    if view == "nlc":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return F.pad(tensor, (1, 2))[..., 1:-2] if view == "slice" else tensor


def operands(function, device="cpu", dtype=torch.float32, groups=2):
    """Leaves of a convolution with biases: 6 channels in, 4 out."""
    axes = 2 if function is conv_transpose2d else 1
    x = random(2, 6, *(7, 5)[:axes], device=device, dtype=dtype)
    shape = (4, 6 // groups) if function is conv1d else (6, 4 // groups)
    w = random(*shape, *(3, 2)[:axes], seed=1, device=device, dtype=dtype)
    return tuple(t.requires_grad_() for t in (x, w, random(4, seed=2, device=device, dtype=dtype)))


def compare(function, leaves, exact_padding=None, **kwargs):
    """Values and gradients against float64; (y, the gradients)."""
    y = function(*leaves, groups=2, backend="triton", **kwargs)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    x = exact[0] if exact_padding is None else F.pad(exact[0], exact_padding)
    if exact_padding is not None:
        kwargs = kwargs | {"padding": 0}
    expected = NATIVE[function](x, *exact[1:], groups=2, **kwargs)
    bound = {torch.float32: 4 * cases.bound("fp32", 256), torch.bfloat16: 8e-3}[leaves[0].dtype]
    assert cases.error(y, expected) <= bound
    dy = random(*y.shape, seed=3, device=y.device, dtype=y.dtype)
    grads = torch.autograd.grad(y, leaves, dy)
    for out, ref in zip(grads, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert cases.error(out, ref) <= bound
    return y, grads


@pytest.mark.parametrize("view", ["ncl", "nlc", "slice"])
@pytest.mark.parametrize(
    ("kwargs", "exact_padding"),
    [
        ({}, None),
        ({"padding": 2, "stride": 2, "dilation": 2}, None),
        ({"padding": [1], "stride": (3,), "dilation": [1]}, None),
        ({"padding": "same", "dilation": 2}, None),
        ({"padding": "valid"}, None),
        ({"padding": (2, 0)}, (2, 0)),
        ({"padding": (0, 3), "stride": 2}, (0, 3)),
    ],
    ids=str,
)
def test_conv1d(view, kwargs, exact_padding, device):
    """[N, L, C] transposed gives [N, L, C] transposed."""
    x, w, bias = operands(conv1d, device)
    leaves = lines(x.detach(), view).requires_grad_(), w, bias
    y, (dx, _, _) = compare(conv1d, leaves, exact_padding, **kwargs)
    for tensor in (y, dx):
        assert (tensor.transpose(1, 2) if view == "nlc" else tensor).is_contiguous()


def test_conv1d_is_finished_by_its_kernel(device):
    x, w, bias = operands(conv1d, device)
    residual = random(2, 4, 7, seed=4, device=device).requires_grad_()
    y = conv1d(x, w, bias, padding=1, groups=2, activation="silu", residual=residual, backend="triton")
    exact = [t.detach().double().requires_grad_() for t in (x, w, bias, residual)]
    expected = F.silu(F.conv1d(*exact[:3], padding=1, groups=2) + exact[3])
    assert cases.error(y, expected) <= 4 * cases.bound("fp32", 64)
    grads = torch.autograd.grad(y.square().sum(), (x, w, bias, residual))
    for out, ref in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert cases.error(out, ref) <= 1e-5


@pytest.mark.parametrize("view", ["nchw", "nhwc", "slice"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": [2, 3], "padding": (0, 1), "output_padding": (1, 2), "dilation": [2, 1]},
    ],
    ids=str,
)
def test_conv_transpose2d(view, kwargs, device):
    """y and dx are channels_last where x is, and w is not asked."""
    x, w, bias = operands(conv_transpose2d, device)
    leaves = cases.lay_out(x.detach(), view).requires_grad_(), w, bias
    y, (dx, _, _) = compare(conv_transpose2d, leaves, **kwargs)
    for tensor in (y, dx):
        assert tensor.is_contiguous(memory_format=torch.channels_last if view == "nhwc" else torch.contiguous_format)


@pytest.mark.parametrize("view", ["ncl", "nlc", "slice"])
@pytest.mark.parametrize("kwargs", [{}, {"stride": (3,), "padding": [1], "output_padding": 2, "dilation": 2}], ids=str)
def test_conv_transpose1d(view, kwargs, device):
    x, w, bias = operands(conv_transpose1d, device)
    compare(conv_transpose1d, (lines(x.detach(), view).requires_grad_(), w, bias), **kwargs)


@hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data(), function=st.sampled_from(list(NATIVE)))
def test_any_arguments(data, function):
    """What PyTorch takes is equal to what it gives, and what it refuses is refused in its words."""
    axes = 2 if function is conv_transpose2d else 1

    def small(least, most):
        return data.draw(st.tuples(*[st.integers(least, most)] * axes))

    groups, width_in, width_out = (data.draw(st.integers(1, 3)) for _ in range(3))
    shape = (groups * width_out, width_in) if function is conv1d else (groups * width_in, width_out)
    x = random(data.draw(st.integers(0, 2)), groups * width_in, *small(1, 6))
    w, bias = random(*shape, *small(1, 3), seed=1), random(groups * width_out, seed=2)
    kwargs = {"stride": small(1, 3), "padding": small(0, 2), "dilation": small(1, 3), "groups": groups}
    if function is not conv1d:
        kwargs["output_padding"] = small(0, 2)
    try:
        plain = NATIVE[function](x, w, bias, **kwargs)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as ours:
            function(x, w, bias, **kwargs, backend="triton")
        said = str(ours.value), str(error)
        assert said[0] == said[1]
        return
    hypothesis.assume(min(plain.shape[1:]) > 0)  # which fp32 takes and fp64 refuses
    expected = NATIVE[function](x.double(), w.double(), bias.double(), **kwargs)
    try:
        y = function(x, w, bias, **kwargs, backend="triton")
    except NotImplementedError:
        strides = zip(kwargs["output_padding"], kwargs["stride"], strict=True)
        assert any(more >= stride for more, stride in strides) or min(expected.shape) == 0
        return
    assert cases.error(y, expected) <= 4 * cases.bound("fp32", 64)


@pytest.mark.parametrize("function", NATIVE, ids=lambda function: function.__name__)
def test_second_derivative(function, device):
    leaves = operands(function, device)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    results = []
    for of, tensors in ((functools.partial(function, backend="triton"), leaves), (NATIVE[function], exact)):
        y = of(*tensors, stride=2, groups=2)
        dy = random(*y.shape, seed=3, device=device).to(y.dtype).requires_grad_()
        grads = torch.autograd.grad(y, tensors, dy, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), [*tensors[:2], dy]))
    for out, ref in zip(*results, strict=True):
        assert cases.error(out, ref) <= 1e-5


@pytest.mark.parametrize("function", NATIVE, ids=lambda function: function.__name__)
def test_bf16_autocast_and_unbatched(function, device):
    leaves = operands(function, device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        y = function(*leaves, groups=2, backend="triton")
    assert y.dtype is torch.bfloat16
    half = [t.detach().bfloat16().requires_grad_() for t in leaves]
    assert torch.equal(y, compare(function, half)[0])
    one = function(half[0][0], *half[1:], groups=2, backend="triton")
    assert torch.equal(one, y[0])
    for grad in torch.autograd.grad(y.float().sum(), leaves):
        assert grad.dtype is torch.float32


@pytest.mark.parametrize("function", NATIVE, ids=lambda function: function.__name__)
def test_what_pytorch_makes_of_it(function, device):
    """Backend "torch", and "auto" on CPU tensors, to the last bit; graphs; FLOPs; traces; vmap."""
    leaves = operands(function, device)
    native = NATIVE[function](*leaves, groups=2)
    assert torch.equal(function(*leaves, groups=2, backend="torch"), native)
    if device == "cpu":
        assert torch.equal(function(*leaves, groups=2), native)

    def call(*tensors):
        return function(*tensors, stride=2, groups=2, backend="triton")

    y = call(*leaves)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves)
    assert torch.equal(compiled, y)
    for out, ref in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(y.sum(), leaves), strict=True):
        assert cases.error(out, ref.double()) <= 1e-6
    counts = []
    for of in (call, functools.partial(NATIVE[function], stride=2, groups=2)):
        with FlopCounterMode(display=False) as counter:
            of(*(t.detach() for t in leaves))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda *t: function(*t, stride=2, groups=2), tuple(t.detach() for t in leaves))
    assert f"aten::{NATIVE[function].__name__}" in str(traced.graph) or "aten::_convolution" in str(traced.graph)
    graph = torch.fx.symbolic_trace(lambda x, w: function(x, w, groups=2)).graph
    assert function in [node.target for node in graph.nodes]
    xs = torch.stack([leaves[0], leaves[0] + 1]).detach()
    mapped = torch.vmap(lambda x: call(x, *(t.detach() for t in leaves[1:])))(xs)
    assert cases.error(mapped, torch.stack([call(x, *leaves[1:]) for x in xs]).double()) <= 1e-6


def test_operands_that_kernels_cannot_read(device):
    """Lazily negated, expanded: the numbers are right all the same."""
    x, w, bias = (t.detach() for t in operands(conv_transpose2d, device))
    for given, values in ((torch._neg_view(x), -x), (x[:1, :, :1, :1].expand(2, 6, 4, 3), None)):
        values = given if values is None else values
        y = conv_transpose2d(given, w, bias, stride=2, groups=2, backend="triton")
        exact = F.conv_transpose2d(values.double(), w.double(), bias.double(), stride=2, groups=2)
        assert cases.error(y, exact) <= 4 * cases.bound("fp32", 64)


def test_opcheck_conv_transpose2d(device):
    for view, w_view in (("nhwc", "nchw"), ("slice", "nhwc")):
        x, w, bias = operands(conv_transpose2d, device)
        x, w = (cases.lay_out(t.detach(), v).requires_grad_() for t, v in ((x, view), (w, w_view)))
        torch.library.opcheck(
            torch.ops.groupconv.conv_transpose2d.default,
            (x, w, bias, (2, 1), (1, 0), (1, 0), (1, 2), 2, "triton"),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_results_on_fake_cuda_tensors():
    """Shapes, dtypes and strides, of a GPU that is not there."""
    fake = {"device": "cuda", "dtype": torch.half}
    with FakeTensorMode():
        x = torch.empty_strided((2, 6, 7, 5), (210, 1, 30, 6), **fake)
        y = conv_transpose2d(x, torch.empty(6, 2, 3, 3, **fake), stride=2, groups=2, backend="triton")
        assert y.shape == (2, 4, 15, 11)
        assert y.stride() == (660, 1, 44, 4)
        x, w = torch.empty_strided((2, 6, 9), (54, 1, 6), **fake), torch.empty(6, 1, 3, **fake)
        line = conv1d(x, w, padding=1, groups=6, backend="triton")
        assert line.shape == x.shape
        assert line.stride() == x.stride()


@pytest.mark.parametrize("function", NATIVE, ids=lambda function: function.__name__)
def test_errors(function, device):
    """PyTorch's own, whatever the backend; of ours, which say what is wrong."""
    x, w, bias = operands(function, device)
    bad = [
        ((x, w.detach().double(), bias), {}), ((x, w, bias[:1]), {}), ((x[:, :5], w, bias), {}),
        ((x, w, bias), {"stride": 0}), ((x, w, bias), {"padding": -1}), ((x, w, bias), {"stride": (1, 2, 3)}),
        ((x[0, 0, :0], w, bias), {}),
    ]  # fmt: skip
    for tensors, kwargs in bad:
        with pytest.raises((RuntimeError, TypeError)) as native:
            NATIVE[function](*tensors, groups=2, **kwargs)
        for backend in ("auto", "triton"):
            with pytest.raises(type(native.value)) as ours:
                function(*tensors, groups=2, **kwargs, backend=backend)
            assert str(ours.value) == str(native.value)
    with pytest.raises(TypeError, match="float"):
        function(x, w, bias, groups=2, dilation=1.5)
    with pytest.raises(TypeError):
        function(x, None, bias, groups=2)
    name = function.__name__
    with pytest.raises(ValueError, match=rf"^{name}: backend is 'cuda', but must be one of auto"):
        function(x, w, bias, groups=2, backend="cuda")
    with pytest.raises(
        NotImplementedError, match=rf"^{name}: backend='triton' cannot run this convolution: dtype float64"
    ):
        function(x.double(), w.double(), bias.double(), groups=2, backend="triton")
    if function is not conv1d:
        with pytest.raises(NotImplementedError, match=rf"^{name}: .*only PyTorch's own function takes it"):
            function(x, w, bias, groups=2, output_padding=1, dilation=2, backend="triton")
    else:
        with pytest.raises(ValueError, match="activation is 'tanh', but must be one of relu"):
            conv1d(x, w, bias, groups=2, activation="tanh")
        with pytest.raises(RuntimeError, match="negative padding is not supported"):
            conv1d(x, w, bias, groups=2, padding=(-1, 2))


def test_a_subclass_that_knows_pytorch_alone(device):
    class Known(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (conv1d, conv_transpose1d, conv_transpose2d):
                return NotImplemented
            return super().__torch_function__(function, types, args, kwargs or {})

    for function, native in NATIVE.items():
        x, w, bias = (t.detach() for t in operands(function, device))
        y = function(x.as_subclass(Known), w, bias, groups=2)
        assert type(y) is Known
        assert torch.equal(y.as_subclass(torch.Tensor), native(x, w, bias, groups=2))


def test_they_are_public():
    assert {"conv1d", "conv_transpose1d", "conv_transpose2d"} <= set(groupconv.__all__)
