"""Properties that hold for any valid convolution, and for any shape and strides."""

import math

import cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groupconv import triton_conv
from groupconv.algorithms import row_march
from groupconv.problem import bucket, dense_strides, suggests_channels_last

pytestmark = [
    pytest.mark.usefixtures("ieee", "few_programs"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The fixtures set up modes of PyTorch, the same for every example.
fixed = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MODES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@st.composite
def convolutions(draw):
    """(shapes of x and w, keywords) of a valid convolution."""
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    stride = draw(st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 4), st.integers(1, 5))))
    padding = draw(st.one_of(st.tuples(st.integers(0, 4), st.integers(0, 3)), st.sampled_from(["same", "valid"])))
    if padding == "same":
        stride = (1, 1)
    both = (0, 0) if isinstance(padding, str) else padding
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    least = [1 if padding == "same" else max(1, span - 2 * p) for span, p in zip(spans, both, strict=True)]
    hw = [size + draw(st.integers(0, 6)) for size in least]
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    cin_g, cout_g = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    x_shape, w_shape = (draw(st.integers(1, 3)), groups * cin_g, *hw), (groups * cout_g, cin_g, *kernel)
    return x_shape, w_shape, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


@settings(fixed, max_examples=8)
@given(
    convolutions(),
    st.sampled_from(list(MODES)),
    st.sampled_from(cases.VIEWS),
    st.sampled_from(cases.VIEWS),
    st.sampled_from((*cases.VIEWS, "expanded")),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_convolution(convolution, dtype, x_view, w_view, dy_view, with_bias, seed):
    x_shape, w_shape, kwargs = convolution
    generator = torch.Generator().manual_seed(seed)

    def random(shape, view):
        values = torch.randn(shape, generator=generator).to(DEVICE, dtype)
        return values.flatten()[0].expand(shape) if view == "expanded" else cases.lay_out(values, view)

    x, w = random(x_shape, x_view).requires_grad_(), random(w_shape, w_view).requires_grad_()
    bias = torch.randn(w_shape[0], generator=generator).to(DEVICE, dtype).requires_grad_() if with_bias else None
    leaves = [t for t in (x, w, bias) if t is not None]
    leaves64 = [t.detach().double().requires_grad_() for t in leaves]
    y64 = F.conv2d(*leaves64, **kwargs)
    dy = random(y64.shape, dy_view)
    expected = torch.autograd.grad(y64, leaves64, dy.double())

    with cases.guarded():
        y = triton_conv(x, w, bias, **kwargs, backend="triton")
        found = torch.autograd.grad(y, leaves, dy)

    taps, pixels = math.prod(w_shape[2:]), y.numel() // w_shape[0]
    lengths = (w_shape[1] * taps, w_shape[0] // kwargs["groups"] * taps, pixels, pixels)
    for out, ref, length in zip((y, *found), (y64, *expected), lengths, strict=False):
        assert cases.error(out, ref) <= cases.bound(MODES[dtype], length)
    assert y.stride() == cases.format_strides(y.shape, x, w)
    assert found[0].stride() == cases.format_strides(x.shape, x, w)


@st.composite
def shapes_and_strides(draw):
    """4-D shapes with strides that are nearly, or exactly, those of some dense layout."""
    shape = draw(st.tuples(*[st.sampled_from([0, 1, 1, 2, 3, 5])] * 4))
    strides, least = [0] * 4, 1
    for axis in draw(st.permutations(range(4))):
        strides[axis] = least
        least *= max(1, shape[axis]) * draw(st.sampled_from([1, 1, 1, 2]))
    for axis in range(4):
        if draw(st.integers(0, 5)) == 0:
            strides[axis] = draw(st.integers(0, 40))
    return shape, tuple(strides)


@settings(fixed, max_examples=500)
@given(shapes_and_strides())
def test_channels_last_as_pytorch_sees_it(given_):
    shape, strides = given_
    t = torch.empty_strided(shape, strides, device="meta")
    assert suggests_channels_last(shape, strides) == cases.is_channels_last(t)


@settings(fixed, max_examples=100)
@given(st.tuples(st.integers(0, 6), *[st.integers(1, 6)] * 3))
def test_dense_strides(shape):
    """Of any batch, the empty one too; there is no convolution of no channels or pixels."""
    for channels_last, memory_format in ((True, torch.channels_last), (False, torch.contiguous_format)):
        t = torch.empty(shape, device="meta", memory_format=memory_format)
        assert dense_strides(shape, channels_last) == t.stride()


@settings(fixed, max_examples=200)
@given(st.integers(1, 2**40))
def test_bucket_is_the_nearest_power_of_two(value):
    found = bucket(value)
    assert found & (found - 1) == 0
    assert found**2 <= 2 * value**2 <= 4 * found**2  # within half a power of two
    assert bucket(found) == found
    assert bucket(value) <= bucket(value + 1)


@settings(fixed, max_examples=100)
@given(
    st.integers(1, 64), st.integers(2, 64), st.integers(1, 80), st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([1, 2, 4, 8]),
)  # fmt: skip
def test_channel_tiles_hold_their_groups(result, source, groups, block_c, align):
    """A tile of row_march reads every channel of the groups that its result channels belong to."""
    align = math.gcd(align, groups * source)
    made = row_march._channels(result, source, groups, block_c, align)
    total = groups * result
    assert made.step <= min(block_c, made.block_c)
    assert made.read <= made.block_k
    assert (made.tiles - 1) * made.step < total <= made.tiles * made.step
    for first in range(0, total, made.step):
        last = min(first + made.step, total) - 1
        begin = first // result * source // align * align  # as kernels/row_march.py has it
        assert begin <= first // result * source
        assert (last // result + 1) * source <= begin + made.read
    assert made.read % align == 0
    # In no more channels than the tile wants that wants most, rounded to 16 bytes.
    begins = range(0, total, made.step)
    spans = [
        ((min(c + made.step, total) - 1) // result + 1) * source - c // result * source // align * align for c in begins
    ]
    assert made.read == min(math.ceil(max(spans) / align) * align, math.ceil(groups * source / align) * align)
