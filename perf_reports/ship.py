"""`make ship OUT=dir`: what `make gpu` left in a folder becomes the project's own.

python -m groupconv.perf_reports.ship DIR

Configurations go to autotune_configs/, CSV files with plots and REPORT.md to perf_reports/<device>/. Nothing is copied
unless all of it is measured, on one device that is none of ours to pretend, with the kernels as they are.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys

from .. import configs, devices
from ..tuning import stub
from . import bench_plot, bench_text, rows
from .comparison import FILES


def main(argv: list[str] | None = None) -> int:
    """Ship a folder; exit status 2 if it holds what must not be."""
    parser = argparse.ArgumentParser(prog="make ship", description="Take a GPU's results into the project.")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path(), help="the checkout's root (default: here)")
    args = parser.parse_args(argv)
    try:
        for path in ship(args.folder, args.to):
            print(path)
    except (ValueError, OSError) as error:
        print(f"make ship: {error}", file=sys.stderr)
        return 2
    return 0


def ship(folder: pathlib.Path, root: pathlib.Path) -> list[pathlib.Path]:
    """Check and copy; the files written. ValueError says what must not be shipped."""
    for name in ("autotune_configs", "perf_reports"):
        if not (root / name).is_dir():
            raise ValueError(f"{root} is no checkout of groupconv: it has no {name}")
    found = [
        configs.parse_device(path.read_text(encoding="utf-8"), path.name) for path in sorted(folder.glob("*.json"))
    ]
    if len(found) != 1:
        raise ValueError(f"{folder} must hold the configuration file of one device, but holds {len(found)}")
    (file,) = found
    slug = devices.slugify(file.device)
    if file.kind != "measured" or stub.NAME in (slug, file.path.removesuffix(".json")):
        raise ValueError(f"{file.path}: a stub clock's times are not measurements")
    if file.path != f"{slug}.json":
        raise ValueError(f"{file.path} is of {file.device}, whose file is called {slug}.json")
    if file.stale:
        raise ValueError(f"{file.path}: {file.stale} entries were measured with other kernels")
    tables = {name: folder / name for name in FILES if (folder / name).exists()}
    for name, path in tables.items():
        for row in rows.read(path, FILES[name]):
            if row["kind"] != "measured" or row["gpu"] != file.device:
                raise ValueError(f"{name}: a row of {row['gpu']} is {row['kind']}, not measured on {file.device}")
    reports = root / "perf_reports" / slug
    reports.mkdir(exist_ok=True)
    written = [root / "autotune_configs" / file.path]
    shutil.copyfile(folder / file.path, written[0])
    for name, path in tables.items():
        shutil.copyfile(path, reports / name)
        written.append(reports / name)
    if tables:
        written += bench_plot.write(reports)
        rows.write_atomically(reports / "REPORT.md", bench_text.markdown(reports))
        written.append(reports / "REPORT.md")
    return written


if __name__ == "__main__":
    sys.exit(main())
