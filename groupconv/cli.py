"""The command line: groupconv compile, report, tune, trials, advise and bench."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from . import options


def _compile(args: argparse.Namespace) -> int:
    from .compiling import command
    from .perf_reports import layers
    from .problem import ELEMENT_BYTES, LAYOUTS

    every = [layer for dtype in ELEMENT_BYTES for layout in LAYOUTS for layer in layers.suite(dtype, layout)]
    return command.run(args, every)


def _tune(args: argparse.Namespace) -> int:
    from .measuring import command
    from .perf_reports import layers

    return command.run(args, layers.variants(args))


def _report(args: argparse.Namespace) -> int:
    from .perf_reports import bench

    return bench.report(args)


def _bench(args: argparse.Namespace) -> int:
    from .perf_reports import bench

    return bench.bench(args)


def _advise(args: argparse.Namespace) -> int:
    from .perf_reports import advise

    return advise.run(args)


def _trials(args: argparse.Namespace) -> int:
    from .measuring import trials

    return trials.run(args)


# By command, what runs it, and the packages that it needs and the library does not.
COMMANDS = {
    "compile": (_compile, ("rich",)),
    "report": (_report, ("matplotlib", "rich")),
    "tune": (_tune, ("rich",)),
    "trials": (_trials, ("rich",)),
    "advise": (_advise, ("matplotlib", "rich")),
    "bench": (_bench, ("matplotlib", "rich")),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; the return value is the exit status."""
    args = options.parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    run, needed = COMMANDS[args.command]
    try:
        for package in needed:
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{package} is not installed: pip install 'groupconv[report]'")
        from . import algorithms

        if algorithms.UNUSABLE is not None and args.command != "trials":
            raise ValueError(algorithms.UNUSABLE)
        return run(args)
    except (ValueError, OSError) as error:
        print(f"groupconv {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"groupconv {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
