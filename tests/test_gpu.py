"""What only a GPU can show: the planned configurations for real, guarded, in graphs, on streams, in large memory."""

import dataclasses
import math
import time

import cases
import pytest
import torch
import torch.nn.functional as F

import groupconv
from groupconv import configs, dispatch, prepared, raced, set_fp32_precision, trial, triton_conv
from groupconv.algorithms import REGISTRY, able, possible
from groupconv.perf_reports import layers
from groupconv.problem import PASSES, ConvProblem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("ieee"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
ON = cases.target("cuda" if torch.cuda.is_available() else "cpu")
SYMMETRIC = [case for case in cases.CASES if case.problem.pad[::2] == case.problem.pad[1::2]]


def random(*shape, dtype=torch.bfloat16, device="cuda", view="nhwc", seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return cases.lay_out(values, view) if len(shape) == 4 else values


def layer(dtype=torch.bfloat16, device="cuda"):
    """x, w and bias of a ResNeXt layer, and its keywords."""
    x = random(8, 64, 28, 28, dtype=dtype, device=device)
    w = random(64, 4, 3, 3, dtype=dtype, device=device, seed=1)
    bias = random(64, dtype=dtype, device=device, seed=2)
    return (x, w, bias), {"padding": 1, "groups": 16}


def check_layer(y, grads, tensors, kwargs, dy):
    """y, dx, dw, db of a bf16 layer against float64."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    y64 = F.conv2d(*leaves, **kwargs)
    for out, ref in zip((y, *grads), (y64, *torch.autograd.grad(y64, leaves, dy.double())), strict=True):
        assert cases.error(out, ref) <= cases.bound("bf16", 1)


def test_three_bf16_products_are_nearly_fp32():
    """bf16x3, which the interpreter does not have: far nearer than TF32, in every pass."""
    problem = ConvProblem(8, 96, 14, 14, 96, 3, 3, pad=(1, 1, 1, 1), groups=2, dtype="fp32")
    given = cases.operands(cases.Case(problem), "cuda")
    x, w = given.x.requires_grad_(), given.w.requires_grad_()
    set_fp32_precision("bf16x3")
    try:
        y = triton_conv(x, w, padding=1, groups=2, backend="triton")
        found = (y, *torch.autograd.grad(y, (x, w), given.dy))
    finally:
        set_fp32_precision(None)
    for pass_, out in zip(PASSES, found, strict=True):
        expected = cases.references(problem, given)[pass_]
        assert cases.error(out, expected) <= cases.bound("bf16x3", cases.terms(problem, pass_)), pass_


# --- Named cases, as triton_conv plans them --------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in (*cases.CASES, *cases.DEPTHWISE) if c.tiles == "few"], ids=str)
def test_case(case):
    """Value and gradients in guarded memory."""
    given = cases.operands(case, "cuda")
    p = cases.actual(case)
    cases.set_precision("tf32" if p.dtype == "tf32" else "ieee")
    x, w = given.x.requires_grad_(), given.w.requires_grad_()
    leaves = [t for t in (x, w, given.bias) if t is not None]
    if given.bias is not None:
        given.bias.requires_grad_()
    symmetric = p.pad[0] == p.pad[1] and p.pad[2] == p.pad[3]
    for _ in range(2):  # the second time through the compiled kernels' own launchers
        with cases.guarded():
            if symmetric:
                y = triton_conv(x, w, given.bias, p.stride, p.pad[::2], p.dilation, p.groups, backend="triton")
            else:
                y = torch.ops.groupconv.conv2d(x, w, given.bias, p.stride, p.pad, p.dilation, p.groups, "triton")
            found = torch.autograd.grad(y, leaves, given.dy)
        expected = cases.references(p, given)
        for out, pass_ in zip((y, *found), PASSES, strict=False):
            assert cases.error(out, expected[pass_]) <= cases.bound(p.dtype, cases.terms(p, pass_)), pass_
        if given.bias is not None:
            assert cases.error(found[2], given.dy.double().sum((0, 2, 3))) <= cases.bound(p.dtype, p.out_pixels)
        assert y.stride() == cases.format_strides(p.y_shape, x, w)
        assert found[0].stride() == cases.format_strides(p.x_shape, x, w)


@pytest.mark.parametrize(("case", "pass_", "name"), cases.runs(ON, list(cases.DESCRIPTORS)), ids=str)
def test_descriptors(case, pass_, name):
    """The hardware's own zero fill, phases and swizzles, which the interpreter knows nothing of."""
    for _ in range(2):
        found, given, problem = cases.run(case, pass_, name, "cuda")
        expected = cases.references(problem, given)
        assert cases.error(found[pass_], expected[pass_]) <= cases.bound(problem.dtype, cases.terms(problem, pass_))


@pytest.mark.parametrize("case", SYMMETRIC[::4], ids=str)
def test_auto(case):
    """The planned choice, of which F.conv2d may be a part: within the bound, or twice F.conv2d's own error."""
    given = cases.operands(case, "cuda")
    p = cases.actual(case)
    cases.set_precision("tf32" if p.dtype == "tf32" else "ieee")
    x, w = given.x.requires_grad_(), given.w.requires_grad_()
    args = given.bias, p.stride, p.pad[::2], p.dilation, p.groups
    expected = cases.references(p, given)

    def errors(conv):
        y = conv(x, w, *args)
        outs = (y, *torch.autograd.grad(y, (x, w), given.dy))
        return [cases.error(out, expected[pass_]) for out, pass_ in zip(outs, PASSES, strict=True)]

    for pass_, found, native in zip(PASSES, errors(triton_conv), errors(F.conv2d), strict=True):
        assert found <= max(cases.bound(p.dtype, cases.terms(p, pass_)), 2 * native), pass_


# --- Everything shipped ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A configuration that the library ships, with a problem of its class, small in batch and map."""

    label: str
    algorithm: str
    pass_: str
    config: tuple
    problem: ConvProblem

    def __str__(self) -> str:
        return f"{self.label}-{self.pass_}-{self.problem}"


def problem_of_key(key: dict) -> ConvProblem:
    """A problem of a measured entry's class, of a few images."""
    groups, side = key["groups_bucket"], math.isqrt(key["map_bucket"])
    (kh, kw), stride, dilation = key["k"], tuple(key["stride"]), tuple(key["dilation"])
    pad_h, pad_w = dilation[0] * (kh - 1) // 2, dilation[1] * (kw - 1) // 2
    pad = (pad_h, pad_h, pad_w, pad_w)
    return ConvProblem(
        4, key["cin_g"] * groups, side * stride[0], side * stride[1], key["cout_g"] * groups, kh, kw, stride, pad,
        dilation, groups, key["dtype"], key["layout"], key["layout"],
    )  # fmt: skip


def shipped() -> list[Shipped]:
    found = []
    for file in configs.device_files(ON.slug):
        for i, entry in enumerate(file.entries):
            problem, pass_ = problem_of_key(entry.key), entry.key["pass"]
            if entry.algorithm not in able(problem, pass_, ON):
                continue
            division = REGISTRY[entry.algorithm].DIVISION
            tile = {name: size for name, size in entry.config.items() if name not in division}
            if possible(entry.algorithm, problem, pass_, tile, ON):
                config = tuple(entry.config.items())
                found.append(Shipped(f"measured{i}", entry.algorithm, pass_, config, problem))
    return found


@pytest.mark.parametrize("entry", shipped(), ids=str)
def test_shipped_configuration(entry):
    problem, pass_ = entry.problem, entry.pass_
    given = cases.operands(cases.Case(problem, problem.layout, problem.layout, problem.layout), "cuda")
    strides = given.strides(problem)
    run = REGISTRY[entry.algorithm].prepare(problem, pass_, dict(entry.config), ON, strides)
    outs = []
    for _ in range(2):
        with cases.guarded():
            out = run(*given.of(pass_))
        outs.append(out if isinstance(out, tuple) else (out,))
    expected = cases.references(problem, given)
    for part, first, second in zip(cases.PRODUCES.get(pass_, (pass_,)), *outs, strict=True):
        assert cases.error(first, expected[part]) <= cases.bound(problem.dtype, cases.terms(problem, part)), part
        assert torch.equal(first, second)


SUITE = [row for layout in ("nhwc", "nchw") for row in layers.suite("bf16", layout)]


@pytest.mark.parametrize("pass_", configs.PLANNED)
@pytest.mark.parametrize("layer", SUITE, ids=lambda row: f"{row.name}-{row.problem.layout}")
def test_planned_configuration(layer, pass_):
    """What the plan of a suite's layer takes here, on a few of its images."""
    names = able(layer.problem, pass_, ON)
    if not names:
        pytest.skip(f"no algorithm does {pass_} of this layer")
    name, config, _ = dispatch.best(layer.problem, pass_, ON, names)
    problem = dataclasses.replace(layer.problem, batch=4)
    given = cases.operands(cases.Case(problem, problem.layout, problem.layout, problem.layout), "cuda")
    run = REGISTRY[name].prepare(problem, pass_, config, ON, given.strides(problem))
    expected = cases.references(problem, given)
    for _ in range(2):
        with cases.guarded():
            out = run(*given.of(pass_))
        results = out if isinstance(out, tuple) else (out,)
        for each, result in zip(cases.PRODUCES.get(pass_, (pass_,)), results, strict=True):
            assert cases.error(result, expected[each]) <= cases.bound("bf16", cases.terms(problem, each)), each


# --- Repeatability ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "kernel"), [(16, 3), (64, 3), (64, 7)])
def test_repeatable(groups, kernel):
    """Value and gradients to the last bit, twenty times, with splits enough to race."""
    x = random(32, 64, 56, 56).requires_grad_()
    w = random(64, 64 // groups, kernel, kernel, seed=1).requires_grad_()
    dy = random(32, 64, 56, 56, seed=2)

    def once():
        y = triton_conv(x, w, padding=kernel // 2, groups=groups, backend="triton")
        return y, *torch.autograd.grad(y, (x, w), dy)

    first = once()
    assert all(t.isfinite().all() for t in first)
    for _ in range(20):
        assert all(map(torch.equal, first, once()))


# --- Graphs, streams, devices, threads -------------------------------------------------------------------------------


def test_cuda_graph():
    """Forward and backward captured once and replayed on other data."""
    tensors, kwargs = layer()
    static = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    dy = random(8, 64, 28, 28, seed=3)

    def step():
        y = triton_conv(*static, **kwargs, backend="triton")
        return y, *torch.autograd.grad(y, static, dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (10, 20):
        with torch.no_grad():
            for i, t in enumerate(static):
                t.copy_(random(*t.shape, seed=seed + i, view="nchw"))
        graph.replay()
        torch.cuda.synchronize()
        check_layer(captured[0], captured[1:], static, kwargs, dy)
        assert all(map(torch.equal, captured, step()))


def test_side_stream():
    """Kernels run on the current stream: behind the copy that makes their operands, on a stream that is busy."""
    tensors, kwargs = layer()
    dy = random(8, 64, 28, 28, seed=3)
    warm = triton_conv(*(t.clone().requires_grad_() for t in tensors), **kwargs, backend="triton")
    assert warm.shape == dy.shape
    late = [torch.empty_like(t).requires_grad_() for t in tensors]  # full of NaN
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for target, t in zip(late, tensors, strict=True):
                target.copy_(t)
        y = triton_conv(*late, **kwargs, backend="triton")
        grads = torch.autograd.grad(y, late, dy)
    side.synchronize()
    check_layer(y, grads, tensors, kwargs, dy)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_second_device():
    """Tensors on a device that is not the current one."""
    with torch.cuda.device(0):
        tensors, kwargs = layer(device="cuda:1")
        leaves = [t.requires_grad_() for t in tensors]
        dy = random(8, 64, 28, 28, seed=3, device="cuda:1")
        y = triton_conv(*leaves, **kwargs, backend="triton")
        grads = torch.autograd.grad(y, leaves, dy)
        assert {t.device.index for t in (y, *grads)} == {1}
        assert torch.cuda.current_device() == 0
    check_layer(y, grads, tensors, kwargs, dy)


def test_operands_on_two_devices():
    """The exception of F.conv2d."""
    (x, w, _), kwargs = layer()
    with pytest.raises(RuntimeError) as expected:
        F.conv2d(x, w.cpu(), **kwargs)
    with pytest.raises(RuntimeError) as found:
        triton_conv(x, w.cpu(), **kwargs, backend="triton")
    assert str(found.value) == str(expected.value)


# --- Large memory ----------------------------------------------------------------------------------------------------

IMAGES, CHANNELS, SIDE, GROUPS = 34, 64, 1000, 16  # 2.18e9 elements


@pytest.mark.large
@pytest.mark.usefixtures("unpoisoned_memory")
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_more_than_two_to_the_31_elements(memory_format):
    """x, y, dx and dy with offsets past 2^31: the first and last images against float64, and all of dw."""
    shape = (IMAGES, CHANNELS, SIDE, SIDE)
    assert math.prod(shape) > 2**31
    ends = [0, IMAGES - 1]
    kwargs = {"padding": 1, "groups": GROUPS}
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=memory_format)
    dy = torch.zeros_like(x)
    for i in ends:
        x[i].normal_()
        dy[i].normal_()
    w = random(CHANNELS, CHANNELS // GROUPS, 3, 3, view="nchw").requires_grad_()
    x.requires_grad_()
    y = triton_conv(x, w, **kwargs, backend="triton")
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert y.is_contiguous(memory_format=memory_format)
    dw64 = torch.zeros_like(w, dtype=torch.float64)
    for i in ends:
        y64, dx64, part = cases.reference(x[i : i + 1], w, None, 1, (1, 1, 1, 1), 1, GROUPS, dy[i : i + 1])
        assert cases.error(y[i : i + 1], y64) <= cases.bound("bf16", 1)
        assert cases.error(dx[i : i + 1], dx64) <= cases.bound("bf16", 1)
        dw64 += part
    assert cases.error(dw, dw64) <= cases.bound("bf16", 1)
    assert not y[1:-1].any()
    assert not dx[1:-1].any()


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_inductor(backend):
    """A training step of a block compiled by inductor against the same step in eager mode."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = cases.Bottleneck(64, 64, 16, backend).cuda()
    compiled = torch.compile(block, fullgraph=True)
    for batch in (4, 6):
        x = random(batch, 64, 14, 14, dtype=torch.float32, seed=batch)
        for out, ref in zip(cases.step(compiled, block, x), cases.step(block, block, x), strict=True):
            assert (out - ref).norm() <= 1e-5 * ref.norm()


def test_inductor_cuda_graphs():
    torch._dynamo.reset()
    tensors, kwargs = layer()
    compiled = torch.compile(
        lambda *t: triton_conv(*t, **kwargs, backend="triton").relu(), fullgraph=True, mode="reduce-overhead"
    )
    with torch.no_grad():
        expected = triton_conv(*tensors, **kwargs, backend="triton").relu()
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(*tensors).clone(), expected)


# --- The host's side -------------------------------------------------------------------------------------------------


def test_no_synchronisation():
    """A call, forward and backward, never waits for the GPU once its kernels are compiled."""
    tensors, kwargs = layer()
    leaves = [t.requires_grad_() for t in tensors]
    dy = random(8, 64, 28, 28, seed=3)

    def step():
        y = triton_conv(*leaves, **kwargs, backend="triton")
        return torch.autograd.grad(y, leaves, dy)

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, expected))


def test_a_plan_is_made_once():
    tensors, kwargs = layer()
    prepared.reset()
    for _ in range(3):
        triton_conv(*tensors, **kwargs, backend="triton")
    assert len(prepared._CALLS) == 1


# --- Trials ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_trial(tmp_path, monkeypatch):
    """Nothing is measured, trials are on, and results go to a folder of their own: they are as fair as in training."""
    monkeypatch.setenv("GROUPCONV_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(configs, "shipped_folder", lambda: tmp_path)

    def forget():
        configs.reset()
        raced.reset()
        trial.reset()

    forget()
    groupconv.set_trials(True)
    yield tmp_path
    groupconv.set_trials(None)
    forget()
    prepared.reset()


def until_decided(step, seconds=240.0):
    """Steps until all trials are over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        step()
        decided = [status.state in ("raced", "stopped") for status in groupconv.trials()]
        if len(decided) > 2 and all(decided):
            return
        time.sleep(0.01)
    raise AssertionError(groupconv.trials())


def test_trials_race_without_a_wait(on_trial):
    """Compiled elsewhere, checked and raced in calls that never wait for the GPU, and right in every one of them."""
    tensors, kwargs = layer()
    leaves = [t.requires_grad_() for t in tensors]
    dy = random(8, 64, 28, 28, seed=3)

    def step():
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = triton_conv(*leaves, **kwargs)
            grads = torch.autograd.grad(y, leaves, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check_layer(y.detach(), grads, tensors, kwargs, dy)

    until_decided(step)
    until_decided(step)  # both gradients in one kernel, which waits for the two apart
    states = {status.pass_: status for status in groupconv.trials()}
    print(*states.values(), sep="\n")
    assert {"fprop", "dgrad", "wgrad"} <= states.keys()
    assert not any("wrong" in status.details for status in states.values())
    plan = groupconv.explain(*tensors, **kwargs)
    for pass_plan in plan.passes:
        assert pass_plan.source == "raced"
        assert pass_plan.taken_us <= pass_plan.torch_time_us
    end = time.monotonic() + 10
    while not list(on_trial.glob("*.trials.jsonl")) and time.monotonic() < end:  # a thread writes it
        time.sleep(0.01)
    assert list(on_trial.glob("*.trials.jsonl"))


def test_trials_and_graphs(on_trial):
    """A graph that is captured in the middle of a race has F.conv2d, and no events; what comes after it goes on."""
    tensors, kwargs = layer()
    steps = 0

    def step():
        nonlocal steps
        steps += 1
        y = triton_conv(*tensors, **kwargs)
        if steps % 8 == 0:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = triton_conv(*tensors, **kwargs)
            graph.replay()
            torch.cuda.synchronize()
            assert cases.error(captured, F.conv2d(*(t.double() for t in tensors), **kwargs)) <= cases.bound("bf16", 1)
        return y

    end = time.monotonic() + 240
    while not any(status.state == "raced" for status in groupconv.trials()):
        step()
        time.sleep(0.01)
        assert time.monotonic() < end, groupconv.trials()
    assert [status.pass_ for status in groupconv.trials()] == ["fprop"]


def test_trials_on_a_side_stream(on_trial):
    tensors, kwargs = layer()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    expected = F.conv2d(*(t.double() for t in tensors), **kwargs)
    end = time.monotonic() + 240
    while not any(status.state == "raced" for status in groupconv.trials()):
        with torch.cuda.stream(side):
            y = triton_conv(*tensors, **kwargs)
        side.synchronize()
        assert cases.error(y, expected) <= cases.bound("bf16", 1)
        assert time.monotonic() < end, groupconv.trials()
