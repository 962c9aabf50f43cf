"""Grouped 2-D convolution for PyTorch in Triton."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__all__ = [
    "Conv1d", "Conv2d", "ConvProblem", "ConvTranspose1d", "ConvTranspose2d", "ConversionSummary",
    "DepthWiseConv2dImplicitGEMM", "PassPlan", "Plan", "conv1d", "conv_bn_act", "conv_transpose1d", "conv_transpose2d",
    "convert", "disable", "enable", "explain", "fold_batchnorm", "is_enabled", "revert", "set_fp32_precision",
    "set_trials", "summarize", "trials", "triton_conv",
]  # fmt: skip
__version__ = "0.1.0"


def _is_command_line() -> bool:
    """Whether this process is `groupconv ...` or `python -m groupconv ...`, whose help does not wait for PyTorch."""
    argv = getattr(sys, "argv", [])
    if argv and argv[0] == "-m":  # as long as Python looks for the module
        return sys.orig_argv[-len(argv)] in ("groupconv", "groupconv.cli")
    return bool(argv) and os.path.basename(argv[0]) == "groupconv"


# A program has the operators registered at once: what it loads later may hold calls of them.
if TYPE_CHECKING or not _is_command_line():
    from .api import conv_bn_act, explain, triton_conv
    from .dispatch import PassPlan, Plan
    from .enabling import disable, enable, is_enabled
    from .folding import fold_batchnorm
    from .kinds import conv1d, conv_transpose1d, conv_transpose2d
    from .layers import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, DepthWiseConv2dImplicitGEMM
    from .modules import ConversionSummary, convert, revert, summarize
    from .prepared import set_fp32_precision, set_trials
    from .problem import ConvProblem
    from .trial import trials
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            modules = "api dispatch enabling folding kinds layers modules prepared problem trial"
            for module in modules.split():
                loaded = importlib.import_module(f".{module}", __name__)
                if hasattr(loaded, name):
                    return getattr(loaded, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
