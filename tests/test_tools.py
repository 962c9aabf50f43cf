"""PyTorch's tools around a model that calls us: FLOP counters, function overrides, tracers, exporters, quantization."""

import contextlib
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode, has_torch_function_variadic
from torch.utils.flop_counter import FlopCounterMode

from groupconv import explain, triton_conv

pytestmark = [pytest.mark.usefixtures("ieee"), pytest.mark.filterwarnings("ignore:Using padding='same'")]
by_kernels = functools.partial(triton_conv, backend="triton")


def operands(device="cpu", groups=4):
    """x, w and bias of a convolution with an even kernel."""
    torch.manual_seed(0)
    return [torch.randn(shape, device=device) for shape in ((2, 8, 7, 6), (12, 8 // groups, 4, 2), (12,))]


# --- FLOP counters ---------------------------------------------------------------------------------------------------

FORMS = [{}, {"padding": "same"}, {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}]
MASKS = list(itertools.product((False, True), repeat=3))


def first_order(conv, tensors, mask, **keywords):
    """FLOPs of a call and of the gradients that the mask names."""
    tensors = [t.requires_grad_(needed) for t, needed in zip(tensors, mask, strict=True)]
    with FlopCounterMode(display=False) as forward:
        y = conv(*tensors, **keywords)
    with FlopCounterMode(display=False) as both:
        y = conv(*tensors, **keywords)
        if y.requires_grad:
            torch.autograd.grad(y, [t for t in tensors if t.requires_grad], torch.ones_like(y))
    return forward.get_total_flops(), both.get_total_flops()


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("keywords", FORMS, ids=str)
def test_flops(keywords, mask, device):
    found = first_order(by_kernels, operands(device), mask, groups=4, **keywords)
    assert found == first_order(F.conv2d, operands(device), mask, groups=4, **keywords)
    assert found[0] > 0
    assert (found[1] > found[0]) == any(mask[:2])


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_flops_of_compiled_code(compiler, device):
    """Under a dispatch mode PyTorch runs compiled functions as they were written, unless they must be one graph."""

    def compiled(conv):
        torch._dynamo.reset()
        return torch.compile(lambda *t: conv(*t, groups=4, padding="same"), backend=compiler)

    mask = (True, True, True)
    found = first_order(compiled(by_kernels), operands(device), mask)
    assert found == first_order(compiled(F.conv2d), operands(device), mask)
    assert found == first_order(F.conv2d, operands(device), mask, groups=4, padding="same")


def second_order(conv, groups, device):
    """FLOPs of the gradients of a function of both gradients, by x, w and dy."""
    x, w, _ = (t.requires_grad_() for t in operands(device, groups))
    with FlopCounterMode(display=False) as counter:
        y = conv(x, w, groups=groups)
        dy = torch.ones_like(y, requires_grad=True)
        dx, dw = torch.autograd.grad(y, (x, w), dy, create_graph=True)
        before = counter.get_total_flops()
        torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, w, dy))
    return counter.get_total_flops() - before


def test_flops_of_second_derivatives(device):
    """Four convolutions. PyTorch's formula counts a gradient by w as if it had one group; its own second derivative
    has another convolution in its place, so that the figures are the same for one group alone.
    """
    assert second_order(by_kernels, 1, device) == second_order(F.conv2d, 1, device) > 0
    one = first_order(F.conv2d, operands(device), (False,) * 3, groups=4)[0]
    assert second_order(F.conv2d, 4, device) == 4 * one
    assert second_order(by_kernels, 4, device) == (3 + 4) * one


# --- Overrides of functions ------------------------------------------------------------------------------------------


class Default(torch.Tensor):
    """A subclass that overrides nothing."""


class Named(torch.Tensor):
    """A subclass that keeps the functions it is asked for, and knows one of them."""

    asked: list = []  # noqa: RUF012 shared on purpose

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (triton_conv, explain, F.conv2d):
            cls.asked.append(func)
        if func is triton_conv and args[0].dim() == 3:
            return "known"
        return super().__torch_function__(func, types, args, kwargs)


class Duck:
    """No tensor at all."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func, types, args, kwargs


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_subclass_that_overrides_nothing(which, backend, device):
    """The result is of the type that F.conv2d's is, also where overrides are off, and its gradient too."""
    plain = operands(device)
    tensors = [t.as_subclass(Default) if i in which else t for i, t in enumerate(plain)]
    expected = F.conv2d(*tensors, groups=4)
    y = triton_conv(*tensors, groups=4, backend=backend)
    assert type(y) is type(expected) is Default
    torch.testing.assert_close(y.as_subclass(torch.Tensor), F.conv2d(*plain, groups=4))
    with torch._C.DisableTorchFunctionSubclass():
        assert type(triton_conv(*tensors, groups=4, backend=backend)) is type(F.conv2d(*tensors, groups=4))
    for t in tensors:
        t.requires_grad_()
    found, native = (conv(*tensors, groups=4).square().sum() for conv in (triton_conv, F.conv2d))
    for out, ref in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(native, tensors), strict=True):
        assert type(out) is type(ref)
        torch.testing.assert_close(out, ref)


def test_subclass_hears_of_the_public_functions(device):
    x, w, bias = operands(device)
    Named.asked.clear()
    assert type(triton_conv(x, w.as_subclass(Named), bias, groups=4)) is Named
    assert triton_conv(x[0].as_subclass(Named), w, bias, groups=4) == "known"
    assert explain(x.as_subclass(Named), w, bias, groups=4).problem == explain(x, w, bias, groups=4).problem
    assert Named.asked == [triton_conv, triton_conv, explain]


def test_what_an_override_is_given(device):
    _, w, bias = operands(device)
    x = Duck()
    func, types, args, kwargs = triton_conv(x, w, bias, padding="same", groups=4, backend="triton")
    assert (func, types) == (triton_conv, (Duck, torch.Tensor))
    assert args[0] is x
    assert args[1] is w
    assert args[3:] == (1, "same", 1, 4)
    assert kwargs["backend"] == "triton"
    assert explain(x, w, target="sm_90")[3] == {"backend": "auto", "target": "sm_90"}


def test_parameters_and_tensors_are_not_asked():
    assert not has_torch_function_variadic(torch.ones(1), nn.Parameter(torch.ones(1)), None)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_function_mode(backend, device):
    tensors = operands(device)
    with Functions() as outer, Functions() as inner:
        y = triton_conv(*tensors, groups=4, backend=backend)
        explain(*tensors, groups=4)
    for mode in (outer, inner):
        assert mode.seen.count(triton_conv) == mode.seen.count(explain) == 1
    torch.testing.assert_close(y, F.conv2d(*tensors, groups=4))


def test_default_device_is_a_mode(device):
    """torch.set_default_device is a function mode of PyTorch's own."""
    tensors = operands(device)
    with torch.device("meta"):
        y = triton_conv(*tensors, groups=4, backend="triton")
    torch.testing.assert_close(y, F.conv2d(*tensors, groups=4))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("kind", ["plain", "fake", "subclass", "in a mode", "mode inside"])
def test_compiled_in_one_graph(kind, backend, device):
    torch._dynamo.reset()

    def conv(*tensors):
        if kind == "mode inside":
            with Functions():
                return triton_conv(*tensors, groups=4, backend=backend)
        return triton_conv(*tensors, groups=4, backend=backend)

    # PyTorch's aot_eager fails for such a subclass with F.conv2d too.
    compiled = torch.compile(conv, fullgraph=True, backend="eager" if kind == "subclass" else "aot_eager")
    tensors = operands(device)
    expected = F.conv2d(*tensors, groups=4)
    if kind == "fake":
        with FakeTensorMode() as mode:
            y = compiled(*(mode.from_tensor(t) for t in tensors))
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        return
    if kind == "subclass":
        tensors[0] = tensors[0].as_subclass(Default)
    with Functions() if kind == "in a mode" else contextlib.nullcontext():
        y = compiled(*tensors)
    assert type(y) is (Default if kind == "subclass" else torch.Tensor)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)
