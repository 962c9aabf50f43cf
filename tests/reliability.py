"""Tables of docs/reliability.md: python tests/reliability.py --write, with TRITON_INTERPRET=1."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
import subprocess
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import cases
import torch

from groupconv.algorithms import REGISTRY, interpretable, lack
from groupconv.problem import PASSES, ConvProblem

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "reliability.md"
NOWHERE, BEGIN, END = "none", "<!-- {}: begin -->", "<!-- {}: end -->"
DEPTHWISE = ConvProblem(2, 20, 9, 10, 20, 3, 3, pad=(1, 1, 1, 1), groups=20, dtype="fp16", layout="nhwc")
NARROW = dataclasses.replace(DEPTHWISE, groups=5)
WIDE = ConvProblem(2, 32, 9, 10, 32, 3, 3, pad=(1, 1, 1, 1), groups=2, dtype="fp16", layout="nhwc")


def problems(name: str) -> list[ConvProblem]:
    """One of each class, channels_last and contiguous, as far as an algorithm serves them."""
    on = cases.machine("cpu", "many")
    long = dataclasses.replace(DEPTHWISE, kw=11, pad=(1, 1, 5, 5), w_in=24)
    found = [
        dataclasses.replace(problem, layout=layout, out_layout=layout)
        for problem in (DEPTHWISE, NARROW, WIDE, long)
        for layout in ("nhwc", "nchw")
    ]
    if name == "depthwise_map":
        found = [dataclasses.replace(DEPTHWISE, kh=11, kw=11, pad=(5, 5, 5, 5))]
    return [problem for problem in found if any(lack(name, problem, pass_, on) is None for pass_ in PASSES)]


def spread(name: str, pass_: str, value: float) -> str:
    """How far such a number in an operand spreads over results that F.conv2d has finite: of all problems, the most."""
    on, worst = cases.machine("cpu", "few"), set()
    for problem in problems(name):
        if lack(name, problem, pass_, on) is not None:
            continue
        case = cases.Case(problem, problem.layout, "nchw", problem.layout)
        given = cases.operands(case)
        struck = given.dy if pass_ == "dgrad" else given.x
        struck[0, 3, 0, 2] = value  # at a border, where padding is multiplied by it too
        config = cases.config(REGISTRY[name], problem, pass_, on, "few")
        found = REGISTRY[name].prepare(problem, pass_, config, on, given.strides(problem))(*given.of(pass_))
        expected = cases.references(problem, given)[pass_]
        extra = ~found.isfinite() & expected.isfinite()
        assert not (found.isfinite() & ~expected.isfinite()).any()
        if pass_ == "wgrad":
            group = 3 // problem.cout_g
            own = extra[group * problem.cout_g : (group + 1) * problem.cout_g]
            worst |= {"the filter"} if own.any() else set()
            worst |= {"other groups"} if extra.sum() > own.sum() else set()
        else:
            width = problem.cout_g if pass_ == "fprop" else problem.cin_g
            group = 3 // (problem.cin_g if pass_ == "fprop" else problem.cout_g)
            own = extra[:, group * width : (group + 1) * width]
            worst |= {"the map"} if own.any() else set()
            worst |= {"other groups"} if extra.sum() > own.sum() else set()
            worst |= {"other images"} if extra[1:].any() else set()
    served = any(lack(name, problem, pass_, on) is None for problem in problems(name))
    return ", ".join(sorted(worst)) or (NOWHERE if served else "")


def spread_row(name: str, value: float = math.nan) -> str:
    return f"| {name} | " + " | ".join(spread(name, pass_, value) for pass_ in PASSES) + " |"


def spread_table() -> list[str]:
    """An infinity does as NaN does. What the interpreter cannot run keeps its row, which test_fragments.py checks."""
    kept = {line.split(" | ")[0].strip("| "): line for line in DOCUMENT.read_text().splitlines()}
    lines = [spread_row(name) if interpretable(name) else kept[name] for name in sorted(REGISTRY)]
    names = filter(interpretable, sorted(REGISTRY))
    assert [spread_row(name, math.inf) for name in names] == [line for line in lines if interpretable(line.split()[1])]
    return ["| algorithm | fprop | dgrad | wgrad |", "|---|---|---|---|", *lines]


def error_table() -> list[str]:
    """||error|| / ||result|| of wgrad against float64 by the length of the sum, beside F.conv2d's on this CPU."""
    columns = [f"{dtype} {whose}" for dtype in ("fp32", "fp16", "bf16") for whose in ("ours", "F.conv2d")]
    lines = ["| terms | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    on = cases.machine("cpu", "few")
    for power in range(7):
        side = math.isqrt(10**power) or 1
        high, wide = side, 10**power // side
        row = []
        for dtype in ("fp32", "fp16", "bf16"):
            problem = ConvProblem(1, 8, high, wide, 8, 1, 1, groups=2, dtype=dtype, layout="nchw", out_layout="nchw")
            given = cases.operands(cases.Case(problem, "nchw", "nchw", "nchw"))
            config = cases.config(REGISTRY["implicit_gemm"], problem, "wgrad", on, "few")
            ours = REGISTRY["implicit_gemm"].prepare(problem, "wgrad", config, on, given.strides(problem))(
                given.dy, given.x
            )
            native = torch.nn.grad.conv2d_weight(given.x, problem.w_shape, given.dy, groups=2)
            exact = cases.references(problem, given)["wgrad"]
            row += [f"{cases.error(ours, exact):.1e}", f"{cases.error(native, exact):.1e}"]
        lines.append(f"| {high * wide:,} | " + " | ".join(row) + " |")
    return lines


def first_calls(*models: str) -> list[str]:
    """Of each model how many kernels an epoch compiles, by a process that has compiled ones: they are few enough."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name("first_calls.py")), *models]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


TABLES = {"spread": spread_table, "errors": error_table, "kernels": first_calls}


def written(text: str, name: str, lines: list[str]) -> str:
    begin, end = BEGIN.format(name), END.format(name)
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{rest.partition(end)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}, else to the terminal")
    args = parser.parse_args()
    cases.set_precision("ieee")
    text = DOCUMENT.read_text()
    for name in args.tables:
        lines = TABLES[name]()
        print("\n".join(lines), flush=True)
        text = written(text, name, lines)
    if args.write:
        DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
