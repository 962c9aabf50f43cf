"""The command line: groupconv compile, report, tune and bench."""

from __future__ import annotations

import argparse
import collections
import sys

from . import __version__, children
from .algorithms import REGISTRY
from .configs import PLANNED


def main(argv: list[str] | None = None) -> int:
    """Run a command; the return value is the exit status."""
    parser = argparse.ArgumentParser(prog="groupconv", description="Grouped 2-D convolution for PyTorch in Triton.")
    parser.add_argument("--version", action="version", version=f"groupconv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    compile_ = commands.add_parser(
        "compile",
        help="compile what is shipped and planned for GPUs that are not here, and check what came out",
        description="Compiles every shipped configuration, and what the plans of the suite's layers take where none is "
        "shipped, as a call would launch it. Exit status 1 if one spills, asks for more shared memory than its target "
        "has, or lacks the matrix instructions that it is for.",
    )
    compile_.add_argument("--targets", nargs="+", metavar="TARGET", help="sm_90, gfx942, ... (default: all known)")
    compile_.add_argument("--pass", dest="pass_", choices=PLANNED, help="only this pass")
    compile_.add_argument("--dtype", choices=("fp16", "bf16", "tf32", "bf16x3", "fp32"), help="only this dtype")
    compile_.add_argument("--algorithm", choices=list(REGISTRY), help="only this algorithm")
    compile_.add_argument("--jobs", type=int, metavar="N", help="worker processes (default: one a core)")
    compile_.set_defaults(run=_compile)

    report = commands.add_parser("report", help="compare a layer across group counts; tables and plots in a folder")
    from .perf_reports import report as report_module

    report_module.add_arguments(report)
    report.set_defaults(run=report_module.run)

    tune = commands.add_parser("tune", help="measure the fastest configurations on this GPU, and plan by them")
    from .tuning import command as tune_module

    tune_module.add_arguments(tune)
    tune.set_defaults(run=tune_module.run)

    bench = commands.add_parser("bench", help="compare with PyTorch's ways, layer by layer and in whole models")
    from .perf_reports import bench as bench_module

    bench_module.add_arguments(bench)
    bench.set_defaults(run=bench_module.run)

    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"groupconv {args.command}: {error}", file=sys.stderr)
        return 2


def _compile(args) -> int:
    status = children.rerun_compiling(args.argv)
    if status is not None:
        return status

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from . import compile_check, devices
    from .perf_reports import layers
    from .problem import ELEMENT_BYTES

    targets = [devices.named(target).arch_name for target in args.targets or devices.BY_ARCH]
    work = compile_check.shipped(targets, args.pass_, args.dtype)
    for dtype in ELEMENT_BYTES if args.dtype is None else (args.dtype,):
        for layout in ("nhwc", "nchw"):
            suite = [layer.problem for layer in layers.suite(dtype, layout)]
            work += compile_check.planned(targets, suite, args.pass_)
    work = [job for job in work if args.algorithm in (None, job.algorithm)]
    console = Console(width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("compiling", total=len(work))

        def done(outcome):
            progress.update(bar, advance=1, description=f"compiling {outcome.job.target}")

        outcomes = compile_check.run_parallel(work, done, args.jobs)

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


if __name__ == "__main__":
    sys.exit(main())
