"""Whether the tests see faults: each is planted in a copy of the package, and the tests run until the first fails.

    python tests/planted_faults.py [WORD ...]     the faults whose names have all words; by default all of them

A table says which test saw a fault, and after how many seconds. What the short tests miss is tried with every named
problem too (`-m full`). The exit status is 1 where the short tests miss a fault.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import rich.markup
from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).parent.parent
# Where the folders of the checkout are installed.
FOLDERS = {
    "groupconv": "groupconv", "kernels": "groupconv/kernels", "autotune_configs": "groupconv/autotune_configs",
    "perf_reports": "groupconv/perf_reports", "tests": "tests",
}  # fmt: skip
TRIALS = "tests/test_trials.py"
NUMERIC = ("tests/test_numerics.py", "tests/test_descriptors.py", "tests/test_ops.py", "tests/test_properties.py")
RUNS = ("tests/test_compiled_code.py", "-k", "runs")
GLUON = ("tests/test_fragments.py", "-k", "numbers")


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old`, which occurs once in a file of the checkout, becomes `new`. compiled: what kernels as compiled alone show,
    the arguments of pytest by which they do.
    """

    file: str
    old: str
    new: str
    name: str
    compiled: tuple[str, ...] = ()

    def planted(self, text: str) -> str:
        """The file's text with the fault in it. Raises ValueError where the text to change is not there once."""
        if text.count(self.old) != 1:
            raise ValueError(f"fault {self.name!r}: {self.file} has {text.count(self.old)} times: {self.old}")
        return text.replace(self.old, self.new)


FAULTS = [
    # --- implicit_gemm ---
    Fault(
        "kernels/implicit_gemm.py",
        "total = mma(x, wgt, acc[i], PRECISION, EMULATE_BF16)",
        "total = mma(x, wgt, acc[i], PRECISION, EMULATE_BF16).to(tl.float16).to(tl.float32)",
        "fprop accumulates in fp16",
    ),
    Fault(
        "kernels/implicit_gemm.py",
        "iw = rows(iw, X_PIXELS_LAST)\n    x_ptr += group * CIN_G * stride_x_c",
        "iw = rows(iw, X_PIXELS_LAST)\n    x_ptr += group * COUT_G * stride_x_c",
        "fprop reads x of another group",
    ),
    Fault(
        "kernels/implicit_gemm.py",
        "m = index(pid // (N_TILES * GROUPS), INDEX_64) * BLOCK_M",
        "m = pid // (N_TILES * GROUPS) * BLOCK_M",
        "fprop has 32-bit offsets of pixels",
    ),
    Fault(
        "kernels/implicit_gemm.py",
        "ow = (iw + PAD_W - s_first * DIL_W) // CONV_STRIDE_W",
        "ow = (iw + PAD_W - s_first) // CONV_STRIDE_W",
        "dgrad ignores the dilation of a phase's first tap",
    ),
    Fault(
        "kernels/implicit_gemm.py",
        "live &= (ih < h_in) & (iw < w_in)",
        "live &= ih < h_in",
        "dgrad stores columns past the map",
    ),
    Fault(
        "kernels/implicit_gemm.py",
        "for p0 in tl.range(0, chunk, BLOCK_K):",
        "for p0 in tl.range(0, chunk - BLOCK_K, BLOCK_K):",
        "wgrad loses a chunk of the reduction",
    ),
    # --- row_block ---
    Fault(
        "kernels/row_block.py",
        "y += tl.load(bias_ptr + o, mask=n < COUT_G, other=0.0).to(tl.float32)[None, :]",
        "y += 0.0",
        "fprop forgets the bias",
    ),
    Fault(
        "groupconv/algorithms/row_block.py",
        "adjacent = problem.kw == 1 or w[3] == problem.cin_g",
        "adjacent = True",
        "fprop takes a sliced weight for a dense one",
    ),
    Fault(
        "kernels/row_block.py",
        "(s_first + t * (CONV_STRIDE_W // COMMON_W)) * stride_wgt_w",
        "(s_first + t * (CONV_STRIDE_W // COMMON_W)) * stride_wgt_h",
        "dgrad steps through the taps of w by the wrong stride",
    ),
    Fault(
        "kernels/row_block.py",
        "block = split * chunk + b\n",
        "block = split * (chunk - 1) + b\n",
        "wgrad adds a block to two partial sums",
    ),
    # --- row_block_tma ---
    Fault(
        "kernels/row_block_tma.py",
        "tiles = N_TILES * GROUPS * row_blocks * column_tiles * image_tiles",
        "tiles = N_TILES * GROUPS * row_blocks * column_tiles * tl.maximum(image_tiles - 1, 1)",
        "fprop leaves out the ragged last block of images",
    ),
    Fault(
        "kernels/row_block_tma.py",
        "row = oh * CONV_STRIDE_H + r * DIL_H + source_row(MET, j)",
        "row = oh * CONV_STRIDE_H + r + source_row(MET, j)",
        "fprop ignores the dilation between steps of one kernel row",
    ),
    Fault(
        "kernels/row_block_tma.py",
        "column = ow - t * (DIL_W // COMMON_W)",
        "column = ow + t * (DIL_W // COMMON_W)",
        "dgrad goes through the taps the wrong way",
    ),
    Fault(
        "kernels/row_block_tma.py",
        "mask=(n < COUT_G)[:, None] & (c < CIN_G)[None, :])",
        "mask=(n < COUT_G)[:, None] & (c >= 0)[None, :])",
        "wgrad drops the mask of channels",
    ),
    Fault(
        "groupconv/algorithms/row_block_tma.py",
        "columns = (w // view_w, strides[3] * view_w, lanes // images)",
        "columns = (w, strides[3] * view_w, lanes // images)",
        "phases of a stride have columns past the map",
    ),
    # --- row_march ---
    Fault(
        "kernels/row_march.py",
        "live_y = (rows(image < batch, Y_PIXELS_LAST) & cols(live_o, Y_PIXELS_LAST),)",
        "live_y = (rows(image <= batch, Y_PIXELS_LAST) & cols(live_o, Y_PIXELS_LAST),)",
        "fprop stores the lanes past the last image",
    ),
    Fault(
        "kernels/row_march.py",
        "live_y[0] & rows(ow + w < w_out, Y_PIXELS_LAST)",
        "live_y[0] & rows(ow + w <= w_out, Y_PIXELS_LAST)",
        "fprop stores a lane's columns past the row",
    ),
    Fault(
        "kernels/row_march.py",
        "* taps + chunk - column // conv_stride",
        "* taps + (chunk - column // conv_stride + 1) % taps",
        "wgrad of several columns adds to a neighbouring tap",
    ),
    Fault(
        "kernels/row_march.py",
        "at + reach // DIL_W * stride_wgt_w",
        "at + (KW - 1 - reach // DIL_W) * stride_wgt_w",
        "dgrad flips the kernel",
    ),
    Fault(
        "kernels/row_march.py",
        "WARM_UP: tl.constexpr = (KH - 1) // CONV_STRIDE_H",
        "WARM_UP: tl.constexpr = 0",
        "backward forgets the rows of dy above its segment",
    ),
    Fault(
        "kernels/row_march.py",
        "p = (group * blocks + b) * BLOCK_P",
        "p = (group + b) * BLOCK_P",
        "backward adds blocks of lanes twice",
    ),
    # --- depthwise_direct ---
    Fault(
        "kernels/depthwise_direct.py",
        "x_at = x_p + cols(c // MULTIPLIER * stride_x_c, PIXELS_LAST)",
        "x_at = x_p + cols(c * stride_x_c, PIXELS_LAST)",
        "fprop ignores the channel multiplier",
    ),
    Fault(
        "kernels/depthwise_direct.py",
        "last = tl.minimum(first + steps, (h_in - 1 + PAD_H) // CONV_STRIDE_H + 1)",
        "last = tl.minimum(first + steps, (h_in - 1 + PAD_H) // CONV_STRIDE_H)",
        "dgrad loses the last rows",
    ),
    Fault(
        "kernels/depthwise_direct.py",
        "found[first + tap] = tap // kw * dil_h * width * stride + z",
        "found[first + tap] = tap // kw * width * stride + z",
        "wgrad ignores the dilation of rows",
    ),
    Fault(
        "kernels/depthwise_direct.py",
        "return tuple(sorted(reach // stride - least for reach in reaches if reach % stride == 0))",
        "return tuple(sorted(reach // stride - least for reach in reaches if reach % stride == 0)[:-1])",
        "backward loses the last output column",
    ),
    Fault(
        "kernels/depthwise_direct.py",
        "x_ptr, x_at, iw, live_c, first + a, h_in",
        "x_ptr, x_at, iw, live_c, first, h_in",
        "fprop starts with the first step's rows for all that are loaded ahead",
    ),
    Fault(
        "kernels/runs.py",
        "return runs.index(column // run) * run + column % run",
        "return min(runs.index(column // run) * run + column % run, len(runs) * run - 2)",
        "the last column of the last run is taken for its neighbour",
    ),
    Fault(
        "kernels/runs.py",
        "pair = tl.join(tiles[i], tiles[i + (RUN >> (stage + 1))])",
        "pair = tl.join(tiles[i + (RUN >> (stage + 1))], tiles[i])",
        "columns that are stored together change places",
    ),
    Fault(
        "groupconv/algorithms/depthwise_direct.py",
        "return run(width * problem.stride[1], problem.w_in, x), run(width, problem.w_out, y)",
        "return run(width * problem.stride[1], problem.w_in, x), run(width, problem.w_out, y and (0, 0, 0, y[3]))",
        "runs of dy go by nothing but its columns' stride",
        compiled=RUNS,
    ),
    Fault(
        "groupconv/algorithms/row_march.py",
        "read, *(source or ())[:3], lanes // step",
        "read, lanes // step",
        "row_march's runs go by the source's columns, whatever lies between rows",
        compiled=RUNS,
    ),
    Fault(
        "kernels/row_march.py",
        "return tl.reshape(tl.join(even, odd), (CHANNELS, LANES, RUN * 2))",
        "return tl.reshape(tl.join(odd, even), (CHANNELS, LANES, RUN * 2))",
        "row_march stores the columns of dx's phases in one another's place",
    ),
    Fault(
        "kernels/row_march.py",
        "(columns[place(RUNS, item(MET, tap * RUN + i), RUN)],)",
        "(columns[place(RUNS, item(MET, tap * RUN + i // 2 * 2), RUN)],)",
        "row_march takes every second column of a run for its neighbour",
    ),
    # --- depthwise_plane ---
    Fault(
        "kernels/depthwise_plane.py",
        "s = k % W_IN - j % W_OUT * CONV_STRIDE_W + PAD_W",
        "s = k % W_IN - j % W_OUT * CONV_STRIDE_H + PAD_W",
        "matrices have the strides swapped",
    ),
    Fault(
        "kernels/depthwise_plane.py",
        "live = lift((n < batch)[:, None], BLOCK_C) & live_c",
        "live = lift((n <= batch)[:, None], BLOCK_C) & live_c",
        "backward takes an image too many",
    ),
    Fault(
        "kernels/depthwise_plane.py",
        "for first in tl.static_range(0, KH, TAP_ROWS):",
        "for first in tl.static_range(0, KH - 1, TAP_ROWS):",
        "wgrad loses the taps of a ragged last block",
    ),
    # --- depthwise_mma ---
    Fault(
        "kernels/depthwise_mma.py",
        "        in_col = block * (BLOCK_W * CONV_STRIDE_W) - LEFT",
        "        in_col = block * BLOCK_W - LEFT",
        "fragments of fprop ignore the stride of columns",
        compiled=GLUON,
    ),
    Fault(
        "kernels/depthwise_mma.py",
        "n = (t - first) * IN + i\n            async_copy.wait_group(STAGES - 2)",
        "n = (t - first) * IN + i\n            async_copy.wait_group(STAGES - 1)",
        "fragments are read before they are copied",
        compiled=GLUON,
    ),
    Fault(
        "kernels/fragments.py",
        "low | (high << 16)",
        "high | (low << 16)",
        "rows of dy that are carried change places",
        compiled=GLUON,
    ),
    Fault(
        "kernels/fragments.py",
        "(c + v < CHANNELS) & (first_tap + r < KH)",
        "c + v < CHANNELS",
        "fragments of wgrad store filter rows past the last",
        compiled=GLUON,
    ),
    Fault(
        "kernels/fragments.py",
        "gl.static_range((KW + K - 1) // K)",
        "gl.static_range(1)",
        "fragments of wgrad forget taps that a narrow map meets",
        compiled=GLUON,
    ),
    Fault(
        "groupconv/algorithms/depthwise_mma.py",
        'scalars, {"X_VECTOR": 1}, (0,)',
        'scalars, {}, (0,)',
        "copies of 16 bytes from anywhere",
        compiled=("tests/test_fragments.py", "-k", "begin_anywhere"),
    ),
    # --- depthwise_mma_nchw ---
    Fault(
        "kernels/fragments.py",
        "column // 2 % PAIRS * 8",
        "column // 2 % PAIRS * 4",
        "wgrad of rows looks for columns in other slots",
        compiled=GLUON,
    ),
    Fault(
        "kernels/depthwise_mma_nchw.py",
        "limit = gl.minimum(height, row + count * DIL_H)",
        "limit = height",
        "lanes go on into the next segment's rows",
        compiled=GLUON,
    ),
    Fault(
        "kernels/depthwise_mma_nchw.py",
        "permute([0, 3, 2, 1, 4]).reshape([C, K, M // 2])",
        "permute([0, 3, 2, 4, 1]).reshape([C, K, M // 2])",
        "wgrad of rows takes lanes for their neighbours",
        compiled=GLUON,
    ),
    Fault(
        "groupconv/algorithms/depthwise_mma_nchw.py",
        "math.gcd(8, widths[name], *strides[name][:3], *columns)",
        "math.gcd(8, widths[name], *columns)",
        "rows of views are read as if they were aligned",
        compiled=GLUON,
    ),
    # --- group_mma ---
    Fault(
        "kernels/group_mma.py",
        "        d = spread(n // GROUP + OFFSET, 2) - spread(k // GROUP, 1)",
        "        d = spread(n // GROUP, 2) - spread(k // GROUP, 1)",
        "dgrad of narrow groups ignores the padding",
        compiled=GLUON,
    ),
    Fault(
        "kernels/group_mma.py",
        "place = at % 16 // 2 + at % 2 * 8",
        "place = at % 16",
        "wgrad of narrow groups takes inputs for their neighbours",
        compiled=GLUON,
    ),
    Fault(
        "kernels/group_mma.py",
        "j * stride_w + part, sixteens - 1",
        "j + part, sixteens - 1",
        "wgrad of narrow groups ignores the stride of columns",
        compiled=GLUON,
    ),
    # --- depthwise_toeplitz ---
    Fault(
        "kernels/depthwise_toeplitz.py",
        "in_row = out_row * CONV_STRIDE_H - PAD_H\n        in_col = block * (BLOCK_W * CONV_STRIDE_W) - LEFT",
        "in_row = out_row * CONV_STRIDE_H - PAD_H\n        in_col = block * BLOCK_W - LEFT",
        "fprop's blocks of columns ignore the stride",
    ),
    Fault(
        "kernels/depthwise_map.py",
        "wgt_row = wgt_ptr + (KH - 1 - r if TRANSPOSED else r) * stride_wgt_h",
        "wgt_row = wgt_ptr + r * stride_wgt_h",
        "dgrad of whole maps does not turn the kernel round",
    ),
    Fault(
        "kernels/depthwise_toeplitz.py",
        "mask = (s + k < KW) & (first_tap + r < KH)",
        "mask = s + k < KW",
        "wgrad stores filter rows past the last",
    ),
    # --- What they share ---
    Fault(
        "kernels/tiles.py",
        "(KERNEL - first + STEP - 1) // STEP",
        "(KERNEL - first) // STEP",
        "strided dgrad loses a tap",
    ),
    Fault("kernels/tiles.py", "return acc.to(dtype)", "return acc.to(tl.bfloat16).to(dtype)", "results become bf16"),
    Fault(
        "kernels/reduce.py",
        "mask=(split < splits)[:, None]",
        "mask=(split < splits // ROWS * ROWS)[:, None]",
        "the sum of splits leaves out the last of them",
    ),
    Fault(
        "groupconv/algorithms/calls.py",
        "named_strides(\"dw\", dense_strides(problem.w_shape, True))",
        "named_strides(\"dw\", dense_strides(problem.w_shape, False))",
        "partial sums lie in another order than they are read",
    ),
    Fault(
        "groupconv/algorithms/calls.py",
        "*counts) + 2**20 >= 2**31",
        "*counts) >= 2**62",
        "no offset is 64-bit",
    ),
    Fault(
        "groupconv/algorithms/calls.py",
        "\"PAD_H\": problem.pad[0], \"PAD_W\": problem.pad[2]",
        "\"PAD_H\": problem.pad[1], \"PAD_W\": problem.pad[2]",
        "the padding below is taken for that above",
    ),
    Fault(
        "groupconv/call.py",
        "            return dx, dw, dy.sum((0, 2, 3)) if need_b else None",
        "            return dx, dw, dy.mean((0, 2, 3)) if need_b else None",
        "the bias has another gradient",
    ),
    Fault(
        "groupconv/trial.py",
        "            if not error <= bound:",
        "            if False:",
        "a trial takes wrong numbers",
    ),
    Fault(
        "groupconv/trial.py",
        "            with launcher.poisoned():",
        "            if True:",
        "a trial does not see what is left unwritten",
    ),
    Fault(
        "groupconv/trial.py",
        "if DEVICE.capturing() or not self._lock",
        "if not self._lock",
        "a trial goes on while a graph is captured",
    ),
    Fault(
        "groupconv/trial.py",
        "        return statistics.median(self.times[1:])",
        "        return statistics.mean(self.times)",
        "a trial counts the first run",
    ),
    Fault(
        "groupconv/raced.py",
        "(1.0 - MARGIN)",
        "(1.0 + MARGIN)",
        "a race is won by less than its margin",
    ),
    Fault(
        "groupconv/call.py",
        "        aligned = not tensor.data_ptr() & 15",
        "        aligned = True",
        "a race of unaligned tensors decides for all",
    ),
]  # fmt: skip


@contextlib.contextmanager
def copied(fault: Fault | None):
    """A folder with a copy of the package and its tests, and the fault in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for source, target in FOLDERS.items():
            shutil.copytree(ROOT / source, copy / target, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if fault is not None:
            first, _, rest = fault.file.partition("/")
            file = copy / FOLDERS[first] / rest
            file.write_text(fault.planted(file.read_text(encoding="utf-8")), encoding="utf-8")
        yield copy


def first_failure(copy: pathlib.Path, *arguments: str, compiled: bool = False) -> str | None:
    """The first test that fails in a copy, None where all pass."""
    environment = os.environ | {
        "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0" if compiled else "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", *arguments]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode in (0, 5):  # all passed, or none was there
        return None
    if done.returncode < 0:  # read or written far outside its tensors
        return f"a test that crashes, signal {-done.returncode}"
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.MULTILINE)
    if failed is None:
        raise RuntimeError(
            f"pytest ended with status {done.returncode} and no test that failed:\n{done.stdout[-3000:]}"
        )
    return failed[1]


def seen_by(fault: Fault) -> str | None:
    """The first of the short tests that fails: of the fault's own algorithm, then of all."""
    algorithm = pathlib.Path(fault.file).stem
    own = ["-k", algorithm] if "algorithms/" in fault.file or fault.file.startswith("kernels/") else []
    with copied(fault) as copy:
        if fault.compiled:
            return first_failure(copy, *fault.compiled, compiled=True)
        first = TRIALS if algorithm in ("trial", "raced", "call") else NUMERIC[0]
        return first_failure(copy, first, *own) or first_failure(copy, *NUMERIC)


def tried(fault: Fault) -> tuple[str, float, bool]:
    """(what saw a fault, after how many seconds, whether that is one of the short tests)."""
    start = time.monotonic()
    test = seen_by(fault)
    if test is not None:
        return test, time.monotonic() - start, True
    with copied(fault) as copy:
        named = first_failure(copy, NUMERIC[0], "-m", "full")
    return f"only {named}" if named else "nothing", time.monotonic() - start, False


def main(words: list[str]) -> int:
    faults = [fault for fault in FAULTS if all(word in f"{fault.file} {fault.name}" for word in words)]
    table, console, all_seen = Table("file", "fault", "seen by", "seconds"), Console(width=200), True
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for fault, (test, seconds, seen) in zip(faults, pool.map(tried, faults), strict=True):
            row = fault.file, fault.name, test, f"{seconds:.0f}"
            print(*row, sep=": ", flush=True)
            table.add_row(*map(rich.markup.escape, row))
            all_seen &= seen
    console.print(table)
    return 0 if all_seen else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
