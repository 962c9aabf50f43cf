"""Compiling the machine (core.c) and the arithmetic that a program needs, and running programs on it."""

from __future__ import annotations

import ctypes
import dataclasses
import getpass
import hashlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np

from . import arithmetic, lowering, parser

FOLDER = pathlib.Path(__file__).parent
SCRATCH = pathlib.Path(tempfile.gettempdir(), f"softgpu-of-{getpass.getuser()}")
COUNTERS = ("issues", "requests", "bytes", "sectors", "l1_misses", "wavefronts", "ideal_wavefronts", "useful")
# The kinds of faults, as core.c numbers them.
KINDS = {
    1: "not implemented", 2: "global access out of range", 3: "misaligned access", 4: "shared access out of range",
    5: "read of shared bytes never written", 6: "shared race", 7: "barrier", 8: "in flight", 9: "global race",
    10: "mbarrier", 11: "proxy fence", 12: "wgmma", 13: "divergence", 14: "limit", 15: "TMA",
    16: "register in flight", 17: "overwrite in flight", 18: "gap between elements",
}  # fmt: skip
_TENSOR_MAP = 0x50414D545F475321  # what core.c knows a tensor map among the parameters by
_MOST_FINDINGS = 64


class Fault(RuntimeError):
    """What a check found.

    kind: one of KINDS. line: of the PTX. source: "file:line" of the Python. count: how often it was found.
    """

    def __init__(self, message: str, kind: str = "", line: int = 0, source: str = "", kernel: str = "", count: int = 1):
        super().__init__(message)
        self.kind, self.line, self.source, self.kernel, self.count = kind, line, source, kernel, count


@dataclasses.dataclass(frozen=True)
class View:
    """Memory that a kernel may access: the elements of a tensor, wherever they lie. Strides in bytes, none negative."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element_bytes: int
    argument: int  # its position among the kernel's

    @property
    def bytes(self) -> int:
        """From the first element to the end of the last."""
        if 0 in self.shape:
            return 0
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return reach + self.element_bytes


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A tensor as TMA sees it, its innermost axis first. strides: in bytes, of the other axes. swizzle: 0 to 3."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_bytes: int
    swizzle: int
    fill_nan: bool


# --- As core.c has them ----------------------------------------------------------------------------------------------


class _Range(ctypes.Structure):
    _fields_ = (
        ("lo", ctypes.c_uint64), ("hi", ctypes.c_uint64), ("writers", ctypes.c_void_p), ("readers", ctypes.c_void_p),
        ("read_sectors", ctypes.c_void_p), ("written_sectors", ctypes.c_void_p), ("owned", ctypes.c_void_p),
        ("argument", ctypes.c_uint64),
    )  # fmt: skip


class _TensorMap(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64), ("rank", ctypes.c_int32), ("element_bytes", ctypes.c_int32),
        ("swizzle", ctypes.c_int32), ("fill_nan", ctypes.c_int32), ("sizes", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 5), ("box", ctypes.c_int32 * 5), ("padding", ctypes.c_int32),
    )  # fmt: skip


class _Error(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32), ("row", ctypes.c_int32), ("thread", ctypes.c_int32), ("program", ctypes.c_int32),
        ("address", ctypes.c_uint64), ("message", ctypes.c_char * 512),
    )  # fmt: skip


class _Finding(ctypes.Structure):
    _fields_ = (("first", _Error), ("count", ctypes.c_uint64))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p), ("pool", ctypes.c_void_p), ("row_count", ctypes.c_int32),
        ("threads", ctypes.c_int32), ("register_bytes", ctypes.c_int64), ("constants", ctypes.c_void_p),
        ("constant_count", ctypes.c_int32), ("shared_bytes", ctypes.c_int32), ("params", ctypes.c_void_p),
        ("param_bytes", ctypes.c_int32), ("shared_granule", ctypes.c_int32), ("global_granule", ctypes.c_int32),
        ("range_count", ctypes.c_int32), ("ranges", ctypes.POINTER(_Range)), ("maps", ctypes.POINTER(_TensorMap)),
        ("map_count", ctypes.c_int32), ("grid", ctypes.c_int32 * 3), ("programs", ctypes.c_void_p),
        ("checked", ctypes.c_void_p), ("program_count", ctypes.c_int64), ("counters", ctypes.c_void_p),
        ("error", ctypes.POINTER(_Error)), ("l1_bytes", ctypes.c_int32), ("special", ctypes.c_int32),
        ("functions", ctypes.c_void_p), ("soft", ctypes.c_uint32), ("finding_count", ctypes.c_int32),
        ("findings", ctypes.POINTER(_Finding)), ("late", ctypes.c_int32),
    )  # fmt: skip


# --- Compiling -------------------------------------------------------------------------------------------------------

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w")
_core: ctypes.CDLL | None = None
_functions: dict[arithmetic.Form, int] = {}  # their addresses


def compiler() -> str | None:
    """The C compiler: $CC, cc or gcc; None where there is none."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc")))), None)


def _compile(name: str, text: str) -> ctypes.CDLL:
    """A shared library of C text, compiled once for all processes."""
    found = compiler()
    if found is None:
        raise RuntimeError("no C compiler: neither $CC nor cc nor gcc")
    headers = [lowering.operations_header(), *(path.read_text() for path in sorted(FOLDER.glob("*.h")))]
    key = hashlib.sha256("\0".join([found, *_FLAGS, *headers, text]).encode()).hexdigest()[:16]
    library = SCRATCH / f"{name}-{key}.so"
    if not library.exists():
        SCRATCH.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SCRATCH) as build:
            pathlib.Path(build, "ops.h").write_text(headers[0])
            pathlib.Path(build, "code.c").write_text(text)
            command = [found, *_FLAGS, f"-I{build}", f"-I{FOLDER}", "-o", "code.so", "code.c", "-lm"]
            done = subprocess.run(command, cwd=build, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{found} failed:\n{done.stderr[:4000]}")
            os.replace(pathlib.Path(build, "code.so"), library)
    return ctypes.CDLL(str(library))


def _the_core() -> ctypes.CDLL:
    global _core
    if _core is None:
        _core = _compile("core", (FOLDER / "core.c").read_text())
        _core.sg_run.argtypes = [ctypes.POINTER(_Launch)]
        _core.sg_run.restype = ctypes.c_int
        _add([(op, tuple(widths)) for op, widths in json.loads((FOLDER / "forms.json").read_text())])
    return _core


def _add(forms: Sequence[arithmetic.Form]) -> None:
    library = _compile("arithmetic", arithmetic.source(forms))
    for i, form in enumerate(forms):
        _functions[form] = ctypes.cast(getattr(library, f"form{i}"), ctypes.c_void_p).value


def _addresses(forms: Sequence[arithmetic.Form]) -> list[int]:
    _the_core()
    if missing := sorted(set(forms) - set(_functions)):
        _add(missing)
    return [_functions[form] for form in forms]


# --- Launching -------------------------------------------------------------------------------------------------------


class Loaded:
    """A kernel's PTX as a program with its arrays. threads: where the PTX does not say how many."""

    def __init__(self, text: str, threads: int):
        self.kernel = parser.parse(text)
        self.threads = self.kernel.threads or threads
        self.program = program = lowering.lower(self.kernel, self.threads)
        self.rows = np.array([tuple(row) for row in program.rows], dtype=np.int32)
        self.pool = np.array(program.pool, dtype=np.int64)
        self.constants = np.array(program.constants, dtype=np.int64).reshape(-1, 3)
        self.functions = np.array(_addresses(program.forms), dtype=np.uint64)


class Result:
    """What a launch did.

    counters: [instruction, COUNTERS]. findings: the faults that did not end it, in the order of their first time.
    read_bytes, written_bytes: of 32-byte sectors touched. programs: how many ran.
    """

    def __init__(self, loaded, name, grid, counters, programs, shared_bytes, findings, read, written):
        self.loaded, self.name, self.grid, self.counters = loaded, name, grid, counters
        self.programs, self.shared_bytes, self.findings = programs, shared_bytes, findings
        self.read_bytes, self.written_bytes = (32 * sum(map(_bits, sectors)) for sectors in (read, written))


def _bits(words: np.ndarray) -> int:
    return int(np.unpackbits(words.view(np.uint8)).sum())


def launch(
    loaded: Loaded, name: str, grid: tuple[int, int, int], values: Sequence[int | TensorMap], views: Iterable[View],
    shared_bytes: int, *, programs: Sequence[int] | None = None, checked: Sequence[int] | None = None,
    l1_bytes: int = 32768, soft: Iterable[str] = (), late: bool = False,
) -> Result:  # fmt: skip
    """Run a grid; raises a Fault of any kind that is not in `soft`.

    values: of the kernel's parameters. views: the memory that it may access. programs: those that run, by default all.
    checked: for each that runs, whether its accesses of shared memory are checked.
    """
    program, core = loaded.program, _the_core()
    maps = [value for value in values if isinstance(value, TensorMap)]
    params = _Params(loaded.kernel, name, values)
    total = math.prod(grid)
    which = np.asarray(range(total) if programs is None else programs, dtype=np.int64)
    checks = np.ones(len(which), np.uint8) if checked is None else np.asarray(checked, dtype=np.uint8)
    ranges = _Ranges(views, program.global_granule)
    counters = np.zeros((len(loaded.rows), len(COUNTERS)), np.uint64)
    error, findings = _Error(), (_Finding * _MOST_FINDINGS)()
    job = _Launch(
        rows=loaded.rows.ctypes.data, pool=loaded.pool.ctypes.data, row_count=len(loaded.rows), threads=loaded.threads,
        register_bytes=program.register_bytes + 64, constants=loaded.constants.ctypes.data,
        constant_count=len(loaded.constants), shared_bytes=shared_bytes, params=params.address,
        param_bytes=loaded.kernel.param_bytes, shared_granule=program.shared_granule,
        global_granule=program.global_granule, range_count=len(ranges.structs), ranges=ranges.structs,
        maps=_maps(maps), map_count=len(maps), grid=grid, programs=which.ctypes.data, checked=checks.ctypes.data,
        program_count=len(which), counters=counters.ctypes.data, error=ctypes.pointer(error), l1_bytes=l1_bytes,
        special=program.special, functions=loaded.functions.ctypes.data,
        soft=sum(1 << number for number, kind in KINDS.items() if kind in soft), findings=findings, late=late,
    )  # fmt: skip
    if core.sg_run(ctypes.byref(job)):
        raise _fault(loaded, name, error, grid)
    found = [_fault(loaded, name, f.first, grid, f.count) for f in findings[: job.finding_count]]
    return Result(loaded, name, grid, counters, len(which), shared_bytes, found, ranges.read, ranges.written)


class _Params:
    """A kernel's parameters in memory; tensor maps are their numbers."""

    def __init__(self, kernel: parser.Kernel, name: str, values: Sequence[int | TensorMap]):
        if len(values) != len(kernel.params):
            raise RuntimeError(f"{name}: {len(values)} arguments for {len(kernel.params)} parameters")
        self._memory = ctypes.create_string_buffer(kernel.param_bytes + 192)
        self.address = -(-ctypes.addressof(self._memory) // 128) * 128
        maps = 0
        for value, param in zip(values, kernel.params, strict=True):
            if isinstance(value, TensorMap):
                data = _TENSOR_MAP.to_bytes(8, "little") + maps.to_bytes(8, "little") + bytes(112)
                maps += 1
            else:
                data = (value & ((1 << (8 * param.bytes)) - 1)).to_bytes(param.bytes, "little")
            ctypes.memmove(self.address + param.offset, data, len(data))


class _Ranges:
    """The memory of views as disjoint ranges, with what core.c notes of them."""

    def __init__(self, views: Iterable[View], granule: int):
        merged: list[tuple[int, int, list[View]]] = []
        for view in sorted((v for v in views if v.bytes), key=lambda v: v.address):
            end = view.address + view.bytes
            if merged and view.address < merged[-1][1]:
                lo, hi, members = merged[-1]
                merged[-1] = (lo, max(hi, end), [*members, view])
            else:
                merged.append((view.address, end, [view]))
        self.structs = (_Range * len(merged))()
        self.read, self.written, self._kept = [], [], []
        for struct, (lo, hi, members) in zip(self.structs, merged, strict=True):
            words, granules = ((hi - (lo & ~31)) >> 5) // 64 + 2, ((hi - (lo & ~31)) >> granule) + 2
            read, written = np.zeros(words, np.uint64), np.zeros(words, np.uint64)
            writers, readers = np.zeros(granules, np.uint32), np.zeros(granules, np.uint32)
            owned = _owned(lo, hi, members)
            struct.lo, struct.hi, struct.argument = lo, hi, members[0].argument
            struct.read_sectors, struct.written_sectors = read.ctypes.data, written.ctypes.data
            struct.writers, struct.readers = writers.ctypes.data, readers.ctypes.data
            struct.owned = None if owned is None else owned.ctypes.data
            self.read.append(read)
            self.written.append(written)
            self._kept.append((writers, readers, owned))


def _owned(lo: int, hi: int, views: list[View]) -> np.ndarray | None:
    """Of each byte of a range, whether it belongs to an element of a view; None where all do."""
    bytes_ = np.zeros(hi - lo, np.uint8)
    for view in views:
        elements = np.lib.stride_tricks.as_strided(
            bytes_[view.address - lo :], (*view.shape, view.element_bytes), (*view.strides, 1)
        )
        elements[...] = 1
    return None if bytes_.all() else bytes_


def _maps(maps: list[TensorMap]):
    structs = (_TensorMap * max(1, len(maps)))()
    for struct, each in zip(structs, maps, strict=False):
        struct.address, struct.rank, struct.element_bytes = each.address, len(each.sizes), each.element_bytes
        struct.swizzle, struct.fill_nan = each.swizzle, each.fill_nan
        struct.sizes[: struct.rank], struct.box[: struct.rank] = each.sizes, each.box
        struct.strides[1 : struct.rank] = each.strides
    return structs


def _fault(loaded: Loaded, name: str, error: _Error, grid, count: int = 1) -> Fault:
    kind = KINDS.get(error.kind, "?")
    statements = loaded.program.statements
    statement = statements[error.row] if 0 <= error.row < len(statements) else None
    line, text, source = (statement.line, statement.text, "") if statement else (0, "", "")
    if statement and statement.loc:
        source = f"{loaded.kernel.files.get(statement.loc[0], '?')}:{statement.loc[1]}"
    x, y = error.program % grid[0], error.program // grid[0]
    message = (
        f"{kind}: {error.message.decode()}\n  kernel {name}, program {error.program} ({x}, {y}), thread {error.thread}"
        f" (warp {error.thread // 32}, lane {error.thread % 32}), address {error.address:#x}\n"
        f"  PTX line {line}: {text[:200]}\n  source {source}"
    )
    return Fault(message, kind, line, source, name, count)
