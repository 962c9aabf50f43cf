"""What fits: registers and shared memory of a tile, programs that share a multiprocessor, or a filter gradient."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
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


def most_registers(warps: int, target: Target) -> int:
    """The registers that a thread of a program of so many warps can have."""
    return min(255 if target.backend == "cuda" else 512, limits(target)[0] // (target.warp_size * warps))


def resident(registers: float, shared_bytes: int, warps: int, target: Target) -> int:
    """The programs of so many warps that share a multiprocessor: at least 1, whatever they take.

    registers: of a thread. shared_bytes: of a program.
    """
    file, threads, programs, together = limits(target)
    most = target.warp_size * warps
    taken = math.ceil(max(1.0, min(registers, most_registers(warps, target))) / together) * together * most
    reserved = RESERVED if target.backend == "cuda" else 0
    by_shared = (target.shared_bytes + reserved) // (shared_bytes + reserved) if shared_bytes else programs
    return max(1, min(file // taken, by_shared, threads // most, programs))


@dataclasses.dataclass(frozen=True)
class Held:
    """What a program of a tile holds while it runs, of all its threads together.

    sums: accumulators, in fp32. words: of 32 bits, of operands that pass through registers. accesses: loads and stores
    that are under way together, each of which has an address. shared_bytes: of shared memory. vector: elements of an
    access of the result.
    """

    warps: int
    shared_bytes: int
    sums: float = 0.0
    words: float = 0.0
    accesses: float = 0.0
    vector: int = 1

    def parts(self, target: Target) -> tuple[float, float, float, float]:
        """What a thread's registers are a sum of, each with its own weight."""
        threads = target.warp_size * self.warps
        return 1.0, self.sums / threads, self.words / threads, self.accesses / threads


@dataclasses.dataclass(frozen=True)
class Registers:
    """How many registers an algorithm's pass takes on a kind of GPU, fitted to compiled kernels.

    weights: of `Held.parts`. most: the share of the registers that a thread can have from which on kernels spill.
    """

    weights: tuple[float, float, float, float]
    most: float

    def of(self, held: Held, target: Target) -> float:
        return sum(weight * part for weight, part in zip(self.weights, held.parts(target), strict=True))


# Of what nobody compiled: a register for each sum, word and address, and some for everything else; a guess.
UNKNOWN = Registers((40.0, 1.0, 1.0, 2.0), 0.7)


@functools.cache
def _fitted() -> tuple[dict[str, Registers], frozenset[str]]:
    """What registers.json has: `Registers` by kind, and the tiles that spill although their kind's would not."""
    file = importlib.resources.files("groupconv.autotune_configs").joinpath("registers.json")
    data = json.loads(file.read_text(encoding="utf-8"))
    kinds = {kind: Registers(tuple(fit["weights"]), fit["most"]) for kind, fit in data["registers"].items()}
    return kinds, frozenset(data["spilling"])


def kind(algorithm: str, pass_: str, target: Target) -> str:
    """By what registers are fitted: `wgmma row_march wgrad`."""
    return f"{target.matrix_unit} {algorithm} {pass_}"


def spilling(kind: str, problem: ConvProblem, tile: dict[str, int]) -> str:
    """How registers.json calls a tile that spills."""
    return f"{kind} {problem.layout} {8 * problem.element_bytes}-bit {' '.join(map(str, tile.values()))}"


def registers(algorithm: str, pass_: str, held: Held, target: Target) -> float:
    """An estimate of the registers of a thread."""
    return _fitted()[0].get(kind(algorithm, pass_, target), UNKNOWN).of(held, target)


def fits(algorithm: str, pass_: str, problem: ConvProblem, tile: dict[str, int], held: Held, target: Target) -> bool:
    """Whether a tile has the shared memory and, as far as is known, the registers that it takes."""
    if held.shared_bytes > target.shared_bytes:
        return False
    kinds, denied = _fitted()
    of = kind(algorithm, pass_, target)
    fit = kinds.get(of, UNKNOWN)
    if fit.of(held, target) > fit.most * most_registers(held.warps, target):
        return False
    return spilling(of, problem, tile) not in denied


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
