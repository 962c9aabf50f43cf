"""What a compiled kernel takes: registers, spills, shared memory, and the instructions of its machine code."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable

import triton

_BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_SASS_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.x]*)", re.M)
_SASS_LABEL = re.compile(r"^(\.\w+):")
_SASS_TARGET = re.compile(r"`\((\.L_\w+)\)")
_SASS_CONDITION = re.compile(r"@!?U?P\w+ |BRA\S* !?U?[PR]\w+,")  # of a branch: a predicate before it or after
_AMD_OPCODE = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)", re.M)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stretch of NVIDIA machine code asks of the machine, if one program runs all of it once.

    issues: instructions, one for each warp that runs it. multiply_adds: FMA instructions, one for each thread.
    matrix_multiply_adds: of matrix instructions whose opcode has their shape, which those of sm_100 lack. loaded_bytes,
    stored_bytes: asked of global memory, by threads that a mask leaves out too, but for tile_loads: loads by a tensor
    descriptor, whose opcode has no size.
    """

    issues: int
    multiply_adds: int
    matrix_multiply_adds: int
    loaded_bytes: int
    stored_bytes: int
    tile_loads: int = 0


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. Instructions are counted in the code, not as executed.

    matrix: on the matrix unit. matrix_n: the most columns of one of them, 0 where the opcode does not say.
    loads, stores: of global memory; wide_*: those of 16 bytes a thread.
    code, loops: the work of all instructions, and of one iteration of each innermost loop; None and empty for AMD.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: str  # the opcode, "" where there is none
    matrix_count: int
    matrix_n: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    instructions: int
    code: Work | None = None
    loops: tuple[Work, ...] = ()


def of(compiled) -> Resources:
    """The resources of a triton CompiledKernel, for an NVIDIA or AMD target.

    FileNotFoundError where Triton came without NVIDIA's disassembler, as some distributions have it.
    """
    code: Work | None = None
    loops: tuple[Work, ...] = ()
    if "cubin" in compiled.asm:
        registers, spills, sass = _nvidia(compiled.asm["cubin"])
        opcodes = _SASS_OPCODE.findall(sass)
        warps = compiled.metadata.num_warps
        code, loops = _work(opcodes, warps), tuple(_work(loop, warps) for loop in innermost_loops(sass))
        wide = lambda op: ".128" in op  # noqa: E731
        loads = [op for op in opcodes if _is_load(op)]
        stores = [op for op in opcodes if _is_store(op)]
        matrix = [op for op in opcodes if _is_matrix(op)]
    else:
        registers, spills, opcodes = _amd(compiled.asm["amdgcn"])
        wide = lambda op: op.endswith(("x4", "b128"))  # noqa: E731
        loads = [op for op in opcodes if re.match(r"(global|buffer|flat)_load", op)]
        stores = [op for op in opcodes if re.match(r"(global|buffer|flat)_store", op)]
        matrix = [op for op in opcodes if re.match(r"v_s?mfmac?|v_mfma|v_wmma", op)]
    names = collections.Counter(op.split(".")[0] for op in matrix)
    return Resources(
        registers=registers,
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        matrix=names.most_common(1)[0][0] if names else "",
        matrix_count=len(matrix),
        matrix_n=max(map(_columns, matrix), default=0),
        loads=len(loads),
        wide_loads=sum(map(wide, loads)),
        stores=len(stores),
        wide_stores=sum(map(wide, stores)),
        instructions=len(opcodes),
        code=code,
        loops=loops,
    )


def _nvidia(cubin: bytes) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = run(os.path.join(_BIN, "cuobjdump"), "-res-usage", file.name)
        code = run(os.path.join(_BIN, "nvdisasm"), file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]), code


def _amd(assembly: str) -> tuple[int, int, list[str]]:
    def note(key):
        return max((int(v) for v in re.findall(rf"\.{key}:\s*(\d+)", assembly)), default=0)

    return note("vgpr_count"), 4 * note("vgpr_spill_count"), _AMD_OPCODE.findall(assembly)


def _is_load(op: str) -> bool:
    return re.match(r"LDG|UTMALDG", op) is not None and "DEPBAR" not in op


def _is_store(op: str) -> bool:
    return re.match(r"STG|UTMASTG", op) is not None


def _is_matrix(op: str) -> bool:
    return re.match(r"[HI]G?MMA|U?TC\w*MMA|QGMMA|UTCHMMA", op) is not None


def _is_fma(op: str) -> bool:
    return re.match(r"FFMA|DFMA", op) is not None


def _work(opcodes: Iterable[str], warps: int) -> Work:
    threads = 32 * warps
    issues = fmas = products = loaded = stored = tiles = 0
    for op in opcodes:
        issues += warps
        fmas += threads * _is_fma(op)
        products += _products(op) * warps
        tiles += op.startswith("UTMALDG")
        loaded += threads * _width(op) * (_is_load(op) and not op.startswith("UTMALDG"))
        stored += threads * _width(op) * _is_store(op)
    return Work(issues, fmas, products, loaded, stored, tiles)


def _width(op: str) -> int:
    """Bytes of a thread's load or store."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[part] for part in op.split(".") if part in widths), 4)


def _products(op: str) -> int:
    """Multiply-adds of a matrix instruction, a warp's share: HMMA.16816 is 16x8x16, HGMMA.64x32x16 four warps' work."""
    if found := re.match(r"HGMMA\.64x(\d+)x(\d+)", op):
        return 16 * int(found[1]) * int(found[2])
    if found := re.match(r"HMMA\.168(\d+)\b", op):
        return 16 * 8 * int(found[1])
    return 0


def _columns(op: str) -> int:
    """The columns of a matrix instruction: of HGMMA.64x128x16, or HMMA.16816, which has 8; else 0."""
    found = re.match(r"HGMMA\.64x(\d+)x", op)
    return int(found[1]) if found else 8 * op.startswith("HMMA.168")


def innermost_loops(sass: str) -> list[list[str]]:
    """The opcodes of each loop that holds no other. Loops that only wait, without memory or arithmetic, are none."""
    blocks, nexts = _blocks(sass)
    reached, found = {0}, [0]
    before: dict[int, set[int]] = collections.defaultdict(set)
    while found:
        block = found.pop()
        for after in nexts[block]:
            before[after].add(block)
            if after not in reached:
                reached.add(after)
                found.append(after)
    dominators = _dominators(reached, before)
    bodies: dict[int, set[int]] = {}
    for tail in reached:
        for head in nexts[tail] & dominators[tail]:
            body, found = bodies.setdefault(head, {head}), [tail]
            while found:
                block = found.pop()
                if block not in body:
                    body.add(block)
                    found.extend(before[block])
    loops = {head: [op for block in sorted(body) for op in blocks[block]] for head, body in sorted(bodies.items())}
    working = [head for head, opcodes in loops.items() if any(map(_works, opcodes))]
    return [loops[head] for head in working if not any(bodies[other] < bodies[head] for other in working)]


def _works(op: str) -> bool:
    return _is_load(op) or _is_store(op) or _is_matrix(op) or _is_fma(op)


def _blocks(sass: str) -> tuple[list[list[str]], list[set[int]]]:
    """The opcodes of each basic block, the kernel's first to begin with, and the blocks that may follow it."""
    blocks: list[list[str]] = [[]]
    jumps: list[tuple[int, str]] = []
    falls: set[int] = set()  # blocks that may run on into the next
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label, found = _SASS_LABEL.match(line), _SASS_OPCODE.match(line)
        if label:
            if blocks[-1]:
                falls.add(len(blocks) - 1)
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif found:
            blocks[-1].append(found[1])
            if found[1].split(".")[0] in ("BRA", "BRX", "EXIT", "JMP", "RET"):
                jumps += [(len(blocks) - 1, name) for name in _SASS_TARGET.findall(line)]
                if _SASS_CONDITION.search(line):
                    falls.add(len(blocks) - 1)
                blocks.append([])
    nexts = [{block + 1} if block in falls else set() for block in range(len(blocks))]
    for block, name in jumps:
        nexts[block].add(labels[name])
    return blocks, nexts


def _dominators(reached: set[int], before: dict[int, set[int]]) -> dict[int, set[int]]:
    """The blocks that every way from the first to a block goes through, itself among them."""
    found = dict.fromkeys(reached, reached) | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = {block} | set.intersection(*(found[earlier] for earlier in before[block]))
            changed |= new != found[block]
            found[block] = new
    return found
