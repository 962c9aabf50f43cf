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


def entry(result: Result) -> configs.Entry | None:
    """The file's entry of a result; None where nothing that a plan could take was timed."""
    torch_us, best = result.torch_us, result.best
    if best is not None:
        algorithm, config, time_us = best.provider, best.config or {}, result.medians_us[best.name]
    elif torch_us is not None:
        algorithm, config, time_us = "torch", {}, torch_us
    else:
        return None
    key = result.task.problem.config_key(result.task.pass_)
    return configs.Entry(key, algorithm, config, round(time_us, 3), None if torch_us is None else round(torch_us, 3))


def entries(results: Iterable[Result]) -> dict[str, configs.Entry]:
    """The entry of each class. Of several layers in a class the one that takes longest speaks for it."""
    by_class: dict[str, configs.Entry] = {}
    for measured in filter(None, map(entry, results)):
        earlier = by_class.get(_class(measured))
        if earlier is None or measured.time_us > earlier.time_us:
            by_class[_class(measured)] = measured
    return by_class


def _class(measured: configs.Entry) -> str:
    return json.dumps(measured.key, sort_keys=True)


def calibration(results: list[Result], target: Target) -> configs.Calibration:
    """Medians of measured over modelled time by algorithm and pass, and of F.conv2d's over its floor."""
    ours: dict[str, list[float]] = {}
    torch: dict[str, list[float]] = {}
    for result in results:
        problem, pass_ = result.task.problem, result.task.pass_
        # Of each algorithm the configuration that a modelled plan would take: the model's first.
        chosen = {contender.provider: contender for contender in reversed(result.raced) if contender.ours}
        for name, contender in chosen.items():
            if contender.modelled_us:
                ours.setdefault(f"{name} {pass_}", []).append(result.first_us[contender.name] / contender.modelled_us)
        if result.torch_us is not None and pass_ != "backward":
            over = result.torch_us / cost.torch_floor_us(problem, pass_, target)
            torch.setdefault(f"{cost.width_class(problem)} {pass_}", []).append(over)
    return configs.Calibration(medians(ours), medians(torch))


def medians(by_name: dict[str, list[float]]) -> dict[str, float]:
    """Of each name that has enough ratios."""
    enough = {name: ratios for name, ratios in sorted(by_name.items()) if len(ratios) >= LEAST_MEASURED}
    return {name: round(statistics.median(ratios), 4) for name, ratios in enough.items()}


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
        for contender in result.raced:
            if contender.modelled_us is not None:
                pair = contender.modelled_us, result.first_us[contender.name]
                by_algorithm.setdefault(contender.provider, []).append(pair)
        for algorithm, pairs in by_algorithm.items():
            across.setdefault(algorithm, []).append(min(pairs, key=lambda pair: pair[1]))
            correlation = rank_correlation(pairs)
            if correlation is not None:
                within.setdefault(algorithm, []).append(correlation)
    return {
        name: (rank_correlation(pairs), statistics.fmean(within[name]) if name in within else None)
        for name, pairs in sorted(across.items())
    }


def write(path: pathlib.Path, device: str, kind: str, tuned_with: dict, results: list[Result], target: Target) -> None:
    """Write a device's file, whole at every moment. kind: what its times are, of configs.KINDS.

    Entries of an earlier file that still hold and that nothing new takes the place of stay. An earlier file that has
    more than that, or is none of ours, is kept beside it under another name.
    """
    earlier = _earlier(path, device, kind) if path.exists() else None
    if path.exists() and (earlier is None or earlier.stale):
        files.put_aside(path)
    by_class, factors = entries(results), calibration(results, target)
    if earlier is not None:
        by_class = {_class(measured): measured for measured in earlier.entries} | by_class
        before = earlier.calibration
        factors = configs.Calibration({**before.ours, **factors.ours}, {**before.torch, **factors.torch})
    head = {
        "schema": configs.SCHEMA, "device": device, "kind": kind, "kernels_sha256": configs.kernels_sha256(),
        "tuned_with": tuned_with, "calibration": dataclasses.asdict(factors),
    }  # fmt: skip
    save(path, head, [dataclasses.asdict(by_class[name]) for name in sorted(by_class)])


def save(path: pathlib.Path, head: dict, entries: list[dict]) -> None:
    """Write a device's file, an entry a line, if it follows the schema; else DamagedFile."""
    lines = ",\n".join(f"  {json.dumps(each)}" for each in entries)
    text = f'{json.dumps(head)[:-1]},\n "entries": [\n{lines}\n ]}}\n'
    configs.parse_device(text, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, text)


def _earlier(path: pathlib.Path, device: str, kind: str) -> configs.DeviceFile | None:
    """The file as it is; None if it is damaged, or of another device or clock."""
    try:
        file = configs.parse_device(path.read_text(encoding="utf-8"), str(path))
    except (configs.DamagedFile, OSError, UnicodeDecodeError) as error:
        warnings.warn(f"groupconv: not continuing a configuration file: {error}", stacklevel=3)
        return None
    return file if (file.device, file.kind) == (device, kind) else None
