"""What a search found, as a device's configuration file, and what it says of the model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import warnings
from collections.abc import Iterable

from .. import configs, cost
from ..common import files
from ..devices import Target
from .search import Result

LEAST_MEASURED = 3  # results of a class, for a calibration of it


def entry(result: Result) -> dict | None:
    """The file's entry of a result; None where nothing that a plan could take was timed."""
    torch_us, best = result.torch_us, result.best
    if best is None and torch_us is None:
        return None
    return {
        "key": result.task.problem.config_key(result.task.pass_),
        "algorithm": "torch" if best is None else best.provider,
        "config": {} if best is None else best.config,
        "time_us": _rounded(torch_us if best is None else result.time_us),
        "torch_time_us": _rounded(torch_us),
    }


def entries(results: Iterable[Result]) -> list[dict]:
    """An entry a class, sorted by key. Of several layers in a class the one that takes longest speaks for it."""
    found: dict[str, dict] = {}
    for result in results:
        made = entry(result)
        if made is not None:
            key = json.dumps(made["key"], sort_keys=True)
            if key not in found or made["time_us"] > found[key]["time_us"]:
                found[key] = made
    return [found[key] for key in sorted(found)]


def _rounded(time_us: float | None) -> float | None:
    return None if time_us is None else round(time_us, 3)


def calibration(results: list[Result], target: Target) -> configs.Calibration:
    """Medians of measured over modelled time by algorithm and pass, and of F.conv2d's over its floor."""
    ours: dict[str, list[float]] = {}
    torch: dict[str, list[float]] = {}
    for result in results:
        problem, pass_ = result.task.problem, result.task.pass_
        # Of each algorithm the configuration that a modelled plan would take: the model's first.
        chosen = {each.provider: each for each in reversed(result.raced) if each.ours}
        for each in chosen.values():
            if each.modelled_us:
                ratio = result.first_us[each.name] / each.modelled_us
                ours.setdefault(f"{each.provider} {pass_}", []).append(ratio)
        if result.torch_us is not None and pass_ != "backward":
            over = result.torch_us / cost.torch_floor_us(problem, pass_, target)
            torch.setdefault(f"{cost.width_class(problem)} {pass_}", []).append(over)
    return configs.Calibration(_medians(ours), _medians(torch))


def _medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {
        name: round(statistics.median(ratios), 4)
        for name, ratios in sorted(found.items())
        if len(ratios) >= LEAST_MEASURED
    }


def rank_correlation(pairs: list[tuple[float, float]]) -> float | None:
    """Spearman's: of the ranks of two quantities, ties sharing theirs; None of fewer than 3 pairs or equal values."""
    columns = [_ranks(list(column)) for column in zip(*pairs, strict=True)]
    if len(pairs) < 3 or any(len(set(column)) == 1 for column in columns):
        return None
    return statistics.correlation(*columns)


def _ranks(values: list[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in set(values)}
    return [first[value] + (values.count(value) - 1) / 2 for value in values]


def model_correlations(results: list[Result]) -> dict[str, tuple[float | None, float | None]]:
    """By algorithm: (across problems, within one) rank correlation of modelled and measured times.

    Across problems: of the best configurations. Within one: the mean over the problems with 3 configurations or more,
    which is what pruning goes by.
    """
    across: dict[str, list[tuple[float, float]]] = {}
    within: dict[str, list[float]] = {}
    for result in results:
        by_algorithm: dict[str, list[tuple[float, float]]] = {}
        for each in result.raced:
            if each.modelled_us is not None:
                pair = each.modelled_us, result.first_us[each.name]
                by_algorithm.setdefault(each.provider, []).append(pair)
        for algorithm, pairs in by_algorithm.items():
            across.setdefault(algorithm, []).append(min(pairs, key=lambda pair: pair[1]))
            found = rank_correlation(pairs)
            if found is not None:
                within.setdefault(algorithm, []).append(found)
    return {
        name: (rank_correlation(pairs), statistics.fmean(within[name]) if name in within else None)
        for name, pairs in sorted(across.items())
    }


def write(path: pathlib.Path, device: str, kind: str, tuned_with: dict, results: list[Result], target: Target) -> None:
    """Write a device's file, whole at every moment. kind: what its times are, of configs.KINDS.

    Entries of an earlier file that still hold and that nothing new takes the place of stay. An earlier file that has
    more than that, or is none of ours, is kept beside it under another name.
    """
    fresh = entries(results)
    keys = {json.dumps(each["key"], sort_keys=True) for each in fresh}
    kept, factors = [], calibration(results, target)
    if path.exists():
        before = _earlier(path, device, kind)
        if before is None or before.stale:
            files.put_aside(path)
        if before is not None:
            kept = [
                dataclasses.asdict(each) for each in before.entries if json.dumps(each.key, sort_keys=True) not in keys
            ]
            factors = configs.Calibration(
                {**before.calibration.ours, **factors.ours}, {**before.calibration.torch, **factors.torch}
            )
    made = sorted([*fresh, *kept], key=lambda each: json.dumps(each["key"], sort_keys=True))
    head = {
        "schema": configs.SCHEMA, "device": device, "kind": kind, "kernels_sha256": configs.kernels_sha256(),
        "tuned_with": tuned_with, "calibration": dataclasses.asdict(factors),
    }  # fmt: skip
    lines = ",\n".join(f"  {json.dumps(each)}" for each in made)
    text = f'{json.dumps(head)[:-1]},\n "entries": [\n{lines}\n ]}}\n'
    configs.parse_device(text, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, text)


def _earlier(path: pathlib.Path, device: str, kind: str) -> configs.DeviceFile | None:
    """The file as it is; None if it is damaged, or of another device or clock."""
    try:
        found = configs.parse_device(path.read_text(encoding="utf-8"), str(path))
    except (configs.DamagedFile, OSError, UnicodeDecodeError) as error:
        warnings.warn(f"groupconv: not continuing a configuration file: {error}", stacklevel=3)
        return None
    return found if (found.device, found.kind) == (device, kind) else None
