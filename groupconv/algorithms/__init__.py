"""The algorithms: ways to compute a pass. A new one is a file here, one in kernels/, and a line in REGISTRY.

Each is a module with
    NAME
    BLOCKS                                             its tile sizes: name -> (least, most), powers of two, or
                                                       (least, most, step), multiples of it
    supports(problem, pass_, target) -> str | None     why it cannot serve, or None
    candidates(problem, pass_, target) -> list[dict]   configurations worth measuring, pruned
    tiling(problem, pass_, config, target) -> Tiling   what a launch would ask of the machine, for the model
    prepare(problem, pass_, config, target, strides) -> callable
`prepare` binds a pass to its launches. `strides` are element strides of x, w, y, dx and dw by name, and of dy in the
backward passes. The callable takes the operands, (x, w, bias or None), (dy, w) or (dy, x), and returns a new tensor;
its `launches` are the `launcher.Launch` objects that it makes. It knows nothing of autograd.

`pass_` is one of problem.PASSES or "backward": dgrad and wgrad by one kernel that reads dy once. Its callable takes
(dy, x, w) and returns (dx, dw).

A configuration has the BLOCKS of its algorithm, num_warps and num_stages. Candidates do not spill registers:
`groupconv compile` holds those that suite layers take to that.
"""

from types import ModuleType

from ..devices import Target
from ..problem import ConvProblem
from . import depthwise_direct, depthwise_plane, depthwise_toeplitz, implicit_gemm, row_block, row_block_tma, row_march

ALGORITHMS = (implicit_gemm, row_block, row_block_tma, row_march, depthwise_direct, depthwise_toeplitz, depthwise_plane)
REGISTRY: dict[str, ModuleType] = {algorithm.NAME: algorithm for algorithm in ALGORITHMS}


def able(problem: ConvProblem, pass_: str, target: Target) -> list[str]:
    """The algorithms that can serve a pass."""
    return [name for name, algorithm in REGISTRY.items() if algorithm.supports(problem, pass_, target) is None]
