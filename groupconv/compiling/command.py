"""`groupconv compile`: what the compiler makes of the kernels for GPUs that are not here; a table."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import os
from collections.abc import Callable

from rich.table import Table

from .. import configs, devices, dispatch
from ..algorithms import REGISTRY, able, divided
from ..common import Layer, progress
from ..problem import ELEMENT_BYTES, LAYOUTS, PLANNED, ConvProblem
from . import workers
from .compiler import Compiled, Compiler, Job, compiled
from .resources import Resources

GENERAL = "implicit_gemm"  # which serves every problem that any algorithm does
TITLE = "Configurations, counted in the code as it is compiled: nothing ran"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a job: the resources of its main kernel, and the faults that fail it."""

    job: Job
    resources: Resources | None = None
    faults: tuple[str, ...] = ()
    excluded: str | None = None


def run(args: argparse.Namespace, layers: list[Layer]) -> int:
    """Compile what is shipped, and planned for layers, and judge it; ValueError for arguments that ask for nothing."""
    if args.algorithm not in (None, *REGISTRY):
        raise ValueError(f"--algorithm: {args.algorithm!r} is not one of {', '.join(REGISTRY)}")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs: {args.jobs} is not a positive number")
    targets = [devices.named(target).arch_name for target in args.targets or devices.BY_ARCH]
    status = workers.rerun_compiling(args.argv)
    if status is not None:
        return status

    problems = [layer.problem for layer in layers if args.dtype in (None, layer.problem.dtype)]
    jobs = shipped(targets, args.pass_, args.dtype) + planned(targets, problems, args.pass_)
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


def shipped(targets: list[str], only_pass: str | None = None, only_dtype: str | None = None) -> list[Job]:
    """Every shipped configuration on every target that may take it: both layouts, every dtype of its element size."""
    jobs = []
    for name, default in itertools.product(targets, configs.modelled_defaults()):
        target, algorithm, pass_ = devices.named(name), default.algorithm, default.pass_
        dtypes = [dtype for dtype, size in ELEMENT_BYTES.items() if size == default.element_bytes]
        for dtype, layout in itertools.product(dtypes, LAYOUTS) if only_pass in (None, pass_) else ():
            problem = _problem(default, dtype, layout)
            is_taken = configs.modelled(algorithm, problem, pass_, target.arch_name) == default
            if is_taken and only_dtype in (None, dtype):
                config = divided(algorithm, problem, pass_, default.config, target)[0]
                jobs.append(Job(algorithm, pass_, config, problem, name))
    return jobs


def planned(targets: list[str], problems: list[ConvProblem], only_pass: str | None = None) -> list[Job]:
    """What the plans of problems take of ours, where no configuration is shipped and the model chooses."""
    jobs = []
    for target_name, problem in itertools.product(targets, problems):
        target = devices.named(target_name)
        for pass_ in PLANNED if only_pass is None else (only_pass,):
            names = able(problem, pass_, target)
            if names:
                name, config, _ = dispatch.best(problem, pass_, target, names)
                if configs.modelled(name, problem, pass_, target.arch_name) is None:
                    jobs.append(Job(name, pass_, config, problem, target_name))
            elif pass_ != "backward":  # run() says why
                jobs.append(Job(GENERAL, pass_, {}, problem, target_name))
    return jobs


def _problem(default: configs.ModelledDefault, dtype: str, layout: str) -> ConvProblem:
    """A 3x3 layer whose GEMM N is the largest that the default is for."""
    width = max(1, default.most_n // 8 * 8 if default.most_n >= 8 else default.most_n)
    pad = (1, 1, 1, 1)
    return ConvProblem(
        32, 4 * width, 28, 28, 4 * width, 3, 3, (1, 1), pad, (1, 1), 4, dtype, layout, layout, bias=False
    )


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
    return REGISTRY[job.algorithm].supports(job.problem, job.pass_, devices.named(job.target))


def judged(job: Job, compiled: Compiled) -> Outcome:
    """What compiled code takes and what is wrong with it; also that it lacks the matrix instructions that it is for."""
    target = devices.named(job.target)
    faults = compiled.faults(target)
    if not compiled.kernels:
        return Outcome(job, faults=faults)
    main = compiled.kernels[0]
    for_matrix_unit = REGISTRY[job.algorithm].tiling(job.problem, job.pass_, job.config, target).matrix_flops > 0
    if job.problem.dtype in ("fp16", "bf16") and for_matrix_unit and not main.matrix_count:
        faults += ("no matrix instructions",)
    return Outcome(job, main, faults)
