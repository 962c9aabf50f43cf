"""Configuration files: reading, checking and looking up. Schema: autotune_configs/SCHEMA.md."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import math
import os
import pathlib
import re
import stat
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from . import devices
from .algorithms import REGISTRY
from .problem import ELEMENT_BYTES, LAYOUTS, PASSES, PLANNED, ConvProblem

if TYPE_CHECKING:
    from importlib.abc import Traversable

SCHEMA = 2
KINDS = ("measured", "stub")  # of a file's times; the stub's are pretended
OPTIONS = ("num_warps", "num_stages")
KEY_FIELDS = tuple(ConvProblem(1, 1, 1, 1, 1, 1, 1).config_key("fprop"))
# Fields in which a measurement may differ and still speak for a problem; all others must be equal.
SCALED_FIELDS = ("groups_bucket", "m_bucket", "map_bucket")
FARTHEST = 4.0  # of a nearest entry, in powers of two
# No time in microseconds, ratio or size is beyond these: what is computed of them neither overflows nor vanishes.
LEAST, MOST = 1e-9, 1e12


class DamagedFile(ValueError):
    """A configuration file that does not follow the schema."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A measurement: the fastest algorithm of a problem class, beside F.conv2d's time. Times in microseconds.

    algorithm: "torch" where no kernel of ours gave right numbers. torch_time_us: None where F.conv2d failed.
    """

    key: dict
    algorithm: str
    config: dict
    time_us: float
    torch_time_us: float | None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What measurements of a device say of the model, for its problems that nobody measured.

    ours: measured over modelled time, by "ALGORITHM PASS". torch: F.conv2d's time over `cost.torch_floor_us`, by
    "WIDTH_CLASS PASS".
    """

    ours: Mapping[str, float] = dataclasses.field(default_factory=dict)
    torch: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DeviceFile:
    """The measurements of one device. Every value is checked: a lookup never fails."""

    path: str
    device: str
    kind: str
    entries: tuple[Entry, ...]
    calibration: Calibration
    stale: int  # entries left out, because kernels have changed since

    def lookup(self, problem: ConvProblem, pass_: str) -> tuple[Entry, str] | None:
        """(entry, "exact") or the ("nearest") one in log space with every discrete field equal; None if none is."""
        wanted = problem.config_key(pass_)
        best, distance = None, FARTHEST
        for entry in self._by_class.get(_discrete(wanted), ()):
            apart = math.hypot(*(math.log2(entry.key[f] / wanted[f]) for f in SCALED_FIELDS))
            if apart == 0:
                return entry, "exact"
            if apart <= distance:
                best, distance = entry, apart
        return None if best is None else (best, "nearest")

    @functools.cached_property
    def _by_class(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(_discrete(entry.key), []).append(entry)
        return found


def _discrete(key: dict) -> str:
    return json.dumps({field: value for field, value in key.items() if field not in SCALED_FIELDS}, sort_keys=True)


def kernels_sha256() -> dict[str, str]:
    """The hash of every kernel source file: a measurement holds only for the kernels it was made with."""
    folder = importlib.resources.files("groupconv.kernels")
    sources = sorted((f.name, f.read_bytes()) for f in folder.iterdir() if f.name.endswith(".py"))
    return {name: hashlib.sha256(text).hexdigest() for name, text in sources if name != "__init__.py"}


@functools.cache
def kernel_files(algorithm: str) -> frozenset[str]:
    """The files of kernels/ that make an algorithm: its own, what that imports, and the sum of split-K's partials."""
    folder = importlib.resources.files("groupconv.kernels")
    found: set[str] = set()
    left = [f"{algorithm}.py", "reduce.py"]
    while left:
        name = left.pop()
        if name not in found and folder.joinpath(name).is_file():
            text = folder.joinpath(name).read_text(encoding="utf-8")
            left += [f"{imported}.py" for imported in re.findall(r"^from \.(\w+) import", text, re.M)]
        found.add(name)
    return frozenset(found)


def parse_device(text: str, path: str) -> DeviceFile:
    """Read a device's file; DamagedFile names what is wrong with it.

    Entries that were measured with other kernels than there are now are left out, and counted.
    """
    data = _object(text, path)
    _require(isinstance(data.get("device"), str), path, "device must be a string")
    kind = data.get("kind", "measured")
    _require(kind in KINDS, path, f"kind must be one of {', '.join(KINDS)}")
    measured_with = data.get("kernels_sha256", {})
    _require(isinstance(measured_with, dict), path, "kernels_sha256 must be an object")
    now = kernels_sha256()
    changed = {name for name in {*now, *measured_with} if measured_with.get(name) != now.get(name)}

    def outdated(algorithm: str) -> bool:
        return bool(changed & kernel_files(algorithm))

    _require(isinstance(data.get("entries"), list), path, "entries must be a list")
    entries, stale = [], 0
    for number, raw in enumerate(data["entries"]):
        made = _entry(raw, path, f"entry {number}", outdated)
        if outdated(made.algorithm):
            stale += 1
        else:
            entries.append(made)
    calibration = data.get("calibration", {})
    _require(isinstance(calibration, dict), path, "calibration must be an object")
    ours, torch = (_factors(calibration, name, path) for name in ("ours", "torch"))
    ours = {name: factor for name, factor in ours.items() if not outdated(name.split()[0])}
    return DeviceFile(path, data["device"], kind, tuple(entries), Calibration(ours, torch), stale)


def _entry(raw, path: str, where: str, outdated: Callable[[str], bool]) -> Entry:
    _require(isinstance(raw, dict) and isinstance(raw.get("key"), dict), path, f"{where} has no key")
    key = raw["key"]
    _require(sorted(key) == sorted(KEY_FIELDS), path, f"{where}: key must have exactly {', '.join(KEY_FIELDS)}")
    for field, known in (("pass", PLANNED), ("dtype", tuple(ELEMENT_BYTES)), ("layout", LAYOUTS)):
        _require(key[field] in known, path, f"{where}: {field} must be one of {', '.join(known)}")
    for field in ("cin_g", "cout_g", *SCALED_FIELDS):
        _require(_positive_int(key[field]), path, f"{where}: {field} must be a positive integer")
    for field in ("k", "stride", "dilation"):
        pair = isinstance(key[field], list) and len(key[field]) == 2 and all(map(_positive_int, key[field]))
        _require(pair, path, f"{where}: {field} must be two positive integers")
    algorithm, config = raw.get("algorithm"), raw.get("config", {})
    _require(_is_name(algorithm), path, f"{where} has no algorithm")
    if algorithm in REGISTRY and not outdated(algorithm):  # plans pass over the entries of others
        _check_config(algorithm, config, path, where)
    _require(isinstance(config, dict), path, f"{where}: config must be an object")
    time, torch_time = raw.get("time_us"), raw.get("torch_time_us")
    _require(_positive(time), path, f"{where}: time_us must be a positive number")
    failed = torch_time is None and "torch_time_us" in raw
    _require(failed or _positive(torch_time), path, f"{where}: torch_time_us must be a positive number or null")
    return Entry(key, algorithm, config, time, torch_time)


def _factors(calibration: dict, name: str, path: str) -> dict[str, float]:
    """What a calibration has by "ALGORITHM PASS" or "WIDTH_CLASS PASS"."""
    factors = calibration.get(name, {})
    good = isinstance(factors, dict) and all(map(_positive, factors.values()))
    _require(good, path, f"calibration: {name} must hold positive numbers by name")
    for key in factors:
        of, _, pass_ = key.partition(" ")
        _require(_is_name(of) and pass_ in PLANNED, path, f"calibration: {name}: a name must end in a space and a pass")
    return factors


@dataclasses.dataclass(frozen=True)
class ModelledDefault:
    """A configuration chosen without measurement, for a pass, element size and GEMM N of up to `most_n`.

    only: the architectures it is for, or None for every one that no other entry names.
    """

    algorithm: str
    pass_: str
    element_bytes: int
    most_n: int
    config: dict
    only: tuple[str, ...] | None

    def __str__(self) -> str:
        tile = "x".join(str(size) for field, size in self.config.items() if field not in OPTIONS)
        return (
            f"{self.algorithm} {self.pass_} {self.element_bytes * 8}-bit N<={self.most_n} {tile} "
            f"w{self.config['num_warps']} s{self.config['num_stages']}"
        )


def parse_modelled(text: str, path: str) -> tuple[ModelledDefault, ...]:
    """Read the modelled defaults; DamagedFile names what is wrong."""
    data = _object(text, path)
    _require(data.get("source") == "modelled", path, 'source must be "modelled"')
    _require(isinstance(data.get("defaults"), list), path, "defaults must be a list")
    found = []
    for number, raw in enumerate(data["defaults"]):
        where = f"default {number}"
        _require(isinstance(raw, dict), path, f"{where} must be an object")
        _require(raw.get("algorithm") in REGISTRY, path, f"{where}: algorithm must be one of {', '.join(REGISTRY)}")
        _check_config(raw["algorithm"], raw.get("config"), path, where, divided=False)
        pass_ = raw.get("pass")
        _require(pass_ in PASSES, path, f"{where}: pass {pass_!r} is not one of {', '.join(PASSES)}")
        _require(_positive_int(raw.get("element_bytes")), path, f"{where}: element_bytes must be a positive integer")
        _require(_positive_int(raw.get("most_n")), path, f"{where}: most_n must be a positive integer")
        only = raw.get("only")
        _require(only is None or isinstance(only, list), path, f"{where}: only must be a list of architectures")
        archs = None if only is None else tuple(only)
        found.append(
            ModelledDefault(raw["algorithm"], pass_, raw["element_bytes"], raw["most_n"], raw["config"], archs)
        )
    return tuple(found)


def _object(text: str, path: str) -> dict:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: not JSON: {error}") from None
    _require(isinstance(data, dict), path, "must be a JSON object")
    _require(data.get("schema") == SCHEMA, path, f"schema {data.get('schema')!r}, this version reads {SCHEMA}")
    return data


def _require(condition: bool, path: str, rule: str) -> None:
    if not condition:
        raise DamagedFile(f"{path}: {rule}")


def _positive(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and LEAST <= value <= MOST


def _positive_int(value) -> bool:
    return isinstance(value, int) and _positive(value)


def _is_name(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z0-9_]{1,64}", value) is not None


def _check_config(algorithm: str, config, path: str, where: str, divided: bool = True) -> None:
    """divided: with its division among programs, which defaults that are shipped leave to the model."""
    blocks = REGISTRY[algorithm].BLOCKS | (REGISTRY[algorithm].DIVISION if divided else {})
    fields = (*blocks, *OPTIONS)
    named = isinstance(config, dict) and sorted(config) == sorted(fields)
    _require(named, path, f"{where}: config of {algorithm} must have exactly {', '.join(fields)}")
    for field, value in config.items():
        _require(_positive_int(value), path, f"{where}: {field} must be a positive integer")
        if field != "num_stages" and len(blocks.get(field, ())) < 3:
            _require(value & (value - 1) == 0, path, f"{where}: {field} must be a power of two")
    for field, (least, most, *step) in blocks.items():
        _require(least <= config[field] <= most, path, f"{where}: {field} must be from {least} to {most}")
        _require(config[field] % (*step, 1)[0] == 0, path, f"{where}: {field} must be a multiple of {(*step, 1)[0]}")
    _require(config["num_warps"] <= 16 and config["num_stages"] <= 8, path, f"{where}: too many warps or stages")


def user_folder() -> pathlib.Path | None:
    """Where a user's own files lie, read before the shipped ones: GROUPCONV_CONFIG_DIR, or as the platform has it.

    None where a user has no such place: a container's may have no home, or one that may not be entered.
    """
    named = os.environ.get("GROUPCONV_CONFIG_DIR")
    if named:
        return pathlib.Path(named)
    import platformdirs

    try:
        folder = platformdirs.user_config_path("groupconv", appauthor=False)
        folder.stat()
    except FileNotFoundError:  # there is a place for it
        pass
    except (OSError, RuntimeError, KeyError):
        return None
    return folder if folder.is_absolute() else None  # "~" without a home stays "~"


def shipped_folder() -> Traversable:
    """Where the device files lie that the package has."""
    return importlib.resources.files("groupconv.autotune_configs")


@functools.cache
def device_files(slug: str) -> tuple[DeviceFile, ...]:
    """The files of a device, the user's first. One that cannot be trusted is named in a warning, and skipped."""
    found = []
    for folder in (user_folder(), shipped_folder()):
        if folder is None:
            continue
        file = folder.joinpath(f"{slug}.json")
        try:
            read = _device_file(file, slug)
        except Exception as error:  # a call goes on, whatever is wrong with a file
            why = str(error) if isinstance(error, DamagedFile) else f"{file}: {_told(error)}"
            warnings.warn(f"groupconv: skipping a configuration file: {why}", stacklevel=2)
            continue
        if read is None:
            continue
        found.append(read)
        if read.stale:
            warnings.warn(
                f"groupconv: {file}: skipping {read.stale} entries that were measured with other kernels; "
                "`groupconv tune` measures anew",
                stacklevel=2,
            )
    return tuple(found)


def _device_file(file: Traversable, slug: str) -> DeviceFile | None:
    """The file of a device; None where there is none."""
    if isinstance(file, pathlib.Path):
        try:
            regular = stat.S_ISREG(file.stat().st_mode)
        except FileNotFoundError:
            return None
        _require(regular, str(file), "not a file")  # reading a pipe would wait for its writer
    elif not file.is_file():
        return None
    read = parse_device(file.read_text(encoding="utf-8"), str(file))
    _require(read.kind == "measured", read.path, f"its times are of a {read.kind} clock, not measurements")
    own = devices.slugify(read.device)
    _require(own == slug, read.path, f"it is of {read.device!r}, whose file is called {own}.json")
    return read


def _told(error: Exception) -> str:
    """An error in a line, without the path that an OSError names too."""
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


@functools.cache
def modelled_defaults() -> tuple[ModelledDefault, ...]:
    """The shipped defaults, chosen by model and compiler, not measured."""
    file = importlib.resources.files("groupconv.autotune_configs").joinpath("modelled.json")
    return parse_modelled(file.read_text(encoding="utf-8"), str(file))


def modelled(algorithm: str, problem: ConvProblem, pass_: str, arch: str) -> ModelledDefault | None:
    """The default of the smallest class that holds the problem's GEMM N, else of the largest; None if there is none."""
    serving = [
        d
        for d in modelled_defaults()
        if (d.algorithm, d.pass_, d.element_bytes) == (algorithm, pass_, problem.element_bytes)
        and (d.only is None or arch in d.only)
    ]
    named = {d.most_n for d in serving if d.only is not None}
    serving = [d for d in serving if d.only is not None or d.most_n not in named]
    if not serving:
        return None
    n = problem.gemm(pass_)[1]
    holding = [d for d in serving if d.most_n >= n]
    return min(holding, key=lambda d: d.most_n) if holding else max(serving, key=lambda d: d.most_n)


def reset() -> None:
    """Forget the files read so far."""
    device_files.cache_clear()
    modelled_defaults.cache_clear()
