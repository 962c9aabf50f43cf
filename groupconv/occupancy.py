"""How many programs share a multiprocessor, and how many may share a filter gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .problem import ConvProblem

if TYPE_CHECKING:
    from .devices import Target

# (registers of 32 bits, threads, programs, registers given out together to a thread) of a multiprocessor, AMD's compute
# unit: NVIDIA's CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's instruction set
# architectures of CDNA 3 and RDNA 3, and LLVM's "User Guide for AMDGPU Backend".
_CUDA = {
    75: (65536, 1024, 16, 8), 80: (65536, 2048, 32, 8), 86: (65536, 1536, 16, 8), 87: (65536, 1536, 16, 8),
    89: (65536, 1536, 24, 8), 90: (65536, 2048, 32, 8), 100: (65536, 2048, 32, 8), 103: (65536, 2048, 32, 8),
    120: (65536, 1536, 24, 8),
}  # fmt: skip
_CDNA, _RDNA = (131072, 2048, 32, 8), (98304, 1024, 32, 24)
RESERVED = 1024  # bytes of shared memory that CUDA keeps for itself, of each program

WORKSPACE = 0.25  # of the bytes that a pass moves: what partial sums of a filter gradient may take beside them


def limits(target: Target) -> tuple[int, int, int, int]:
    """(registers, threads, programs, granularity of a thread's registers) of a multiprocessor."""
    if target.backend == "hip":
        return _CDNA if target.warp_size == 64 else _RDNA
    return _CUDA.get(int(target.arch), _CUDA[100] if target.has_warpgroups else _CUDA[86])


def resident(registers: float, shared_bytes: int, warps: int, target: Target) -> int:
    """The programs of so many warps that share a multiprocessor: at least 1, whatever they take.

    registers: of a thread. shared_bytes: of a program.
    """
    file, threads, programs, together = limits(target)
    most = target.warp_size * warps
    taken = math.ceil(max(1.0, min(registers, 255)) / together) * together * most
    reserved = RESERVED if target.backend == "cuda" else 0
    by_shared = (target.shared_bytes + reserved) // (shared_bytes + reserved) if shared_bytes else programs
    return max(1, min(file // taken, by_shared, threads // most, programs))


def shares(parts: int, wanted: int) -> tuple[int, int]:
    """(how many shares, parts of each) of parts that are to be shared out in `wanted`: none of them is empty."""
    parts = max(1, parts)
    each = math.ceil(parts / min(wanted, parts))
    return math.ceil(parts / each), each


def largest_splits(problem: ConvProblem, pass_: str) -> int:
    """The most splits of a filter gradient whose fp32 partial sums take no more memory than the operands."""
    return max(1, problem.min_bytes(pass_) // (4 * problem.params))


def most_splits(problem: ConvProblem, pass_: str) -> int:
    """The most splits that are worth planning: their partial sums stay small beside the operands."""
    return max(1, int(WORKSPACE * problem.min_bytes(pass_)) // (4 * problem.params))


def partial_bytes(problem: ConvProblem, splits: int) -> int:
    """What moves of partial sums, once written and once read; one split has none."""
    return 2 * 4 * splits * problem.params if splits > 1 else 0
