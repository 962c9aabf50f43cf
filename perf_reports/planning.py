"""How long planning takes: all passes of each layer of the suite, as a call with a new shape plans them.

python -m groupconv.perf_reports.planning --targets h100 a100
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from groupconv import cost, devices, dispatch
from groupconv.problem import LAYOUTS

from . import layers

TARGETS = ("h100", "a100", "mi300x")
WORST = 5  # layers that are named


def planned(target: devices.Target, dtype: str) -> list[tuple[float, int, str]]:
    """(milliseconds of CPU time, estimates, layer and layout), the longest first."""
    rows, estimates, estimate = [], itertools.count(), cost.estimate

    def counting(*args: Any) -> cost.Estimate:
        next(estimates)
        return estimate(*args)

    gc.collect()
    gc.disable()  # as timeit does: the heap that it walks through is PyTorch's
    with mock.patch.object(cost, "estimate", counting):
        for layout in LAYOUTS:
            for layer in layers.suite(dtype, layout):
                before, began = next(estimates), time.process_time()
                plan = dispatch.plan(layer.problem, target)
                _ = plan.fprop, plan.backward, plan.dgrad, plan.wgrad
                taken = (time.process_time() - began) * 1e3
                rows.append((taken, next(estimates) - before - 1, f"{layer.name} {layout}"))
    gc.enable()
    return sorted(rows, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="GPUs to plan for (%(default)s)")
    parser.add_argument("--dtype", default="bf16")
    args = parser.parse_args()
    table = Table(title=f"CPU time of planning a new shape, {args.dtype}, milliseconds", title_justify="left")
    for heading in ("GPU", "layers", "median", "worst", "estimates: median", "most", "longest"):
        table.add_column(heading, justify="left" if heading in ("GPU", "longest") else "right")
    for name in args.targets:
        target = devices.named(name)
        rows = planned(target, args.dtype)
        longest = ", ".join(f"{layer} {ms:.0f}" for ms, _, layer in rows[:WORST])
        estimates = [count for _, count, _ in rows]
        table.add_row(
            target.slug, str(len(rows)), f"{statistics.median(ms for ms, _, _ in rows):.1f}", f"{rows[0][0]:.1f}",
            f"{statistics.median(estimates):.0f}", str(max(estimates)), longest,
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
