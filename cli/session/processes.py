"""Run measurements in this process, or in several processes of which one leads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersurgery.checkpoints.sources import find_source
from layersurgery.checkpoints.tensor_index import fingerprint
from layersurgery.errors import MeasurementError, PlanError, SourceError
from layersurgery.sweeps.schedule import DEPTH_FIRST, LAYER_MAJOR

from ..terminal.console import Console
from .model_session import ModelSession, Task, WorkItem, silence_libraries, tokenizer_of_run
from .placement import load_model

if TYPE_CHECKING:
    from layersurgery.runs.distributed import ProcessGroup

    from .run_options import MeasureOptions


def run_task(model: str, options: MeasureOptions, console: Console, prepare: Callable[[int], Task]) -> None:
    """Run one measurement, show its progress, and print the results.

    Args:
        model: the model's name, as given by the user.
        options: options of the command.
        console: where to print.
        prepare: makes the task for a model with the given number of blocks.
    """

    def lead(session: ModelSession) -> None:
        task = prepare(session.depth)
        task.show(session.run(task, options.output or Path(f"{session.source.name}-{task.name}")), console)

    run_tasks(model, options, console, lead)


def run_tasks(model: str, options: MeasureOptions, console: Console, lead: Callable[[ModelSession], None]) -> None:
    """Run several measurements on one model and text; with several processes, one leads and the others work for it.

    Args:
        model: the model's name, as given by the user.
        options: options of the command.
        console: where to print.
        lead: runs the measurements; called in the leading process only.
    """
    group = process_group_for(options)
    run_on_model(model, options, console, group, lead)
    group.close()


def process_group_for(options: MeasureOptions) -> ProcessGroup:
    """Check the options, and return the group of processes that this one was started in.

    Raises:
        PlanError: an option is invalid.
    """
    if options.schedule not in (None, DEPTH_FIRST, LAYER_MAJOR):
        raise PlanError(f"--schedule {options.schedule!r} is unknown; use {DEPTH_FIRST} or {LAYER_MAJOR}")
    from layersurgery.runs.distributed import find_process_group

    return find_process_group(cpu=_on_cpu(options))


def run_on_model(
    model: str, options: MeasureOptions, console: Console, group: ProcessGroup, lead: Callable[[ModelSession], None]
) -> None:
    """Take this process's role in runs on one model and text: lead them, or work for the leading process."""
    if group.rank:
        _work(model, options, group)
        return
    session: ModelSession | None = None
    try:
        with silence_libraries(), ExitStack() as exit_stack:
            session = ModelSession(model, options, console, group, exit_stack)
            lead(session)
    finally:
        if session is None or session.workers_idle:  # no work will follow: let the other processes end
            with suppress(MeasurementError):
                group.broadcast(None)


def _on_cpu(options: MeasureOptions) -> bool:
    import torch

    return options.device == "cpu" or not torch.cuda.is_available()


def _work(model: str, options: MeasureOptions, group: ProcessGroup) -> None:
    """Measure what the leading process sends; print errors only."""
    from layersurgery.runs.runner import run_worker

    with silence_libraries(), ExitStack() as exit_stack:
        loaded: Any = None
        tokenizer = None
        while (item := _next_item(group)) is not None:
            try:
                if loaded is None:
                    source = find_source(model, revision=options.revision)
                    if group.local_rank == 0 and fingerprint(source.directory) != item.weights:
                        raise SourceError(
                            f"process {group.rank}: {source.label} in {source.directory} differs from the leading "
                            "process's checkpoint; give all processes the same files"
                        )
                    tokenizer = tokenizer_of_run(source, options.tokenizer) if options.per_token else None
                    loaded = exit_stack.enter_context(load_model(source, item.placement, group))
                measurer = item.task.measurer(loaded, options)
                is_complete = run_worker(
                    measurer, item.text, per_token=options.per_token, tokenizer=tokenizer, group=group
                )
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            if not is_complete:
                raise SystemExit(1)


def _next_item(group: ProcessGroup) -> WorkItem | None:
    item: WorkItem | None = group.broadcast(None)
    return item
