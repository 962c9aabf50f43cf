"""Grouped 2-D convolution for PyTorch in Triton."""

from .api import explain, triton_conv
from .dispatch import PassPlan, Plan
from .problem import ConvProblem

__all__ = ["ConvProblem", "PassPlan", "Plan", "explain", "triton_conv"]
__version__ = "0.1.0"
