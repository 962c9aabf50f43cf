"""Checks what a wheel holds: every module and data file under groupconv/, and no other top-level import."""

import pathlib
import sys
import zipfile

NEEDED = {
    "groupconv/api.py",
    "groupconv/py.typed",
    "groupconv/algorithms/implicit_gemm.py",
    "groupconv/kernels/__init__.py",
    "groupconv/kernels/implicit_gemm.py",
    "groupconv/autotune_configs/SCHEMA.md",
    "groupconv/autotune_configs/registers.json",
    "groupconv/autotune_configs/weights.json",
    "groupconv/common/files.py",
    "groupconv/compiling/compiler.py",
    "groupconv/measuring/lab.py",
    "groupconv/perf_reports/bench.py",
    "groupconv/perf_reports/counted.csv",
    "groupconv/perf_reports/suite.csv",
}


def main() -> int:
    (wheel,) = pathlib.Path(sys.argv[1]).glob("groupconv-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    missing = NEEDED - names
    results = {name for name in names if name.endswith((".png", "REPORT.md"))}
    print(f"{wheel.name}: {len(names)} files, top level {sorted(top)}")
    if top != {"groupconv"} or missing or results:
        print(f"wrong top level, missing {sorted(missing)}, or results inside {sorted(results)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
