"""Tables of depthwise layers and of narrow and wide groups: python -m groupconv.perf_reports.tables

Writes DEPTHWISE.md, NARROW.md and WIDE.md, modelled and compiled: what dispatch plans for such layers of the suite,
and what the main loop of each algorithm asks of the machine by output element.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator

import triton

from .. import cost, devices, dispatch, options
from ..algorithms import REGISTRY, able
from ..children import Children, problem_json
from ..devices import Target
from ..problem import PLANNED, ConvProblem
from . import layers
from .rows import Layer, write_atomically
from .text import markdown_table, number

DTYPE, LAYOUTS = "bf16", ("nhwc", "nchw")
KERNELS = (3, 5, 7, 9, 31)  # of the depthwise layer that `report --layers kernels` takes
SMALL_MAP = "convnext_base.s2"  # of the suite: 7x7 on 14x14 pixels
NARROW = 32  # input channels a group, at most
NARROW_EXAMPLES = (
    "resnext50_32x4d.s1", "resnext50_32x4d.s2d", "resnext50_32x4d.s2", "resnext50_32x4d.s3", "resnext50_32x4d.s4",
    "dpn92.s1", "senet154.s3", "efficientnet_b0_g8_gn.s5",
)  # fmt: skip
WIDE_EXAMPLES = ("regnetx_040.s3", "regnety_160.s1d", "regnety_160.s3", "repvgg_b1g4.s2", "regnety_320.s3")
WORK_HEADER = (
    "layer", "shape", "layout", "pass", "algorithm", "configuration", "matrix waste", "programs",
    "a multiprocessor at once (modelled)", "waves (modelled)",
)  # fmt: skip
MOST_WASTE = 0.15  # of the matrix work
WASTE_HEADER = (
    "layer", "group widths", "pass", "algorithm", "configuration", "waste", "least waste of any",
    f"time at {MOST_WASTE:.0%} or less / time (modelled)",
)  # fmt: skip
PLAN_HEADER = (
    "layer", "shape", "layout", "pass", "algorithm", "configuration", "us (modelled)", "floor us (modelled)",
    "time / floor (modelled)", "without launches (modelled)", "bound by (modelled)",
)  # fmt: skip
CODE_HEADER = (
    "shape", "layout", "pass", "algorithm", "bytes loaded", "FMA", "matrix multiply-adds", "issue slots",
    "issue slots, once", "registers", "spills", "shared", "time / floor (modelled)", "note",
)  # fmt: skip


WASTE_TEXT = """## Matrix waste by group width

Channels_last. Beside a plan's waste the least that any candidate of any algorithm has, and what the fastest of those
with little waste would take, over the plan's time: where rows are shared, a tile may waste more and still be faster.
Products with 8 columns count twice: for them there is no instruction of a warp group. Bold: over 15%.

{table}

"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The layers of one file. goals: the most that a time may be over its floor, by kernel size; 0: of all others.

    examples: the layers whose code is counted. by_width: whether waste is shown by group width, too.
    """

    title: str
    file: str
    holds: Callable[[ConvProblem], bool]
    goals: dict[int, float]
    examples: Callable[[], list[Layer]]
    by_width: bool = False

    def suite(self) -> list[Layer]:
        """The suite's layers of this kind, in both layouts."""
        both = zip(*(layers.suite(DTYPE, layout) for layout in LAYOUTS), strict=True)
        return [layer for pair in both for layer in pair if self.holds(layer.problem)]

    def goal(self, problem: ConvProblem) -> float:
        """What the time over the floor is to stay under."""
        return self.goals.get(problem.kh if problem.kh == problem.kw else 0, self.goals[0])


def depthwise_examples() -> list[Layer]:
    parser = argparse.ArgumentParser()
    options.add_layers(parser, "kernels")
    sweep = parser.parse_args(["--kernels", *map(str, KERNELS)])
    found: list[Layer] = []
    for both in zip(*(layers.make(sweep, DTYPE, layout) for layout in LAYOUTS), strict=True):
        found += both
    return found + [layer for layer in SUBJECTS["depthwise"].suite() if layer.name == SMALL_MAP]


def narrow_examples() -> list[Layer]:
    return [layer for layer in SUBJECTS["narrow"].suite() if layer.name in NARROW_EXAMPLES]


def wide_examples() -> list[Layer]:
    return [layer for layer in SUBJECTS["wide"].suite() if layer.name in WIDE_EXAMPLES]


SUBJECTS = {
    "depthwise": Subject(
        "Depthwise layers", "DEPTHWISE.md", lambda p: p.cin_g == 1, {0: 1.3, 7: 1.4, 9: 1.4}, depthwise_examples
    ),
    "narrow": Subject(
        f"Groups of 2 to {NARROW} channels", "NARROW.md", lambda p: 2 <= p.cin_g <= NARROW, {0: 1.5}, narrow_examples
    ),
    "wide": Subject(
        f"Groups of more than {NARROW} channels", "WIDE.md", lambda p: p.cin_g > NARROW, {0: 1.6}, wide_examples, True
    ),
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A pass of a layer and what may serve it, its time modelled."""

    layer: Layer
    goal: float  # what `ratio` is to stay under
    target: Target
    pass_: str
    algorithm: str
    config: dict
    estimate: cost.Estimate
    floor_us: float

    @property
    def tiling(self) -> cost.Tiling:
        return REGISTRY[self.algorithm].tiling(self.layer.problem, self.pass_, self.config, self.target)

    @property
    def ratio(self) -> float:
        return self.estimate.time_us / self.floor_us

    @property
    def net(self) -> float:
        """`ratio` without the modelled time of launching."""
        return (self.estimate.time_us - cost.LAUNCH_US * self.tiling.launches) / self.floor_us


def plans(subject: Subject, chosen: Iterable[Layer], target: Target) -> Iterator[Planned]:
    """What dispatch plans of our algorithms; of "backward" where it is taken."""
    for layer in chosen:
        goal = subject.goal(layer.problem)
        plan = dispatch.plan(layer.problem, target, "triton")
        for one in (*plan.passes, plan.backward):
            if one is not None and one.config is not None:
                tiling = REGISTRY[one.algorithm].tiling(layer.problem, one.pass_, one.config, target)
                estimate = cost.estimate(layer.problem, tiling, target)
                yield Planned(layer, goal, target, one.pass_, one.algorithm, one.config, estimate, one.floor_us)


def choices(subject: Subject, chosen: Iterable[Layer], target: Target) -> Iterator[Planned]:
    """Every algorithm that can serve a pass of a layer, with the configuration that the model takes."""
    for layer in chosen:
        goal = subject.goal(layer.problem)
        for pass_ in PLANNED:
            floor = cost.floor_us(layer.problem, pass_, target)
            for name in able(layer.problem, pass_, target):
                yield Planned(layer, goal, target, pass_, *dispatch.modelled(layer.problem, pass_, target, name), floor)


def plan_cells(row: Planned) -> list[str]:
    """A line of the first table."""
    ratio, net = f"{row.ratio:.2f}", f"{row.net:.2f}"
    return [
        row.layer.name, _shape(row.layer.problem), row.layer.problem.layout, row.pass_, row.algorithm,
        _config(row.config), number(str(row.estimate.time_us)), number(str(row.floor_us)),
        f"**{ratio}**" if row.ratio > row.goal else ratio, f"**{net}**" if row.net > row.goal else net,
        row.estimate.bound,
    ]  # fmt: skip


def work_cells(row: Planned) -> list[str]:
    """A line of the table of matrix work: the share that no useful FLOP fills, and how programs fill the device."""
    tiling = row.tiling
    wasted = f"{waste(row.layer.problem, row.pass_, tiling):.1%}" if tiling.matrix_flops else "-"
    waves = tiling.programs / (tiling.resident * row.target.multiprocessors)
    return [
        *plan_cells(row)[:6], wasted, str(tiling.programs), str(tiling.resident), f"{waves:.2f}",
    ]  # fmt: skip


def waste(problem: ConvProblem, pass_: str, tiling: cost.Tiling) -> float:
    """The share of a tiling's matrix work that no useful FLOP fills."""
    return 1 - problem.flops(pass_) / tiling.matrix_flops


def waste_cells(row: Planned) -> list[str]:
    """A line of the table of waste: that of a plan, the least of any candidate, and what little waste costs."""
    problem, pass_ = row.layer.problem, row.pass_
    found = []
    for name in able(problem, pass_, row.target):
        for config in REGISTRY[name].candidates(problem, pass_, row.target):
            tiling = REGISTRY[name].tiling(problem, pass_, config, row.target)
            found.append((waste(problem, pass_, tiling), cost.estimate(problem, tiling, row.target).time_us))
    frugal = min((time for wasted, time in found if wasted <= MOST_WASTE), default=None)
    mine = waste(problem, pass_, row.tiling)
    return [
        row.layer.name, f"{problem.cin_g} to {problem.cout_g}", pass_, row.algorithm, _config(row.config),
        f"**{mine:.1%}**" if mine > MOST_WASTE else f"{mine:.1%}", f"{min(found)[0]:.1%}",
        "-" if frugal is None else f"{frugal / row.estimate.time_us:.2f}",
    ]  # fmt: skip


def summary(rows: list[Planned]) -> list[list[str]]:
    """A line a pass and layout: rows by algorithm, and those over their goal."""
    lines = []
    for pass_ in PLANNED:
        for layout in LAYOUTS:
            mine = [row for row in rows if (row.pass_, row.layer.problem.layout) == (pass_, layout)]
            taken = collections.Counter(row.algorithm for row in mine)
            over = sum(row.ratio > row.goal for row in mine)
            net = sum(row.net > row.goal for row in mine)
            worst = f"{max(row.net for row in mine):.2f}" if mine else "-"
            by_name = (str(taken[name]) for name in REGISTRY)
            lines.append([pass_, layout, str(len(mine)), *by_name, str(over), str(net), worst])
    return lines


def _shape(problem: ConvProblem) -> str:
    """`3x3 s2 d1, 112x112, 96 channels, batch 128`; the channels as groups x group width where it is not 1."""
    channels = str(problem.c_in) if problem.c_in == problem.c_out else f"{problem.c_in} to {problem.c_out}"
    if problem.cin_g > 1:
        out = "" if problem.cin_g == problem.cout_g else f" to {problem.cout_g}"
        channels = f"{problem.groups} x {problem.cin_g}{out}"
    return (
        f"{problem.kh}x{problem.kw} s{problem.stride[0]} d{problem.dilation[0]}, {problem.h_in}x{problem.w_in}, "
        f"{channels} channels, batch {problem.batch}"
    )


def _config(config: dict) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_').removeprefix('num_')}={value}" for name, value in config.items())


def outputs(problem: ConvProblem, pass_: str) -> int:
    """What counts are divided by: the elements of y, of dx, or, in wgrad, of the dy that it reads."""
    return math.prod(problem.x_shape if pass_ in ("dgrad", "backward") else problem.y_shape)


def counts(answer: dict, elements: int) -> dict[str, float] | None:
    """By output element, what all iterations of the main loop ask for; None where it is not known.

    A kernel without a loop, its only iteration made straight code, counts as a whole. "once": the issue slots of what
    is outside the innermost loop, passed once by each program.
    """
    main, programs = answer["kernels"][0], answer["programs"]
    code, loops = main["code"], main["loops"]
    if code is None or (loops and len(answer["iterations"]) != 1):
        return None
    if loops:
        # The compiler may have unrolled the loop; then a smaller one does the iterations that are left over.
        loop, times = max(loops, key=_work), answer["iterations"][0] / _unrolled(loops)
    else:
        loop, times = code, programs
    found = {name: value * times / elements for name, value in loop.items()}
    # An issue of a warp is a slot of each of its threads.
    outside = code["issues"] - sum(each["issues"] for each in loops or [code])
    return found | {"issues": 32 * found["issues"], "once": 32 * outside * programs / elements}


def _work(loop: dict[str, int]) -> int:
    return loop["loaded_bytes"] + loop["multiply_adds"] + loop["matrix_multiply_adds"]


def _unrolled(loops: list[dict[str, int]]) -> float:
    """The iterations that the largest loop does at once, if the smallest does one."""
    sizes = [_work(loop) for loop in loops]
    return max(sizes) / max(1, min(sizes))


def code_cells(row: Planned, answer: dict) -> list[str]:
    """A line of the second table, from the compiler's answer."""
    problem = row.layer.problem
    cells = [_shape(problem), problem.layout, row.pass_, row.algorithm]
    ratio = f"{row.ratio:.2f}"
    if "failed" in answer:
        return [*cells, *["-"] * 8, ratio, answer["failed"]]
    main, found = answer["kernels"][0], counts(answer, outputs(problem, row.pass_))
    names = ("loaded_bytes", "multiply_adds", "matrix_multiply_adds", "issues", "once")
    by_tiles = found is not None and found["tile_loads"] > 0
    shown = {} if found is None else {name: found[name] for name in names if name != "loaded_bytes" or not by_tiles}
    cells += [number(f"{shown[name]:.6g}") if name in shown else "-" for name in names]
    cells += [str(main[name]) for name in ("registers", "spill_bytes", "shared_bytes")]
    note = "tiles by descriptors" if by_tiles else ""
    if by_tiles and row.pass_ != "wgrad":
        note += "; its loop goes on through the stores of a tile"
    return [*cells, ratio, note if found else "loops not counted"]


def compile_all(rows: list[Planned], target: Target, processes: int) -> Iterator[dict]:
    """The compiler's answers, in the rows' order."""
    with Children("groupconv.compiled", interpret=False, count=processes) as compiler:
        jobs = [
            {
                "problem": problem_json(row.layer.problem), "pass": row.pass_, "algorithm": row.algorithm,
                "config": row.config, "target": target.arch_name, "iterations": True,
            }
            for row in rows
        ]  # fmt: skip
        for answer in [compiler.submit(job) for job in jobs]:
            yield answer.result()


def markdown(subject: Subject, target: Target, planned: list[Planned], code: list[list[str]]) -> str:
    """The file of a subject."""

    def table(header, lines: list[list[str]], left: int) -> str:
        return "\n".join(markdown_table(header, lines, left))

    others = "".join(f" ({goal} for {size}x{size})" for size, goal in subject.goals.items() if size)
    by_width = ""
    if subject.by_width:
        wide = [row for row in planned if row.layer.problem.layout == "nhwc"]
        by_width = WASTE_TEXT.format(table=table(WASTE_HEADER, [waste_cells(row) for row in wide], 5))
    return f"""# {subject.title}, modelled for {target.slug}

**Nothing here was measured.** Times and floors are modelled, counts are of kernels as compiled for {target.arch_name}
by triton {triton.__version__}. {DTYPE}. The floor is the larger of the time to move every operand once and that of the
useful FLOPs on the matrix unit.

## Plans of these layers of the suite

What dispatch plans of our own algorithms (`backend="triton"`). "backward" is dgrad and wgrad by one kernel, and has a
row where that is faster than the two. A launch is modelled as {cost.LAUNCH_US} us, and wgrad and backward make two:
that is most of what small layers are over. Bold: over {subject.goals[0]} times the floor{others}.

{table(("pass", "layout", "rows", *REGISTRY, "over", "over without launches", "worst of these"), summary(planned), 2)}

{table(PLAN_HEADER, [plan_cells(row) for row in planned], 6)}

## Matrix work, occupancy, waves

The matrix multiply-adds that a plan's tiles do and no useful FLOP fills, as a share of all that they do; those of an
instruction at half the rate count twice. Useful are also taps on the padding, which strided dgrad does not do: its
share may be negative. A wave is as many programs as the device holds at once.

{table(WORK_HEADER, [work_cells(row) for row in planned if row.tiling.matrix_flops], 6)}

{by_width}## Compiled main loops

By output element (of y; of dx in dgrad and backward; of dy in wgrad), what the innermost loop of a pass's main kernel
asks for: its instructions in the machine code, times the iterations of all programs, which the launch decides. It is a
count of the compiled code, not a measurement: it has what masks leave out, and what tiles have past the edges. FMA and
issue slots are those of one thread; "once": of the code outside that loop, if each program passes it once. A kernel
without a loop counts as a whole. In fprop all but the weights of implicit_gemm is x: {DTYPE} elements of 2 bytes.

{table(CODE_HEADER, code, 4)}
"""


def main(argv: list[str] | None = None) -> int:
    """Write the tables; the return value is the exit status."""
    parser = argparse.ArgumentParser(
        prog="tables", description="Writes DEPTHWISE.md, NARROW.md, WIDE.md; needs no GPU."
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"{', '.join(SUBJECTS)}; default: all")
    parser.add_argument("--target", default=devices.DEFAULT.slug, metavar="DEVICE", help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="default: perf_reports/modelled_<device>")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that compile")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs: {args.jobs} is not a positive number")
    for name in args.subjects:
        if name not in SUBJECTS:
            parser.error(f"SUBJECT: {name!r} is not one of {', '.join(SUBJECTS)}")
    try:
        target = devices.named(args.target)
    except ValueError as error:
        parser.error(f"--target: {error}")

    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    folder = args.out or pathlib.Path("perf_reports", f"modelled_{target.slug}")
    folder.mkdir(parents=True, exist_ok=True)
    for subject in (SUBJECTS[name] for name in args.subjects or SUBJECTS):
        planned = list(track(plans(subject, subject.suite(), target), "planning", console=console, total=None))
        compiled = list(choices(subject, subject.examples(), target))
        answers = track(
            compile_all(compiled, target, args.jobs), "compiling", console=console, total=len(compiled)
        )  # fmt: skip
        code = [code_cells(row, answer) for row, answer in zip(compiled, answers, strict=True)]
        write_atomically(folder / subject.file, markdown(subject, target, planned, code))
        print(f"{subject.file} in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
