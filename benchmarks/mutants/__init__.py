"""Which small changes of the code its tests notice: `python -m benchmarks.mutants`."""
