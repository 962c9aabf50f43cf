"""A pretended GPU for trying the search, the journal and the reports where there is none.

Nothing runs on it. Its device is called "stub" and its times are the model's with noise, so no result of it may ship:
they show that the machinery works, and say nothing of any GPU.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator

from .. import cost, devices
from ..problem import ConvProblem
from .contenders import Contender
from .lab import Checked, Limits, Subject

NAME = "stub"
CHECK_SECONDS, ROUND_SECONDS = 2e-3, 1e-4  # that a check, and a round of a contender, take of the real clock
NOISE = 0.02


class StubLab:
    """A `lab.Lab` without a device."""

    name = kind = NAME

    def __init__(self, target: devices.Target):
        self.target = target

    @contextlib.contextmanager
    def subject(self, problem: ConvProblem) -> Iterator[Subject]:
        yield StubSubject(problem, self.target)

    def limits(self, dtype: str) -> Limits:
        """The limits that the model assumes."""
        return Limits(self.target.copy_gbps, self.target.matrix_rate(dtype) or self.target.matrix_rate("fp32"))


class StubSubject:
    """A `lab.Subject` without operands: no numbers are checked, and times are drawn, the same for the same question."""

    def __init__(self, problem: ConvProblem, target: devices.Target):
        self.problem, self.target = problem, target

    def checked_on(self, pass_: str) -> str:
        return "nothing: stub"

    def check(self, pass_: str, contender: Contender) -> Checked:
        time.sleep(CHECK_SECONDS)
        return Checked()

    def used(self, pass_: str, contender: Contender) -> dict[str, int | str]:
        return {}

    def race(self, pass_: str, contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
        time.sleep(ROUND_SECONDS * rounds * len(contenders))
        return {contender.name: self._times(pass_, contender, rounds) for contender in contenders}

    def forget(self, pass_: str) -> None:
        """There is nothing to drop."""

    def _times(self, pass_: str, contender: Contender, rounds: int) -> list[float]:
        drawn = random.Random(f"{self.problem} {pass_} {contender.name}")
        typical = contender.modelled_us
        if typical is None:
            typical = cost.torch_prior_us(self.problem, pass_, self.target)
        typical *= drawn.lognormvariate(0.0, 0.3)  # what the model does not know
        drawn.seed(f"{self.problem} {pass_} {contender.name} {rounds}")
        return [typical * drawn.lognormvariate(0.0, NOISE) for _ in range(rounds)]
