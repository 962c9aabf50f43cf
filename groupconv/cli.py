"""The command line: groupconv compile, report, tune and bench."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from . import options

# By command, the module whose `run` it is, and the packages that it needs and the library does not.
COMMANDS = {
    "compile": (".compile_command", ("numpy", "rich")),
    "report": (".perf_reports.report", ("matplotlib", "rich")),
    "tune": (".tuning.command", ("numpy", "rich")),
    "bench": (".perf_reports.bench", ("matplotlib", "rich")),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; the return value is the exit status."""
    args = options.parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    module, needed = COMMANDS[args.command]
    try:
        for package in needed:
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{package} is not installed: pip install 'groupconv[report]'")
        return importlib.import_module(module, __package__).run(args)
    except (ValueError, OSError) as error:
        print(f"groupconv {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"groupconv {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
