"""Stop a program at each of its file operations, as a kill does: nothing that would clean up afterwards takes effect.

Python reports every file operation to audit hooks. A hook that raises stops the operation; here it then stops all later
ones as well, until the `with` block ends, so that the files stay as a killed process leaves them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killed(BaseException):
    """Stand for the end of a program that is killed here."""


@dataclass
class _Watch:
    """File operations below a directory that are counted, and the one at which the program is killed."""

    root: Path
    kill_at: int | None
    torn: bool
    operations: list[str] = field(default_factory=list)
    is_dead: bool = False


_watches: list[_Watch] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watches or (event != "open" and event not in _EVENTS) or isinstance(arguments[0], int):
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
        return
    watch, path = _watches[-1], Path(os.fsdecode(arguments[0]))
    # A path that is relative to an open directory comes from the removal of a whole tree.
    is_in_tree = event in ("os.remove", "os.rmdir") and arguments[1] != -1
    if not is_in_tree and not path.absolute().is_relative_to(watch.root):
        return
    if watch.is_dead:
        raise Killed
    watch.operations.append(f"{event} {path.name}")
    if len(watch.operations) - 1 == watch.kill_at:
        if watch.torn:
            _watches.remove(watch)
            _tear(path, is_new=event == "open")
            _watches.append(watch)
        watch.is_dead = True
        raise Killed


def _tear(path: Path, *, is_new: bool) -> None:
    """Leave a part of a file that is about to be written, or that has been written."""
    if path.is_file():
        os.truncate(path, path.stat().st_size // 2)
    elif is_new:
        path.write_bytes(b"PK")


_installed: list[bool] = []


@contextmanager
def file_operations(root: Path, *, kill_at: int | None = None, torn: bool = False) -> Iterator[list[str]]:
    """Count the file operations below a directory in the `with` block.

    Args:
        root: the directory.
        kill_at: number of the operation before which the program is killed; None lets it end.
        torn: the kill leaves a part of the file that was being written.

    Yields:
        The operations so far.
    """
    if not _installed:  # an audit hook cannot be removed
        _installed.append(True)
        sys.addaudithook(_hook)
    watch = _Watch(root.absolute(), kill_at, torn)
    _watches.append(watch)
    try:
        yield watch.operations
    except Killed:
        pass
    finally:
        _watches.remove(watch)
