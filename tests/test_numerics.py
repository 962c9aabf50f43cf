"""Every pass of every algorithm against float64: named problems, layouts, types, tilings; then through autograd."""

import dataclasses
import itertools
import math
import random as random_numbers

import cases
import pytest
import torch
import torch.nn.functional as F

from groupconv import launcher, prepared, triton_conv
from groupconv.algorithms import REGISTRY, depthwise_direct, implicit_gemm, row_march
from groupconv.problem import PLANNED, ConvProblem

pytestmark = [
    pytest.mark.usefixtures("ieee", "few_programs"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
ON = cases.target("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape, dtype=torch.float32, device="cpu", view=None, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return values if view is None else cases.lay_out(values, view)


def check_gradients(problem, x, w, bias, y, dy, found):
    """y and the gradients `found`, by operand's name, against float64."""
    args = problem.stride, problem.pad, problem.dilation, problem.groups
    expected = dict(zip(("y", "x", "w"), cases.reference(x, w, bias, *args, dy), strict=True))
    expected["bias"] = dy.double().sum((0, 2, 3))
    passes = {"y": "fprop", "x": "dgrad", "w": "wgrad", "bias": "wgrad"}
    for name, value in {"y": y, **found}.items():
        within = cases.bound(problem.dtype, cases.terms(problem, passes[name]))
        assert cases.error(value, expected[name]) <= within, name


def check_pass(case, pass_, name, device):
    found, given, problem = cases.run(case, pass_, name, device)
    expected = cases.references(problem, given)
    for each, out in found.items():
        assert cases.error(out, expected[each]) <= cases.bound(problem.dtype, cases.terms(problem, each)), each


@pytest.mark.parametrize(("case", "pass_", "name"), cases.covering_runs(ON), ids=str)
def test_pass(case, pass_, name, device):
    check_pass(case, pass_, name, device)


@pytest.mark.full
@pytest.mark.parametrize(("case", "pass_", "name"), cases.runs(ON), ids=str)
def test_named_case(case, pass_, name, device):
    check_pass(case, pass_, name, device)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_pair_of_values_that_is_served_is_run(name):
    """Asked of the algorithm anew: of pairs that no run has, whatever else is drawn, it serves none."""
    covered = set().union(*map(cases.pairs, cases.cover(name, ON)))
    generator = random_numbers.Random(0)
    for two in itertools.combinations(cases.AXES, 2):
        for values in itertools.product(*map(cases.AXES.get, two)):
            pair = tuple(zip(two, values, strict=True))
            for _ in range(0 if pair in covered else 40):
                choice = {axis: generator.choice(axis_values) for axis, axis_values in cases.AXES.items()} | dict(pair)
                assert pair not in cases.pairs(choice) or not cases.serves(name, choice, ON), choice


@pytest.mark.parametrize("dtype", cases.MODES)
def test_many_splits(dtype, device):
    """Split-K wgrad in more than a few splits, the last one short."""
    problem = ConvProblem(4, 2, 16, 19, 2, 3, 3, pad=(1, 1, 1, 1), groups=2, dtype=dtype)
    case = cases.Case(problem, tiles="many")
    given, on = cases.operands(case, device), cases.target(device)
    config = cases.config(implicit_gemm, problem, "wgrad", on, "many") | {"BLOCK_K": 64, "SPLITS": 7}
    with cases.guarded():
        run = implicit_gemm.prepare(problem, "wgrad", config, on, given.strides(problem))
        out = run(given.dy, given.x)
    assert run.result.splits == 7
    expected = cases.references(problem, given)["wgrad"]
    assert cases.error(out, expected) <= cases.bound(dtype, problem.out_pixels)


@pytest.mark.parametrize(("beside", "abreast"), [(1, 1), (1, 2), (4, 1), (4, 4)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pass_", PLANNED)
def test_several_blocks_of_lanes(pass_, stride, beside, abreast, device):
    """Programs of row_march that are to walk down more than one block, the last of them ragged; fprop's take one."""
    problem = ConvProblem(
        20, 12, 6, 7 * stride, 12, 3, 3, (stride, stride), (1, 1, 1, 1), groups=3, dtype="fp16", out_layout="nchw"
    )
    config = {
        "BLOCK_P": 16, "BLOCK_C": 16, "BLOCK_S": 4 if abreast == 1 else 1, "BLOCK_R": beside, "BLOCK_A": 1,
        "BLOCK_L": 0, "BLOCK_W": abreast, "SEGMENTS": 1, "LANE_BLOCKS": 2, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip
    given = cases.operands(cases.Case(problem, "nhwc", dy="nchw"), device)
    with cases.guarded():
        out = row_march.prepare(problem, pass_, config, ON, given.strides(problem))(*given.of(pass_))
    produced, expected = cases.PRODUCES.get(pass_, (pass_,)), cases.references(problem, given)
    for each, result in zip(produced, out if isinstance(out, tuple) else (out,), strict=True):
        assert cases.error(result, expected[each]) <= cases.bound("fp16", cases.terms(problem, each))


@pytest.mark.parametrize(
    ("view", "run", "width", "kernel", "stride", "pad"),
    [
        ("nchw", 8, 8, 3, 1, (1, 1, 1, 1)),
        ("slice", 8, 4, 3, 1, (0, 2, 0, 2)),
        ("batches", 2, 8, 3, 2, (1, 1, 1, 1)),
        ("nchw", 8, 4, 5, 2, (2, 1, 0, 3)),
    ],
)
@pytest.mark.parametrize("pass_", PLANNED)
def test_runs_of_columns(pass_, view, run, width, kernel, stride, pad, device):
    """depthwise_direct's lanes of several columns in NCHW, whose neighbours it loads together, as far as strides go."""
    problem = ConvProblem(
        2, 2, 3, 24, 4, kernel, kernel, (1, stride), pad, groups=2, dtype="bf16", layout="nchw", out_layout="nchw"
    )
    config = {
        "BLOCK_P": 32, "BLOCK_C": 1, "BLOCK_W": width, "BLOCK_A": 1, "SEGMENTS": 2, "num_warps": 1, "num_stages": 1
    }  # fmt: skip
    given = cases.operands(cases.Case(problem, view, dy=view), device)
    with cases.guarded():
        call = depthwise_direct.prepare(problem, pass_, config, ON, given.strides(problem))
        out = call(*given.of(pass_))
    dense = math.gcd(8, width, problem.w_out)
    apart = math.gcd(dense, 2) if view == "batches" else dense
    assert cases.runs_of_columns(call.launches[0]) == {
        "X": min(run, width * stride) if pass_ != "dgrad" else 1,
        **({"Y": dense} if pass_ == "fprop" else {"DY": apart}),
        **({} if pass_ == "fprop" else {"DX": 1 if pass_ == "wgrad" else min(8, width * stride)}),
    }
    produced, expected = cases.PRODUCES.get(pass_, (pass_,)), cases.references(problem, given)
    for each, result in zip(produced, out if isinstance(out, tuple) else (out,), strict=True):
        assert cases.error(result, expected[each]) <= cases.bound("bf16", cases.terms(problem, each))


def narrow(name, view):
    """A layer of groups as narrow as an algorithm takes."""
    width = {"row_march": 4, "row_block": 4, "row_block_tma": 8}.get(name, 1)
    shape = (9, 2 * width, 6, 7, 2 * width, 3, 5)
    return ConvProblem(*shape, pad=(1, 1, 2, 2), groups=2, dtype="bf16", layout=view)


@pytest.mark.parametrize(
    ("name", "view"),
    [
        (name, view)
        for name in cases.RUNNING for view in ("nchw", "nhwc")
        if REGISTRY[name].supports(narrow(name, view), "wgrad", ON) is None
    ],
)  # fmt: skip
def test_wgrad_is_repeatable(name, view, device):
    problem = narrow(name, view)
    case = cases.Case(problem, view, dy=view, tiles="many")
    outs = [cases.run(case, "wgrad", name, device)[0]["wgrad"] for _ in range(2)]
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


@pytest.mark.parametrize("wanted", [("x", "w"), ("x", "w", "bias"), ("x",), ("w", "bias")], ids="-".join)
@pytest.mark.parametrize(("algorithm", "groups"), [("depthwise_direct", 16), ("row_march", 4)])
def test_fused_backward(algorithm, groups, wanted, device, monkeypatch):
    """Both gradients come from one kernel where the plan says so; one alone does not pay for the other."""
    problem = ConvProblem(2, 16, 9, 8, 16, 3, 3, pad=(1, 1, 1, 1), groups=groups, dtype="bf16")
    tensors = {
        "x": random(*problem.x_shape, dtype=torch.bfloat16, device=device, view="nhwc"),
        "w": random(*problem.w_shape, dtype=torch.bfloat16, device=device, seed=1),
        "bias": random(16, dtype=torch.bfloat16, device=device, seed=2),
    }
    for name in wanted:
        tensors[name].requires_grad_()
    prepared.reset()
    call = prepared.lookup(*tensors.values(), 1, 1, 1, groups, f"triton:{algorithm}")
    assert call.plan.backward.algorithm == algorithm
    ran, prepare = set(), prepared.Call._prepare
    monkeypatch.setattr(
        prepared.Call, "_prepare", lambda self, pass_, *plan: (ran.add(pass_), prepare(self, pass_, *plan))[1]
    )
    with cases.guarded():
        y = triton_conv(*tensors.values(), padding=1, groups=groups, backend=f"triton:{algorithm}")
        dy = random(*problem.y_shape, dtype=torch.bfloat16, device=device, view="nhwc", seed=3)
        found = torch.autograd.grad(y, [tensors[name] for name in wanted], dy)
    ran.discard("fprop")
    both = {"x", "w"} <= set(wanted)
    assert ran == ({"backward"} if both else {"dgrad"} if "x" in wanted else {"wgrad"})
    check_gradients(problem, *tensors.values(), y, dy, dict(zip(wanted, found, strict=True)))
    prepared.reset()


@pytest.mark.parametrize("x_view", ["nchw", "nhwc"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_empty_batch(x_view, with_bias, device):
    x = random(0, 6, 5, 4, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if x_view == "nhwc" else x
    x.requires_grad_()
    w = random(4, 3, 3, 3, device=device, seed=1).requires_grad_()
    bias = random(4, device=device, seed=2).requires_grad_() if with_bias else None
    y = triton_conv(x, w, bias, padding=1, groups=2, backend="triton")
    expected = F.conv2d(x, w, bias, padding=1, groups=2)
    assert y.shape == expected.shape == (0, 4, 5, 4)
    assert y.dtype == expected.dtype
    leaves = [t for t in (x, w, bias) if t is not None]
    for leaf, grad in zip(leaves, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True):
        assert grad.shape == leaf.shape
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 4, 5, 6), (2, 1, 5, 6), (2, 4, 1, 1), (2, 4, 1, 6)], ids=str)
@pytest.mark.parametrize("x_view", ["nhwc", "permuted"])
@pytest.mark.parametrize("w_view", ["nchw", "nhwc"])
def test_memory_format(shape, x_view, w_view, device):
    """y and dx are channels_last if input or weight is, and dense; dw has the weight's format."""
    groups = min(2, shape[1])
    x = random(*shape, device=device, view=x_view).requires_grad_()
    w = random(4, shape[1] // groups, 3, 3, device=device, view=w_view, seed=1).requires_grad_()
    y = triton_conv(x, w, padding=1, groups=groups, backend="triton")
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert y.stride() == cases.format_strides(y.shape, x, w)
    assert dx.stride() == cases.format_strides(x.shape, x, w)
    assert dw.stride() == cases.format_strides(w.shape, w)


def apart(values: torch.Tensor, batch_stride: int) -> torch.Tensor:
    """An NCHW view of `values` whose images lie `batch_stride` elements apart; only their own pages are touched."""
    n, c, h, w = values.shape
    storage = torch.empty((n - 1) * batch_stride + c * h * w, dtype=values.dtype, device=values.device)
    return storage.as_strided(values.shape, (batch_stride, h * w, w, 1)).copy_(values)


FAR = [
    cases.Case(
        ConvProblem(3, 8, 6, 5, 8, k, k, (1, 1), (k // 2,) * 4, (1, 1), groups, "fp16", "nchw", "nchw"),
        "nchw", "nchw", "nchw",
    )
    for groups, k in ((2, 3), (8, 3), (8, 5), (8, 11))
]  # fmt: skip


@pytest.mark.usefixtures("unpoisoned_memory")
@pytest.mark.parametrize(("case", "pass_", "name"), cases.runs(ON, FAR), ids=str)
def test_offsets_past_two_to_the_31(case, pass_, name, device):
    """x (fprop, wgrad) or dy (dgrad) whose last image starts past 2^31 elements, by a stride that fits int32."""
    given, algorithm, problem = cases.operands(case, device), REGISTRY[name], case.problem
    moved = "dy" if pass_ == "dgrad" else "x"
    far = dataclasses.replace(given, **{moved: apart(getattr(given, moved), 2**30 + 4096)})
    strides = given.strides(problem) | {moved: getattr(far, moved).stride()}
    on = cases.machine(device, "few")
    config = cases.config(algorithm, problem, pass_, on, "few")
    with cases.guarded():
        out = algorithm.prepare(problem, pass_, config, on, strides)(*far.of(pass_))
    expected = cases.references(problem, given)
    produced = cases.PRODUCES.get(pass_, (pass_,))
    for each, result in zip(produced, out if isinstance(out, tuple) else (out,), strict=True):
        assert cases.error(result, expected[each]) <= cases.bound("fp16", cases.terms(problem, each))


def write_past_an_output(device):
    with cases.guarded():
        out = launcher.allocate((3,), (1,), torch.empty(1, device=device))
        assert out.isnan().all()
        out.as_strided((1,), (1,), out.storage_offset() + 3).zero_()


def test_guards_see_what_they_guard(device):
    with pytest.raises(AssertionError, match="past the end"):
        write_past_an_output(device)
