"""Speed and memory of STTS beside native Molmo2: `python -m benchmarks.speed`."""
