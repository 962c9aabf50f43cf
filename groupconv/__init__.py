"""Grouped 2-D convolution for PyTorch in Triton."""

from .api import explain, triton_conv
from .dispatch import PassPlan, Plan
from .modules import Conv2d, ConversionSummary, convert, revert, summarize
from .ops import set_fp32_precision
from .problem import ConvProblem

__all__ = [
    "Conv2d", "ConvProblem", "ConversionSummary", "PassPlan", "Plan", "convert", "explain", "revert",
    "set_fp32_precision", "summarize", "triton_conv",
]  # fmt: skip
__version__ = "0.1.0"
