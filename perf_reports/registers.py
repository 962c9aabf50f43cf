"""What tiles take of a multiprocessor's registers: compiled, written down, and fitted.

    python -m groupconv.perf_reports.registers --seconds 3600    # compile more tiles, then fit; goes on where it was
    python -m groupconv.perf_reports.registers                   # fit what there is

autotune_configs/registers.csv has a row a compiled tile, of layers of the suite; registers.json what `occupancy` reads:
by GPU kind, algorithm and pass, how registers go by what a tile holds, and where they end; and what compiled tiles
take, by layer.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import itertools
import json
import math
import pathlib
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from unittest import mock

import numpy as np
import triton

from groupconv import devices, dispatch, occupancy, workers
from groupconv.algorithms import GENERAL, REGISTRY, able, divided, fitting, tile_of
from groupconv.common import Layer, files
from groupconv.compiling import command
from groupconv.compiling.compiler import Compiler, Job
from groupconv.problem import FINISHED, LAYOUTS, PLANNED, ConvProblem

from . import layers

FOLDER = pathlib.Path(__file__).parents[1] / "autotune_configs"
TARGETS = ("sm_90", "sm_80", "gfx942", "sm_100", "gfx1100")  # one a kind of matrix unit
DTYPES = ("bf16", "tf32", "fp32", "bf16x3")
LARGEST = 1.6  # times the registers that there are: of tiles that hold more nobody needs to know
ENOUGH = 8  # tiles without spills, to fit by
SPILL_COSTS = 20  # tiles that do not spill: what one that does may cost where the limit is drawn
CAUTION = 0.85  # of the registers that there are, as estimated, at most: what compiles varies around it; a guess
PENDING = 8
WIDTH = "width "  # of the names of layers that stand for a group width
Suites = dict[tuple[str, str], list[Layer]]  # by dtype and layout
Tables = tuple[dict[str, occupancy.Registers], dict[str, list[list[int]]]]  # as occupancy.tables has them


@dataclasses.dataclass(frozen=True)
class Row:
    """A tile that was compiled. registers: of a thread. failed: what the compiler raised."""

    target: str
    triton: str
    algorithm: str
    pass_: str
    dtype: str
    layout: str
    layer: str
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    failed: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.target, self.algorithm, self.pass_, self.dtype, self.layout, self.layer, self.tile

    @property
    def sizes(self) -> dict[str, int]:
        fields = (*REGISTRY[self.algorithm].BLOCKS, "num_warps", "num_stages")
        return dict(zip(fields, map(int, self.tile.split()), strict=True))


def layers_of(dtype: str, layout: str) -> list[Layer]:
    """What `groupconv compile` takes: the suite, and a layer of every class of group widths."""
    named = [Layer(f"{WIDTH}{problem.cin_g}", problem) for problem in command.widths(dtype, layout)]
    return layers.suite(dtype, layout) + named


Tile = tuple[str, str, str, Layer, dict[str, int]]  # target, algorithm, pass, layer, tile


def collect(rows: list[Row], tiles: Iterable[Tile], end: float, count: int) -> Iterator[Row]:
    """Compile tiles that no row has, until the clock says `end`."""
    known = {row.key for row in rows}
    pending: collections.deque[tuple[Row, Job]] = collections.deque()
    with Compiler(count) as compiler:
        for target, name, pass_, layer, tile in tiles:
            if time.monotonic() > end:
                break
            problem, values = layer.problem, " ".join(map(str, tile.values()))
            row = Row(
                target, triton.__version__, name, pass_, problem.dtype, problem.layout, layer.name, values, 0, 0, 0
            )
            if row.key in known:
                continue
            known.add(row.key)
            problem, pass_ = compiled_as(problem, pass_)
            job = Job(name, pass_, divided(name, problem, pass_, tile, devices.named(target))[0], problem, target)
            compiler.submit(job)
            pending.append((row, job))
            if len(pending) > PENDING:
                yield _answered(compiler, *pending.popleft())
        while pending:
            yield _answered(compiler, *pending.popleft())


def planned(
    suites: Suites,
    targets: Sequence[str],
    passes: Sequence[str],
    algorithms: Sequence[str],
    tables: Tables,
    hopeful: bool,
) -> Iterator[Tile]:
    """What the plans of all layers take, or, hopeful, would take if every tile fitted that is not known to spill; where
    only widths are named, the general algorithm's.
    """
    kinds, tiles = tables
    if hopeful:
        hoped = {kind for kind in kinds if kind.split()[-1] in passes}
        kinds = kinds | {kind: kinds[kind]._replace(most=LARGEST) for kind in hoped}
    with mock.patch.object(occupancy, "tables", return_value=(kinds, tiles)):
        _forget()
        for suite, target in itertools.product(suites.values(), targets):
            on = devices.named(target)
            for layer, pass_ in itertools.product(suite, passes):
                if pass_ == FINISHED:
                    for job in command.finished(layer.problem, on):
                        if job.algorithm in algorithms:
                            yield target, job.algorithm, pass_, layer, tile_of(job.algorithm, job.config)
                    continue
                names = [name for name in able(layer.problem, pass_, on) if name in algorithms]
                if layer.name.startswith(WIDTH):
                    names = [name for name in names if name == GENERAL]
                if names:
                    name, config, _ = dispatch.best(layer.problem, pass_, on, names)
                    tile = tile_of(name, config)
                    yield target, name, pass_, layer, tile
    _forget()


def compiled_as(problem: ConvProblem, pass_: str) -> tuple[ConvProblem, str]:
    """The problem and the pass whose kernel a row is of."""
    return (command.ended(problem), "fprop") if pass_ == FINISHED else (problem, pass_)


def _forget() -> None:
    """What was concluded from the tables."""
    occupancy.room.cache_clear()
    fitting.cache_clear()


def drawn(
    draw: random.Random, suites: Suites, targets: Sequence[str], passes: Sequence[str], algorithms: Sequence[str]
) -> Iterator[Tile]:
    """Tiles at random, as many of each kind, without an end. Of what ends in more than a sum, none."""
    while True:
        kinds = itertools.product(suites.values(), targets, algorithms, [name for name in passes if name in PLANNED])
        for suite, target, name, pass_ in kinds:
            if found := _drawn(draw, target, name, pass_, suite):
                yield target, name, pass_, *found


def _drawn(draw: random.Random, target: str, name: str, pass_: str, layers: list[Layer]) -> tuple[Layer, dict] | None:
    """A layer and a tile of it that may fit; None if there is none."""
    on, module = devices.named(target), REGISTRY[name]
    room = occupancy.room(name, pass_, on, layers[0].problem.dtype)
    serving = [layer for layer in layers if module.supports(layer.problem, pass_, on) is None]
    draw.shuffle(serving)
    for layer in serving:
        tiles = [tile for alternatives in module.tiles(layer.problem, pass_, on) for tile in alternatives]
        draw.shuffle(tiles)
        for tile in tiles:
            held = module.held(layer.problem, pass_, tile, on)
            if held.shared_bytes <= on.shared_bytes and room.share(held) <= LARGEST:
                return layer, tile
    return None


def _answered(compiler: Compiler, row: Row, job: Job) -> Row:
    found = compiler.answer(job)
    if not found.kernels:
        return dataclasses.replace(row, failed=found.failed)
    used = found.kernels[0]
    return dataclasses.replace(
        row, registers=used.registers, spill_bytes=used.spill_bytes, shared_bytes=used.shared_bytes
    )


# --- Fitting ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sample:
    """A compiled tile as the fit sees it. parts: what a thread holds; available: the registers that it can have."""

    row: Row
    layer: str  # as registers.json calls it
    parts: tuple[float, float, float, float]
    available: int

    @property
    def spills(self) -> bool:
        return bool(self.row.spill_bytes or self.row.failed)

    def share(self, fit: occupancy.Registers) -> float:
        """Of the registers that a thread can have, as estimated."""
        weights = (fit.constant, fit.a_sum, fit.a_word, fit.an_access)
        return sum(weight * part for weight, part in zip(weights, self.parts, strict=True)) / self.available


def samples(rows: Iterable[Row], suites: Suites) -> dict[str, list[Sample]]:
    """Rows by `occupancy.Room.kind`."""
    problems = {key: {layer.name: layer.problem for layer in layers} for key, layers in suites.items()}
    by_kind = collections.defaultdict(list)
    for row in rows:
        on, problem = devices.named(row.target), problems[row.dtype, row.layout][row.layer]
        held = REGISTRY[row.algorithm].held(*compiled_as(problem, row.pass_), row.sizes, on)
        threads, room = on.warp_size * held.warps, occupancy.room(row.algorithm, row.pass_, on, row.dtype)
        parts = (1.0, held.sums / threads, held.words / threads, held.accesses / threads)
        available = room.most_registers(held.warps)
        by_kind[room.kind].append(Sample(row, room.layer(problem), parts, available))
    return by_kind


def fitted(chosen: list[Sample]) -> occupancy.Registers:
    """Weights of least squares over what did not spill, none of them negative; and a limit that keeps out what did."""
    sound = [sample for sample in chosen if not sample.spills]
    fit = occupancy.UNKNOWN
    if len(sound) >= ENOUGH:
        parts = np.array([sample.parts for sample in sound])
        weights = least_squares(parts, np.array([float(sample.row.registers) for sample in sound]))
        constant, sums, words, accesses = (float(f"{weight:.3g}") for weight in weights)
        fit = occupancy.Registers(constant, sums, words, accesses, 0.0)
    most, gain, highest = 0.0, 0, 0
    for share, spills in sorted((sample.share(fit), sample.spills) for sample in chosen):
        gain += -SPILL_COSTS if spills else 1
        if gain > highest:
            highest, most = gain, share
    return fit._replace(most=min(CAUTION, math.ceil(100 * most) / 100))


def least_squares(parts: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Weights, none of them negative. The best are plain least squares of some of the parts: all subsets are tried."""
    count, least, best = parts.shape[1], np.inf, np.zeros(parts.shape[1])
    for subset in range(1, 2**count):
        kept = [part for part in range(count) if subset >> part & 1]
        weights = np.linalg.lstsq(parts[:, kept], taken, rcond=None)[0]
        error = float(np.square(parts[:, kept] @ weights - taken).sum())
        if weights.min() >= 0 and error < least:
            least, best = error, np.zeros(count)
            best[kept] = weights
    return best


def tables(rows: list[Row], suites: Suites) -> Tables:
    """What registers.json says: of each kind, and of the tiles of a layer their sizes, registers (none if they spill or
    failed) and shared memory.
    """
    by_kind = samples(rows, suites)
    tiles: dict[str, dict[tuple[int, ...], tuple[int, int]]] = collections.defaultdict(dict)
    for sample in itertools.chain.from_iterable(by_kind.values()):
        sizes, taken = tuple(sample.row.sizes.values()), (sample.row.registers, sample.row.shared_bytes)
        of_layer = tiles[sample.layer]
        if sample.spills:
            of_layer[sizes] = 0, sample.row.shared_bytes
        elif of_layer.get(sizes, (1, 0))[0]:  # a layer's name stands for several, and the worst counts
            of_layer[sizes] = max(taken, of_layer.get(sizes, (0, 0)))
    compiled = {layer: [[*sizes, *taken] for sizes, taken in sorted(of.items())] for layer, of in sorted(tiles.items())}
    fits = {}
    for kind, chosen in sorted(by_kind.items()):
        few = sum(not sample.spills for sample in chosen) < ENOUGH
        bare = by_kind.get(f"{kind.removesuffix(FINISHED)}fprop", []) if few and kind.endswith(FINISHED) else []
        fits[kind] = fitted(chosen + bare)  # what follows takes little more
    return fits, compiled


def text(tables: Tables) -> str:
    """That of registers.json, a line an entry."""

    def lines(entries: dict) -> str:
        return ",\n  ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())

    kinds, compiled = {kind: fit._asdict() for kind, fit in tables[0].items()}, tables[1]
    return f'{{"registers": {{\n  {lines(kinds)}}},\n "compiled": {{\n  {lines(compiled)}}}}}\n'


def read(path: pathlib.Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(
                row["target"], row["triton"], row["algorithm"], row["pass_"], row["dtype"], row["layout"], row["layer"],
                row["tile"], int(row["registers"]), int(row["spill_bytes"]), int(row["shared_bytes"]), row["failed"],
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.0, help="to compile for, before the fit")
    parser.add_argument("--jobs", type=int, default=workers.processes(), help="processes that compile (%(default)s)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--passes", nargs="+", choices=(*PLANNED, FINISHED), default=(*PLANNED, FINISHED))
    parser.add_argument("--algorithms", nargs="+", choices=tuple(REGISTRY), default=tuple(REGISTRY))
    parser.add_argument(
        "--planned", choices=("hopefully", "now"),
        help="compile no tiles at random, but what would be planned if all fitted that are not known to spill, or what"
        " is planned now; again, until plans stay as they are",
    )  # fmt: skip
    args = parser.parse_args()
    suites = {(dtype, layout): layers_of(dtype, layout) for dtype in DTYPES for layout in LAYOUTS}
    chosen = {key: suite for key, suite in suites.items() if key[0] in args.dtypes and key[1] in args.layouts}
    path = FOLDER / "registers.csv"
    rows = read(path)
    fields = [field.name for field in dataclasses.fields(Row)]
    end = time.monotonic() + args.seconds
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if not rows:
            writer.writeheader()
        found = args.seconds > 0
        while found:  # once, but of what is planned as long as plans change
            tiles = drawn(random.Random(len(rows)), chosen, args.targets, args.passes, args.algorithms)
            if args.planned:
                hopeful = args.planned == "hopefully"
                known = tables(rows, suites)
                tiles = iter(list(planned(chosen, args.targets, args.passes, args.algorithms, known, hopeful)))
            found = False
            for row in collect(rows, tiles, end, args.jobs):
                found = args.planned is not None
                rows.append(row)
                writer.writerow(dataclasses.asdict(row))
                file.flush()
    files.write_atomically(FOLDER / "registers.json", text(tables(rows, suites)))


if __name__ == "__main__":
    main()
