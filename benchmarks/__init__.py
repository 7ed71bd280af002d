"""Measurements of what the implementation costs: each module is one command, `python -m benchmarks.NAME`."""
