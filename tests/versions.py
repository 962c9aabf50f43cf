"""A slice of the tests with other versions of torch and Triton than the pinned ones: a line for each pair.

    python tests/versions.py                                # make versions
    python tests/versions.py --torch 2.13.0 --triton 3.8.0

Of torch only builds for CPUs are taken (those for GPUs bring gigabytes). A Triton that is too old must be refused with
a message, while F.conv2d serves. Each version is installed once, in .venv/versions, and found through PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / ".venv" / "versions"
TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
TRITON = ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
OLDEST = (3, 6)
WITH = {"3.6.0": ["numpy<2.4"]}  # which its interpreter needs
SLICES = {
    "interpreted": ["tests/test_numerics.py", "tests/test_torch_private.py", "-k", "k3x3 or gone or without"],
    "compiled": ["tests/test_compile.py", "-k", "vectorised"],
}
REFUSED = """
import torch, groupconv
x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3)
assert torch.equal(groupconv.triton_conv(x, w, groups=2), torch.conv2d(x, w, groups=2))
try:
    groupconv.triton_conv(x, w, groups=2, backend="triton")
except NotImplementedError as error:
    print(str(error).rpartition(": ")[2])
"""


def installed(package: str, version: str, build: str = "") -> list[pathlib.Path] | None:
    """The folder with a version of a package, if that is not the pinned one; None where there is no such build."""
    if importlib.metadata.version(package).partition("+")[0] == version:
        return []
    folder = FOLDER / f"{package}-{version}"
    done = folder / ".done"
    if not done.exists():
        wanted = [f"{package}=={version}{build}", *WITH.get(version, ())]
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--upgrade"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *wanted]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        done.touch()
    return [folder]


def python(arguments: list[str], folders: list[pathlib.Path]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


def outcome(torch: str, triton: str) -> tuple[bool, str]:
    """Whether a pair does what it should, and what that was."""
    torches, tritons = installed("torch", torch, "+cpu"), installed("triton", triton)
    if torches is None or tritons is None:
        return True, f"not tried: no build of {'torch for CPUs' if torches is None else 'Triton'}"
    found = torches + tritons
    if tuple(map(int, triton.split(".")[:2])) < OLDEST:
        done = python(["-c", REFUSED], found)
        return f"Triton {triton} cannot be used" in done.stdout, done.stdout.strip() or done.stderr
    said = []
    for name, chosen in SLICES.items():
        done = python(["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *chosen], found)
        if done.returncode:
            return False, done.stdout + done.stderr
        said.append(f"{name}: {done.stdout.splitlines()[-1]}")
    return True, "; ".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--torch", nargs="+", default=TORCH, help="(%(default)s)")
    parser.add_argument("--triton", nargs="+", default=TRITON, help="(%(default)s)")
    args, bad = parser.parse_args(), 0
    print("| torch | Triton | what happened | seconds |\n|---|---|---|---|")
    for torch, triton in itertools.product(args.torch, args.triton):
        began = time.monotonic()
        right, said = outcome(torch, triton)
        bad += not right
        said = said if right else f"FAILED {said[-2000:]}"
        print(f"| {torch} | {triton} | {said} | {time.monotonic() - began:.0f} |", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
