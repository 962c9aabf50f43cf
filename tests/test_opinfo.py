"""PyTorch's own samples and bad calls of conv2d, and more bad calls, through triton_conv."""

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

from groupconv import triton_conv

# Importing PyTorch's own tests forbids setting backend flags for the rest of the process: other tests set them.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

pytestmark = [
    pytest.mark.usefixtures("ieee", "few_programs"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
(CONV2D,) = (op for op in op_db if op.name == "nn.functional.conv2d")
SAMPLES = len(list(CONV2D.sample_inputs("cpu", torch.float32)))
ERRORS = len(list(CONV2D.error_inputs("cpu")))
assert SAMPLES
assert ERRORS
MODES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
BACKENDS = ("triton", "auto")


@pytest.mark.parametrize("number", range(SAMPLES))
def test_sample(number, device):
    """Value and gradients of a sample against float64; every third in each dtype."""
    dtype = list(MODES)[number % len(MODES)]
    torch.manual_seed(number)
    sample = list(CONV2D.sample_inputs(device, dtype, requires_grad=True))[number]
    with cases.guarded():
        y = triton_conv(sample.input, *sample.args, **sample.kwargs, backend="triton")
        leaves = [t for t in (sample.input, *sample.args) if t is not None]
        dy = torch.randn(y.shape, device=device).to(dtype)
        grads = torch.autograd.grad(y, leaves, dy)

    leaves64 = [t.detach().double().requires_grad_() for t in leaves]
    y64 = F.conv2d(*leaves64, **sample.kwargs)
    expected = torch.autograd.grad(y64, leaves64, dy.double())
    native = F.conv2d(sample.input, *sample.args, **sample.kwargs)
    assert y.shape == native.shape
    assert y.dtype == native.dtype
    c_out, cin_g, kh, kw = sample.args[0].shape
    taps, pixels = kh * kw, dy.numel() // c_out
    # The reductions of y, dx, dw and db.
    lengths = (cin_g * taps, c_out // sample.kwargs.get("groups", 1) * taps, pixels, pixels)
    for out, ref, length in zip((y, *grads), (y64, *expected), lengths, strict=False):
        assert out.dtype == dtype
        assert cases.error(out, ref) <= cases.bound(MODES[dtype], length)


def raised(call, *args, **kwargs) -> tuple[type, str]:
    """The type and message of the exception that a call must raise."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 which one is for the caller to compare
        call(*args, **kwargs)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(ERRORS))
def test_error_input(number, backend, device):
    error = list(CONV2D.error_inputs(device))[number]
    sample = error.sample_input
    expected = raised(F.conv2d, sample.input, *sample.args, **sample.kwargs)
    assert issubclass(expected[0], error.error_type)
    for _ in range(2):
        assert raised(triton_conv, sample.input, *sample.args, **sample.kwargs, backend=backend) == expected


def zeros(*shape, dtype=torch.float32):
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


def nested(*shape):
    return lambda device: torch.nested.nested_tensor(list(torch.zeros(shape, device=device)))


# What differs from a good call; tensors as functions of the device.
BAD_CALLS = {
    "stride 1.0": {"stride": 1.0},
    "stride (1.0, 1.0)": {"stride": (1.0, 1.0)},
    "stride True": {"stride": True},
    "stride (True, True)": {"stride": (True, True)},
    "stride '1'": {"stride": "1"},
    "stride None": {"stride": None},
    "stride a numpy bool": {"stride": np.bool_(True)},
    "stride (True, 1)": {"stride": (True, 1)},
    "dilation a tensor of floats": {"dilation": torch.tensor(1.0)},
    "groups a tensor of floats": {"groups": torch.tensor(1.0)},
    "stride 0": {"stride": 0},
    "stride of three": {"stride": (1, 1, 1)},
    "stride empty": {"stride": ()},
    "padding 1.0": {"padding": 1.0},
    "padding True": {"padding": True},
    "padding 'foo'": {"padding": "foo"},
    "padding 'SAME'": {"padding": "SAME"},
    "padding -1": {"padding": -1},
    "padding of three": {"padding": (1, 1, 1)},
    "padding None": {"padding": None},
    "padding 'same', stride 2": {"padding": "same", "stride": 2},
    "dilation 1.0": {"dilation": 1.0},
    "dilation True": {"dilation": True},
    "dilation 0": {"dilation": 0},
    "dilation of three": {"dilation": [1, 1, 1]},
    "groups 0": {"groups": 0},
    "groups -1": {"groups": -1},
    "groups 1.0": {"groups": 1.0},
    "groups True": {"groups": True},
    "groups 3": {"groups": 3},
    "groups (1,)": {"groups": (1,)},
    "groups None": {"groups": None},
    "bias too long": {"bias": zeros(7)},
    "bias 2-D": {"bias": zeros(6, 1)},
    "bias 0-D": {"bias": zeros()},
    "bias fp64": {"bias": zeros(6, dtype=torch.float64)},
    "bias a number": {"bias": 1.0},
    "weight None": {"weight": None},
    "weight 3-D": {"weight": zeros(6, 4, 3)},
    "weight 5-D": {"weight": zeros(6, 4, 3, 3, 1)},
    "weight fp16": {"weight": zeros(6, 4, 3, 3, dtype=torch.float16)},
    "weight fp64": {"weight": zeros(6, 4, 3, 3, dtype=torch.float64)},
    "weight of five channels": {"weight": zeros(6, 5, 3, 3)},
    "weight of no outputs": {"weight": zeros(0, 4, 3, 3)},
    "weight of no taps": {"weight": zeros(6, 4, 0, 3)},
    "weight an array": {"weight": lambda device: np.zeros((6, 4, 3, 3), np.float32)},
    "kernel larger than the map": {"weight": zeros(6, 4, 9, 3)},
    "dilated kernel larger than the map": {"dilation": (1, 5)},
    "input 2-D": {"input": zeros(4, 6)},
    "input 5-D": {"input": zeros(2, 4, 6, 6, 1)},
    "input 0-D": {"input": zeros()},
    "input of no channels": {"input": zeros(2, 0, 6, 6)},
    "input of no rows": {"input": zeros(2, 4, 0, 6), "padding": 0},
    "input of three channels": {"input": zeros(2, 3, 6, 6)},
    "input None": {"input": None},
    "input a list": {"input": lambda device: [[1.0]]},
    "input int64, weight fp32": {"input": zeros(2, 4, 6, 6, dtype=torch.int64)},
    "input bf16, weight fp32": {"input": zeros(2, 4, 6, 6, dtype=torch.bfloat16)},
    "input sparse": {"input": lambda device: torch.zeros(2, 4, 6, 6, device=device).to_sparse()},
    "input nested": {"input": nested(2, 4, 6, 6)},
    "input nested, without a batch": {"input": nested(4, 6, 6)},
    "weight nested": {"weight": nested(6, 4, 3, 3)},
    "bias nested": {"bias": nested(6, 1)},
    "bool tensors": {"input": zeros(2, 4, 6, 6, dtype=torch.bool), "weight": zeros(6, 4, 3, 3, dtype=torch.bool)},
}


def made(arguments, device):
    return {name: value(device) if callable(value) else value for name, value in arguments.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call(changes, backend, device):
    """The exception of F.conv2d, also after a good call whose arguments look equal, and a second time."""
    good = {"input": zeros(2, 4, 6, 6), "weight": zeros(6, 4, 3, 3), "bias": zeros(6)}
    good |= {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    bad, good = made(good | changes, device), made(good, device)
    # By position: where a type is wrong, PyTorch's message says how each argument was passed.
    expected = raised(F.conv2d, *bad.values())
    for _ in range(2):
        assert torch.equal(triton_conv(**good, backend=backend), F.conv2d(**good))
        assert raised(triton_conv, *bad.values(), backend=backend) == expected
        assert raised(triton_conv, **bad, backend=backend) == expected
