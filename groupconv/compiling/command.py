"""`groupconv compile`: what the compiler makes of the kernels for GPUs that are not here; a table."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import os
from collections.abc import Callable

from rich.table import Table

from .. import devices, dispatch, workers
from ..algorithms import GENERAL, REGISTRY, able, lack, tiling
from ..common import Layer, progress
from ..problem import ELEMENT_BYTES, FINISHED, LAYOUTS, PASSES, PLANNED, ConvProblem
from .compiler import Compiled, Compiler, Job, compiled
from .resources import Resources

WIDTHS = (8, 16, 32, 64, 128)  # of groups
TITLE = "Configurations, counted in the code as it is compiled: nothing ran"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a job: the resources of its main kernel, and the faults that fail it."""

    job: Job
    resources: Resources | None = None
    faults: tuple[str, ...] = ()
    excluded: str | None = None


def run(args: argparse.Namespace, layers: list[Layer]) -> int:
    """Compile what is planned for all widths of groups, and for layers; ValueError for bad arguments."""
    if args.algorithm not in (None, *REGISTRY):
        raise ValueError(f"--algorithm: {args.algorithm!r} is not one of {', '.join(REGISTRY)}")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs: {args.jobs} is not a positive number")
    targets = [devices.named(target).arch_name for target in args.targets or devices.BY_ARCH]
    status = workers.rerun_compiling(args.argv)
    if status is not None:
        return status

    problems = [layer.problem for layer in layers if args.dtype in (None, layer.problem.dtype)]
    jobs = general(targets, args.pass_, args.dtype) + planned(targets, problems, args.pass_)
    jobs = [job for job in jobs if args.algorithm in (None, job.algorithm)]
    with progress.shown("compile", "configurations", len(jobs)) as step:
        outcomes = run_parallel(jobs, lambda outcome: step(f"compiling {outcome.job.target}"), args.jobs)

    console = progress.console()
    table = Table(title=TITLE)
    for name in ("target", "configuration", "dtype", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("registers", "spills", "shared", "matrix", "loads (16 B)", "stores (16 B)"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        used, problem = outcome.resources, outcome.job.problem
        row = [outcome.job.target, str(outcome.job), problem.dtype, problem.layout]
        if used is not None:
            row += [str(value) or "-" for value in used.fields().values()]
            row += [f"{used.loads} ({used.wide_loads})", f"{used.stores} ({used.wide_stores})"]
        table.add_row(*row, style="red" if outcome.faults else None)
    console.print(table)

    excluded = collections.Counter((o.job.target, o.job.problem.dtype, o.excluded) for o in outcomes if o.excluded)
    for (target, dtype, reason), count in excluded.items():
        console.print(f"excluded: {count} {dtype} configurations on {target}: {reason}")
    failed = [outcome for outcome in outcomes if outcome.faults]
    for outcome in failed:
        job = outcome.job
        what = f"{job.target} {job} {job.problem.dtype} {job.problem.layout}"
        console.print(f"fault: {what}: {'; '.join(outcome.faults)}", style="red", markup=False)
    count = len(outcomes) - sum(excluded.values())
    console.print(f"{count} configurations compiled, {len(failed)} with faults, {sum(excluded.values())} excluded")
    return 1 if failed else 0


def widths(dtype: str, layout: str) -> list[ConvProblem]:
    """A problem of every class of group widths."""
    return [
        ConvProblem(32, 4 * width, 28, 28, 4 * width, 3, 3, (1, 1), (1,) * 4, (1, 1), 4, dtype, layout, layout)
        for width in WIDTHS
    ]


def general(targets: list[str], only_pass: str | None = None, only_dtype: str | None = None) -> list[Job]:
    """What the general algorithm takes for these, in every dtype and both layouts."""
    jobs = []
    for name, dtype, layout in itertools.product(targets, ELEMENT_BYTES, LAYOUTS):
        if only_dtype not in (None, dtype) or only_pass == FINISHED:
            continue
        for problem, pass_ in itertools.product(widths(dtype, layout), PASSES if only_pass is None else (only_pass,)):
            serves = lack(GENERAL, problem, pass_, devices.named(name)) is None  # if not, run() says why
            config = dispatch.modelled(problem, pass_, devices.named(name), GENERAL)[1] if serves else {}
            jobs.append(Job(GENERAL, pass_, config, problem, name))
    return jobs


def planned(targets: list[str], problems: list[ConvProblem], only_pass: str | None = None) -> list[Job]:
    """What the model takes of ours for problems, and for fprop of them with all that may follow."""
    jobs = []
    for target_name, problem in itertools.product(targets, problems):
        target = devices.named(target_name)
        for pass_ in (*PLANNED, FINISHED) if only_pass is None else (only_pass,):
            if pass_ == FINISHED:
                jobs += finished(problem, target)
                continue
            names = able(problem, pass_, target)
            if names:
                name, config, _ = dispatch.best(problem, pass_, target, names)
                jobs.append(Job(name, pass_, config, problem, target_name))
            elif pass_ != "backward":  # run() says why
                jobs.append(Job(GENERAL, pass_, {}, problem, target_name))
    return jobs


def ended(problem: ConvProblem) -> ConvProblem:
    """A convolution with what may follow it and takes the most registers."""
    return dataclasses.replace(problem, activation="gelu", residual=True, keeps=True)


def finished(problem: ConvProblem, target: devices.Target) -> list[Job]:
    """What fprop and all that may follow it takes: a job, or none where torch's functions follow."""
    plan = dispatch.plan_pass(problem, "fprop", target)
    config, _ = dispatch.finished(ended(problem), plan, target)
    return [] if config is None else [Job(plan.algorithm, "fprop", config, ended(problem), target.arch_name)]


def run_parallel(jobs: list[Job], on_done: Callable[[Outcome], None], processes: int | None = None) -> list[Outcome]:
    """What comes of jobs that other processes compile, in their order; `on_done(outcome)` is called after each."""
    outcomes = []
    with Compiler(processes or os.cpu_count() or 1) as compiler:
        for job in jobs:
            if _lack(job) is None:
                compiler.submit(job)
        for job in jobs:
            outcomes.append(_outcome(job, compiler.answer))
            on_done(outcomes[-1])
    return outcomes


def run_here(job: Job) -> Outcome:
    """`run_parallel` of one job, compiled in this process."""
    return _outcome(job, compiled)


def _outcome(job: Job, compile: Callable[[Job], Compiled]) -> Outcome:
    lack = _lack(job)
    return judged(job, compile(job)) if lack is None else Outcome(job, excluded=lack)


def _lack(job: Job) -> str | None:
    return lack(job.algorithm, job.problem, job.pass_, devices.named(job.target))


def judged(job: Job, compiled: Compiled) -> Outcome:
    """What compiled code takes and what is wrong with it; also that it lacks the matrix instructions that it is for."""
    target = devices.named(job.target)
    faults = compiled.faults(target)
    if not compiled.kernels:
        return Outcome(job, faults=faults)
    main = compiled.kernels[0]
    for_matrix_unit = tiling(job.algorithm, job.problem, job.pass_, job.config, target).matrix_flops > 0
    if job.problem.dtype in ("fp16", "bf16") and for_matrix_unit and not main.matrix_count:
        faults += ("no matrix instructions",)
    return Outcome(job, main, faults)
