"""This library as a kernel of Hugging Face's Hub: a project that kernel-builder takes, and what comes of it.

    python hub/build.py [OUT]

OUT, by default dist/hub, has the project (build.toml, CARD.md, flake.nix, torch-ext/) and a variant a backend in build/
(`kernels.get_local_kernel(OUT)` loads one). Sources are copied as they are: what is different on the Hub lies in hub/.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import pathlib
import re
import shutil
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Folders of the checkout, and where they lie in the kernel's package.
FOLDERS = {"groupconv": "library", "kernels": "library/kernels", "autotune_configs": "library/autotune_configs"}
# Of groupconv/, what no call needs: the commands.
TOOLS = (
    "__main__.py", "cli.py", "options.py", "measuring/", "common/files.py", "common/progress.py",
    "compiling/command.py", "compiling/interpreter.py",
)  # fmt: skip
NAME = "groupconv"
Files = dict[str, bytes]  # by path


def settings() -> dict[str, Any]:
    """What build.toml says."""
    text = (ROOT / "hub/build.toml").read_text(encoding="utf-8")
    return {name: json.loads(value) for name, value in re.findall(r"^([\w-]+) = (.+)$", text, re.M)}


def package(suffixes: list[str]) -> Files:
    """The kernel's package: the library, and what hub/ has of its own."""
    files = {}
    for folder, place in {**FOLDERS, f"hub/torch-ext/{NAME}": "."}.items():
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT / folder).as_posix()
            if path.suffix[1:] in suffixes and not name.startswith(TOOLS):
                files[(pathlib.PurePosixPath(place) / name).as_posix()] = path.read_bytes()
    return files


def unique(files: Files) -> str:
    """What tells these sources from all others."""
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:10]


def variant(files: Files, backend: str, unique_id: str) -> Files:
    """What kernel-builder makes of the package for a backend: operators with a namespace of their own, and metadata."""
    kernel_id = f"_{NAME}_{backend}_{unique_id}"
    ops = (ROOT / "groupconv/_ops.py").read_text(encoding="utf-8").replace(f'"{NAME}"', f'"{kernel_id}"')
    files = {**files, "_ops.py": ops.encode()}
    digests = {name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in sorted(files.items())}
    metadata = {  # without archs of the backend: where our kernels do not run, F.conv2d serves
        **{name: settings()[name] for name in ("name", "version", "license")},
        "id": kernel_id,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return {**files, "metadata.json": (json.dumps(metadata, indent=2) + "\n").encode()}


def build(out: pathlib.Path, unique_id: str | None = None) -> None:
    """Write the project and its variants, in place of those of an earlier build."""
    files = package(settings()["pyext"])
    unique_id = unique_id or unique(files)
    folders = {f"torch-ext/{NAME}": files}
    folders |= {f"build/torch-{name}": variant(files, name, unique_id) for name in settings()["backends"]}
    for made in ("torch-ext", "build"):
        shutil.rmtree(out / made, ignore_errors=True)
    for folder, contents in folders.items():
        for name, text in contents.items():
            path = out / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
    for path in (*(ROOT / "hub" / name for name in ("build.toml", "CARD.md", "flake.nix")), ROOT / "LICENSE"):
        shutil.copyfile(path, out / path.name)
    print(f"{out}: {len(files)} files, id {unique_id}")


def main() -> None:
    parser = argparse.ArgumentParser(description="This library as a kernel of Hugging Face's Hub.")
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=ROOT / "dist/hub", help="by default dist/hub")
    parser.add_argument("--unique-id", help="of this build, in its operators' names; by default a hash of the sources")
    args = parser.parse_args()
    build(args.out, args.unique_id)


if __name__ == "__main__":
    main()
