"""Several processes that measure one text together: who they are, and how they tell each other what they found.

Processes are started by `accelerate launch` or torchrun, and found by accelerate. What they say to each other is small (sums of a batch, and
with `--per-token` its rows), and goes over gloo whatever devices they compute on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from ..errors import MeasurementError

T = TypeVar("T")
# A process may wait for another one's longest batch.
_PATIENCE = timedelta(days=2)


class ProcessGroup(Protocol):
    """The processes of a run.

    Attributes:
        rank: this one's number; 0 leads, reads text and writes results.
        size: how many there are.
        local_rank: this one's number on its machine.
        local_size: how many there are on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    def broadcast(self, value: T) -> T:
        """What the leader gave, for all."""

    def gather(self, value: T) -> list[T]:
        """What each process gave, in their order; for the leader, nothing for the others."""

    def close(self) -> None:
        """Say goodbye, at the end."""


class SingleProcess:
    """One process by itself."""

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def broadcast(self, value: T) -> T:
        """The value itself."""
        return value

    def gather(self, value: T) -> list[T]:
        """The value itself."""
        return [value]

    def close(self) -> None:
        """There is nobody."""


class DistributedGroup:
    """Several, connected by torch.distributed."""

    def __init__(self, state: Any) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.size = int(state.process_index), int(state.num_processes)
        self.local_rank = int(os.environ.get("LOCAL_RANK", state.local_process_index))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def broadcast(self, value: T) -> T:
        """What the leader gave, for all.

        Raises:
            MeasurementError: a process has gone.
        """
        held: list[Any] = [value]
        with _together():
            self._dist.broadcast_object_list(held, src=0, group=self._group)
        shared: T = held[0]
        return shared

    def gather(self, value: T) -> list[T]:
        """What each process gave, in their order; for the leader.

        Raises:
            MeasurementError: a process has gone.
        """
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with _together():
            self._dist.gather_object(value, found, dst=0, group=self._group)
        return found or []

    def close(self) -> None:
        """Close the connections."""
        self._dist.destroy_process_group()


class LostProcessError(MeasurementError):
    """Another process of the run has gone."""


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            f"another process of this run has gone ({str(error).strip().partition(chr(10))[0]}). What was measured stays: the same command goes "
            "on with it, with as many processes as you like"
        ) from error


def find_process_group(cpu: bool) -> ProcessGroup:
    """The processes that this one was started with.

    Args:
        cpu: whether they compute on the CPU.

    Raises:
        MeasurementError: they cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return SingleProcess()
    from accelerate import PartialState

    with _reached():
        return DistributedGroup(PartialState(cpu=cpu))


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise MeasurementError(
            f"the other processes of this run cannot be reached: {str(error).strip().partition(chr(10))[0]}"
        ) from error


def chunked(items: list[T], size: int) -> Iterator[list[T]]:
    """Work for `size` processes at a time.

    >>> list(rounds([1, 2, 3, 4, 5], 2))
    [[1, 2], [3, 4], [5]]
    """
    for start in range(0, len(items), size):
        yield items[start : start + size]


def own_devices(group: ProcessGroup, devices: int) -> range:
    """The GPUs of this process, where each machine's are shared out among the processes on it; some share one if there are too few.

    >>> class Third(Alone):
    ...     local_rank, local_size = 2, 4
    >>> own_devices(Third(), 8), own_devices(Third(), 2)
    (range(4, 6), range(0, 1))
    """
    if not devices:
        return range(0)
    each = max(1, devices // group.local_size)
    first = group.local_rank * each % devices
    return range(first, min(devices, first + each))
