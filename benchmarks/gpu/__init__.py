"""Figures of the GPU path; see benchmarks/gpu/__main__.py."""
