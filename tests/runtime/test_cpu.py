"""What a run on the CPU asks of its process, and that it gives it back."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

import pytest
import torch

from layersurgery.runtime import cpu_memory


def faults(megabytes: int) -> float:
    """Share of their pages that the kernel hands out anew while fifty such tensors come and go."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(megabytes << 18)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (
        50 * (megabytes << 20) / resource.getpagesize()
    )


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or any(n.startswith("MALLOC_") for n in os.environ), reason="glibc's malloc"
)
def test_memory_that_was_let_go_serves_the_next_tensor() -> None:
    with cpu_memory.reuse_cpu_memory():
        assert faults(16) < 0.2
    # One above glibc's largest threshold is a mapping of its own again.
    assert faults(48) > 0.8


def test_what_is_left_over_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with cpu_memory.reuse_cpu_memory():
        torch.ones(100 << 20)
    assert resident() - before < 100 << 20


@pytest.mark.parametrize(
    ("files", "meant"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_share_of_time_that_a_container_has(files: dict[str, str], meant: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert cpu_memory.cgroup_cpu_limit(tmp_path) == meant


def test_no_more_threads_than_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(cpu_memory, "cgroup_cpu_limit", lambda: 2)
        with cpu_memory.reuse_cpu_memory():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(cpu_memory, "cgroup_cpu_limit", lambda: 8)
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
