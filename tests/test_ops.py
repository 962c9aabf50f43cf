"""What surrounds the kernels: operators, compilation, autocast, second derivatives, planning, fallbacks, transforms."""

import csv
import importlib.resources
import itertools
import math

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import groupconv
from groupconv import (
    algorithms,
    arguments,
    assembler,
    conv_transpose2d,
    devices,
    dispatch,
    eager,
    epilogue,
    explain,
    launcher,
    prepared,
    triton_conv,
)  # fmt: skip
from groupconv.algorithms import REGISTRY, able
from groupconv.call import Call
from groupconv.problem import PASSES

pytestmark = [
    pytest.mark.usefixtures("ieee", "few_programs"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
SUBSETS = [subset for n in (1, 2, 3) for subset in itertools.combinations(range(3), n)]
LAYERS = list(
    csv.DictReader(
        importlib.resources.files("groupconv.perf_reports").joinpath("suite.csv").read_text("utf-8").splitlines()
    )
)


def random(*shape, dtype=torch.float32, device="cpu", seed=0, view="nchw"):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return cases.lay_out(values, view) if len(shape) == 4 else values


def operands(device, view="nchw", w_view="nchw", dtype=torch.float32):
    """x, w and bias of a grouped 3x2 convolution, all of which need gradients."""
    x = random(2, 6, 6, 5, dtype=dtype, device=device, view=view)
    w = random(4, 3, 3, 2, dtype=dtype, device=device, seed=1, view=w_view)
    bias = random(4, dtype=dtype, device=device, seed=2)
    return tuple(t.requires_grad_() for t in (x, w, bias))


def close(out, ref, terms=64):
    """Equal to float64 within what a few fp32 reductions of so many terms may lose."""
    return cases.error(out, ref) <= 4 * cases.bound("fp32", terms)


# --- The operators ---------------------------------------------------------------------------------------------------

LAYOUTS = [("nchw", "nchw"), ("nhwc", "nchw"), ("nchw", "nhwc"), ("slice", "nchw")]
SYMMETRIC, ASYMMETRIC = (1, 1, 1, 1), (0, 1, 2, 0)
LAID_OUT = [(*views, padding) for views, padding in zip(LAYOUTS, (SYMMETRIC, ASYMMETRIC) * 2, strict=True)]


@pytest.mark.parametrize(("view", "w_view", "padding"), LAID_OUT[1:3], ids=str)
def test_opcheck_conv2d(view, w_view, padding, device):
    x, w, bias = operands(device, view, w_view)
    bias = None if w_view == "nhwc" else bias
    checks = torch.library.opcheck(
        torch.ops.groupconv.conv2d.default, (x, w, bias, (2, 1), padding, (1, 2), 2, "triton")
    )
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("mask", "view", "w_view", "padding"),
    [
        ((True, True, True), "nhwc", "nchw", ASYMMETRIC),
        ((True, False, False), "slice", "nhwc", ASYMMETRIC),
    ],
    ids=str,
)
def test_opcheck_conv2d_backward(mask, view, w_view, padding, device):
    x, w, _ = operands(device, view, w_view)
    shape = torch.ops.groupconv.conv2d(x, w, None, (1, 1), padding, (1, 1), 2, "triton").shape
    dy = random(*shape, device=device, seed=3, view=view).requires_grad_()
    args = (dy, x, w, (1, 1), padding, (1, 1), 2, list(mask), "triton")
    checks = torch.library.opcheck(torch.ops.groupconv.conv2d_backward.default, args)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
@pytest.mark.parametrize(("view", "w_view", "padding"), LAID_OUT, ids=str)
def test_operators_by_every_backend(view, w_view, backend, padding, device):
    """Values and strides of both operators against float64, F.conv2d as the provider included."""
    x, w, bias = (t.detach() for t in operands(device, view, w_view))
    args = (2, 1), padding, (1, 1), 2
    y = torch.ops.groupconv.conv2d(x, w, bias, *args, backend)
    dy = random(*y.shape, device=device, seed=3)
    grads = torch.ops.groupconv.conv2d_backward(dy, x, w, *args, [True, True, True], backend)
    expected = (*cases.reference(x, w, bias, *args, dy), dy.double().sum((0, 2, 3)))
    for out, ref in zip((y, *grads), expected, strict=True):
        assert close(out, ref)
    assert y.stride() == cases.format_strides(y.shape, x, w)
    assert grads[0].stride() == cases.format_strides(x.shape, x, w)


# --- torch.compile ---------------------------------------------------------------------------------------------------


def test_compiled_block(device):
    """In one graph, for batches of two sizes."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = cases.Bottleneck().to(device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x = random(batch, 8, 5, 5, device=device, seed=batch, view="nhwc")
        for out, ref in zip(cases.step(compiled, block, x), cases.step(block, block, x), strict=True):
            assert (out - ref).norm() <= 1e-6 * ref.norm()


def test_compiled_with_autocast(device):
    torch._dynamo.reset()
    x, w, bias = operands(device, "nhwc")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, w, bias):
        with torch.autocast(device, torch.bfloat16):
            return triton_conv(x, w, bias, groups=2, backend="triton")

    y = compiled(x, w, bias)
    with torch.autocast(device, torch.bfloat16):
        expected = triton_conv(x, w, bias, groups=2, backend="triton")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    leaves = (x, w, bias)
    dy = torch.ones_like(y)
    for out, ref in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        assert out.dtype == torch.float32
        assert torch.equal(out, ref)


# --- Second derivatives ----------------------------------------------------------------------------------------------


def second_order(conv, tensors, wanted):
    """Gradients of a function of the gradients, by the wanted operands and by dy."""
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    leaves = [tensors[i] for i in wanted]
    y = conv(*tensors)
    dy = random(*y.shape, seed=5, device=str(y.device.type)).to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    total = sum((g.square() * g.cos()).sum() for g in first) + y.square().sum()
    return *first, *torch.autograd.grad(total, (*leaves, dy), allow_unused=True)


@pytest.mark.parametrize(("wanted", "view"), [*((subset, "nchw") for subset in SUBSETS), ((0, 1, 2), "nhwc")], ids=str)
def test_double_backward(wanted, view, device):
    tensors = operands(device, view)
    kwargs = {"stride": (2, 1), "padding": (1, 0), "groups": 2}
    derivatives = second_order(lambda *t: triton_conv(*t, **kwargs, backend="triton"), tensors, wanted)
    expected = second_order(lambda *t: F.conv2d(*t, **kwargs), [t.double() for t in tensors], wanted)
    for out, ref in zip(derivatives, expected, strict=True):
        assert (out is None) == (ref is None)
        assert out is None or close(out, ref, 256)


def test_third_derivative(device):
    def third(conv, x, w):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        value = conv(x, w).tanh().sum()
        for _ in range(3):
            dx, dw = torch.autograd.grad(value, (x, w), create_graph=True)
            value = dx.sin().sum() + dw.sin().sum()
        return dx.detach(), dw.detach()

    x, w, _ = operands(device)
    found = third(lambda x, w: triton_conv(x, w, groups=2, backend="triton"), x, w)
    expected = third(lambda x, w: F.conv2d(x, w, groups=2), x.double(), w.double())
    for out, ref in zip(found, expected, strict=True):
        assert close(out, ref, 1024)


# --- Autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", list(itertools.product((torch.float32, torch.bfloat16), repeat=2)), ids=str)
def test_autocast(types, device):
    """dtypes, values and gradients follow F.conv2d's, for operands of equal and of different types."""
    x, w, bias = (t.detach().to(d).requires_grad_() for t, d in zip(operands(device), (*types, types[1]), strict=True))
    with torch.autocast(device, torch.bfloat16):
        y = triton_conv(x, w, bias, groups=2, backend="triton")
        native = F.conv2d(x, w, bias, groups=2)
    assert y.dtype == native.dtype == torch.bfloat16
    dy = random(*y.shape, dtype=torch.bfloat16, device=device, seed=3)
    grads, natives = (torch.autograd.grad(out, (x, w, bias), dy) for out in (y, native))
    assert [g.dtype for g in grads] == [g.dtype for g in natives] == [*types, types[1]]
    rounded = [t.detach().bfloat16() for t in (x, w, bias)]
    expected = (*cases.reference(*rounded, groups=2, dy=dy), dy.double().sum((0, 2, 3)))
    for out, ref in zip((y, *grads), expected, strict=True):
        assert cases.error(out, ref) <= cases.bound("bf16", 1)


def test_autocast_leaves_double_alone(device):
    x, w, bias = (t.detach().double() for t in operands(device))
    with torch.autocast(device, torch.bfloat16):
        y = triton_conv(x, w, bias, groups=2)
        assert y.dtype == F.conv2d(x, w, bias, groups=2).dtype == torch.float64
    assert torch.equal(y, F.conv2d(x, w, bias, groups=2))


def test_autocast_off_inside(device):
    x, w, bias = operands(device)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        y = triton_conv(x, w, bias, groups=2, backend="triton")
    assert y.dtype == torch.float32
    assert torch.equal(y, triton_conv(x, w, bias, groups=2, backend="triton"))


# --- Planning, on tensors that are not there -------------------------------------------------------------------------


def fake_layer(row, dtype=torch.bfloat16):
    """(x, w, keywords) of a line of suite.csv, channels_last. Call under FakeTensorMode."""
    n = {key: int(value) for key, value in row.items() if value.isdigit()}
    x = torch.empty(n["N"], n["C_in"], n["H"], n["W"], device="cuda", dtype=dtype)
    w = torch.empty(n["C_out"], n["C_in"] // n["groups"], n["KH"], n["KW"], device="cuda", dtype=dtype)
    keywords = {
        "stride": (n["stride_h"], n["stride_w"]),
        "padding": (n["pad_h"], n["pad_w"]),
        "dilation": (n["dil_h"], n["dil_w"]),
        "groups": n["groups"],
    }
    return x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last), keywords


@pytest.mark.parametrize("row", LAYERS, ids=[row["name"] for row in LAYERS])
def test_suite_layer_is_planned(row):
    with FakeTensorMode():
        x, w, keywords = fake_layer(row)
        plan = explain(x, w, **keywords)
        y = F.conv2d(x, w, **keywords)
    assert plan.problem.y_shape == tuple(y.shape)
    assert (plan.problem.layout, plan.problem.out_layout, plan.problem.dtype) == ("nhwc", "nhwc", "bf16")
    assert [p.pass_ for p in plan.passes] == list(PASSES)
    for p in plan.passes:
        assert p.algorithm in (*REGISTRY, "torch")
        assert p.source in ("exact", "nearest", "modelled", "fallback")
        assert (p.config is None) == (p.algorithm == "torch")
        assert p.reason
        assert p.flops == 2 * math.prod(y.shape) * math.prod(w.shape[1:])
        assert p.floor_us > 0
        assert p.reason in str(plan)


@pytest.mark.parametrize("name", ["sm_80", "gfx942", "nvidia_h200", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
def test_explain_for_a_target(name):
    x, w = torch.empty(8, 32, 14, 14, dtype=torch.bfloat16), torch.empty(32, 4, 3, 3, dtype=torch.bfloat16)
    plan = explain(x, w, groups=8, target=name)
    assert plan.target == devices.named(name)
    assert {p.source for p in plan.passes} <= {"exact", "nearest", "modelled"}
    forced = explain(x, w, groups=8, target=name, backend="triton")
    assert {p.algorithm for p in forced.passes} <= set(REGISTRY)


def test_explain_refuses():
    x, w = torch.empty(2, 8, 6, 6), torch.empty(8, 2, 3, 3)
    with pytest.raises(ValueError, match="'sm_12345' is not known"):
        explain(x, w, groups=4, target="sm_12345")
    with pytest.raises(ValueError, match="backend is 'cudnn'"):
        explain(x, w, groups=4, backend="cudnn")
    with pytest.raises(RuntimeError, match="Given groups=3"):
        explain(x, w, groups=3)
    with pytest.raises(NotImplementedError, match="float64"):
        explain(x.double(), w.double(), groups=4, backend="triton", target="sm_90")


def test_explain_follows_autocast():
    """As the call does, whose operands may differ in dtype until autocast has cast them."""
    x, w = torch.randn(2, 8, 5, 5, dtype=torch.bfloat16), torch.randn(8, 2, 3, 3)
    with pytest.raises(RuntimeError, match="should be the same"):
        explain(x, w, groups=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(x, w, groups=4).problem.dtype == "bf16"
        assert explain(w.new_zeros(8, 5, 5), w, groups=4).problem.dtype == "bf16"


@pytest.mark.parametrize("operands", [(None, torch.ones(8, 2, 3, 3)), (torch.ones(2, 8, 5, 5), None)])
def test_explain_of_what_is_no_tensor(operands):
    for call in (F.conv2d, explain):
        with pytest.raises(TypeError, match="invalid combination of arguments"):
            call(*operands)


def test_explain_names_the_fallback():
    plan = explain(torch.empty(2, 8, 6, 6).double(), torch.empty(8, 2, 3, 3).double(), groups=4)
    for p in plan.passes:
        assert (p.algorithm, p.source) == ("torch", "fallback")
        assert "float64" in p.reason


SHAPES = [(2, 4, 5, 6), (1, 4, 5, 6), (2, 2, 5, 6), (2, 4, 1, 1), (1, 4, 1, 1), (0, 4, 5, 6)]


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("w_view", ["nchw", "nhwc"])
@pytest.mark.parametrize("x_view", cases.VIEWS)
def test_fake_results(x_view, w_view, backend):
    """Shape, strides, dtype and device of results on fake CUDA tensors are those of F.conv2d's rule."""
    fake = {"device": "cuda", "dtype": torch.float16}
    mask = [True, True, True]
    for shape in SHAPES:
        like_x = cases.lay_out(torch.zeros(shape), x_view)
        like_w = cases.lay_out(torch.zeros(6, shape[1] // 2, 3, 2), w_view)
        with FakeTensorMode():
            # Without a GPU, PyTorch makes such tensors but differentiates none.
            x = torch.empty_strided(like_x.shape, like_x.stride(), **fake)
            w = torch.empty_strided(like_w.shape, like_w.stride(), **fake)
            y = triton_conv(x, w, padding=(1, 2), groups=2, backend=backend)
            native = F.conv2d(x, w, padding=(1, 2), groups=2)
            args = (1, 1), (1, 1, 2, 2), (1, 1), 2, mask, backend
            grads = torch.ops.groupconv.conv2d_backward(y, x, w, *args)
        assert (y.shape, y.dtype, y.device) == (native.shape, native.dtype, native.device)
        assert y.stride() == cases.format_strides(y.shape, like_x, like_w)
        assert [g.shape for g in grads] == [x.shape, w.shape, (6,)]
        assert {(g.dtype, g.device) for g in grads} == {(x.dtype, x.device)}
        assert grads[0].stride() == cases.format_strides(x.shape, like_x, like_w)
        assert grads[1].stride() == cases.format_strides(w.shape, like_w)


# --- Backends and fallbacks ------------------------------------------------------------------------------------------


def test_unknown_backend():
    x, w, _ = operands("cpu")
    with pytest.raises(ValueError, match=r"backend is 'cuda', but must be one of auto, triton, torch, triton:implicit"):
        triton_conv(x, w, groups=2, backend="cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32], ids=str)
def test_types_without_kernels(dtype):
    """Under "auto" they are F.conv2d's; a backend of ours names them."""
    x, w = (t.detach().to(dtype) for t in operands("cpu")[:2])
    assert torch.equal(triton_conv(x, w, groups=2), F.conv2d(x, w, groups=2))
    for backend in ("triton", "triton:implicit_gemm"):
        with pytest.raises(NotImplementedError, match=str(dtype).removeprefix("torch.")):
            triton_conv(x, w, groups=2, backend=backend)


def test_triton_on_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(algorithms, "INTERPRETED", False)
    prepared.reset()
    try:
        x, w, bias = operands("cpu")
        with pytest.raises(NotImplementedError, match="tensors are on cpu"):
            triton_conv(x, w, bias, groups=2, backend="triton")
        y = triton_conv(x, w, bias, groups=2)
        assert torch.equal(y, F.conv2d(x, w, bias, groups=2))
    finally:
        prepared.reset()


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"padding": "same"}, {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 2]}], ids=str
)
@pytest.mark.parametrize("view", ["nchw", "nhwc"])
def test_fallback_is_conv2d(backend, kwargs, view):
    """backend="torch", and "auto" on CPU tensors, are F.conv2d to the last bit, gradients included."""
    tensors = operands("cpu", view)
    y = triton_conv(*tensors, groups=2, backend=backend, **kwargs)
    native = F.conv2d(*tensors, groups=2, **kwargs)
    assert torch.equal(y, native)
    assert y.stride() == native.stride()
    dy = torch.ones_like(y)
    for out, ref in zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(native, tensors, dy), strict=True):
        assert torch.equal(out, ref)


@pytest.fixture
def bf16x3():
    groupconv.set_fp32_precision("bf16x3")
    yield
    groupconv.set_fp32_precision(None)


def test_bf16x3_is_taken_only_where_it_is_wished_for(device, bf16x3):
    """Calls before and after are none of it; 16-bit operands and F.conv2d never are; gradients are as their call."""
    x, w, bias = operands(device)
    wished = explain(x, w, bias, groups=2, backend="triton", target="sm_90")
    assert wished.problem.dtype == "bf16x3"
    assert {plan.algorithm for plan in wished.passes} == {"implicit_gemm"}
    y = triton_conv(x, w, bias, groups=2, backend="triton")
    assert explain(x.half(), w.half(), groups=2, target="sm_90").problem.dtype == "fp16"
    groupconv.set_fp32_precision(None)
    assert explain(x, w, bias, groups=2, target="sm_90").problem.dtype == "fp32"
    exact = triton_conv(x, w, bias, groups=2, backend="triton")
    assert len({call.problem.dtype for call in prepared._CALLS.values()} & {"fp32", "bf16x3"}) == 2
    dy = random(*y.shape, device=device, seed=3)
    expected = cases.reference(x, w, bias, groups=2, dy=dy)
    for out in (y, exact):
        assert cases.error(out, expected[0]) <= cases.bound("bf16x3", 18)
        for found, reference, terms in zip(torch.autograd.grad(out, (x, w), dy), expected[1:], (12, 40), strict=True):
            assert cases.error(found, reference) <= cases.bound("bf16x3", terms)
    assert torch.equal(triton_conv(x, w, bias, groups=2, backend="torch"), F.conv2d(x, w, bias, groups=2))


def test_bf16x3_needs_matrix_units(bf16x3):
    x, w = torch.empty(2, 6, 6, 5), torch.empty(4, 3, 3, 2)
    found = explain(x, w, groups=2, target="sm_75")
    assert {plan.algorithm for plan in found.passes} == {"torch"}
    assert "Triton has no bf16x3 matrix instructions on sm_75" in found.fprop.reason
    depthwise = explain(torch.empty(2, 6, 9, 9), torch.empty(6, 1, 3, 3), groups=6, backend="triton", target="sm_90")
    assert depthwise.fprop.algorithm in able(depthwise.problem, "fprop", devices.named("sm_90"))


def test_unknown_fp32_precisions_are_refused():
    for wrong in ("tf32", True, ""):
        with pytest.raises(ValueError, match=r"precision is .*, but must be None or"):
            groupconv.set_fp32_precision(wrong)


def test_fp32_precision_is_followed(device):
    """The plan computes fp32 as torch's setting for convolutions says, also when the setting changes between calls."""
    x, w = torch.empty(2, 8, 6, 6, device=device), torch.empty(8, 2, 3, 3, device=device)
    for precision, dtype in (("ieee", "fp32"), ("tf32", "tf32"), ("ieee", "fp32")):
        cases.set_precision(precision)
        assert explain(x, w, groups=4, backend="triton").problem.dtype == dtype
        assert prepared.lookup(x, w, None, 1, 0, 1, 4, "triton").problem.dtype == dtype


# --- Forms of a call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [1, "same", "valid"], ids=str)
def test_unbatched(padding, device):
    x, w, bias = operands(device)
    leaves = (x, w, bias)
    y = triton_conv(x[0], w, bias, padding=padding, groups=2, backend="triton")
    batched = triton_conv(x[:1], w, bias, padding=padding, groups=2, backend="triton")
    assert y.shape == F.conv2d(x[0], w, bias, padding=padding, groups=2).shape
    assert torch.equal(y, batched[0])
    dy = random(*batched.shape, device=device, seed=3)
    for out, ref in zip(torch.autograd.grad(y, leaves, dy[0]), torch.autograd.grad(batched, leaves, dy), strict=True):
        assert torch.equal(out, ref)


ACCEPTED = {
    "lists": {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]},
    "lists of one": {"stride": [2], "padding": [1], "dilation": [2]},
    "torch.Size": {"stride": (2,), "padding": torch.Size((1, 1))},
    "valid": {"padding": "valid"},
    "numpy's groups": {"padding": 1, "groups": np.int64(2)},
    "numpy's integers": {"padding": (np.int64(1), np.int32(1)), "stride": np.int32(2), "dilation": np.uint8(2)},
    "tensors": {"padding": torch.tensor(1), "stride": torch.tensor([2]), "groups": torch.tensor(2)},
}


@pytest.mark.parametrize("kwargs", ACCEPTED.values(), ids=ACCEPTED)
def test_forms_of_arguments_that_conv2d_takes(kwargs, device):
    x, w, bias = operands(device)
    kwargs = {"groups": 2, **kwargs}
    expected = F.conv2d(*(t.detach().double() for t in (x, w, bias)), **kwargs)
    assert close(triton_conv(x, w, bias, **kwargs, backend="triton"), expected)
    assert explain(x, w, bias, **kwargs, target="nvidia_h200").problem.groups == 2


@pytest.mark.parametrize("padding", [(0, 1, 3, 0), [2, 0, 1, 1], (1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch", "compiled"])
def test_padding_of_each_side(backend, padding, device):
    """Values and gradients, by our kernels, F.conv2d, and a graph."""
    leaves = operands(device)
    top, bottom, left, right = padding

    def call(x, w, bias):
        kwargs = {"stride": (2, 1), "padding": padding, "groups": 2}
        return triton_conv(x, w, bias, **kwargs, backend="triton" if backend == "compiled" else backend)

    if backend == "compiled":
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    y = call(*leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.conv2d(F.pad(exact[0], (left, right, top, bottom)), *exact[1:], (2, 1), 0, 1, 2)
    assert close(y, expected)
    dy = random(*y.shape, device=device, seed=3)
    for out, ref in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, exact, dy.double()), strict=True
    ):
        assert close(out, ref)


@pytest.mark.parametrize(
    ("padding", "error", "message"),
    [
        ((-1, 0, 0, 0), RuntimeError, "negative padding is not supported"),
        ((1, 2, 3), RuntimeError, "expected padding to be a single integer value or a list of 2 values"),
        ((1, 2, 3, 4, 5), RuntimeError, "expected padding to be a single integer value or a list of 2 values"),
        ((1, 0.5, 0, 0), TypeError, "must be tuple of ints"),
    ],
    ids=str,
)
def test_padding_that_is_none(padding, error, message, device):
    x, w, bias = operands(device)
    for backend in ("auto", "triton", "torch"):
        with pytest.raises(error, match=message):
            triton_conv(x, w, bias, padding=padding, groups=2, backend=backend)


def test_bias_of_any_stride(device):
    x, w, _ = operands(device)
    for bias in (random(8, device=device)[::2], random(1, device=device).expand(4), random(5, device=device)[1:]):
        y = triton_conv(x, w, bias, groups=2, backend="triton")
        assert close(y, cases.reference(x, w, bias, groups=2))


def test_data_that_moves(device):
    """Equal calls on tensors at addresses of different alignment."""
    _, w, bias = operands(device)
    storage = random(2 * 6 * 6 * 5 + 7, device=device)
    for offset in (0, 1, 4, 0, 3):
        x = storage.as_strided((2, 6, 6, 5), (180, 30, 5, 1), offset)
        y = triton_conv(x, w, bias, groups=2, backend="triton")
        assert close(y, cases.reference(x, w, bias, groups=2))


def test_many_shapes_are_forgotten(device, monkeypatch):
    """The table of prepared calls stays bounded, and calls stay right when it starts over."""
    monkeypatch.setattr(prepared, "MOST_CALLS", 3)
    _, w, bias = operands(device)
    for width in (4, 5, 6, 7, 4):
        x = random(1, 6, 4, width, device=device)
        y = triton_conv(x, w, bias, groups=2, backend="triton")
        assert close(y, cases.reference(x, w, bias, groups=2))
        assert len(prepared._CALLS) <= 3


# --- Autograd's modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph(mode, device):
    x, w, bias = operands(device)
    with mode():
        y = triton_conv(x, w, bias, groups=2, backend="triton")
    assert y.grad_fn is None
    assert not y.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)
    assert close(y, cases.reference(x, w, bias, groups=2))
    assert not triton_conv(x.detach(), w.detach(), groups=2, backend="triton").requires_grad


@pytest.mark.parametrize(
    ("wanted", "saved"), [((0,), "w"), ((1,), "x"), ((2,), ""), ((0, 1), "wx"), ((0, 2), "w"), ((1, 2), "x")], ids=str
)
def test_saves_only_what_backward_reads(wanted, saved, device):
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(operands(device))]
    names = {tensors[0].data_ptr(): "x", tensors[1].data_ptr(): "w", tensors[2].data_ptr(): "b"}

    def of(kept):
        return "".join(sorted(names[t.data_ptr()] for t in kept if t is not None))

    y = triton_conv(*tensors, groups=2, backend="triton")
    assert y.requires_grad
    assert of(y.grad_fn.saved_tensors) == saved
    # What hooks are given depends on nothing that may change before checkpointing makes the pass again.
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        triton_conv(*tensors, groups=2, backend="triton")
    assert of(kept) == "wx"


def test_backward_twice(device):
    """A retained graph gives the same gradients again; a released one, PyTorch's error; so does a changed operand."""
    x, w, bias = operands(device)
    y = triton_conv(x, w, bias, groups=2, backend="triton")
    first = torch.autograd.grad(y.sum(), (x, w), retain_graph=True)
    again = torch.autograd.grad(y.sum(), (x, w))
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), (x, w))
    y = triton_conv(x, w, bias, groups=2, backend="triton")
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), (x, w))


# --- Transforms ------------------------------------------------------------------------------------------------------


TRANSFORMS = {
    "grad": lambda f, x, w, b: torch.func.grad(lambda *t: f(*t).sin().sum(), (0, 1, 2))(x, w, b),
    "grad of grad": lambda f, x, w, b: torch.func.grad(
        lambda x, w: torch.func.grad(lambda x: f(x, w, b).sin().sum())(x).square().sum(), (0, 1)
    )(x, w),
    "vmap of grad": lambda f, x, w, b: torch.vmap(
        torch.func.grad(lambda w, x: f(x[None], w, b).sin().sum()), (None, 0)
    )(w, x),
    "grad of vmap": lambda f, x, w, b: torch.func.grad(lambda w: torch.vmap(lambda x: f(x[None], w, b))(x).sin().sum())(
        w
    ),
    "vjp": lambda f, x, w, b: torch.func.vjp(lambda *t: f(*t).sin().sum((1, 2, 3)), x, w, b)[1](
        torch.ones_like(x[:, 0, 0, 0])
    ),
    "jvp": lambda f, x, w, b: torch.func.jvp(lambda *t: f(*t).sin(), (x, w, b), (x, w, b)),
    "jacrev": lambda f, x, w, b: torch.func.jacrev(lambda b: f(x, w, b).sin().sum((2, 3)))(b),
    "jacfwd": lambda f, x, w, b: torch.func.jacfwd(lambda w: f(x, w, b).sin().sum((2, 3)))(w),
    "hessian": lambda f, x, w, b: torch.func.hessian(lambda w: f(x[:1], w, b).sin().sum())(w),
}


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, backend, device, monkeypatch):
    """Derivatives inside torch.func, of our kernels too, against float64; of the inputs as they lie."""
    tensors = [t.detach() for t in operands(device, "nhwc" if name == "grad" else "nchw")]
    runs = []
    for method in ("forward", "backward"):
        whole = getattr(Call, method)
        monkeypatch.setattr(Call, method, lambda *a, whole=whole: runs.append(1) or whole(*a))
    found = TRANSFORMS[name](lambda *t: triton_conv(*t, stride=(2, 1), padding=1, groups=2, backend=backend), *tensors)
    double = [t.double() for t in tensors]
    expected = TRANSFORMS[name](lambda *t: F.conv2d(*t, stride=(2, 1), padding=1, groups=2), *double)
    for out, ref in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
        assert cases.error(out, ref) <= 2e-6
    assert bool(runs) == (backend == "triton" or device != "cpu")


@pytest.mark.parametrize("name", ["grad", "vmap of grad", "jvp"])
def test_transforms_of_a_transposed_convolution(name, device):
    x, _, bias = (t.detach() for t in operands(device))
    w = random(6, 2, 3, 2, device=device, seed=1)
    found = TRANSFORMS[name](lambda *t: conv_transpose2d(*t, stride=2, groups=2, backend="triton"), x, w, bias)
    double = [t.double() for t in (x, w, bias)]
    expected = TRANSFORMS[name](lambda *t: F.conv_transpose2d(*t, stride=2, groups=2), *double)
    for out, ref in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
        assert cases.error(out, ref) <= 2e-6


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_vmap(backend, device):
    """Over inputs; over filters; over both: an ensemble of models."""
    x, w = random(3, 2, 6, 6, 5, device=device), random(3, 4, 3, 3, 2, device=device, seed=1)
    for dims, tensors in (((0, None), (x, w[0])), ((None, 0), (x[0], w)), ((0, 0), (x, w))):
        found = torch.func.vmap(lambda x, w: triton_conv(x, w, groups=2, backend=backend), dims)(*tensors)
        expected = torch.stack(
            [
                F.conv2d((x[i] if dims[0] == 0 else x[0]).double(), (w[i] if dims[1] == 0 else w[0]).double(), groups=2)
                for i in range(3)
            ]
        )
        assert close(found, expected)


def test_per_sample_gradients(device):
    x, w = random(3, 6, 6, 5, device=device), random(4, 3, 3, 2, device=device, seed=1)

    def per_sample(conv, x, w):
        return torch.func.vmap(torch.func.grad(lambda w, x: conv(x, w).sin().sum()), (None, 0))(w, x)

    found = per_sample(lambda x, w: triton_conv(x, w, groups=2), x, w)
    expected = per_sample(lambda x, w: F.conv2d(x, w, groups=2), x.double(), w.double())
    assert close(found, expected)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_forward_mode(backend, device):
    tensors = [t.detach() for t in operands(device)]
    tangents = [torch.randn_like(t) for t in tensors]
    found = torch.func.jvp(lambda *t: triton_conv(*t, groups=2, backend=backend), tuple(tensors), tuple(tangents))
    expected = torch.func.jvp(
        lambda *t: F.conv2d(*t, groups=2), tuple(t.double() for t in tensors), tuple(t.double() for t in tangents)
    )
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, s) for t, s in zip(tensors, tangents, strict=True)]
        dual = torch.autograd.forward_ad.unpack_dual(triton_conv(*duals, groups=2, backend=backend))
    for out, ref in zip((*found, *dual), expected * 2, strict=True):
        assert close(out, ref)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", [*TRANSFORMS, "vmap"])
def test_transforms_inside_what_is_compiled(name, activation, device, monkeypatch):
    """By F.conv2d; kernels that are forced say so: graphs have no derivatives of theirs inside torch.func."""
    x, w, bias = (t.detach() for t in operands(device))
    transform = TRANSFORMS.get(name, lambda f, x, w, b: torch.vmap(lambda x: f(x[None], w, b))(x))
    refusal = prepared.refusal
    for module in (eager, prepared, epilogue):  # as on a GPU
        monkeypatch.setattr(module, "refusal", lambda x, backend: None if backend == "auto" else refusal(x, backend))

    def transformed(backend):
        return lambda *t: transform(
            lambda *t: triton_conv(*t, groups=2, activation=activation, backend=backend), *t
        )  # fmt: skip

    torch._dynamo.reset()
    found, expected = (
        torch.compile(transformed("auto"), backend="aot_eager")(x, w, bias),
        transformed("torch")(x, w, bias),
    )
    for out, ref in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
        assert cases.error(out, ref.double()) <= 2e-6
    with pytest.raises(Exception, match="inside a compiled function"):
        torch.compile(transformed("triton"), backend="aot_eager", fullgraph=True)(x, w, bias)


def test_meta_tensors():
    operands = torch.empty(2, 8, 6, 6, device="meta"), torch.empty(8, 2, 3, 3, device="meta")
    y = triton_conv(*operands, groups=4)
    assert (y.shape, y.device.type) == ((2, 8, 4, 4), "meta")
    with pytest.raises(NotImplementedError, match=r"backend='triton' cannot run .* tensors are on meta"):
        triton_conv(*operands, groups=4, backend="triton")


ABSURD = {
    "depthwise, stride 10^5": ((2, 64, 33, 33), (64, 1, 3, 3), {"stride": 10**5, "groups": 64}),
    "depthwise, stride 2^31": ((2, 64, 33, 33), (64, 1, 3, 3), {"stride": 2**31, "groups": 64}),
    "grouped, stride 2^31": ((2, 64, 33, 33), (64, 4, 3, 3), {"stride": 2**31, "groups": 16}),
    "1x1, dilation 2^31": ((2, 64, 33, 33), (64, 4, 1, 1), {"dilation": 2**31, "groups": 16}),
    "1x1, dilation 10^6": ((2, 64, 33, 33), (64, 1, 1, 1), {"dilation": 10**6, "groups": 64}),
    "3x3, dilation and padding 10^5": ((1, 8, 9, 9), (8, 1, 3, 3), {"dilation": 10**5, "padding": 10**5, "groups": 8}),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("x", "w", "kwargs"), ABSURD.values(), ids=ABSURD)
def test_absurd_arguments_are_planned_at_once(x, w, kwargs):
    """They are F.conv2d's, and explain says so."""
    x, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in (x, w))
    plan = explain(x, w, target="nvidia_h200", **kwargs)
    assert {pass_plan.algorithm for pass_plan in plan.passes} == {"torch"}
    assert "are F.conv2d's" in plan.fprop.reason


@pytest.mark.parametrize("axis", [2, 3])
def test_sequences_seen_as_maps_are_planned_as_they_lie(axis):
    """[N, L, C] with an axis of one put in: its channels are neighbours, wherever that axis is."""
    x = torch.empty(8, 2048, 256, dtype=torch.bfloat16, device="meta").transpose(1, 2).unsqueeze(axis)
    w = torch.empty(256, 1, 4, dtype=torch.bfloat16, device="meta").unsqueeze(axis)
    padding = (0, 3) if axis == 2 else (3, 0)
    plan = explain(x, w, padding=padding, groups=256, backend="triton", target="nvidia_h200")
    assert plan.problem.layout == "nhwc"
    assert plan.fprop.config["BLOCK_C"] >= 16


def test_sequences_seen_as_maps(device):
    """Their numbers, and y in F.conv2d's format, whichever way the axis of one was put in."""
    t, w1 = random(2, 11, 8, device=device).transpose(1, 2), random(8, 2, 3, device=device, seed=1)
    for axis in (2, 3):
        x, w = t.unsqueeze(axis), w1.unsqueeze(axis)
        padding = (0, 1) if axis == 2 else (1, 0)
        y = triton_conv(x, w, padding=padding, groups=4, backend="triton")
        expected = F.conv2d(x.double(), w.double(), padding=padding, groups=4)
        assert close(y, expected)
        assert y.stride() == cases.format_strides(y.shape, x, w)


@pytest.mark.parametrize("wanted", ["x", "w", "xw"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_kernel_that_would_be_miscompiled(backend, wanted, monkeypatch):
    """Under "auto" it is left to F.conv2d, with a warning; a backend that was asked for says so."""

    def refuse(*_):
        raise assembler.Miscompiled("groupconv: ptxas would miscompile it")

    monkeypatch.setattr(launcher.Launch, "__call__", refuse)
    x, w = random(2, 8, 6, 5), random(8, 4, 3, 3, seed=1)
    leaves = [tensor.requires_grad_() for name, tensor in (("x", x), ("w", w)) if name in wanted]
    y = F.conv2d(x, w, padding=1, groups=2)
    dy = torch.ones_like(y)
    expected = torch.autograd.grad(y, leaves, dy)

    args = arguments.normalise(x.shape, w.shape, 1, 1, 1, 2)
    problem = prepared.make_problem(x, w, False, args)
    call = prepared.Call(problem, dispatch.plan(problem, devices.DEFAULT, "triton"), args, backend, x, w, None)
    needs = x.requires_grad, w.requires_grad, False
    x, w = x.detach(), w.detach()
    saved = [tensor if kept else None for tensor, kept in zip((x, w), call.saves(*needs[:2]), strict=True)]
    steps = (lambda: [call.forward(x, w, None)], [y]), (lambda: call.backward(dy, *saved, needs), expected)
    for step, references in steps:
        if backend == "triton":
            with pytest.raises(assembler.Miscompiled):
                step()
            continue
        with pytest.warns(UserWarning, match="F.conv2d runs instead"):
            first = step()
        for results in (first, step()):
            for result, reference in zip((r for r in results if r is not None), references, strict=True):
                torch.testing.assert_close(result, reference)
