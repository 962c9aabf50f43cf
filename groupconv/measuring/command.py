"""`groupconv tune`: a device's configurations, measured beside F.conv2d on the layers that are asked for."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses

import torch
import triton

from .. import configs, devices, workers
from ..common import Layer, files, grouped, progress
from ..common.progress import Deadline
from ..compiling.compiler import Compiler
from . import contenders, results, share, stub
from .journal import Journal
from .lab import DeviceLost, Lab, this_gpu
from .search import Result, Search, Task, tasks
from .summary import print_summary


def run(args: argparse.Namespace, layers: list[Layer]) -> int:
    """Tune for layers; ValueError for arguments that make no run, before any work."""
    deadline = Deadline(args.budget_seconds)
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs: {args.jobs} is not a positive number")
    if args.stub and args.out is None:
        raise ValueError("--stub: its times are pretended, so it needs --out, a folder that no call reads")
    if args.target is not None and not (args.stub or args.compile_only):
        raise ValueError(f"--target: {args.target} is for --compile-only and --stub; a run measures the GPU it is on")
    target = devices.named(args.target or devices.DEFAULT.slug)
    if not (args.stub or args.compile_only or torch.cuda.is_available()):
        raise ValueError("there is no GPU here; --compile-only and --stub need none")
    status = None if args.stub else workers.rerun_compiling(args.argv)
    if status is not None:
        return status
    if args.compile_only:
        return _compile_only(tasks(layers, target), target, deadline, args.jobs)
    with share.joined() as mine:
        lab = stub.StubLab(target) if args.stub else this_gpu()
        return _tune(layers, lab, mine, deadline, args)


def _tune(layers: list[Layer], lab: Lab, mine: share.Share, deadline: Deadline, args: argparse.Namespace) -> int:
    folder = args.out or configs.user_folder()
    if folder is None:
        raise ValueError("--out: there is no home with a configuration folder here, so it must name one")
    slug = devices.slugify(lab.name)
    todo = _part(tasks(layers, lab.target), mine)
    journal_path = folder / (f"{slug}.jsonl" if mine.count == 1 else f"{slug}.rank{mine.rank}.jsonl")
    unfinished: dict[str, str] = {}
    ended = ""
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(Journal(journal_path, measured_with(lab)))
        compiler = None if args.stub else stack.enter_context(Compiler(workers.processes(args.jobs)))
        step = stack.enter_context(progress.shown("tune", "passes", len(todo))) if mine.rank == 0 else None

        def on_result(task: Task, result: Result | None, note: str) -> None:
            if step is not None:
                step(task.layer)
            if result is None:
                unfinished[f"{task.layer}: {task}"] = note

        search = Search(lab, journal, compiler, deadline, on_result)
        try:
            search.run(todo)
        except KeyboardInterrupt:
            ended = "interrupted"
        except DeviceLost as error:
            ended = f"the GPU was lost: {error}; run the command again to go on without what lost it"

    gathered = mine.gathered((lab.name, search.results, unfinished, ended))
    if gathered is not None:
        names = {name for name, *_ in gathered}
        if len(names) > 1:
            raise ValueError(f"the processes of a job must tune one kind of GPU, not {', '.join(sorted(names))}")
        finished = [result for _, part, _, _ in gathered for result in part]
        missing = {task: why for _, _, part, _ in gathered for task, why in part.items()}
        path = folder / f"{slug}.json"
        if finished:
            results.write(path, lab.name, lab.kind, tuned_with(), finished, lab.target)
        print_summary(finished, missing, path if finished else None, [why for *_, why in gathered if why])
    if ended == "interrupted":
        raise KeyboardInterrupt
    return 1 if ended else 0


def _part(todo: list[Task], mine: share.Share) -> list[Task]:
    """This process's tasks. Those of one layer stay together, whatever their dtype: one learns from the other."""
    by_layer = grouped(todo, lambda task: dataclasses.replace(task.problem, dtype="bf16"))
    kept = {task for group in mine.of(list(by_layer.values())) for task in group}
    return [task for task in todo if task in kept]


def measured_with(lab: Lab) -> dict[str, object]:
    """What a measurement depends on: a journal's lines hold for equal ones."""
    return {
        "device": lab.name, "target": lab.target.slug, "torch": torch.__version__, "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(), "kernels_sha256": configs.kernels_sha256(), "names": contenders.NAMES,
    }  # fmt: skip


def tuned_with() -> dict[str, str]:
    """For a file's reader: versions, commit and time."""
    environment = files.environment("measured", "")
    names = "torch", "triton", "cudnn", "driver", "commit"
    return {**{name: environment[name] for name in names}, "utc": files.utc_now()}


def _compile_only(todo: list[Task], target: devices.Target, deadline: Deadline, jobs: int | None) -> int:
    """A table of what compiles, and why the rest would not be timed."""
    from rich.table import Table

    table = Table(title=f"Worth timing on {target.slug} ({target.arch_name}), as modelled and compiled")
    for name in ("layer", "pass", "contender", "modelled us", "registers", "shared", "left out because"):
        table.add_column(name, no_wrap=name != "left out because")
    kept = left = 0
    every = [
        (task, contender, contender.job(task.problem, task.pass_, target))
        for task in todo
        for contender in contenders.ours(task.problem, task.pass_, target)
    ]
    with Compiler(workers.processes(jobs)) as compiler, progress.shown("tune", "configurations", len(every)) as step:
        for _, _, job in every:
            compiler.submit(job)
        for task, contender, job in every:
            try:
                compiled = compiler.answer(job, deadline.left)
            except TimeoutError:
                break
            step(task.layer)
            faults = compiled.faults(target)
            kept, left = kept + (not faults), left + bool(faults)
            used = compiled.kernels[0].fields() if compiled.kernels else {}
            counted = (str(used.get(name, "-")) for name in ("registers", "shared_bytes"))
            line = task.layer, task.pass_, contender.name, f"{contender.modelled_us:.1f}"
            table.add_row(*line, *counted, "; ".join(faults))
    console = progress.console()
    console.print(table)
    console.print(f"{kept} configurations of {len(todo)} passes are worth timing, {left} are left out")
    if kept + left < len(every):
        console.print(f"The time budget ended after {kept + left} of {len(every)} configurations.", style="red")
    return 0
