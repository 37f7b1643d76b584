"""The command line that was given, so that a run can note how it is repeated."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextvars import ContextVar

_GIVEN: ContextVar[str] = ContextVar("given", default="")


def remember(words: Sequence[str]) -> None:
    """Keep the words behind the program's name."""
    _GIVEN.set(shlex.join(["layersurgery", *words]))


def given() -> str:
    """The whole command, as a shell takes it; empty where there was none."""
    return _GIVEN.get()
