"""Trials: which plans prove themselves in a user's calls, what every call gives back meanwhile, and what is kept."""

import concurrent.futures
import errno
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import warnings
from unittest import mock

import filelock
import pretended
import pytest
import torch
import torch.nn.functional as F
from pretended import ENVIRONMENT, is_alive

import groupconv
from groupconv import call, cli, configs, cost, devices, dispatch, eager, launcher, prepared, raced, trial, workers
from groupconv.algorithms import torch_reference
from groupconv.problem import ConvProblem

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py has the trials of a GPU")
SLUG = devices.DEFAULT.slug
IS_FAIR = raced.is_fair
TURNS = trial.SEEN + 3 + 4 * (1 + trial.SAMPLES) + 1  # calls until a trial of three is over, if times agree


class Scripted:
    """A device whose clock is ours: `times` by algorithm, numbers or iterators of them; F.conv2d's by "torch"."""

    def __init__(self):
        self.times = {}
        self.ran, self.runs, self.is_capturing, self.pending = "torch", [], False, 0

    def capturing(self):
        return self.is_capturing

    def mark(self):
        assert not self.is_capturing
        ran, self.ran = self.ran, "torch"
        return ran

    def microseconds(self, start, end):
        if self.pending:
            self.pending -= 1
            return None
        return next(self.times[end]) if hasattr(self.times[end], "__next__") else self.times[end]

    def later(self, tensor):
        numbers = tensor.tolist()
        return lambda: numbers


@pytest.fixture
def scripted(monkeypatch, tmp_path, few_programs):
    """Trials of interpreted kernels on CPU tensors, whose clock and compilers are ours, and a folder of a user."""
    device = Scripted()
    device.submitted, device.answer = [], {"failed": ""}

    def submit(job):
        answer = concurrent.futures.Future()
        device.submitted.append((json.loads(json.dumps(job)), answer))
        if device.answer is not None:
            answer.set_result(device.answer)
        return answer

    prepare = call.Call._prepare

    def spied(self, pass_, algorithm, config, strides):
        run = prepare(self, pass_, algorithm, config, strides) if device.interpreted else by_torch(self, pass_)

        def watched(*operands):
            device.ran = algorithm
            device.runs.append((pass_, algorithm))
            fault = device.faults.get(algorithm, lambda result: result)
            return fault(run(*operands))

        return watched

    device.faults, device.interpreted = {}, False
    monkeypatch.setattr(trial, "DEVICE", device)
    monkeypatch.setattr(trial, "submit", submit)
    monkeypatch.setattr(call.Call, "_prepare", spied)
    for module in (prepared, eager):
        monkeypatch.setattr(module, "refusal", lambda x, backend: prepared.unsupported(x))
    monkeypatch.setenv("GROUPCONV_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(raced, "is_fair", lambda: True)  # deterministic algorithms are on in all tests, to fill memory
    start_anew()
    groupconv.set_trials(True)
    yield device
    groupconv.set_trials(None)
    start_anew()


@pytest.fixture
def ours_modelled(monkeypatch):
    """The model prefers kernels of ours, small as problems are."""
    monkeypatch.setattr(cost, "torch_prior_us", lambda *_: 1e6)


def by_torch(made, pass_):
    """In place of a kernel: its numbers, into memory as kernels take it."""

    def into_new_memory(result):
        return launcher.allocate(result.shape, result.stride(), result).copy_(result)

    def run(*tensors):
        x, w = made.in_place_of_unsaved(*{"fprop": tensors[:2], "dgrad": (None, tensors[1])}.get(pass_, tensors[1:]))
        if pass_ == "fprop":
            return into_new_memory(torch_reference.fprop(made.args, *tensors))
        needs = {"dgrad": (True, False), "wgrad": (False, True), "backward": (True, True)}[pass_]
        gradients = torch_reference.backward(made.args, tensors[0], x, w, *needs)
        found = tuple(into_new_memory(gradient) for gradient in gradients if gradient is not None)
        return found if pass_ == "backward" else found[0]

    def of_wgrad(dy, x):
        return run(dy, x, None)

    return of_wgrad if pass_ == "wgrad" else run


def start_anew():
    """As another process would."""
    configs.reset()
    raced.reset()
    trial.reset()
    prepared.reset()


def times(device, torch_us, **ours_us):
    """F.conv2d's time and those of ours; of algorithms without one, twice F.conv2d's."""
    device.times = dict.fromkeys((*prepared.algorithms.NAMES,), 2 * torch_us) | {"torch": torch_us} | ours_us


def operands(channels=16, groups=4, size=6, dtype=torch.float32, layout=torch.channels_last, batch=2, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(batch, channels, size, size).to(dtype).to(memory_format=layout)
    w = torch.randn(channels, channels // groups, 3, 3).to(dtype).to(memory_format=layout)
    return x, w


def forward(x, w, groups=4, bias=None):
    """A call without gradients, whose result is right whoever made it."""
    with torch.no_grad():
        y = groupconv.triton_conv(x, w, bias, padding=1, groups=groups)
    expected = F.conv2d(x, w, bias, padding=1, groups=groups)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    return y


def training_step(x, w, groups=4, wanted="xw"):
    """Forward and backward, with the right gradients; of what is `wanted`."""
    x, w = x.detach().requires_grad_("x" in wanted), w.detach().requires_grad_("w" in wanted)
    y = groupconv.triton_conv(x, w, padding=1, groups=groups)
    dy = torch.randn_like(y)
    leaves = [leaf for leaf in (x, w) if leaf.requires_grad]
    found = torch.autograd.grad(y, leaves, dy)
    expected = torch.autograd.grad(F.conv2d(x, w, padding=1, groups=groups), leaves, dy)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=2e-2, atol=2e-2)


def until_decided(step, *arguments, **options):
    """Calls until no trial is under way."""
    for calls in range(1, 12 * TURNS):
        step(*arguments, **options)
        if calls > trial.SEEN and all(state in ("raced", "stopped") for _, state in states()):
            return
    raise AssertionError(groupconv.trials())


def plan(x, w, groups=4):
    return groupconv.explain(x, w, padding=1, groups=groups)


def states():
    return [(status.pass_, status.state) for status in groupconv.trials()]


def served(device, x, w, **options):
    """Who makes the next forward pass."""
    device.runs.clear()
    forward(x, w, **options)
    return device.runs[-1][1] if device.runs else "torch"


# --- Who wins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpreted", [False, True])
def test_the_faster_of_ours_is_taken(scripted, interpreted):
    scripted.interpreted = interpreted
    x, w = operands()
    times(scripted, 100.0, row_march=50.0, implicit_gemm=70.0)
    for _ in range(TURNS):
        forward(x, w)
    assert states() == [("fprop", "raced")]
    assert served(scripted, x, w) == "row_march"
    found = plan(x, w).fprop
    assert (found.source, found.algorithm, found.time_us, found.torch_time_us) == ("raced", "row_march", 50.0, 100.0)
    assert "row_march 50.0 us, F.conv2d 100.0 us" in found.reason
    # The call is again a lookup and a launch: what was prepared, without the trial around it.
    (kept,) = prepared._CALLS.values()
    assert "Trial" not in repr(kept._forward)
    assert kept._trials == {}
    assert scripted.ran == "row_march"


@pytest.mark.parametrize(("ours_us", "taken"), [(97.5, "torch"), (96.5, "row_march"), (150.0, "torch")])
def test_ours_must_win_by_three_per_cent(scripted, ours_us, taken):
    x, w = operands()
    times(scripted, 100.0, row_march=ours_us)
    for _ in range(TURNS):
        forward(x, w)
    assert states() == [("fprop", "raced")]
    assert served(scripted, x, w) == taken
    assert plan(x, w).fprop.algorithm == taken


def test_first_calls_are_plain(scripted):
    """What is seen three times compiles nothing, however many shapes there are."""
    times(scripted, 100.0)
    for size in range(4, 12):
        x, w = operands(size=size)
        for _ in range(trial.SEEN - 1):
            forward(x, w)
    assert scripted.submitted == []
    assert scripted.runs == []
    assert groupconv.trials() == []


def test_contenders_are_few_and_different(scripted):
    x, w = operands()
    times(scripted, 100.0)
    for _ in range(trial.SEEN):
        forward(x, w)
    jobs = [job for job, _ in scripted.submitted]
    assert 1 < len(jobs) <= dispatch.MOST_CONTENDERS
    assert len({(job["algorithm"], json.dumps(job["config"])) for job in jobs}) == len(jobs)
    assert {job["pass_"] for job in jobs} == {"fprop"}
    assert all(job["problem"]["batch"] == 2 and job["unaligned"] == [] for job in jobs)


def test_noisy_times_are_prolonged(scripted):
    x, w = operands()
    times(scripted, 100.0, row_march=itertools.cycle([40.0, 90.0, 60.0, 50.0]))
    for _ in range(TURNS):
        forward(x, w)
    assert states() == [("fprop", "racing")]
    for _ in range(trial.MOST_SAMPLES):
        forward(x, w)
    assert states() == [("fprop", "raced")]
    assert scripted.runs.count(("fprop", "row_march")) >= 1 + 1 + trial.MOST_SAMPLES  # the check, the first, the rest


def test_the_first_run_does_not_count(scripted):
    x, w = operands()
    times(scripted, 100.0, row_march=itertools.chain([1e6], itertools.repeat(50.0)))
    for _ in range(TURNS):
        forward(x, w)
    assert served(scripted, x, w) == "row_march"


def test_nothing_is_waited_for(scripted):
    """Marks that are not reached are asked again in later calls."""
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    scripted.pending = 10**6
    for _ in range(TURNS):
        forward(x, w)
    assert states() == [("fprop", "racing")]
    scripted.pending = 0
    for _ in range(2):
        forward(x, w)
    assert states() == [("fprop", "raced")]


# --- What is out -----------------------------------------------------------------------------------------------------


def wrong(result):
    return result * 1.5


def unwritten(result):
    """Nothing is written, and memory happens to hold the right numbers from before, if nobody fills it."""
    memory = launcher.allocate(result.shape, result.stride(), result)
    return torch.where(memory.isnan(), memory, result)


def raises(result):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(("fault", "said"), [(wrong, "differs"), (unwritten, "differs"), (raises, "out of memory")])
@pytest.mark.usefixtures("unpoisoned_memory")
def test_what_is_wrong_or_raises_is_out(scripted, fault, said):
    x, w = operands()
    times(scripted, 100.0, row_march=1.0, implicit_gemm=50.0)
    scripted.faults["row_march"] = fault
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(TURNS):
            forward(x, w)
    warned = [str(w.message) for w in caught if "groupconv" in str(w.message)]
    assert len(warned) == (said == "differs")
    assert all("row_march" in text and "please report" in text and str(plan(x, w).problem) in text for text in warned)
    assert served(scripted, x, w) == "implicit_gemm"
    (status,) = groupconv.trials()
    assert "row_march" in status.details
    assert said in status.details


def test_what_raises_later_is_out_too(scripted):
    x, w = operands()
    times(scripted, 100.0, row_march=1.0)
    runs = itertools.count()
    scripted.faults["row_march"] = lambda result: raises(result) if next(runs) == 3 else result
    for _ in range(TURNS):
        forward(x, w)
    assert served(scripted, x, w) == "torch"


@pytest.mark.parametrize(
    ("dtype", "x_by", "w_by", "biased"),
    [
        (torch.float32, 0.0, 1.0, False),
        (torch.float32, 0.0, 1.0, True),  # y is the bias
        (torch.float16, 1e-7, 1e-2, False),  # results are too small for fp16
        (torch.bfloat16, 1e20, 1e-20, False),  # squares for fp32 too large,
        (torch.bfloat16, 1e-24, 1.0, False),  # or too small
    ],
)
def test_what_tells_nothing_proves_nothing(scripted, dtype, x_by, w_by, biased):
    """A wrong kernel is found out by the first operands that can tell."""
    x, w = operands(dtype=dtype)
    bias = torch.randn(16).to(dtype) if biased else None
    times(scripted, 100.0, row_march=50.0)
    scripted.faults["row_march"] = (lambda y: y if x_by == 0 else wrong(y)) if biased else wrong
    for _ in range(trial.SEEN + 6):
        groupconv.triton_conv(x * x_by, w * w_by, bias, padding=1, groups=4)
    scripted.faults["row_march"] = wrong
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        until_decided(forward, x, w, bias=bias)
    assert served(scripted, x, w, bias=bias) != "row_march"
    assert "wrong" in groupconv.trials()[0].details


def test_checks_that_never_tell_end(scripted, monkeypatch):
    monkeypatch.setattr(trial, "INCONCLUSIVE", 5)  # after each, twice as many calls go by as before
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    zeros = torch.zeros_like(x)
    for _ in range(2 ** (trial.INCONCLUSIVE + 1)):
        groupconv.triton_conv(zeros, w, padding=1, groups=4)
        if states() == [("fprop", "stopped")]:
            break
    assert served(scripted, x, w) == "torch"
    assert "were zero" in groupconv.trials()[0].details
    assert raced.lookup(SLUG, plan(x, w).problem, "fprop") is None


def test_results_that_are_not_finite_prove_nothing(scripted):
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    overflown = x * float("inf")
    for _ in range(trial.SEEN + 2):
        groupconv.triton_conv(overflown, w, padding=1, groups=4)
    assert states() == [("fprop", "checking")]
    until_decided(forward, x, w)
    assert served(scripted, x, w) == "row_march"


def test_sums_that_cancel_are_not_held_against_a_kernel(scripted):
    """dw of constant x and of dy without a mean: what is left of it is rounding."""
    times(scripted, 100.0)
    x, w = operands(dtype=torch.bfloat16)
    x = torch.ones_like(x)

    def step(cancelling):
        ours = w.detach().requires_grad_()
        y = groupconv.triton_conv(x, ours, padding=0, groups=4)
        dy = torch.randn(y.shape)
        dy = (dy - cancelling * dy.mean((0, 2, 3), keepdim=True)).to(y.dtype)
        torch.autograd.grad(y, ours, dy.to(memory_format=torch.channels_last))

    for _ in range(TURNS):
        step(1)
    assert ("wgrad", "checking") in states()  # what is left tells nothing
    until_decided(step, 0)
    assert ("wgrad", "raced") in states()
    assert not any("wrong" in status.details for status in groupconv.trials())


@pytest.mark.parametrize("answer", [None, {"failed": "compiler: the process ended with status -9"}])
def test_compilers_that_hang_or_die(scripted, answer):
    x, w = operands()
    times(scripted, 100.0, row_march=1.0)
    scripted.answer = answer
    for _ in range(TURNS):
        forward(x, w)
    assert scripted.runs == []
    assert states() == [("fprop", "compiling" if answer is None else "raced")]
    if answer is not None:
        assert "status -9" in groupconv.trials()[0].details
        assert plan(x, w).fprop.algorithm == "torch"


def test_no_process_can_be_started(scripted, ours_modelled):
    x, w = operands()
    times(scripted, 100.0)
    scripted.answer = {"failed": "OSError: no more processes", "unstarted": True}
    for _ in range(trial.SEEN + 2):
        forward(x, w)
    assert states() == [("fprop", "paused")]
    assert "no more processes" in trial.why_off()
    # Plans are as without trials.
    modelled = dispatch.plan_pass(plan(x, w).problem, "fprop", prepared.target_of(x.device))
    assert served(scripted, x, w) == modelled.algorithm != "torch"


@pytest.mark.parametrize("breaks", ["submit", "contenders"])
def test_a_call_goes_on_whatever_breaks(scripted, monkeypatch, breaks, ours_modelled):
    x, w = operands()
    times(scripted, 100.0)

    def broken(*_):
        raise RuntimeError("can't start new thread")

    if breaks == "submit":
        monkeypatch.setattr(trial, "submit", broken)
    else:
        monkeypatch.setattr(dispatch, "contenders", broken)
    for _ in range(TURNS):
        forward(x, w)
    (reason,) = {kept._decided["fprop", None].reason for kept in prepared._CALLS.values()}
    assert reason == 'backend="torch"'
    assert scripted.runs == []


def test_what_failed_is_not_kept_for_others(scripted):
    """Memory that was short, or a compiler that was interrupted, says nothing of the next process."""
    x, w = operands()
    times(scripted, 100.0, implicit_gemm=50.0)
    scripted.faults["row_march"] = raises
    until_decided(forward, x, w)
    assert served(scripted, x, w) == "implicit_gemm"
    time.sleep(0.2)
    assert not raced.user_file(SLUG).exists()


def test_a_graph_that_is_recorded(scripted):
    """What is decided runs, and else F.conv2d: no marks, and no turns."""
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    for calls in (trial.SEEN + 1, 5, TURNS):
        for _ in range(calls):
            forward(x, w)
        before, submitted = groupconv.trials(), len(scripted.submitted)
        scripted.is_capturing = True
        for _ in range(3):
            assert served(scripted, x, w) == ("row_march" if before[0].state == "raced" else "torch")
        scripted.is_capturing = False
        assert groupconv.trials() == before
        assert len(scripted.submitted) == submitted
    assert before[0].state == "raced"


def test_two_threads(scripted):
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    failed = []
    deadline = time.monotonic() + 60  # calls beside another's turn are F.conv2d's, and bring a trial no further

    def work():
        try:
            while states() != [("fprop", "raced")] and time.monotonic() < deadline:
                forward(x, w)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert states() == [("fprop", "raced")]


# --- Backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpreted", [False, True])
def test_training_decides_each_pass(scripted, interpreted, monkeypatch):
    scripted.interpreted = interpreted
    monkeypatch.setattr(trial, "SAMPLES", 2)  # as every run of a kernel takes the interpreter its time
    monkeypatch.setattr(dispatch, "MOST_CONTENDERS", 2)
    x, w = operands(channels=8, size=4, batch=1)
    times(scripted, 100.0, row_march=50.0)
    until_decided(training_step, x, w)
    until_decided(training_step, x, w)  # of both gradients by one kernel
    decided = dict(states())
    assert decided.keys() >= {"fprop", "dgrad", "wgrad"}
    assert set(decided.values()) == {"raced"}
    found = plan(x, w)
    assert [getattr(found, pass_).source for pass_ in ("fprop", "dgrad", "wgrad")] == ["raced"] * 3
    scripted.runs.clear()
    training_step(x, w)
    made = {pass_ for pass_, _ in scripted.runs}
    assert made == ({"fprop", "backward"} if found.backward else {"fprop", "dgrad", "wgrad"})


def test_both_gradients_by_one_kernel(scripted):
    """It races against the two apart once these are decided, and must beat what they take together."""
    x, w = operands()
    for fused_us, taken in ((150.0, True), (198.0, False)):
        start_anew()
        for file in pathlib.Path(os.environ["GROUPCONV_CONFIG_DIR"]).glob("*.jsonl"):
            file.unlink()
        times(scripted, 100.0)
        marked = scripted.mark

        def mark(marked=marked):
            last = scripted.runs[-1][0] if scripted.runs else ""
            ran = marked()
            return "fused" if last == "backward" and ran != "torch" else ran

        scripted.mark = mark
        scripted.times["fused"] = fused_us
        scripted.times["torch"] = 200.0  # beside the fused kernel, both; beside one gradient's, twice its own
        scripted.times |= dict.fromkeys(prepared.algorithms.NAMES, 400.0)
        for _ in range(3):
            until_decided(training_step, x, w)
        scripted.mark = marked
        assert dict(states())["backward"] == "raced"
        assert (plan(x, w).backward is not None) == taken
        scripted.runs.clear()
        training_step(x, w)
        assert ("backward" in dict(scripted.runs)) == taken


@pytest.mark.parametrize("wanted", ["x", "w"])
def test_partial_gradients(scripted, wanted):
    x, w = operands()
    times(scripted, 100.0, row_march=50.0, implicit_gemm=60.0, row_block=60.0)
    until_decided(training_step, x, w, wanted=wanted)
    assert dict(states()) == {"fprop": "raced", {"x": "dgrad", "w": "wgrad"}[wanted]: "raced"}


def test_all_lost_is_plain_torch(scripted):
    x, w = operands()
    times(scripted, 100.0)
    scripted.times["torch"] = 10.0
    for _ in range(3):
        until_decided(training_step, x, w)
    (kept,) = prepared._CALLS.values()
    assert kept.all_torch
    y = groupconv.triton_conv(x, w.requires_grad_(), padding=1, groups=4)
    assert "Convolution" in type(y.grad_fn).__name__


def test_checkpoints_of_equal_layers(scripted):
    """A layer decides its class between another's forward pass and the same made again: as much is saved in both."""
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    frozen = [w.clone(), w.clone(), w.clone()]

    def layer(x, w):
        return groupconv.triton_conv(x, w, padding=1, groups=4)

    for _ in range(2 * TURNS):
        y = leaf = x.clone().requires_grad_()
        for weight in frozen:
            y = torch.utils.checkpoint.checkpoint(layer, y, weight, use_reentrant=False)
        (found,) = torch.autograd.grad(y.square().sum(), leaf)
        assert bool(found.isfinite().all())
    assert ("dgrad", "raced") in states()


def test_double_backward_and_checkpoints(scripted):
    x, w = operands(channels=8, groups=2)
    x, w = x.double().float().requires_grad_(), w.requires_grad_()
    times(scripted, 100.0, row_march=50.0)
    for _ in range(TURNS):
        y = torch.utils.checkpoint.checkpoint(
            lambda x: groupconv.triton_conv(x, w, padding=1, groups=2), x, use_reentrant=False
        )
        (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), w)
        z = F.conv2d(x, w, padding=1, groups=2)
        (first,) = torch.autograd.grad(z.pow(2).sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(first.pow(2).sum(), w)
        assert (second - expected).norm() <= 2e-2 * expected.norm()


def test_compiled_graphs(scripted):
    """The operators of a torch.compile'd program are on trial like eager calls."""
    x, w = operands()
    w.requires_grad_()
    times(scripted, 100.0, row_march=50.0)
    compiled = torch.compile(lambda x, w: groupconv.triton_conv(x, w, padding=1, groups=4).relu(), backend="aot_eager")

    def step():
        (dw,) = torch.autograd.grad(compiled(x, w).sum(), w)
        (expected,) = torch.autograd.grad(F.conv2d(x, w, padding=1, groups=4).relu().sum(), w)
        assert (dw - expected).norm() <= 1e-2 * expected.norm()

    until_decided(step)
    assert dict(states()) == {"fprop": "raced", "wgrad": "raced"}


def test_autocast(scripted):
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(TURNS):
            assert groupconv.triton_conv(x, w, padding=1, groups=4).dtype is torch.bfloat16
    assert [status.problem.dtype for status in groupconv.trials()] == ["bf16"]
    assert states() == [("fprop", "raced")]


# --- Kinds of calls --------------------------------------------------------------------------------------------------


def test_other_strides_are_decided_by_themselves(scripted):
    """A slice's result is not that of dense tensors, nor kept for them."""
    x, w = operands()
    wide = torch.randn(2, 6, 6, 40).permute(0, 3, 1, 2)
    times(scripted, 100.0, row_march=50.0)
    until_decided(forward, wide[:, 1:17], w)
    assert states() == [("fprop", "raced")]
    assert served(scripted, wide[:, 1:17], w) == "row_march"
    job = scripted.submitted[0][0]
    assert job["unaligned"] == ["x"]
    assert job["strides"]["x"] == [1440, 1, 240, 40]
    assert plan(x, w).fprop.source == "modelled"
    assert list(pathlib.Path(os.environ["GROUPCONV_CONFIG_DIR"]).glob("*.jsonl")) == []
    for _ in range(TURNS):
        forward(x, w)
    assert len(states()) == 2


def test_unaligned_tensors_are_decided_by_themselves(scripted):
    """Dense ones that begin anywhere: their kernels are compiled for that."""
    x, w = operands()
    shifted = torch.randn(x.numel() + 1)[1:].view(2, 6, 6, 16).permute(0, 3, 1, 2)
    assert shifted.stride() == x.stride()
    times(scripted, 100.0, row_march=50.0)
    until_decided(forward, shifted, w)
    assert served(scripted, shifted, w) == "row_march"
    assert {tuple(job["unaligned"]) for job, _ in scripted.submitted} == {("x",)}
    assert plan(x, w).fprop.source == "modelled"


def test_gradients_in_other_layouts(scripted):
    """An expanded dy, of y.sum(), then a dense one."""
    x, w = operands()
    w.requires_grad_()
    times(scripted, 100.0, row_march=50.0, implicit_gemm=60.0)

    def step(kind):
        y = groupconv.triton_conv(x, w, padding=1, groups=4)
        z = F.conv2d(x, w, padding=1, groups=4)
        loss, reference = (y.sum(), z.sum()) if kind == "expanded" else (y.pow(2).sum(), z.pow(2).sum())
        (dw,), (expected,) = torch.autograd.grad(loss, w), torch.autograd.grad(reference, w)
        assert (dw - expected).norm() <= 1e-2 * expected.norm()

    for kind in ("expanded", "dense"):
        until_decided(step, kind)
    assert states().count(("wgrad", "raced")) == 2


def test_layouts_that_decide_differently(scripted):
    """F.conv2d for an expanded dy, and ours for dense ones, which want no w saved."""
    x, w = operands()
    w.requires_grad_()
    times(scripted, 100.0)

    def step(kind):
        y = groupconv.triton_conv(x, w, padding=1, groups=4)
        (dw,) = torch.autograd.grad(y, w, torch.ones(()).expand_as(y) if kind == "expanded" else torch.ones_like(y))
        (expected,) = torch.autograd.grad(F.conv2d(x, w, padding=1, groups=4), w, torch.ones_like(y))
        assert (dw - expected).norm() <= 1e-2 * expected.norm()

    until_decided(step, "expanded")
    times(scripted, 100.0, row_march=50.0)
    until_decided(step, "dense")
    for kind in ("expanded", "dense", "expanded"):
        step(kind)
    assert plan(x, w).wgrad.algorithm == "row_march"


def test_steps_without_evidence(scripted):
    """However many layers share a trial, some steps of overflow do not end it."""
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    for _ in range(30 * 10):
        groupconv.triton_conv(x * float("inf"), w, padding=1, groups=4)
    assert states() == [("fprop", "checking")]
    until_decided(forward, x, w)
    assert served(scripted, x, w) == "row_march"


def test_bias_and_another_batch(scripted):
    x, w = operands()
    bias = torch.randn(16)
    times(scripted, 100.0, row_march=50.0)
    for _ in range(TURNS):
        forward(x, w, bias=bias)
    assert served(scripted, x, w, bias=bias) == "row_march"
    # The class of a problem is decided once.
    assert served(scripted, x, w) == "row_march"
    assert len(groupconv.trials()) == 1


def test_there_is_an_end_to_trials(scripted, monkeypatch):
    monkeypatch.setattr(trial, "MOST_TRIALS", 1)
    times(scripted, 100.0, row_march=50.0)
    for size in (6, 12, 24):
        x, w = operands(size=size)
        for _ in range(TURNS if size == 6 else trial.SEEN + 2):
            forward(x, w)
    assert len(groupconv.trials()) == 1
    assert served(scripted, *operands(size=6)) == "row_march"
    assert served(scripted, *operands(size=24)) == "torch"


# --- Whether there are trials ----------------------------------------------------------------------------------------


def test_flags_of_torch_decide(scripted, ours_modelled, monkeypatch):
    x, w = operands()
    times(scripted, 100.0)
    groupconv.set_trials(None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert "benchmark is False" in trial.why_off()
    modelled = served(scripted, x, w)
    assert modelled == plan(x, w).fprop.algorithm != "torch"
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert trial.why_off() == ""
    prepared.reset()
    assert served(scripted, x, w) == "torch"
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert "deterministic" in trial.why_off()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    torch.use_deterministic_algorithms(True)
    assert "deterministic" in trial.why_off()
    groupconv.set_trials(True)
    assert trial.why_off() == ""
    groupconv.set_trials(False)
    assert "set_trials" in trial.why_off()
    for wanted in ("yes", 0):
        with pytest.raises(ValueError, match=f"set_trials: wanted is {wanted!r}, but must be True, False or None"):
            groupconv.set_trials(wanted)


def test_flags_that_change_in_the_middle(scripted, ours_modelled):
    """A trial rests while trials do, and plans are the model's; then it goes on."""
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    for _ in range(trial.SEEN + 2):
        forward(x, w)
    submitted = len(scripted.submitted)
    torch.use_deterministic_algorithms(False)
    groupconv.set_trials(None)
    for flags in ({"benchmark": False}, {"benchmark": True, "deterministic": True}):
        with torch.backends.cudnn.flags(enabled=True, **flags):
            for _ in range(2):
                assert served(scripted, x, w) == plan(x, w).fprop.algorithm != "torch"
            assert states() == [("fprop", "paused")]
            assert "not on trial: " in str(trial.notes(plan(x, w)))
    assert states() == [("fprop", "checking")], groupconv.trials()
    for _ in range(TURNS):
        forward(x, w)
    assert states() == [("fprop", "raced")]
    assert len(scripted.submitted) == submitted
    assert served(scripted, x, w) == "row_march"


def test_a_call_prepared_while_its_trial_ended(scripted):
    """As another thread may: it is prepared anew, by what the trial found."""
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    for _ in range(trial.SEEN):
        forward(x, w)
    (kept,) = prepared._CALLS.values()
    stale = kept._forward
    for _ in range(TURNS):
        forward(x, w)
    kept._forward = stale
    forward(x, w)
    assert served(scripted, x, w) == "row_march"


@pytest.mark.parametrize("backend", ["triton", "triton:implicit_gemm", "torch"])
def test_what_is_asked_for_is_not_on_trial(scripted, backend):
    x, w = operands()
    for _ in range(2 * trial.SEEN):
        groupconv.triton_conv(x, w, padding=1, groups=4, backend=backend)
    assert scripted.submitted == []


def test_explain_says_how_far_it_is(scripted, monkeypatch):
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    def said():
        found = plan(x, w)
        return trial.notes(found).get("fprop", "") + str(found.fprop.reason)

    assert "goes on trial" in said()
    scripted.answer = None
    for _ in range(trial.SEEN):
        forward(x, w)
    assert "on trial, compiling: 0 of 3; F.conv2d serves until it is over" in said()
    for _, answer in scripted.submitted:
        answer.set_result({"failed": ""})
    for _ in range(2):
        forward(x, w)
    assert "checking" in said()
    for _ in range(5):
        forward(x, w)
    assert "racing" in said()
    for _ in range(TURNS):
        forward(x, w)
    assert "raced 20" in said()
    groupconv.set_trials(False)
    assert trial.notes(plan(x, w)).keys() == {"dgrad", "wgrad"}
    assert "set_trials(False)" in trial.notes(plan(x, w))["dgrad"]


# --- The file --------------------------------------------------------------------------------------------------------


def until_written(*arguments):
    """Calls until no trial is under way, and what they found is written, which goes on beside them."""
    until_decided(*arguments)
    for thread in threading.enumerate():
        if thread.name.endswith("(write)"):  # raced.write; others, torch's pools say, may stay
            thread.join(30)


def wait_for_file():
    """With its first line: it is there before that."""
    path, end = raced.user_file(SLUG), time.monotonic() + 10
    while not (path.exists() and path.stat().st_size) and time.monotonic() < end:
        time.sleep(0.01)
    return path


@pytest.mark.parametrize(
    ("flags", "fair"),
    [
        ({"enabled": True, "benchmark": True}, True),
        ({"enabled": True, "benchmark": False}, False),
        ({"enabled": False, "benchmark": True}, False),
        ({"enabled": True, "benchmark": True, "deterministic": True}, False),
    ],
)
def test_only_fair_races_are_written(scripted, monkeypatch, flags, fair):
    """Where F.conv2d was not at its best, the result is this process's."""
    monkeypatch.setattr(raced, "is_fair", IS_FAIR)
    assert not raced.is_fair()
    torch.use_deterministic_algorithms(False)
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    with torch.backends.cudnn.flags(**flags):
        until_decided(forward, x, w)
        assert served(scripted, x, w) == "row_march"
    if not fair:
        time.sleep(0.2)
    assert (wait_for_file() if fair else raced.user_file(SLUG)).exists() == fair


def test_another_process_starts_decided(scripted):
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    for _ in range(TURNS):
        forward(x, w)
    path = wait_for_file()
    (line,) = path.read_text().splitlines()
    start_anew()
    groupconv.set_trials(True)
    scripted.submitted.clear()
    assert served(scripted, x, w) == "row_march"
    assert plan(x, w).fprop.source == "raced"
    assert scripted.submitted == []
    # What `groupconv tune` measured goes before it.
    entry = json.loads(line)
    measured = {"key": entry["key"], "algorithm": "torch", "config": {}, "time_us": 9.0, "torch_time_us": 9.0}
    file = {"schema": configs.SCHEMA, "device": "NVIDIA H200", "kernels_sha256": configs.kernels_sha256()}
    (path.parent / f"{SLUG}.json").write_text(json.dumps(file | {"tuned_with": {}, "entries": [measured]}))
    start_anew()
    assert plan(x, w).fprop.source == "exact"


def kept_line(problem=None, **changes):
    problem = problem or ConvProblem(2, 16, 6, 6, 16, 3, 3, pad=(1, 1, 1, 1), groups=4, dtype="tf32")
    config = dispatch.modelled(problem, "fprop", devices.DEFAULT, "implicit_gemm")[1]
    fields = {
        "schema": configs.SCHEMA, "device": SLUG, "utc": "2026-01-01T00:00:00Z", "key": problem.config_key("fprop"),
        "algorithm": "implicit_gemm", "config": config, "time_us": 5.0, "torch_time_us": 9.0,
        "made_with": raced.made_with(),
    }  # fmt: skip
    return json.dumps(fields | changes)


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00\xff\x00", b"[]", b"{}", b"[" * 100_000,
        kept_line(schema=99).encode(), kept_line(device="other").encode(), kept_line(time_us="fast").encode(),
        kept_line(algorithm="../x").encode(), kept_line(made_with=3).encode(),
        kept_line()[:-9].encode(), kept_line(config={"BLOCK_M": 10**9}).encode(),
    ],
)  # fmt: skip
def test_damaged_lines_are_told_once_and_passed_over(scripted, tmp_path, damage):
    problem = ConvProblem(2, 16, 6, 6, 16, 3, 3, pad=(1, 1, 1, 1), groups=4, dtype="tf32")
    path = raced.user_file(SLUG)
    content = damage + b"\n" + kept_line().encode() + b"\n"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"skipping line 1: no result of a race") as caught:
        found, again = (raced.lookup(SLUG, problem, "fprop") for _ in range(2))
    assert len(caught) == 1
    assert found is again
    assert found.won
    assert path.read_bytes() == content


def test_the_last_result_counts_whatever_the_clock_said(scripted):
    """It was days ahead when an earlier one was written, in a file that is as new."""
    problem = ConvProblem(2, 16, 6, 6, 16, 3, 3, pad=(1, 1, 1, 1), groups=4, dtype="tf32")
    lines = [kept_line(utc=f"{year}-01-01T00:00:00Z", torch_time_us=us) for year, us in ((2096, 9.0), (1970, 7.0))]
    raced.user_file(SLUG).write_text("\n".join(lines) + "\n")
    os.utime(raced.user_file(SLUG), (4e9, 4e9))
    assert raced.lookup(SLUG, problem, "fprop").entry.torch_time_us == 7.0


@pytest.mark.parametrize("changed", ["torch", "triton", "cudnn", "kernels"])
def test_results_of_other_versions_are_a_miss(scripted, changed):
    problem = ConvProblem(2, 16, 6, 6, 16, 3, 3, pad=(1, 1, 1, 1), groups=4, dtype="tf32")
    made = raced.made_with() | {changed: "other"}
    raced.user_file(SLUG).write_text(kept_line(made_with=made) + "\n" + kept_line(torch_time_us=7.0)[:-1] + "}\n")
    assert raced.lookup(SLUG, problem, "fprop").entry.torch_time_us == 7.0
    raced.reset()
    raced.user_file(SLUG).write_text(kept_line(made_with=made) + "\n")
    assert raced.lookup(SLUG, problem, "fprop") is None


def test_a_folder_that_cannot_be_used(scripted, tmp_path, monkeypatch):
    """Results are this process's own then; a folder or a pipe in the file's place is told once."""
    x, w = operands()
    times(scripted, 100.0, row_march=50.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GROUPCONV_CONFIG_DIR", str(tmp_path / "file"))  # no folder
    start_anew()
    groupconv.set_trials(True)
    with pytest.warns(UserWarning, match="Not a directory"):
        forward(x, w)
    with pytest.warns(UserWarning, match="what races find is not kept"):
        until_written(forward, x, w)
    assert served(scripted, x, w) == "row_march"
    monkeypatch.setenv("GROUPCONV_CONFIG_DIR", str(tmp_path))
    os.mkfifo(tmp_path / f"{SLUG}.trials.jsonl")
    start_anew()
    with pytest.warns(UserWarning, match="not a file"):
        assert plan(x, w).fprop.source == "modelled"


@pytest.mark.parametrize("why", ["full", "nearly full", "no lock", "read-only"])
def test_results_that_cannot_be_written(scripted, folder, why, monkeypatch):
    """Calls go on by them, it is told once, and the file is as it was; later ones are written where there is room."""
    monkeypatch.setenv("GROUPCONV_CONFIG_DIR", str(folder))
    start_anew()
    groupconv.set_trials(True)
    path, before = raced.user_file(SLUG), kept_line() + "\n"
    path.write_text(before)
    times(scripted, 100.0, row_march=50.0)
    refused = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    starve = {
        "full": lambda: pretended.full_disk(len(before)),
        "nearly full": lambda: pretended.full_disk(len(before) + 50),
        "no lock": lambda: mock.patch.object(filelock.FileLock, "acquire", refused),
        "read-only": lambda: pretended.read_only(folder),
    }[why]

    def decide(*sizes):
        for size in sizes:
            given = operands(size=size)
            until_written(forward, *given)
            assert served(scripted, *given) == "row_march"

    with starve(), pytest.warns(UserWarning, match=r"trials.jsonl: what races find is not kept: ") as caught:
        decide(12, 24)
    assert len(caught) == 1
    assert path.read_text() == before
    assert {each.name for each in folder.iterdir()} <= {path.name, f"{path.name}.lock"}
    decide(48)
    assert path.read_text().startswith(before)
    assert len(path.read_text().splitlines()) == 2


def test_processes_that_write_at_once(tmp_path):
    """Every line is whole, also after one that a kill cut short."""
    path = tmp_path / f"{SLUG}.trials.jsonl"
    path.write_text('{"cut short')
    code = f"""
import json
from groupconv import configs, raced
fields = json.loads({kept_line()!r})
entry = configs.entry(fields, lambda algorithm: False)
for i in range(40):
    raced.write({SLUG!r}, raced.Result(entry, str(i)))
"""
    environment = ENVIRONMENT | {"GROUPCONV_CONFIG_DIR": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    lines = path.read_text().splitlines()
    assert lines[0] == '{"cut short'
    assert sorted(json.loads(line)["utc"] for line in lines[1:]) == sorted([str(i) for i in range(40)] * 2)


def test_the_table_of_the_command_line(scripted, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.main(["trials"]) == 0
    assert "no results" in capsys.readouterr().out
    raced.user_file(SLUG).write_text(kept_line() + "\n" + kept_line(made_with={"torch": "1"}, torch_time_us=5.1) + "\n")
    assert cli.main(["trials"]) == 0
    said = capsys.readouterr().out
    assert said.count("implicit_gemm") == 3  # two of ours, one of which is taken
    assert SLUG in said
    assert "other versions" in said


# --- Processes that compile ------------------------------------------------------------------------------------------


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_first_step_waits_for_no_compiler(tmp_path):
    """A converted block's first steps end before any compilation does, and what they compile is what calls launch."""
    code = """
import time, torch, torch.nn.functional as F, groupconv
from groupconv import launcher, prepared, trial, call
from groupconv.compiling import stub_driver
import triton

class Clock:
    capturing = staticmethod(lambda: False)
    mark = staticmethod(lambda: 0)
    microseconds = staticmethod(lambda start, end: 1.0)
    later = staticmethod(lambda tensor: lambda: [[0.0, 1.0, 1.0]] * len(tensor))

prepared.refusal = lambda x, backend: None
trial.DEVICE = Clock()
groupconv.set_trials(True)
torch.manual_seed(0)
block = torch.nn.Sequential(
    torch.nn.Conv2d(64, 64, 1), torch.nn.Conv2d(64, 64, 3, padding=1, groups=32), torch.nn.Conv2d(64, 64, 1)
).to(memory_format=torch.channels_last)
groupconv.convert(block)
x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
ends = []
original = trial.submit
def submit(job):
    answer = original(job)
    answer.add_done_callback(lambda _: ends.append(time.monotonic()))
    return answer
trial.submit = submit
with stub_driver.active("sm_90"):
    for _ in range(trial.SEEN + 1):
        block(x).sum().backward()
    stepped = time.monotonic()
    started = [t for t in trial.STARTED]
    assert {t.pass_ for t in started} >= {"fprop", "wgrad"}, started
    early = [end for end in ends if end < stepped]
    answers = [one.answer for t in started for one in t._contenders]
    assert all(not answer.result(240)["failed"] for answer in answers), [a.result() for a in answers]
    # Now the caller's own launches find what was compiled.
    compiled = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(cache_hit)
    for _ in range(8):
        block(x).sum().backward()
print(len(early), len(answers), len(compiled), all(compiled))
trial.end_processes()
"""
    early, jobs, compiled, cached = python(code, TRITON_CACHE_DIR=str(tmp_path)).split()
    assert int(early) == 0
    assert int(jobs) >= 4
    assert int(compiled) >= 4
    assert cached == "True"


def test_processes_end_when_idle_and_with_their_parent(tmp_path):
    code = """
import os, signal, sys, time
from groupconv import trial
trial.IDLE_SECONDS = float(sys.argv[1])
answer = trial.submit({"pass_": "fprop"})
print(answer.result(120)["failed"].split(":")[0], flush=True)
print(*(process.pid for process in trial._workers._started), flush=True)
time.sleep(float(sys.argv[2]))
print(trial._workers, flush=True)
if sys.argv[3] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for idle, asleep, ending, left in (
        (0.2, 2.0, "exit", "None"),
        (60, 0, "exit", "Workers"),
        (60, 0, "kill", "Workers"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, str(idle), str(asleep), ending],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        failed, pids, kept = done.stdout.splitlines()
        assert failed == "KeyError", done.stderr
        assert left in kept
        end = time.monotonic() + 10
        while any(map(is_alive, map(int, pids.split()))) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(map(is_alive, map(int, pids.split())))


def test_a_worker_that_hangs_is_ended(tmp_path):
    """After its time, or with its caller, whichever comes first."""
    (tmp_path / "hanging.py").write_text(
        "import time\nfrom groupconv import workers\nworkers.serve(lambda job: time.sleep(600))\n"
    )
    code = """
import sys, time
from groupconv import workers
started = time.monotonic()
with workers.Workers("hanging", False, 1, background=True, seconds=float(sys.argv[1])) as hanging:
    if sys.argv[2] == "wait":
        print(hanging.submit({}).result()["failed"])
    else:
        hanging.submit({})
        while not hanging._started:
            time.sleep(0.01)
        print(hanging.unanswered)
"""
    for seconds, what, said in ((3, "wait", "status -9"), (600, "leave", "1")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(seconds), what], capture_output=True, text=True, timeout=60,
            env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_a_worker_that_says_something_else(tmp_path, monkeypatch):
    """It is ended, and the next job has another; whatever there is in sys.path."""
    (tmp_path / "chatty.py").write_text(
        "from groupconv import workers\nprint('hello', flush=True)\nworkers.serve(lambda job: {'failed': ''})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    with workers.Workers("chatty", False, 1, background=True) as chatty:
        for _ in range(2):
            assert chatty.submit({}).result(60)["failed"] == "chatty: no answer but 'hello'"
        assert chatty.unanswered == 0


def test_an_idle_timer_leaves_processes_that_were_asked(monkeypatch):
    class Busy:
        unanswered, closed = 1, False

        def close(self):
            self.closed = True

    busy = Busy()
    monkeypatch.setattr(trial, "_workers", busy)
    trial.end_processes(if_idle=True)
    assert not busy.closed
    busy.unanswered = 0
    trial.end_processes(if_idle=True)
    assert busy.closed


def test_a_process_that_cannot_be_started(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with workers.Workers("groupconv.compiling.compiler", False) as none:
        assert none.submit({}).result(10) == {"failed": "OSError: no more processes", "unstarted": True}


def test_a_forked_process_has_processes_of_its_own():
    code = """
import os
from groupconv import trial
trial.submit({"pass_": "fprop"}).result(120)
pid = os.fork()
if pid == 0:
    assert trial._workers is None
    failed = trial.submit({"pass_": "fprop"}).result(120)["failed"]
    trial.end_processes()
    os._exit(0 if "KeyError" in failed else 1)
print(os.waitpid(pid, 0)[1])
"""
    assert python(code) == "0"
