"""Who runs in a race: each algorithm's promising configurations, and PyTorch's ways."""

from __future__ import annotations

import dataclasses

from .. import configs, cost, dispatch
from ..algorithms import REGISTRY, able, possible, tiling
from ..compiling.compiler import Job
from ..devices import Target
from ..problem import ConvProblem

NAMES = 2  # the version of `Contender.name`, for journals
MOST_EACH = 6  # configurations of one algorithm that are compiled and timed
MOST_ALIKE = 2  # of them of the same tile: the model knows little of warps, stages and splits
SLOWER_THAN_OWN_BEST = 2.0  # times, as modelled: left out
SLOWER_THAN_BEST_OF_ALL = 4.0  # times: only an algorithm's best is tried, in case the model is wrong


@dataclasses.dataclass(frozen=True)
class Contender:
    """A provider of a pass: an algorithm with a configuration, or one of PyTorch's ways without.

    modelled_us: the model's time, None for PyTorch's.
    """

    provider: str
    config: dict[str, int] | None = None
    modelled_us: float | None = None

    @property
    def ours(self) -> bool:
        return self.provider in REGISTRY

    @property
    def name(self) -> str:
        """`row_march 64 32 1 4 3`: the provider and its configuration's values, in the order of `configs.fields`."""
        config = self.config or {}
        names = configs.fields(self.provider) if config else ()
        return " ".join([self.provider, *(str(config[name]) for name in names if name in config)])

    def job(self, problem: ConvProblem, pass_: str, target: Target) -> Job:
        """What compiles one of ours."""
        assert self.config is not None
        return Job(self.provider, pass_, self.config, problem, target.arch_name, on=target)


def same_layout(problem: ConvProblem) -> Contender:
    """F.conv2d on tensors as they lie: what "auto" takes where it does not take ours."""
    return Contender("torch_channels_last" if problem.layout == "nhwc" else "torch_contiguous")


def has_native(problem: ConvProblem) -> bool:
    """Whether PyTorch has kernels of its own for it: depthwise ones, which cuDNN else stands before."""
    return problem.cin_g == 1 and problem.groups > 1


def peers(problem: ConvProblem) -> list[Contender]:
    """F.conv2d in either memory format, and PyTorch's own depthwise kernels, without cuDNN."""
    names = ["torch_contiguous", "torch_channels_last", *(["torch_native"] if has_native(problem) else [])]
    return [Contender(name) for name in names]


def ours(problem: ConvProblem, pass_: str, target: Target) -> list[Contender]:
    """The configurations of our algorithms that are worth compiling, the modelled best of each algorithm first; at the
    end what the device's files and its kin's have, so that today's model loses nothing that was found before.
    """
    ranked = {name: dispatch.ranked(problem, pass_, target, name) for name in able(problem, pass_, target)}
    best_us = min((configurations[0][0].time_us for configurations in ranked.values()), default=0.0)
    found = [
        Contender(name, config, estimate.time_us)
        for name, configurations in ranked.items()
        for estimate, config in worth_compiling(configurations, best_us)
    ]
    for earlier in _measured(problem, pass_, target):
        if all((earlier.provider, earlier.config) != (other.provider, other.config) for other in found):
            found.append(earlier)
    return found


def _measured(problem: ConvProblem, pass_: str, target: Target) -> list[Contender]:
    """What earlier runs found best for problems of this class, on devices of the architecture."""
    found = []
    for file in (*configs.device_files(target.slug), *configs.kin_files(target)):
        entry, tier = file.lookup(problem, pass_) or (None, "")
        if entry is None or tier != "exact" or entry.algorithm not in able(problem, pass_, target):
            continue
        if possible(entry.algorithm, problem, pass_, entry.config, target):
            asked = tiling(entry.algorithm, problem, pass_, entry.config, target)
            modelled = cost.estimate(problem, cost.kernel(entry.algorithm, pass_), asked, target)
            found.append(Contender(entry.algorithm, entry.config, modelled.time_us))
    return found


def worth_compiling(ranked: list[tuple[cost.Estimate, dict]], best_us: float) -> list[tuple[cost.Estimate, dict]]:
    """Of an algorithm's configurations, the modelled best first, those worth compiling: that one in any case. best_us:
    the modelled time of the best of all algorithms.
    """
    fastest_us = ranked[0][0].time_us
    slowest_us = SLOWER_THAN_OWN_BEST * fastest_us if fastest_us <= SLOWER_THAN_BEST_OF_ALL * best_us else 0.0
    kept = ranked[:1]
    for estimate, config in ranked[1:]:
        alike = sum(_tile(config) == _tile(other) for _, other in kept)
        if estimate.time_us <= slowest_us and alike < MOST_ALIKE and len(kept) < MOST_EACH:
            kept.append((estimate, config))
    return kept


def _tile(config: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in config.items() if name.startswith("BLOCK_")}
