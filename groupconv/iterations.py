"""How often the programs of a launch run their innermost loop: from its TTIR, whose bounds its arguments decide."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .launcher import Launch

_ASSIGNED = re.compile(r"^ *(%\w+) = (\w+\.\w+) (.*?) : (?:[^:]*?)(?: loc\(.*\))?$")
_LOOP = re.compile(r"^( *)(?:%[\w:]+ = )?scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)")
_OPERATIONS: dict[str, Callable] = {
    "arith.addi": np.add, "arith.subi": np.subtract, "arith.muli": np.multiply,
    "arith.minsi": np.minimum, "arith.maxsi": np.maximum,
    "arith.divsi": lambda a, b: (a - np.fmod(a, b)) // b, "arith.remsi": np.fmod,
    "arith.andi": np.bitwise_and, "arith.ori": np.bitwise_or, "arith.select": np.where,
}  # fmt: skip
_COMPARISONS: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal,
    "slt": np.less, "sle": np.less_equal, "sgt": np.greater, "sge": np.greater_equal,
}  # fmt: skip


def of(launch: Launch) -> list[int]:
    """The iterations of each innermost loop, by all programs together, of a launch that has compiled.

    A loop in a branch counts as taken. ValueError where a bound depends on more than the launch: on what memory holds,
    or on an outer loop's variable.
    """
    assert launch.compiled is not None
    lines = launch.compiled.asm["ttir"].splitlines()
    names = launch.kernel.arg_names[-len(launch.scalars) :]
    values = _Values(lines, dict(zip(names, launch.scalars, strict=True)), launch.grid)
    found: list[int] = []
    around: list[tuple[int, np.ndarray]] = []  # the loops that are open: the last line and the iterations of each
    for i, line in enumerate(lines):
        if loop := _LOOP.match(line):
            indent, *bounds = loop.groups()
            first, last, step = map(values.of, bounds)
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(f"{indent}}}"))
            around = [outer for outer in around if outer[0] > i]
            around.append((end, np.maximum(0, -((first - last) // step))))
            if not any(map(_LOOP.match, lines[i + 1 : end])):
                total = np.ones(launch.grid, np.int64)
                for _, times in around:
                    total *= times
                found.append(int(total.sum()))
    return found


class _Values:
    """The integers of a kernel that its arguments and the number of a program decide, for all programs at once."""

    def __init__(self, lines: list[str], arguments: dict, grid: tuple[int, ...]):
        found = filter(None, map(_ASSIGNED.match, lines))
        self._made = {name: (operation, operands) for name, operation, operands in (match.groups() for match in found)}
        self._arguments = {f"%{name}": value for name, value in arguments.items()}
        self._grid = grid

    def of(self, name: str) -> np.ndarray:
        if name in self._arguments:
            return np.asarray(self._arguments[name])
        operation, operands = self._made.get(name, ("", ""))
        if operation == "arith.constant":
            value = operands.split(" ")[0]
            return np.asarray(int(value) if value not in ("true", "false") else value == "true")
        axis = "xyz".find(operands)
        if operation == "tt.get_program_id":
            return np.arange(self._grid[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
        if operation == "tt.get_num_programs":
            return np.asarray(self._grid[axis])
        given = [self.of(operand) for operand in re.findall(r"%\w+", operands)]
        if operation in ("arith.extsi", "arith.extui", "arith.trunci"):
            return given[0]
        if operation == "arith.cmpi":
            return _COMPARISONS[operands.split(",")[0]](*given)
        if operation not in _OPERATIONS:
            raise ValueError(f"a loop's bound depends on {name}, {operation or 'which no operation makes'}")
        return _OPERATIONS[operation](*given)
