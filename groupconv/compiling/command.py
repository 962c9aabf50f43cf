"""`groupconv compile`: what the compiler makes of the kernels for GPUs that are not here; a table."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from .. import configs, devices, dispatch
from ..algorithms import GENERAL, REGISTRY, able, divided, lack, tiling
from ..common import Layer, progress
from ..problem import LAYOUTS, PLANNED, ConvProblem
from . import workers
from .compiler import Compiled, Compiler, Job, compiled
from .resources import Resources

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

    console = Console(width=None if sys.stdout.isatty() else 160)
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
    for target in targets:
        arch = devices.named(target).arch_name
        for default in configs.modelled_defaults():
            if only_pass not in (None, default.pass_):
                continue
            for dtype in ("fp16", "bf16") if default.element_bytes == 2 else ("fp32", "tf32", "bf16x3"):
                if only_dtype not in (None, dtype):
                    continue
                for layout in LAYOUTS:
                    problem = _problem(default, dtype, layout)
                    if configs.modelled(default.algorithm, problem, default.pass_, arch) == default:
                        name, pass_ = default.algorithm, default.pass_
                        config = divided(name, problem, pass_, default.config, devices.named(target))[0]
                        jobs.append(Job(name, pass_, config, problem, target))
    return jobs


def planned(targets: list[str], problems: list[ConvProblem], only_pass: str | None = None) -> list[Job]:
    """What the plans of problems take of ours, where no configuration is shipped and the model chooses."""
    jobs = []
    for target in targets:
        on = devices.named(target)
        for problem in problems:
            for pass_ in PLANNED if only_pass is None else (only_pass,):
                names = able(problem, pass_, on)
                if not names and pass_ != "backward":  # run() says why
                    jobs.append(Job(GENERAL, pass_, {}, problem, target))
                elif names:
                    name, config, _ = dispatch.best(problem, pass_, on, names)
                    if configs.modelled(name, problem, pass_, on.arch_name) is None:
                        jobs.append(Job(name, pass_, config, problem, target))
    return jobs


def _problem(default: configs.ModelledDefault, dtype: str, layout: str) -> ConvProblem:
    """A 3x3 layer whose GEMM N is the largest that the default is for."""
    width = max(1, default.most_n // 8 * 8 if default.most_n >= 8 else default.most_n)
    pad = (1, 1, 1, 1)
    return ConvProblem(
        32, 4 * width, 28, 28, 4 * width, 3, 3, (1, 1), pad, (1, 1), 4, dtype, layout, layout, bias=False
    )


def run_parallel(jobs: list[Job], on_done: Callable[[Outcome], None], processes: int | None = None) -> list[Outcome]:
    """`judged` jobs, compiled in other processes, calling `on_done(outcome)` after each; outcomes in their order."""
    outcomes = []
    lacks = {repr(job): _lack(job) for job in jobs}
    with Compiler(processes or os.cpu_count() or 1) as compiler:
        for job in jobs:
            if lacks[repr(job)] is None:
                compiler.submit(job)
        for job in jobs:
            lack = lacks[repr(job)]
            outcome = judged(job, compiler.answer(job)) if lack is None else Outcome(job, excluded=lack)
            outcomes.append(outcome)
            on_done(outcome)
    return outcomes


def run_here(job: Job) -> Outcome:
    """`run_parallel` of one job, compiled in this process."""
    lack = _lack(job)
    return judged(job, compiled(job)) if lack is None else Outcome(job, excluded=lack)


def judged(job: Job, found: Compiled) -> Outcome:
    """What compiled code takes and what is wrong with it; also that it lacks the matrix instructions that it is for."""
    target, faults = devices.named(job.target), found.faults(devices.named(job.target))
    if not found.kernels:
        return Outcome(job, faults=faults)
    used = found.kernels[0]
    by_matrix = tiling(job.algorithm, job.problem, job.pass_, job.config, target).matrix_flops > 0
    if job.problem.dtype in ("fp16", "bf16") and by_matrix and not used.matrix_count:
        faults += ("no matrix instructions",)
    return Outcome(job, used, faults)


def _lack(job: Job) -> str | None:
    return lack(job.algorithm, job.problem, job.pass_, devices.named(job.target))
