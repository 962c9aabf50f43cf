"""The rows of results.csv and bench.csv: measured on a GPU, or, without one, modelled, counted and interpreted.

A row is one pass of one layer by one provider: an algorithm of the registry, one of PEERS, PRIOR where nothing is
measured, or "auto", what dispatch chooses of all. The providers LIMITS have no layer.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from groupconv import batch_norm, cost, dispatch
from groupconv.algorithms import able, interpretable, tiling
from groupconv.common import Layer
from groupconv.common.files import ENVIRONMENT
from groupconv.compiling import command
from groupconv.compiling.compiler import Compiled, Compiler, Job
from groupconv.compiling.interpreter import shrunk
from groupconv.devices import Target
from groupconv.measuring.contenders import Contender, has_native, same_layout
from groupconv.measuring.lab import Checked, DeviceLost, Lab, Limits, Subject, failure, tried
from groupconv.problem import PASSES, PLANNED, ConvProblem
from groupconv.workers import Workers

PROBLEM_FIELDS = (
    "batch", "c_in", "h_in", "w_in", "c_out", "kh", "kw", "stride_h", "stride_w", "pad_top", "pad_bottom", "pad_left",
    "pad_right", "dil_h", "dil_w", "groups", "dtype", "layout",
)  # fmt: skip
FIELDS = (
    *ENVIRONMENT, "layer", "pass", "provider", *PROBLEM_FIELDS, "source", "config", "us_p20", "us_p50", "us_p80",
    "tflops", "gbps", "floor_us", "fraction", "bound", "ungrouped_floor_us", "params", "flops", "bytes", "intensity",
    "params_ratio", "flops_ratio", "bytes_ratio", "intensity_ratio", "max_rel_err", "err_bound", "err_on", "registers",
    "spill_bytes", "shared_bytes", "matrix", "compiled_for", "note",
)  # fmt: skip
LIMITS = ("copy_limit", "matrix_limit")
PRIOR = "torch_prior"  # F.conv2d, modelled
BASELINES = ("torch_contiguous", "torch_channels_last")
PEERS = (*BASELINES, "torch_native", "torch_compile", "flag_gems")
TWO_KERNELS = "takes dgrad and wgrad"  # "auto" for "backward", where no one kernel is faster
CHAINS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"},
    "silu, trained": {"activation": "silu", "keeps": True},
    "residual and relu": {"activation": "relu", "residual": True},
}
NORMED = "batch norm and relu, a step"
ROUNDS = 30
CONFIGURATIONS_COMPILED_AHEAD = 64  # of about 8 layers

Fields = dict[str, Any]  # of a row, as it is made
Skip = Callable[[Fields], bool]
Work = list[tuple[Layer, list[tuple[str, list[str]]]]]  # layers with the passes and algorithms to report on


def reported(problem: ConvProblem, target: Target) -> list[tuple[str, list[str]]]:
    """Each pass and the algorithms that can serve it; "backward", both gradients by one kernel, only where one can."""
    served = [(pass_, able(problem, pass_, target)) for pass_ in PLANNED]
    return [(pass_, names) for pass_, names in served if names or pass_ in PASSES]


def taken(problem: ConvProblem, pass_: str, target: Target) -> dispatch.PassPlan | None:
    """What "auto" takes; None where it takes dgrad and wgrad for "backward"."""
    if pass_ == "backward":
        return dispatch.plan(problem, target).backward
    return dispatch.plan_pass(problem, pass_, target)


def limit_rows(limits: Limits, dtype: str, source: str) -> list[Fields]:
    """The rows of a device's limits in a dtype."""
    of_both = {"dtype": dtype, "source": source}
    return [
        {"provider": "copy_limit", "gbps": limits.copy_gbps, **of_both},
        {"provider": "matrix_limit", "tflops": limits.matrix_tflops, **of_both},
    ]


def layer_row(layer: Layer, pass_: str, provider: str) -> Fields:
    """What a layer's pass is, whoever runs it, and its ratios to the same layer without groups."""
    p = layer.problem
    problem = (
        p.batch, p.c_in, p.h_in, p.w_in, p.c_out, p.kh, p.kw, *p.stride, *p.pad, *p.dilation, p.groups, p.dtype,
        p.layout,
    )  # fmt: skip

    def work(problem: ConvProblem) -> dict[str, float]:
        flops, intensity = problem.flops(pass_), problem.intensity(pass_)
        return {"params": problem.params, "flops": flops, "bytes": problem.min_bytes(pass_), "intensity": intensity}

    ungrouped = work(_ungrouped(p))
    return {
        "layer": layer.name,
        "pass": pass_,
        "provider": provider,
        **dict(zip(PROBLEM_FIELDS, problem, strict=True)),
        **work(p),
        **{f"{name}_ratio": value / ungrouped[name] for name, value in work(p).items()},
    }


def _ungrouped(problem: ConvProblem) -> ConvProblem:
    return dataclasses.replace(problem, groups=1)


def timing_fields(
    problem: ConvProblem, pass_: str, floor_us: float, p50: float, p20: float | None = None, p80: float | None = None
) -> Fields:
    """A time in microseconds, its percentiles where it was measured, and the rates that it means, in useful FLOPs and
    in bytes moved once.
    """
    return {
        "us_p20": p20,
        "us_p50": p50,
        "us_p80": p80,
        "tflops": problem.flops(pass_) / p50 / 1e6,
        "gbps": problem.min_bytes(pass_) / p50 / 1e3,
        "fraction": floor_us / p50,
    }


def row_with_floors(layer: Layer, pass_: str, provider: str, target: Target) -> Fields:
    """A `layer_row` with the floors of its pass, and of the ungrouped layer's, by a target's rates."""
    floor_us, ungrouped_us = (cost.floor_us(p, pass_, target) for p in (layer.problem, _ungrouped(layer.problem)))
    return layer_row(layer, pass_, provider) | {"floor_us": floor_us, "ungrouped_floor_us": ungrouped_us}


# --- Measured --------------------------------------------------------------------------------------------------------


def peers(problem: ConvProblem, chosen: Sequence[str]) -> list[str]:
    """Of the peers' names those that have something of their own to offer for a problem."""
    native = has_native(problem)
    installed = importlib.util.find_spec("flag_gems") is not None
    return [name for name in chosen if (name != "torch_native" or native) and (name != "flag_gems" or installed)]


def count_measured(layers: list[Layer], target: Target, chosen: Sequence[str] = BASELINES) -> int:
    """How many rows `measured` yields."""
    limits = 2 * len({layer.problem.dtype for layer in layers})
    passes = ((layer.problem, names) for layer in layers for _, names in reported(layer.problem, target))
    return limits + sum(len(names) + len(peers(problem, chosen)) + 1 for problem, names in passes)


def measured(
    layers: list[Layer], lab: Lab, chosen: Sequence[str] = BASELINES, skip: Skip = lambda row: False,
    compiler: Compiler | None = None,
) -> Generator[Fields, None, None]:  # fmt: skip
    """The device's limits in each dtype; then, for each layer and pass, each algorithm pinned, its peers, and what
    "auto" takes, the last row of a pass.

    chosen: peers, of PEERS. skip: says of a pass's first fields, with provider "auto", that there are rows of it
    already. compiler: compiles some layers ahead. A provider that fails, or whose numbers are wrong, has a row that
    says so and no time.
    """
    work: Work = []
    for layer in layers:
        passes = [part for part in reported(layer.problem, lab.target) if not skip(layer_row(layer, part[0], "auto"))]
        if passes:
            work.append((layer, passes))
    bench = _Bench(lab, compiler)
    ahead = (
        bench.pinned(layer, pass_, name)[0].job(layer.problem, pass_, lab.target)
        for layer, passes in work
        for pass_, names in passes
        for name in names
    )

    def compile_next(configurations: int) -> None:
        if compiler is not None:
            for job in itertools.islice(ahead, configurations):
                compiler.submit(job)

    compile_next(CONFIGURATIONS_COMPILED_AHEAD)
    for layer, passes in work:
        yield from bench.limit_rows(layer.problem.dtype)
        with lab.subject(layer.problem) as subject:
            for pass_, names in passes:
                compile_next(len(names))
                yield from bench.rows(layer, pass_, subject, names, peers(layer.problem, chosen))


def of_peer(layers: list[Layer], lab: Lab, peer: str, skip: Skip = lambda row: False) -> Generator[Fields, None, None]:
    """The rows of a peer alone, one that takes long to begin (torch_compile). skip: as of `measured`, by its name."""
    bench = _Bench(lab)
    for layer in layers:
        passes = [pass_ for pass_, _ in reported(layer.problem, lab.target) if not skip(layer_row(layer, pass_, peer))]
        if passes:
            bench.limit_rows(layer.problem.dtype)
            with lab.subject(layer.problem) as subject:
                for pass_ in passes:
                    yield bench.timed(layer, pass_, subject, [(Contender(peer), "baseline")])[peer]


class _Bench:
    """A lab with its limits; `compiler` has what is measured compiled ahead."""

    def __init__(self, lab: Lab, compiler: Compiler | None = None):
        self._lab, self._compiler = lab, compiler
        self._limits: dict[str, Limits] = {}

    def limit_rows(self, dtype: str) -> list[Fields]:
        """The rows of the limits in a dtype; once, no rows after that."""
        if dtype in self._limits:
            return []
        self._limits[dtype] = self._lab.limits(dtype)
        return limit_rows(self._limits[dtype], dtype, self._lab.kind)

    def pinned(self, layer: Layer, pass_: str, name: str) -> tuple[Contender, str]:
        """An algorithm as a plan takes it, and where its configuration comes from."""
        plan = dispatch.plan_pass(layer.problem, pass_, self._lab.target, f"triton:{name}")
        return contender(layer.problem, plan), plan.source

    def rows(self, layer: Layer, pass_: str, subject: Subject, names: list[str], others: list[str]) -> Iterator[Fields]:
        """A pass: what is pinned, its peers, and "auto", which repeats what it takes."""
        listed = [self.pinned(layer, pass_, name) for name in names]
        listed += [(Contender(name), "baseline") for name in others]
        plan = taken(layer.problem, pass_, self._lab.target)
        auto = None if plan is None else (contender(layer.problem, plan), plan.source)
        by_name = self.timed(layer, pass_, subject, listed if auto is None else [*listed, auto])
        yield from (by_name[contender.name] for contender, _ in listed)
        if plan is None or auto is None:
            yield {**self._about(layer, pass_, subject, Contender("auto"), ""), "note": TWO_KERNELS}
        else:
            row = by_name[auto[0].name]
            takes = f"takes {'F.conv2d' if plan.algorithm == 'torch' else plan.algorithm}"
            note = "; ".join(filter(None, [takes, row.get("note")]))
            yield {**row, "provider": "auto", "source": plan.source, "note": note}

    def timed(
        self, layer: Layer, pass_: str, subject: Subject, listed: Iterable[tuple[Contender, str]]
    ) -> dict[str, Fields]:
        """The rows of contenders by name: each is checked once, then those whose numbers are right take turns."""
        contenders: list[Contender] = []
        by_name: dict[str, Fields] = {}
        for contender, source in listed:
            if contender.name not in by_name:
                row = by_name[contender.name] = self._about(layer, pass_, subject, contender, source)
                row |= self._checked(layer, pass_, subject, contender)
                if not row.get("note"):
                    contenders.append(contender)
        try:
            times = subject.race(pass_, contenders, ROUNDS) if contenders else {}
        except DeviceLost:
            raise
        except Exception as error:
            for contender in contenders:
                by_name[contender.name]["note"] = failure(error)
            times = {}
        for name, taken_us in times.items():
            row, ordered = by_name[name], sorted(taken_us)
            p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
            row |= timing_fields(layer.problem, pass_, row["floor_us"], p50, p20, p80)
        subject.forget(pass_)
        return by_name

    def _about(self, layer: Layer, pass_: str, subject: Subject, contender: Contender, source: str) -> Fields:
        dtype = layer.problem.dtype
        row = row_with_floors(layer, pass_, contender.provider, self._limits[dtype].of(self._lab.target, dtype))
        return row | {"source": source, "config": contender.config, "err_on": subject.checked_on(pass_)}

    def _checked(self, layer: Layer, pass_: str, subject: Subject, contender: Contender) -> Fields:
        """A row's fields of errors and resources, and a note if it is not to be timed."""
        if self._compiler is not None and contender.ours:  # in Triton's cache, or to fail again below
            self._compiler.answer(contender.job(layer.problem, pass_, self._lab.target))
        checked = tried(subject, pass_, contender)
        used = subject.used(pass_, contender) if contender.ours and not checked.failed else {}
        return {"max_rel_err": checked.error, "err_bound": checked.bound, **used, "note": checked.fault}


def contender(problem: ConvProblem, plan: dispatch.PassPlan) -> Contender:
    """What a plan takes, as one that runs."""
    if plan.algorithm == "torch":
        return same_layout(problem)
    return Contender(plan.algorithm, plan.config, plan.time_us)


# --- Modelled --------------------------------------------------------------------------------------------------------


def count_modelled(layers: list[Layer], target: Target) -> int:
    """How many rows `modelled` yields."""
    return 2 + sum(len(names) + 2 for layer in layers for _, names in reported(layer.problem, target))


def modelled(layers: list[Layer], target: Target) -> Generator[Fields, None, None]:
    """The target's assumed limits; then, for each layer and pass, each algorithm, F.conv2d's prior, and what "auto"
    would take: times modelled, resources counted in the compiled code, errors as interpreted.
    """
    dtype = layers[0].problem.dtype
    yield from limit_rows(Limits(target.copy_gbps, target.matrix_rate(dtype)), dtype, target.source)
    with Workers("groupconv.compiling.interpreter", interpret=True) as interpreter, Compiler(1) as compiler:
        pending: list[tuple[Fields, tuple[Job, Future[Fields] | None] | None]] = []
        for layer in layers:
            for pass_, names in reported(layer.problem, target):
                for name in names:
                    row, job = _modelled(layer, pass_, name, target)
                    compiler.submit(job)
                    checked = None
                    if interpretable(name):
                        small = dataclasses.replace(job, problem=shrunk(layer.problem))
                        row["err_on"] = f"interpreter {small.problem}"
                        checked = interpreter.submit(dataclasses.asdict(small))
                    pending.append((row, (job, checked)))
                pending += [(_prior(layer, pass_, target), None), (_auto(layer, pass_, target), None)]
        for row, tried in pending:
            if tried is not None:
                job, interpreted = tried
                row |= _outcome(compiler.answer(job), interpreted.result() if interpreted else None)
            yield row


def _modelled(layer: Layer, pass_: str, name: str, target: Target) -> tuple[Fields, Job]:
    """An algorithm's row but for its numbers and its code, and what compiles it."""
    problem = layer.problem
    _, config, estimate = dispatch.modelled(problem, pass_, target, name)
    row = row_with_floors(layer, pass_, name, target)
    row |= timing_fields(problem, pass_, row["floor_us"], estimate.time_us)
    row |= {"source": "modelled", "config": config, "bound": estimate.bound}
    row |= {"compiled_for": target.arch_name}
    return row, Job(name, pass_, config, problem, target.arch_name)


def _prior(layer: Layer, pass_: str, target: Target) -> Fields:
    """F.conv2d, by its prior over the floor: what "auto" goes by where nobody measured."""
    row = row_with_floors(layer, pass_, PRIOR, target)
    time_us = cost.torch_prior_us(layer.problem, pass_, target)
    return {**row, "source": "prior", **timing_fields(layer.problem, pass_, row["floor_us"], time_us)}


def _auto(layer: Layer, pass_: str, target: Target) -> Fields:
    """What dispatch would choose, measurements that are shipped among its reasons, and what the model has for that."""
    row = row_with_floors(layer, pass_, "auto", target)
    plan = taken(layer.problem, pass_, target)
    if plan is None:
        return {**row, "note": TWO_KERNELS}
    if plan.config is None:
        takes = "F.conv2d (prior)" if plan.source == "modelled" else f"F.conv2d ({plan.source})"
        time_us = cost.torch_prior_us(layer.problem, pass_, target)
    else:
        takes = plan.algorithm
        asked = tiling(takes, layer.problem, pass_, plan.config, target)
        time_us = cost.estimate(layer.problem, cost.kernel(takes, pass_), asked, target).time_us
    row |= timing_fields(layer.problem, pass_, row["floor_us"], time_us)
    return {**row, "source": plan.source, "config": plan.config, "note": f"takes {takes}"}


def _outcome(compiled: Compiled, interpreted: Fields | None) -> Fields:
    """A row's fields of what was compiled and, if it can be, interpreted, with a note of what is wrong with it."""
    notes = []
    fields: Fields = {**compiled.kernels[0].fields()} if compiled.kernels else {}
    if interpreted is not None and "failed" in interpreted:
        notes.append(f"not interpreted: {interpreted['failed']}")
    elif interpreted is not None:
        checked = Checked(interpreted["error"], interpreted["bound"])
        fields |= {"max_rel_err": checked.error, "err_bound": checked.bound}
        notes.append(checked.fault)
    if compiled.failed:
        notes.append(f"not compiled: {compiled.failed}")
    return fields | {"note": "; ".join(filter(None, notes))}


@dataclasses.dataclass(frozen=True)
class Served:
    """What the model takes of ours for a pass of a layer."""

    width: str
    pass_: str
    algorithm: str
    over_floor: float  # its time over the floor


def served(layers: list[Layer], target: Target) -> list[Served]:
    """What the model takes of ours for each pass of layers, as far as an algorithm can serve it."""
    best = []
    for problem, pass_ in itertools.product((layer.problem for layer in layers), PASSES):
        names = able(problem, pass_, target)
        if names:
            name, _, estimate = dispatch.best(problem, pass_, target, names)
            over_floor = estimate.time_us / cost.floor_us(problem, pass_, target)
            best.append(Served(cost.width_class(problem), pass_, name, over_floor))
    return best


@dataclasses.dataclass(frozen=True)
class Chain:
    """A layer's convolution with all that may follow it: by how many kernels of ours, and what they move."""

    width: str
    alone: bool  # one kernel of ours computes it all
    megabytes: dict[str, float]  # by what follows, in inference and in training, and in functions apart


def chains(layers: list[Layer], target: Target) -> list[Chain]:
    """What follows the convolutions of layers, where the model takes a kernel of ours for them."""
    found = []
    for problem in (layer.problem for layer in layers):
        names = able(problem, "fprop", target)
        if not names:
            continue
        plan = dispatch.plan_pass(problem, "fprop", target, "triton")
        alone = dispatch.finished(command.ended(problem), plan, target)[0] is not None
        megabytes: dict[str, float] = {}
        for name, extra in CHAINS.items():
            this = dataclasses.replace(problem, **extra)
            megabytes |= {name: this.ended_bytes(apart=False), f"{name}, apart": this.ended_bytes(apart=True)}
        passes = sum(problem.min_bytes(pass_) for pass_ in PASSES)
        y = problem.out_pixels * problem.c_out * problem.element_bytes
        moved = {NORMED: batch_norm.MOVED, f"{NORMED}, apart": batch_norm.MOVED_BY_TORCH}
        megabytes |= {name: passes + count * y for name, count in moved.items()}
        found.append(Chain(cost.width_class(problem), alone, {name: n / 1e6 for name, n in megabytes.items()}))
    return found
