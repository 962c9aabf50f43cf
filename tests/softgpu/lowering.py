"""A parsed kernel as the program that core.c runs: rows of integers, whose operands are offsets of registers.

A register is an array over the threads of a program; immediates are registers that are filled once. Instructions of
plain arithmetic refer to generated functions, one for each form (arithmetic.py); how others are lowered is in
instructions.py. Anything unknown raises `Unsupported`.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Iterator

import networkx

from . import arithmetic
from .parser import Kernel, Statement, Unsupported, split_operands

SHARED_BASE = 0x400  # the address of a program's shared memory
OPERATIONS = (
    *("NOP", "LDG", "STG", "LDS", "STS", "LDPARAM", "PARAMADDR", "CPASYNC", "CPCOMMIT", "CPWAIT", "CPWAITALL"),
    *("LDMATRIX", "STMATRIX", "MMA", "WGMMA", "WGFENCE", "WGCOMMIT", "WGWAIT", "TMALOAD", "TMASTORE", "BULKCOMMIT"),
    *("BULKWAIT", "SHFL", "VOTE", "REDUX", "ATOM", "ACTIVEMASK", "ELECT", "MBINIT", "MBINVAL", "MBEXPECT"),
    *("MBARRIVE", "MBWAIT", "FENCEPROXY", "WARPSYNC", "BAR", "RET", "BRA", "MOVMATRIX"),
)
OPS = {name: number for number, name in enumerate(OPERATIONS)}
FIRST_ALU = 64  # operations from here on are functions of arithmetic
LEADER, WRITES_WGMMA_REGISTER = 1, 2  # flags: a block begins here; a register that some wgmma uses is written
SPECIAL = [
    "tid.x", "tid.y", "tid.z", "ntid.x", "ntid.y", "ntid.z", "ctaid.x", "ctaid.y", "ctaid.z",
    "nctaid.x", "nctaid.y", "nctaid.z", "laneid", "warpid",
]  # fmt: skip
_ADDRESS = re.compile(r"\[\s*([%$\w@]+)\s*(?:\+\s*(-?\s*\w+))?\s*\]")


@dataclasses.dataclass
class Row:
    """An instruction as core.c has it; the fields in the order of its struct."""

    op: int
    guard: int  # the predicate's register, -1 without
    negated: int
    target: int  # of a branch
    operands: int  # where in the pool they begin
    operand_count: int
    registers: int  # where in the pool those it writes begin; those it reads follow
    written: int
    used: int  # written and read
    flags: int
    values: tuple[int, ...]  # five, by operation
    line: int
    rank: int = 0  # where it would be if blocks lay in the order in which parts of a warp are to run them

    def __iter__(self):
        *fields, values, line, rank = (getattr(self, field.name) for field in dataclasses.fields(self))
        return iter((*fields, *values, line, rank))


@dataclasses.dataclass
class Program:
    """What core.c runs. rows and their statements; forms: of arithmetic, which operations from FIRST_ALU on number."""

    rows: list[Row]
    statements: list[Statement]
    pool: list[int]
    register_bytes: int
    constants: list[tuple[int, int, int]]  # register, bytes, value
    special: int  # where in the pool the registers of SPECIAL are
    forms: list[arithmetic.Form]
    blocks: list[int]  # the instructions that blocks begin with
    shared_granule: int  # log2 of the bytes that accesses of shared memory are tracked by
    global_granule: int


def lower(kernel: Kernel, threads: int) -> Program:
    """The program of a kernel of so many threads."""
    from .instructions import lower_statement

    low = Lowering(kernel, threads)
    for item in kernel.body:
        if isinstance(item, tuple):
            low.labels[item[1]] = len(low.rows)
            continue
        try:
            lower_statement(low, item)
        except (Unsupported, KeyError, ValueError, IndexError, StopIteration, AssertionError) as error:
            why = str(error) if isinstance(error, Unsupported) else f"{type(error).__name__} {error}"
            raise Unsupported(f"{kernel.name}, PTX line {item.line}: {item.text}: {why}") from error
    low.emit(Statement(0, None, None, False, "ret", [], (0,), "ret (end)"), "RET")
    return low.finished()


class Lowering:
    """A program in the making: registers by name, constants, rows."""

    def __init__(self, kernel: Kernel, threads: int):
        self.kernel = kernel
        self.lanes = -(-threads // 32) * 32
        self.params = {param.name: param.offset for param in kernel.params}
        self.rows: list[Row] = []
        self.statements: list[Statement] = []
        self.pool: list[int] = []
        self.labels: dict[tuple[int, str], int] = {}
        self.branches: list[tuple[int, str, tuple[int, ...]]] = []  # row, label, scope
        self.wgmma_registers: set[int] = set()
        self.shared_widths, self.global_widths = [16], [16]  # bytes of accesses
        self._bytes = 0
        self._registers: dict[str, int] = {}
        self._special: dict[str, int] = {}
        self._constants: dict[tuple[int, int], int] = {}
        self._forms: dict[arithmetic.Form, int] = {}

    def _allocate(self, width: int) -> int:
        offset = self._bytes
        self._bytes += -(-self.lanes * width // 64) * 64
        return offset

    def _declared(self, name: str, scope) -> str | None:
        """The name under which a register is declared, in the innermost block around."""
        inner = (f"{name}@{s}" for s in reversed(scope))
        return next((found for found in (*inner, name) if found in self.kernel.registers), None)

    def register(self, name: str, scope) -> tuple[int, int]:
        """(offset, bytes) of a register."""
        found = self._declared(name, scope)
        if found is None:
            raise Unsupported(f"register {name}")
        if found not in self._registers:
            self._registers[found] = self._allocate(self.kernel.registers[found])
        return self._registers[found], self.kernel.registers[found]

    def constant(self, value: int, width: int) -> int:
        """The offset of a register that holds a value in all threads."""
        value = int(value != 0) if width == 1 else value & ((1 << (8 * width)) - 1)
        if (value, width) not in self._constants:
            self._constants[value, width] = self._allocate(width)
        return self._constants[value, width]

    def source(self, text: str, scope, width: int = 4) -> tuple[int, int]:
        """(offset, bytes) of a source operand; immediates take `width`."""
        if text.startswith("!"):
            raise Unsupported(f"negated operand {text}")
        if self._declared(text, scope):
            return self.register(text, scope)
        if text.startswith("%"):
            if text[1:] not in SPECIAL:
                raise Unsupported(f"special register {text}")
            if text not in self._special:
                self._special[text] = self._allocate(4)
            return self._special[text], 4
        value = immediate(text)
        if value is None:
            raise Unsupported(f"operand {text}")
        return self.constant(value, width), width

    def sources(self, text: str, scope, width: int = 4) -> list[int]:
        """The offsets of an operand in braces, or of one without."""
        return [self.source(name, scope, width)[0] for name in vector(text)]

    def address(self, text: str, scope, width: int) -> tuple[int, int]:
        """(offset of the register, what is added) of an address of `width` bytes."""
        found = _ADDRESS.fullmatch(text.strip())
        if not found:
            raise Unsupported(f"address {text}")
        added = 0 if found[2] is None else immediate(found[2])
        register, bytes_ = self.source(found[1], scope)
        if bytes_ != width or added is None:
            raise Unsupported(f"address {text}")
        return register, added

    def emit(self, s: Statement, op: str | int, operands=(), writes=(), reads=(), values=()) -> None:
        """A row. operands: what core.c reads of the pool; writes, reads: registers that may not be in flight."""
        guard = -1
        if s.guard is not None:
            guard = self.register(s.guard, s.scope)[0]
            reads = (*reads, guard)
        at = len(self.pool)
        self.pool.extend((*operands, *writes, *reads))
        self.rows.append(Row(
            OPS[op] if isinstance(op, str) else op, guard, int(s.negated), 0, at, len(operands), at + len(operands),
            len(writes), len(writes) + len(reads), 0, (*values, 0, 0, 0, 0, 0)[:5], s.line,
        ))  # fmt: skip
        self.statements.append(s)

    def arithmetic(self, s: Statement, op: str, to: tuple[int, int], sources: list[tuple[int, int]]) -> None:
        """A row of arithmetic on registers given as (offset, bytes)."""
        form = (op, (to[1], *(width for _, width in sources)))
        if arithmetic.statement(*form) is None:
            raise Unsupported(f"no such arithmetic: {op}")
        number = self._forms.setdefault(form, len(self._forms))
        offsets = [offset for offset, _ in sources]
        self.emit(s, FIRST_ALU + number, [to[0], *offsets], [to[0]], offsets)

    def finished(self) -> Program:
        for row, name, scope in self.branches:
            found = next((self.labels[s, name] for s in reversed(scope) if (s, name) in self.labels), None)
            if found is None:
                raise Unsupported(f"{self.kernel.name}: label {name}")
            self.rows[row].target = found
        ends = {OPS[name] for name in ("BRA", "BAR", "RET", "MBWAIT")}
        blocks = {0, *(row.target for row in self.rows if row.op == OPS["BRA"])}
        blocks |= {n + 1 for n, row in enumerate(self.rows[:-1]) if row.op in ends}
        for n in blocks:
            self.rows[n].flags |= LEADER
        for rank, n in enumerate(self._in_order(sorted(blocks))):
            self.rows[n].rank = rank
        for row in self.rows:
            written = self.pool[row.registers : row.registers + row.written]
            if row.op != OPS["WGMMA"] and self.wgmma_registers.intersection(written):
                row.flags |= WRITES_WGMMA_REGISTER
        special = len(self.pool)
        self.pool.extend(self._special.get(f"%{name}", -1) for name in SPECIAL)
        constants = [
            (offset, width, value - (1 << 64) if value >= 1 << 63 else value)
            for (value, width), offset in self._constants.items()
        ]
        shared, global_ = (min(2, min(widths).bit_length() - 1) for widths in (self.shared_widths, self.global_widths))
        return Program(
            self.rows, self.statements, self.pool, self._bytes, constants, special, list(self._forms), sorted(blocks),
            shared, global_,
        )  # fmt: skip

    def _in_order(self, blocks: list[int]) -> Iterator[int]:
        """All rows, each block after all from which it can be reached but by going round a loop, a loop's together:
        where parts of a warp run in this order, they meet again where their ways do, wherever a compiler put that.
        """
        graph = networkx.DiGraph()
        ends = dict(zip(blocks, [*blocks[1:], len(self.rows)], strict=True))
        for block, end in ends.items():
            last = self.rows[end - 1]
            graph.add_node(block)
            if last.op == OPS["BRA"]:
                graph.add_edge(block, last.target)
            if end in ends and (last.guard >= 0 or last.op not in (OPS["BRA"], OPS["RET"])):
                graph.add_edge(block, end)
        for block in _topological(graph, blocks[0]):
            yield from range(block, ends[block])


def _topological(graph: networkx.DiGraph, first: int) -> Iterator[int]:
    """The blocks of a graph without the edges that close its loops, which are entered by `first`, then by theirs."""
    loops = networkx.condensation(graph)
    for loop in networkx.lexicographical_topological_sort(loops, key=lambda loop: min(loops.nodes[loop]["members"])):
        members = loops.nodes[loop]["members"]
        if len(members) == 1:
            yield from members
            continue
        entries = {to for at, to in graph.edges if to in members and at not in members}
        entry = first if first in members else min(entries or members)
        inside = networkx.DiGraph(graph.subgraph(members))
        inside.remove_edges_from([edge for edge in inside.edges if edge[1] == entry])
        yield from _topological(inside, entry)


def vector(text: str) -> list[str]:
    """The names in braces, or the one without."""
    text = text.strip()
    return split_operands(text[1:-1]) if text.startswith("{") else [text]


def immediate(text: str) -> int | None:
    """The bits of a number; None of anything else."""
    text = text.strip()
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return int(found[1], 16)
    if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return int(found[1], 16)
    if found := re.fullmatch(r"(-?)\s*0[xX]([0-9a-fA-F]+)U?", text):
        return int(found[2], 16) * (-1 if found[1] else 1)
    if re.fullmatch(r"-?\s*\d+U?", text):
        return int(text.replace(" ", "").rstrip("U"))
    if text == "global_smem":
        return SHARED_BASE
    if re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", text):
        return struct.unpack("<I", struct.pack("<f", float(text)))[0]
    return None


def operations_header() -> str:
    """The numbers of core.c's operations."""
    lines = [f"#define OP_{name} {number}" for name, number in OPS.items()]
    return "\n".join([f"#define FIRST_ALU {FIRST_ALU}", *lines]) + "\n"
