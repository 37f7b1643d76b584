"""Measure the effect of many edits, in memory or into a directory that an interrupted sweep resumes in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.block_sources import take_blocks
from ..errors import PlanError
from ..library_logs import quiet_libraries
from ..models.means import Means, as_means
from ..plans.block_sources import check_sources, taken_blocks
from ..plans.variants import Variant, variants
from ..sweeps.measurer import Measurer
from ..sweeps.precision import Precision
from ..sweeps.read_positions import ScoredPositions
from ..sweeps.sweep import sweep_tokens
from ..tasks.task_precision import TaskRule, TaskTargets
from ..tasks.task_request import TaskRequest
from .means import LARGEST_TOKENS, adds_means, given_means, means_of_run, means_of_text
from .open_text import open_text
from .options import RunOptions
from .processes import run_session
from .reporter import Reporter
from .requests import NOT_FOR_TASKS, TEXT_OPTIONS, GivenText, read_given_text
from .run_directory import SWEEP, Run
from .runner import SweepOutput
from .session import ModelSession
from .tables import read_results
from .tasks_beside import TasksBeside, join_tasks

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from ..metrics.aggregation import SequenceSums
    from ..models.anatomy import Anatomy
    from ..models.taken_blocks import TakenBlocks
    from ..plans.variants import Edits, Layers
    from ..sweeps.row_progress import StopRule
    from ..tasks.harness import Harness
    from ..tasks.own_requests import OwnRequests
    from .frames import ResultFrame
    from .runner import RunOutput
    from .text import TokenizedText


_NAMES_A_TEXT = ("data", *(name for name in TEXT_OPTIONS if name != "seed"))
"""Options with which a text is measured, also if there are tasks."""


@dataclass(frozen=True, slots=True)
class SweepMeasurement:
    """Measurement of edited models."""

    variants: list[Variant]
    precision: Precision | None = None
    propagation: bool = False
    harness: Harness | None = None
    beside: TasksBeside | None = None
    targets: TaskTargets | None = None
    means: Means | None = None
    tails: bool = False
    name: str = "sweep"

    @property
    def kind(self) -> str:
        """Return the kind of result directory: a sweep."""
        return SWEEP

    def arguments(self) -> dict[str, Any]:
        """Return the edits, whether propagation and tails are measured, and the tasks measured after a text."""
        edits = [[variant.edit, variant.name, str(variant.route)] for variant in self.variants]
        beside = {} if self.beside is None else self.beside.arguments()
        means: dict[str, Any] = {}
        if adds_means(self.variants):
            means = {"means": f"of {LARGEST_TOKENS} tokens" if self.means is None else self.means.fingerprint}
        also = {"propagation": self.propagation, "tails": self.tails}
        return {"edits": edits, **{name: True for name, measured in also.items() if measured}, **means, **beside}

    def prepared(self, session: ModelSession, text: TokenizedText, run: Run) -> SweepMeasurement:
        """Measure the means that the variants add, if they are not given."""
        if not adds_means(self.variants):
            return self
        return replace(self, means=means_of_run(session, text, run, self.means))

    def measurer(self, model: Any, options: RunOptions) -> Measurer:
        """Make the measurer of all variants."""
        return Measurer(
            model,
            self.variants,
            blocks=options.blocks,
            compiled=options.compile,
            order=options.schedule,
            read=options.read_positions,
            propagation=self.propagation,
            taken=_take(model, self.variants, options),
            means=self.means,
            tails=self.tails,
        )

    def rule(self, mask: torch.Tensor | None) -> StopRule | None:
        """Return the rule that finishes an edit, for a text with this mask; None to measure all text."""
        if self.targets is not None:
            return TaskRule(self.targets, self.harness)
        return self.precision if self.precision is None or mask is None else self.precision.for_text(mask)

    def output(self, measurer: Measurer, label: str, _reporter: Reporter, rule: StopRule | None) -> RunOutput:
        """Make the output: a table with a row for each variant."""
        precision, task_rule = _kinds(rule)
        return SweepOutput(
            measurer.variants,
            label,
            precision,
            measurer.propagation,
            self.harness,
            measurer.layer_kinds,
            self.beside,
            task_rule,
        )

    def draw(self, frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Draw the figures; return their paths."""
        from .drawing import draw_sweep

        return draw_sweep(frame, directory, run.facts)


def run_sweep(
    session: ModelSession,
    directory: Path,
    edits: Edits,
    *,
    layers: Layers = None,
    max_span: int | None = None,
    tasks: TaskRequest | None = None,
    overwrite: bool = False,
) -> Run:
    """Measure the edits on the session's model and text, or resume it, or use the finished run in the directory.

    Args:
        session: the model and the text.
        directory: where to write.
        edits: the edits to measure.
        layers: see `sweep`.
        max_span: see `sweep`.
        tasks: tasks to measure after the text.
        overwrite: replace what another run has left in the directory.
    """
    edited_models = variants(edits, session.model.depth, layers, max_span, session.count_heads, session.pick_neurons)
    session.check()
    taken_blocks([variant.route for variant in edited_models], check_sources(session.options.sources))
    given_means(session.options, edited_models, has_tasks=tasks is not None or session.texts.has_tasks)
    beside = None
    if tasks is not None:
        on_tasks = session.with_tasks(tasks)
        beside = TasksBeside(on_tasks, _measurement(on_tasks, edited_models), directory)
    return session.run(_measurement(session, edited_models, beside), directory, overwrite=overwrite)


def _take(model: Any, edited_models: Sequence[Variant], options: RunOptions) -> TakenBlocks | None:
    """Take the blocks of other checkpoints that edited models have."""
    return take_blocks(
        model,
        [variant.route for variant in edited_models],
        options.sources,
        blocks=options.blocks,
        trust_remote_code=options.trust_remote_code,
    )


def _measurement(
    session: ModelSession, edited_models: list[Variant], beside: TasksBeside | None = None
) -> SweepMeasurement:
    if session.texts.has_tasks:
        _ = session.texts.text  # asks lm-eval for the requests
    options = session.options
    return SweepMeasurement(
        edited_models,
        options.precision,
        options.measures_propagation,
        session.texts.harness,
        beside,
        session.texts.targets,
        as_means(options.means),
        options.tails,
    )


def _kinds(rule: StopRule | None) -> tuple[Precision | None, TaskRule | None]:
    """Return the rule as that of a text and as that of tasks; at most one of them is one."""
    assert rule is None or isinstance(rule, Precision | TaskRule)
    return rule if isinstance(rule, Precision) else None, rule if isinstance(rule, TaskRule) else None


def sweep(
    model: Any,
    edits: Edits,
    text: Any = None,
    *,
    attention_mask: Any = None,
    layers: Layers = None,
    max_span: int | None = None,
    tasks: str | OwnRequests | Iterable[str | OwnRequests] | None = None,
    limit: int | None = None,
    shots: int | None = None,
    task_path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    directory: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ResultFrame:
    """Measure many edited models against the unedited one on the same text, sharing block calls between the edits.

    The results equal those of `compare` with each of the edits, up to rounding. The model is not changed.

    Args:
        model: a transformers causal language model, a wrapper around one, or the name of one.
        edits: the edits to measure: families of edits ("swap,drop"; see `layersurgery.plans.families.FAMILIES`), a
            plan, its text, a route, a list of these, or a dictionary of plans by name.
        text: token ids, (sequences, length); a tokenizer's output; a list of strings or of conversations; a Hugging
            Face dataset; a path; "pydoc"; or the id of a Hub dataset. Default: what the option `data` names.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        layers: for families: measure only the edits that change no blocks except these; a range, adjacent numbers, or
            "4:20". With "exit", the model ends after these blocks.
        max_span: for families of spans and pairs ("jump", "replace" and others): measure only spans of at most so many
            blocks, and pairs of blocks at most so far apart.
        tasks: tasks of lm-eval to measure (multiple choice or log-likelihoods): names, separated by commas or as a
            list, and requests of your own (`layersurgery.tasks.requests`). If a text is named, too (`text`, `data` or
            how it is cut), it is measured first, and read, per_token, propagation, tails and the metrics of until apply
            to it; else the tasks alone are measured. `until` may also name tasks: "arc_easy=2pt" is of the change of
            its accuracy, and its documents are measured in random order.
        limit: number of documents of each task; by default all.
        shots: number of examples before each document of a task; by default the task's own number.
        task_path: directories with your own task definitions.
        directory: where to write tables, figures and a record of the run. A sweep that was interrupted resumes there,
            and a finished one is read. Default: nothing is written.
        overwrite: discard what another sweep has left in the directory, and measure again.
        progress: called with the number of sequences done and the number of all sequences.
        options: as `layersurgery.runs.options.RunOptions`: tokens, context, tokenizer, batch_size, dtype, device,
            compile, schedule, blocks and others.

    Returns:
        One row for each edit, the unedited model first. Columns: model, name, plan, edit, layer (the first block that
        the edit names, in most families), relative_depth, depth, route, tokens, sequences, and kl_nats, agreement (0 to
        1), entropy_bits, entropy_change_bits, loss_nats, loss_change_nats, accuracy (0 to 1), each with its standard
        error over sequences (kl_nats_sem) and the ends of its confidence interval (kl_nats_low, kl_nats_high);
        `interval` says what the intervals hold for. Families of spans and pairs also have `from` and `to`, the edit's
        place in their map. With `until`, `precise` says whether an edit is known as precisely as asked, and tokens and
        sequences differ between rows. With `tails`, there are also the columns of `layersurgery.registry.TAILS`:
        kl_nats_median, kl_nats_p90, kl_nats_p99, kl_nats_p99_9, kl_nats_max, probability_change_rms, top5_overlap and
        calibration_error. With `propagation`, `frame.attrs["propagation"]` has a dictionary for each edit, later layer
        and branch, and `read_results(directory, "propagation")` the same as a table. With `tasks`, the columns
        `task_<name>_<metric>` are the tasks' own (see `layersurgery.tasks.task_tables.task_columns`); without a text,
        the other metrics are those of the tokens that the tasks score. It is a pandas DataFrame, with figures:
        `frame.plot()`.

    Raises:
        PlanError: an edit does not fit the model, or the text cannot be measured.
        SourceError: the model or the text cannot be found or read.
        UnsupportedEditError: blocks of this architecture cannot be run in another order.
        MeasurementError: the unedited model's predictions are NaN or infinite, or memory is too small for one sequence.
        OutputError: the directory holds something else, or a sweep with other arguments.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> frame = ls.sweep(model, "swap,drop", ["The capital of France is Paris."], tokenizer=tokenizer)
        >>> frame[frame.edit == "drop"].set_index("layer").kl_nats.shape
        (30,)
    """
    from .frames import as_result

    anatomy = options.pop("anatomy", None)
    requested = task_request(tasks, limit, shots, task_path)
    run_options, given = read_given_text(text, RunOptions.of(options), attention_mask)
    run_options, given, beside = place_tasks(requested, run_options, given, has_text=text is not None)
    if directory is None:
        run_options.refuse(["per_token"], "writes a file, so it needs directory")
        with open_text(model, given, run_options) as (session, loaded, tokens):
            edited_models = variants(
                edits, session.model.depth, layers, max_span, session.count_heads, session.pick_neurons
            )
            has_tasks = beside is not None or session.texts.has_tasks
            means = given_means(run_options, edited_models, has_tasks=has_tasks)
            if means is None and adds_means(edited_models):
                means = means_of_text(session, loaded, tokens, largest=LARGEST_TOKENS, anatomy=anatomy)
            sessions = [session, *([session.with_tasks(beside)] if beside is not None else [])]
            texts = [tokens, *(other.texts.text for other in sessions[1:])]  # before hours of measuring
            with quiet_libraries():
                taken = _take(loaded, edited_models, run_options)
            frame, *of_tasks = (
                _measure_in_memory(each, loaded, words, edited_models, anatomy, means, progress, taken)
                for each, words in zip(sessions, texts, strict=True)
            )
        for tasks_frame in of_tasks:
            frame = join_tasks(frame, tasks_frame)
        captions = [each.caption(words) for each, words in zip(sessions, texts, strict=True)]
        return as_result(frame, "sweep", " and ".join(captions))
    output = Path(directory)
    run_session(
        model,
        run_options,
        lambda session: run_sweep(
            session, output, edits, layers=layers, max_span=max_span, tasks=beside, overwrite=overwrite
        ),
        reporter=Reporter(None if progress is None else lambda _, done, total: progress(done, total)),
        given=given,
    )
    return read_results(output)


def _measure_in_memory(
    session: ModelSession,
    model: Any,
    text: TokenizedText,
    edited_models: list[Variant],
    anatomy: Anatomy | None,
    means: Means | None,
    progress: Callable[[int, int], None] | None,
    taken: TakenBlocks | None,
) -> pd.DataFrame:
    options, harness = session.options, session.texts.harness

    def table(rows: Sequence[Variant], sums: SequenceSums, label: str, rule: StopRule | None) -> pd.DataFrame:
        precision, task_rule = _kinds(rule)
        return SweepOutput(rows, label, precision, harness=harness, task_rule=task_rule).table_with_tasks(sums)

    return sweep_tokens(
        model,
        edited_models,
        text.ids,
        text.mask,
        label=session.model.label,
        batch_size=options.batch_size,
        blocks=options.blocks,
        anatomy=anatomy,
        compiled=options.compile,
        order=options.schedule,
        precision=options.precision if session.texts.targets is None else TaskRule(session.texts.targets, harness),
        read=options.read_positions if text.scored is None else ScoredPositions(text.scored),
        propagation=options.measures_propagation,
        means=means,
        tails=options.tails,
        progress=progress,
        table=table,
        taken=taken,
    )


def task_request(tasks: Any, limit: Any, shots: Any, task_path: Any) -> TaskRequest | None:
    """Return the tasks to measure; None for none. The arguments are those of `sweep`.

    Raises:
        PlanError: an argument has no effect without tasks, or is out of range.
        SourceError: a directory of tasks does not exist.
    """
    if tasks is None:
        for name, value in {"limit": limit, "shots": shots, "task_path": task_path or None}.items():
            if value is not None:
                raise PlanError(f"`{name}` has an effect only with `tasks`")
        return None
    return TaskRequest.of(tasks, limit, shots, task_path)


def place_tasks(
    tasks: TaskRequest | None, options: RunOptions, given: GivenText | None, *, has_text: bool = False
) -> tuple[RunOptions, GivenText | None, TaskRequest | None]:
    """Return the options of the text, what to measure instead of it, and the tasks to measure after it.

    Args:
        tasks: the tasks; None for none.
        options: the options, as they were given.
        given: text that was given from Python as tokens or documents.
        has_text: whether any text was given from Python.

    Raises:
        PlanError: an option has no effect on tasks.
    """
    if tasks is None:
        return options, given, None
    options, tasks = _split_until(options, tasks)
    if has_text or any(name in options.given() for name in _NAMES_A_TEXT):
        return options, given, tasks
    if tasks.until is not None:
        options = options.without(["seed"])  # it orders the documents
    if options.until is not None:
        raise PlanError(
            f"`until` {options.until}: tasks are named by their names ({tasks}), and metrics of a text need a text "
            "(`data`)"
        )
    options.refuse(NOT_FOR_TASKS, "has no effect on tasks alone; name a text (`data`), too")
    return options, GivenText(tasks=tasks), None


def _split_until(options: RunOptions, tasks: TaskRequest) -> tuple[RunOptions, TaskRequest]:
    """Give the conditions of `until` that name a task to the tasks, and leave the others to the text."""
    until, names = options.until, {*tasks.names, *(each.name for each in tasks.own)}
    if isinstance(until, str):
        until = {name.strip(): amount.strip() for name, _, amount in (part.partition("=") for part in until.split(","))}
    if not isinstance(until, Mapping) or not names & {*until}:
        return options, tasks
    of_tasks = {name: str(amount) for name, amount in until.items() if name in names}
    of_text = {name: amount for name, amount in until.items() if name not in names}
    targets = TaskTargets.parse(of_tasks, options.confidence, options.seed)
    options = replace(options, until=of_text) if of_text else options.without(["until", "confidence"])
    return options, replace(tasks, until=targets)
