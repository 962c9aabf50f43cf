"""Tables of what launches did, from the counters of every PTX instruction."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

import numpy as np

from .machine import COUNTERS, Result
from .parser import Statement

# What a PTX instruction becomes in machine code, roughly, where that is not one instruction. Moves mostly vanish.
_WEIGHTS = (
    (r"mov\.|cvta|ld\.param|ret|createpolicy", 0.0), (r"(div|rem)\.[su]32", 22.0), (r"(div|rem)\.[su]64", 70.0),
    (r"(div|rem)\.[su]16", 14.0), (r"(mul|mad)\.lo\.s64|mul\.(hi|wide)\.[su]64", 4.0),
    (r"(add|sub|and|or|xor|shl|shr|neg|selp)\.[subf]64", 2.0), (r"cvt\.(s64|u64)\.", 0.7),
    (r"div\.(full|rn|approx)\.f32", 9.0), (r"setp\.\w+\.[su]64", 2.0),
)  # fmt: skip
_CLASSES = (
    (r"ld\.global", "ld.global"), (r"st\.global", "st.global"), (r"ld\.shared", "ld.shared"),
    (r"st\.shared", "st.shared"), (r"ldmatrix", "ldmatrix"), (r"stmatrix", "stmatrix"),
    (r"cp\.async\.(ca|cg)", "cp.async"), (r"cp\.async\.bulk\.tensor", "TMA"), (r"cp\.async", "cp.async sync"),
    (r"mbarrier|elect", "mbarrier"), (r"bar|fence|membar", "barrier/fence"),
    (r"shfl|movmatrix|vote|redux|activemask", "shuffle"), (r"bra|ret|exit", "branch"),
    (r"ld\.param|mov|cvta|createpolicy", "mov/param"), (r"atom|red", "atomic"), (r"cvt", "convert"),
    (r"(fma|add|sub|mul|mad|min|max|div|neg|abs|sqrt|rcp|ex2|lg2)\.\S*f(16|32)|\w+\.\S*bf16", "float"),
    (r"setp|selp|and\.pred|or\.pred|not\.pred|xor\.pred", "compare/select"),
)  # fmt: skip


def category(statement: Statement) -> str:
    """The class of an instruction; of matrix products, with their shape."""
    head = statement.op.split(".")[0]
    if head in ("mma", "wgmma"):
        shape = re.search(r"m\d+n\d+k\d+", statement.op)
        return f"{head} {shape[0] if shape else 'sync'}"
    return next((name for pattern, name in _CLASSES if re.match(pattern, statement.op)), "integer")


def _weight(statement: Statement) -> float:
    return next((weight for pattern, weight in _WEIGHTS if re.match(pattern, statement.op)), 1.0)


def totals(result: Result) -> dict[str, float]:
    """Counts of a launch: instructions, FLOPs of matrix products, bytes asked of global and of shared memory, of L2
    and DRAM; and by class of instruction, "issues", "requests", "sectors", "bytes", "wavefronts" and "ideal" of it.
    """
    found: collections.Counter = collections.Counter()
    for counts, s in zip(result.counters.astype(np.float64), result.loaded.program.statements, strict=True):
        of = dict(zip(COUNTERS, counts, strict=True))
        if not of["issues"]:
            continue
        kind = category(s)
        found["warp_instructions"] += of["issues"]
        found["machine_instructions"] += of["issues"] * _weight(s)
        found[f"issues {kind}"] += of["issues"]
        if kind in ("ld.global", "st.global", "cp.async", "TMA"):
            for what in ("requests", "sectors", "bytes"):
                found[f"{what} {kind}"] += of[what]
            found["l2_bytes"] += 32 * of["l1_misses"]
            found["asked_bytes"] += of["useful"] if kind == "TMA" else of["bytes"]
        if kind in ("ld.shared", "st.shared", "ldmatrix", "stmatrix", "TMA"):
            found["shared_bytes"] += of["bytes"]
        elif kind == "cp.async":
            found["shared_bytes"] += of["useful"]
        if of["wavefronts"]:
            found[f"wavefronts {kind}"] += of["wavefronts"]
            found[f"ideal {kind}"] += of["ideal_wavefronts"]
        if product := re.match(r"(wgmma|mma) m(\d+)n(\d+)k(\d+)", kind):
            m, n, k = map(int, product.groups()[1:])
            times = of["issues"] / (4 if product[1] == "wgmma" else 1)
            found[f"{product[1]}_flops"] += 2 * m * n * k * times
            if product[1] == "wgmma":
                rows = n if s.operands[1].startswith("{") else n + m
                found["shared_bytes"] += times * rows * k * (4 if "tf32" in s.op else 2)
    found["dram_read"], found["dram_written"] = result.read_bytes, result.written_bytes
    return dict(found)


def profile(results: Sequence[Result], lines: int = 12, blocks: int = 8) -> str:
    """Tables of launches: by class of instruction, by block of PTX, by line of Python."""
    return "\n".join(line for result in results for line in _profile(result, lines, blocks))


def _profile(result: Result, lines: int, blocks: int) -> list[str]:
    total = collections.Counter(totals(result))
    out = [
        f"== {result.name}: grid {result.grid}, {result.loaded.threads} threads, {result.shared_bytes} bytes of shared"
        f" memory, {result.programs} programs ran",
        f"   {total['warp_instructions']:.3g} warp instructions of PTX, about {total['machine_instructions']:.3g} of"
        f" machine code; DRAM read {total['dram_read']:.3g} B, written {total['dram_written']:.3g} B;"
        f" L2 {total['l2_bytes']:.3g} B; shared {total['shared_bytes']:.3g} B;"
        f" mma {total['mma_flops']:.3g}, wgmma {total['wgmma_flops']:.3g} FLOP",
        f"   {'class':16} {'warp instr.':>12} {'requests':>10} {'B/request':>10} {'sectors/req':>11} {'efficiency':>10}"
        f" {'waves':>10} {'ideal':>10}",
    ]
    for key in sorted((key for key in total if key.startswith("issues ")), key=lambda key: -total[key]):
        kind = key.removeprefix("issues ")
        requests, sectors, bytes_ = (total[f"{what} {kind}"] for what in ("requests", "sectors", "bytes"))
        row = f"   {kind:16} {total[key]:12.0f}"
        if requests:
            efficiency = bytes_ / (32 * sectors) if sectors else 0
            row += f" {requests:10.0f} {bytes_ / requests:10.1f} {sectors / requests:11.2f} {efficiency:10.2f}"
        else:
            row += " " * 45
        if total[f"wavefronts {kind}"]:
            row += f" {total[f'wavefronts {kind}']:10.0f} {total[f'ideal {kind}']:10.0f}"
        out.append(row.rstrip())
    return [*out, *_by(result, "block", blocks), *_by(result, "line", lines)]


def _by(result: Result, what: str, most: int) -> list[str]:
    groups: dict[str, collections.Counter] = {}
    program, block = result.loaded.program, 0
    for i, (counts, s) in enumerate(zip(result.counters.astype(np.float64), program.statements, strict=True)):
        of = dict(zip(COUNTERS, counts, strict=True))
        if i in program.blocks:
            block = i
        if what == "block":
            key = f"PTX {program.statements[block].line}.."
        else:
            key = f"{result.loaded.kernel.files.get(s.loc[0], '?')}:{s.loc[1]}" if s.loc else "?"
        group = groups.setdefault(key, collections.Counter())
        group["machine"] += of["issues"] * _weight(s)
        group["sectors"] += of["sectors"]
        group["waves"] += of["wavefronts"]
        group["lost"] += of["wavefronts"] - of["ideal_wavefronts"]
        group["times"] = max(group["times"], of["issues"])
        group["instructions"] += 1
    every = sum(group["machine"] for group in groups.values()) or 1
    out = [f"   by {what}: share of machine instructions, instructions x warps, sectors, waves, lost to bank conflicts"]
    for key, group in sorted(groups.items(), key=lambda item: -item[1]["machine"])[:most]:
        out.append(
            f"     {100 * group['machine'] / every:5.1f}%  {key:28} {group['instructions']:5} x {group['times']:<9.0f}"
            f" {group['sectors']:<10.0f} {group['waves']:<9.0f} {group['lost']:.0f}"
        )
    return out
