"""Open a model and a text for a measurement in memory, from any form that the Python functions take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..library_logs import quiet_libraries
from .distributed import SingleProcess
from .options import RunOptions
from .reporter import Reporter
from .requests import GivenText
from .session import ModelSession
from .text import TokenizedText


@contextmanager
def open_model(model: Any, options: RunOptions) -> Iterator[tuple[ModelSession, Any]]:
    """Give a session and its loaded model while the `with` block runs; arguments as for `open_text`."""
    options.refuse(["track"], "is for runs that are written, so it needs `directory`")
    with ExitStack() as exit_stack:
        with quiet_libraries():
            session = ModelSession(model, options, Reporter(), SingleProcess(), exit_stack)
            loaded = session.model.load()
        yield session, loaded


@contextmanager
def open_text(
    model: Any, given: GivenText | None, options: RunOptions
) -> Iterator[tuple[ModelSession, Any, TokenizedText]]:
    """Give a session, its loaded model and its tokens while the `with` block runs.

    Args:
        model: the model's name, or a loaded model.
        given: text that was given from Python; otherwise the options name it.
        options: options of the measurement.

    Raises:
        PlanError: the text cannot be measured.
        SourceError: the model or the text cannot be found or read.
    """
    options.refuse(["track"], "is for runs that are written, so it needs `directory`")
    with ExitStack() as exit_stack:
        with quiet_libraries():
            session = ModelSession(model, options, Reporter(), SingleProcess(), exit_stack, given)
            session.check()
            text = session.texts.text
            loaded = session.model.load()
        yield session, loaded, text
