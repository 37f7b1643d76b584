"""Write the safetensors files that a layout describes: link them, or copy their byte ranges and sync them to disk.

Bytes are copied by the kernel (`copy_file_range`) where the file system supports it, and by read and write elsewhere.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..atomic_io import existing_parent
from ..errors import SourceError
from .output_layout import Shard
from .safetensors_header import DISK_BLOCK_BYTES, file_identity

Progress = Callable[[int], None]
"""Called with the number of bytes written since the last call."""

_THREADS = 4
# Large enough that system calls cost almost nothing, small enough that a progress bar moves.
_KERNEL_CHUNK = 64 << 20
_USER_CHUNK = 4 << 20
_SYNC_SECONDS = 0.3
_datasync = getattr(os, "fdatasync", os.fsync)
# Errors of copy_file_range where it is not supported: old kernels, some network and overlay file systems, two devices.
_NO_KERNEL_COPY = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO}


class ShardWriter:
    """Writes shards in the threads of a pool; made by `shard_writer`.

    Attributes:
        linked: the shards that were hard-linked.
        written: the other shards.
    """

    def __init__(self, pool: ThreadPoolExecutor, directory: Path, progress: Progress, *, link: bool) -> None:
        self.linked: list[Shard] = []
        self.written: list[Shard] = []
        self._pool, self._directory, self._progress, self._link = pool, directory, progress, link
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._failures: list[BaseException] = []
        self._copies: list[Future[None]] = []

    def start(self, shards: Iterable[Shard]) -> None:
        """Start to write shards, and return at once."""
        # Start with the largest, so that no large file is copied alone at the end.
        for shard in sorted(shards, key=lambda shard: shard.nbytes, reverse=True):
            self._copies.append(self._pool.submit(self._write, shard))

    def finish(self) -> None:
        """Wait until all shards are written.

        Raises:
            SourceError: a source file cannot be read, or was changed after its header was read.
            OSError: an error of the file system.
        """
        wait(self._copies)
        if self._failures:
            raise self._failures[0]  # the others stopped because of it

    def stop(self) -> None:
        """Stop to write."""
        self._stopping.set()

    def _write(self, shard: Shard) -> None:
        try:
            if self._link and shard.unchanged and _link_shard(shard, self._directory):
                self.linked.append(shard)
                self._report(shard.nbytes)
            else:
                self.written.append(shard)
                _write_shard(shard, self._directory, self._report)
        except BaseException as error:
            self._failures.append(error)
            self.stop()

    def _report(self, count: int) -> None:
        if self._stopping.is_set():
            raise InterruptedError
        with self._lock:
            self._progress(count)


@contextmanager
def shard_writer(directory: Path, progress: Progress, *, link: bool = False) -> Iterator[ShardWriter]:
    """Write shards into a directory, several at a time, while the `with` block runs.

    One thread alone is limited by the speed of the kernel's copying. With several, some copy while others wait for the
    disk. An exception in the `with` block stops them.

    Args:
        directory: the directory of the new files.
        progress: called with the number of bytes written since the last call, by one thread at a time.
        link: hard-link the files that do not change, where the file system can.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        writer = ShardWriter(pool, directory, progress, link=link)
        try:
            yield writer
        except BaseException:
            writer.stop()
            pool.shutdown(cancel_futures=True)
            raise


def can_link(shard: Shard, out: Path) -> bool:
    """Return whether a shard's source file is on the file system of an output, which does not exist yet."""
    return shard.source is not None and shard.source.stat().st_dev == existing_parent(out).stat().st_dev


def _link_shard(shard: Shard, directory: Path) -> bool:
    """Hard-link a shard's source file into a directory.

    Returns:
        Whether that worked. It does not, for example, from one file system to another.
    """
    try:
        os.link(shard.source.resolve(), directory / shard.name)
    except OSError:
        return False
    return True


def copy_bytes(source: BinaryIO, start: int, count: int, target: BinaryIO, progress: Progress) -> None:
    """Append `count` bytes of `source`, from byte `start`, to `target`.

    The kernel copies them with `copy_file_range`; a file system with reflinks shares them instead. Read and write are
    the fallback. The bytes before the next disk block are copied first, because extents can only be shared in whole
    blocks.

    Raises:
        OSError: an error of the file system, including ENOSPC.
        EOFError: `source` ends before `count` bytes.
    """
    target.flush()
    position = target.tell()
    aligned = start % DISK_BLOCK_BYTES == position % DISK_BLOCK_BYTES
    head = min(count, -start % DISK_BLOCK_BYTES) if aligned else 0
    for length in filter(None, (head, count - head)):
        copied = _copy_in_kernel(source, start, length, target, position, progress)
        if copied < length:
            _copy_in_process(source, start + copied, length - copied, target, position + copied, progress)
        start, position = start + length, position + length
    target.seek(position)


def write_zeros(count: int, target: BinaryIO, progress: Progress) -> None:
    """Append `count` zero bytes to `target` as a hole, which takes no space on disk."""
    target.flush()
    end = target.tell() + count
    target.truncate(end)
    target.seek(end)
    progress(count)


@contextmanager
def fsync_in_background(target: BinaryIO) -> Iterator[None]:
    """Sync a file to disk in a background thread while it is written, and completely at the end of the `with` block.

    The sync at the end is then short, because most of the data is already on disk.
    """
    finished = threading.Event()

    def sync_repeatedly() -> None:
        # An error here is not reported, because the sync at the end reports it.
        with suppress(OSError):
            while not finished.wait(_SYNC_SECONDS):
                _datasync(target.fileno())

    thread = threading.Thread(target=sync_repeatedly, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
    target.flush()
    os.fsync(target.fileno())


def _write_shard(shard: Shard, directory: Path, progress: Progress) -> None:
    identities = {shard.source: shard.file_identity}
    identities |= {each.file.path: each.file.identity for each in shard.ranges if each.file is not None}
    with ExitStack() as opened:
        files = {path: opened.enter_context(_open(path)) for path in identities}
        try:
            _check_identities(files, identities)
            _copy_shard(shard, files, directory, progress)
            _check_identities(files, identities)
        except EOFError as error:
            names = " or ".join(map(str, files))
            raise SourceError(f"{names} was changed while it was read ({error}); start again") from error


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error


def _check_identities(files: Mapping[Path, BinaryIO], identities: Mapping[Path, tuple[int, ...]]) -> None:
    for path, file in files.items():
        if file_identity(file.fileno()) != identities[path]:
            raise EOFError(f"{path.name} is not the file from which the header was read")


def _copy_shard(shard: Shard, files: Mapping[Path, BinaryIO], directory: Path, progress: Progress) -> None:
    source = files[shard.source]
    with (directory / shard.name).open("xb") as target, fsync_in_background(target):
        if shard.unchanged:
            copy_bytes(source, 0, os.fstat(source.fileno()).st_size, target, progress)
            return
        target.write(shard.header)
        progress(len(shard.header))
        for byte_range in shard.ranges:
            file = source if byte_range.file is None else files[byte_range.file.path]
            if byte_range.start is None:
                write_zeros(byte_range.count, target, progress)
            elif byte_range.recode is not None:
                file.seek(byte_range.start)
                data = bytearray(byte_range.count)
                if file.readinto(data) < byte_range.count:  # type: ignore[attr-defined]
                    raise EOFError(f"{file.name} ended early")
                target.write(byte_range.recode(data))
                progress(byte_range.count)
            else:
                copy_bytes(file, byte_range.start, byte_range.count, target, progress)


def _copy_in_kernel(
    source: BinaryIO, start: int, count: int, target: BinaryIO, position: int, progress: Progress
) -> int:
    """Copy bytes with `copy_file_range`, and return how many of them were copied (0 if it is not supported)."""
    copy_file_range = getattr(os, "copy_file_range", None)
    copied = 0
    while copy_file_range is not None and copied < count:
        try:
            step = copy_file_range(
                source.fileno(), target.fileno(), min(_KERNEL_CHUNK, count - copied), start + copied, position + copied
            )
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                break
            raise
        if step == 0:
            break
        copied += step
        progress(step)
    return copied


def _copy_in_process(
    source: BinaryIO, start: int, count: int, target: BinaryIO, position: int, progress: Progress
) -> None:
    """Copy bytes with read and write."""
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
