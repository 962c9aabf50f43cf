"""What a compiled kernel takes: registers, spills, shared memory, and the instructions of its machine code."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import TYPE_CHECKING

from .. import assembler

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

_SASS_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.x]*)", re.M)
_AMD_OPCODE = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)", re.M)


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. Instructions are counted in the code, not as executed.

    matrix: on the matrix unit. matrix_n: the most columns of one of them, 0 where the opcode does not say.
    loads, stores: of global memory; wide_*: those of 16 bytes a thread.
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

    def fields(self) -> dict[str, int | str]:
        """What a report's row has of it."""
        matrix = f"{self.matrix} {self.matrix_count}" if self.matrix else ""
        return {
            "registers": self.registers, "spill_bytes": self.spill_bytes, "shared_bytes": self.shared_bytes,
            "matrix": matrix,
        }  # fmt: skip


def of(compiled: CompiledKernel) -> Resources:
    """The resources of a triton CompiledKernel, for an NVIDIA or AMD target.

    FileNotFoundError where Triton came without NVIDIA's disassembler, as some distributions have it.
    """
    if "cubin" in compiled.asm:
        registers, spills, opcodes = _nvidia(compiled.asm["cubin"])
        load, store, wide = r"LDG(?!DEPBAR)|UTMALDG", r"STG|UTMASTG", r".*\.128"
        matrix = r"[HI]G?MMA|U?TC\w*MMA|QGMMA"
    else:
        registers, spills, opcodes = _amd(compiled.asm["amdgcn"])
        load, store = (rf"(global|buffer|flat)_{access}" for access in ("load", "store"))
        wide, matrix = r".*(x4|b128)$", r"v_s?mfmac?|v_wmma"
    loads, stores, products = ([op for op in opcodes if re.match(kind, op)] for kind in (load, store, matrix))
    names = collections.Counter(op.split(".")[0] for op in products)
    return Resources(
        registers=registers,
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        matrix=names.most_common(1)[0][0] if names else "",
        matrix_count=len(products),
        matrix_n=max(map(_columns, products), default=0),
        loads=len(loads),
        wide_loads=sum(re.match(wide, op) is not None for op in loads),
        stores=len(stores),
        wide_stores=sum(re.match(wide, op) is not None for op in stores),
    )


def _nvidia(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers, bytes of spills and opcodes."""
    usage = assembler.output("cuobjdump", "-res-usage", cubin=cubin)
    code = assembler.output("nvdisasm", cubin=cubin)
    sizes = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert sizes, usage
    return int(sizes[1]), int(sizes[2]), _SASS_OPCODE.findall(code)


def _amd(assembly: str) -> tuple[int, int, list[str]]:
    """Registers, bytes of spills and opcodes."""

    def note(key: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{key}:\s*(\d+)", assembly)), default=0)

    return note("vgpr_count"), 4 * note("vgpr_spill_count"), _AMD_OPCODE.findall(assembly)


def _columns(op: str) -> int:
    """The columns of a matrix instruction: of HGMMA.64x128x16, or HMMA.16816, which has 8; else 0."""
    tile = re.match(r"HGMMA\.64x(\d+)x", op)
    return int(tile[1]) if tile else 8 * op.startswith("HMMA.168")
