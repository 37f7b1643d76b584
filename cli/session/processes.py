"""Runs of `sweep`, `analyze`, `stages`, `rank` and `prune`: by this process, or by several of which one leads."""

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
    """Measure, showing what happens, and end with the results.

    Args:
        model: as it was named.
        options: of the command.
        console: how it speaks.
        prepare: makes the task for a model of so many blocks.
    """

    def one(session: ModelSession) -> None:
        task = prepare(session.depth)
        task.show(session.run(task, options.output or Path(f"{session.source.name}-{task.word}")), console)

    run_tasks(model, options, console, one)


def run_tasks(model: str, options: MeasureOptions, console: Console, lead: Callable[[ModelSession], None]) -> None:
    """Carry out several runs upon one model and text; of several processes, one leads and the others help."""
    group = process_group_for(options)
    run_on_model(model, options, console, group, lead)
    group.close()


def process_group_for(options: MeasureOptions) -> ProcessGroup:
    """The processes that this one was started with, once the options are known to fit each other.

    Raises:
        PlanError: they do not.
    """
    if options.schedule not in (None, DEPTH_FIRST, LAYER_MAJOR):
        raise PlanError(f"--schedule {options.schedule!r} is none; write {DEPTH_FIRST} or {LAYER_MAJOR}")
    from layersurgery.runs.distributed import find_process_group

    return find_process_group(cpu=_on_cpu(options))


def run_on_model(
    model: str, options: MeasureOptions, console: Console, group: ProcessGroup, lead: Callable[[ModelSession], None]
) -> None:
    """The part of this process in runs upon one model and text: to lead them, or to follow."""
    if group.rank:
        _follow(model, options, group)
        return
    session: ModelSession | None = None
    try:
        with silence_libraries(), ExitStack() as hold:
            session = ModelSession(model, options, console, group, hold)
            lead(session)
    finally:
        if session is None or session.waited_for:  # the others need not wait for what will not come
            with suppress(MeasurementError):
                group.broadcast(None)


def _on_cpu(options: MeasureOptions) -> bool:
    import torch

    return options.device == "cpu" or not torch.cuda.is_available()


def _follow(model: str, options: MeasureOptions, group: ProcessGroup) -> None:
    """The part of a process that does not lead: it measures, and says nothing but what is wrong with itself."""
    from layersurgery.runs.runner import run_worker

    with silence_libraries(), ExitStack() as hold:
        there: Any = None
        tokenizer = None
        while (item := _next_errand(group)) is not None:
            try:
                if there is None:
                    source = find_source(model, revision=options.revision)
                    if group.local_rank == 0 and fingerprint(source.directory) != item.weights:
                        raise SourceError(
                            f"process {group.rank}: {source.label} in {source.directory} is another checkpoint than that of the process that leads"
                        )
                    tokenizer = tokenizer_of_run(source, options.tokenizer) if options.per_token else None
                    there = hold.enter_context(load_model(source, item.place, group))
                measurer = item.task.measurer(there, options)
                whole = run_worker(measurer, item.text, per_token=options.per_token, tokenizer=tokenizer, group=group)
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            if not whole:
                raise SystemExit(1)


def _next_errand(group: ProcessGroup) -> WorkItem | None:
    item: WorkItem | None = group.broadcast(None)
    return item
