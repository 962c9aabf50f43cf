"""The model against compiled code: what the software GPU counted of a kernel of each algorithm, pass and layout.

`python tests/compiled_code.py counts --write` counts, on layers with small maps and few groups, and writes counted.csv;
what the model says of the same launches is worked out here, by the model as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json

from groupconv import configs, devices, workers
from groupconv.algorithms import tiling
from groupconv.common import files
from groupconv.problem import ConvProblem

NAME = "counted.csv"
QUANTITIES = ("dram_bytes", "l2_bytes", "shared_bytes", "matrix_flops", "instructions")  # of cost.Tiling
WAVEFRONTS = ("wavefronts", "fewest_wavefronts")  # of shared memory, bank conflicts and all
FIELDS = (
    "utc", "target", "algorithm", "pass", "layout", "layer", "problem", "config", "kernels", *QUANTITIES, *WAVEFRONTS,
)  # fmt: skip
NEAR = {"dram_bytes": 0.15, "l2_bytes": 0.15, "shared_bytes": 0.15, "matrix_flops": 0.15, "instructions": 0.3}
CONFLICTS = 1.15  # wavefronts over the fewest: more are bank conflicts


@dataclasses.dataclass(frozen=True)
class Example:
    """A counted kernel. over: counted over modelled of each quantity, None where neither has any; conflicts:
    wavefronts over the fewest, None of a kernel without shared memory.
    """

    target: str
    algorithm: str
    pass_: str
    layout: str
    layer: str
    over: dict[str, float | None]
    conflicts: float | None


def kernels_of(algorithm: str) -> str:
    """A hash of the files that make an algorithm: what is counted holds for them."""
    now = configs.kernels_sha256()
    text = "".join(now.get(name, "") for name in sorted(configs.kernel_files(algorithm)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read() -> list[files.Row]:
    """The rows of counted.csv."""
    with importlib.resources.as_file(importlib.resources.files(__package__).joinpath(NAME)) as path:
        return files.read(path, FIELDS)


def example(row: files.Row) -> Example:
    """A row beside what the model says of the same launches."""
    problem = problem_of(row)
    asked = tiling(row["algorithm"], problem, row["pass"], json.loads(row["config"]), devices.named(row["target"]))
    over = {name: ratio(float(row[name]), float(getattr(asked, name))) for name in QUANTITIES}
    conflicts = ratio(*(float(row[name]) for name in WAVEFRONTS))
    return Example(row["target"], row["algorithm"], row["pass"], row["layout"], row["layer"], over, conflicts)


def problem_of(row: files.Row) -> ConvProblem:
    return workers.problem_of(json.loads(row["problem"]))


def ratio(counted: float, modelled: float) -> float | None:
    """None where there is nothing to count; infinite where the model knows nothing of what there is."""
    if not modelled:
        return float("inf") if counted else None
    return counted / modelled


def of_present_kernels(target: str) -> list[Example]:
    """The examples of a target, of kernels that have not changed since."""
    rows = [row for row in read() if row["target"] == target]
    return [example(row) for row in rows if row["kernels"] == kernels_of(row["algorithm"])]
