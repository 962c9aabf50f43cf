"""What a tuning run says at its end: speedups by class, what failed, and how good the model was."""

from __future__ import annotations

import pathlib
import statistics

from rich.table import Table

from .. import cost
from ..common import grouped, progress
from .results import model_correlations
from .search import OUT_OF_TIME, Result
from .stub import NAME as STUB

MOST_LISTED = 40


def print_summary(results: list[Result], missing: dict[str, str], path: pathlib.Path | None, ended: list[str]) -> None:
    """Print it. path: the file that was written. ended: why processes ended early."""
    console = progress.console()
    pretended = path is not None and path.stem == STUB
    if results:
        console.print(speedups(results, pretended))
        console.print(correlations(results, pretended))
    for line in faults(results, missing):
        console.print(line, style="red", markup=False, highlight=False)
    late = sum(why == OUT_OF_TIME for why in missing.values())
    if late:
        console.print(f"The time budget ended with {late} passes to go; the same command goes on with them.")
    for why in ended:
        console.print(why, style="red", markup=False)
    if path is not None:
        console.print(f"{len(results)} passes tuned; {path}", markup=False, highlight=False, soft_wrap=True)


def speedups(results: list[Result], pretended: bool) -> Table:
    """Geometric means of F.conv2d's time over ours, by width class, pass, dtype and layout."""
    title = "Stub clock: not measurements" if pretended else "Time of PyTorch over ours, geometric means"
    table = Table(title=title)
    for name in ("width", "pass", "dtype", "layout"):
        table.add_column(name)
    for name in ("passes", "over F.conv2d", "over the best of PyTorch", "ours is faster"):
        table.add_column(name, justify="right")

    def class_of(result: Result) -> tuple[str, str, str, str]:
        problem = result.task.problem
        return cost.width_class(problem), result.task.pass_, problem.dtype, problem.layout

    for names, of_class in grouped(results, class_of).items():
        same = [r.torch_us / r.time_us for r in of_class if r.torch_us is not None and r.time_us is not None]
        best = [r.best_torch_us / r.time_us for r in of_class if r.best_torch_us is not None and r.time_us is not None]
        table.add_row(*names, str(len(of_class)), _mean(same), _mean(best), str(sum(ratio > 1 for ratio in same)))
    return table


def _mean(ratios: list[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f}" if ratios else "-"


def correlations(results: list[Result], pretended: bool) -> Table:
    """How the model's order of times agrees with the measured one."""
    title = f"Rank correlation of modelled and {'pretended' if pretended else 'measured'} times"
    table = Table(title=title)
    table.add_column("algorithm")
    for name in ("across problems", "within a problem, mean"):
        table.add_column(name, justify="right")
    for algorithm, figures in model_correlations(results).items():
        table.add_row(algorithm, *("-" if figure is None else f"{figure:.2f}" for figure in figures))
    return table


def faults(results: list[Result], missing: dict[str, str]) -> list[str]:
    """A line for every configuration that failed or computed wrong numbers, and for every pass without a result."""
    lines = [f"{task}: {why}" for task, why in missing.items() if why != OUT_OF_TIME]
    for result in results:
        for name, why in result.dropped:
            if why.startswith(("wrong:", "failed:", "lost", "not compiled:")):
                lines.append(f"{result.task.layer} {result.task.pass_}, {name}: {why}")
    more = len(lines) - MOST_LISTED
    return lines if more <= 0 else [*lines[:MOST_LISTED], f"... and {more} more; the journal has them all"]
