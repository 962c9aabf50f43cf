"""The journal of a tuning run: one JSON line a result, on disk before the next one begins.

A run that ends early, however it ends, loses nothing and measures nothing twice when it is started again. A line holds
only for what it was measured with: a run begins with a "measured_with" line of device, versions and kernels. What is
under another than the present run's is kept in the file and not used, and so is a line that a kill cut short.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import warnings
from typing import Any


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of a contender before it could race: its error, what it takes, or why it does not run."""

    error: float | None
    bound: float | None
    resources: dict[str, int | str]
    note: str  # empty if it may race


class Journal:
    """Results of earlier runs, and the file to which this one's are appended.

    path: this run's file. Other files beside it whose names begin alike (other ranks') are read too. measured_with:
    device, versions and kernels; results under an equal one are known.
    """

    def __init__(self, path: pathlib.Path, measured_with: dict[str, object]):
        self.findings: dict[tuple[str, str], Finding] = {}
        self.races: dict[tuple[str, int], dict[str, list[float]]] = {}
        self._measured_with = json.loads(json.dumps(measured_with))
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(path.parent.glob(f"{path.name.split('.')[0]}.*jsonl")):
            self._read(file)
        whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
        self._file = path.open("a", encoding="utf-8")
        self._append({"measured_with": self._measured_with}, before="" if whole else "\n")

    def examined(self, task: str, contender: str, finding: Finding) -> None:
        """Keep what became of a contender."""
        self._append({"task": task, "contender": contender, **dataclasses.asdict(finding)})
        self.findings[task, contender] = finding

    def raced(self, task: str, rounds: int, times_us: dict[str, list[float]]) -> None:
        """Keep the times of a race, in microseconds by contender and round."""
        self._append({"task": task, "rounds": rounds, "times_us": times_us})
        self.races[task, rounds] = times_us

    def race(self, task: str, rounds: int, contenders: list[str]) -> dict[str, list[float]] | None:
        """The times of a race between just these contenders, if it was run."""
        times = self.races.get((task, rounds))
        return times if times is not None and sorted(times) == sorted(contenders) else None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _append(self, record: dict[str, object], before: str = "") -> None:
        self._file.write(before + json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, path: pathlib.Path) -> None:
        damaged, ours = 0, False
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                if "measured_with" in record:
                    ours = record["measured_with"] == self._measured_with
                elif ours:
                    self._know(record)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                damaged += 1
        if damaged:
            warnings.warn(f"groupconv: {path}: passing over {damaged} damaged lines", stacklevel=4)

    def _know(self, record: dict[str, Any]) -> None:
        if "contender" in record:
            fields = {field.name: record[field.name] for field in dataclasses.fields(Finding)}
            self.findings[record["task"], record["contender"]] = Finding(**fields)
        else:
            times = {name: [float(time) for time in times] for name, times in record["times_us"].items()}
            if not all(taken and all(0 < time < math.inf for time in taken) for taken in times.values()):
                raise ValueError("times must be positive")
            self.races[record["task"], int(record["rounds"])] = times
