"""What heavy work on the CPU asks of its process: memory that stays, and no more threads than there is time for.

A tensor of some megabytes is a fresh mapping for glibc, which the kernel fills with zeros, page by page, each time; that took a
fifth of a float32 block's time, and a third in bfloat16. Inside `settled`, memory that was let go serves the next tensor.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEEP = 1 << 30
# Where glibc's own thresholds end up in a process that has let large tensors go.
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


@contextmanager
def reuse_cpu_memory() -> Iterator[None]:
    """Inside, tensors come from memory that was used before; what is left over goes back to the system at the end.

    Threads beyond the share of time that a container is given are not used either: they would wait for each other. Nothing happens
    to memory without glibc, or where the environment tunes it.
    """
    libc = _glibc()
    threads, most = torch.get_num_threads(), cgroup_cpu_limit()
    try:
        if libc is not None:
            libc.mallopt(_MMAP_THRESHOLD, _KEEP)
            libc.mallopt(_TRIM_THRESHOLD, _KEEP)
        if most is not None and most < threads:
            torch.set_num_threads(most)
        yield
    finally:
        if libc is not None:
            for parameter, value in _USUAL.items():
                libc.mallopt(parameter, value)
            libc.malloc_trim(0)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def cgroup_cpu_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Processors' worth of time that this container may use, rounded up; None where there is no such limit."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        share = int(limit) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return math.ceil(share) if share > 0 else None


def _glibc() -> ctypes.CDLL | None:
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or os.name != "posix":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
