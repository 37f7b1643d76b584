"""Run measurements in this process, or in several processes of which one leads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..checkpoints.sources import find_source
from ..checkpoints.tensor_index import fingerprint
from ..errors import MeasurementError, PlanError, SourceError
from ..library_logs import quiet_libraries
from ..sweeps.read_positions import ScoredPositions
from ..sweeps.schedule import DEPTH_FIRST, LAYER_MAJOR
from .distributed import SingleProcess, find_process_group
from .options import RunOptions
from .placement import load_model
from .reporter import Reporter
from .requests import GivenText
from .runner import run_worker
from .session import ModelSession, WorkItem
from .source_arguments import source_arguments

if TYPE_CHECKING:
    from .distributed import ProcessGroup

Result = TypeVar("Result")


def run_session(
    model: Any,
    options: RunOptions,
    lead: Callable[[ModelSession], Result],
    *,
    reporter: Reporter | None = None,
    given: GivenText | None = None,
) -> Result | None:
    """Run measurements on one model and one text; with several processes, one leads and the others work for it.

    Args:
        model: the model's name, or a loaded model.
        options: options of the measurements.
        lead: runs the measurements; called in the leading process only.
        reporter: receives what is said.
        given: text that was given from Python.

    Returns:
        What `lead` returned; None in the other processes.

    Raises:
        PlanError: an option is invalid.
    """
    group = process_group_for(model, options)
    try:
        return run_on_model(model, options, lead, reporter or Reporter(), group, given)
    finally:
        with suppress(RuntimeError):  # a connection that is lost cannot be closed
            group.close()


def process_group_for(model: Any, options: RunOptions) -> ProcessGroup:
    """Check the options, and return the group of processes that this one was started in.

    A loaded model is measured by this process alone.

    Raises:
        PlanError: an option is invalid.
    """
    import torch
    from torch import nn

    if options.schedule not in (None, DEPTH_FIRST, LAYER_MAJOR):  # before other processes are waited for
        raise PlanError(f"`schedule` {options.schedule!r} is unknown; use {DEPTH_FIRST} or {LAYER_MAJOR}")
    if isinstance(model, nn.Module):
        return SingleProcess()
    return find_process_group(cpu=options.device == "cpu" or not torch.cuda.is_available())


def run_on_model(
    model: Any,
    options: RunOptions,
    lead: Callable[[ModelSession], Result],
    reporter: Reporter,
    group: ProcessGroup,
    given: GivenText | None = None,
) -> Result | None:
    """Take this process's role in runs on one model and text: lead them, or work for the leading process."""
    if group.rank:
        _work(model, options, group)
        return None
    try:
        with quiet_libraries(), ExitStack() as exit_stack:
            return lead(ModelSession(model, options, reporter, group, exit_stack, given))
    finally:
        if group.workers_idle:  # no work will follow: let the other processes end
            with suppress(MeasurementError):
                group.broadcast(None)


def _work(model: str, options: RunOptions, group: ProcessGroup) -> None:
    """Measure what the leading process sends; print errors only."""
    with quiet_libraries(), ExitStack() as exit_stack:
        loaded: Any = None
        while (item := _next_item(group)) is not None:
            try:
                if loaded is None:
                    source = replace(
                        find_source(model, revision=options.revision), trust_remote_code=options.trust_remote_code
                    )
                    if group.local_rank == 0 and fingerprint(source.directory) != item.weights:
                        raise SourceError(
                            f"process {group.rank}: {source.label} in {source.directory} differs from the leading "
                            "process's checkpoint; give all processes the same files"
                        )
                    if group.local_rank == 0 and source_arguments(options) != item.sources:
                        raise SourceError(
                            f"process {group.rank}: {', '.join(item.sources)} (sources) differs from the leading "
                            "process's checkpoint; give all processes the same files"
                        )
                    loaded = exit_stack.enter_context(load_model(source, item.placement, group))
                measurer = item.measurement.measurer(loaded, options)
                if item.text.scored is not None:
                    measurer.read = ScoredPositions(item.text.scored)
                per_token = options.per_token and item.text.scored is None  # the requests of tasks have no such rows
                is_complete = run_worker(measurer, item.text, per_token=per_token, group=group)
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            if not is_complete:
                raise SystemExit(1)


def _next_item(group: ProcessGroup) -> WorkItem | None:
    item: WorkItem | None = group.broadcast(None)
    return item
