"""From a problem to a plan: which algorithm and configuration each pass takes, and why."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from . import configs, cost, devices, raced
from .algorithms import NAMES, REGISTRY, divided, fits, fitting, lack, newer_triton, possible, tile_of, tiling
from .devices import Target
from .problem import PASSES, ConvProblem

MOST_CONTENDERS = 3
WORTH = 2.0  # times the modelled time of the best: what is slower is not tried
REFINED = 3  # of an algorithm's tiles: other divisions of the work of these are modelled too
TWINS = {"fp16": "bf16", "bf16": "fp16"}  # dtypes of which kernels are alike
BACKENDS = ("auto", "triton", "torch", *(f"triton:{name}" for name in NAMES))


@dataclasses.dataclass(frozen=True)
class PassPlan:
    """What one pass does, or the fused backward.

    algorithm: a name of the registry, or "torch" for F.conv2d. source: where the choice came from: "exact" or
    "nearest" (a measurement of this device), "raced" (in the user's own calls), "modelled", "forced" (by `backend`) or
    "fallback". time_us is that of the
    best algorithm of ours, torch_time_us that of F.conv2d, whichever is taken; time_source says whether they are
    "measured" or "modelled".
    """

    pass_: str
    algorithm: str
    config: dict | None
    source: str
    reason: str
    time_us: float | None
    torch_time_us: float | None
    time_source: str
    flops: int
    min_bytes: int
    floor_us: float

    @property
    def taken_us(self) -> float | None:
        """The time of what is taken."""
        return self.torch_time_us if self.algorithm == "torch" else self.time_us


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plans of a problem's passes on a target, each made when it is first asked for.

    refusal: why no kernel of ours may run (CPU tensors, say), which leaves F.conv2d. notes: more to be said of passes.
    """

    problem: ConvProblem
    target: Target
    backend: str = "auto"
    refusal: str | None = None
    notes: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @functools.cached_property
    def fprop(self) -> PassPlan:
        return self._planned("fprop")

    @functools.cached_property
    def dgrad(self) -> PassPlan:
        return self._planned("dgrad")

    @functools.cached_property
    def wgrad(self) -> PassPlan:
        return self._planned("wgrad")

    def _planned(self, pass_: str) -> PassPlan:
        return plan_pass(self.problem, pass_, self.target, self.backend, self.refusal)

    @functools.cached_property
    def fused(self) -> PassPlan:
        """Of dgrad and wgrad by one kernel, whether it is worth it or not."""
        return self._planned("backward")

    @functools.cached_property
    def backward(self) -> PassPlan | None:
        """Where one kernel for both gradients is faster than dgrad and wgrad, its plan, for where both are wanted."""
        if self.refusal is not None or self.backend == "torch":
            return None
        if not _able(self.problem, "backward", self.target, self.backend)[0]:
            return None
        both, apart = self.fused, (self.dgrad, self.wgrad)
        if both.source == "raced":  # against the two, whose time is its torch_time_us
            return both if both.algorithm != "torch" and (both.time_us or 0.0) < (both.torch_time_us or 0.0) else None
        if both.algorithm == "torch" or any(p.time_source != both.time_source or not p.taken_us for p in apart):
            return None
        return both if (both.taken_us or 0.0) < sum(p.taken_us or 0.0 for p in apart) else None

    @property
    def passes(self) -> tuple[PassPlan, PassPlan, PassPlan]:
        return self.fprop, self.dgrad, self.wgrad

    def __str__(self) -> str:
        lines = [f"{self.problem} on {self.target.slug} ({self.target.arch_name})"]
        for plan in (*self.passes, *(() if self.backward is None else (self.backward,))):
            config = " ".join(f"{k}={v}" for k, v in (plan.config or {}).items())
            lines.append(f"  {plan.pass_}: {plan.algorithm} [{plan.source}] {config}".rstrip())
            lines.append(f"    {plan.reason}")
            if plan.pass_ in self.notes:
                lines.append(f"    {self.notes[plan.pass_]}")
            lines.append(
                f"    {plan.flops / 1e9:.3f} GFLOP, {plan.min_bytes / 1e6:.2f} MB, floor {plan.floor_us:.1f} us"
                " (modelled)"
            )
        if (note := newer_triton()) is not None:
            lines.append(f"  {note}")
        return "\n".join(lines)


def plan(problem: ConvProblem, target: Target, backend: str = "auto", refusal: str | None = None) -> Plan:
    """The plan of a problem; see `Plan`.

    Raises NotImplementedError where `backend` asks for kernels of ours that cannot serve some pass.
    """
    made = Plan(problem, target, backend, refusal)
    if backend not in ("auto", "torch"):
        for pass_ in PASSES:  # what cannot be served is told now, not when a gradient is wanted
            getattr(made, pass_)
    return made


def finished(problem: ConvProblem, plan: PassPlan, target: Target) -> tuple[dict | None, str]:
    """The configuration with which the algorithm of a plan of fprop computes what follows the convolution too, None
    where torch's functions do; and why.

    problem: with its activation and residual, which `plan` is without.
    """
    if plan.algorithm == "torch":
        return None, "by torch's functions"
    if fits(plan.algorithm, problem, "fprop", plan.config or {}, target):
        return plan.config, "by the same kernel"
    if lack(plan.algorithm, problem, "fprop", target) is None:
        config = modelled(problem, "fprop", target, plan.algorithm)[1]
        sizes = " ".join(f"{name}={size}" for name, size in config.items())
        return config, f"by the same kernel, for which it takes {sizes}, or its registers would not do"
    return None, f"by torch's functions: no tile of {plan.algorithm} has the registers"


def _able(problem: ConvProblem, pass_: str, target: Target, backend: str) -> tuple[list[str], list[str]]:
    """The algorithms that a backend allows and that can serve, and why the others cannot."""
    able, refusals = [], []
    for name in [backend.removeprefix("triton:")] if backend.startswith("triton:") else REGISTRY:
        why_not = lack(name, problem, pass_, target)
        if why_not is None:
            able.append(name)
        else:
            refusals.append(f"{name}: {why_not}")
    return able, refusals


def plan_pass(
    problem: ConvProblem, pass_: str, target: Target, backend: str = "auto", refusal: str | None = None,
    found: raced.Result | None = None,
) -> PassPlan:  # fmt: skip
    """Plan one pass; see `plan`. found: by this race, in place of what is known of the problem's class."""
    floor = cost.floor_us(problem, pass_, target)

    def made(algorithm, config, source, reason, time=None, torch_time=None, time_source="modelled"):
        return PassPlan(
            pass_, algorithm, config, source, reason, time, torch_time, time_source,
            problem.flops(pass_), problem.min_bytes(pass_), floor,
        )  # fmt: skip

    if backend == "torch":
        return made("torch", None, "forced", 'backend="torch"')
    forced = backend != "auto"
    able, refusals = _able(problem, pass_, target, backend) if refusal is None else ([], [refusal])
    if not able:
        reason = "; ".join(refusals)
        if forced:
            what = f"{pass_} of {problem}" if refusal is None else "this convolution"
            raise NotImplementedError(f"triton_conv: backend={backend!r} cannot run {what}: {reason}")
        return made("torch", None, "fallback", reason)

    for file in configs.device_files(target.slug) if found is None else ():
        measured = file.lookup(problem, pass_)
        if measured is None:
            continue
        entry, tier = measured
        times = (entry.time_us, entry.torch_time_us, "measured")
        by_torch = "failed" if entry.torch_time_us is None else f"{entry.torch_time_us:.1f} us"
        if not forced and entry.torch_time_us is not None and entry.torch_time_us <= entry.time_us:
            reason = f"F.conv2d measured {by_torch}, {entry.algorithm} {entry.time_us:.1f} us"
            return made("torch", None, tier, reason, *times)
        if entry.algorithm in able:
            config = _fitting(problem, pass_, target, entry)
            reason = f"measured {entry.time_us:.1f} us, F.conv2d {by_torch} ({file.path})"
            if config is not entry.config:
                reason += "; its configuration does not fit this problem, so the model chose"
            return made(entry.algorithm, config, tier, reason, *times)

    found = found or raced.lookup(target.slug, problem, pass_)
    if found is not None:
        ours = found.entry.algorithm in able and (forced or found.won)
        if ours or not forced:
            entry = found.entry
            taken = entry.algorithm if ours else "torch"
            fitting_ = _fitting(problem, pass_, target, entry) if ours else None
            return made(taken, fitting_, "raced", found.told, entry.time_us, entry.torch_time_us, "measured")

    calibration, kin = _calibration(target), _of_kin(problem, pass_, target, able)
    if kin is None:
        name, config, estimate = best(problem, pass_, target, able, calibration.ours)
    else:
        name, config = kin.algorithm, kin.config
        asked = tiling(name, problem, pass_, config, target)
        estimate = cost.estimate(problem, cost.kernel(name, pass_), asked, target)
        estimate = estimate.scaled(calibration.ours.get(f"{name} {pass_}", 1.0))
    prior = cost.torch_prior_us(problem, pass_, target, calibration.torch)
    if kin is not None and kin.slower >= 1:  # there, so no rule of thumb says otherwise here
        prior = min(prior, estimate.time_us / kin.slower)
    compared = f"modelled {estimate.time_us:.1f} us (bound by {estimate.bound}), F.conv2d's prior {prior:.1f} us"
    if calibration.ours or calibration.torch:
        compared += f", both as calibrated on {target.slug}"
    if not forced and prior <= estimate.time_us:
        return made("torch", None, "modelled", f"{name} {compared}", estimate.time_us, prior)
    reason = f"{compared}; nothing like it measured on {target.slug}"
    if kin is not None:
        reason += f", so as on {kin.where}"
    return made(name, config, "modelled", reason, estimate.time_us, prior)


@dataclasses.dataclass(frozen=True)
class _Kin:
    """What was measured to be the best in a case alike. where: its device and dtype; slower: its time over F.conv2d's
    there, 0 where that failed.
    """

    where: str
    algorithm: str
    config: dict
    slower: float


def _of_kin(problem: ConvProblem, pass_: str, target: Target, able: list[str]) -> _Kin | None:
    """The configuration of a problem's class in the other 16-bit dtype, or on another device of the architecture, with
    the work divided for this one; None if there is none.
    """
    others = configs.kin_files(target)
    places = [(file, problem) for file in others]
    if problem.dtype in TWINS:
        twin = dataclasses.replace(problem, dtype=TWINS[problem.dtype])
        places = [
            *((file, twin) for file in configs.device_files(target.slug)),
            *places,
            *((file, twin) for file in others),
        ]
    for file, alike in places:
        entry, _ = file.lookup(alike, pass_) or (None, "")
        if entry is None or entry.algorithm not in able:
            continue
        if possible(entry.algorithm, problem, pass_, entry.config, target):
            config, like = entry.config, devices.BY_SLUG.get(devices.slugify(file.device), target)
            if like.multiprocessors != target.multiprocessors:
                config = divided(entry.algorithm, problem, pass_, tile_of(entry.algorithm, entry.config), target)[0]
            slower = 0.0 if entry.torch_time_us is None else entry.time_us / entry.torch_time_us
            return _Kin(f"{file.device} in {alike.dtype}", entry.algorithm, config, slower)
    return None


def _fitting(problem: ConvProblem, pass_: str, target: Target, entry: configs.Entry) -> dict:
    """The configuration of an entry, or the model's choice for its algorithm where that is no good for this problem.

    The problems of a class differ in what a configuration's registers and shared memory depend on.
    """
    if possible(entry.algorithm, problem, pass_, entry.config, target):
        return entry.config
    return modelled(problem, pass_, target, entry.algorithm)[1]


def ranked(problem: ConvProblem, pass_: str, target: Target, name: str) -> list[tuple[cost.Estimate, dict]]:
    """An algorithm's configurations, the modelled fastest first; of the best, other divisions of their work as well."""

    kernel = cost.kernel(name, pass_)

    def estimated(config: dict, fit: int, risk: float) -> tuple[cost.Estimate, dict]:
        estimate = cost.estimate(problem, kernel, tiling(name, problem, pass_, config, target, fit), target)
        return estimate if risk == 1.0 else estimate.scaled(risk), config

    choices = []
    for tile, fit, risk in fitting(name, problem, pass_, target):
        first, *others = divided(name, problem, pass_, tile, target, fit)
        choices.append((estimated(first, fit, risk), fit, risk, others))
    choices.sort(key=lambda choice: choice[0][0].score)
    found = [choice[0] for choice in choices]
    found += [estimated(config, fit, risk) for _, fit, risk, others in choices[:REFINED] for config in others]
    return sorted(found, key=lambda choice: choice[0].score)


def _calibration(target: Target) -> configs.Calibration:
    """That of the first file of the device that has one."""
    found = (file.calibration for file in configs.device_files(target.slug))
    return next((c for c in found if c.ours or c.torch), configs.Calibration())


def best(
    problem: ConvProblem, pass_: str, target: Target, names: list[str], calibration: Mapping[str, float] | None = None
) -> tuple[str, dict, cost.Estimate]:
    """`modelled` of the fastest of some algorithms; its times multiplied by what `calibration` has for an algorithm."""
    found = []
    for name in names:
        _, config, estimate = modelled(problem, pass_, target, name)
        factor = (calibration or {}).get(f"{name} {pass_}", 1.0)
        found.append((name, config, estimate.scaled(factor)))
    return min(found, key=lambda choice: choice[2].score)


def expected(problem: ConvProblem, pass_: str, target: Target) -> tuple[str, float]:
    """The fastest of ours or "torch", and its time in microseconds, by the model as calibrated on the device alone: of
    problems that are compared, some of whose classes were measured, on other sizes than theirs.
    """
    calibration = _calibration(target)
    choices = {"torch": cost.torch_prior_us(problem, pass_, target, calibration.torch)}
    names = _able(problem, pass_, target, "auto")[0]
    if names:
        name, _, estimate = best(problem, pass_, target, names, calibration.ours)
        choices[name] = estimate.time_us
    fastest = min(choices, key=lambda name: choices[name])
    return fastest, choices[fastest]


def contenders(problem: ConvProblem, pass_: str, target: Target) -> list[tuple[str, dict]]:
    """The plans of ours that are worth a trial: what another device of the architecture has, then the modelled fastest
    first, of different algorithms, and where these are few, of different tiles.
    """
    factors, choices = _calibration(target).ours, []
    able = _able(problem, pass_, target, "auto")[0]
    kin = _of_kin(problem, pass_, target, able)
    first = [] if kin is None else [(kin.algorithm, kin.config)]
    for name in able:
        factor, tiles = factors.get(f"{name} {pass_}", 1.0), set[tuple[int, ...]]()
        for estimate, config in ranked(problem, pass_, target, name):
            tile = tuple(tile_of(name, config).values())
            if tile not in tiles and len(tiles) < MOST_CONTENDERS:
                choices.append((len(tiles), factor * estimate.score, name, config))
                tiles.add(tile)
    choices.sort(key=lambda choice: choice[:2])  # the best tile of each algorithm, then the second best
    least = min((score for _, score, _, _ in choices), default=0.0)
    others = [(name, config) for _, score, name, config in choices if score <= WORTH * least]
    lent = None if kin is None else (kin.algorithm, tile_of(kin.algorithm, kin.config))
    others = [choice for choice in others if (choice[0], tile_of(*choice)) != lent]
    return [*first, *others][:MOST_CONTENDERS]


def modelled(problem: ConvProblem, pass_: str, target: Target, name: str) -> tuple[str, dict, cost.Estimate]:
    """(algorithm, the configuration that the model chooses, modelled time)."""
    estimate, config = ranked(problem, pass_, target, name)[0]
    return name, config, estimate
