"""The cost model's weights, from all that was raced on GPUs, and what the model is over and under what was measured.

    python -m groupconv.perf_reports.calibration                     # weights as they are and as fitted, by kernel
    python -m groupconv.perf_reports.calibration --write             # weights.json, and the shipped files' factors
    python -m groupconv.perf_reports.calibration --races JOURNAL ... # add what `groupconv tune` measured to races.csv

autotune_configs/races.csv has a row a configuration that ran in a pass's first race, winners and losers: losers tell
the model what not to take.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
from collections.abc import Iterable, Iterator

import numpy as np
from rich.console import Console
from rich.table import Table

from groupconv import configs, cost, devices
from groupconv.algorithms import REGISTRY, able, possible, tiling
from groupconv.common import Layer, files
from groupconv.devices import Target
from groupconv.measuring import contenders, results, search
from groupconv.problem import ELEMENT_BYTES, LAYOUTS, PLANNED, ConvProblem

from . import layers, registers

FOLDER = registers.FOLDER
RACES, WEIGHTS = FOLDER / "races.csv", FOLDER / "weights.json"
FIELDS = ("device", "triton", "utc", "dtype", "layout", "layer", "pass", "algorithm", "config", "us")
OTHERS = 0.03  # what a race of another kernel of the same class of layers counts, where one's own say too little
STEPS = 8  # of a fit to logarithms by weighted least squares


@dataclasses.dataclass(frozen=True)
class Sample:
    """A configuration that was raced: each resource alone, and its time, in microseconds. task: what it raced in."""

    task: str
    kernel: str
    depthwise: bool
    alone: cost.Parts
    us: float


# --- Races -----------------------------------------------------------------------------------------------------------


@functools.cache
def _suite(dtype: str, layout: str) -> dict[str, Layer]:
    return {layer.name: layer for layer in layers.suite(dtype, layout)}


def races() -> list[files.Row]:
    """The rows of races.csv."""
    return files.read(RACES, FIELDS)


def samples(rows: Iterable[files.Row]) -> Iterator[Sample]:
    """Of races of configurations that still are some: kernels lose forms, and gain fields."""
    for row in rows:
        problem, target = _suite(row["dtype"], row["layout"])[row["layer"]].problem, devices.named(row["device"])
        name, pass_, config = row["algorithm"], row["pass"], json.loads(row["config"])
        if _stands(name, problem, pass_, config, target):
            asked = tiling(name, problem, pass_, config, target)
            task = f"{row['device']} {problem} {pass_}"
            alone = cost.alone(problem, asked, target)
            yield Sample(task, cost.kernel(name, pass_), problem.cin_g == 1, alone, float(row["us"]))


def _stands(name: str, problem: ConvProblem, pass_: str, config: dict[str, int], target: Target) -> bool:
    if name not in able(problem, pass_, target) or set(config) != set(configs.fields(name)):
        return False
    return possible(name, problem, pass_, config, target)


def of_journal(path: pathlib.Path) -> Iterator[dict[str, object]]:
    """Rows of the first races of a journal, of layers of the suite."""
    tasks = {
        str(task): (layer.name, task)
        for dtype, layout in itertools.product(ELEMENT_BYTES, LAYOUTS)
        for layer in _suite(dtype, layout).values()
        for task in search.tasks([layer], devices.DEFAULT)
    }
    head: dict[str, object] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        head = record.get("measured_with", head)
        if record.get("rounds") != search.FIRST_ROUNDS or record["task"] not in tasks:
            continue
        if head.get("names") != contenders.NAMES:
            raise ValueError(f"{path}: an older version's journal, whose configurations are called otherwise")
        layer, task = tasks[record["task"]]
        for name, times in record["times_us"].items():
            algorithm, *sizes = name.split()
            if algorithm in REGISTRY and len(sizes) == len(configs.fields(algorithm)):
                yield {
                    "device": head["device"], "triton": head["triton"], "utc": files.utc_now(),
                    "dtype": task.problem.dtype, "layout": task.problem.layout, "layer": layer, "pass": task.pass_,
                    "algorithm": algorithm, "us": round(statistics.median_high(times), 3),
                    "config": dict(zip(configs.fields(algorithm), map(int, sizes), strict=True)),
                }  # fmt: skip


def add(paths: Iterable[pathlib.Path]) -> None:
    """Races of journals, in place of earlier ones of the same configurations."""

    def key(row: dict) -> tuple[str, ...]:
        config = row["config"] if isinstance(row["config"], str) else json.dumps(row["config"], sort_keys=True)
        return (*(str(row[field]) for field in FIELDS[:2] + FIELDS[3:8]), config)

    rows: dict[tuple[str, ...], dict] = {key(row): row for row in races()} if RACES.exists() else {}
    rows |= {key(row): row for path in paths for row in of_journal(path)}
    with files.whole(RACES) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "config": key(row)[-1]} for _, row in sorted(rows.items()))


# --- Weights ---------------------------------------------------------------------------------------------------------


def fitted(found: list[Sample], kernel: str) -> cost.Parts:
    """The weights whose sums are nearest to the times of a kernel, or ANY, by squares of logarithms; none negative."""
    own = [sample for sample in found if kernel in (sample.kernel, cost.ANY)]
    others = [
        sample for sample in found if kernel not in (sample.kernel, cost.ANY) and sample.depthwise == own[0].depthwise
    ]
    parts = np.array([sample.alone for sample in own + others])
    us = np.array([sample.us for sample in own + others])
    counts = np.sqrt(np.array([1.0] * len(own) + [OTHERS] * len(others)))
    weights = _least_squares(parts / us[:, None] * counts[:, None], counts)
    for _ in range(STEPS):  # until squares of differences are those of logarithms
        ratios = np.maximum(parts @ weights, 1e-9) / us
        slopes = np.clip(np.abs(np.log(ratios)) / np.maximum(np.abs(1 - ratios), 1e-6), 0.05, 20.0)
        weights = _least_squares(parts / us[:, None] * (counts * slopes)[:, None], counts * slopes)
    # The others shape a kernel's weights, but not its scale.
    scale = np.median(us[: len(own)] / (parts[: len(own)] @ weights))
    return cost.Parts(*(round(float(weight), 4) for weight in scale * weights))


def fits(found: list[Sample]) -> dict[str, cost.Parts]:
    """`fitted` of each kernel that was raced, and of all together."""
    return {kernel: fitted(found, kernel) for kernel in (*sorted({sample.kernel for sample in found}), cost.ANY)}


def _least_squares(parts: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """`registers.least_squares` of as many rows as there are parts: those that have the same solution."""
    basis, rows = np.linalg.qr(parts)
    return registers.least_squares(rows, basis.T @ taken)


def modelled(found: list[Sample], weights: dict[str, cost.Parts]) -> list[float]:
    """What weights make of samples, in microseconds."""
    return [float(np.dot(weights.get(sample.kernel) or weights[cost.ANY], sample.alone)) for sample in found]


def losses(found: list[Sample], model: list[float]) -> list[float]:
    """Of each task that several configurations raced in: the time of the one that a model prefers, over the best."""
    by_task: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for sample, us in zip(found, model, strict=True):
        by_task[sample.task].append((us, sample.us))
    return [min(of)[1] / min(us for _, us in of) for of in by_task.values() if len(of) > 1]


def spread(ratios: Iterable[float]) -> float:
    """The standard deviation of logarithms."""
    return float(np.std(np.log(list(ratios))))


def compared(found: list[Sample], fit: dict[str, cost.Parts]) -> Table:
    """A row a kernel: its weights as fitted, and how far measured over modelled times lie apart, before and after."""
    table = Table(title="Weights as fitted; measured over modelled times", title_justify="left")
    for heading in ("kernel", "raced", *cost.Parts._fields, "median", "spread", "spread before"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for kernel, weights in fit.items():
        own = [sample for sample in found if kernel in (sample.kernel, cost.ANY)]
        after, before = (
            [sample.us / us for sample, us in zip(own, modelled(own, {kernel: by, cost.ANY: by}), strict=True)]
            for by in (weights, cost.weights().get(kernel, weights))
        )
        told = f"{statistics.median(after):.2f}", f"{spread(after):.2f}", f"{spread(before):.2f}"
        table.add_row(kernel, str(len(own)), *(f"{weight:.2f}" for weight in weights), *told)
    return table


# --- Factors of a device's file --------------------------------------------------------------------------------------


def factors(file: configs.DeviceFile) -> dict[str, float]:
    """Medians of measured over modelled time, by algorithm and pass, of the entries that layers of the suite have."""
    target, by_name, seen = devices.named(file.device), collections.defaultdict(list), set()
    for dtype, layout in itertools.product(ELEMENT_BYTES, LAYOUTS):
        for layer, pass_ in itertools.product(_suite(dtype, layout).values(), PLANNED):
            entry, tier = file.lookup(layer.problem, pass_) or (None, "")
            if entry is None or tier != "exact" or entry.algorithm not in REGISTRY or id(entry) in seen:
                continue
            seen.add(id(entry))
            asked = tiling(entry.algorithm, layer.problem, pass_, entry.config, target)
            us = cost.estimate(layer.problem, cost.kernel(entry.algorithm, pass_), asked, target).time_us
            by_name[f"{entry.algorithm} {pass_}"].append(entry.time_us / us)
    return results.medians(by_name)


def rewrite(path: pathlib.Path, ours: dict[str, float]) -> None:
    """Put factors of ours into a file, which else stays as it is."""
    data = json.loads(path.read_text(encoding="utf-8"))
    entries = data.pop("entries")
    data["calibration"]["ours"] = ours
    results.save(path, data, entries)


def device_files() -> list[pathlib.Path]:
    """Those of measurements, of the checkout."""
    return [path for path in sorted(FOLDER.glob("*.json")) if path.name not in ("registers.json", WEIGHTS.name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--races", type=pathlib.Path, nargs="+", default=(), metavar="JOURNAL")
    parser.add_argument("--write", action="store_true", help="weights.json, and the factors of the shipped files")
    args = parser.parse_args()
    if args.races:
        add(args.races)
    found = list(samples(races()))
    fit = fits(found)
    console = Console(width=160)
    console.print(compared(found, fit))
    lost = losses(found, modelled(found, fit))
    console.print(
        f"what it prefers takes {statistics.geometric_mean(lost):.3f} times the best, at worst {max(lost):.2f}"
    )
    if args.write:
        told = {kernel: weights._asdict() for kernel, weights in fit.items()}
        text = json.dumps(
            {"fitted_by": "python -m groupconv.perf_reports.calibration --write", "weights": told}, indent=1
        )
        files.write_atomically(WEIGHTS, f"{text}\n")
        cost.weights.cache_clear()
        for path in device_files():
            rewrite(path, factors(configs.parse_device(path.read_text("utf-8"), path.name)))


if __name__ == "__main__":
    main()
