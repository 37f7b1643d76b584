"""Hold one model and one text for several measurements; run them, and resume interrupted ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import PlanError
from ..models.model_weights import count_heads
from ..models.quantized import quantized_numbers
from ..plans.branch_edits import PickNeurons
from ..plans.families import CountHeads
from ..sweeps.race import MIN_SEQUENCES, Race
from ..sweeps.read_positions import ScoredPositions
from ..sweeps.schedule import DEPTH_FIRST, LAYER_MAJOR
from ..units import format_bytes, format_count, format_time
from .dry_run import DryRun
from .options import RunOptions
from .placement import Placement, describe_placement
from .reporter import Reporter
from .requests import NOT_FOR_TASKS, GivenText, text_request
from .run_directory import Run, find_state, open_run, package_versions
from .runner import RunOutput, measure_text
from .session_model import SessionModel
from .session_text import SessionText
from .source_arguments import source_arguments
from .tables import read_run, text_caption
from .text import TokenizedText
from .tracking import Tracking, open_trackers, run_name, tracker_names

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from ..sweeps.measurer import Measurer
    from ..sweeps.row_progress import StopRule
    from ..tasks.task_request import TaskRequest
    from .distributed import ProcessGroup


class Measurement(Protocol):
    """One measurement; the leading process sends it to all others."""

    @property
    def name(self) -> str:
        """Return the name, which is also part of the output's name."""

    @property
    def kind(self) -> str:
        """Return the kind of result directory, one of `run_directory.KINDS`."""

    def arguments(self) -> dict[str, Any]:
        """Return what the results depend on, in addition to model and text."""

    def measurer(self, model: Any, options: RunOptions) -> Measurer:
        """Make the measurer."""

    def prepared(self, session: ModelSession, text: TokenizedText, run: Run) -> Measurement:
        """Return the measurement with what is measured before it, such as means of branches."""

    def rule(self, mask: torch.Tensor | None) -> StopRule | None:
        """Return the rule that says which rows need no more text; None for none.

        Args:
            mask: 1 for a token and 0 for padding, (sequences, length); None as long as the text is not read.
        """

    def output(self, measurer: Measurer, label: str, reporter: Reporter, rule: StopRule | None) -> RunOutput:
        """Make the output, which writes the result tables."""

    def draw(self, frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Draw the figures; return their paths."""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Work that the leading process sends to the others."""

    measurement: Measurement
    text: TokenizedText
    weights: str
    placement: Placement
    sources: dict[str, Any]


class ModelSession:
    """Hold one model and one text for several runs.

    Args:
        model: the model's name, or a loaded model.
        options: options of the measurements.
        reporter: receives what is said.
        group: the processes that measure together.
        exit_stack: closed when the session ends; it then frees the model.
        given: text that was given from Python; otherwise `options` name it.

    Attributes:
        model: the model.
        texts: the text that is measured.
        trackers: names of the experiment trackers that runs are logged to.
    """

    def __init__(
        self,
        model: Any,
        options: RunOptions,
        reporter: Reporter,
        group: ProcessGroup,
        exit_stack: ExitStack,
        given: GivenText | None = None,
    ) -> None:
        self.options, self.reporter, self.group = options, reporter, group
        self.model = SessionModel(model, options, reporter, group, exit_stack)
        self._said: set[str] = set()
        self._heads: CountHeads | None = None
        self._neurons: PickNeurons | None = None
        if options.schedule not in (None, DEPTH_FIRST, LAYER_MAJOR):
            raise PlanError(f"`schedule` {options.schedule!r} is unknown; use {DEPTH_FIRST} or {LAYER_MAJOR}")
        self.trackers = tracker_names(options.track)
        self.texts = self._read(given)

    def _read(self, given: GivenText | None) -> SessionText:
        request = text_request(self.model.given, self.options, self.model.positions, given)
        return SessionText(request, given, self.options, self.reporter, self.model)

    def with_tasks(self, tasks: TaskRequest) -> ModelSession:
        """Return a session on the same model that measures the requests of tasks instead of this session's text."""
        session = copy.copy(self)
        session.options = self.options.without(NOT_FOR_TASKS)
        session.texts = session._read(GivenText(tasks=tasks))
        return session

    def run(self, measurement: Measurement, directory: Path, *, overwrite: bool = False) -> Run:
        """Run a measurement, or resume it.

        Args:
            measurement: what to measure.
            directory: where to write.
            overwrite: replace what another run has left in the directory.

        Returns:
            The finished run.

        Raises:
            OutputError: the directory holds other files, or a run with other arguments.
            MeasurementError: the model cannot be measured.
            DryRun: the reporter's command is a dry run.
        """
        self.check()
        previous = read_run(directory) or {}
        rule = measurement.rule(None)
        until = None if rule is None else rule.record()
        # A finished run of a Hub dataset is reported without contacting the Hub again.
        is_done = (
            self.texts.may_contact_hub
            and previous.get("state") == "finished"
            and previous.get("until") in (None, until)
            and not overwrite
        )
        text = None if is_done else self.texts.text
        arguments = self._run_arguments(measurement)
        arguments["text"]["fingerprint"] = (
            text.fingerprint if text else previous.get("arguments", {}).get("text", {}).get("fingerprint")
        )
        kind = measurement.kind
        if self.reporter.dry_run:
            state = find_state(directory, arguments, kind=kind, overwrite=overwrite, until=until)
            raise DryRun(self.model.label, "" if text is None else self.caption(text), directory, state)
        with open_run(
            directory, arguments, kind=kind, overwrite=overwrite, command=self.reporter.command, until=until
        ) as run:
            if run.finished or text is None:
                self.reporter.finished(run.directory)
                self.reporter.not_finite(run.facts.get("non_finite", {}))
            else:
                begun, resumed = run.started, run.measured
                measurement = measurement.prepared(self, text, run)
                name = run_name(directory)
                with open_trackers(self.trackers, name, arguments, self.reporter, resumed=begun) as log:
                    self.group.broadcast(
                        WorkItem(
                            measurement,
                            text,
                            arguments["model"]["weights"],
                            self.model.placement,
                            arguments.get("sources", {}),
                        )
                    )
                    self.group.workers_idle = False
                    tracking = None if log is None else Tracking(log, self.reporter.note)
                    self._measure(run, measurement, text, tracking, resumed=resumed)
        return run

    def count_heads(self, block: int) -> int:
        """Return the number of heads of a block's attention; load the model if it is not loaded.

        Raises:
            UnsupportedEditError: they cannot be turned off one by one; gives the reason.
        """
        if self._heads is None:
            self.check()
            self._heads = count_heads(self.model.load(), blocks=self.options.blocks)
        return self._heads(block)

    def pick_neurons(self, block: int, kind: str, count: int | None, random: bool) -> tuple[int, ...]:
        """Return neurons of a block by kind, see `pick_neurons`; load the model if it is not loaded.

        Raises:
            PlanError: the neurons are those of experts.
            UnsupportedEditError: no output weights of neurons are found.
        """
        if self._neurons is None:
            from ..sweeps.neuron_scores import neuron_picker  # pandas, which a sweep's first number does not wait for

            self.check()
            options = self.options
            self._neurons = neuron_picker(self.model.load(), blocks=options.blocks, seed=options.seed)
        return self._neurons(block, kind, count, random)

    def check(self) -> None:
        """Refuse a text or a device that cannot be had, before anything is read or loaded."""
        self.texts.check()
        _ = self.model.placement

    def _run_arguments(self, measurement: Measurement) -> dict[str, Any]:
        """Return everything that the results of a measurement depend on."""
        options = self.options
        sources = source_arguments(options)
        return {
            "model": self.model.arguments(),
            **({"sources": sources} if sources else {}),
            **measurement.arguments(),
            **self.texts.task_arguments(),
            "text": {**self.texts.request.arguments(), "tokenizer": self.texts.tokenizer_name},
            **self.model.placement.arguments(),
            "compiled": options.compile,
            "batch_size": options.batch_size,
            "per_token": options.per_token,
            "read": None if options.read is None else str(options.read_positions),
            "blocks": options.blocks,
            "versions": package_versions(*(["bitsandbytes"] if self.model.placement.quantize else [])),
        }

    def arguments(self, analysis: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a one-process analysis depends on: its own arguments, the model and its placement."""
        return {
            "model": self.model.arguments(),
            **analysis,
            **self.model.placement.arguments(),
            "blocks": self.options.blocks,
        }

    def _measure(
        self, run: Run, measurement: Measurement, text: TokenizedText, tracking: Tracking | None, *, resumed: bool
    ) -> None:
        options, reporter = self.options, self.reporter
        model = self.model.load()
        measurer, rule = measurement.measurer(model, options), measurement.rule(text.mask)
        if text.scored is not None:
            measurer.read = ScoredPositions(text.scored)
        placement = self.model.placement
        devices = describe_placement(model, placement, measurer.runner.path)
        quantized = ""
        if placement.quantize:
            percent = 100 * quantized_numbers(model)[0] / measurer.parameters
            quantized = f" ({percent:.0f} % of them in {placement.quantize})"
        self._log_once(
            f"{self.model.label}: {format_count(measurer.parameters)} parameters in {placement.dtype}{quantized} "
            f"on {devices}; logits computed by {measurer.readout.description}"
        )
        can_stop = rule is not None and not (isinstance(rule, Race) and len(text.ids) <= MIN_SEQUENCES)
        if can_stop and not (self.texts.request.shuffle or self.texts.has_tasks):
            self._log_once(
                "Note: edits may stop before the end of the text, which is taken in its own order. The intervals hold "
                "for the whole text if its order is random (`shuffle`)"
            )
        self._announce(measurer, text, options.batch_size or run.facts.get("batch_size"), stops=rule is not None)
        if resumed:
            reporter.log("Resuming from the results measured so far")
        try:
            with reporter.run_progress(text) as on_progress:
                finish = measure_text(
                    run,
                    measurer,
                    text,
                    measurement.output(measurer, self.model.label, reporter, rule),
                    batch_size=options.batch_size,
                    per_token=options.per_token,
                    tokenizer=self.texts.tokenizer_or_none() if options.per_token else None,
                    on_progress=on_progress if tracking is None else tracking.following(on_progress),
                    group=self.group,
                    rule=rule,
                )
            # The bar is gone by now, since what writes the results may show one of its own.
            frame = finish(lambda frame, directory: measurement.draw(frame, directory, run))
            if tracking is not None:
                tracking.last_table(frame, len(text.ids))
        except (KeyboardInterrupt, SystemExit) as stop:
            hint = ". If another process has ended, see its own message for the reason" if self.group.size > 1 else ""
            kept = (
                f"results so far are in {run.directory}; run the same command again to resume{hint}"
                if run.measured
                else "no batch was measured yet, so the same command starts again; a smaller `batch_size` saves more "
                f"often{hint}"
            )
            if isinstance(stop, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from None
            reporter.warn("interrupted", kept)
            raise
        reporter.not_finite(run.facts.get("non_finite", {}))
        if measurer.runner.compiler is not None and (reason := measurer.runner.compiler.error):
            reporter.log(f"Note: {reason}; blocks were run without compilation")
        if (contexts := measurer.contexts.describe()) is not None:
            reporter.log(contexts)
        if measurer.max_sequences is not None:
            parts = text.count(measurer.max_sequences)
            reporter.log(f"Note: memory ran out, so batches were split into parts of {parts}")

    def _log_once(self, line: str) -> None:
        """Say something that every run of this session would say."""
        if line not in self._said:
            self._said.add(line)
            self.reporter.log(line)

    def caption(self, text: TokenizedText) -> str:
        """Describe the text in a few words."""
        return text_caption(text.tokens, self.texts.request.data, text.count(len(text.ids)))

    def _announce(self, measurer: Measurer, text: TokenizedText, batch_size: int | None, *, stops: bool) -> None:
        """Say what is measured, how much memory it is expected to need, and how long it takes at least."""
        from ..sweeps.estimate import shortest_time

        length = text.ids.shape[1]
        batch = min(batch_size or measurer.suggest(length, stops=stops), len(text.ids))
        memory, schedule = measurer.memory_use(batch, length), measurer.schedule
        without_sharing = f", {schedule.calls_without_sharing:,} without sharing"
        saving = without_sharing if schedule.calls_without_sharing > schedule.calls else ""
        processes = f", on {self.group.size} processes" if self.group.size > 1 else ""
        count = len(measurer.routes)
        edited = f"{count:,} edited model{'s'[: count != 1]}; " if count else ""
        log = self.reporter.log
        log(f"{edited}{schedule.calls:,} block calls per batch{saving}{processes}")
        if measurer.bytes_to_read:
            resident = schedule.resident_blocks
            order = (
                f"layer by layer, {resident} block{'s'[: resident != 1]} in memory at a time"
                if schedule.during_trunk
                else "route by route"
            )
            log(f"Weights are loaded {order}: {format_bytes(measurer.bytes_to_read)} per batch")
        log(
            f"Expecting {format_bytes(memory.total)} of memory for {text.count(batch)} at once: "
            f"weights {format_bytes(memory.weights)}, residual streams {format_bytes(memory.streams)}, one block "
            f"{format_bytes(memory.block)} or one readout {format_bytes(memory.readout)}"
        )
        if (seconds := shortest_time(measurer, text.tokens, length)) is not None:
            time = format_time(seconds / self.group.size)
            less = "; edits that are known earlier stop" if stops else ""
            log(f"All {text.tokens:,} tokens take at least {time} (estimated; give fewer with --tokens){less}")
        propagation = measurer.propagation
        self.reporter.skipped(measurer.skipped | ({} if propagation is None else propagation.skipped))
