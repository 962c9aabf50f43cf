"""A software GPU: runs the PTX that Triton compiles for sm_80 and sm_90 on the CPU, checks it and counts what it does.

    with softgpu.active("sm_90") as session:
        kernel[grid](*cpu_tensors)
    print(softgpu.profile(session.results))

README.md says what is checked, what is counted, and what is not modelled.
"""

import os

from .machine import SCRATCH, Fault, View, compiler, launch

# Before Triton is first asked for its cache.
os.environ.setdefault("TRITON_CACHE_DIR", str(SCRATCH / "triton"))

from .driver import SOFT, TOLERATED, Session, active, load
from .parser import Unsupported
from .report import profile, totals

__all__ = [
    "SCRATCH", "SOFT", "TOLERATED", "Fault", "Session", "Unsupported", "View", "active", "compiler", "launch", "load",
    "profile", "totals",
]  # fmt: skip
