"""What the rows of a report or bench say: of which layers, right or wrong, and how "auto" compares with PyTorch."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import statistics
from operator import itemgetter

from groupconv import cost
from groupconv.common import files, grouped
from groupconv.common.files import Row
from groupconv.problem import PLANNED, ConvProblem

from . import host_overhead, training
from . import rows as rows_

FILES = {"bench.csv": rows_.FIELDS, "models.csv": training.FIELDS, "host.csv": host_overhead.FIELDS}
SAME_FORMAT = {"nchw": "torch_contiguous", "nhwc": "torch_channels_last"}
TORCH = tuple(name for name in rows_.PEERS if name.startswith("torch_"))
WIDTHS = ("depthwise", "narrow", "wide")
WIN_ABOVE, LOSS_BELOW = 1.03, 0.97  # speedups between them are ties


def read(folder: pathlib.Path) -> list[list[Row]]:
    """The rows of each of FILES, none for one that is missing; ValueError for one with other columns."""
    paths = {folder / name: fields for name, fields in FILES.items()}
    return [files.read(path, fields) if path.is_file() else [] for path, fields in paths.items()]


def layer_rows(rows: list[Row]) -> list[Row]:
    """The rows that are about a layer, not about the device."""
    return [row for row in rows if row["provider"] not in rows_.LIMITS]


def first_of_each_layer(rows: list[Row]) -> list[Row]:
    return [of_layer[0] for of_layer in grouped(layer_rows(rows), itemgetter("layer")).values()]


def kind(rows: list[Row]) -> str:
    """What the rows' times are: "measured"; where any is not, "modelled" or "stub"."""
    return next((row["kind"] for row in rows if row["kind"] != "measured"), "measured")


def timed(row: Row) -> bool:
    """Whether a row has a time and, as far as they were checked, right numbers. No other is compared or drawn."""
    checked = row["max_rel_err"] and row["err_bound"]
    return bool(row["us_p50"]) and (not checked or float(row["max_rel_err"]) <= float(row["err_bound"]))


def takes(auto: Row) -> str:
    """What a row of "auto" takes: an algorithm, F.conv2d or "dgrad and wgrad"."""
    return auto["note"].split(";")[0].removeprefix("takes ")


def width(row: Row) -> str:
    """The width class of a row's layer, one of WIDTHS."""
    batch, c_in, h_in, w_in, c_out, kh, kw = (int(row[field]) for field in rows_.PROBLEM_FIELDS[:7])
    return cost.width_class(ConvProblem(batch, c_in, h_in, w_in, c_out, kh, kw, groups=int(row["groups"])))


def _alike(rows: list[Row], but: set[str]) -> bool:
    """Whether the layers are the same but for some fields."""
    fields = [field for field in rows_.PROBLEM_FIELDS if field not in but]
    return len({tuple(row[field] for field in fields) for row in layer_rows(rows)}) <= 1


def across_groups(rows: list[Row]) -> bool:
    """Whether the layers differ in nothing but their groups."""
    return _alike(rows, {"groups"})


def across_kernels(rows: list[Row]) -> bool:
    """Whether the layers are depthwise and differ in nothing but a square kernel and its padding."""
    layers = first_of_each_layer(rows)
    sizes = {row["kh"] for row in layers if row["kh"] == row["kw"] and row["groups"] == row["c_in"]}
    free = {"kh", "kw", "pad_top", "pad_bottom", "pad_left", "pad_right"}
    return 1 < len(layers) == len(sizes) and _alike(rows, free)


def formats(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows about layers, by (dtype, layout)."""
    return grouped(layer_rows(rows), itemgetter("dtype", "layout"))


def is_sweep(row: Row) -> bool:
    """Whether a row is of the layers g1, g2, ..., which differ in nothing but their groups."""
    return re.fullmatch(r"g\d+", row["layer"]) is not None


def failed(rows: list[Row]) -> list[Row]:
    """The rows without a time or with wrong numbers; not "auto" where it takes two kernels for "backward"."""
    return [row for row in layer_rows(rows) if not timed(row) and takes(row) != "dgrad and wgrad"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One pass of one layer by "auto" and by the best of PyTorch; `same`: by F.conv2d in the row's memory format.

    All have times and right numbers; `same` is None where F.conv2d has not.
    """

    auto: Row
    best: Row
    same: Row | None

    def over(self, other: Row) -> float:
        """How much faster "auto" is than another."""
        return float(other["us_p50"]) / float(self.auto["us_p50"])

    @property
    def speedup(self) -> float:
        return self.over(self.best)


def pairs(rows: list[Row]) -> list[Pair]:
    """The passes for which both "auto" and PyTorch have a time and right numbers."""
    compared = []
    for same_pass in grouped(layer_rows(rows), itemgetter("layer", "pass", *rows_.PROBLEM_FIELDS)).values():
        by_provider = {row["provider"]: row for row in same_pass if timed(row)}
        by_torch = [by_provider[name] for name in TORCH if name in by_provider]
        if "auto" in by_provider and by_torch:
            best = min(by_torch, key=lambda row: float(row["us_p50"]))
            compared.append(Pair(by_provider["auto"], best, by_provider.get(SAME_FORMAT[best["layout"]])))
    return compared


def limits(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """(GB/s of a copy, TFLOP/s of a matrix product) by dtype, as far as the run found both."""
    copy, matrix = ({row["dtype"]: row for row in rows if row["provider"] == name} for name in rows_.LIMITS)
    return {name: (float(copy[name]["gbps"]), float(row["tflops"])) for name, row in matrix.items() if name in copy}


@dataclasses.dataclass(frozen=True)
class Summary:
    """One pass of the layers of one width class. Speedups are geometric means; None where nothing compares.

    of: "layers" or "sweep". over_best, over_same: as `Pair` has them. fallbacks: how many F.conv2d serves.
    fraction: the median fraction of the limit that "auto" reaches in the `memory_bound` layers that memory bounds.
    """

    of: str
    dtype: str
    layout: str
    pass_: str
    width: str
    layers: int
    over_best: float
    over_same: float | None
    wins: int
    losses: int
    fallbacks: int
    memory_bound: int
    fraction: float | None


def summary(rows: list[Row]) -> list[Summary]:
    """A summary for each dtype, layout, pass and width class, of the layers and of the sweep."""

    def class_of(pair: Pair) -> tuple[str, str, str, str, str]:
        row = pair.auto
        return "sweep" if is_sweep(row) else "layers", row["dtype"], row["layout"], row["pass"], width(row)

    def place(key: tuple[str, str, str, str, str]) -> tuple:
        return *key[:3], PLANNED.index(key[3]), WIDTHS.index(key[4])

    limit_of, by_class, summaries = limits(rows), grouped(pairs(rows), class_of), []
    for key in sorted(by_class, key=place):
        mine = by_class[key]
        gbps, tflops = limit_of.get(key[1], (0.0, 0.0))
        memory_bound = [pair.auto for pair in mine if float(pair.auto["intensity"]) * gbps < tflops * 1e3]
        speedups = [pair.speedup for pair in mine]
        over_same = [pair.over(pair.same) for pair in mine if pair.same]
        summaries.append(
            Summary(
                *key,
                layers=len(mine),
                over_best=statistics.geometric_mean(speedups),
                over_same=statistics.geometric_mean(over_same) if over_same else None,
                wins=sum(speedup > WIN_ABOVE for speedup in speedups),
                losses=sum(speedup < LOSS_BELOW for speedup in speedups),
                fallbacks=sum(takes(pair.auto) == "F.conv2d" for pair in mine),
                memory_bound=len(memory_bound),
                fraction=statistics.median(float(row["fraction"]) for row in memory_bound) if memory_bound else None,
            )
        )
    return summaries


def steps(models: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """The timed rows of models.csv by (model, batch, size, dtype, layout) and provider."""
    by_step = grouped(models, itemgetter("model", "batch", "size", "dtype", "layout"))
    return {key: {row["provider"]: row for row in mine if row["ms_p50"]} for key, mine in by_step.items()}


def step_speedup(step: dict[str, Row]) -> float | None:
    """How much faster a training step is with our layers; None where either has no time."""
    if not {"torch", "groupconv"} <= step.keys():
        return None
    return float(step["torch"]["ms_p50"]) / float(step["groupconv"]["ms_p50"])
