"""Benchmarks, plots, and the results they wrote."""
