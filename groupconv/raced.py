"""What races in users' own calls found: of this process, and of earlier ones from the user's file.

Below what `groupconv tune` measured, which takes quiet and a reference, and above the model. The file of a device is
DEVICE.trials.jsonl in the user's configuration folder, a line a result (autotune_configs/SCHEMA.md).
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import functools
import hashlib
import json
import os
import pathlib
import re
import stat
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from . import algorithms, configs, outside
from .problem import ConvProblem

MARGIN = 0.03  # of F.conv2d's time: what a kernel of ours must win by, or F.conv2d stays
LOCK_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Result:
    """A race of a problem class. algorithm, config, time_us: the best of ours, which is "torch" where none was right.

    torch_time_us: F.conv2d's; of "backward" that of the two gradients apart, as these were decided. utc: when.
    """

    entry: configs.Entry
    utc: str

    @property
    def won(self) -> bool:
        """Whether ours is to be taken."""
        entry = self.entry
        return entry.algorithm != "torch" and entry.time_us <= (1.0 - MARGIN) * (entry.torch_time_us or 0.0)

    @property
    def told(self) -> str:
        """In words."""
        entry = self.entry
        apart = "the gradients apart" if entry.key["pass"] == "backward" else "F.conv2d"
        ours = "none of ours" if entry.algorithm == "torch" else f"{entry.algorithm} {entry.time_us:.1f} us"
        return f"raced {self.utc}: {ours}, {apart} {entry.torch_time_us:.1f} us"


def of_now(entry: configs.Entry) -> Result:
    """The result of a race that has just ended."""
    return Result(entry, datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))


@functools.cache
def made_with() -> dict[str, str]:
    """What a result holds for: versions, and the kernels."""
    kernels = json.dumps(configs.kernels_sha256(), sort_keys=True)
    return {
        "torch": torch.__version__,
        "triton": algorithms.triton_version() or "",
        "cudnn": str(torch.backends.cudnn.version()),
        "kernels": hashlib.sha256(kernels.encode()).hexdigest(),
    }


def is_fair() -> bool:
    """Whether F.conv2d is at its best: cuDNN is searched, for any algorithm."""
    cudnn, deterministic = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    return cudnn.enabled and cudnn.benchmark and not cudnn.deterministic and not deterministic


_RESULTS: dict[tuple[str, str], Result] = {}  # of this process, by device and class


def lookup(slug: str, problem: ConvProblem, pass_: str) -> Result | None:
    """The result of a problem's class on a device, if there is one."""
    name = _class(problem.config_key(pass_))
    return _RESULTS.get((slug, name)) or _of_file(slug).get(name)


def keep(slug: str, found: Result) -> None:
    """Let plans go by a result from now on."""
    _RESULTS[slug, _class(found.entry.key)] = found


def write(slug: str, found: Result) -> None:
    """Add a result to the user's file, for processes to come. One that cannot be written is this process's own, which
    is told once.
    """
    path = user_file(slug)
    if path is None:
        return
    fields = {
        "device": slug, "utc": found.utc, **dataclasses.asdict(found.entry), "made_with": made_with(),
        "schema": configs.SCHEMA,
    }  # fmt: skip
    line = json.dumps(fields) + "\n"
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for its reader
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with outside.alone(f"{path}.lock", LOCK_SECONDS), path.open("a+b", buffering=0) as file:
            end = file.tell()
            if end:
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line  # after one that a kill cut short
            if file.write(line.encode()) != len(line):  # of which a full disk took a part
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except (OSError, NotImplementedError) as error:  # a full disk, a read-only home, or no locks
        _tell_once(f"groupconv: {path}: what races find is not kept: {getattr(error, 'strerror', '') or error}")


@functools.cache
def _tell_once(what: str) -> None:
    warnings.warn(what, stacklevel=3)


def user_file(slug: str) -> pathlib.Path | None:
    """Where a device's results are kept; None where a user has no place for them."""
    folder = configs.user_folder()
    return None if folder is None else folder / f"{slug}.trials.jsonl"


def read(path: pathlib.Path) -> Iterator[tuple[Result, dict[str, str]]]:
    """The results of a file, each with what it was made with. Lines that are none are named in a warning, and skipped.

    OSError where it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path}: not a file")  # reading a pipe would wait for its writer
    damaged = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield _parsed(line, path.name.removesuffix(".trials.jsonl"))
        except (configs.DamagedFile, ValueError, RecursionError):
            damaged.append(number)
    if damaged:
        lines = f"line {damaged[0]}" + (f" and {len(damaged) - 1} more" if damaged[1:] else "")
        warnings.warn(f"groupconv: {path}: skipping {lines}: no result of a race", stacklevel=2)


def _parsed(line: bytes, slug: str) -> tuple[Result, dict[str, str]]:
    fields: Any = json.loads(line)
    if not isinstance(fields, dict) or fields.get("schema") != configs.SCHEMA or fields.get("device") != slug:
        raise configs.DamagedFile("not of this schema, or of this device")
    made, utc = fields.get("made_with"), fields.get("utc")
    if not isinstance(made, dict) or not isinstance(utc, str) or not re.fullmatch(r"[0-9TZ:-]{20}", utc):
        raise configs.DamagedFile("it does not say what it was made with, or when")
    return Result(configs.entry(fields, lambda algorithm: made != made_with()), utc), made


@functools.cache
def _of_file(slug: str) -> dict[str, Result]:
    """Results of earlier processes that hold for this one, by class; the newest of each. Whatever is wrong with the
    file, a call goes on.
    """
    path = user_file(slug)
    found: dict[str, Result] = {}
    try:
        if path is not None and path.exists():
            for one, made in read(path):
                if made == made_with():
                    found[_class(one.entry.key)] = one
    except Exception as error:
        warnings.warn(f"groupconv: skipping {path}: {type(error).__name__}: {error}", stacklevel=2)
    return found


def _class(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def reset() -> None:
    """Forget what was raced and read; files stay."""
    _RESULTS.clear()
    _of_file.cache_clear()
    _tell_once.cache_clear()
