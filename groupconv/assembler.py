"""What NVIDIA's assembler, ptxas, makes of some PTX that it should not: how to tell, before a kernel is launched."""

from __future__ import annotations

import re
import subprocess
import tempfile

TOOL_SECONDS = 60.0


class NoKernel(RuntimeError):
    """A kernel cannot be had, for no fault of the call: F.conv2d serves where no backend was asked for."""


class Miscompiled(NoKernel):
    """ptxas gets it wrong in every way that was tried."""


def tool(name: str) -> str:
    """The path of "nvdisasm" or "cuobjdump", of those that Triton comes with or is told of; not all have them."""
    import triton

    try:
        return str(getattr(triton.knobs.nvidia, name).path)
    except (AttributeError, RuntimeError) as error:
        raise FileNotFoundError(f"Triton finds no {name}: {error}") from error


def output(name: str, *arguments: str, cubin: bytes) -> str:
    """What a tool prints of a cubin. FileNotFoundError where the tool is missing."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool(name), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TOOL_SECONDS).stdout


def adds_half_a_constant(ptx: str) -> bool:
    """Whether code adds a constant of two 16-bit halves, one of them zero, to two numbers at once.

    ptxas 12.8 to 13.0 may then add nothing on sm_90 (13.4 adds it): one tap in 16 was wrong on an H200, 2026-11-26.
    """
    if ".s16x2" not in ptx:
        return False
    constants = {name: int(value) for name, value in re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx)}
    added = re.findall(r"add\.s16x2\s+%r\d+, (%r\d+), (%r\d+);", ptx)
    addends = {constants[name] for names in added for name in names if name in constants}
    return any(value & 0xFFFF == 0 or value >> 16 & 0xFFFF == 0 for value in addends)


def shifts_products_apart(ptx: str) -> bool:
    """Whether code shifts three products of one factor or more, and not all by as much.

    ptxas 12.8 to 13.4 may then shift the factor once for all of them (docs/ptxas_shifts.md): gradients of strided
    depthwise layers were wrong on an H200, 2026-11-27. At its optimisation level 1 it does not.
    """
    factors = {name: pair for name, *pair in re.findall(r"mul\.lo\.[su]32\s+(%r\d+), (%r\d+), (%r\d+);", ptx)}
    shifts: dict[str, list[str]] = {}
    for product, amount in re.findall(r"shl\.b32\s+%r\d+, (%r\d+), (\d+);", ptx):
        for factor in factors.get(product, ()):
            shifts.setdefault(factor, []).append(amount)
    return any(len(amounts) > 2 and len({*amounts}) > 1 for amounts in shifts.values())


def careful() -> str:
    """ptxas' options, the user's own among them, with which it shifts each product by itself."""
    import triton

    return " ".join(filter(None, (triton.knobs.nvidia.ptxas_options, "--opt-level 1")))


def loses_an_address(ptx: str, cubin: bytes) -> bool:
    """Whether products of warp groups read shared memory at what no instruction has computed.

    ptxas 12.8 does that to some of the code that reads one address in two ways, as the upper halves of descriptors say
    (12.9 does not): gradients of 1x1 layers were wrong, or a launch failed, on an H200, 2026-11-27. Where there is no
    disassembler, all such code is under suspicion.
    """
    if "wgmma" not in ptx:
        return False
    ways: dict[str, set[int]] = {}
    for address, descriptor in re.findall(r"(?:or|add)\.[bs]64\s+%rd\d+, (%rd\d+), (-?\d{12,});", ptx):
        ways.setdefault(address, set()).add(int(descriptor) >> 32)
    if all(len(found) == 1 for found in ways.values()):
        return False
    try:
        return loses(output("nvdisasm", "-c", cubin=cubin))
    except (OSError, subprocess.SubprocessError):
        return True


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z0-9_.]+) +([^;]*?) ;", re.IGNORECASE)


def loses(code: str) -> bool:
    """Whether machine code takes descriptors from uniform registers that no line before has written, or adds to a lower
    half that is none: those are masked, or sums themselves.
    """
    writers: dict[int, str] = {}
    for opcode, operands in _INSTRUCTION.findall(code):
        first, *sources = operands.split(", ")
        name = opcode.split(".")[0]
        half = re.fullmatch(r"UP\d, UR(\d+), -?0x[0-9a-f]+, URZ", ", ".join(sources))  # the carry goes into the other
        if opcode == "UIADD3" and half and writers.get(int(half[1])) not in ("USGXT", "ULOP3", "UIADD3"):
            return True
        if name == "HGMMA":
            starts = [int(number) for number in re.findall(r"gdesc\[UR(\d+)\]", operands)]
            own = 2 if re.match(r"R\d", sources[0]) else 0  # the left operand's, which may be in registers
            if not starts or any(number not in writers for number in range(starts[0] + own, starts[0] + 4)):
                return True
        target = re.fullmatch(r"UR(\d+)", first)
        if target:
            wide = re.search(r"\.(64|WIDE)\b", opcode) is not None
            writers |= dict.fromkeys(range(int(target[1]), int(target[1]) + 1 + wide), name)
    return False
