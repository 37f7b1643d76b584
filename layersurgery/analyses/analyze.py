"""Run an analysis by its name into a directory of results, and let the functions of `analyses` take any text."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import PlanError
from ..plans.visit import as_int
from ..registry import ANALYSES, resolve
from ..runs.frames import ResultFrame, as_result
from ..runs.open_text import open_model, open_text
from ..runs.options import SWEEP_ONLY, RunOptions, refuse_unknown
from ..runs.processes import run_session
from ..runs.reporter import Reporter
from ..runs.requests import read_given_text
from ..runs.run_directory import Run
from ..runs.session import ModelSession
from ..runs.tables import read_results

_RUN_OPTIONS = {field.name for field in fields(RunOptions)}
# The functions in memory take these two themselves.
_SHARED = {"batch_size", "blocks"}
# Parameters of functions that are not options of theirs.
_INTERNAL = {
    *("model", "tokens", "text", "ids", "mask", "attention_mask", "signals", "label"),
    *("session", "directory", "analysis", "overwrite", "remove", "by", "greedy"),
}
_NO_TEXT = {"weights": "reads the weights alone", "pairs": "reads the pairs of sentences that pairs names"}


def run_analysis(session: ModelSession, name: str, directory: Path, *, overwrite: bool = False, **options: Any) -> Run:
    """Run an analysis on a session's model and text, or resume it, or use the finished run in the directory.

    Args:
        session: the model and the text.
        name: one of `registry.ANALYSES`.
        directory: where to write.
        overwrite: replace what another run has left in the directory.
        options: options of this analysis.

    Returns:
        The finished run.

    Raises:
        PlanError: an unknown analysis, or an option that it does not have.
    """
    check_analysis(name)
    run: Run = resolve(ANALYSES[name].run)(session, directory, analysis=name, overwrite=overwrite, **options)
    return run


def check_analysis(name: str) -> None:
    """Refuse an unknown analysis.

    Raises:
        PlanError: there is none of this name (names the nearest one).
    """
    if name not in ANALYSES or not ANALYSES[name].help:
        names = [known for known, analysis in ANALYSES.items() if analysis.help]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(names)}"
        raise PlanError(f"unknown analysis {name!r}; {hint}")


def analyze(
    name: str,
    model: Any,
    text: Any = None,
    *,
    directory: str | os.PathLike[str],
    attention_mask: Any = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ResultFrame:
    """Run an analysis as the command of this name does: tables, figures and a record of the run in a directory.

    An analysis that was interrupted resumes there, and a finished one is read.

    Args:
        name: the analysis, such as "lens" or "stages"; `layersurgery.registry.ANALYSES` has all.
        model: a transformers causal language model, or the name of one.
        text: token ids, (sequences, length); a tokenizer's output; a list of strings or of conversations; a Hugging
            Face dataset; a path; "pydoc"; or the id of a Hub dataset. Default: what the option `data` names.
        directory: where to write.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        overwrite: discard what another run has left in the directory, and measure again.
        progress: called with how much is done and how much there is in total.
        options: as `layersurgery.runs.options.RunOptions`, and the analysis's own, such as `samples` or `spans`.

    Returns:
        The main table; `read_results(directory, table)` reads the others.

    Raises:
        PlanError: an unknown analysis or option, or text that cannot be measured.
        SourceError: the model or the text cannot be found or read.
        MeasurementError: predictions that are NaN or infinite, too little text, or too little memory.
        OutputError: the directory holds something else, or a run with other arguments.

    Example:
        >>> import tempfile
        >>> import layersurgery as ls
        >>> directory = tempfile.mkdtemp()
        >>> frame = ls.analyze("lens", "smollm2-135m", "pydoc", directory=directory, tokens=64, context=32)
        >>> ls.read_results(directory).lens_kl_nats.shape
        (30,)
    """
    check_analysis(name)
    refuse_ignored(name, text, options)
    run_options, own = split_options(options, resolve(ANALYSES[name].run))
    run_options, given = read_given_text(text, run_options, attention_mask)
    if given is not None and given.tokens is not None and ANALYSES[name].needs == "windows":
        raise PlanError(f"{name} searches texts for windows; give texts, not tokens")
    run_session(
        model,
        run_options,
        lambda session: run_analysis(session, name, Path(directory), overwrite=overwrite, **own),
        reporter=Reporter(None if progress is None else lambda _, done, total: progress(done, total)),
        given=given,
    )
    return read_results(directory)


def on_any_text(
    name: str, function: Callable[..., pd.DataFrame], passes_to: Callable[..., Any] | None = None
) -> Callable[..., ResultFrame]:
    """Make of a function of a loaded model and tokens one that takes any model and text, and may write a directory.

    Args:
        name: the analysis's name.
        function: measures it in memory: function(model, tokens, attention_mask=..., ...).
        passes_to: the function that it passes its keyword arguments to; None if it names them itself.
    """

    def measure(
        model: Any,
        text: Any = None,
        *,
        attention_mask: Any = None,
        directory: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> ResultFrame:
        if directory is not None:
            return analyze(
                name,
                model,
                text,
                directory=directory,
                attention_mask=attention_mask,
                overwrite=overwrite,
                **options,
            )
        refuse_ignored(name, text, options)
        run_options, own = split_options(options, passes_to or function)
        own |= {key: options[key] for key in _SHARED if key in options}
        if ANALYSES[name].needs == "weights":
            with open_model(model, run_options) as (_, loaded):
                return as_result(function(loaded, **own), name, "from weights alone")
        run_options, given = read_given_text(text, run_options, attention_mask)
        with open_text(model, given, run_options) as (session, loaded, tokens):
            frame = function(loaded, tokens.ids, attention_mask=tokens.mask, **own)
            return as_result(frame, name, session.caption(tokens))

    measure.__module__, measure.__name__, measure.__qualname__ = function.__module__, name, name
    measure.__doc__ = _with_shared_text(function.__doc__ or "")
    return measure


_TOKENS = "        tokens: token ids, (sequences, length).\n"
_TEXT = """\
        text: token ids, (sequences, length); a tokenizer's output; a list of strings or of conversations; a Hugging
            Face dataset; a path; "pydoc"; or the id of a Hub dataset. Default: what the option `data` names.
"""
_DIRECTORY = """\
        directory: where to write tables, figures and a record of the run. A run that was interrupted resumes there,
            and a finished one is read. Default: nothing is written.
        overwrite: discard what another run has left in the directory, and measure again.
"""


def _with_shared_text(doc: str) -> str:
    """Describe in a docstring the parameters that all these functions share."""
    doc = doc.replace("causal language model, or a wrapper around one;", "causal language model, or the name of one;")
    before, found, after = doc.partition(_TOKENS)
    if found:
        return f"{before}{_TEXT}{_DIRECTORY}{after}"
    return doc.replace("        blocks:", f"{_DIRECTORY}        blocks:", 1)


def refuse_ignored(name: str, text: Any, options: dict[str, Any]) -> None:
    """Refuse options that would have no effect on an analysis.

    Raises:
        PlanError: one of them is given.
    """
    for option in ("compile", "schedule", "per_token", *SWEEP_ONLY):
        if options.get(option):
            raise PlanError(f"`{option}` is for sweep; {name} does not take it")
    if options.get("track") and ANALYSES[name].needs != "text":
        raise PlanError(f"`track` is for runs batch by batch, and {name} is measured in one go; leave it out")
    if text is not None and (why := _NO_TEXT.get(ANALYSES[name].needs)):
        raise PlanError(f"{name} {why}; give no text")


def split_options(options: dict[str, Any], function: Callable[..., Any]) -> tuple[RunOptions, dict[str, Any]]:
    """Split keyword arguments into options of every run and those of a function.

    Raises:
        PlanError: an option does not exist.
    """
    shared = {name: value for name, value in options.items() if name in _RUN_OPTIONS}
    own = {
        name: value if (number := as_int(value)) is None else number
        for name, value in options.items()
        if name not in _RUN_OPTIONS
    }
    refuse_unknown(own, sorted({*_RUN_OPTIONS, *signature(function).parameters} - _INTERNAL))
    return RunOptions.of(shared), own
