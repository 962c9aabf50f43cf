"""The library's kernels as they are compiled: run on the software GPU, and their machine code counted.

    python tests/compiled_code.py run --layers regnety --out FOLDER     # make softgpu ARGS=...
    python tests/compiled_code.py waits                                 # make waits
    python tests/compiled_code.py counts                                # counted over modelled

`run` takes what is planned for the layers of the suite, on smaller maps, batches and group counts, against float64.
Each pass runs twice: on dense tensors, a wgmma reading shared memory when it is issued; and on views with gaps between
pixels, a wgmma reading at its wait, by a GPU of few multiprocessors, whose persistent programs do several tiles.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "0"  # or there are no compiled kernels; read when groupconv.kernels is imported

import cases
import softgpu
import torch
import triton
from softgpu import machine_code

from groupconv import configs, devices, dispatch
from groupconv.activations import ACTIVATIONS
from groupconv.algorithms import REGISTRY, able, candidates, divided, lack
from groupconv.common import files, progress
from groupconv.compiling import compiler, resources
from groupconv.perf_reports import counted as counted_
from groupconv.perf_reports import layers
from groupconv.problem import FINISHED, LAYOUTS, PLANNED, ConvProblem

TARGETS = ("sm_90", "sm_80")
SAMPLED = ("fp16", "tf32", "fp32", "bf16x3")  # dtypes of which every EVERY-th layer runs by default
EVERY = 8
RUNS = 16  # columns: two of the longest runs, for layers of stride 2
FEW = 2  # multiprocessors


@dataclasses.dataclass(frozen=True)
class Job:
    """A pass of a layer by an algorithm. The configuration is the whole layer's, `problem`."""

    layer: str
    problem: ConvProblem
    pass_: str
    target: str
    algorithm: str
    config: dict

    @property
    def key(self) -> str:
        p, blocks = self.problem, ",".join(str(value) for value in self.config.values())
        kernel = p.kernel_of(self.pass_)
        return f"{self.target} {p.dtype} {p.layout} {self.layer} {kernel} {self.algorithm} [{blocks}]"


def shrunk(problem: ConvProblem, images: int = 2, pixels: int = 14, groups: int = 4) -> ConvProblem:
    """Fewer images, smaller maps, and fewer groups: more of narrow ones, less of wide.

    Sizes keep their parity; rows of NCHW their remainder by RUNS, which as many columns are loaded at once by.
    """

    def size(whole, kernel, dilation, kept=2):
        least = max(pixels, (kernel - 1) * dilation // 2 + 1)
        return whole if whole < least + kept else least + (whole - least) % kept

    kept = min(problem.groups, groups * 16 if problem.cin_g <= 4 else groups if problem.cin_g < 128 else 2)
    return dataclasses.replace(
        problem, batch=images, groups=kept, c_in=problem.cin_g * kept, c_out=problem.cout_g * kept,
        h_in=size(problem.h_in, problem.kh, problem.dilation[0]),
        w_in=size(problem.w_in, problem.kw, problem.dilation[1], RUNS if problem.layout == "nchw" else 2),
    )  # fmt: skip


@contextlib.contextmanager
def wide_offsets():
    """Kernels compute their offsets in 64 bits, which they do of themselves only past 2^31 elements."""
    modules = [module for module in REGISTRY.values() if hasattr(module, "index_64")]
    kept = [module.index_64 for module in modules]
    for module in modules:
        module.index_64 = lambda *_: True
    try:
        yield
    finally:
        for module, index_64 in zip(modules, kept, strict=True):
            module.index_64 = index_64


def run_pass(
    problem: ConvProblem, pass_: str, algorithm: str, config: dict, target: str, varied: bool = False, **options
) -> tuple[dict[str, float], softgpu.Session]:
    """One pass on the software GPU, its results guarded and full of NaN before: errors over their bounds, by pass.

    varied: the second of the two ways to run it (see above). options: of the session; faults are raised.
    """
    on, view = devices.named(target), problem.layout
    if varied:
        on = dataclasses.replace(on, multiprocessors=FEW)
        view = {"nhwc": "nhwc-padded", "nchw": "slice"}[view]
    given = cases.operands(cases.Case(problem, x=view, w=problem.layout, dy=view))
    expected = cases.references(problem, given)
    operands, made = given.of(pass_), cases.PRODUCES.get(pass_, (pass_,))
    if problem.kernel_of(pass_) == FINISHED:
        residual = torch.randn(problem.y_shape).to(given.x.dtype)
        residual = torch.empty_strided(problem.y_shape, given.strides(problem)["y"], dtype=given.x.dtype).copy_(
            residual
        )
        before = expected["fprop"] + residual.double()
        expected |= {"fprop": ACTIVATIONS[problem.activation].of(before), "kept": before}
        operands, made = (*operands, residual), ("fprop", "kept")[: 1 + problem.keeps]
    with softgpu.active(target, late=varied, **options) as session, cases.guarded():
        prepared = REGISTRY[algorithm].prepare(problem, pass_, config, on, given.strides(problem))
        out = prepared(*operands)
    terms = {each: cases.terms(problem, "fprop" if each == "kept" else each) for each in made}
    return {
        each: cases.error(result, expected[each]) / cases.bound(problem.dtype, terms[each])
        for each, result in zip(made, out if isinstance(out, tuple) else (out,), strict=True)
    }, session


def counted(results, target: devices.Target) -> dict[str, float]:
    """What a pass's launches did, in the terms of groupconv.cost.Tiling; and the wavefronts of shared memory, bank
    conflicts and all, beside as few as its bytes could be.
    """
    totals = [softgpu.totals(result) for result in results]

    def total(name):
        return float(sum(value for each in totals for key, value in each.items() if key.startswith(name)))

    half = 2 if target.has_warpgroups else 1  # the model counts what runs at half the rate twice
    return {
        "l2_bytes": total("l2_bytes"),
        "shared_bytes": total("shared_bytes"),
        "instructions": 32 * total("machine_instructions"),
        "matrix_flops": total("wgmma_flops") + half * total("mma_flops"),
        "dram_bytes": total("dram_read") + total("dram_written"),
        "wavefronts": total("wavefronts "),
        "fewest_wavefronts": total("ideal "),
    }


# --- Every planned configuration -------------------------------------------------------------------------------------


def planned(layer, pass_: str, target: str, everything: bool = False) -> Iterator[Job]:
    """What the plan of a layer's pass takes of ours; everything: all candidates of all algorithms that can serve."""
    on = devices.named(target)
    names = able(layer.problem, pass_, on)
    if not names:
        return
    if everything:
        for name in names:
            for tile in candidates(name, layer.problem, pass_, on):
                config = divided(name, layer.problem, pass_, tile, on)[0]
                yield Job(layer.name, layer.problem, pass_, target, name, config)
        return
    name, config, _ = dispatch.best(layer.problem, pass_, on, names)
    yield Job(layer.name, layer.problem, pass_, target, name, config)


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Those that the options ask for: bf16 first, then the sampled dtypes."""
    for dtype in args.dtypes or ("bf16", *SAMPLED):
        for layout in args.layouts:
            found = layers.suite(dtype, layout)
            if args.layers:
                found = [layer for layer in found if any(part in layer.name for part in args.layers)]
            elif dtype in SAMPLED and not args.dtypes:
                found = found[SAMPLED.index(dtype) + 4 * (layout == "nchw") :: EVERY]
            for layer in found:
                for target in args.targets:
                    for pass_ in args.passes:
                        for job in planned(layer, pass_, target, args.candidates):
                            if args.algorithms is None or job.algorithm in args.algorithms:
                                yield job


def outcome(job: Job, checks: str) -> dict:
    """What came of running a job, as JSON: `bad` has why it is wrong, None where it is right."""
    began, row = time.monotonic(), {"key": job.key, "config": job.config, "bad": None}
    problem = shrunk(job.problem)
    row["problem"] = str(problem)
    why_not = lack(job.algorithm, problem, job.pass_, devices.named(job.target))
    if why_not:
        return row | {"left out": why_not}
    bad = []
    for varied in (False, True):
        way = "padded, late" if varied else "dense, early"
        try:
            errors, session = run_pass(
                problem, job.pass_, job.algorithm, job.config, job.target, varied, checks=checks, soft=softgpu.SOFT
            )
        except Exception as error:
            bad.append(f"{way}: {type(error).__name__}: {str(error)[:1000]}")
            continue
        faults = [fault for result in session.results for fault in result.faults]
        row[way] = {
            "error over bound": errors,
            "programs": [result.programs for result in session.results],
            "findings": [str(finding) for result in session.results for finding in result.findings],
        }
        if not varied:
            row["counted"] = counted(session.results, devices.named(job.target))
        bad += [f"{way}: {each}: error {error:.3g} of its bound" for each, error in errors.items() if not error <= 1]
        bad += [f"{way}: {fault.count} times {fault}" for fault in faults]
    return row | {"bad": "\n".join(bad) or None, "seconds": round(time.monotonic() - began, 1)}


def _outcome(job: Job, checks: str) -> dict:
    torch.set_num_threads(1)
    return outcome(job, checks)


def run_command(args: argparse.Namespace) -> int:
    """Run what was not run yet, and list what is bad of all that was asked for."""
    kernels = hashlib.sha256(json.dumps(configs.kernels_sha256(), sort_keys=True).encode()).hexdigest()[:12]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"triton-{triton.__version__}-kernels-{kernels}.jsonl"
    rows = {row["key"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    wanted = {job.key: job for job in jobs(args)}
    left = [job for key, job in wanted.items() if key not in rows]
    print(f"{len(wanted)} jobs, {len(left)} to run; {path}", flush=True)
    began = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with (
        progress.shown("softgpu", "jobs", len(left)) as step,
        concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool,
        path.open("a", encoding="utf-8") as file,
    ):
        asked = {pool.submit(_outcome, job, args.checks) for job in left}
        for done in concurrent.futures.as_completed(asked):
            if done.cancelled():
                continue
            row = done.result()
            rows[row["key"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            step(row["key"])
            if row["bad"]:
                print(f"BAD {row['key']}\n  {row['bad']}", flush=True)
            if time.monotonic() - began > args.seconds:
                for future in asked:
                    future.cancel()
    ran = [rows[key] for key in wanted if key in rows]
    bad = [row for row in ran if row["bad"]]
    print(f"\n{len(ran)} of {len(wanted)} jobs ran, {sum('left out' in row for row in ran)} of them left out")
    print(f"{len(bad)} are bad" + (":" if bad else ""))
    for row in bad:
        print(f"  {row['key']:100} {row['bad'].splitlines()[0][:100]}")
    return 1 if bad or len(ran) < len(wanted) else 0


# --- Counts ----------------------------------------------------------------------------------------------------------


def examples(target: str) -> Iterator[Job]:
    """A planned pass of each algorithm and layout, bf16; where no plan takes an algorithm, one that it can serve."""
    on = devices.named(target)
    for layout, pass_ in itertools.product(LAYOUTS, PLANNED):
        found: dict[str, Job] = {}
        for layer in layers.suite("bf16", layout):
            names = able(layer.problem, pass_, on)
            taken = dispatch.best(layer.problem, pass_, on, names)[0] if names else ""
            for name in names:
                if name not in found or (name == taken and "planned" not in found[name].layer):
                    _, config, _ = dispatch.best(layer.problem, pass_, on, [name])
                    words = f"{layer.name} planned" if name == taken else layer.name
                    found[name] = Job(words, layer.problem, pass_, target, name, config)
        yield from (found[name] for name in REGISTRY if name in found)


def count(job: Job) -> dict[str, object] | None:
    """A row of counted.csv: a job's configuration on a smaller layer; None where that layer is not the algorithm's."""
    target, problem = devices.named(job.target), shrunk(job.problem, pixels=28, groups=16)
    if lack(job.algorithm, problem, job.pass_, target):
        return None
    _, session = run_pass(problem, job.pass_, job.algorithm, job.config, job.target, soft=softgpu.SOFT)
    return {
        "target": job.target, "algorithm": job.algorithm, "pass": job.pass_, "layout": problem.layout,
        "layer": job.layer, "problem": dataclasses.asdict(problem), "config": job.config,
        "kernels": counted_.kernels_of(job.algorithm), **counted(session.results, target),
    }  # fmt: skip


def counts_command(args: argparse.Namespace) -> int:
    """A line an example: counted over modelled of each resource, and wavefronts of shared memory over the fewest."""
    rows = []
    for row in filter(None, map(count, examples(args.target))):
        rows.append(row)
        text = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in row.items()}
        found = counted_.example(text)
        ratios = [*found.over.values(), found.conflicts]
        shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        print(found.algorithm, found.pass_, found.layout, found.layer, *shown, sep="\t", flush=True)
    if args.write:
        path = pathlib.Path(counted_.__file__).with_name(counted_.NAME)
        with files.whole(path) as partial, files.Writer(partial, counted_.FIELDS, {}) as writer:
            for row in rows:
                writer.append(row)
    return 0


# --- Waits -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Waits:
    """Products and waits of warp groups in the main kernel of a planned pass, counted in PTX and in machine code."""

    job: Job
    ptx_products: int
    products: int
    ptx_waits: int
    waits: int
    serialised: bool
    registers: int
    spill_bytes: int

    @property
    def added(self) -> bool:
        """Whether machine code waits more often than PTX asks for. ptxas may double a loop, waits and products."""
        return self.waits * self.ptx_products > self.ptx_waits * self.products


def waits_of(job: Job) -> Waits | None:
    """None for kernels without products of warp groups."""
    like = compiler.Job(job.algorithm, job.pass_, job.config, job.problem, job.target)
    launch = compiler.launched(like)[0]
    ptx = launch.compiled.asm["ptx"]
    if "wgmma.mma_async" not in ptx:
        return None
    code, used = machine_code.of_cubin(launch.compiled.asm["cubin"]), resources.of(launch.compiled)
    return Waits(
        job, ptx.count("wgmma.mma_async"), code.products, ptx.count("wgmma.wait_group"), code.waits, code.serialised,
        used.registers, used.spill_bytes,
    )  # fmt: skip


def waits_command(args: argparse.Namespace) -> int:
    """A line for each kernel of warp groups; 1 where machine code of some waits more often than its PTX."""
    heads = "".join(f" {head:>5}" for head in ("HGMMA", "PTX", "SASS", "regs", "spill"))
    print(f"{'layer':28} {'pass':9} {'algorithm':14}{heads}  configuration; PTX and SASS: waits in them")
    added = 0
    for dtype in args.dtypes:
        for layer in layers.suite(dtype, "nhwc"):
            if args.layers and not any(part in layer.name for part in args.layers):
                continue
            for pass_ in args.passes:
                for job in planned(layer, pass_, "sm_90", args.candidates):
                    found = waits_of(job) if args.algorithms is None or job.algorithm in args.algorithms else None
                    if found is None:
                        continue
                    added += found.added
                    mark = "serialised" if found.serialised else "more" if found.added else ""
                    blocks = " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in job.config.items())
                    print(
                        f"{layer.name:28} {pass_:9} {job.algorithm:14} {found.products:5} {found.ptx_waits:5}"
                        f" {found.waits:5} {found.registers:5} {found.spill_bytes:5}  {blocks} {mark}".rstrip(),
                        flush=True,
                    )
    print(f"{added} kernels wait more often than their PTX")
    return 1 if added else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="planned configurations on the software GPU")
    run.set_defaults(command=run_command)
    run.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    run.add_argument("--dtypes", nargs="+", choices=("bf16", *SAMPLED), help="default: bf16, and the others sampled")
    run.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    run.add_argument(
        "--checks", choices=("all", "some"), default="some", help="programs whose shared memory is checked"
    )
    run.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    run.add_argument("--seconds", type=float, default=float("inf"), help="stop then; the same command goes on")
    run.add_argument("--out", type=pathlib.Path, default=softgpu.SCRATCH / "results", help="a folder (%(default)s)")
    counts = commands.add_parser("counts", help="what is counted of a kernel of each algorithm, over what is modelled")
    counts.set_defaults(command=counts_command)
    counts.add_argument("--target", choices=TARGETS, default="sm_90")
    counts.add_argument("--write", action="store_true", help="perf_reports/counted.csv, in place of what it has")
    waits = commands.add_parser("waits", help="waits of machine code and of PTX, sm_90, channels_last")
    waits.set_defaults(command=waits_command)
    waits.add_argument("--dtypes", nargs="+", default=["bf16"])
    for each in (run, waits):
        each.add_argument("--layers", nargs="+", help="parts of names of layers of the suite; default: all")
        each.add_argument("--passes", nargs="+", choices=PLANNED, default=PLANNED)
        each.add_argument("--algorithms", nargs="+", choices=tuple(REGISTRY))
        each.add_argument("--candidates", action="store_true", help="all candidates, not only what is planned")
    args = parser.parse_args(argv)
    return args.command(args)


if __name__ == "__main__":
    sys.exit(main())
