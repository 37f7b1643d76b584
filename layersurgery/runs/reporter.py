"""Say what a run does: messages, and progress. The library is silent by default; the command line prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import warn

if TYPE_CHECKING:
    from .text import TokenizedText

Count = Callable[[int, int], None]


class Reporter:
    """Receiver of a run's messages. It prints nothing, and passes progress on to a function.

    Args:
        progress: called with what is measured, how much of it is done and how much there is in total; None for nobody.

    Attributes:
        command: the command line that a new run records, so that it can be repeated; empty if there is none.
        dry_run: say what would be measured and written instead (`DryRun`).
        subject: name of the current measurement, for progress; empty for what it counts.
    """

    def __init__(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        self._progress = progress
        self.command = ""
        self.dry_run = False
        self.subject = ""

    def log(self, text: str) -> None:
        """Say something."""

    def finished(self, directory: Path) -> None:
        """Say that the run in a directory was finished before."""
        self.log(f"Using the finished run in {directory} (`overwrite` measures again)")

    def note(self, text: str) -> None:
        """Say something that the caller should know of the result. Here it is a warning."""
        warn(text)

    def skipped(self, reasons: Mapping[str, str]) -> None:
        """Say what is not measured, with the reasons. The measurement itself warns, so this says nothing."""

    def not_finite(self, batches: Mapping[str, list[int]]) -> None:
        """Say which plans or quantities gave NaN or infinity, and in which batches. Here it is a warning."""
        if batches:
            warn(f"not finite: {', '.join([*batches][:8])}{' ...'[: 4 * (len(batches) > 8)]} gave NaN or infinity")

    def warn(self, label: str, text: str) -> None:
        """Say that something failed or was interrupted; `label` says which in a word."""

    @contextmanager
    def status(self, text: str) -> Iterator[None]:  # noqa: ARG002 - for those that print
        """Announce a slow step while the `with` block runs it."""
        yield

    @contextmanager
    def count(self, noun: str) -> Iterator[Count | None]:
        """Give a function that takes how many of `noun` are done, and how many there are in total."""
        report = self._progress
        yield None if report is None else lambda done, total: report(noun, done, total)

    @contextmanager
    def run_progress(self, text: TokenizedText) -> Iterator[Callable[[Any], None] | None]:
        """Give a function that takes a run's `Progress`, while the tokens of `text` are measured."""
        report = self._progress
        yield (
            None
            if report is None
            else lambda progress: report(self.subject or f"{text.noun}s", int(progress.sequences), int(progress.total))
        )
