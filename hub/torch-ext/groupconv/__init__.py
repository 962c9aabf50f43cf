"""Grouped 1-D and 2-D convolution for PyTorch in Triton: forward and backward, planned per group width and GPU."""

from . import layers
from .library.api import conv_bn_act, explain, triton_conv
from .library.dispatch import PassPlan, Plan
from .library.enabling import disable, enable, is_enabled
from .library.folding import fold_batchnorm
from .library.kinds import conv1d, conv_transpose1d, conv_transpose2d
from .library.layers import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, DepthWiseConv2dImplicitGEMM
from .library.modules import ConversionSummary, convert, revert, summarize
from .library.prepared import set_fp32_precision, set_trials
from .library.problem import ConvProblem
from .library.trial import trials

__all__ = [
    "Conv1d", "Conv2d", "ConvProblem", "ConvTranspose1d", "ConvTranspose2d", "ConversionSummary",
    "DepthWiseConv2dImplicitGEMM", "PassPlan", "Plan", "conv1d", "conv_bn_act", "conv_transpose1d", "conv_transpose2d",
    "convert", "disable", "enable", "explain", "fold_batchnorm", "is_enabled", "layers", "revert", "set_fp32_precision",
    "set_trials", "summarize", "trials", "triton_conv",
]  # fmt: skip
