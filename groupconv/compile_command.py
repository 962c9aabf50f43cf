"""`groupconv compile`: what the compiler makes of the kernels for GPUs that are not here; a table."""

from __future__ import annotations

import argparse
import collections
import sys

from rich.console import Console
from rich.table import Table

from . import children, compile_check, devices, progress
from .algorithms import REGISTRY
from .perf_reports import layers
from .problem import ELEMENT_BYTES, LAYOUTS


def run(args: argparse.Namespace) -> int:
    """Compile and judge; ValueError for arguments that ask for nothing, before any work."""
    if args.algorithm not in (None, *REGISTRY):
        raise ValueError(f"--algorithm: {args.algorithm!r} is not one of {', '.join(REGISTRY)}")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs: {args.jobs} is not a positive number")
    targets = [devices.named(target).arch_name for target in args.targets or devices.BY_ARCH]
    status = children.rerun_compiling(args.argv)
    if status is not None:
        return status

    work = compile_check.shipped(targets, args.pass_, args.dtype)
    for dtype in ELEMENT_BYTES if args.dtype is None else (args.dtype,):
        for layout in LAYOUTS:
            suite = [layer.problem for layer in layers.suite(dtype, layout)]
            work += compile_check.planned(targets, suite, args.pass_)
    work = [job for job in work if args.algorithm in (None, job.algorithm)]
    with progress.shown("compile", "configurations", len(work)) as step:
        outcomes = compile_check.run_parallel(work, lambda outcome: step(f"compiling {outcome.job.target}"), args.jobs)

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title="Configurations, compiled")
    for name in ("target", "configuration", "dtype", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("registers", "spills", "shared", "matrix", "loads (16 B)", "stores (16 B)"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        used, problem = outcome.resources, outcome.job.problem
        row = [outcome.job.target, str(outcome.job), problem.dtype, problem.layout]
        if used is not None:
            row += [str(used.registers), str(used.spill_bytes), str(used.shared_bytes)]
            row += [f"{used.matrix} {used.matrix_count}" if used.matrix else "-"]
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
    compiled = len(outcomes) - sum(excluded.values())
    console.print(f"{compiled} configurations compiled, {len(failed)} with faults, {sum(excluded.values())} excluded")
    return 1 if failed else 0
