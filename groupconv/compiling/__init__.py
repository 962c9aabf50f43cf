"""Kernels without a GPU: compiled for one that is not here, and their numbers found by Triton's interpreter.

`command` is `groupconv compile`. `stub_driver` is the GPU that is not here, `compiler` compiles what a call would
launch on it, `resources` reads what the compiled code takes, `interpreter` checks numbers; these two run in processes
of their own (`groupconv.workers`).
"""
