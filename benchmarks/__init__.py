"""Benchmarks of layersurgery against its alternatives: `python -m benchmarks`."""
