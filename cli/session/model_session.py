"""Run measurements on one model and one text, and resume interrupted ones."""

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
    """One measurement; the leading process sends it to all others."""

    @property
    def name(self) -> str:
        """Return the name, which is also part of the output's name."""

    @property
    def kind(self) -> str:
        """Return the kind of result directory, one of `run_directory.KINDS`."""

    def arguments(self) -> dict[str, Any]:
        """Return what the results depend on, in addition to model and text."""

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Make the measurer."""

    def output(self, measurer: Measurer, source: Source, console: Console) -> RunOutput:
        """Make the output, which writes the result tables."""

    def draw(self, frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Draw the figures; return their paths."""

    def summarize(self, frame: pd.DataFrame) -> str:
        """Summarize the results so far in a few words."""

    def show(self, run: Run, console: Console) -> None:
        """Print the results."""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Work that the leading process sends to the others."""

    task: Task
    text: TokenizedText
    weights: str
    placement: Placement


class ModelSession:
    """One model and one text for several runs; the model is loaded once, when the first run needs it.

    Attributes:
        model: the model's name, as given by the user.
        options: options of the command.
        console: where to print.
        group: the processes that measure together.
        source: the model's files; they include the weights once a run has needed them.
        depth: number of blocks of the model.
        request: the text to read.
        placement: the model's devices and data type.
        workers_idle: whether the other processes are waiting for the next work item.
    """

    def __init__(
        self, model: str, options: MeasureOptions, console: Console, group: ProcessGroup, exit_stack: ExitStack
    ) -> None:
        self.model, self.options, self.console, self.group = model, options, console, group
        self._exit_stack = exit_stack
        self.source, self.depth, positions, self._vocabulary = read_model_info(model, options, console)
        self.request = text_request(model, options, positions)
        self.placement = choose_placement(options, self.source, console)
        self.workers_idle = True
        self._text: TokenizedText | None = None
        self._loaded: Any = None
        self._has_weights = False

    def run(self, task: Task, directory: Path, *, overwrite: bool | None = None) -> Run:
        """Run a measurement, or resume it, and show the progress.

        Args:
            task: what to measure.
            directory: where to write.
            overwrite: replace what another run has left in the directory; default: the command's --overwrite.

        Returns:
            The finished run.

        Raises:
            OutputError: the directory holds other files, or a run with other arguments.
            MeasurementError: the model cannot be measured.
        """
        from layersurgery.runs.run_directory import open_run
        from layersurgery.runs.tables import read_run
        from layersurgery.runs.text import check_data

        check_data(self.request)
        overwrite = self.options.overwrite if overwrite is None else overwrite
        previous = read_run(directory) or {}
        # A finished run of a Hub dataset is reported without contacting the Hub again.
        is_done = previous.get("state") == "finished" and self.request.from_hub and not overwrite
        text = None if is_done and self._text is None else self.text
        arguments = _arguments(self._with_weights(), self.options, self.request, task, self.placement)
        arguments["text"]["fingerprint"] = (
            text.fingerprint if text else previous.get("arguments", {}).get("text", {}).get("fingerprint")
        )
        with open_run(directory, arguments, kind=task.kind, overwrite=overwrite, command=recorded_command()) as run:
            if run.finished or text is None:
                self.console.log(
                    f"The run in {run.directory} has finished; nothing to do. Use --overwrite to measure again"
                )
            else:
                self.group.broadcast(WorkItem(task, text, arguments["model"]["weights"], self.placement))
                self.workers_idle = False
                _measure(run, self, task, text)
                self.workers_idle = True
        return run

    @property
    def text(self) -> TokenizedText:
        """Return the tokens; read them at the first use."""
        if self._text is None:
            self._text = _read_tokens(self.request, self.tokenizer, self._vocabulary, self.console)
        return self._text

    @property
    def tokenizer(self) -> Any:
        """Return the model's tokenizer, or the one named with --tokenizer."""
        return tokenizer_of_run(self.source, self.options.tokenizer)

    def check_vocabulary(self, max_token: int) -> None:
        """Check that the model's vocabulary includes a token.

        Raises:
            SourceError: it does not.
        """
        _check_vocabulary(max_token, self._vocabulary)

    def _with_weights(self) -> Source:
        if not self._has_weights:
            self.source, self._has_weights = find_source(self.model, revision=self.options.revision), True
        return self.source

    def arguments(self, analysis: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a one-process analysis depends on: its own arguments, the model and its placement."""
        source = self._with_weights()
        model = {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)}
        return {"model": model, **analysis, **self.placement.arguments(), "blocks": self.options.blocks}

    def load(self) -> Any:
        """Return the model on its devices; load it at the first use."""
        if self._loaded is None:
            self._loaded = self._exit_stack.enter_context(
                load_with_status(self._with_weights(), self.placement, self.console, self.group)
            )
        return self._loaded


def tokenizer_of_run(source: Source, other: str | None) -> Any:
    """Return the tokenizer for the text.

    Args:
        source: the model.
        other: another model to take the tokenizer from, or None.

    Raises:
        SourceError: the model has no tokenizer.
    """
    from layersurgery.checkpoints.loading import tokenizer_of

    tokenizer = tokenizer_of(find_source(other, weights=False) if other else source)
    if tokenizer is None:
        raise SourceError(f"{other or source.label} has no tokenizer; name a model that has one: --tokenizer MODEL")
    return tokenizer


def _arguments(
    source: Source, options: MeasureOptions, request: TextRequest, task: Task, placement: Placement
) -> dict[str, Any]:
    from layersurgery.runs.run_directory import package_versions

    return {
        "model": {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)},
        **task.arguments(),
        "text": {**dataclasses.asdict(request), "shuffle": request.shuffled, "tokenizer": options.tokenizer},
        **placement.arguments(),
        "compiled": options.compile,
        "batch_size": options.batch_size,
        "per_token": options.per_token,
        "blocks": options.blocks,
        "versions": package_versions(),
    }


def _read_tokens(request: TextRequest, tokenizer: Any, vocabulary: int | None, console: Console) -> TokenizedText:
    from layersurgery.runs.text import read_text

    with console.status(f"Reading text: {request.data}"):
        text = read_text(request, tokenizer)
    _check_vocabulary(int(text.ids[text.mask.bool()].max()), vocabulary)
    sequences, length = text.ids.shape
    at_most = "" if request.pack else "up to "
    console.log(f"{text.tokens:,} tokens in {sequences} sequence{'s'[: sequences != 1]} of {at_most}{length}")
    for note in text.notes:
        console.log(f"Note: {note}")
    return text


def _check_vocabulary(max_token: int, vocabulary: int | None) -> None:
    if vocabulary is not None and max_token >= vocabulary:
        raise SourceError(
            f"the tokenizer gave token {max_token}, but the model's vocabulary has {vocabulary} tokens: this is "
            "another model's tokenizer"
        )


def _measure(run: Run, session: ModelSession, task: Task, text: TokenizedText) -> None:
    from layersurgery.runs.runner import run_measurement

    options, console, group, source = session.options, session.console, session.group, session.source
    model = session.load()
    measurer = task.measurer(model, options)
    devices = describe_placement(model, session.placement, measurer.runner.path)
    console.log(
        f"{source.label}: {format_count(measurer.parameters)} parameters in {session.placement.dtype} on {devices}; "
        f"logits computed by {measurer.readout.description}"
    )
    _announce(measurer, text, options.batch_size or run.facts.get("batch_size"), console, group)
    if run.started:
        console.log("Resuming from the results measured so far")
    try:
        with progress_bar(text, console, task.summarize) as on_progress:
            run_measurement(
                run,
                measurer,
                text,
                task.output(measurer, source, console),
                batch_size=options.batch_size,
                per_token=options.per_token,
                tokenizer=session.tokenizer if options.per_token else None,
                draw=lambda frame, directory: task.draw(frame, directory, run),
                on_progress=on_progress,
                group=group,
            )
    except (KeyboardInterrupt, SystemExit) as stop:
        hint = " If another process has ended, see its own message for the reason" if group.size > 1 else ""
        end = f".{hint}" if hint else ""
        print_error("interrupted", f"results so far are in {run.directory}; run the same command to resume{end}")
        raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
    if measurer.runner.compiler is not None and (reason := measurer.runner.compiler.error):
        console.log(f"Note: {reason}; blocks were run without compilation")
    if measurer.max_sequences is not None:
        count = measurer.max_sequences
        plural = "s"[: count != 1]
        console.log(f"Note: memory ran out, so batches were split into parts of {count} sequence{plural}")


@contextmanager
def load_with_status(source: Source, placement: Placement, console: Console, group: ProcessGroup) -> Iterator[Any]:
    """Load a model onto its devices, with a status message."""
    with ExitStack() as exit_stack:
        with console.status(f"Loading {source.label}"):
            model = exit_stack.enter_context(load_model(source, placement, group))
        yield model


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence other libraries' warnings and progress bars."""
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
    memory, schedule = measurer.memory_use(batch, length), measurer.schedule
    without_sharing = f", {schedule.calls_without_sharing:,} without sharing"
    saving = without_sharing if schedule.calls_without_sharing > schedule.calls else ""
    processes = f", on {group.size} processes" if group.size > 1 else ""
    edited = f"{len(measurer.routes)} edited models; " if measurer.routes else ""
    console.log(f"{edited}{schedule.calls:,} block calls per batch{saving}{processes}")
    if measurer.bytes_to_read:
        resident = schedule.resident_blocks
        order = (
            f"layer by layer, {resident} block{'s'[: resident != 1]} in memory at a time"
            if schedule.during_trunk
            else "route by route"
        )
        console.log(f"Weights are loaded {order}: {format_bytes(measurer.bytes_to_read)} per batch")
    console.log(
        f"Expecting {format_bytes(memory.total)} of memory for {batch} sequence{'s'[: batch != 1]} at once: weights "
        f"{format_bytes(memory.weights)}, residual streams {format_bytes(memory.streams)}, one block "
        f"{format_bytes(memory.block)} or one readout {format_bytes(memory.readout)}"
    )
    for plan_text, reason in measurer.skipped.items():
        console.log(f"Skipped: {plan_text}: {reason}")
