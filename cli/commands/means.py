"""Run `layersurgery means`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from layersurgery.errors import MeasurementError, OutputError
from layersurgery.quick_imports import quick_imports

from ..terminal.console import Console

if TYPE_CHECKING:
    from layersurgery.models.means import Means
    from layersurgery.runs.options import RunOptions
    from layersurgery.runs.session import ModelSession


def run_means(
    model: str, options: RunOptions, output: Path | None, console: Console, *, first_tokens: bool, overwrite: bool
) -> None:
    """Measure the means, write their file, and say what they are of."""
    with quick_imports():
        from layersurgery.runs.dry_run import DryRun, state_of_output
        from layersurgery.runs.means import means_of_text
        from layersurgery.runs.processes import run_session

    def lead(session: ModelSession) -> tuple[Path, Means]:
        if session.group.size > 1:
            raise MeasurementError("means are measured by one process; run the command without a launcher")
        path = output or Path(f"{session.model.name}-means.safetensors")
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputError(f"{path} exists; choose another output, or replace a file with --overwrite")
        if not path.absolute().parent.is_dir():
            raise OutputError(f"{path.absolute().parent} is not a directory; choose another output")
        session.check()
        text = session.texts.text
        if console.dry_run:
            state = state_of_output(path)
            raise DryRun(session.model.label, session.caption(text), path, state, "measure the means of")
        measured = means_of_text(session, session.model.load(), text, first_tokens=first_tokens)
        measured.save(path)
        return path, measured

    done = run_session(model, options, lead, reporter=console)
    if done is None:
        return
    path, means = done
    without = "" if first_tokens else ", without the first token of each sequence"
    value = {
        "output": str(path),
        "model": means.model,
        "tokens": means.tokens,
        "branches": len(means.vectors),
        "fingerprint": means.fingerprint,
        "text": dict(means.text),
    }
    console.result(
        value,
        escape(
            f"Wrote the means of {len(means.vectors)} branches of {means.depth} blocks over {means.tokens:,} tokens"
            f"{without} to {path}"
        ),
    )
