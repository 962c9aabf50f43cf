"""What a compiled kernel takes: registers, spills, shared memory, and the instructions of its machine code."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import subprocess
import tempfile

import triton

_BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_SASS_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.M)
_AMD_OPCODE = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)", re.M)


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. Instructions are counted in the code, not as executed.

    matrix: on the matrix unit. loads, stores: of global memory; wide_*: those of 16 bytes a thread.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: str  # the opcode, "" where there is none
    matrix_count: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    instructions: int


def of(compiled) -> Resources:
    """The resources of a triton CompiledKernel, for an NVIDIA or AMD target."""
    if "cubin" in compiled.asm:
        registers, spills, opcodes = _nvidia(compiled.asm["cubin"])
        wide = lambda op: ".128" in op  # noqa: E731
        loads = [op for op in opcodes if re.match(r"LDG|LDGSTS|UTMALDG", op) and "DEPBAR" not in op]
        stores = [op for op in opcodes if re.match(r"STG|UTMASTG", op)]
        matrix = [op for op in opcodes if re.match(r"[HI]G?MMA|U?TC\w*MMA|QGMMA|UTCHMMA", op)]
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
        loads=len(loads),
        wide_loads=sum(map(wide, loads)),
        stores=len(stores),
        wide_stores=sum(map(wide, stores)),
        instructions=len(opcodes),
    )


def _nvidia(cubin: bytes) -> tuple[int, int, list[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = run(os.path.join(_BIN, "cuobjdump"), "-res-usage", file.name)
        code = run(os.path.join(_BIN, "nvdisasm"), file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]), _SASS_OPCODE.findall(code)


def _amd(assembly: str) -> tuple[int, int, list[str]]:
    def note(key):
        return max((int(v) for v in re.findall(rf"\.{key}:\s*(\d+)", assembly)), default=0)

    return note("vgpr_count"), 4 * note("vgpr_spill_count"), _AMD_OPCODE.findall(assembly)
