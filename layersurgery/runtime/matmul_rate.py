"""Measure how fast a device multiplies matrices, for a lower bound of the time that a measurement takes."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

_SIZE = 2048
_TRIES = 3


@lru_cache
def matmul_rate(device: str, dtype: str) -> float:
    """Return the floating-point operations per second of large matrix products, the best of a few.

    Args:
        device: the device, "cpu" or "cuda:1".
        dtype: name of the data type, "float32".
    """
    square = torch.ones(_SIZE, _SIZE, dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    for _ in range(_TRIES):
        started = time.perf_counter()
        float((square @ square)[0, 0])  # wait for the device
        best = min(best, time.perf_counter() - started)
    return 2 * _SIZE**3 / best
