"""What follows the convolution in one call: residual, activation, channel shuffle; against torch's own, in float64."""

import itertools

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from groupconv import triton_conv
from groupconv.epilogue import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("ieee", "few_programs")
# As torch's modules have them, whose defaults these are.
MODULES = {
    None: nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6(), "leaky_relu": nn.LeakyReLU(), "silu": nn.SiLU(),
    "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "hardswish": nn.Hardswish(), "sigmoid": nn.Sigmoid(),
}  # fmt: skip
CHAINS = list(itertools.product(MODULES, (False, True), (1, 3)))


def operands(view, residual_view="nchw"):
    """x, w, bias and residual of a convolution of two groups, all of which need gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 6, 6, 5), (12, 3, 3, 3), (12,), (2, 12, 6, 5)
    x, w, bias, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    x, residual = cases.lay_out(x, view), cases.lay_out(residual, residual_view)
    return tuple(tensor.requires_grad_() for tensor in (x, w, bias, residual))


def chain(x, w, bias, residual, activation, shuffle_groups):
    """Torch's own."""
    y = F.conv2d(x, w, bias, padding=1, groups=2)
    y = MODULES[activation](y if residual is None else y + residual)
    return nn.ChannelShuffle(shuffle_groups)(y)


def test_every_activation_is_tried():
    assert set(MODULES) == {None, *ACTIVATIONS}


@pytest.mark.parametrize(("activation", "added", "shuffle_groups"), CHAINS)
def test_values_and_gradients(activation, added, shuffle_groups, device):
    number = CHAINS.index((activation, added, shuffle_groups))
    view, residual_view = ("nchw", "nhwc")[number % 2], ("nchw", "nhwc", "slice")[number % 3]
    x, w, bias, residual = (t.to(device).detach().requires_grad_() for t in operands(view, residual_view=residual_view))
    tensors = (x, w, bias, residual) if added else (x, w, bias)
    y = triton_conv(
        x, w, bias, padding=1, groups=2, activation=activation, residual=residual if added else None,
        shuffle_groups=shuffle_groups, backend="triton",
    )  # fmt: skip
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = chain(*exact[:3], exact[3] if added else None, activation, shuffle_groups)
    assert cases.error(y, expected) <= 4 * cases.bound("fp32", 64)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    outs, refs = torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, exact, dy.double())
    for out, ref in zip(outs, refs, strict=True):
        assert cases.error(out, ref) <= 4 * cases.bound("fp32", 64)


@pytest.mark.parametrize("view", ["nchw", "nhwc"])
def test_memory_format_is_that_of_the_chain(view):
    x, w, bias, residual = operands(view)
    y = triton_conv(x, w, bias, padding=1, groups=2, activation="silu", residual=residual, shuffle_groups=3)
    assert y.stride() == chain(x, w, bias, residual, "silu", 3).stride()


def test_one_image(device):
    x, w, bias, residual = (tensor.to(device) for tensor in operands("nchw"))
    extras = {"activation": "relu6", "shuffle_groups": 4, "backend": "triton"}
    one = triton_conv(x[0], w, bias, padding=1, groups=2, residual=residual[0], **extras)
    assert torch.equal(one, triton_conv(x[:1], w, bias, padding=1, groups=2, residual=residual[:1], **extras)[0])


def test_second_derivative():
    x, w, bias, residual = (tensor.detach().double().requires_grad_() for tensor in operands("nchw"))

    def function(x, w, bias, residual):
        return triton_conv(
            x, w, bias, padding=1, groups=2, activation="gelu_tanh", residual=residual, shuffle_groups=2
        ).square()

    small = x[:1, :, :3, :2].detach().requires_grad_(), w, bias, residual[:1, :, :3, :2].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(function, small, fast_mode=True)


def test_autocast_takes_the_residual_too():
    x, w, bias, residual = operands("nchw")
    with torch.autocast("cpu", torch.bfloat16):
        y = triton_conv(x, w, bias, padding=1, groups=2, residual=residual)
        assert torch.equal(y, F.conv2d(x, w, bias, padding=1, groups=2) + residual.bfloat16())
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("trace", ["compile", "fx", "jit"])
def test_traced(trace):
    x, w, bias, residual = (tensor.detach() for tensor in operands("nchw"))

    def function(x, w, bias, residual):
        return triton_conv(x, w, bias, padding=1, groups=2, activation="hardswish", residual=residual, shuffle_groups=2)

    traced = {
        "compile": lambda: torch.compile(function, backend="aot_eager", fullgraph=True),
        "fx": lambda: torch.fx.symbolic_trace(function),
        "jit": lambda: torch.jit.trace(function, (x, w, bias, residual)),
    }[trace]()
    assert torch.equal(traced(x, w, bias, residual), chain(x, w, bias, residual, "hardswish", 2))


@pytest.mark.parametrize(
    ("extra", "error", "told"),
    [
        ({"activation": "tanh"}, ValueError, "activation is 'tanh', but must be one of relu, relu6, .*, sigmoid$"),
        ({"activation": F.relu}, ValueError, "but must be one of relu"),
        (
            {"residual": torch.zeros(2, 12, 6, 1)},
            ValueError,
            r"residual's shape is \(2, 12, 6, 1\), .* \(2, 12, 6, 5\)",
        ),
        (
            {"residual": torch.zeros(2, 12, 6, 5).half()},
            ValueError,
            "residual's dtype is torch.float16, .* torch.float32",
        ),
        ({"residual": torch.zeros(2, 12, 6, 5, device="meta")}, ValueError, "residual's device is meta, .* y's, cpu"),
        ({"residual": 1.0}, TypeError, "residual is of type float"),
        ({"shuffle_groups": 5}, ValueError, "shuffle_groups is 5, but must divide the 12 channels"),
        ({"shuffle_groups": 0}, ValueError, "shuffle_groups is 0"),
        ({"shuffle_groups": 2.0}, TypeError, "shuffle_groups is 2.0, but must be an int"),
    ],
    ids=["unknown", "function", "shape", "dtype", "device", "number", "remainder", "none", "float"],
)
def test_bad_arguments(extra, error, told):
    x, w, bias, _ = operands("nchw")
    with pytest.raises(error, match=f"^triton_conv: .*{told}"):
        triton_conv(x, w, bias, padding=1, groups=2, **extra)
