"""Hold one model and one text for several measurements; run them, and resume interrupted ones."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from ..checkpoints.sources import Source, find_source
from ..checkpoints.tensor_index import fingerprint
from ..errors import PlanError
from ..models.block_list import find_decoder_blocks, text_config, unwrap_transformers
from ..models.quantized import quantized_numbers
from ..runtime.offload import device_of
from ..sweeps.read_positions import ScoredPositions
from ..sweeps.schedule import DEPTH_FIRST, LAYER_MAJOR
from ..units import format_bytes, format_count
from .model_fingerprint import model_fingerprint
from .options import RunOptions
from .placement import Placement, choose_placement, describe_placement, load_model
from .reporter import Reporter
from .requests import GivenText, Padding, config_limits, read_model_info, text_request
from .run_directory import Run, open_run, package_versions
from .runner import RunOutput, run_measurement
from .session_text import ModelLimits, SessionText
from .tables import read_run
from .text import TokenizedText

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from ..sweeps.measurer import Measurer
    from ..sweeps.row_progress import StopRule
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


class ModelSession:
    """One model and one text for several runs; the model is loaded once, when the first run needs it.

    Args:
        model: the model's name, or a loaded model.
        options: options of the measurements.
        reporter: receives what is said.
        group: the processes that measure together.
        exit_stack: closed when the session ends; it then frees the model.
        given: text that was given from Python; otherwise `options` name it.

    Attributes:
        label: the model's name in tables.
        name: the model's name in names of directories.
        source: the model's files; they include the weights once a run has needed them. None for a loaded model.
        depth: number of blocks of the model.
        texts: the text that is measured.
        workers_idle: whether the other processes are waiting for the next work item.
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
        self.model, self.options, self.reporter, self.group = model, options, reporter, group
        self._exit_stack = exit_stack
        self._loaded: nn.Module | None = None
        self._has_weights = False
        self._fingerprint: str | None = None
        self._said: set[str] = set()
        self.workers_idle = True
        self.source: Source | None = None
        if isinstance(model, nn.Module):
            self._loaded = model
            self.label = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
            self.name = Path(self.label).name
            self.depth = len(find_decoder_blocks(model, options.blocks).blocks)
            positions, vocabulary = config_limits(text_config(model))
            rows = getattr(unwrap_transformers(model).get_input_embeddings(), "num_embeddings", None)
            vocabulary = min(filter(None, (vocabulary, rows)), default=None)  # tokens may have been removed
            padding = Padding.of(text_config(model), getattr(model, "generation_config", None))
            self._placement: Placement | None = _placement_of(model, options)
        else:
            info = read_model_info(model, options.revision, reporter, trust_remote_code=options.trust_remote_code)
            self.source, self.depth = info.source, info.depth
            self.label, self.name = info.source.label, info.source.name
            positions, vocabulary, padding = info.positions, info.vocabulary, info.padding
            self._placement = None
        if options.schedule not in (None, DEPTH_FIRST, LAYER_MAJOR):
            raise PlanError(f"schedule {options.schedule!r} is unknown; use {DEPTH_FIRST} or {LAYER_MAJOR}")
        self.texts = SessionText(
            text_request(model, options, positions, given), given, options, reporter,
            ModelLimits(positions, vocabulary, padding), self.source, self.label, self._config,
        )  # fmt: skip

    @property
    def placement(self) -> Placement:
        """Return the model's devices and data type; choose them at the first use.

        Raises:
            PlanError: the options are invalid or exclude each other.
            SourceError: the device is not available.
        """
        if self._placement is None:
            assert self.source is not None
            self._placement = choose_placement(self.options, self.source, self.reporter)
        return self._placement

    @placement.setter
    def placement(self, placement: Placement) -> None:
        self._placement = placement

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
        with open_run(
            directory,
            arguments,
            kind=measurement.kind,
            overwrite=overwrite,
            command=self.reporter.command,
            until=until,
        ) as run:
            if run.finished or text is None:
                self.reporter.finished(run.directory)
                self.reporter.not_finite(run.facts.get("non_finite", {}))
            else:
                self.group.broadcast(WorkItem(measurement, text, arguments["model"]["weights"], self.placement))
                self.workers_idle = False
                self._measure(run, measurement, text)
                self.workers_idle = True
        return run

    def check(self) -> None:
        """Refuse a text or a device that cannot be had, before anything is read or loaded."""
        self.texts.check()
        _ = self.placement

    def _run_arguments(self, measurement: Measurement) -> dict[str, Any]:
        """Return everything that the results of a measurement depend on."""
        options = self.options
        return {
            "model": self._model_arguments(),
            **measurement.arguments(),
            **self.texts.task_arguments(),
            "text": {**self.texts.request.arguments(), "tokenizer": self.texts.tokenizer_name},
            **self.placement.arguments(),
            "compiled": options.compile,
            "batch_size": options.batch_size,
            "per_token": options.per_token,
            "read": None if options.read is None else str(options.read_positions),
            "blocks": options.blocks,
            "versions": package_versions(*(["bitsandbytes"] if self.placement.quantize else [])),
        }

    def arguments(self, analysis: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a one-process analysis depends on: its own arguments, the model and its placement."""
        return {
            "model": self._model_arguments(),
            **analysis,
            **self.placement.arguments(),
            "blocks": self.options.blocks,
        }

    def _model_arguments(self) -> dict[str, Any]:
        if self.source is None:
            assert self._loaded is not None
            if self._fingerprint is None:
                self._fingerprint = model_fingerprint(self._loaded)
            return {"name": self.label, "revision": None, "weights": self._fingerprint}
        source = self._with_weights()
        return {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)}

    def _config(self) -> Any:
        if self.source is None:
            assert self._loaded is not None
            return unwrap_transformers(self._loaded).config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.source.directory, trust_remote_code=self.source.trust_remote_code)

    def _with_weights(self) -> Source:
        assert self.source is not None
        if not self._has_weights:
            found = find_source(self.model, revision=self.options.revision)
            self.source = replace(found, trust_remote_code=self.options.trust_remote_code)
            self._has_weights = True
        return self.source

    def load(self) -> Any:
        """Return the model on its devices; load it at the first use."""
        if self._loaded is None:
            source = self._with_weights()
            with self.reporter.status(f"Loading {source.label}"):
                self._loaded = self._exit_stack.enter_context(load_model(source, self.placement, self.group))
        return self._loaded

    def _measure(self, run: Run, measurement: Measurement, text: TokenizedText) -> None:
        options, reporter = self.options, self.reporter
        model = self.load()
        measurer, rule = measurement.measurer(model, options), measurement.rule(text.mask)
        if text.scored is not None:
            measurer.read = ScoredPositions(text.scored)
        devices = describe_placement(model, self.placement, measurer.runner.path)
        quantized = ""
        if self.placement.quantize:
            percent = 100 * quantized_numbers(model)[0] / measurer.parameters
            quantized = f" ({percent:.0f} % of them in {self.placement.quantize})"
        self._log_once(
            f"{self.label}: {format_count(measurer.parameters)} parameters in {self.placement.dtype}{quantized} "
            f"on {devices}; logits computed by {measurer.readout.description}"
        )
        if rule is not None and not self.texts.request.shuffle:
            self._log_once(
                "Note: edits may stop before the end of the text, which is taken in its own order. The intervals hold "
                "for the whole text if its order is random (shuffle)"
            )
        self._announce(measurer, text, options.batch_size or run.facts.get("batch_size"), stops=rule is not None)
        if run.started:
            reporter.log("Resuming from the results measured so far")
        try:
            with reporter.run_progress(text) as on_progress:
                run_measurement(
                    run,
                    measurer,
                    text,
                    measurement.output(measurer, self.label, reporter, rule),
                    batch_size=options.batch_size,
                    per_token=options.per_token,
                    tokenizer=self.texts.tokenizer_or_none() if options.per_token else None,
                    draw=lambda frame, directory: measurement.draw(frame, directory, run),
                    on_progress=on_progress,
                    group=self.group,
                    rule=rule,
                )
        except (KeyboardInterrupt, SystemExit) as stop:
            hint = ". If another process has ended, see its own message for the reason" if self.group.size > 1 else ""
            kept = f"results so far are in {run.directory}; run the same command again to resume{hint}"
            if isinstance(stop, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from None
            reporter.warn("interrupted", kept)
            raise
        reporter.not_finite(run.facts.get("non_finite", {}))
        if measurer.runner.compiler is not None and (reason := measurer.runner.compiler.error):
            reporter.log(f"Note: {reason}; blocks were run without compilation")
        if measurer.max_sequences is not None:
            count = measurer.max_sequences
            plural = "s"[: count != 1]
            reporter.log(f"Note: memory ran out, so batches were split into parts of {count} sequence{plural}")

    def _log_once(self, line: str) -> None:
        """Say something that every run of this session would say."""
        if line not in self._said:
            self._said.add(line)
            self.reporter.log(line)

    def caption(self, text: TokenizedText) -> str:
        """Describe the text in a few words."""
        count = len(text.ids)
        return f"{text.tokens:,} tokens of {self.texts.request.data} in {count} sequence{'s'[: count != 1]}"

    def _announce(self, measurer: Measurer, text: TokenizedText, batch_size: int | None, *, stops: bool) -> None:
        """Say what is measured, and how much memory it is expected to need."""
        length = text.ids.shape[1]
        batch = min(batch_size or measurer.suggest(length, stops=stops), len(text.ids))
        memory, schedule = measurer.memory_use(batch, length), measurer.schedule
        without_sharing = f", {schedule.calls_without_sharing:,} without sharing"
        saving = without_sharing if schedule.calls_without_sharing > schedule.calls else ""
        processes = f", on {self.group.size} processes" if self.group.size > 1 else ""
        edited = f"{len(measurer.routes)} edited models; " if measurer.routes else ""
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
            f"Expecting {format_bytes(memory.total)} of memory for {batch} sequence{'s'[: batch != 1]} at once: "
            f"weights {format_bytes(memory.weights)}, residual streams {format_bytes(memory.streams)}, one block "
            f"{format_bytes(memory.block)} or one readout {format_bytes(memory.readout)}"
        )
        propagation = measurer.propagation
        self.reporter.skipped(measurer.skipped | ({} if propagation is None else propagation.skipped))


def _placement_of(model: nn.Module, options: RunOptions) -> Placement:
    """Return where a loaded model is.

    Raises:
        PlanError: an option would move it.
    """
    for name in ("quantize", "device", "device_map", "max_memory", "offload_folder", "revision"):
        if getattr(options, name) is not None:
            raise PlanError(f"{name} is for a model that is loaded by its name; this one is loaded already")
    if options.dtype != "auto":
        raise PlanError("dtype is for a model that is loaded by its name; this one is loaded already")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Placement(str(device_of(model)), dtype)
