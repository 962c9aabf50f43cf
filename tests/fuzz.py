"""`make fuzz MINUTES=n`: the attacks of test_fuzz.py and test_compiled_fuzz.py, in rounds of random examples.

    python tests/fuzz.py --minutes 60
    python tests/fuzz.py --attacks calls --seed 7 --rounds 1     # one round again

A round is a process of pytest with its own seed. One that fails prints the smallest example that hypothesis finds and
the command that runs it again. What ran is in --state: run again, it goes on with the next seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TESTS = pathlib.Path(__file__).parent
FILES = {"test_fuzz.py": "1", "test_compiled_fuzz.py": "0"}  # and TRITON_INTERPRET, which is a process's own
TIMES = 3  # as many examples in a round as the tests have by themselves
LONGEST = 1800  # seconds of a round, after which it counts as a failure: it hangs
SHOWN = 6000  # characters of what a failing round printed
# Problems of which an algorithm serves many: those that it is tried with. Others draw of everything.
DEPTHWISE = ((1, 1), (1, 1), (1, 2), (1, 3))
ALIGNED = ((8, 8), (8, 24), (16, 16), (24, 40), (40, 16))
LARGE = ((5, 5), (7, 7), (9, 4), (5, 9), (11, 11))
FITTING = {
    "row_block": {"dtypes": ("fp16", "bf16", "tf32")},
    "row_block_tma": {"widths": ALIGNED, "dtypes": ("fp16", "bf16"), "layouts": ("nhwc",)},
    "row_march": {"dtypes": ("fp16", "bf16", "tf32", "fp32")},
    "depthwise_direct": {"widths": DEPTHWISE},
    "depthwise_mma": {"widths": ((1, 1),), "dtypes": ("fp16", "bf16"), "layouts": ("nhwc",)},
    "depthwise_mma_nchw": {"widths": DEPTHWISE, "dtypes": ("fp16", "bf16"), "layouts": ("nchw",)},
    "group_mma": {"widths": ((2, 2), (4, 4), (8, 8), (16, 16)), "dtypes": ("fp16", "bf16"), "layouts": ("nhwc",)},
    "depthwise_map": {
        "widths": DEPTHWISE[:3],
        "dtypes": ("fp16", "bf16"),
        "kernels": ((9, 3), (9, 9), (13, 4), (21, 3)),
    },
    "depthwise_plane": {"widths": DEPTHWISE, "dtypes": ("fp16", "bf16", "tf32")},
    "depthwise_toeplitz": {"widths": DEPTHWISE[:3], "dtypes": ("fp16", "bf16", "tf32"), "kernels": LARGE},
}


def fuzzed(examples: int) -> Callable[[Callable], Callable]:
    """A test of `examples` draws from its `data`, the same every time; with GROUPCONV_FUZZ_TIMES of so many times as
    many, by pytest's seed.
    """
    times = int(os.environ.get("GROUPCONV_FUZZ_TIMES", "0"))
    chosen = settings(
        max_examples=examples * (times or 1), derandomize=not times, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda test: chosen(given(st.data())(test))


@dataclasses.dataclass(frozen=True)
class Attack:
    """A fuzzed test, and how many examples it has by itself."""

    file: str
    examples: int


def attacks() -> dict[str, Attack]:
    """Those that there are, by name."""
    found = {}
    for file in FILES:
        for examples, name in re.findall(r"@fuzzed\((\d+)\)\ndef test_(\w+)", (TESTS / file).read_text()):
            found[name] = Attack(file, int(examples))
    return found


def run_round(name: str, attack: Attack, seed: int, times: int) -> tuple[bool, str]:
    """Whether a round passed, and what it printed."""
    environment = os.environ | {"GROUPCONV_FUZZ_TIMES": str(times), "TRITON_INTERPRET": FILES[attack.file]}
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-header", "-p", "no:cacheprovider",
        f"--timeout={LONGEST}", f"--hypothesis-seed={seed}", f"{TESTS / attack.file}::test_{name}",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    return done.returncode == 0, done.stdout + done.stderr


def read_state(path: pathlib.Path) -> dict[str, dict]:
    """By attack: the next seed, how many examples passed, and the seeds of the rounds that failed."""
    return json.loads(path.read_text()) if path.exists() else {}


def main(argv: list[str] | None = None) -> int:
    found = attacks()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="after which no round begins (%(default)s)")
    parser.add_argument("--rounds", type=int, help="of each attack, at most")
    parser.add_argument("--times", type=int, default=TIMES, help="the examples that a test has by itself (%(default)s)")
    parser.add_argument("--attacks", nargs="+", choices=sorted(found), default=list(found), metavar="NAME")
    parser.add_argument("--seed", type=int, help="of the first round, which leaves the state as it is")
    parser.add_argument("--state", type=pathlib.Path, default=TESTS.parent / ".fuzz.json", help="a file (%(default)s)")
    args = parser.parse_args(argv)
    deadline, passed, failed = time.monotonic() + 60 * args.minutes, 0, 0
    rounds = itertools.count() if args.rounds is None else range(args.rounds)
    for number, name in ((number, name) for number in rounds for name in args.attacks):
        if time.monotonic() >= deadline:
            break
        state = read_state(args.state)
        mine = state.setdefault(name, {"seed": 0, "passed": 0, "failed": []})
        seed = mine["seed"] if args.seed is None else args.seed + number
        examples, began = args.times * found[name].examples, time.monotonic()
        right, printed = run_round(name, found[name], seed, args.times)
        told = f"{name}, seed {seed}: {examples} examples {'passed' if right else 'FAILED'}"
        print(f"{told}, {time.monotonic() - began:.0f} s", flush=True)
        passed, failed = passed + right, failed + (not right)
        if not right:
            again = f"--attacks {name} --seed {seed} --times {args.times} --rounds 1"
            print(f"{printed[-SHOWN:]}\nagain: {sys.executable} {__file__} {again}", flush=True)
        if args.seed is None:
            mine["seed"] = seed + 1
            mine["passed"] += examples * right
            mine["failed"] += [] if right else [seed]
            args.state.write_text(json.dumps(state, indent=1) + "\n")
    for name, mine in read_state(args.state).items():
        print(f"{name}: {mine['passed']} examples passed in all, rounds of seeds {mine['failed']} failed")
    print(f"of this run {passed} rounds passed and {failed} failed; {args.state}")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
