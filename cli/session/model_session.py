"""What all runs have in common: a text, a model, a directory, and measuring that goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from layersurgery.checkpoints.sources import Source, find_source
from layersurgery.checkpoints.tensor_index import fingerprint
from layersurgery.errors import SourceError

from ..terminal.console import Console, format_bytes, format_count, print_error, recorded_command
from ..terminal.progress import progress_bar
from .inputs import read_model_info, text_request
from .placement import Placement, choose_placement, describe_placement, load_model

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.runs.distributed import ProcessGroup
    from layersurgery.runs.run_directory import Run
    from layersurgery.runs.runner import RunOutput
    from layersurgery.runs.text import TextRequest, TokenizedText
    from layersurgery.sweeps.measurer import Measurer

    from .run_options import MeasureOptions


class Task(Protocol):
    """What is to be measured; all processes get it from the one that leads."""

    @property
    def word(self) -> str:
        """What it is called, also in the output's name."""

    @property
    def kind(self) -> str:
        """Of the directory, one of `runs.KINDS`."""

    def arguments(self) -> dict[str, Any]:
        """What its digits depend on, beside model and text."""

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """What measures it."""

    def outcome(self, measurer: Measurer, source: Source, console: Console) -> RunOutput:
        """What becomes of it."""

    def draw(self, frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Draws its figures."""

    def extremes(self, frame: pd.DataFrame) -> str:
        """Results so far, in a few words."""

    def show(self, run: Run, console: Console) -> None:
        """Shows its results."""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """What the leading process tells the others to do."""

    task: Task
    text: TokenizedText
    weights: str
    place: Placement


class ModelSession:
    """One model and one text, for one run after another; the model is loaded when the first run needs it, and once.

    Attributes:
        model: as it was named.
        options: of the command.
        console: how it speaks.
        source: the model's files; weights are among them once one has been asked for a run.
        depth: blocks of the model.
    """

    def __init__(
        self, model: str, options: MeasureOptions, console: Console, group: ProcessGroup, hold: ExitStack
    ) -> None:
        self.model, self.options, self.console, self.group = model, options, console, group
        self._hold = hold
        self.source, self.depth, positions, self._vocabulary = read_model_info(model, options, console)
        self.asked = text_request(model, options, positions)
        self.place = choose_placement(options, self.source, console)
        self.waited_for = True
        self._text: TokenizedText | None = None
        self._loaded: Any = None
        self._whole = False

    def run(self, task: Task, directory: Path, *, anew: bool | None = None) -> Run:
        """Measure, or go on with what is measured, showing what happens; returns the finished run.

        Args:
            task: what.
            directory: where to.
            anew: replace what another run has left there; as the command's options have it, if not given.

        Raises:
            OutputError: the directory holds something else, or another run.
            MeasurementError: what cannot be measured.
        """
        from layersurgery.runs.run_directory import open_run
        from layersurgery.runs.tables import read_run
        from layersurgery.runs.text import check_data

        check_data(self.asked)
        anew = self.options.overwrite if anew is None else anew
        before = read_run(directory) or {}
        # A finished run need not reach the hub again to say so.
        done = before.get("state") == "finished" and self.asked.from_hub and not anew
        text = None if done and self._text is None else self.text
        arguments = _arguments(self._with_weights(), self.options, self.asked, task, self.place)
        arguments["text"]["fingerprint"] = (
            text.fingerprint if text else before.get("arguments", {}).get("text", {}).get("fingerprint")
        )
        with open_run(directory, arguments, kind=task.kind, overwrite=anew, command=recorded_command()) as run:
            if run.finished or text is None:
                self.console.log(
                    f"The run in {run.directory} has finished; nothing to do. --overwrite measures it anew"
                )
            else:
                self.group.broadcast(WorkItem(task, text, arguments["model"]["weights"], self.place))
                self.waited_for = False
                _measure(run, self, task, text)
                self.waited_for = True
        return run

    @property
    def text(self) -> TokenizedText:
        """The tokens, read when first asked for."""
        if self._text is None:
            self._text = _text(self.asked, self.tokenizer, self._vocabulary, self.console)
        return self._text

    @property
    def tokenizer(self) -> Any:
        """The model's, or the one that is to be taken."""
        return tokenizer_of_run(self.source, self.options.tokenizer)

    def check_vocabulary(self, most: int) -> None:
        """Refuse a token that the model does not have.

        Raises:
            SourceError: it does not.
        """
        _check_vocabulary(most, self._vocabulary)

    def _with_weights(self) -> Source:
        if not self._whole:
            self.source, self._whole = find_source(self.model, revision=self.options.revision), True
        return self.source

    def arguments(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """What digits depend on that one process finds in one go: its own arguments, the model and where it runs."""
        source = self._with_weights()
        model = {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)}
        return {"model": model, **own, **self.place.arguments(), "blocks": self.options.blocks}

    def load(self) -> Any:
        """The model where it is to be."""
        if self._loaded is None:
            self._loaded = self._hold.enter_context(
                load_with_status(self._with_weights(), self.place, self.console, self.group)
            )
        return self._loaded


def tokenizer_of_run(source: Source, other: str | None) -> Any:
    """The tokenizer that text is read with.

    Raises:
        SourceError: there is none.
    """
    from layersurgery.checkpoints.loading import tokenizer_of

    tokenizer = tokenizer_of(find_source(other, weights=False) if other else source)
    if tokenizer is None:
        raise SourceError(f"{other or source.label} brings no tokenizer; say whose to take: --tokenizer MODEL")
    return tokenizer


def _arguments(
    source: Source, options: MeasureOptions, asked: TextRequest, task: Task, place: Placement
) -> dict[str, Any]:
    from layersurgery.runs.run_directory import versions

    return {
        "model": {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)},
        **task.arguments(),
        "text": {**dataclasses.asdict(asked), "shuffle": asked.shuffled, "tokenizer": options.tokenizer},
        **place.arguments(),
        "compiled": options.compile,
        "batch_size": options.batch_size,
        "per_token": options.per_token,
        "blocks": options.blocks,
        "versions": versions(),
    }


def _text(asked: TextRequest, tokenizer: Any, vocabulary: int | None, console: Console) -> TokenizedText:
    from layersurgery.runs.text import read_text

    with console.status(f"Reading text: {asked.data}"):
        text = read_text(asked, tokenizer)
    _check_vocabulary(int(text.ids[text.mask.bool()].max()), vocabulary)
    sequences, length = text.ids.shape
    console.log(
        f"{text.tokens:,} tokens in {sequences} sequence{'s'[: sequences != 1]} of {'' if asked.pack else 'up to '}{length}"
    )
    for note in text.notes:
        console.log(f"Note: {note}")
    return text


def _check_vocabulary(most: int, vocabulary: int | None) -> None:
    if vocabulary is not None and most >= vocabulary:
        raise SourceError(
            f"the tokenizer gives token {most}, and the model has a vocabulary of {vocabulary}: it is another model's tokenizer"
        )


def _measure(run: Run, session: ModelSession, task: Task, text: TokenizedText) -> None:
    from layersurgery.runs.runner import run_measurement

    options, console, group, source = session.options, session.console, session.group, session.source
    model = session.load()
    measurer = task.measurer(model, options)
    on = describe_placement(model, session.place, measurer.runner.path)
    console.log(
        f"{source.label}: {format_count(measurer.parameters)} parameters in {session.place.dtype} on {on}; read out by {measurer.readout.description}"
    )
    _announce(measurer, text, options.batch_size or run.facts.get("batch_size"), console, group)
    if run.started:
        console.log("Going on with what is measured already")
    try:
        with progress_bar(text, console, task.extremes) as on_progress:
            run_measurement(
                run,
                measurer,
                text,
                task.outcome(measurer, source, console),
                batch_size=options.batch_size,
                per_token=options.per_token,
                tokenizer=session.tokenizer if options.per_token else None,
                draw=lambda frame, directory: task.draw(frame, directory, run),
                on_progress=on_progress,
                group=group,
            )
    except (KeyboardInterrupt, SystemExit) as stop:
        also = "; if another process has gone, its own message says why" if group.size > 1 else ""
        print_error("stopped", f"what was measured is in {run.directory}; the same command goes on with it{also}")
        raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
    if measurer.runner.compiler is not None and (why := measurer.runner.compiler.refused):
        console.log(f"Note: {why}; blocks were run as they are")
    if measurer.max_sequences is not None:
        console.log(
            f"Note: memory ran out, so batches were measured in parts of {measurer.max_sequences} sequence{'s'[: measurer.max_sequences != 1]}"
        )


@contextmanager
def load_with_status(source: Source, place: Placement, console: Console, group: ProcessGroup) -> Iterator[Any]:
    """The model where it is to be, with a word while it is loaded."""
    with ExitStack() as exit_stack:
        with console.status(f"Loading {source.label}"):
            model = exit_stack.enter_context(load_model(source, place, group))
        yield model


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Without other libraries' advice and bars between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("accelerate").setLevel("ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _announce(
    measurer: Measurer, text: TokenizedText, batch_size: int | None, console: Console, group: ProcessGroup
) -> None:
    length = text.ids.shape[1]
    batch = min(batch_size or measurer.suggest(length), len(text.ids))
    forecast, plan = measurer.memory_use(batch, length), measurer.schedule
    saved = f"{plan.calls_without_sharing:,} without sharing"
    by = f" by {group.size} processes" if group.size > 1 else ""
    edited = f"{len(measurer.routes)} edited models; " if measurer.routes else ""
    shared = f", {saved}" if plan.calls_without_sharing > plan.calls else ""
    console.log(f"{edited}{plan.calls:,} block calls a batch{shared}{by}")
    if measurer.bytes_to_read:
        way = (
            f"layer by layer, {plan.resident_blocks} block{'s'[: plan.resident_blocks != 1]} at hand at a time"
            if plan.during_trunk
            else "route by route"
        )
        console.log(f"Weights are brought in {way}: {format_bytes(measurer.bytes_to_read)} a batch")
    console.log(
        f"Expecting {format_bytes(forecast.total)} of memory for {batch} sequence{'s'[: batch != 1]} at once: weights {format_bytes(forecast.weights)}, streams "
        f"{format_bytes(forecast.streams)}, a block {format_bytes(forecast.block)} or a readout {format_bytes(forecast.readout)}"
    )
    for plan_text, reason in measurer.skipped.items():
        console.log(f"Left out: {plan_text}: {reason}")
