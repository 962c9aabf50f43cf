"""Compiling the library's kernels for GPUs that are not there, through the code that launches them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import torch

from . import children, configs, devices, dispatch, launcher, resources, stub_driver
from .algorithms import REGISTRY, able
from .problem import PLANNED, ConvProblem, dense_strides

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16} | dict.fromkeys(
    ("fp32", "tf32", "bf16x3"), torch.float32
)
OPERANDS = {"fprop": ("x", "w", None), "dgrad": ("dy", "w"), "wgrad": ("dy", "x"), "backward": ("dy", "x", "w")}


def dense_operand_strides(problem: ConvProblem) -> dict:
    """The strides that `prepare` takes, of dense tensors in the problem's layouts; the weight is as x."""
    nhwc, out_nhwc = problem.layout == "nhwc", problem.out_layout == "nhwc"
    weight = dense_strides(problem.w_shape, nhwc)
    return {
        "x": dense_strides(problem.x_shape, nhwc),
        "w": weight,
        "y": dense_strides(problem.y_shape, out_nhwc),
        "dy": dense_strides(problem.y_shape, out_nhwc),
        "dx": dense_strides(problem.x_shape, out_nhwc),
        "dw": weight,
    }


def launched(
    problem: ConvProblem, pass_: str, algorithm: str, config: dict, target: str
) -> tuple[launcher.Launch, ...]:
    """The launches of one pass, compiled for a target as a call would."""
    strides = dense_operand_strides(problem)
    shapes = {"x": problem.x_shape, "w": problem.w_shape, "dy": problem.y_shape}
    dtype = TORCH_DTYPES[problem.dtype]
    operands = [
        None if name is None else torch.empty_strided(shapes[name], strides[name], dtype=dtype, device="meta")
        for name in OPERANDS[pass_]
    ]
    with stub_driver.active(target):
        call = REGISTRY[algorithm].prepare(problem, pass_, config, devices.named(target), strides)
        call(*operands)
    return call.launches


def compile_pass(
    problem: ConvProblem, pass_: str, algorithm: str, config: dict, target: str
) -> list[resources.Resources]:
    """What each kernel of one pass takes, compiled for a target as a call would."""
    return [resources.of(launch.compiled) for launch in launched(problem, pass_, algorithm, config, target)]


GENERAL = "implicit_gemm"  # which serves every problem that any algorithm does


@dataclasses.dataclass(frozen=True)
class Job:
    """A configuration to compile for a problem on a target."""

    algorithm: str
    pass_: str
    config: dict
    problem: ConvProblem
    target: str

    def __str__(self) -> str:
        p, options = self.problem, " ".join(str(size) for size in self.config.values())
        return f"{self.algorithm} {self.pass_} {p.kh}x{p.kw} s{p.stride[0]} {p.cin_g}->{p.cout_g} [{options}]"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a job: the resources of its main kernel, and the faults that fail it."""

    job: Job
    resources: resources.Resources | None
    faults: tuple[str, ...]
    excluded: str | None = None


def shipped(targets: list[str], only_pass: str | None = None, only_dtype: str | None = None) -> list[Job]:
    """Every shipped configuration on every target that may take it: both layouts, every dtype of its element size."""
    found = []
    for target in targets:
        arch = devices.named(target).arch_name
        for default in configs.modelled_defaults():
            if only_pass not in (None, default.pass_):
                continue
            for dtype in ("fp16", "bf16") if default.element_bytes == 2 else ("fp32", "tf32", "bf16x3"):
                if only_dtype not in (None, dtype):
                    continue
                for layout in ("nhwc", "nchw"):
                    problem = _problem(default, dtype, layout)
                    if configs.modelled(default.algorithm, problem, default.pass_, arch) == default:
                        found.append(Job(default.algorithm, default.pass_, default.config, problem, target))
    return found


def planned(targets: list[str], problems: list[ConvProblem], only_pass: str | None = None) -> list[Job]:
    """What the plans of problems take of ours, where no configuration is shipped and the model chooses."""
    found = []
    for target in targets:
        on = devices.named(target)
        for problem in problems:
            for pass_ in PLANNED if only_pass is None else (only_pass,):
                names = able(problem, pass_, on)
                if not names and pass_ != "backward":  # run() says why
                    found.append(Job(GENERAL, pass_, {}, problem, target))
                elif names:
                    name, config, _ = dispatch.best(problem, pass_, on, names)
                    if configs.modelled(name, problem, pass_, on.arch_name) is None:
                        found.append(Job(name, pass_, config, problem, target))
    return found


def _problem(default: configs.ModelledDefault, dtype: str, layout: str) -> ConvProblem:
    """A 3x3 layer whose GEMM N is the largest that the default is for."""
    width = max(1, default.most_n // 8 * 8 if default.most_n >= 8 else default.most_n)
    pad = (1, 1, 1, 1)
    return ConvProblem(
        32, 4 * width, 28, 28, 4 * width, 3, 3, (1, 1), pad, (1, 1), 4, dtype, layout, layout, bias=False
    )


def run(job: Job) -> Outcome:
    """Compile a job and judge it."""
    lack = _lack(job)
    if lack is not None:
        return Outcome(job, None, (), excluded=lack)
    try:
        return _judged(job, compile_pass(job.problem, job.pass_, job.algorithm, job.config, job.target))
    except Exception as error:  # whatever the compiler raises is the finding
        return Outcome(job, None, (f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",))


def _lack(job: Job) -> str | None:
    return REGISTRY[job.algorithm].supports(job.problem, job.pass_, devices.named(job.target))


def _judged(job: Job, kernels: list[resources.Resources]) -> Outcome:
    target, algorithm = devices.named(job.target), REGISTRY[job.algorithm]
    used, faults = kernels[0], []
    if spills := sum(kernel.spill_bytes for kernel in kernels):
        faults.append(f"{spills} bytes of spills")
    if used.shared_bytes > target.shared_bytes:
        faults.append(f"{used.shared_bytes} bytes of shared memory of {target.shared_bytes}")
    by_matrix = algorithm.tiling(job.problem, job.pass_, job.config, target).matrix_flops > 0
    if job.problem.dtype in ("fp16", "bf16") and by_matrix and not used.matrix_count:
        faults.append("no matrix instructions")
    return Outcome(job, used, tuple(faults))


def run_parallel(work: list[Job], on_done: Callable[[Outcome], None], processes: int | None = None) -> list[Outcome]:
    """`run` jobs in worker processes, calling `on_done(outcome)` after each; outcomes in the jobs' order."""
    outcomes = []
    with children.Children("groupconv.compiled", interpret=False, count=processes or os.cpu_count() or 1) as compiler:
        asked = [(job, _lack(job)) for job in work]
        answers = [compiler.submit(_question(job)) if lack is None else None for job, lack in asked]
        for (job, lack), answer in zip(asked, answers, strict=True):
            if answer is None:
                outcome = Outcome(job, None, (), excluded=lack)
            elif "failed" in (found := answer.result()):
                outcome = Outcome(job, None, (found["failed"],))
            else:
                kernels = [resources.Resources(**kernel | {"code": None, "loops": ()}) for kernel in found["kernels"]]
                outcome = _judged(job, kernels)
            outcomes.append(outcome)
            on_done(outcome)
    return outcomes


def _question(job: Job) -> dict:
    problem = children.problem_json(job.problem)
    return {
        "problem": problem, "pass": job.pass_, "algorithm": job.algorithm, "config": job.config, "target": job.target
    }  # fmt: skip
