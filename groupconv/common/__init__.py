"""What the tools share: layers by name, grouping, CSV files, time budgets, random operands and references.

`numerics` makes operands and checks results, `files` writes tables that a kill leaves whole, `progress` has the time
budget of a command and tells how far it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeVar

from ..problem import ConvProblem


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, and what to call it."""

    name: str
    problem: ConvProblem


T = TypeVar("T")
K = TypeVar("K")


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items of each key, both in order of appearance."""
    by_key: dict[K, list[T]] = {}
    for item in items:
        by_key.setdefault(key(item), []).append(item)
    return by_key
