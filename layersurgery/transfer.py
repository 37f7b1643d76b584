"""Moving bytes between files: by the kernel where it can, so that they never enter this process."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from .checkpoints.safetensors_header import BLOCK

Progress = Callable[[int], None]
"""Called with the number of bytes moved since the last call."""

# Large enough that system calls cost nothing, small enough that a progress bar moves.
_KERNEL_CHUNK = 64 << 20
_USER_CHUNK = 4 << 20
_SYNC_SECONDS = 0.3
_datasync = getattr(os, "fdatasync", os.fsync)
# What copy_file_range answers where it does not work: old kernels, some network and overlay file systems, two devices.
_NO_KERNEL_COPY = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO}


def copy_bytes(source: BinaryIO, start: int, count: int, target: BinaryIO, progress: Progress) -> None:
    """Append `count` bytes of `source` from `start` to `target`.

    The kernel moves them (`copy_file_range`; a file system with reflinks shares them instead), with read and write as the
    fallback. The bytes up to the next block go first: extents can only be shared from block to block.

    Raises:
        OSError: from the file system, ENOSPC included.
        EOFError: `source` ends before `count` bytes.
    """
    target.flush()
    position = target.tell()
    head = min(count, -start % BLOCK) if start % BLOCK == position % BLOCK else 0
    for length in filter(None, (head, count - head)):
        moved = _copy_by_kernel(source, start, length, target, position, progress)
        if moved < length:
            _copy_by_hand(source, start + moved, length - moved, target, position + moved, progress)
        start, position = start + length, position + length
    target.seek(position)


@contextmanager
def synced(target: BinaryIO) -> Iterator[None]:
    """Leave with everything on disk, without a wait at the end: what is written is synced all along, by a thread beside."""
    done = threading.Event()

    def sync() -> None:
        # What it cannot sync, the sync at the end reports.
        with suppress(OSError):
            while not done.wait(_SYNC_SECONDS):
                _datasync(target.fileno())

    beside = threading.Thread(target=sync, daemon=True)
    beside.start()
    try:
        yield
    finally:
        done.set()
        beside.join()
    target.flush()
    os.fsync(target.fileno())


def write_zeros(count: int, target: BinaryIO, progress: Progress) -> None:
    """Append `count` zero bytes: a hole, which takes no room on disk."""
    target.flush()
    end = target.tell() + count
    target.truncate(end)
    target.seek(end)
    progress(count)


def _copy_by_kernel(source: BinaryIO, start: int, count: int, target: BinaryIO, position: int, progress: Progress) -> int:
    copy_file_range = getattr(os, "copy_file_range", None)
    moved = 0
    while copy_file_range is not None and moved < count:
        try:
            step = copy_file_range(
                source.fileno(), target.fileno(), min(_KERNEL_CHUNK, count - moved), start + moved, position + moved
            )
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                break
            raise
        if step == 0:
            break
        moved += step
        progress(step)
    return moved


def _copy_by_hand(source: BinaryIO, start: int, count: int, target: BinaryIO, position: int, progress: Progress) -> None:
    source.seek(start)
    target.seek(position)
    buffer = memoryview(bytearray(min(_USER_CHUNK, count)))
    while count:
        step = source.readinto(buffer[: min(len(buffer), count)])  # type: ignore[attr-defined]
        if not step:
            raise EOFError(f"{source.name} ended {count} bytes early")
        target.write(buffer[:step])
        count -= step
        progress(step)
    target.flush()
