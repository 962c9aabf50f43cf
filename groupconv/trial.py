"""Trials: plans that nobody measured prove themselves in the user's own calls, and F.conv2d serves until they have.

While training goes on, the modelled best of our plans are compiled in other processes, checked against F.conv2d on the
user's tensors, and raced against it, call by call in turns. What wins is taken from then on. No call waits: whether a
compiler, a check or a clock is done is asked in the next call.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import math
import os
import statistics
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import configs, dispatch, launcher, raced, torch_private, workers
from .devices import Target
from .problem import PASSES, ConvProblem

SEEN = 4  # calls of a kind, before it goes on trial: last batches and other rare shapes never do
MOST_TRIALS = 256  # of a process
SAMPLES, MOST_SAMPLES = 5, 20  # of a contender, after a first that does not count: where its times agree, and else
NOISE = 0.1  # of the median, between quartiles: from here on times do not agree
# Checks that can tell nothing, while loss scaling finds its scale, or gradients are zero, before a contender is out.
# After each, twice as many calls go by as before: layers of one kind share a trial, and a step calls them all.
INCONCLUSIVE = 12
UNTOLD = "F.conv2d's results were zero, or not finite"
TELLING = 4.0  # bounds that a result must be large, in the scale of random operands', to tell a right one from zeros
MOST_PROCESSES = 4
COMPILE_SECONDS = 300.0  # a compiler that takes longer is ended
IDLE_SECONDS = 30.0  # then processes without work are
# What F.conv2d's own result may be off by, as `problem.error_bound` has ours: cuDNN may choose Winograd's algorithm.
TORCH_ERROR = {"bf16": 4e-3, "fp16": 4e-3, "tf32": 1e-3, "bf16x3": 1e-3, "fp32": 1e-4}


# --- Whether there are trials ----------------------------------------------------------------------------------------

_wished: bool | None = None
_unable = ""  # why no process can compile


def wish(wanted: bool | None) -> None:
    """See prepared.set_trials."""
    global _wished
    if not isinstance(wanted, (bool, type(None))):
        raise ValueError(f"set_trials: wanted is {wanted!r}, but must be True, False or None")
    _wished = wanted


def why_off() -> str:
    """Why plans do not go on trial; "" if they do."""
    if _unable or _wished:
        return _unable
    if _wished is False:
        return "groupconv.set_trials(False)"
    if not torch_private.cudnn_searches():
        return "torch.backends.cudnn.benchmark is False"
    if torch_private.cudnn_is_deterministic() or torch_private.determinism_is_asked_for():
        return "deterministic algorithms are asked for"
    return ""


def is_unproven(plan: dispatch.Plan, pass_: str, common: bool) -> bool:
    """Whether a plan's pass is a model's choice that has to prove itself; or one that did so where operands lie as in
    most calls, as they do not in this (`common`).
    """
    if plan.backend != "auto" or plan.refusal is not None or plan.problem.batch == 0 or why_off():
        return False
    chosen = getattr(plan, "fused" if pass_ == "backward" else pass_)
    return chosen.source == "modelled" or (chosen.source == "raced" and chosen.algorithm != "torch" and not common)


# --- The device: events and readings, none of which is waited for ----------------------------------------------------


class Device(Protocol):
    """Where contenders run."""

    def capturing(self) -> bool:
        """Whether what is launched now is recorded into a graph, and does not run."""

    def mark(self) -> Any:
        """This point of the stream."""

    def microseconds(self, start: Any, end: Any) -> float | None:
        """The time between two marks; None as long as the second is not reached."""

    def later(self, tensor: Tensor) -> Callable[[], list[float] | None]:
        """What reads a tensor of numbers: None as long as they are not there."""


class Gpu:
    """The current device and stream."""

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return 1e3 * start.elapsed_time(end) if end.query() else None

    def later(self, tensor: Tensor) -> Callable[[], list[float] | None]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        end = self.mark()
        return lambda: host.tolist() if end.query() else None


DEVICE: Device = Gpu()


# --- Compiling, elsewhere --------------------------------------------------------------------------------------------

_lock = threading.Lock()
_workers: workers.Workers | None = None
_idle: threading.Timer | None = None


def submit(job: workers.Fields) -> concurrent.futures.Future[workers.Fields]:
    """Have a job of `compiling.compiler` done by a process of the lowest priority."""
    global _workers, _idle
    with _lock:
        if _workers is None:
            count = min(MOST_PROCESSES, workers.processes())
            module = f"{__package__}.compiling.compiler"
            _workers = workers.Workers(module, False, count, background=True, seconds=COMPILE_SECONDS)
        answer = _workers.submit(job)
        if _idle is not None:
            _idle.cancel()
            _idle = None
    answer.add_done_callback(_close_when_idle)
    return answer


def _close_when_idle(answer: object) -> None:
    global _idle
    with _lock:
        if _workers is not None and not _workers.unanswered and _idle is None:
            _idle = threading.Timer(IDLE_SECONDS, end_processes, [True])
            _idle.daemon = True
            _idle.start()


def end_processes(if_idle: bool = False) -> None:
    """End those that compile; the next job starts others."""
    global _workers, _idle
    with _lock:
        if if_idle and _workers is not None and _workers.unanswered:  # asked while the timer went off
            return
        ending, _workers, _idle = _workers, None, None
    if ending is not None:
        ending.close()


def _after_fork() -> None:
    """The processes and threads are the parent's."""
    global _lock, _workers, _idle
    _lock, _workers, _idle = threading.Lock(), None, None


atexit.register(end_processes)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# --- A trial ---------------------------------------------------------------------------------------------------------


class Racer:
    """What takes turns: F.conv2d, or one of ours."""

    def __init__(self) -> None:
        self.times: list[float] = []  # microseconds, the first of which does not count
        self._running: deque[tuple[Any, Any]] = deque()  # marks of runs that were not over when last asked

    def timed(self, run: Callable, operands: Sequence[Tensor | None]) -> Any:
        start = DEVICE.mark()
        result = run(*operands)
        self._running.append((start, DEVICE.mark()))
        return result

    def read(self) -> None:
        while self._running and (time := DEVICE.microseconds(*self._running[0])) is not None:
            self.times.append(time)
            self._running.popleft()

    @property
    def median(self) -> float:
        return statistics.median(self.times[1:])

    @property
    def begun(self) -> int:
        """Runs, the first one too."""
        return len(self.times) + len(self._running)

    @property
    def wanted(self) -> int:
        """The runs that it takes to tell its time, the first one too."""
        counted = self.times[1:]
        if len(counted) < SAMPLES:
            return 1 + SAMPLES
        first, median, third = statistics.quantiles(counted, n=4)
        return len(self.times) if third - first <= NOISE * median else 1 + MOST_SAMPLES

    @property
    def is_done(self) -> bool:
        return len(self.times) >= self.wanted


class Contender(Racer):
    """A plan of ours. out: why it is out of the race, "" while it is not. proven: whether its numbers are right."""

    def __init__(self, algorithm: str, config: dict[str, int], job: workers.Fields):
        super().__init__()
        self.algorithm, self.config, self._job = algorithm, config, job
        self.compile()
        self.run: Callable | None = None
        self.out, self.proven, self.inconclusive, self.due = "", False, 0, 0
        self.reading: Callable[[], list[float] | None] | None = None

    def compile(self) -> None:
        """Have it compiled into the folder where this process looks now."""
        self.folder = launcher.cache_folder()
        job = {"algorithm": self.algorithm, "config": self.config, "folder": self.folder, **self._job}
        self.answer = submit(job)

    def __str__(self) -> str:
        return " ".join([self.algorithm, *map(str, self.config.values())])


ENDED = ("raced", "stopped")


class Status(NamedTuple):
    """A trial as `trials` shows it. state: "compiling", "checking", "racing", "paused", or one of ENDED."""

    problem: ConvProblem
    pass_: str
    device: str
    state: str
    details: str


class Trial:
    """One pass of one kind of call, until it is decided who runs it.

    prepare: makes what runs an algorithm's configuration. job: fields of `compiling.compiler.Job` beside algorithm and
    config. ended: called once, with the result, or None where the trial was stopped without one. common: whether the
    result holds for other calls of the problem's class, as their operands lie dense and aligned; else it is this call's
    own.
    """

    def __init__(
        self, problem: ConvProblem, pass_: str, target: Target, prepare: Callable[[str, dict], Callable],
        job: workers.Fields, common: bool, ended: Callable[[raced.Result | None], None],
    ):  # fmt: skip
        self.problem, self.pass_, self.target = problem, pass_, target
        self._prepare, self._job, self._common, self._ended = prepare, job, common, ended
        self._lock = threading.Lock()
        self._seen = 0
        self._base = Racer()
        self._contenders: list[Contender] | None = None
        self._result: raced.Result | None = None
        self._stopped = self._out = ""

    def is_of(self, problem: ConvProblem, pass_: str, target: Target) -> bool:
        return (problem, pass_, target) == (self.problem, self.pass_, self.target)

    def __call__(self, base: Callable, *operands: Tensor | None) -> Any:
        """The result of the pass, by `base` (F.conv2d) or by a contender that has proven to be right.

        What it raises `base` does, never a contender.
        """
        # A graph that is recorded, or another thread's turn.
        if DEVICE.capturing() or not self._lock.acquire(blocking=False):
            return base(*operands)
        try:
            racer = self._next()
            if racer is None:
                return base(*operands)
            if not isinstance(racer, Contender):
                return racer.timed(base, operands)
            if not racer.proven:
                return self._checked(racer, base, operands)
            try:
                assert racer.run is not None
                return racer.timed(racer.run, operands)
            except Exception as error:  # whatever Triton or the device raises, F.conv2d serves
                racer.out = workers.in_a_line(error)
            return base(*operands)
        finally:
            self._lock.release()

    def _next(self) -> Racer | None:
        """Whose turn it is: F.conv2d's or a contender's, to be checked or timed; None where nobody's time counts."""
        if self._result is not None or self._stopped:  # a call that was prepared while the trial ended in another
            self._ended(self._result)
            return None
        try:
            self._seen += 1
            known = raced.lookup(self.target.slug, self.problem, self.pass_) if self._common else None
            if known is not None:  # of the same class, another call or device was quicker
                self._end(known)
            elif why_off():  # for now
                return None
            elif self._contenders is not None or (self._seen >= SEEN and self._begin()):
                return self._turn()
        except Exception as error:  # no thread can be started, say: a call goes on
            self._stop(workers.in_a_line(error))
        return None

    def _turn(self) -> Racer | None:
        racing = self._racing()
        unproven = [one for one in racing if not one.proven]
        if unproven:
            ready = [one for one in unproven if one.answer.done() and one.reading is None]
            for one in ready:
                if one.run is None and one.folder != launcher.cache_folder():  # as Inductor moves it
                    one.compile()
            ready = [one for one in ready if one.answer.done() and one.due <= self._seen]
            return min(ready, key=lambda one: one.inconclusive, default=None)
        racers: list[Racer] = [self._base, *racing]
        for racer in racers:
            racer.read()
        waiting = [racer for racer in racers if racer.begun < racer.wanted]
        if not waiting and all(racer.is_done for racer in racers):
            self._decide(racing)
        return min(waiting, key=lambda racer: racer.begun, default=None)

    def _begin(self) -> bool:
        """Have the contenders compiled, if there may be another trial."""
        if len(STARTED) >= MOST_TRIALS:
            self._stop(f"{MOST_TRIALS} others went before")
            return False
        STARTED.append(self)
        chosen = dispatch.contenders(self.problem, self.pass_, self.target)
        self._contenders = [Contender(name, config, self._job) for name, config in chosen]
        return True

    def _racing(self) -> list[Contender]:
        """The contenders that are not out, after what has come of compilers and checks is known."""
        global _unable
        assert self._contenders is not None
        for one in self._contenders:
            if one.out or one.proven or not one.answer.done():
                continue
            answer = {"failed": "cancelled"} if one.answer.cancelled() else one.answer.result()
            if answer.get("unstarted"):
                _unable = f"no process can be started that compiles: {answer['failed']}"
            if answer["failed"]:
                one.out = f"not compiled: {answer['failed']}"
            elif one.reading is not None and (numbers := one.reading()) is not None:
                one.reading = None
                self._judge(one, numbers)
        return [one for one in self._contenders if not one.out]

    def _checked(self, one: Contender, base: Callable, operands: Sequence[Tensor | None]) -> Any:
        """F.conv2d's result; a contender's beside it, on the same operands, in memory full of NaN."""
        expected = base(*operands)
        try:
            one.run = one.run or self._prepare(one.algorithm, one.config)
            with launcher.poisoned():
                result = one.run(*operands)
            one.reading = DEVICE.later(self._errors(result, expected, operands))
        except Exception as error:  # as above
            one.out = workers.in_a_line(error)
        return expected

    @property
    def _parts(self) -> tuple[str, ...]:
        """The passes whose results there are."""
        return ("dgrad", "wgrad") if self.pass_ == "backward" else (self.pass_,)

    @torch.no_grad()
    def _errors(self, result: Any, expected: Any, operands: Sequence[Tensor | None]) -> Tensor:
        """(||difference||, ||expected||, ||what random operands like these give||) of each result, on the device."""
        results, references = (made if isinstance(made, tuple) else (made,) for made in (result, expected))
        dy_or_x, *others = operands
        numbers = []
        for pass_, ours, theirs in zip(self._parts, results, references, strict=True):
            other = others[1] if self.pass_ == "backward" and pass_ == "dgrad" else others[0]  # of (dy, x, w)
            terms = self.problem.gemm(pass_)[2]
            scale = math.sqrt(terms * theirs.numel()) * _rms(dy_or_x) * _rms(other)
            numbers.append(torch.stack([_norm(ours - theirs), _norm(theirs), scale]))
        return torch.stack(numbers)

    def _judge(self, one: Contender, numbers: Any) -> None:
        for pass_, (difference, norm, scale) in zip(self._parts, numbers, strict=True):
            bound = self.problem.error_bound(pass_) + TORCH_ERROR[self.problem.dtype]
            # Sums that cancel are not to be blamed for what was rounded before.
            error = difference / max(norm, scale) if difference and math.isfinite(norm) else 0.0
            if error <= bound and not (0.0 < TELLING * bound * scale < norm < math.inf):
                one.inconclusive += 1
                one.due = self._seen + 2**one.inconclusive
                if one.inconclusive >= INCONCLUSIVE:
                    one.out = UNTOLD
                return
            if not error <= bound:
                one.out = f"wrong: {pass_} differs from F.conv2d's by {error:.2g}, the bound is {bound:.2g}"
                warnings.warn(
                    f"groupconv: {one} is wrong for {self.problem} on {self.target.slug}: {one.out}. F.conv2d serves; "
                    "please report this with what groupconv.explain prints",
                    stacklevel=2,
                )
                return
        one.proven = True

    def _decide(self, racing: list[Contender]) -> None:
        if not racing and any(one.out == UNTOLD for one in self._contenders or ()):
            self._stop(UNTOLD)
            return
        theirs = self._base.median
        best = min(racing, key=lambda one: one.median, default=None)
        algorithm, config, ours = ("torch", {}, theirs) if best is None else (best.algorithm, best.config, best.median)
        key = self.problem.config_key(self.pass_)
        found = raced.of_now(configs.Entry(key, algorithm, config, round(ours, 3), round(theirs, 3)))
        if self._common:
            raced.keep(self.target.slug, found)
        # What failed may not fail another time, and F.conv2d be faster where cuDNN searches.
        lasting = len(racing) == len(self._contenders or ()) and raced.is_fair()
        if self._common and lasting:
            with contextlib.suppress(RuntimeError):  # the interpreter ends
                threading.Thread(target=raced.write, args=(self.target.slug, found)).start()
        self._end(found)

    def _end(self, found: raced.Result) -> None:
        self._result = found
        self._forget()
        self._ended(found)

    def _stop(self, why: str) -> None:
        self._stopped = why
        self._forget()
        self._ended(None)

    def _forget(self) -> None:
        """What holds launches and events; why some are out is kept."""
        self._out = "; ".join(f"{one}: {one.out}" for one in self._contenders or () if one.out)
        self._contenders, self._base = None, Racer()

    @property
    def status(self) -> Status:
        """How far it is; asked from any thread."""
        contenders = self._contenders or ()
        if self._result is not None:
            state, details = "raced", "; ".join(filter(None, (self._result.told, self._out)))
        elif self._stopped:
            state, details = "stopped", self._stopped
        elif why := why_off():
            state, details = "paused", why
        elif not all(one.out or one.answer.done() for one in contenders):
            state, details = "compiling", f"{sum(one.answer.done() for one in contenders)} of {len(contenders)}"
        else:
            state = "racing" if all(one.out or one.proven for one in contenders) else "checking"
            details = "; ".join(map(_progress, contenders))
        return Status(self.problem, self.pass_, self.target.slug, state, details)


STARTED: list[Trial] = []  # all that compiled something


def _progress(one: Contender) -> str:
    """How a contender is getting on."""
    return f"{one}: " + (one.out or (f"{one.begun} of {one.wanted} runs" if one.proven else "not checked yet"))


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)  # fp32 has no squares of what bf16 holds


def _rms(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return _norm(tensor) / math.sqrt(max(1, tensor.numel()))


def trials() -> list[Status]:
    """The trials of this process, in the order in which they began.

    Plans that nobody measured are compared with F.conv2d in your own calls where `set_trials` says so.

    Returns: a list of named tuples (problem, pass_, device, state, details); times in microseconds.
    """
    return [trial.status for trial in STARTED]


def notes(plan: dispatch.Plan) -> dict[str, str]:
    """What there is to say of the passes that a model planned: how far their trials are, or why they are on none."""
    found, why = {}, why_off()
    for pass_ in PASSES:
        if plan.backend == "auto" and plan.refusal is None and getattr(plan, pass_).source == "modelled":
            mine = (trial for trial in reversed(STARTED) if trial.is_of(plan.problem, pass_, plan.target))
            status = next((trial.status for trial in mine), None)
            if why:
                found[pass_] = f"not on trial: {why}"
            elif status is not None:
                found[pass_] = f"on trial, {status.state}: {status.details}; F.conv2d serves until it is over"
            else:
                found[pass_] = f"F.conv2d serves; a kind of call that is seen {SEEN} times goes on trial"
    return found


def reset() -> None:
    """Forget all trials, and end the processes that compile for them."""
    global _unable
    _unable = ""
    STARTED.clear()
    end_processes()
