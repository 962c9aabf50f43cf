"""Kernels that are compiled in an epoch: a line a model of the suite, for the table of docs/reliability.md.

    python tests/first_calls.py [MODEL ...]

All passes of its layers by kernels of ours, bf16, channels_last, as modelled for an H200: what Triton would compile is
counted by its own keys, of launches on tensors without values, and not compiled. 1 where they are more than may be.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

os.environ["TRITON_INTERPRET"] = "0"  # read when groupconv.kernels is imported

import triton

from groupconv import configs, devices, dispatch
from groupconv.common import grouped
from groupconv.compiling import compiler
from groupconv.perf_reports import layers
from groupconv.problem import ConvProblem

NO_CONFIGURATIONS = pathlib.Path(__file__).parent / "no-configurations"  # measurements will be others next year
TARGET = devices.DEFAULT
IMAGES = 1_281_167  # of an epoch, the last batch of which is what is left
BATCHES = (1, 2, 4, 7, 8, 16, 24, 32, 48, 64, 96, 128)
SCALES = (0.75, 0.875, 1.0, 1.125, 1.25)
FOLDS = (2, 3, 4, 5, 6, 8)  # images, each of which has weights of its own: one image of so many times the groups


def of_batches(*batches: int) -> Callable[[ConvProblem], Iterator[ConvProblem]]:
    return lambda layer: (dataclasses.replace(layer, batch=batch) for batch in batches)


def of_scales(layer: ConvProblem) -> Iterator[ConvProblem]:
    for scale in SCALES:
        yield dataclasses.replace(layer, h_in=round(scale * layer.h_in), w_in=round(scale * layer.w_in))


def of_folds(layer: ConvProblem) -> Iterator[ConvProblem]:
    for images in FOLDS:
        sizes = {name: images * getattr(layer, name) for name in ("c_in", "c_out", "groups")}
        yield dataclasses.replace(layer, batch=1, **sizes)


# What the calls of an epoch are of, and how many kernels they may take for a layer: as many as the worst takes.
EPOCHS: dict[str, tuple[Callable[[ConvProblem], Iterator[ConvProblem]], int]] = {
    "one batch": (of_batches(128), 4),
    "and a partial one": (of_batches(128, IMAGES % 128), 8),
    f"{len(BATCHES)} batches": (of_batches(*BATCHES), 32),
    f"{len(SCALES)} map sizes": (of_scales, 18),
    f"{len(FOLDS)} folded batches": (of_folds, 15),
}


def launch(problem: ConvProblem) -> None:
    """What a training step launches."""
    plan = dispatch.plan(problem, TARGET, "triton")
    passes = [plan.fprop, *([plan.backward] if plan.backward else [plan.dgrad, plan.wgrad])]
    for chosen in passes:
        assert chosen.config is not None, chosen
        compiler.launched(compiler.Job(chosen.algorithm, chosen.pass_, chosen.config, problem, TARGET.slug, on=TARGET))


def counted(problems: list[ConvProblem], epoch: Callable[[ConvProblem], Iterator[ConvProblem]]) -> int:
    """The distinct kernels of an epoch."""
    keys = set()

    def note(*, key: str, fn: object, **_: object) -> bool:
        keys.add((str(fn), key))
        return True  # it need not be compiled

    triton.knobs.runtime.jit_cache_hook = note
    for problem in problems:
        for called in epoch(problem):
            launch(called)
    return len(keys)


def main() -> int:
    configs.shipped_folder = configs.user_folder = lambda: NO_CONFIGURATIONS
    every = grouped(layers.suite("bf16", "nhwc"), lambda layer: layer.name.partition(".")[0])
    print("| model | layers | " + " | ".join(EPOCHS) + " |\n|---|" + "---|" * (1 + len(EPOCHS)))
    most, within = [each for _, each in EPOCHS.values()], True
    for model in sys.argv[1:] or every:
        problems = [layer.problem for layer in every[model]]
        counts = [counted(problems, epoch) for epoch, _ in EPOCHS.values()]
        print("|", " | ".join(map(str, (model, len(problems), *counts))), "|", flush=True)
        within &= all(count <= each * len(problems) for count, each in zip(counts, most, strict=True))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
