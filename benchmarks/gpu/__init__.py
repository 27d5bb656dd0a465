"""Benchmarks of the kernels on one GPU: `python -m benchmarks.gpu.<name>`; needs torch and Triton alone."""
