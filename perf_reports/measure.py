"""A report's rows on a GPU: its limits, then our algorithms and their peers, checked against float64 and timed."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from .. import dispatch
from ..devices import Target
from ..problem import ConvProblem
from ..tuning.compiler import Compiler
from ..tuning.contenders import Contender, has_native, same_layout
from ..tuning.lab import DeviceLost, Limits, failure
from .passes import reported, taken
from .rows import Layer, Timing, layer_row, limit_row, timing_fields

BASELINES = ("torch_contiguous", "torch_channels_last")
PEERS = (*BASELINES, "torch_native", "torch_compile", "flag_gems")
ROUNDS = 30
COMPILED_AHEAD = 8  # layers


def peers(problem: ConvProblem, chosen: Sequence[str]) -> list[str]:
    """Of the peers' names those that have something of their own to offer for a problem."""
    native = has_native(problem)
    installed = importlib.util.find_spec("flag_gems") is not None
    return [name for name in chosen if (name != "torch_native" or native) and (name != "flag_gems" or installed)]


def count(layers: list[Layer], target: Target, chosen: Sequence[str] = BASELINES) -> int:
    """How many rows `rows` yields."""
    each = ((layer, names) for layer in layers for _, names in reported(layer.problem, target))
    limits = 2 * len({layer.problem.dtype for layer in layers})
    return limits + sum(len(names) + len(peers(layer.problem, chosen)) + 1 for layer, names in each)


def rows(
    layers: list[Layer],
    lab: Any,
    chosen: Sequence[str] = BASELINES,
    skip: Callable[[dict], bool] = lambda row: False,
    compiler: Compiler | None = None,
) -> Generator[dict, None, None]:
    """The device's limits in each dtype; then, for each layer and pass, each algorithm pinned, its peers, and what
    "auto" takes, the last row of a pass.

    lab: a tuning.lab.Lab or its stub. chosen: peers, of PEERS. skip: says of a pass's first fields, with provider
    "auto", that there are rows of it already. compiler: compiles some layers ahead. A provider that fails, or whose
    numbers are wrong, has a row that says so and no time.
    """
    found: dict[str, Limits] = {}
    work = []
    for layer in layers:
        passes = [each for each in reported(layer.problem, lab.target) if not skip(layer_row(layer, each[0], "auto"))]
        if passes:
            work.append((layer, passes))
    ahead = (_pinned(layer.problem, passes, lab.target) for layer, passes in work)
    _compile_next(ahead, compiler, COMPILED_AHEAD)
    for layer, passes in work:
        problem = layer.problem
        _compile_next(ahead, compiler, 1)
        if problem.dtype not in found:
            limits = found[problem.dtype] = lab.limits(problem.dtype)
            yield limit_row("copy_limit", problem.dtype, limits.copy_gbps, lab.kind)
            yield limit_row("matrix_limit", problem.dtype, limits.matrix_tflops, lab.kind)
        with lab.subject(problem) as subject:
            bench = _Bench(layer, lab, subject, found[problem.dtype], compiler)
            for pass_, names in passes:
                yield from bench.rows(pass_, names, peers(problem, chosen))


def _pinned(
    problem: ConvProblem, passes: list[tuple[str, list[str]]], target: Target
) -> list[tuple[ConvProblem, str, Contender]]:
    """What each algorithm takes for some passes."""
    return [
        (problem, pass_, _contender(problem, dispatch.plan_pass(problem, pass_, target, f"triton:{name}")))
        for pass_, names in passes
        for name in names
    ]


def _compile_next(ahead: Iterator[list], compiler: Compiler | None, count: int) -> None:
    if compiler is not None:
        for pinned in itertools.islice(ahead, count):
            for each in pinned:
                compiler.submit(*each)


def peer_rows(
    layers: list[Layer], lab: Any, peer: str, skip: Callable[[dict], bool] = lambda row: False
) -> Generator[dict, None, None]:
    """The rows of one peer alone, for one that takes long to begin (torch_compile). skip: as of `rows`, by its name."""
    found: dict[str, Limits] = {}
    for layer in layers:
        problem = layer.problem
        todo = [pass_ for pass_, _ in reported(problem, lab.target) if not skip(layer_row(layer, pass_, peer))]
        if todo and problem.dtype not in found:
            found[problem.dtype] = lab.limits(problem.dtype)
        for pass_ in todo:
            with lab.subject(problem) as subject:
                yield _Bench(layer, lab, subject, found[problem.dtype]).peer(pass_, peer)


class _Bench:
    """One layer's rows."""

    def __init__(self, layer: Layer, lab: Any, subject: Any, limits: Limits, compiler: Compiler | None = None):
        self.compiler = compiler
        self.layer, self.problem, self.lab = layer, layer.problem, lab
        self.subject, self.limits = subject, limits

    def rows(self, pass_: str, names: list[str], others: list[str]) -> Iterator[dict]:
        """Everyone is checked, then those whose numbers are right take turns."""
        plans = [dispatch.plan_pass(self.problem, pass_, self.lab.target, f"triton:{name}") for name in names]
        listed = [(_contender(self.problem, plan), plan.source) for plan in plans]
        listed += [(Contender(name), "baseline") for name in others]
        auto = taken(self.problem, pass_, self.lab.target)
        chosen = None if auto is None else _contender(self.problem, auto)
        made = {each.name: self._checked(pass_, each, source) for each, source in listed}
        contenders = [each for each, _ in listed]
        if chosen is not None and auto is not None and chosen.name not in made:
            made[chosen.name] = self._checked(pass_, chosen, auto.source)
            contenders.append(chosen)
        self._time(pass_, [each for each in contenders if not made[each.name].get("note")], made)
        self.subject.forget(pass_)
        yield from (made[each.name] for each, _ in listed)
        if auto is None or chosen is None:
            yield {**self._about(pass_, "auto", ""), "note": "takes dgrad and wgrad"}
        else:
            takes = f"takes {'F.conv2d' if auto.algorithm == 'torch' else auto.algorithm}"
            row = made[chosen.name]
            note = "; ".join(filter(None, [takes, row.get("note")]))
            yield {**row, "provider": "auto", "source": auto.source, "note": note}

    def peer(self, pass_: str, name: str) -> dict:
        """A peer's row."""
        contender = Contender(name)
        made = {name: self._checked(pass_, contender, "baseline")}
        self._time(pass_, [] if made[name].get("note") else [contender], made)
        self.subject.forget(pass_)
        return made[name]

    def _about(self, pass_: str, provider: str, source: str, config: dict | None = None) -> dict:
        ungrouped = dataclasses.replace(self.problem, groups=1)
        return {
            **layer_row(self.layer, pass_, provider),
            "source": source,
            "config": config,
            "floor_us": self.limits.floor_us(self.problem, pass_, self.lab.target),
            "ungrouped_floor_us": self.limits.floor_us(ungrouped, pass_, self.lab.target),
            "err_on": self.subject.checked_on(pass_),
        }

    def _checked(self, pass_: str, contender: Contender, source: str) -> dict:
        row = self._about(pass_, contender.provider, source, contender.config)
        if self.compiler is not None and contender.ours:
            self.compiler.answer(self.problem, pass_, contender)  # in Triton's cache, or to fail again below
        try:
            checked = self.subject.check(pass_, contender)
        except DeviceLost:
            raise
        except Exception as error:  # what it raises is the finding; the other rows may do better
            return {**row, "note": failure(error)}
        row |= {"max_rel_err": checked.error, "err_bound": checked.bound}
        if contender.ours:
            row |= self.subject.used(pass_, contender)
        return row if checked.wrong is None else {**row, "note": checked.wrong}

    def _time(self, pass_: str, contenders: list[Contender], made: dict[str, dict]) -> None:
        try:
            times = self.subject.race(pass_, contenders, ROUNDS) if contenders else {}
        except DeviceLost:
            raise
        except Exception as error:
            for each in contenders:
                made[each.name]["note"] = failure(error)
            return
        floor = self.limits.floor_us(self.problem, pass_, self.lab.target)
        for name, taken_us in times.items():
            made[name] |= timing_fields(self.problem, pass_, _quantiles(taken_us), floor)


def _contender(problem: ConvProblem, plan: dispatch.PassPlan) -> Contender:
    """What a plan takes, as one that runs."""
    if plan.algorithm == "torch":
        return same_layout(problem)
    return Contender(plan.algorithm, plan.config, plan.time_us)


def _quantiles(times: list[float]) -> Timing:
    ordered = sorted(times)
    p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
    return Timing(p50, p20, p80)
