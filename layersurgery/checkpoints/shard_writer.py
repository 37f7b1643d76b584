"""Writing the files that a layout describes: linked, or copied range by range and synced."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import SourceError
from .output_layout import Shard
from .safetensors_header import BLOCK, file_identity

Progress = Callable[[int], None]
"""Called with the number of bytes moved since the last call."""
# Large enough that system calls cost nothing, small enough that a progress bar moves.
_KERNEL_CHUNK = 64 << 20
_USER_CHUNK = 4 << 20
_SYNC_SECONDS = 0.3
_datasync = getattr(os, "fdatasync", os.fsync)
# What copy_file_range answers where it does not work: old kernels, some network and overlay file systems, two devices.
_NO_KERNEL_COPY = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO}

_THREADS = 4


def link_shard(shard: Shard, directory: Path) -> bool:
    """Whether the file could be linked; it cannot across file systems."""
    try:
        os.link(shard.source.resolve(), directory / shard.name)
    except OSError:
        return False
    return True


def write_shards(shards: list[Shard], directory: Path, progress: Progress) -> None:
    """Copy several files at a time: one thread is bound by the kernel's copying, and others copy while one waits for the disk."""
    if not shards:
        return
    lock, stopping = threading.Lock(), threading.Event()

    def moved(count: int) -> None:
        if stopping.is_set():
            raise InterruptedError
        with lock:
            progress(count)

    with ThreadPoolExecutor(min(_THREADS, len(shards))) as pool:
        # The largest first, so that none is left to be copied alone at the end.
        ordered = sorted(shards, key=lambda shard: shard.nbytes, reverse=True)
        copies = [pool.submit(_write_shard, shard, directory, moved) for shard in ordered]
        try:
            for copy in as_completed(copies):
                copy.result()
        except BaseException:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(shard: Shard, directory: Path, progress: Progress) -> None:
    try:
        source = shard.source.open("rb")
    except OSError as error:
        raise SourceError(f"cannot read {shard.source}: {error.strerror or error}") from error
    try:
        with source:
            _check_state(shard, source)
            _copy_shard(shard, source, directory, progress)
            _check_state(shard, source)
    except EOFError as error:
        raise SourceError(f"{shard.source} was changed while it was read: {error}; start again") from error


def _check_state(shard: Shard, source: BinaryIO) -> None:
    if file_identity(source.fileno()) != shard.file_identity:
        raise EOFError("it is not the file whose header was read")


def _copy_shard(shard: Shard, source: BinaryIO, directory: Path, progress: Progress) -> None:
    with (directory / shard.name).open("xb") as target, fsync_in_background(target):
        if shard.unchanged:
            copy_bytes(source, 0, os.fstat(source.fileno()).st_size, target, progress)
        else:
            target.write(shard.header)
            for piece in shard.ranges:
                if piece.start is None:
                    write_zeros(piece.count, target, progress)
                else:
                    copy_bytes(source, piece.start, piece.count, target, progress)


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
def fsync_in_background(target: BinaryIO) -> Iterator[None]:
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


def _copy_by_kernel(
    source: BinaryIO, start: int, count: int, target: BinaryIO, position: int, progress: Progress
) -> int:
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


def _copy_by_hand(
    source: BinaryIO, start: int, count: int, target: BinaryIO, position: int, progress: Progress
) -> None:
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
