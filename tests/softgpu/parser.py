"""Reading PTX: an entry's parameters and registers, and its statements with their lines of PTX and of Python."""

from __future__ import annotations

import dataclasses
import re

# Bytes of a register or operand of each type.
WIDTH = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
    "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "s16x2": 4, "u16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8,
    "f64": 8,
}  # fmt: skip


class Unsupported(Exception):
    """An instruction, modifier or operand that the software GPU does not know."""


@dataclasses.dataclass
class Statement:
    """One instruction. scope: the numbers of the blocks in braces around it, the outermost first."""

    line: int
    loc: tuple[int, int] | None  # file number and line, of Python
    guard: str | None
    negated: bool
    op: str
    operands: list[str]
    scope: tuple[int, ...]
    text: str


@dataclasses.dataclass
class Parameter:
    name: str
    bytes: int
    offset: int


@dataclasses.dataclass
class Kernel:
    """A parsed entry. body: statements, and ("label", (scope, name)) where a label stands."""

    name: str
    params: list[Parameter]
    param_bytes: int
    threads: int | None
    registers: dict[str, int]  # name, or name@scope in an inner block -> bytes
    body: list
    files: dict[int, str]


def split_operands(text: str) -> list[str]:
    """The parts between commas, but for those in brackets or braces."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return [*found, rest] if rest else found


def parse(text: str) -> Kernel:
    """The one entry of a PTX module as Triton writes it; Unsupported where it is anything else."""
    parser = _Parser()
    for number, raw in enumerate(text.splitlines(), 1):
        if line := re.sub(r"//.*", "", raw).strip():
            parser.read(number, line)
    if parser.name is None:
        raise Unsupported("no entry")
    return Kernel(
        parser.name, parser.params, -(-parser.param_bytes // 8) * 8, parser.threads, parser.registers, parser.body,
        {int(n): name for n, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)},
    )  # fmt: skip


class _Parser:
    """Goes through lines; `read` is the method for where it is in the module."""

    def __init__(self):
        self.read = self._read_module
        self.name: str | None = None
        self.threads: int | None = None
        self.params: list[Parameter] = []
        self.param_bytes = 0
        self.registers: dict[str, int] = {}
        self.body: list = []
        self.loc: tuple[int, int] | None = None
        self.scopes, self.next_scope = [0], 1
        self.pending, self.pending_line = "", 0

    def _read_module(self, number: int, line: str) -> None:
        """Of module variables, only libdevice's name of an option may be there, which no instruction reads."""
        if found := re.match(r"\.visible\s+\.entry\s+(\w+)\s*\(?", line):
            self.name = found[1]
            self.read = self._read_header if ")" in line else self._read_parameter
        elif line.startswith((".func", ".visible .func")):
            raise Unsupported(f"line {number}: functions: {line}")
        elif line.startswith((".global", ".visible .global", ".const")) and "_$_str" not in line:
            raise Unsupported(f"line {number}: module variables: {line}")

    def _read_parameter(self, number: int, line: str) -> None:
        if line.startswith(")"):
            self.read = self._read_header
            return
        found = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?"
            r"(\w+)(?:\[(\d+)\])?,?\s*(\))?$",
            line,
        )
        if not found:
            raise Unsupported(f"line {number}: parameter: {line}")
        size = WIDTH[found[2]] * int(found[4] or 1)
        align = int(found[1] or WIDTH[found[2]])
        offset = -(-self.param_bytes // align) * align
        self.params.append(Parameter(found[3], size, offset))
        self.param_bytes = offset + size
        if found[5]:
            self.read = self._read_header

    def _read_header(self, number: int, line: str) -> None:
        if found := re.match(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", line):
            self.threads = int(found[1]) * int(found[2] or 1) * int(found[3] or 1)
        if line.startswith("{"):
            self.read = self._read_body

    def _read_body(self, number: int, line: str) -> None:
        if not self.pending:
            if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
                self.loc = (int(found[1]), int(found[2]))
                return
            if line.startswith((".pragma", ".file")):
                return
            self.pending_line = number
        self.pending = f"{self.pending} {line}".strip()
        while self.pending and self._take(number):
            self.pending = self.pending.strip()

    def _take(self, number: int) -> bool:
        """Take a brace, a label or a statement off what is pending; False where the statement is not complete."""
        if self.pending[0] == "{":
            self.scopes = [*self.scopes, self.next_scope]
            self.next_scope += 1
            self.pending = self.pending[1:]
        elif self.pending[0] == "}":
            self.scopes = self.scopes[:-1]
            self.pending = self.pending[1:]
            if not self.scopes:
                self.read, self.pending = self._read_nothing, ""
        elif found := re.match(r"([$\w]+):(?!:)\s*", self.pending):
            self.body.append(("label", (self.scopes[-1], found[1])))
            self.pending = self.pending[found.end() :]
        elif ";" in self.pending:
            statement, self.pending = self.pending.split(";", 1)
            self._statement(statement.strip())
            self.pending_line = number
        else:
            return False
        return True

    def _read_nothing(self, number: int, line: str) -> None:
        """After the entry: debug sections."""

    def _statement(self, text: str) -> None:
        if not text:
            return
        if found := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
            self._declare(WIDTH[found[1]], found[2])
        elif text.startswith("."):
            if re.match(r"\.(shared|local)\b", text):
                raise Unsupported(f"line {self.pending_line}: {text}")
        elif found := re.match(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)$", text, re.S):
            negated, guard, op, rest = found.groups()
            operands, scope = split_operands(rest), tuple(self.scopes)
            self.body.append(Statement(self.pending_line, self.loc, guard, bool(negated), op, operands, scope, text))
        else:
            raise Unsupported(f"line {self.pending_line}: {text}")

    def _declare(self, width: int, names: str) -> None:
        for each in split_operands(names):
            if many := re.match(r"(%?\w+)<(\d+)>", each):
                self.registers.update({f"{many[1]}{i}": width for i in range(int(many[2]))})
            else:
                self.registers[each if len(self.scopes) == 1 else f"{each}@{self.scopes[-1]}"] = width
