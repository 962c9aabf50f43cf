"""Files that are whole at every moment: tables of a run's rows, and text."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import torch
import triton

Row = dict[str, str]  # of a table, as it is read
ENVIRONMENT = ("utc", "commit", "gpu", "driver", "torch", "triton", "cudnn", "kind")  # the first fields of every table


def environment(kind: str, gpu: str) -> Row:
    """The fields that every row of a run shares, but the time. kind: "measured", "modelled" or "stub"."""
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


def utc_now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _output(*command: str, folder: pathlib.Path | None = None) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _commit() -> str:
    here = pathlib.Path(__file__).resolve()
    # An installed copy may lie inside another project's checkout, whose commit says nothing.
    if not _output("git", "ls-files", "--error-unmatch", here.name, folder=here.parent):
        return ""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*", folder=here.parent)


def _driver() -> str:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0] if lines else ""


class Writer:
    """A CSV that holds every row from the moment it is appended. An earlier file of the name is replaced.

    common: fields of every row. kept: rows of the earlier file to begin with.
    """

    def __init__(self, path: pathlib.Path, fields: Sequence[str], common: Row, kept: Sequence[Row] = ()):
        self._common, self._fields = common, fields
        begun = io.StringIO(newline="")
        header = self._writer(begun)
        header.writeheader()
        header.writerows(kept)
        write_atomically(path, begun.getvalue())
        self._file = path.open("a", encoding="utf-8", newline="")
        self._csv = self._writer(self._file)

    def _writer(self, file: IO[str]) -> csv.DictWriter:
        return csv.DictWriter(file, self._fields, restval="", lineterminator="\n")

    def append(self, row: Mapping[str, object]) -> None:
        """Add a row, whose fields may be numbers, dictionaries or None."""
        whole = {"utc": utc_now(), **self._common, **row}
        self._csv.writerow({name: _text(value) for name, value in whole.items()})
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


def read(path: pathlib.Path, fields: Sequence[str]) -> list[Row]:
    """The rows of a CSV with these fields; a last line that a kill cut short is left out."""
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    missing = set(fields) - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path.name}: not a report's CSV: no column {', '.join(sorted(missing))}")
    return [row for row in reader if None not in row.values()]


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write a file that takes its place at once, when it is written; of one that cannot be, nothing stays."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Write a file that is whole at every moment."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def put_aside(path: pathlib.Path) -> None:
    """Keep a copy of a file under a name that nothing reads, and nothing has; the file may then be written anew."""
    stem, number = f"{path.name}.{utc_now().replace('-', '').replace(':', '')}", 0
    aside = path.with_name(f"{stem}.old")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{stem}.{number}.old")
    with whole(aside) as partial:
        shutil.copy2(path, partial)
