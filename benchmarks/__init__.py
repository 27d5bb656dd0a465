"""Measurements, each one a command: `python -m benchmarks.<name>`."""
