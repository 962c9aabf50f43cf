"""The search: for each pass of each layer, a race between our configurations and F.conv2d.

Compiled ahead in other processes, what spills or does not fit is out; numbers are checked before anything is timed;
then rounds double and the slower half of ours drops out, so that most of the time goes to those who may win.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator

from ..algorithms import able
from ..common import Layer, grouped
from ..common.progress import Deadline
from ..compiling.compiler import Compiler
from ..devices import Target
from ..problem import PLANNED, ConvProblem
from . import contenders as contenders_
from .contenders import Contender
from .journal import Finding, Journal
from .lab import DeviceLost, Lab, Subject, failure, tried

FIRST_ROUNDS, LAST_ROUNDS = 4, 32
FINALISTS = 2  # of ours
TASKS_COMPILED_AHEAD = 32
SEEDED_BY = {"fp16": "bf16"}  # kernels of the two are alike: of fp16 only bf16's finalists are tried, once known
OUT_OF_TIME = "out of time"


@dataclasses.dataclass(frozen=True)
class Task:
    """A pass of a layer."""

    layer: str
    problem: ConvProblem
    pass_: str

    def __str__(self) -> str:
        return f"{self.problem} {self.pass_}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task came to. Medians of the last race, by contender's name, and of the first, in which all ran that
    could. dropped: (contender, why) of the others.
    """

    task: Task
    finalists: tuple[Contender, ...]
    medians_us: dict[str, float]
    raced: tuple[Contender, ...]
    first_us: dict[str, float]
    dropped: tuple[tuple[str, str], ...]

    @property
    def best(self) -> Contender | None:
        """The fastest of ours, None if none gave right numbers."""
        own = (contender for contender in self.finalists if contender.ours)
        return min(own, key=lambda contender: self.medians_us[contender.name], default=None)

    @property
    def time_us(self) -> float | None:
        """The time of `best`."""
        return None if self.best is None else self.medians_us[self.best.name]

    @property
    def torch_us(self) -> float | None:
        """The time of F.conv2d on tensors as they lie: what "auto" has to beat; None if it failed."""
        return self.medians_us.get(contenders_.same_layout(self.task.problem).name)

    @property
    def best_torch_us(self) -> float | None:
        """The best time of PyTorch in any memory format and by any of its kernels."""
        peers = (contender.name for contender in self.finalists if not contender.ours)
        return min((self.medians_us[name] for name in peers), default=None)


def tasks(layers: Iterable[Layer], target: Target) -> list[Task]:
    """Each pass of each layer; "backward", both gradients by one kernel, where one can. None twice."""
    by_name: dict[str, Task] = {}
    for layer in layers:
        for pass_ in PLANNED:
            if able(layer.problem, pass_, target):
                task = Task(layer.name, layer.problem, pass_)
                by_name.setdefault(str(task), task)
    return list(by_name.values())


class Search:
    """A run over tasks, and its `results` so far. `on_result(task, result or None, note)` hears of each: None where it
    has none, and why.
    """

    def __init__(
        self, lab: Lab, journal: Journal, compiler: Compiler | None, deadline: Deadline,
        on_result: Callable[[Task, Result | None, str], None],
    ):  # fmt: skip
        self._lab, self._journal, self._compiler = lab, journal, compiler
        self._deadline, self._on_result = deadline, on_result
        self.results: list[Result] = []
        # Each is asked for several times, and plans it anew.
        self._ours = functools.cache(lambda task: contenders_.ours(task.problem, task.pass_, lab.target))

    def run(self, todo: list[Task]) -> None:
        """Race the tasks in their order: all, or as many as the time is enough for. DeviceLost ends it early."""
        seeded = {_of_dtype(task, SEEDED_BY.get(task.problem.dtype)): task for task in todo}
        waiting = {str(seeded[str(task)]) for task in todo if str(task) in seeded and not self._finalists(str(task))}
        by_problem = grouped(todo, lambda task: task.problem)  # which share operands
        ahead = (task for group in by_problem.values() for task in group if str(task) not in waiting)
        self._compile_next(ahead, TASKS_COMPILED_AHEAD)
        for group in by_problem.values():
            with contextlib.ExitStack() as stack:
                subject: Subject | None = None
                for task in group:
                    if self._deadline.passed:
                        self._on_result(task, None, OUT_OF_TIME)
                        continue
                    self._compile_next(ahead, 1)
                    if subject is None:
                        subject = stack.enter_context(self._lab.subject(task.problem))
                    result, note = self._guarded(task, subject)
                    if str(task) in seeded:
                        self._compile(seeded[str(task)])
                    if result is not None:
                        self.results.append(result)
                    self._on_result(task, result, note)

    def _finalists(self, task: str) -> set[str]:
        """Who ran in a task's last race, nobody if it was not run."""
        return set(self._journal.races.get((task, LAST_ROUNDS), ()))

    def _own(self, task: Task) -> list[Contender]:
        """Ours that are tried."""
        own = self._ours(task)
        seeds = self._finalists(_of_dtype(task, SEEDED_BY.get(task.problem.dtype)))
        return [contender for contender in own if contender.name in seeds] or own

    def _compile_next(self, ahead: Iterator[Task], count: int) -> None:
        for task in itertools.islice(ahead, count if self._compiler is not None else 0):
            self._compile(task)

    def _compile(self, task: Task) -> None:
        if self._compiler is None:
            return
        for contender in self._own(task):
            if (str(task), contender.name) not in self._journal.findings:
                self._compiler.submit(contender.job(task.problem, task.pass_, self._lab.target))

    def _guarded(self, task: Task, subject: Subject) -> tuple[Result | None, str]:
        try:
            return self._raced(task, subject), ""
        except TimeoutError:
            return None, OUT_OF_TIME
        except DeviceLost:
            raise
        except Exception as error:  # of the operands, the reference or the race: out of memory, mostly
            return None, failure(error)
        finally:
            subject.forget(task.pass_)

    def _raced(self, task: Task, subject: Subject) -> Result:
        admitted, dropped = [], []
        for contender in [*self._own(task), *contenders_.peers(task.problem)]:
            finding = self._finding(task, contender, subject)
            if finding.note:
                dropped.append((contender.name, finding.note))
            else:
                admitted.append(contender)
        if not admitted:
            raise RuntimeError(f"nothing runs: {'; '.join(f'{name}: {why}' for name, why in dropped)}")
        first = medians = self._race(task, admitted, FIRST_ROUNDS, subject)
        finalists, rounds = admitted, FIRST_ROUNDS
        while rounds < LAST_ROUNDS:
            most = FINALISTS if 2 * rounds >= LAST_ROUNDS else None
            finalists = survivors(task.problem, finalists, medians, most)
            last = sum(contender.ours for contender in finalists) <= FINALISTS
            rounds = LAST_ROUNDS if last else 2 * rounds
            medians = self._race(task, finalists, rounds, subject)
        return Result(task, tuple(finalists), medians, tuple(admitted), first, tuple(dropped))

    def _race(self, task: Task, admitted: list[Contender], rounds: int, subject: Subject) -> dict[str, float]:
        """Medians by contender."""
        times = self._journal.race(str(task), rounds, [contender.name for contender in admitted])
        if times is None:
            self._stop_when_passed()
            times = subject.race(task.pass_, admitted, rounds)
            self._journal.raced(str(task), rounds, times)
        return {name: statistics.median_high(taken) for name, taken in times.items()}

    def _finding(self, task: Task, contender: Contender, subject: Subject) -> Finding:
        finding = self._journal.findings.get((str(task), contender.name))
        if finding is None:
            self._stop_when_passed()
            finding = self._examined(task, contender, subject)
            self._journal.examined(str(task), contender.name, finding)
        return finding

    def _examined(self, task: Task, contender: Contender, subject: Subject) -> Finding:
        resources: dict[str, int | str] = {}
        if contender.ours and self._compiler is not None:
            job = contender.job(task.problem, task.pass_, self._lab.target)
            compiled = self._compiler.answer(job, self._deadline.left)
            resources = compiled.kernels[0].fields() if compiled.kernels else {}
            if faults := compiled.faults(self._lab.target):
                return Finding(None, None, resources, "; ".join(faults))
        try:
            checked = tried(subject, task.pass_, contender)
        except DeviceLost as error:
            self._journal.examined(str(task), contender.name, Finding(None, None, {}, f"lost the device: {error}"))
            raise
        return Finding(checked.error, checked.bound, {} if checked.failed else resources, checked.fault)

    def _stop_when_passed(self) -> None:
        if self._deadline.passed:
            raise TimeoutError


def survivors(
    problem: ConvProblem, admitted: list[Contender], medians: dict[str, float], most: int | None = None
) -> list[Contender]:
    """The faster half of ours, `most` at most; the fastest of PyTorch's, and the one that "auto" would fall back on."""
    ranked = sorted(admitted, key=lambda contender: medians[contender.name])
    own = [contender.name for contender in ranked if contender.ours]
    peers = [contender.name for contender in ranked if not contender.ours]
    half = math.ceil(len(own) / 2)
    kept = {*own[: half if most is None else min(half, most)], *peers[:1], contenders_.same_layout(problem).name}
    return [contender for contender in admitted if contender.name in kept]


def _of_dtype(task: Task, dtype: str | None) -> str:
    """The name of the task that differs in its dtype only; of none without a dtype."""
    return "" if dtype is None else str(Task("", dataclasses.replace(task.problem, dtype=dtype), task.pass_))
