"""Writing the files that a layout describes: linked, or copied range by range and synced."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO

from ..errors import SourceError
from ..transfer import Progress, copy_bytes, synced, write_zeros
from .output_layout import Shard
from .safetensors_header import stamp

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
    if stamp(source.fileno()) != shard.stamp:
        raise EOFError("it is not the file whose header was read")


def _copy_shard(shard: Shard, source: BinaryIO, directory: Path, progress: Progress) -> None:
    with (directory / shard.name).open("xb") as target, synced(target):
        if shard.unchanged:
            copy_bytes(source, 0, os.fstat(source.fileno()).st_size, target, progress)
        else:
            target.write(shard.header)
            for piece in shard.pieces:
                if piece.start is None:
                    write_zeros(piece.count, target, progress)
                else:
                    copy_bytes(source, piece.start, piece.count, target, progress)
