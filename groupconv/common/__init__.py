"""What the tools share: layers by name, CSV files, time budgets, random operands and references.

`numerics` makes operands and checks results, `files` writes tables that a kill leaves whole, `progress` has the time
budget of a command and tells how far it is.
"""

from __future__ import annotations

import dataclasses

from ..problem import ConvProblem


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, and what to call it."""

    name: str
    problem: ConvProblem
