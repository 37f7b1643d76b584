"""Connect several processes that measure one text together, so that they can exchange their results.

Processes are started by `accelerate launch` or torchrun, and found by accelerate. The messages are small (the sums of a
batch and, with `--per-token`, its rows) and are sent over gloo, whatever devices the processes compute on.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from ..errors import MeasurementError

T = TypeVar("T")
# A process may have to wait until another process has finished a long batch.
_TIMEOUT = timedelta(days=2)
# torch waits 30 minutes for processes that never come, for example after their launcher was killed.
_CONNECTING = timedelta(minutes=3)


class ProcessGroup(Protocol):
    """The processes of a run.

    Attributes:
        rank: number of this process; process 0 leads: it reads the text and writes the results.
        size: number of processes.
        local_rank: number of this process on its machine.
        local_size: number of processes on this machine.
        workers_idle: whether the other processes are waiting for the next work item.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    workers_idle: bool

    def broadcast(self, value: T) -> T:
        """Send the leader's value to all processes, and return it."""

    def gather(self, value: T) -> list[T]:
        """Send each process's value to the leader.

        Returns:
            In the leader, all values in the order of ranks; in other processes, an empty list.
        """

    def close(self) -> None:
        """Close the process group."""


class SingleProcess:
    """Process group of one process."""

    rank, size, local_rank, local_size = 0, 1, 0, 1
    workers_idle = True

    def broadcast(self, value: T) -> T:
        """Return the value."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return a list of the value."""
        return [value]

    def close(self) -> None:
        """Do nothing: there is one process."""


class DistributedGroup:
    """Process group of several processes, connected by torch.distributed.

    Args:
        state: accelerate's state of this process.
    """

    def __init__(self, state: Any) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.workers_idle = True
        self.rank, self.size = int(state.process_index), int(state.num_processes)
        self.local_rank = int(os.environ.get("LOCAL_RANK", state.local_process_index))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def broadcast(self, value: T) -> T:
        """Send the leader's value to all processes, and return it.

        Raises:
            MeasurementError: another process has ended.
        """
        values: list[Any] = [value]
        with _refuse_lost_process():
            self._dist.broadcast_object_list(values, src=0, group=self._group)
        leaders_value: T = values[0]
        return leaders_value

    def gather(self, value: T) -> list[T]:
        """Send each process's value to the leader.

        Returns:
            In the leader, all values in the order of ranks; in other processes, an empty list.

        Raises:
            MeasurementError: another process has ended.
        """
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with _refuse_lost_process():
            self._dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def close(self) -> None:
        """Close this run's connections; those of the process, which others may use, stay."""
        self._dist.destroy_process_group(self._group)


class LostProcessError(MeasurementError):
    """Error of a run of which another process has ended."""


@contextmanager
def _refuse_lost_process() -> Iterator[None]:
    """Turn the errors of a broken connection into a `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            f"another process of this run has ended ({str(error).strip().partition(chr(10))[0]}). "
            "The results so far are kept: run the same command again to resume, with any number of processes"
        ) from error


def find_process_group(cpu: bool) -> ProcessGroup:
    """Find the processes that were started together with this one.

    Args:
        cpu: whether they compute on the CPU.

    Returns:
        Their group; a `SingleProcess` if there is only this one.

    Raises:
        MeasurementError: the other processes cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return SingleProcess()
    import torch.distributed as dist
    from accelerate import PartialState

    with _refuse_unreachable():
        was_connected = dist.is_initialized()
        group = DistributedGroup(PartialState(cpu=cpu, timeout=_CONNECTING))
    if not was_connected:  # accelerate connects the processes once, so later runs of this process need it too
        atexit.register(_disconnect)
    return group


def _disconnect() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _refuse_unreachable() -> Iterator[None]:
    """Turn the errors of a connection that cannot be made into a `MeasurementError`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise MeasurementError(
            f"the other processes of this run cannot be reached: {str(error).strip().partition(chr(10))[0]}. If their "
            "launcher was ended, start all of them again; the results so far are kept"
        ) from error


def assign_gpus(group: ProcessGroup, devices: int) -> range:
    """Return the numbers of the GPUs that this process uses.

    The GPUs of a machine are divided among its processes. If there are fewer GPUs than processes, several processes
    share one.

    Args:
        group: the processes.
        devices: number of GPUs on this machine.

    >>> from layersurgery.runs.distributed import SingleProcess, assign_gpus
    >>> class ThirdOfFour(SingleProcess):
    ...     local_rank, local_size = 2, 4
    >>> assign_gpus(ThirdOfFour(), devices=8), assign_gpus(ThirdOfFour(), devices=2)
    (range(4, 6), range(0, 1))
    """
    if not devices:
        return range(0)
    per_process = max(1, devices // group.local_size)
    first = group.local_rank * per_process % devices
    return range(first, min(devices, first + per_process))
