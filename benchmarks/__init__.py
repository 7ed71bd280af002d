"""What the implementation costs: each module is one command, `python -m benchmarks.NAME`."""
