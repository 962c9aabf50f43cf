"""The namespace of our operators in torch.ops. A Hub build (hub/) has one of its own, so that several can be loaded."""

import torch

_OPS_NAME = "groupconv"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """An operator's full name."""
    return f"{_OPS_NAME}::{op_name}"
