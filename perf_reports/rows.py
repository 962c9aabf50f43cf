"""The rows of a report: their fields, what fills those that machine and problem decide, and the CSV of them."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import math
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import torch
import triton

from ..problem import ConvProblem

PROBLEM_FIELDS = (
    "batch", "c_in", "h_in", "w_in", "c_out", "kh", "kw", "stride_h", "stride_w", "pad_top", "pad_bottom", "pad_left",
    "pad_right", "dil_h", "dil_w", "groups", "dtype", "layout",
)  # fmt: skip
# A row is one pass of one layer by one provider: an algorithm of the registry, "auto" (what dispatch chooses of all),
# "torch_contiguous", "torch_channels_last" or, where nothing is measured, PRIOR. The providers "copy_limit" and
# "matrix_limit" have no layer.
FIELDS = (
    "utc", "commit", "gpu", "driver", "torch", "triton", "cudnn", "kind", "layer", "pass", "provider", *PROBLEM_FIELDS,
    "source", "config", "us_p20", "us_p50", "us_p80", "tflops", "gbps", "floor_us", "fraction", "bound",
    "ungrouped_floor_us", "params", "flops", "bytes", "intensity", "params_ratio", "flops_ratio", "bytes_ratio",
    "intensity_ratio", "max_rel_err", "err_bound", "err_on", "registers", "spill_bytes", "shared_bytes", "matrix",
    "compiled_for", "note",
)  # fmt: skip
LIMITS = ("copy_limit", "matrix_limit")
PRIOR = "torch_prior"  # F.conv2d, modelled


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution to report on, and what to call it."""

    name: str
    problem: ConvProblem


@dataclasses.dataclass(frozen=True)
class Timing:
    """Percentiles of a time, in microseconds; a modelled time has only the middle one."""

    p50: float
    p20: float | None = None
    p80: float | None = None


def environment(kind: str, gpu: str) -> dict[str, str]:
    """The fields that every row of a run shares. `kind`: "measured" or "modelled"."""
    measured = kind == "measured"
    return {
        "commit": _commit(),
        "gpu": gpu,
        "driver": _driver() if measured else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version() or "") if measured else "",
        "kind": kind,
    }


def _output(*command: str, folder: pathlib.Path | None = None) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _commit() -> str:
    here = pathlib.Path(__file__).resolve()
    # An installed copy may lie inside another project's checkout, whose commit says nothing.
    if not _output("git", "ls-files", "--error-unmatch", here.name, folder=here.parent):
        return ""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*", folder=here.parent)


def _driver() -> str:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0] if lines else ""


def limit_row(provider: str, dtype: str, rate: float, source: str) -> dict:
    """A row of a device's limit: "copy_limit" in GB/s read and written, "matrix_limit" in TFLOP/s."""
    field = "gbps" if provider == "copy_limit" else "tflops"
    return {"provider": provider, "dtype": dtype, field: rate, "source": source}


def layer_row(layer: Layer, pass_: str, provider: str) -> dict:
    """What a layer's pass is, whoever runs it, and its ratios to the same layer without groups."""
    p = layer.problem
    ungrouped = dataclasses.replace(p, groups=1)
    problem = (
        p.batch, p.c_in, p.h_in, p.w_in, p.c_out, p.kh, p.kw, *p.stride, *p.pad, *p.dilation, p.groups, p.dtype,
        p.layout,
    )  # fmt: skip
    return {
        "layer": layer.name,
        "pass": pass_,
        "provider": provider,
        **dict(zip(PROBLEM_FIELDS, problem, strict=True)),
        "params": p.params,
        "flops": p.flops(pass_),
        "bytes": p.min_bytes(pass_),
        "intensity": p.intensity(pass_),
        "params_ratio": p.params / ungrouped.params,
        "flops_ratio": p.flops(pass_) / ungrouped.flops(pass_),
        "bytes_ratio": p.min_bytes(pass_) / ungrouped.min_bytes(pass_),
        "intensity_ratio": p.intensity(pass_) / ungrouped.intensity(pass_),
    }


def timing_fields(problem: ConvProblem, pass_: str, timing: Timing, floor_us: float) -> dict:
    """A time and the rates that it means, in useful FLOPs and in bytes moved once."""
    return {
        "us_p20": timing.p20,
        "us_p50": timing.p50,
        "us_p80": timing.p80,
        "tflops": problem.flops(pass_) / timing.p50 / 1e6,
        "gbps": problem.min_bytes(pass_) / timing.p50 / 1e3,
        "fraction": floor_us / timing.p50,
    }


def check_budget(seconds: float | None) -> None:
    """ValueError for a --budget-seconds that is none."""
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"--budget-seconds: {seconds} is not a positive number")


class Deadline:
    """A time budget; None never ends."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    @property
    def passed(self) -> bool:
        return self._end is not None and self._clock() >= self._end

    @property
    def left(self) -> float | None:
        """Seconds, not below 0; None of a budget that never ends."""
        return None if self._end is None else max(0.0, self._end - self._clock())


class Writer:
    """A CSV that holds every row from the moment it is appended. An earlier file of the name is replaced.

    common: fields of every row. kept: rows of the earlier file to begin with.
    """

    def __init__(
        self, path: pathlib.Path, common: dict[str, str], fields: Sequence[str] = FIELDS,
        kept: Sequence[dict[str, str]] = (),
    ):  # fmt: skip
        self.rows: list[dict[str, str]] = list(kept)
        self._common, self._fields = common, fields
        begun = io.StringIO(newline="")
        self._csv = self._writer(begun)
        self._csv.writeheader()
        self._csv.writerows(kept)
        write_atomically(path, begun.getvalue())
        self._file = path.open("a", encoding="utf-8", newline="")
        self._csv = self._writer(self._file)

    def _writer(self, file: IO[str]) -> csv.DictWriter:
        return csv.DictWriter(file, self._fields, restval="", lineterminator="\n")

    def append(self, row: dict) -> None:
        utc = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        written = {name: _text(value) for name, value in {"utc": utc, **self._common, **row}.items()}
        self._csv.writerow(written)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append({name: written.get(name, "") for name in self._fields})

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


def _text(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


def read(path: pathlib.Path, fields: Sequence[str] = FIELDS) -> list[dict[str, str]]:
    """The rows of a CSV with these fields; a last line that a kill cut short is left out."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = set(fields) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path.name}: not a report's CSV: no column {', '.join(sorted(missing))}")
        return [row for row in reader if None not in row.values()]


def take(found: Iterator[dict], writer: Writer, deadline: Deadline, on_row: Callable[[dict], None]) -> int:
    """Append rows as they come; none but the first is begun after the deadline. How many were taken."""
    taken = 0
    for row in found:
        writer.append(row)
        on_row(row)
        taken += 1
        if deadline.passed:
            break
    return taken


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Write a file that is whole at every moment."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def put_aside(path: pathlib.Path) -> None:
    """Keep a copy of a file under a name that nothing reads, and nothing has; the file may then be written anew."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    aside, number = path.with_name(f"{path.name}.{now}.old"), 0
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{now}.{number}.old")
    shutil.copy2(path, aside)
