"""The algorithms: ways to compute a pass. A new one is a file here, one in kernels/, and its name in NAMES.

Each is a module with
    NAME
    BLOCKS                                             its tile sizes: name -> (least, most), powers of two, or
                                                       (least, most, step), multiples of it
    DIVISION                                           in the same way, how its work is divided among programs
    supports(problem, pass_, target) -> str | None     why it cannot serve, or None
    tiles(problem, pass_, target) -> list of lists     tiles worth measuring (configurations without DIVISION): of each
                                                       list of alternatives the first that fits
    held(problem, pass_, tile, target) -> Held         what a program holds, which decides whether it fits
    divisions(problem, pass_, tile, target, fit) -> list[dict]   of a tile's work, the likely best first
    tiling(problem, pass_, config, target, fit) -> Tiling        what a launch asks of the machine, for the model
    prepare(problem, pass_, config, target, strides) -> callable
    INTERPRETABLE                                      False if Triton's interpreter cannot run its kernels
`fit` is how many programs share a multiprocessor.
`prepare` binds a pass to its launches. `strides` are element strides of x, w, y, dx and dw by name, and of dy in the
backward passes. The callable takes the operands, (x, w, bias or None), (dy, w) or (dy, x), and returns a new tensor;
its `launches` are the `launcher.Launch` objects that it makes. It knows nothing of autograd.

`pass_` is one of problem.PASSES or "backward": dgrad and wgrad by one kernel that reads dy once. Its callable takes
(dy, x, w) and returns (dx, dw).

A configuration has the BLOCKS of its algorithm, its DIVISION, num_warps and num_stages, and says all of a launch.
Whether a tile fits is asked in one place (`fitting` below, by `occupancy`), of registers as compiled kernels were
found to take them; `groupconv compile` holds the suite's plans to that. Any division is legal: work is divided in no
more parts than there are, nor in so many that partial sums take more memory than the operands.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from .. import launcher, occupancy
from ..cost import Tiling
from ..devices import Target
from ..problem import PASSES, ConvProblem

NAMES = (
    "implicit_gemm", "row_block", "row_block_tma", "row_march",
    "group_mma", "depthwise_direct", "depthwise_mma", "depthwise_mma_nchw", "depthwise_toeplitz", "depthwise_map",
    "depthwise_plane",
)  # fmt: skip
TESTED_TRITON = ("3.6.0", "3.9.0")  # the oldest that can serve, and the newest that was tried


def _loaded() -> tuple[dict[str, ModuleType], str | None]:
    """The algorithms by name; none of them, and why, where Triton is missing, too old or broken."""
    needed, found = f"{TESTED_TRITON[0]} or newer is needed", triton_version()
    if found is not None and _numbers(found) < _numbers(TESTED_TRITON[0]):  # it may fail only inside a kernel
        return {}, f"Triton {found} cannot be used; {needed}"
    try:
        return {name: importlib.import_module(f"{__name__}.{name}") for name in NAMES}, None
    except Exception as error:  # whatever an old or broken one raises, F.conv2d serves
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return {}, "Triton is not installed"
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return {}, f"Triton {found or ''} cannot be used ({what}); {needed}"


def triton_version() -> str | None:
    """The version of the Triton that is imported, if it has one."""
    try:
        return importlib.import_module("triton").__version__
    except Exception:  # as above
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


REGISTRY, UNUSABLE = _loaded()
# Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 when they were imported).
INTERPRETED = UNUSABLE is None and launcher.interpreting(REGISTRY["implicit_gemm"].kernels.fprop_kernel)


@functools.cache
def newer_triton() -> str | None:
    """A line on a Triton that is newer than any that was tried, None of others."""
    found = triton_version()
    if found is None or _numbers(found) <= _numbers(TESTED_TRITON[1]):
        return None
    return f"Triton {found} is newer than {TESTED_TRITON[1]}, the newest that this version of groupconv was tried with"


LARGEST = 2**14  # pixels: beyond, the taps of a phase are too many to count while a caller waits
STRETCHED = 1.5  # times the limit on registers: what a tile may be estimated to take where no other fits; a guess
GENERAL = "implicit_gemm"  # which serves every problem that any algorithm does


def lack(name: str, problem: ConvProblem, pass_: str, target: Target) -> str | None:
    """Why an algorithm cannot serve a pass, or None."""
    if max(*problem.stride, *problem.dilation, *problem.pad) > LARGEST:
        return f"strides, dilations and padding above {LARGEST} are F.conv2d's"
    unsupported = REGISTRY[name].supports(problem, pass_, target)
    if unsupported is None and not fitting(name, problem, pass_, target):
        return f"no tile fits the registers and the shared memory of {target.arch_name}"
    return unsupported


def interpretable(name: str) -> bool:
    """Whether Triton's interpreter can run an algorithm's kernels: it has no Gluon."""
    return getattr(REGISTRY[name], "INTERPRETABLE", True)


def able(problem: ConvProblem, pass_: str, target: Target) -> list[str]:
    """The algorithms that can serve a pass."""
    return [name for name in REGISTRY if lack(name, problem, pass_, target) is None]


@functools.lru_cache(1024)  # `lack` and the plan both ask
def fitting(name: str, problem: ConvProblem, pass_: str, target: Target) -> tuple[tuple[dict, int, float], ...]:
    """The tiles of an algorithm that fit, each with how many programs of it share a multiprocessor, and the risk that
    it spills (`occupancy.Room`); and of those only the ones with the widest accesses of the result.

    Tiles that an algorithm has seldom seen win (`seldom`) are not among them, though they are `possible`.
    Where none does, the one that takes the fewest registers, if there are nearly so many: limits are on the safe side.
    Not for both gradients in one kernel, which two others can do. The general algorithm has a tile for every pass of
    everything, but not for what follows, which torch's functions can do.
    """
    module, room = REGISTRY[name], _room(name, problem, pass_, target)
    good, others, compiled = [], [], room.compiled(problem)
    seldom = getattr(module, "seldom", None)
    for alternatives in module.tiles(problem, pass_, target):
        for tile in alternatives:
            if seldom is not None and seldom(problem, pass_, tile, target):
                continue
            choice = tile, module.held(problem, pass_, tile, target), compiled.get(tuple(tile.values()))
            if room.fits(*choice[1:]):
                good.append(choice)
                break
            if choice[1].shared_bytes <= target.shared_bytes:
                others.append(choice)
    if not good and others:
        sound = [choice for choice in others if choice[2] is None]  # as far as is known
        last = min(sound or others, key=lambda choice: room.share(choice[1]))
        nearly = sound and pass_ != "backward" and room.share(last[1]) <= STRETCHED * room.most
        if nearly or (name == GENERAL and problem.kernel_of(pass_) in PASSES):
            good.append(last)
    widest = max((held.vector for _, held, _ in good), default=0)
    return tuple(
        (tile, room.resident(held, known), room.risk(held, known))
        for tile, held, known in good
        if held.vector == widest
    )


def candidates(name: str, problem: ConvProblem, pass_: str, target: Target) -> tuple[dict, ...]:
    """The tiles of `fitting`."""
    return tuple(tile for tile, _, _ in fitting(name, problem, pass_, target))


def tile_of(name: str, config: dict) -> dict:
    """A configuration without its division of the work."""
    return {field: size for field, size in config.items() if field not in REGISTRY[name].DIVISION}


def possible(name: str, problem: ConvProblem, pass_: str, config: dict, target: Target) -> bool:
    """Whether a tile, or a configuration's, is of the forms that a problem allows, and has the shared memory: whatever
    registers it takes. Any division of the work is good for any problem.
    """
    module, tile = REGISTRY[name], tile_of(name, config)
    if not any(tile in alternatives for alternatives in module.tiles(problem, pass_, target)):
        return False
    return module.held(problem, pass_, tile, target).shared_bytes <= target.shared_bytes


def resident(name: str, problem: ConvProblem, pass_: str, tile: dict, target: Target) -> int:
    """How many programs of a tile, or configuration, share a multiprocessor."""
    room, held = _room(name, problem, pass_, target), REGISTRY[name].held(problem, pass_, tile, target)
    return room.resident(held, room.compiled(problem).get(tuple(tile_of(name, tile).values())))


def fits(name: str, problem: ConvProblem, pass_: str, config: dict, target: Target) -> bool:
    """Whether a configuration's tile has the registers and the shared memory, as far as is known."""
    room, tile = _room(name, problem, pass_, target), tile_of(name, config)
    held = REGISTRY[name].held(problem, pass_, tile, target)
    return room.fits(held, room.compiled(problem).get(tuple(tile.values())))


def _room(name: str, problem: ConvProblem, pass_: str, target: Target) -> occupancy.Room:
    return occupancy.room(name, problem.kernel_of(pass_), target, problem.dtype)


def divided(
    name: str, problem: ConvProblem, pass_: str, tile: dict, target: Target, fit: int | None = None
) -> list[dict]:
    """The configurations of an algorithm that have a tile, the likely best division of their work first.

    fit: `resident`, where it is known.
    """
    fit = resident(name, problem, pass_, tile, target) if fit is None else fit
    return [tile | division for division in REGISTRY[name].divisions(problem, pass_, tile, target, fit)]


def tiling(name: str, problem: ConvProblem, pass_: str, config: dict, target: Target, fit: int | None = None) -> Tiling:
    """What a launch of a configuration would ask of the machine. fit: `resident`, where it is known."""
    fit = resident(name, problem, pass_, config, target) if fit is None else fit
    return REGISTRY[name].tiling(problem, pass_, config, target, fit)
