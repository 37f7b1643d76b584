"""What a run on the CPU asks of its process, and that it gives it back."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from layersurgery.runtime import cpu_memory


class MallocInfo(ctypes.Structure):
    """The structure that glibc's mallinfo2 returns."""

    _fields_ = (
        ("arena", ctypes.c_size_t),  # bytes of the heap
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),  # number of blocks that are mappings of their own
        ("others", ctypes.c_size_t * 6),
    )


def heap_and_mappings() -> tuple[int, int]:
    """Return the bytes of malloc's heap, and the number of blocks that are mappings of their own."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    info = mallinfo2()
    return info.arena, info.hblks


def count_mappings() -> dict[str, int]:
    """Count the mappings and the heap's bytes while tensors come and go; to be run in a process of its own."""
    counts: dict[str, int] = {}
    _, counts["before"] = heap_and_mappings()
    with cpu_memory.reuse_cpu_memory():
        tensor = torch.empty(48 << 18)
        counts["heap with the tensor"], counts["with the tensor"] = heap_and_mappings()
        del tensor
        counts["heap without it"], counts["without it"] = heap_and_mappings()
    # More than the whole heap: no free part of the heap can hold it.
    heap, counts["after"] = heap_and_mappings()
    tensor = torch.empty((heap >> 2) + (48 << 18))
    _, counts["with a tensor after"] = heap_and_mappings()
    del tensor
    return counts


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 33)
    or cpu_memory._glibc() is None,
    reason="needs glibc 2.33 with an untuned malloc",
)
def test_freed_memory_is_used_for_the_next_tensor() -> None:
    """Count mappings, not page faults: with huge pages, one fault maps two megabytes.

    A process of its own has a heap without the holes that other tests left.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        counts = pool.submit(count_mappings).result()
    assert counts["with the tensor"] == counts["without it"] == counts["before"], counts
    assert counts["heap without it"] == counts["heap with the tensor"], counts  # the heap keeps the freed memory
    # A tensor above glibc's own threshold is a mapping again.
    assert counts["with a tensor after"] == counts["after"] + 1, counts


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_left_over_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with cpu_memory.reuse_cpu_memory():
        torch.ones(100 << 20)
    assert resident() - before < 100 << 20


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_cpus_that_the_process_may_not_use_do_not_count() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cpu_memory.available_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_no_more_threads_than_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(cpu_memory, "available_cpus", lambda: 2)
        with cpu_memory.reuse_cpu_memory():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(cpu_memory, "available_cpus", lambda: 8)
        with cpu_memory.reuse_cpu_memory():
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_environment_that_tunes_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")
    assert cpu_memory._glibc() is None
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert cpu_memory._glibc() is None
