"""What made the numbers of docs/measurements.md; run as modules from the repository's root."""
