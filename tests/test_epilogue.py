"""What follows the convolution in one call: residual, activation, channel shuffle; against torch's own, in float64."""

import dataclasses
import itertools

import cases
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._decomp import decomposition_table
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from groupconv import algorithms, dispatch, epilogue, explain, prepared, triton_conv
from groupconv.activations import ACTIVATIONS
from groupconv.problem import ConvProblem

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


# Convolutions, of which each algorithm's fprop is asked for the first that it serves.
SHAPES = (
    ConvProblem(2, 32, 6, 5, 32, 3, 3, pad=(1, 1, 1, 1), groups=2, dtype="fp16"),
    ConvProblem(2, 64, 6, 8, 64, 3, 3, pad=(1, 1, 1, 1), groups=2, dtype="fp16"),
    ConvProblem(2, 32, 6, 5, 32, 3, 3, pad=(1, 1, 1, 1), groups=8, dtype="fp16"),
    ConvProblem(2, 8, 6, 5, 8, 3, 3, pad=(1, 1, 1, 1), groups=8, dtype="fp16"),
    ConvProblem(2, 8, 9, 8, 8, 5, 5, pad=(2, 2, 2, 2), groups=8, dtype="fp16"),
    ConvProblem(2, 8, 9, 8, 8, 9, 9, pad=(4, 4, 4, 4), groups=8, dtype="fp16"),
)


@pytest.mark.parametrize("view", ["nchw", "nhwc"])
@pytest.mark.parametrize("algorithm", cases.RUNNING)
def test_every_algorithm_does_it_in_its_own_kernel(algorithm, view, device, monkeypatch):
    """With a residual in another layout; y, its gradients, and no pass of torch's own over y."""
    on = cases.target(device)
    problem = next(p for p in SHAPES if algorithms.lack(algorithm, p, "fprop", on) is None)
    if algorithms.lack(algorithm, dataclasses.replace(problem, layout=view, out_layout=view), "fprop", on) is not None:
        pytest.skip("not in this layout")
    arguments = {"padding": problem.pad[0], "groups": problem.groups}
    monkeypatch.setattr(epilogue, "applied", None)
    whole = dispatch.plan_pass

    def for_fprop(problem, pass_, target, backend="auto", *others, **named):  # no algorithm must serve all passes
        return whole(problem, pass_, target, backend if pass_ == "fprop" else "triton", *others, **named)

    monkeypatch.setattr(dispatch, "plan_pass", for_fprop)
    generator = torch.Generator().manual_seed(2)
    x, w, bias = (
        torch.randn(s, generator=generator).half() for s in (problem.x_shape, problem.w_shape, problem.w_shape[:1])
    )
    y_shape = F.conv2d(x, w, bias, **arguments).shape
    residual = cases.lay_out(torch.randn(y_shape, generator=generator).half(), "slice")
    x = cases.lay_out(x, view)
    x, w, bias, residual = (tensor.to(device) for tensor in (x, w, bias, residual))
    residual.requires_grad_()
    y = triton_conv(x, w, bias, **arguments, activation="silu", residual=residual, backend=f"triton:{algorithm}")
    exact = residual.detach().double().requires_grad_()
    expected = F.silu(F.conv2d(x.double(), w.double(), bias.double(), **arguments) + exact)
    assert cases.error(y, expected) <= 2 * cases.bound("fp16", 64)
    dy = torch.randn(y.shape, generator=generator).half().to(device)
    (out,), (ref,) = torch.autograd.grad(y, residual, dy), torch.autograd.grad(expected, exact, dy.double())
    assert cases.error(out, ref) <= 4 * cases.bound("fp16", 64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(activation, device):
    """As torch's: of NaN, infinities, and numbers whose exponentials overflow."""
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30, 100.0, -100.0, 3.0, -3.0, 6.0])
    x = x.reshape(1, 1, 3, 4).repeat(1, 2, 1, 1).to(device)
    one = torch.ones(2, 1, 1, 1, device=device)
    y = triton_conv(x, one, groups=2, activation=activation, backend="triton:implicit_gemm")
    one_by_one = [ACTIVATIONS[activation].of(value.reshape(1)) for value in x.flatten()]  # in vectors gelu(inf) is NaN
    torch.testing.assert_close(y, torch.cat(one_by_one).view_as(x), equal_nan=True)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_second_derivative_of_kernels(activation, device):
    """dx's own gradient by x, with what torch derives in float64."""
    x, w, bias, residual = (tensor.detach().to(device).requires_grad_() for tensor in operands("nchw"))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, w, bias, residual)]
    dy = torch.randn((2, 12, 6, 5), generator=torch.Generator().manual_seed(4)).to(device)

    def second(y, tensors, dy):
        first = torch.autograd.grad(y, tensors, dy, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), tensors, allow_unused=True)

    y = triton_conv(
        x, w, bias, padding=1, groups=2, activation=activation, residual=residual, backend="triton"
    )  # fmt: skip
    outs = second(y, (x, w, bias, residual), dy)
    refs = second(chain(*exact, activation, 1), exact, dy.double())
    for out, ref in zip(outs, refs, strict=True):
        assert (out is None or not out.any()) if ref is None else cases.error(out, ref) <= 16 * cases.bound("fp32", 64)


def test_what_it_keeps(device):
    """Of an activation that is derived from its result, that; of others, also what they are of."""
    x, w, bias, _ = (tensor.detach().to(device).requires_grad_() for tensor in operands("nchw"))
    kept = {}
    for activation in ("relu", "silu"):
        y = triton_conv(x, w, bias, padding=1, groups=2, activation=activation, backend="triton")
        kept[activation] = [t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None and t.shape == y.shape]
        assert (kept[activation] == [y.data_ptr()]) == (activation == "relu")
        assert len(kept[activation]) == 1


def test_a_call_has_one_key_for_all_that_follows(device):
    """The convolution's own plan serves, whatever follows it."""
    x, w, bias, residual = (tensor.detach().to(device) for tensor in operands("nchw"))
    prepared.reset()
    for extra in ({}, {"activation": "relu"}, {"activation": "gelu"}, {"residual": residual}):
        triton_conv(x, w, bias, padding=1, groups=2, backend="triton", **extra)
    assert len(prepared._CALLS) == 1


@pytest.mark.parametrize("served", [True, False])
def test_what_has_too_few_registers(served, device, monkeypatch):
    """Another tile ends the convolution too, or, where none can, torch's functions do; `explain` says which."""
    x, w, bias, residual = (tensor.detach().to(device) for tensor in operands("nhwc"))
    expected = chain(*(tensor.double() for tensor in (x, w, bias, residual)), "silu", 1)
    arguments = {"padding": 1, "groups": 2, "activation": "silu", "residual": residual, "backend": "triton"}
    prepared.reset()
    monkeypatch.setattr(dispatch, "fits", lambda *_: False)
    if not served:
        lack = dispatch.lack
        monkeypatch.setattr(dispatch, "lack", lambda name, p, *rest: "none" if p.ends else lack(name, p, *rest))
    assert cases.error(triton_conv(x, w, bias, **arguments), expected) <= 4 * cases.bound("fp32", 64)
    (call,) = prepared._CALLS.values()
    assert (call.finisher(x, w, bias, "silu", True, False) is not None) == served
    told = explain(x, w, bias, **arguments, target="h200").notes["fprop"]
    how = "the same kernel, for which it takes " if served else "torch's functions: no tile of "
    assert told.startswith(f"then the residual and silu by {how}")
    prepared.reset()


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"activation": "relu"}, "then relu by the same kernel, 25.70 MB where functions apart move 51.39 MB together"),
        ({"activation": "silu"}, "then silu by the same kernel, 38.54 MB where functions apart move 51.39 MB together"),
        ({"residual": True}, "then the residual by the same kernel, 38.54 MB where functions apart move 64.23 MB"),
        ({"activation": "gelu", "backend": "torch"}, "then gelu by torch's functions, 51.39 MB together (modelled)"),
        ({"shuffle_groups": 2}, "the shuffle by nn.ChannelShuffle's copy"),
        ({"activation": "relu", "shuffle_groups": 2}, " (modelled); the shuffle by nn.ChannelShuffle's copy"),
    ],
)
def test_explain_says_who_computes_it(extra, told):
    """Bytes of bf16: 12.85 MB are 16 images of 128 x 56 x 56 channels and pixels."""
    x, w = torch.empty(16, 128, 56, 56, dtype=torch.bfloat16), torch.empty(128, 4, 3, 3, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    extra = extra | ({"residual": x} if "residual" in extra else {})
    arguments = {"padding": 1, "groups": 32, "target": "nvidia_h200", "backend": "triton"} | extra
    plan = explain(x, w.requires_grad_(), **arguments)
    assert told in plan.notes["fprop"]
    assert told in str(plan)
    one = {name: value[0] if name == "residual" else value for name, value in arguments.items()}
    assert "same kernel" not in explain(x[0], w, **one).notes["fprop"]


@pytest.mark.parametrize(
    ("extra", "error"),
    [({"activation": "tanh"}, ValueError), ({"residual": torch.ones(3)}, ValueError), ({"residual": 1}, TypeError),
     ({"shuffle_groups": 5}, ValueError), ({"shuffle_groups": 1.5}, TypeError)],
)  # fmt: skip
def test_explain_refuses_what_the_call_does(extra, error):
    x, w, bias, _ = operands("nchw")
    messages = []
    for call in (triton_conv, explain):
        with pytest.raises(error) as raised:
            call(x, w, bias, padding=1, groups=2, **extra)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


# --- The operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "keeps", "added", "view"),
    [
        ("relu", False, True, "nchw"),
        ("silu", True, True, "nhwc"),
        ("gelu", False, False, "nhwc"),
        (None, False, True, "nchw"),
    ],
)
def test_opcheck(activation, keeps, added, view, device):
    x, w, bias, residual = (tensor.detach().to(device) for tensor in operands(view))
    if keeps or activation in (None, "relu"):
        x, w, bias, residual = (tensor.requires_grad_() for tensor in (x, w, bias, residual))
    args = (x, w, bias, residual if added else None, activation, keeps, (1, 1), (1, 1, 1, 1), (1, 1), 2, "triton")
    checks = torch.library.opcheck(torch.ops.groupconv.conv2d_finished.default, args)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("activation", "added"), [("relu", True), ("silu", False), (None, True), ("gelu", True)])
def test_a_compiled_model_has_one_operator(activation, added, device):
    """For all that follows; its gradients are those of float64, and no function of torch passes over y in between."""
    x, w, bias, residual = (tensor.detach().to(device).requires_grad_() for tensor in operands("nhwc"))
    tensors = (x, w, bias, residual) if added else (x, w, bias)
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    def function(x, w, bias, residual=None):
        extra = {"activation": activation, "residual": residual, "backend": "triton"}
        return triton_conv(x, w, bias, padding=1, groups=2, **extra)

    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    y = compiled(*tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = chain(*exact[:3], exact[3] if added else None, activation, 1)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    outs, refs = torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, exact, dy.double())
    for out, ref in zip((y, *outs), (expected, *refs), strict=True):
        assert cases.error(out, ref) <= 4 * cases.bound("fp32", 64)
    computing = [name for name in graphs[0] if "getitem" not in name and "detach" not in name]
    assert computing == ["groupconv.conv2d_finished.default"]


def test_operator_under_vmap_and_autocast(device):
    x, w, bias, residual = (tensor.detach().to(device) for tensor in operands("nchw"))
    args = ((1, 1), (1, 1, 1, 1), (1, 1), 2, "triton")
    finished = torch.ops.groupconv.conv2d_finished

    def function(x, residual):
        return finished(x, w, bias, residual, "silu", True, *args)

    both = torch.vmap(function)(torch.stack((x, 2 * x)), torch.stack((residual, residual)))
    for i, scale in enumerate((1, 2)):
        for out, ref in zip(both, function(scale * x, residual), strict=True):
            torch.testing.assert_close(out[i], ref)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert [t.dtype for t in function(x, residual)] == [torch.bfloat16] * 2


def test_tools_know_the_operator(device):
    """Its FLOPs are the convolution's, and it decomposes into functions of torch's."""
    x, w, bias, residual = (tensor.detach().to(device) for tensor in operands("nchw"))
    finished = torch.ops.groupconv.conv2d_finished
    for activation, keeps in (("relu", False), ("silu", True)):
        args = (x, w, bias, residual, activation, keeps, (1, 1), (1, 1, 1, 1), (1, 1), 2, "triton")
        with FlopCounterMode(display=False) as ours:
            found = finished(*args)
        with FlopCounterMode(display=False) as theirs:
            F.conv2d(x, w, bias, padding=1, groups=2)
        assert ours.get_total_flops() == theirs.get_total_flops() > 0
        decomposed = decomposition_table[finished.default](*args)
        for out, ref in zip(found, decomposed, strict=True):
            torch.testing.assert_close(out, ref)
