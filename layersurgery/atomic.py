"""A directory that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

try:
    import fcntl
except ImportError:  # Windows; a killed run's leftovers then stay until removed by hand
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"


def check_output(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a place that must not be written, before any work.

    Raises:
        OutputError: it exists (without `overwrite`), is no checkpoint that could be replaced, or overlaps the source.
    """
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError(f"the output {out} and the source {source} lie within each other; choose another output with -o")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputError(f"{out} exists already; choose another output with -o, or say --overwrite to replace it")
    if not out.is_dir() or out.is_symlink() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise OutputError(f"{out} is no checkpoint directory, so it is not replaced; remove it yourself or choose another output")


@contextmanager
def whole_directory(out: Path, *, bytes_needed: int, overwrite: bool) -> Iterator[Path]:
    """Give a directory to write into, beside `out`, and rename it to `out` at the end; on any exception, remove it.

    Leftovers of runs that were killed on the way to the same output are removed first. Call `check_output` before.

    Raises:
        OutputError: no room, no permission, or any other answer of the file system.
    """
    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        free = shutil.disk_usage(out.parent).free
        if bytes_needed > free:
            raise OutputError(
                f"{out.parent} has {free / 1e9:,.2f} GB free and {out.name} needs {bytes_needed / 1e9:,.2f} GB; make room, choose "
                "another disk with -o, or share unchanged files with --link"
            )
        partial.mkdir()
        lock = _locked(partial / _LOCK)
        try:
            yield partial
            _sync_directory(partial)
            (partial / _LOCK).unlink(missing_ok=True)
            _put_in_place(partial, out, overwrite=overwrite)
        finally:
            if lock is not None:
                os.close(lock)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(
                f"the disk of {out.parent} is full; nothing was left behind. Make room or choose another -o"
            ) from error
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error


def _put_in_place(partial: Path, out: Path, *, overwrite: bool) -> None:
    old = None
    if os.path.lexists(out):
        if not overwrite:
            raise OutputError(f"{out} was made by somebody else meanwhile; it is left as it is, and this result is thrown away")
        old = out.parent / f".{out.name}.replaced-{secrets.token_hex(4)}"
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old is not None:
            old.rename(out)
        raise
    _sync_directory(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _locked(path: Path) -> int | None:
    """A file whose lock the system takes back when this process ends, however it ends."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_leftovers(out: Path) -> None:
    if fcntl is None:
        return
    for partial in out.parent.glob(f".{out.name}.partial-????????"):
        try:
            descriptor = os.open(partial / _LOCK, os.O_RDWR)
        except OSError:  # its owner has not locked it yet, or has just finished
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use
            continue
        else:
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(descriptor)


def _sync_directory(path: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
