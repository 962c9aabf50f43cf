"""The options of the command line. Light: help and mistakes are answered before PyTorch is imported."""

from __future__ import annotations

import argparse
import pathlib

from . import __version__
from .problem import FINISHED, LAYOUTS, PLANNED

DTYPES = ("bf16", "fp16", "fp32", "tf32", "bf16x3")
PARTS = ("layers", "host", "models", "compiled")  # of `groupconv bench`
MODELS = ("timm:resnext50_32x4d", "timm:regnety_032", "timm:convnext_tiny", "timm:efficientnet_b0")


def parser() -> argparse.ArgumentParser:
    """The parser of `groupconv`; its result's `command` names the command."""
    main = argparse.ArgumentParser(prog="groupconv", description="Grouped 2-D convolution for PyTorch in Triton.")
    main.add_argument("--version", action="version", version=f"groupconv {__version__}")
    commands = main.add_subparsers(dest="command", required=True)
    for name, add, help_ in (
        ("compile", _compile, "compile what is shipped and planned for GPUs that are not here, and check it"),
        ("report", _report, "compare a layer across group counts; tables and plots in a folder"),
        ("tune", _tune, "measure the fastest configurations on this GPU, and plan by them"),
        ("trials", _trials, "show what plans proved in your own calls, on any GPU"),
        ("advise", _advise, "compare group counts and widths of a layer, or of a model's layers"),
        ("bench", _bench, "compare with PyTorch's ways, layer by layer and in whole models"),
    ):
        add(commands.add_parser(name, help=help_))
    return main


def _compile(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compiles what the model plans for the suite's layers and for every class of group widths, as a call would "
        "launch it. Exit status 1 if one spills, asks for more shared memory than its target has, or "
        "lacks the matrix instructions that it is for."
    )
    add = parser.add_argument
    add("--targets", nargs="+", metavar="TARGET", help="sm_90, gfx942, ... (default: all known)")
    add("--pass", dest="pass_", choices=(*PLANNED, FINISHED), help="only this pass, or fprop with all that may follow")
    add("--dtype", choices=DTYPES, help="only this dtype")
    add("--algorithm", metavar="NAME", help="only this algorithm")
    add("--jobs", type=int, metavar="N", help="worker processes (default: one a core)")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reports on one layer across group counts (by default ResNeXt-50's 3x3 at 56x56), or a depthwise one across "
        "kernel sizes: parameters, FLOPs, bytes and time of each pass. On a GPU times are measured; without one they "
        "are modelled for --target, kernels are compiled for it, and their numbers checked under Triton's interpreter."
    )
    add_layers(parser, "groups")
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    add("--layout", choices=LAYOUTS, default="nhwc", help="memory order; nhwc is channels_last (default)")
    add("--target", metavar="DEVICE", help="model this GPU, even where another is present (default: nvidia_h200)")
    add("--budget-seconds", type=float, metavar="S", help="begin nothing after this time; keep what there is")
    add("--out", type=pathlib.Path, metavar="DIR", help="default: perf_reports/<device>")


def _tune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds the fastest algorithm and configuration of every pass of the layers on this GPU, beside F.conv2d, and "
        "writes them to the configuration file that triton_conv reads first. Numbers are checked against float64 "
        "before anything is timed. Every result is kept in a journal beside the file as it comes: started again, a "
        "run goes on where it was. Under torchrun the processes share the work."
    )
    add_layers(parser, "suite")
    _variants(parser)
    add = parser.add_argument
    add("--budget-seconds", type=float, metavar="S", help="end after this time, with what there is by then")
    add("--out", type=pathlib.Path, metavar="DIR", help="default: the user's configuration folder")
    add("--jobs", type=int, metavar="N", help="processes that compile (default: one a core, but one)")
    add("--compile-only", action="store_true", help="list what compiles without spills for --target; measure nothing")
    add("--stub", action="store_true", help="try the search without a GPU, against a pretended one; needs --out")
    add("--target", metavar="DEVICE", help="with --compile-only or --stub: the GPU to plan for (default: nvidia_h200)")


def _trials(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows the results of trials (groupconv.set_trials), which lie in the user's configuration folder, a file a "
        "device: which problems were raced, when, our time and F.conv2d's."
    )
    parser.add_argument("--target", metavar="DEVICE", help="only of this GPU")


def _advise(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "How many groups? Of a layer, or of each grouped layer of a model, across group counts and near widths: "
        "parameters, FLOPs, bytes and the time of a training step, measured on the GPU here or else modelled; the "
        "Pareto front of parameters against time; the choices that are traps, slow for what they compute; and where a "
        "channel shuffle is advisable. A table, advise.csv and a plot."
    )
    add_layers(parser, "groups")
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    add("--layout", choices=LAYOUTS, default="nhwc", help="memory order; nhwc is channels_last (default)")
    add("--target", metavar="DEVICE", help="model this GPU, even where another is present (default: nvidia_h200)")
    add("--budget-seconds", type=float, metavar="S", help="measure no layer that begins after this time: model it")
    add("--out", type=pathlib.Path, metavar="DIR", help="default: perf_reports/advise_<device>")


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times every pass of the layers on this GPU: each of our algorithms, what triton_conv takes, F.conv2d in both "
        "memory formats, PyTorch's depthwise kernels without cuDNN, torch.compile and FlagGems where it is installed; "
        "the host's time of a call; training steps of whole models with and without our layers. Started again with "
        "the same --out, it goes on where it was."
    )
    add_layers(parser, "all")
    _variants(parser)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="P", help=f"default: {' '.join(PARTS)}")
    default = " ".join(MODELS)
    add("--models", nargs="+", metavar="PACKAGE:NAME", help=f"of the part models (default, with timm: {default})")
    add("--budget-seconds", type=float, metavar="S", help="begin nothing after this time; keep what there is")
    add("--out", type=pathlib.Path, metavar="DIR", help="default: perf_reports/<device>")
    add("--csv-only", action="store_true", help="no plots, no REPORT.md")
    add("--stub", action="store_true", help="try it without a GPU, against a pretended one; needs --out")


def add_layers(parser: argparse.ArgumentParser, default: str) -> None:
    """The options that name layers. default: what --layers is without them."""
    add = parser.add_argument
    counts = "group counts (default: 1 2 4 ... 128; of a report without a GPU 1 2 8 32 128)"
    add("--groups", type=int, nargs="+", metavar="G", help=counts)
    add("--channels", type=int, nargs="+", metavar="C", help="input channels, output channels (default: 128)")
    add("--batch", type=int, metavar="N", help="images (default: 128; 64 across kernel sizes)")
    add("--size", type=int, nargs="+", metavar="H", help="height, width (default: 56, of --model its own)")
    add("--kernel", type=int, nargs="+", metavar="K", help="kernel height, width (default: 3)")
    add("--kernels", type=int, nargs="+", metavar="K", help="with --layers kernels: sizes (default: 1 3 5 ... 31)")
    add("--stride", type=int, nargs="+", metavar="S", help="vertical, horizontal stride (default: 1)")
    add("--padding", type=int, nargs="+", metavar="P", help="vertical, horizontal (default: half the kernel)")
    add(
        "--layers", default=default, metavar="LAYERS",
        help='"groups" for the layer of the options above across --groups, "kernels" for a depthwise one across kernel '
        'sizes, "suite" for 65 layers of published models, "all" for groups and suite, or a CSV with the columns of '
        f"suite.csv (default: {default})",
    )  # fmt: skip
    add("--model", metavar="PACKAGE:NAME", help="the grouped layers of timm:NAME or torchvision:NAME instead")
    add("--quick", action="store_true", help="fewer group counts, kernel sizes or layers, for a smoke test")


def _variants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], metavar="D", help="default: bf16")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["nhwc"], metavar="L", help="default: nhwc")
