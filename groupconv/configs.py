"""Configuration files: reading, checking and looking up. Schema: autotune_configs/SCHEMA.md."""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from . import devices, outside
from .algorithms import REGISTRY
from .problem import ELEMENT_BYTES, LAYOUTS, PLANNED, ConvProblem

if TYPE_CHECKING:
    from importlib.abc import Traversable

SCHEMA = 2
KINDS = ("measured", "stub")  # of a file's times; the stub's are pretended
OPTIONS = ("num_warps", "num_stages")
KEY_FIELDS = tuple(ConvProblem(1, 1, 1, 1, 1, 1, 1).config_key("fprop"))
# Fields in which a measurement may differ and still speak for a problem; all others must be equal.
SCALED_FIELDS = ("groups_bucket", "m_bucket", "map_bucket")
FARTHEST_LOG2 = 4.0  # that a nearest entry may be
# No time in microseconds, ratio or size is beyond these: what is computed of them neither overflows nor vanishes.
LEAST_FIGURE, LARGEST_FIGURE = 1e-9, 1e12


class DamagedFile(ValueError):
    """A configuration file that does not follow the schema."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A measurement: the fastest algorithm of a problem class, beside F.conv2d's time. Times in microseconds.

    algorithm: "torch" where no kernel of ours gave right numbers. torch_time_us: None where F.conv2d failed.
    """

    key: dict[str, Any]
    algorithm: str
    config: dict[str, int]
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
        key = problem.config_key(pass_)
        nearest, least_distance = None, FARTHEST_LOG2
        for entry in self._by_class.get(_discrete(key), ()):
            distance = math.hypot(*(math.log2(entry.key[field] / key[field]) for field in SCALED_FIELDS))
            if distance == 0:
                return entry, "exact"
            if distance <= least_distance:
                nearest, least_distance = entry, distance
        return None if nearest is None else (nearest, "nearest")

    @functools.cached_property
    def _by_class(self) -> dict[str, list[Entry]]:
        by_class: dict[str, list[Entry]] = {}
        for entry in self.entries:
            by_class.setdefault(_discrete(entry.key), []).append(entry)
        return by_class


def _discrete(key: Mapping[str, Any]) -> str:
    return json.dumps({field: value for field, value in key.items() if field not in SCALED_FIELDS}, sort_keys=True)


def kernels_sha256() -> dict[str, str]:
    """The hash of every kernel source file: a measurement holds only for the kernels it was made with."""
    folder = importlib.resources.files(f"{__package__}.kernels")
    sources = sorted((f.name, f.read_bytes()) for f in folder.iterdir() if f.name.endswith(".py"))
    return {name: hashlib.sha256(text).hexdigest() for name, text in sources if name != "__init__.py"}


@functools.cache
def kernel_files(algorithm: str) -> frozenset[str]:
    """The files of kernels/ that make an algorithm: its own, what that imports, and the sum of split-K's partials."""
    folder = importlib.resources.files(f"{__package__}.kernels")
    names: set[str] = set()
    waiting = [f"{algorithm}.py", "reduce.py"]
    while waiting:
        name = waiting.pop()
        if name not in names and folder.joinpath(name).is_file():
            text = folder.joinpath(name).read_text(encoding="utf-8")
            waiting += [f"{imported}.py" for imported in re.findall(r"^from \.(\w+) import", text, re.M)]
        names.add(name)
    return frozenset(names)


def parse_device(text: str, path: str) -> DeviceFile:
    """Read a device's file; DamagedFile names the file and what is wrong with it.

    Entries that were measured with other kernels than there are now are left out, and counted.
    """
    with _damage_in(path):
        data = _object(text)
        _require(isinstance(data.get("device"), str), "device must be a string")
        kind = data.get("kind", "measured")
        _require(kind in KINDS, f"kind must be one of {', '.join(KINDS)}")
        measured_with = data.get("kernels_sha256", {})
        _require(isinstance(measured_with, dict), "kernels_sha256 must be an object")
        now = kernels_sha256()
        changed = {name for name in {*now, *measured_with} if measured_with.get(name) != now.get(name)}

        def outdated(algorithm: str) -> bool:
            return bool(changed & kernel_files(algorithm))

        _require(isinstance(data.get("entries"), list), "entries must be a list")
        entries = []
        for number, fields in enumerate(data["entries"]):
            with _damage_in(f"entry {number}"):
                entries.append(entry(fields, outdated))
        valid = tuple(entry for entry in entries if not outdated(entry.algorithm))
        calibration = data.get("calibration", {})
        _require(isinstance(calibration, dict), "calibration must be an object")
        ours, torch = (_factors(calibration, name) for name in ("ours", "torch"))
        ours = {name: factor for name, factor in ours.items() if not outdated(name.split()[0])}
        return DeviceFile(path, data["device"], kind, valid, Calibration(ours, torch), len(entries) - len(valid))


def entry(fields: Any, outdated: Callable[[str], bool]) -> Entry:
    _require(isinstance(fields, dict) and isinstance(fields.get("key"), dict), "it has no key")
    key = fields["key"]
    _require(set(key) == set(KEY_FIELDS), f"key must have exactly {', '.join(KEY_FIELDS)}")
    for field, names in (("pass", PLANNED), ("dtype", tuple(ELEMENT_BYTES)), ("layout", LAYOUTS)):
        _require(key[field] in names, f"{field} must be one of {', '.join(names)}")
    for field in ("cin_g", "cout_g", *SCALED_FIELDS):
        _require(_is_positive_int(key[field]), f"{field} must be a positive integer")
    for field in ("k", "stride", "dilation"):
        is_pair = isinstance(key[field], list) and len(key[field]) == 2 and all(map(_is_positive_int, key[field]))
        _require(is_pair, f"{field} must be two positive integers")
    algorithm, config = fields.get("algorithm"), fields.get("config", {})
    _require(_is_name(algorithm), "it has no algorithm")
    _require(isinstance(config, dict), "config must be an object")
    if algorithm in REGISTRY and not outdated(algorithm):  # plans pass over the entries of others
        check_config(algorithm, config)
    time_us, torch_time_us = fields.get("time_us"), fields.get("torch_time_us")
    _require(_is_positive(time_us), "time_us must be a positive number")
    torch_failed = torch_time_us is None and "torch_time_us" in fields
    _require(torch_failed or _is_positive(torch_time_us), "torch_time_us must be a positive number or null")
    return Entry(key, algorithm, config, time_us, torch_time_us)


def _factors(calibration: dict[str, Any], name: str) -> dict[str, float]:
    """What a calibration has by "ALGORITHM PASS" or "WIDTH_CLASS PASS"."""
    factors = calibration.get(name, {})
    by_name = isinstance(factors, dict) and all(map(_is_positive, factors.values()))
    _require(by_name, f"calibration: {name} must hold positive numbers by name")
    for key in factors:
        of, _, pass_ = key.partition(" ")
        _require(_is_name(of) and pass_ in PLANNED, f"calibration: {name}: a name must end in a space and a pass")
    return factors


def fields(algorithm: str) -> tuple[str, ...]:
    """Those of an algorithm's configurations, in their order."""
    return (*REGISTRY[algorithm].BLOCKS, *REGISTRY[algorithm].DIVISION, *OPTIONS)


def check_config(algorithm: str, config: Mapping[str, Any]) -> None:
    """DamagedFile if this is no configuration of one of REGISTRY: other fields than it has, or sizes out of bounds."""
    bounds, names = REGISTRY[algorithm].BLOCKS | REGISTRY[algorithm].DIVISION, fields(algorithm)
    _require(set(config) == set(names), f"config of {algorithm} must have exactly {', '.join(names)}")
    for field, value in config.items():
        _require(_is_positive_int(value) or value == bounds.get(field, (1,))[0], f"{field} must be a positive integer")
        if field != "num_stages" and len(bounds.get(field, ())) < 3:
            _require(value & (value - 1) == 0, f"{field} must be a power of two")
    for field, (least, most, *step) in bounds.items():
        _require(least <= config[field] <= most, f"{field} must be from {least} to {most}")
        _require(config[field] % (*step, 1)[0] == 0, f"{field} must be a multiple of {(*step, 1)[0]}")
    _require(config["num_warps"] <= 16 and config["num_stages"] <= 8, "too many warps or stages")


def _object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"not JSON: {error}") from None
    _require(isinstance(data, dict), "must be a JSON object")
    schema = data.get("schema")
    _require(type(schema) is int and schema == SCHEMA, f"schema {schema!r}, this version reads {SCHEMA}")
    return data


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise DamagedFile(rule)


@contextlib.contextmanager
def _damage_in(place: str) -> Iterator[None]:
    """Say of damage that is found where it is."""
    try:
        yield
    except DamagedFile as error:
        raise DamagedFile(f"{place}: {error}") from None


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and LEAST_FIGURE <= value <= LARGEST_FIGURE


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and _is_positive(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z0-9_]{1,64}", value) is not None


def user_folder() -> pathlib.Path | None:
    """Where a user's own files lie, read before the shipped ones: GROUPCONV_CONFIG_DIR, or as the platform has it.

    None where a user has no such place: a container's may have no home, or one that may not be entered.
    """
    named = os.environ.get("GROUPCONV_CONFIG_DIR")
    if named:
        return pathlib.Path(named)
    try:
        folder = outside.user_config_path()
        folder.stat()
    except FileNotFoundError:  # there is a place for it
        pass
    except (OSError, RuntimeError, KeyError):
        return None
    return folder if folder.is_absolute() else None  # "~" without a home stays "~"


def shipped_folder() -> Traversable:
    """Where the device files lie that the package has."""
    return importlib.resources.files(f"{__package__}.autotune_configs")


@functools.cache
def device_files(slug: str) -> tuple[DeviceFile, ...]:
    """The files of a device, the user's first. One that cannot be trusted is named in a warning, and skipped."""
    trusted = []
    for folder in (user_folder(), shipped_folder()):
        if folder is None:
            continue
        path = folder.joinpath(f"{slug}.json")
        try:
            file = _device_file(path, slug)
        except Exception as error:  # a call goes on, whatever is wrong with a file
            # Damage is told with the file's name, an OSError's own words without it.
            told = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            why = str(error) if isinstance(error, DamagedFile) else f"{path}: {told}"
            warnings.warn(f"groupconv: skipping a configuration file: {why}", stacklevel=2)
            continue
        if file is not None:
            trusted.append(file)
        if file is not None and file.stale:
            warnings.warn(
                f"groupconv: {path}: skipping {file.stale} entries that were measured with other kernels; "
                "`groupconv tune` measures anew",
                stacklevel=2,
            )
    return tuple(trusted)


@functools.cache
def kin_files(target: devices.Target) -> tuple[DeviceFile, ...]:
    """The files that the package has of other devices of a target's architecture: what is fast there is fast on it too,
    if their times are not its own. Of what is wrong with one, only its own device is told.
    """
    found = []
    for slug in devices.kin(target):
        with contextlib.suppress(Exception):
            file = _device_file(shipped_folder().joinpath(f"{slug}.json"), slug)
            found += [] if file is None else [file]
    return tuple(found)


def _device_file(path: Traversable, slug: str) -> DeviceFile | None:
    """The file of a device; None where there is none."""
    if isinstance(path, pathlib.Path):
        try:
            is_regular = stat.S_ISREG(path.stat().st_mode)
        except FileNotFoundError:
            return None
        with _damage_in(str(path)):
            _require(is_regular, "not a file")  # reading a pipe would wait for its writer
    elif not path.is_file():
        return None
    file = parse_device(path.read_text(encoding="utf-8"), str(path))
    own_slug = devices.slugify(file.device)
    with _damage_in(file.path):
        _require(file.kind == "measured", f"its times are of a {file.kind} clock, not measurements")
        _require(own_slug == slug, f"it is of {file.device!r}, whose file is called {own_slug}.json")
    return file


def reset() -> None:
    """Forget the files read so far."""
    device_files.cache_clear()
    kin_files.cache_clear()
