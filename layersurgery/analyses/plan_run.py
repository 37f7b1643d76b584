"""Choose a plan by measurements, in memory or in a directory, and write its checkpoint.

`prune` and `search` share this.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import nn

from ..atomic_io import check_output
from ..checkpoints.edit_checkpoint import EditResult, edit_checkpoint, is_gguf_output
from ..checkpoints.gguf_edit import check_gguf_output, check_gguf_source
from ..checkpoints.sources import find_gguf
from ..errors import MeasurementError, OutputError, PlanError
from ..path_names import without_directories
from ..plans.plan import Plan
from ..runs.open_text import open_text
from ..runs.processes import run_session
from ..runs.reporter import Reporter
from ..runs.tables import read_run
from ..sweeps.read_positions import ScoredPositions
from ..sweeps.sweep import collect_sums
from .linear_healing import LinearHealing, fit_linear_healing
from .signal_tables import SignalTables

if TYPE_CHECKING:
    import pandas as pd

    from ..runs.options import RunOptions
    from ..runs.requests import GivenText
    from ..runs.run_directory import Run
    from ..runs.session import Measurement, ModelSession
    from ..runs.text import TokenizedText

HEAL_LINEAR = "linear"
CHOSEN = ("orders", "removed", "candidates", "routes", "finalists", "tried")
"""Arguments that an earlier measurement has chosen."""
Progress = Callable[[str, int, int], None]
"""Called with the name of the current measurement, how much of it is done and how much there is in total."""


Measure = Callable[[Any, str, str], dict[str, "pd.DataFrame"]]
"""Runs a `TableMeasurement`, given the name of its directory and of what it measures; returns its tables by name."""


class ChosenPlan(Protocol):
    """Hold a chosen plan, and the checkpoint if one was written."""

    @property
    def plan(self) -> Plan:
        """Return the edit."""

    @property
    def by(self) -> str:
        """Return the criterion."""

    @property
    def measured(self) -> pd.DataFrame:
        """Return the measurement of the plans that it was chosen among, the unedited model first."""

    @property
    def written(self) -> EditResult | None:
        """Return the checkpoint that was written."""

    @property
    def healing(self) -> LinearHealing | None:
        """Return the linear maps that heal the edited model; None if it is not healed."""


Choice = TypeVar("Choice", bound=ChosenPlan)


def choose_plan(
    model: Any,
    options: RunOptions,
    given: GivenText | None,
    *,
    in_memory: Callable[[ModelSession, Any, TokenizedText], Choice],
    in_directory: Callable[[ModelSession, Path], Choice],
    directory: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    heal: str | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Choose a plan, in memory or in a directory, and write the edited checkpoint if it is wanted.

    Args:
        model: a loaded model, or the name of one.
        options: options of the measurements.
        given: text that was given from Python.
        in_memory: chooses the plan with a session, its loaded model and its tokens.
        in_directory: chooses the plan with a session, and writes the measurements to a directory.
        directory: where to write the measurements; by default nothing is written, or next to the output.
        output: directory to write the checkpoint to.
        overwrite: replace the output.
        heal: "linear" to heal the cuts by linear maps, fitted on the same text; None not to.
        progress: called with the name of the current measurement and its progress.

    Raises:
        PlanError: an output is given for a loaded model, or the plan cannot be healed.
        OutputError: the output exists.
    """
    check_heal(heal, given)

    def healed(session: ModelSession, choice: Choice) -> Choice:
        if heal is None:
            return choice
        return replace(choice, healing=heal_session(session, choice.plan, progress))  # type: ignore[type-var] # a dataclass

    if output is not None and isinstance(model, nn.Module):
        raise PlanError("output needs the model's name; for a loaded model, use operate_ and save")
    if directory is None and output is None:
        with open_text(model, given, options) as opened:
            return healed(opened[0], in_memory(*opened))
    target = None if output is None else Path(output)
    results = Path(directory) if directory is not None else results_directory(Path(output or ""))

    def lead(session: ModelSession) -> Choice:
        if target is not None:
            check_target(session, target, overwrite=overwrite, heals=heal is not None)
        return healed(session, in_directory(session, results))

    done = run_session(model, options, lead, reporter=Reporter(progress), given=given)
    if done is None:  # another process leads, and writes
        raise SystemExit(0)
    if target is None:
        return done
    written = edit_checkpoint(
        model,
        done.plan,
        target,
        overwrite=overwrite,
        revision=options.revision,
        blocks=options.blocks,
        maps=None if done.healing is None else done.healing.maps,
        measured=card_rows(done),
    )
    return replace(done, written=written)  # type: ignore[type-var] # a dataclass


def card_rows(choice: ChosenPlan) -> dict[str, str]:
    """Return what a model card says of the measurement that chose a plan; empty if the plan was not measured."""
    frame = choice.measured
    rows = frame[frame.plan == str(choice.plan)]
    if rows.empty:
        return {}
    before, after = frame.iloc[0], rows.iloc[0]
    run = frame.attrs.get("run", {})
    data = without_directories(run.get("arguments", {}).get("text", {}).get("data") or "")
    said = {
        "chosen by": choice.by,
        "text": f"{f'{data}, ' if data else ''}{int(after.tokens):,} tokens in {int(after.sequences):,} sequences",
        "KL from the unedited model": f"{after.kl_nats:.4g} nats{_error(after, 'kl_nats')}",
        "top-1 agreement": f"{100 * after.agreement:.1f} %{_error(after, 'agreement', 100)}",
        "loss": f"{after.loss_nats:.4g} nats{_error(after, 'loss_nats')}; {before.loss_nats:.4g} unedited",
    }
    if "task" in choice.by:
        del said["loss"]
        said["text"] = f"the requests of {choice.by.removeprefix('task:')}"
    if choice.healing is not None:
        edited, healed = choice.healing.costs.iloc[1], choice.healing.costs.iloc[2]
        said["healing, on text that the fit has not seen"] = (
            f"KL {edited.kl_nats:.4g} to {healed.kl_nats:.4g} nats, loss {edited.loss_nats:.4g} to "
            f"{healed.loss_nats:.4g} nats ({int(healed.tokens):,} tokens)"
        )
    return said


def _error(row: pd.Series, name: str, factor: float = 1) -> str:
    error = row.get(f"{name}_sem")
    return "" if error is None or math.isnan(error) else f" (standard error {factor * error:.2g})"


def check_heal(heal: str | None, given: GivenText | None) -> None:
    """Refuse a way to heal that does not exist, or has no text.

    Raises:
        PlanError: it is another one, or a task is measured.
    """
    if heal not in (None, HEAL_LINEAR):
        raise PlanError(
            f"`heal` is 'linear' or left out, not {heal!r}; to train the result, use the command heal, or ls.heal"
        )
    if heal is not None and given is not None and given.tasks is not None:
        raise PlanError(
            "healing is fitted on text, and a task has requests only; heal the plan afterwards (heal-linear)"
        )


def heal_session(session: ModelSession, plan: Plan, progress: Progress | None = None) -> LinearHealing:
    """Fit the maps that heal a session's model, on its text.

    Args:
        session: the model and the text.
        plan: the edits that remove blocks.
        progress: called with what is done, how much of it, and how much there is in total.

    Raises:
        PlanError: a plan that removes nothing, or too little text.
        UnsupportedEditError: the model cannot be healed in this way.
        MeasurementError: several processes run.
    """
    if session.group.size > 1:
        raise MeasurementError("linear healing is fitted by one process; run the command without a launcher")
    options = session.options
    text, model = session.texts.text, session.model.load()
    return fit_linear_healing(
        model, plan, text, batch_size=options.batch_size, blocks=options.blocks, progress=progress
    )


def measure_in_memory(session: ModelSession, model: Any, text: TokenizedText, progress: Progress | None) -> Measure:
    """Return a function that measures on a session's text, and writes nothing.

    Args:
        session: the session.
        model: its loaded model.
        text: its tokens.
        progress: called with the name of the current measurement and its progress.
    """

    def measure(measurement: Any, _name: str, subject: str) -> dict[str, pd.DataFrame]:
        measurer, rule = measurement.measurer(model, session.options), measurement.rule(text.mask)
        if text.scored is not None:
            measurer.read = ScoredPositions(text.scored)
        report = None if progress is None else lambda done, total: progress(subject, done, total)
        sums = collect_sums(measurer, text.ids, text.mask, session.options.batch_size, report, rule)
        sums_by_name = SignalTables(measurer, sums, session.model.label, rule)
        tables: dict[str, pd.DataFrame] = measurement.tables(sums_by_name)
        for frame in tables.values():
            frame.attrs["skipped"] = sums_by_name.skipped
        return tables

    return measure


def results_directory(output: Path) -> Path:
    """Return where the measurements for an edited checkpoint are written by default."""
    return output.with_name(f"{output.name}-results")


def check_target(session: ModelSession, target: Path, *, overwrite: bool, heals: bool = False) -> None:
    """Refuse an output that must not be written, before hours of measuring.

    Args:
        session: the session of the model that is edited.
        target: a directory, or a GGUF file.
        overwrite: replace it.
        heals: whether other weights are written, not only those of the model.

    Raises:
        OutputError: it exists, or overlaps the source.
        PlanError: a healed model is to be written to a GGUF file.
        SourceError: a GGUF file is to be written, and the model has none, or it cannot be read.
        UnsupportedEditError: no edit of the GGUF file can be written.
    """
    if is_gguf_output(target):
        if heals:
            raise PlanError(
                f"{target} is a GGUF file, whose quantized weights are copied as they are, so a healed model cannot be "
                "written to it; give a directory, and convert the healed checkpoint (convert_hf_to_gguf of llama.cpp)"
            )
        if session.options.blocks is not None:
            raise PlanError("a GGUF file is edited without `blocks`; omit it, or write a safetensors checkpoint")
        source = find_gguf(str(session.model.given), revision=session.options.revision)
        check_gguf_output(target, source.path, overwrite=overwrite)
        if note := check_gguf_source(source):
            session.reporter.note(note)
        return
    check_output(target, None if session.model.source is None else session.model.source.directory, overwrite=overwrite)


def run_or_reuse(
    session: ModelSession, measurement: Measurement, directory: Path, *, overwrite: bool, chosen: Sequence[str] = CHOSEN
) -> Run:
    """Run a measurement, or use the finished one.

    Args:
        session: the model and the text.
        measurement: what to measure.
        directory: where to write.
        overwrite: replace a measurement made with other arguments.
        chosen: arguments of the measurement that an earlier one has chosen. One made with another value of
            them is replaced anyway: the choice has changed since, as when a race was continued.
    """
    try:
        return session.run(measurement, directory)
    except OutputError:
        recorded = (read_run(directory) or {}).get("arguments", {})
        now = json.loads(json.dumps(measurement.arguments()))
        if not overwrite and not any(recorded.get(name) != now.get(name) for name in chosen):
            raise
        return session.run(measurement, directory, overwrite=True)
