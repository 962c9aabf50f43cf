"""What fits: registers and shared memory of a tile, programs that share a multiprocessor, or a filter gradient."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from typing import TYPE_CHECKING, NamedTuple

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
BRINK = 0.95  # of a thread's registers: what takes more may spill with another Triton,
SPILLING = 1.3  # and then take so much longer; guesses
RESERVED = 1024  # bytes of shared memory that CUDA keeps for itself, of each program

WORKSPACE = 0.25  # of the bytes that a pass moves: what partial sums of a filter gradient may take beside them


def limits(target: Target) -> tuple[int, int, int, int]:
    """(registers, threads, programs, granularity of a thread's registers) of a multiprocessor."""
    if target.backend == "hip":
        return _CDNA if target.warp_size == 64 else _RDNA
    return _CUDA.get(int(target.arch), _CUDA[100] if target.has_warpgroups else _CUDA[86])


class Held(NamedTuple):
    """What a program of a tile holds while it runs, of all its threads together.

    warps: of the program. shared_bytes: of shared memory. sums: accumulators, in fp32. words: of 32 bits, of operands
    that pass through registers. accesses: loads and stores that are under way together, each of which has an address.
    vector: elements of an access of the result.
    """

    warps: int
    shared_bytes: int
    sums: float = 0.0
    words: float = 0.0
    accesses: float = 0.0
    vector: int = 1


class Registers(NamedTuple):
    """How many registers a thread takes: a constant, and so many for each sum, word and access that it holds.

    most: the share of the registers that a thread can have from which on kernels spill.
    """

    constant: float
    a_sum: float
    a_word: float
    an_access: float
    most: float


UNKNOWN = Registers(40.0, 1.0, 1.0, 2.0, 0.7)  # of what nobody compiled; a guess


class Compiled(NamedTuple):
    """What a compiled program takes: registers of a thread, none of them if it spills, and bytes of shared memory."""

    registers: int
    shared_bytes: int


@functools.cache
def tables() -> tuple[dict[str, Registers], dict[str, list[list[int]]]]:
    """What registers.json has: `Registers` by kind; by `Room.layer` sizes of compiled tiles, and `Compiled` of each."""
    file = importlib.resources.files(f"{__package__}.autotune_configs").joinpath("registers.json")
    data = json.loads(file.read_text(encoding="utf-8"))
    return {kind: Registers(**fit) for kind, fit in data["registers"].items()}, data["compiled"]


def arithmetic(target: Target, dtype: str) -> str:
    """What multiplies: a matrix unit, by itself or in bf16x3, or plain instructions (`wgmma`, `wgmma/bf16x3`,
    `wgmma/fp32`, for want of another name of the GPU's kind).
    """
    if dtype == "bf16x3":
        return f"{target.matrix_unit}/bf16x3"
    plain = not target.matrix_rate(dtype) or (dtype in ("fp32", "tf32") and target.precision(dtype) == "ieee")
    return f"{target.matrix_unit}/fp32" if plain else target.matrix_unit


class Room:
    """What a multiprocessor has for programs of an algorithm's pass."""

    def __init__(self, algorithm: str, pass_: str, target: Target, dtype: str):
        fitted, self._compiled = tables()
        self.kind = f"{arithmetic(target, dtype)} {algorithm} {pass_}"  # by what registers are fitted
        self._fit = fitted.get(self.kind, UNKNOWN)
        self.most = self._fit.most  # as `Registers` has it
        self._file, self._threads, self._programs, self._together = limits(target)
        self._warp = target.warp_size
        self._most = 255 if target.backend == "cuda" else 512
        self._shared, self._reserved = target.shared_bytes, RESERVED if target.backend == "cuda" else 0

    def most_registers(self, warps: int) -> int:
        """The registers that a thread of a program of so many warps can have."""
        return min(self._most, self._file // (self._warp * warps))

    def registers(self, held: Held) -> float:
        """An estimate of the registers of a thread."""
        fit = self._fit
        parts = fit.a_sum * held.sums + fit.a_word * held.words + fit.an_access * held.accesses
        return fit.constant + parts / (self._warp * held.warps)

    def fits(self, held: Held, compiled: Compiled | None = None) -> bool:
        """Whether there are the shared memory and the registers that a program takes: as compiled, or else as far as
        can be estimated.
        """
        if compiled is not None:
            return compiled.registers > 0 and compiled.shared_bytes <= self._shared
        return held.shared_bytes <= self._shared and self.share(held) <= self.most

    def risk(self, held: Held, compiled: Compiled | None) -> float:
        """What a program's time is to be multiplied by, as another Triton may make it spill."""
        at_brink = compiled is not None and compiled.registers > BRINK * self.most_registers(held.warps)
        return SPILLING if at_brink else 1.0

    def share(self, held: Held) -> float:
        """Of the registers that a thread can have, as estimated."""
        return self.registers(held) / self.most_registers(held.warps)

    def layer(self, problem: ConvProblem) -> str:
        """What its kernels' registers go by: `wgmma row_march wgrad nhwc 16-bit 3x3 s1x1 d1x1 4->4`; of depthwise
        kernels, some of which are compiled for the map, the map too.
        """
        p, strides, dilations = problem, "x".join(map(str, problem.stride)), "x".join(map(str, problem.dilation))
        taps = f"{p.kh}x{p.kw} s{strides} d{dilations}"
        channels = f"{p.cin_g}->{p.cout_g}" + (f" of {p.h_in}x{p.w_in}" if p.cin_g == 1 else "")
        return f"{self.kind} {p.layout} {8 * p.element_bytes}-bit {taps} {channels}"

    def compiled(self, problem: ConvProblem) -> dict[tuple[int, ...], Compiled]:
        """What is known of tiles for a layer like this, by their sizes."""
        rows = self._compiled.get(self.layer(problem), [])
        return {tuple(sizes): Compiled(registers, shared) for *sizes, registers, shared in rows}

    def resident(self, held: Held, compiled: Compiled | None = None) -> int:
        """The programs that share a multiprocessor: at least 1, whatever they take."""
        if compiled is not None and compiled.registers:
            return self.programs(compiled.registers, compiled.shared_bytes, held.warps)
        return self.programs(self.registers(held), held.shared_bytes, held.warps)

    def programs(self, registers: float, shared_bytes: int, warps: int) -> int:
        """`resident` of programs of so many warps, whose threads take so many registers."""
        threads = self._warp * warps
        taken = max(1.0, min(registers, self.most_registers(warps)))
        taken = math.ceil(taken / self._together) * self._together * threads
        most = min(self._file // taken, self._threads // threads, self._programs)
        if shared_bytes:
            most = min(most, (self._shared + self._reserved) // (shared_bytes + self._reserved))
        return max(1, most)


@functools.lru_cache(1024)
def room(algorithm: str, pass_: str, target: Target, dtype: str) -> Room:
    """The room for an algorithm's pass on a GPU."""
    return Room(algorithm, pass_, target, dtype)


def shares(parts: int, wanted: int) -> tuple[int, int]:
    """(how many shares, parts of each) of parts that are to be shared out in `wanted`: none of them is empty."""
    parts = max(1, parts)
    each = math.ceil(parts / min(wanted, parts))
    return math.ceil(parts / each), each


@functools.lru_cache(1024)
def largest_splits(problem: ConvProblem, pass_: str) -> int:
    """The most splits of a filter gradient whose fp32 partial sums take no more memory than the operands."""
    return max(1, problem.min_bytes(pass_) // (4 * problem.params))


@functools.lru_cache(1024)
def most_splits(problem: ConvProblem, pass_: str) -> int:
    """The most splits that are worth planning: their partial sums stay small beside the operands."""
    return max(1, int(WORKSPACE * problem.min_bytes(pass_)) // (4 * problem.params))


def partial_bytes(problem: ConvProblem, splits: int) -> int:
    """What moves of partial sums, once written and once read; one split has none."""
    return 2 * 4 * splits * problem.params if splits > 1 else 0
