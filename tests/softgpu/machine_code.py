"""What ptxas made of a kernel's matrix products of warp groups: does each of them wait for its end?

Where PTX touches registers of a wgmma in flight, ptxas puts a wait after every one, and says so only in a message that
Triton does not show. The numbers are right then, and the tensor cores idle.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile

import triton

DISASSEMBLER = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclasses.dataclass(frozen=True)
class WarpGroupCode:
    """Counts of the code, not as executed. awaited: products that a wait for all follows before the next, or a jump.

    fenced: whether a WARPGROUP.ARRIVE stands between each product and what wrote its registers before.
    """

    products: int
    awaited: int
    waits: int
    fenced: bool = False

    @property
    def serialised(self) -> bool:
        """Whether no product is in flight when the next instruction of another kind runs."""
        return self.awaited == self.products


@functools.lru_cache(256)
def of_cubin(cubin: bytes) -> WarpGroupCode:
    """The counts of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return of_text(subprocess.run([DISASSEMBLER, file.name], capture_output=True, text=True, check=True).stdout)


def of_text(code: str) -> WarpGroupCode:
    """The counts of machine code as nvdisasm writes it."""
    products = awaited = waits = 0
    open_, fenced = False, True
    written: set[int] | None = None  # since the last arrival; None: after a label, nobody knows
    instruction = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);"
    for label, op, operands in re.findall(rf"^(\.L\w+):|{instruction}", code, re.M):
        if label:
            written = None
        elif op.startswith("HGMMA"):
            products += 1
            open_ = True
            fenced &= written is not None and written.isdisjoint(_read(op, operands))
        elif op.startswith("WARPGROUP.ARRIVE"):
            written = set()
        elif op.startswith("WARPGROUP.DEPBAR"):
            waits += 1
            if open_ and operands.rstrip().endswith("0x0"):
                awaited += 1
                open_ = False
        elif op.split(".")[0] in ("BRA", "EXIT", "RET"):
            open_ = False
        elif written is not None:
            first = re.match(r"\s*(?:P\w+, )*R(\d+)", operands)
            written |= set(range(int(first[1]), int(first[1]) + 4)) if first else set()  # no instruction writes more
    return WarpGroupCode(products, awaited, waits, fenced)


def _read(op: str, operands: str) -> set[int]:
    """The registers of a product: its sums, and four of its left operand if that is in registers."""
    columns, names = re.match(r"HGMMA\.64x(\d+)x", op), re.findall(r"(?<![\w.])R(\d+)", operands)
    sums = int(columns[1]) // 2 if columns else 128
    widths = [4 if 0 < i < len(names) - 1 else sums for i in range(len(names))]
    return {int(name) + i for name, width in zip(names, widths, strict=True) for i in range(width)}
