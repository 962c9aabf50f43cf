"""Attacks on numbers and on state; docs/reliability.md lists them with those of the other tests."""

import copy
import dataclasses
import multiprocessing
import pickle
import threading

import cases
import pytest
import reliability
import torch
import torch.nn.functional as F
from torch import nn

import groupconv
from groupconv import prepared, triton_conv
from groupconv.algorithms import REGISTRY, interpretable, lack
from groupconv.perf_reports import layers
from groupconv.problem import ConvProblem

pytestmark = pytest.mark.usefixtures("ieee", "few_programs")


# --- Numbers ---------------------------------------------------------------------------------------------------------


IN_SHORT = ("depthwise_map", "depthwise_toeplitz", "row_block_tma", "row_march")


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.full)
        for name in filter(interpretable, sorted(REGISTRY))
    ],
)
def test_the_table_of_nan_and_inf_is_what_algorithms_do(name):
    """Results that F.conv2d has finite are not, where an algorithm multiplies zeros too."""
    assert reliability.spread_row(name) in reliability.DOCUMENT.read_text().splitlines()


@pytest.mark.parametrize("name", filter(interpretable, sorted(REGISTRY)))
def test_an_image_is_the_same_at_every_place_of_a_batch(name):
    """To the bit, as is each of twenty runs."""
    on = cases.machine("cpu", "many")
    for problem in reliability.problems(name)[::3]:
        problem = dataclasses.replace(problem, batch=3)
        for pass_ in ("fprop", "dgrad"):
            if lack(name, problem, pass_, on) is not None:
                continue
            given = cases.operands(cases.Case(problem, problem.layout, "nchw", problem.layout))
            one = "x" if pass_ == "fprop" else "dy"
            image = getattr(given, one)
            image[1:] = image[:1]
            config = cases.config(REGISTRY[name], problem, pass_, on, "many")
            call = REGISTRY[name].prepare(problem, pass_, config, on, given.strides(problem))
            result = call(*given.of(pass_))
            assert torch.equal(result, result[:1].expand_as(result))


def test_results_of_twenty_runs_are_the_same():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 4, 5, 4, generator=generator), torch.randn(4, 2, 3, 3, generator=generator)
    leaves = x.requires_grad_(), w.requires_grad_()

    def step():
        y = triton_conv(*leaves, padding=1, groups=2, backend="triton")
        return y, *torch.autograd.grad(y.sin().sum(), leaves)

    first = step()
    for _ in range(19):
        for again, out in zip(step(), first, strict=True):
            assert torch.equal(again, out)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 1e-7),
        (torch.float16, 1e4),
        *((dtype, scale) for dtype in (torch.bfloat16, torch.float32) for scale in (1e-36, 1e-30, 1e18, 1e36)),
    ],
)
def test_large_and_tiny_numbers(scale, dtype):
    """Of y, its one cast overflows and underflows where that of float64's does."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 8, 7, 6, generator=generator) * scale).to(dtype)
    w = torch.randn(8, 2, 3, 3, generator=generator).to(dtype)
    y = triton_conv(x, w, padding=1, groups=4, backend="triton")
    exact = F.conv2d(x.double(), w.double(), padding=1, groups=4)
    info = torch.finfo(dtype)
    sure = exact.abs() < 0.99 * info.max
    assert y[sure].isfinite().all()
    assert y[exact.abs() > 1.01 * info.max].isinf().all()
    assert ((y.double() - exact)[sure].abs() <= 8 * info.eps * exact[sure].abs().max() + info.smallest_normal).all()


def test_the_kernels_of_an_epoch():
    """Of two models they are counted anew, and few enough; of the others there is a line."""
    lines = reliability.first_calls("regnety_016", "mixnet_s")
    assert len(lines) == 4
    document = reliability.DOCUMENT.read_text()
    assert lines[0] in document
    assert all(f"\n| {layer.name.partition('.')[0]} | " in document for layer in layers.suite("bf16", "nhwc"))


# --- State -----------------------------------------------------------------------------------------------------------


PROBLEMS = [
    ConvProblem(2, 4 * width, 5 + width, 6, 4 * width, 3, 3, pad=(1, 1, 1, 1), groups=4, dtype="fp32", layout="nchw")
    for width in (1, 2, 3)
]


def test_eight_threads_on_one_plan_cache():
    """That plan the same calls, and others, at once: each gets what a thread alone gets, and none waits for ever."""
    operands = [cases.operands(cases.Case(problem, "nchw", "nchw", "nchw")) for problem in PROBLEMS]

    def planned(which):
        problem, given = PROBLEMS[which], operands[which]
        arguments = problem.stride, problem.pad, problem.dilation, problem.groups
        return prepared.lookup(given.x, given.w, None, *arguments, "triton")

    prepared.reset()
    expected = [str(planned(which).plan) for which in range(len(PROBLEMS))]
    prepared.reset()
    barrier, found, faults = threading.Barrier(8), [], []

    def work(number):
        try:
            barrier.wait(60)
            for turn in range(20):
                which = (number + turn) % len(PROBLEMS)
                found.append((which, str(planned(which).plan)))
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    assert not faults
    assert len(found) == 160
    assert all(plan == expected[which] for which, plan in found)


def _in_another_process(connection, layer, x):
    connection.send(triton_conv(x, layer.weight, layer.bias, groups=4, backend="triton").detach().numpy())
    connection.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_start_after_use(method):
    """By fork and by spawn, with a layer that is pickled for the latter."""
    layer, x = groupconv.Conv2d(8, 8, 3, groups=4), torch.randn(1, 8, 6, 6)
    expected = triton_conv(x, layer.weight, layer.bias, groups=4, backend="triton").detach()
    context = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    process = context.Process(target=_in_another_process, args=(theirs, layer, x))
    process.start()
    assert mine.poll(120)
    torch.testing.assert_close(torch.from_numpy(mine.recv()), expected)  # of its own settings
    process.join(60)
    assert process.exitcode == 0


def test_layers_are_pickled_and_copied():
    layer = nn.Sequential(groupconv.Conv2d(8, 8, 3, groups=4), groupconv.ConvTranspose2d(8, 4, 2, groups=2))
    x = torch.randn(1, 8, 6, 6)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(again(x), layer(x))
