"""Write files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError


def check_output(out: Path, source: Path | None, *, overwrite: bool) -> None:
    """Refuse an output that must not be written, before any work.

    Raises:
        OutputError: it exists (without `overwrite`) and is not empty, is not a checkpoint that can be replaced, or
            overlaps the source.
    """
    target, origin = out.resolve(), source and source.resolve()
    if origin is not None and (target == origin or target in origin.parents or origin in target.parents):
        raise OutputError(
            f"the output {out} and the source {source} overlap: one contains the other. Choose another output"
        )
    if not os.path.lexists(out) or _is_empty(out):
        return
    if not overwrite:
        raise OutputError(f"{out} exists already; choose another output, or replace it (`overwrite`)")
    _check_replaceable(out)


def _is_empty(out: Path) -> bool:
    """Return whether the output is an existing directory without anything in it."""
    with suppress(OSError):  # a directory that cannot be read counts as full
        return out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    return False


def _check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an empty directory or a checkpoint without other directories in it."""
    if _is_empty(out):
        return
    entries = list(out.iterdir()) if out.is_dir() and not out.is_symlink() else None
    names = {path.name for path in entries or ()}
    others = [path.name for path in entries or () if path.is_dir() and path.name != "additional_chat_templates"]
    if "config.json" not in names or not names & {"model.safetensors", "model.safetensors.index.json"} or others:
        why = f"it holds the directory {others[0]}" if others else "it is not a checkpoint directory"
        raise OutputError(f"{out} is not replaced: {why}; remove it yourself or choose another output")


def check_room(out: Path, bytes_needed: int) -> None:
    """Refuse an output that the file system cannot take, without writing anything.

    Raises:
        OutputError: something above it is not a directory or cannot be written to, or the disk has too little space.
    """
    parent = existing_parent(out)
    if not parent.is_dir():
        raise OutputError(f"cannot write {out}: {parent} is not a directory; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {out}: no permission to write in {parent}; choose another output")
    _check_space(out, parent, bytes_needed)


def existing_parent(out: Path) -> Path:
    """Return the nearest path above an output that exists."""
    return next(parent for parent in (out.parent, *out.parent.parents) if os.path.lexists(parent))


def _check_space(out: Path, parent: Path, bytes_needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if bytes_needed > free:
        raise OutputError(
            f"{parent} has {free / 1e9:,.2f} GB free and {out.name} needs {bytes_needed / 1e9:,.2f} GB; "
            "free some space, choose an output on another disk, or share unchanged files (`link`)"
        )


@contextmanager
def atomic_directory(out: Path, *, bytes_needed: int, overwrite: bool) -> Iterator[Path]:
    """Give a temporary directory next to `out`, and rename it to `out` at the end. Remove it on any exception.

    So are the parents of `out` that were made for it. Temporary directories of killed runs with the same output are
    removed first. Call `check_output` before.

    Raises:
        OutputError: no space, no permission, or any other error of the file system.
    """

    def move(partial: Path) -> None:
        _move_into_place(partial, out, overwrite=overwrite)

    with _partial_directory(out, bytes_needed, move) as made:
        yield made


@contextmanager
def atomic_large_file(out: Path, *, bytes_needed: int, overwrite: bool) -> Iterator[Path]:
    """Give the path of a file in a temporary directory next to `out`, and rename it to `out` at the end.

    It is removed on any exception, and by the next run with the same output if this one is killed. Unlike with
    `atomic_file`, several processes may write to one output: each has its own file.

    Raises:
        OutputError: no space, no permission, any other error of the file system, or another process has written `out`.
    """

    def move(partial: Path) -> None:
        if os.path.lexists(out) and not overwrite:
            raise OutputError(
                f"{out} was created by another process in the meantime; it is left unchanged, and this result is "
                "discarded"
            )
        descriptor = os.open(partial / out.name, os.O_RDWR)  # Windows syncs only what may be written
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        (partial / out.name).replace(out)
        _sync_directory(out.parent)

    with _partial_directory(out, bytes_needed, move) as made:
        yield made / out.name


@contextmanager
def _partial_directory(out: Path, bytes_needed: int, move: Callable[[Path], None]) -> Iterator[Path]:
    """Give a temporary directory next to `out`, and call `move` with it at the end."""
    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    missing = [parent for parent in (out.parent, *out.parent.parents) if not os.path.lexists(parent)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        _check_space(out, out.parent, bytes_needed)
        with _locked_partial(partial):
            try:
                partial.mkdir()
                yield partial
                _sync_directory(partial)
                move(partial)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(
                f"the disk of {out.parent} is full; no partial output was left. Free some space, or choose "
                "another output"
            ) from error
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        for parent in missing:
            with suppress(OSError):  # one with anything in it stays, as after a success
                parent.rmdir()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary file next to `path`, and rename it to `path` once it is on disk. Remove it on any exception.

    Raises:
        OutputError: any error of the file system.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            yield partial
            descriptor = os.open(partial, os.O_RDWR)  # Windows syncs only what may be written
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            partial.replace(path)
            _sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Lock a directory for this process, until the `with` block or the process ends.

    Raises:
        OutputError: another process has locked it.
    """
    if os.name == "nt":  # a directory cannot be opened there, so a temporary file next to it is locked
        path, flags = directory.resolve().with_name(f".{directory.resolve().name}.lock"), _CREATE
    else:
        path, flags = directory, os.O_RDONLY
    with _lock(path, flags) as locked:
        if locked is False:
            raise OutputError(f"another process is writing to {directory}; wait for it, or choose another output")
        yield


def _move_into_place(partial: Path, out: Path, *, overwrite: bool) -> None:
    old = None
    if os.path.lexists(out):
        if not overwrite and not _is_empty(out):
            raise OutputError(
                f"{out} was created by another process in the meantime; it is left unchanged, and this result is "
                "discarded"
            )
        _check_replaceable(out)
        old = out.parent / f".{out.name}.replaced-{secrets.token_hex(4)}"
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:  # also after a second Ctrl-C the output must exist
        if old is not None and not os.path.lexists(out):
            old.rename(out)
        raise
    _sync_directory(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


# A younger lock file without a directory may belong to a process that has created it and not locked it yet.
_LOCKING_SECONDS = 60
# Errors of file systems that cannot sync a directory, such as some network ones; its files were synced.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
# On Windows, the system removes the lock file once no process has it open.
_CREATE = os.O_CREAT | os.O_RDWR | getattr(os, "O_TEMPORARY", 0)


@contextmanager
def _lock(path: Path, flags: int) -> Iterator[bool | None]:
    """Lock a file or directory during the `with` block; the lock also ends with this process, even if it is killed.

    Yields:
        Whether this process has the lock: False if another has it, None if the file system has no locks.
    """
    # Not filelock's FileLock: it cannot lock a directory, leaves its file in place on POSIX, and falls back to a marker
    # file, which outlives a killed process, where the file system has no locks.
    from filelock import lock_descriptor

    descriptor = os.open(path, flags)
    try:
        try:
            locked = lock_descriptor(descriptor, blocking=False)
        except OSError:
            locked = None
        yield locked
    finally:
        os.close(descriptor)


@contextmanager
def _locked_partial(partial: Path) -> Iterator[bool | None]:
    """Hold the lock of a temporary directory, from before it is made until it is gone.

    The lock is a file next to it, because Windows does not rename a directory that contains an open file. Its name
    contains the directory's random name, so a later run never uses the same file.

    Yields:
        As `_lock`.
    """
    path = partial.with_name(f".lock{partial.name}")
    with _lock(path, _CREATE) as locked:
        try:
            yield locked
        finally:
            if locked is not False and os.name != "nt":
                path.unlink(missing_ok=True)


def _remove_leftovers(out: Path) -> None:
    # A run that was killed between its two renames left the old checkpoint under another name.
    for old in out.parent.glob(f".{glob.escape(out.name)}.replaced-????????"):
        if os.path.lexists(out):
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)
    remove_leftovers(out.parent, glob.escape(out.name))


def remove_leftovers(directory: Path, outputs: str = "*") -> None:
    """Remove the temporary directories that killed runs of `atomic_directory` left.

    Args:
        directory: the parent of the outputs.
        outputs: pattern of their names.
    """
    name = f".{outputs}.partial-????????"
    partials = set(directory.glob(name))
    # A run that was killed before it made its directory, or after it renamed it, left the lock alone.
    for lock in directory.glob(f".lock{name}"):
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime > _LOCKING_SECONDS:
                partials.add(lock.with_name(lock.name.removeprefix(".lock")))
    for partial in partials:
        with suppress(OSError), _locked_partial(partial) as locked:
            if locked:  # its process has ended
                shutil.rmtree(partial, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)
