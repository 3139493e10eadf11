"""Accuracy of STTS and other pruners with a tiny Molmo2 on rendered clips: `python -m benchmarks.quality.study`."""
