"""Grouped 2-D convolution for PyTorch in Triton."""

from .api import explain, triton_conv
from .dispatch import PassPlan, Plan
from .modules import Conv2d, convert
from .problem import ConvProblem

__all__ = ["Conv2d", "ConvProblem", "PassPlan", "Plan", "convert", "explain", "triton_conv"]
__version__ = "0.1.0"
