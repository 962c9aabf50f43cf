"""The namespace of this build's operators in torch.ops, which kernel-builder or hub/build.py wrote."""

from .._ops import add_op_namespace_prefix, ops

__all__ = ["add_op_namespace_prefix", "ops"]
