"""How far a command is: its time budget; a bar on a terminal, elsewhere a line now and then; and where tables go."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0
COLUMNS = 200  # of a table that is written to no terminal


class Deadline:
    """A time budget; None never ends. ValueError for a --budget-seconds that is none."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic):
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"--budget-seconds: {seconds} is not a positive number")
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    @property
    def passed(self) -> bool:
        return self._end is not None and self._clock() >= self._end

    @property
    def left(self) -> float | None:
        """Seconds, not below 0; None of a budget that never ends."""
        return None if self._end is None else max(0.0, self._end - self._clock())


def console() -> Console:
    """Where tables are printed: as wide as the terminal, elsewhere COLUMNS."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else COLUMNS)


@contextlib.contextmanager
def shown(
    command: str, unit: str, total: int | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """What to call, with what was done, after each of `total` (None: it is not known how many) units of work."""
    with (_bar if sys.stderr.isatty() else _lines)(command, unit, total, clock) as step:
        yield step


@contextlib.contextmanager
def _bar(command: str, unit: str, total: int | None, clock: Callable[[], float]) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(command, total=total)
        yield lambda what: progress.update(bar, advance=1, description=what)


@contextlib.contextmanager
def _lines(command: str, unit: str, total: int | None, clock: Callable[[], float]) -> Iterator[Callable[[str], None]]:
    began = told = clock()
    done = 0

    def step(what: str) -> None:
        nonlocal done, told
        done += 1
        if clock() - told >= SECONDS_BETWEEN_LINES:
            told = clock()
            of = "" if total is None else f" of {total}"
            print(f"{command}: {done}{of} {unit}, {told - began:.0f} s", file=sys.stderr, flush=True)

    yield step
