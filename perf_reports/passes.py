"""The passes of a layer that a report has rows of, and what dispatch takes for each."""

from __future__ import annotations

from .. import dispatch
from ..algorithms import able
from ..devices import Target
from ..problem import PASSES, PLANNED, ConvProblem


def reported(problem: ConvProblem, target: Target) -> list[tuple[str, list[str]]]:
    """Each pass and the algorithms that can serve it; "backward", both gradients by one kernel, only where one can."""
    found = [(pass_, able(problem, pass_, target)) for pass_ in PLANNED]
    return [(pass_, names) for pass_, names in found if names or pass_ in PASSES]


def taken(problem: ConvProblem, pass_: str, target: Target) -> dispatch.PassPlan | None:
    """What "auto" takes; None where it takes dgrad and wgrad for "backward"."""
    if pass_ == "backward":
        return dispatch.plan(problem, target).backward
    return dispatch.plan_pass(problem, pass_, target)
