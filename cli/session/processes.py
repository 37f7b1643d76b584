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

from ..terminal.console import Talk
from .model_session import Bench, Errand, Task, calm, tokenizer_of_run
from .placement import loaded

if TYPE_CHECKING:
    from layersurgery.runs.distributed import Team

    from .run_options import Options


def run_task(model: str, options: Options, talk: Talk, prepare: Callable[[int], Task]) -> None:
    """Measure, showing what happens, and end with the results.

    Args:
        model: as it was named.
        options: of the command.
        talk: how it speaks.
        prepare: makes the task for a model of so many blocks.
    """

    def one(bench: Bench) -> None:
        task = prepare(bench.depth)
        task.show(bench.carry_out(task, options.output or Path(f"{bench.source.name}-{task.word}")), talk)

    run_tasks(model, options, talk, one)


def run_tasks(model: str, options: Options, talk: Talk, lead: Callable[[Bench], None]) -> None:
    """Carry out several runs upon one model and text; of several processes, one leads and the others help."""
    team = team_for(options)
    upon(model, options, talk, team, lead)
    team.leave()


def team_for(options: Options) -> Team:
    """The processes that this one was started with, once the options are known to fit each other.

    Raises:
        PlanError: they do not.
    """
    if options.schedule not in (None, DEPTH_FIRST, LAYER_MAJOR):
        raise PlanError(f"--schedule {options.schedule!r} is none; write {DEPTH_FIRST} or {LAYER_MAJOR}")
    from layersurgery.runs.distributed import find_team

    return find_team(cpu=_on_cpu(options))


def upon(model: str, options: Options, talk: Talk, team: Team, lead: Callable[[Bench], None]) -> None:
    """The part of this process in runs upon one model and text: to lead them, or to follow."""
    if team.rank:
        _follow(model, options, team)
        return
    bench: Bench | None = None
    try:
        with calm(), ExitStack() as hold:
            bench = Bench(model, options, talk, team, hold)
            lead(bench)
    finally:
        if bench is None or bench.waited_for:  # the others need not wait for what will not come
            with suppress(MeasurementError):
                team.share(None)


def _on_cpu(options: Options) -> bool:
    import torch

    return options.device == "cpu" or not torch.cuda.is_available()


def _follow(model: str, options: Options, team: Team) -> None:
    """The part of a process that does not lead: it measures, and says nothing but what is wrong with itself."""
    from layersurgery.runs.runner import help_along

    with calm(), ExitStack() as hold:
        there: Any = None
        tokenizer = None
        while (errand := _next_errand(team)) is not None:
            try:
                if there is None:
                    source = find_source(model, revision=options.revision)
                    if team.local_rank == 0 and fingerprint(source.directory) != errand.weights:
                        raise SourceError(
                            f"process {team.rank}: {source.label} in {source.directory} is another checkpoint than that of the process that leads"
                        )
                    tokenizer = tokenizer_of_run(source, options.tokenizer) if options.per_token else None
                    there = hold.enter_context(loaded(source, errand.place, team))
                measurer = errand.task.measurer(there, options)
                whole = help_along(measurer, errand.text, per_token=options.per_token, tokenizer=tokenizer, team=team)
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            if not whole:
                raise SystemExit(1)


def _next_errand(team: Team) -> Errand | None:
    errand: Errand | None = team.share(None)
    return errand
