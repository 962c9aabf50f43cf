"""Triton kernels. Nothing here imports torch; `groupconv.algorithms` launches them."""
