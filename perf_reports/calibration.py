"""How the cost model compares with what was measured, and how the shares of its resources follow from that.

    python -m groupconv.perf_reports.calibration            # cost.WEIGHTS, as they are and as fitted
    python -m groupconv.perf_reports.calibration --write    # and the shipped files' factors, by the model as it is

Of the layers of the suite that a shipped configuration file has measured: the configuration that was fastest, its time
without launches, and what the model says of it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import pathlib
import statistics
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table

from groupconv import configs, cost, devices
from groupconv.algorithms import REGISTRY, tiling
from groupconv.measuring import results
from groupconv.problem import ELEMENT_BYTES, LAYOUTS, PLANNED

from . import layers, registers

FOLDER = registers.FOLDER


@dataclasses.dataclass(frozen=True)
class Sample:
    """A measured pass, in microseconds: each resource alone, measured and modelled without launches, and launches."""

    algorithm: str
    pass_: str
    work: str
    alone: cost.Weights
    measured_us: float
    modelled_us: float
    launch_us: float

    @property
    def factor(self) -> float:
        """Measured over modelled time, launches and all, as configuration files have it."""
        return (self.measured_us + self.launch_us) / (self.modelled_us + self.launch_us)


def samples(file: configs.DeviceFile) -> Iterator[Sample]:
    """The entries of a file that a layer of the suite belongs to, with the first such layer."""
    target, seen = devices.named(file.device), set()
    for dtype, layout in itertools.product(ELEMENT_BYTES, LAYOUTS):
        for layer, pass_ in itertools.product(layers.suite(dtype, layout), PLANNED):
            entry, tier = file.lookup(layer.problem, pass_) or (None, "")
            if entry is None or tier != "exact" or entry.algorithm not in REGISTRY or id(entry) in seen:
                continue
            seen.add(id(entry))
            asked = tiling(entry.algorithm, layer.problem, pass_, entry.config, target)
            modelled, launches = cost.estimate(layer.problem, asked, target), cost.LAUNCH_US * asked.launches
            yield Sample(
                entry.algorithm, pass_, asked.work, cost.alone(layer.problem, asked, target),
                entry.time_us - launches, modelled.time_us - launches, launches,
            )  # fmt: skip


def fitted(chosen: list[Sample]) -> cost.Weights:
    """The weights whose sums are nearest to what was measured, in relative terms."""
    parts = np.array([sample.alone for sample in chosen])
    measured = np.array([sample.measured_us for sample in chosen])
    return cost.Weights(*registers.least_squares(parts / measured[:, None], np.ones(len(chosen))))


def spread(ratios: list[float]) -> float:
    """The standard deviation of logarithms."""
    return float(np.std(np.log(ratios)))


def factors(chosen: list[Sample]) -> dict[str, float]:
    """Their medians, by algorithm and pass where there are enough."""
    by_name = collections.defaultdict(list)
    for sample in chosen:
        by_name[f"{sample.algorithm} {sample.pass_}"].append(sample.factor)
    return results.medians(by_name)


def compared(chosen: list[Sample]) -> Table:
    """A row a kind of work: its weights, and how far measured over modelled times lie apart."""
    table = Table(title="Shares of each resource's time, and measured over modelled time", title_justify="left")
    for heading in ("work", "weights", "passes", *cost.Weights._fields, "median", "spread"):
        table.add_column(heading, justify="left" if heading in ("work", "weights") else "right")
    for work, weights in cost.WEIGHTS.items():
        alike = [sample for sample in chosen if sample.work == work]
        ratios = [sample.measured_us / sample.modelled_us for sample in alike]
        told = (f"{statistics.median(ratios):.2f}", f"{spread(ratios):.2f}") if ratios else ("-", "-")
        table.add_row(work, "the model's", str(len(alike)), *(f"{weight:.2f}" for weight in weights), *told)
        if len(alike) > len(weights):
            best = fitted(alike)
            sums = [sample.measured_us / np.dot(best, sample.alone) for sample in alike]
            told = f"{statistics.median(sums):.2f}", f"{spread(sums):.2f}"
            table.add_row(work, "fitted", str(len(alike)), *(f"{weight:.2f}" for weight in best), *told)
    return table


def rewrite(path: pathlib.Path, ours: dict[str, float]) -> None:
    """Put factors of ours into a file, which else stays as it is."""
    data = json.loads(path.read_text(encoding="utf-8"))
    entries = data.pop("entries")
    data["calibration"]["ours"] = ours
    results.save(path, data, entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the factors of the shipped files")
    args = parser.parse_args()
    shipped = {path: configs.parse_device(path.read_text("utf-8"), path.name) for path in device_files()}
    found = {path: list(samples(file)) for path, file in shipped.items()}
    Console().print(compared(list(itertools.chain.from_iterable(found.values()))))
    for path, chosen in found.items():
        Console().print(path.name, factors(chosen))
        if args.write:
            rewrite(path, factors(chosen))


def device_files() -> list[pathlib.Path]:
    """Those of measurements, of the checkout."""
    return [path for path in sorted(FOLDER.glob("*.json")) if path.name != "registers.json"]


if __name__ == "__main__":
    main()
