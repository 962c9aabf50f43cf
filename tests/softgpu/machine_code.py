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
    """Counts of the code, not as executed. awaited: products that a wait for all follows before the next, or a jump."""

    products: int
    awaited: int
    waits: int

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
    open_ = False
    for op, operands in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", code, re.M):
        if op.startswith("HGMMA"):
            products += 1
            open_ = True
        elif op.startswith("WARPGROUP.DEPBAR"):
            waits += 1
            if open_ and operands.rstrip().endswith("0x0"):
                awaited += 1
                open_ = False
        elif op.split(".")[0] in ("BRA", "EXIT", "RET"):
            open_ = False
    return WarpGroupCode(products, awaited, waits)
