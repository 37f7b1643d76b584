"""What `sweep`, `analyze` and `stages` have in common: text, a model, a directory, processes that help, and a run that goes on."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from layersurgery.errors import MeasurementError, PlanError, SourceError
from layersurgery.sources import Source, find_source
from layersurgery.trie import DEPTH_FIRST, LAYER_MAJOR
from layersurgery.weights import fingerprint

from .asking import asked_text, looked_at
from .placement import Place, loaded, place_of, where
from .progress import bar
from .talk import Talk, complain, number, size

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.measuring import Measurer
    from layersurgery.performing import Outcome
    from layersurgery.runs import Run
    from layersurgery.team import Team
    from layersurgery.text import Asked, Text

    from .sweep import Options


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

    def measurer(self, model: Any, options: Options) -> Measurer:
        """What measures it."""

    def outcome(self, measurer: Measurer, source: Source, talk: Talk) -> Outcome:
        """What becomes of it."""

    def draw(self, frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Draws its figures."""

    def extremes(self, frame: pd.DataFrame) -> str:
        """Results so far, in a few words."""

    def show(self, run: Run, talk: Talk) -> None:
        """Shows its results."""


Prepare = Callable[[int], Task]


@dataclass(frozen=True, slots=True)
class Errand:
    """What the leading process tells the others to do."""

    task: Task
    text: Text
    weights: str
    place: Place


def run_task(model: str, options: Options, talk: Talk, prepare: Prepare) -> None:
    """Measure, showing what happens, and end with the results.

    Args:
        model: as it was named.
        options: of the command.
        talk: how it speaks.
        prepare: makes the task for a model of so many blocks.
    """
    if options.schedule not in (None, DEPTH_FIRST, LAYER_MAJOR):
        raise PlanError(f"--schedule {options.schedule!r} is none; write {DEPTH_FIRST} or {LAYER_MAJOR}")
    from layersurgery.team import find_team

    team = find_team(cpu=_on_cpu(options))
    if team.rank:
        _follow(model, options, team)
        team.leave()
        return
    errands: list[Errand | None] = []

    def send(errand: Errand | None) -> None:
        errands.append(errand)
        team.share(errand)

    try:
        _lead(model, options, talk, prepare, team, send)
    finally:
        if not errands:  # the others need not wait for what will not come
            with suppress(MeasurementError):
                send(None)
    team.leave()


def _on_cpu(options: Options) -> bool:
    import torch

    return options.device == "cpu" or not torch.cuda.is_available()


def _lead(model: str, options: Options, talk: Talk, prepare: Prepare, team: Team, send: Any) -> None:
    """Text is read before the weights are fetched or loaded."""
    source, depth, positions, vocabulary = looked_at(model, options, talk)
    task = prepare(depth)
    asked = asked_text(model, options, positions)
    place = place_of(options, source, talk)
    from layersurgery.runs import open_run
    from layersurgery.table import read_run
    from layersurgery.text import check_data

    check_data(asked)
    tokenizer = _tokenizer(source, options.tokenizer)
    directory = options.output or Path(f"{source.name}-{task.word}")
    before = read_run(directory) or {}
    # A finished run need not reach the hub again to say so.
    done = before.get("state") == "finished" and asked.from_hub and not options.overwrite
    text = None if done else _text(asked, tokenizer, vocabulary, talk)
    source = find_source(model, revision=options.revision)
    arguments = _arguments(source, options, asked, task, place)
    arguments["text"]["fingerprint"] = (
        text.fingerprint if text else before.get("arguments", {}).get("text", {}).get("fingerprint")
    )
    with open_run(directory, arguments, kind=task.kind, overwrite=options.overwrite) as run:
        if run.finished or text is None:
            talk.say(f"The run in {run.directory} has finished; nothing to do. --overwrite measures it anew")
        else:
            send(Errand(task, text, arguments["model"]["weights"], place))
            _measure(run, source, task, text, tokenizer, options, place, talk, team)
        task.show(run, talk)


def _follow(model: str, options: Options, team: Team) -> None:
    """The part of a process that does not lead: it measures, and says nothing but what is wrong with itself."""
    from layersurgery.performing import help_along

    errand: Errand | None = team.share(None)
    if errand is None:
        return
    source = find_source(model, revision=options.revision)
    if team.local_rank == 0 and fingerprint(source.directory) != errand.weights:
        raise SourceError(
            f"process {team.rank}: {source.label} in {source.directory} is another checkpoint than that of the process that leads"
        )
    tokenizer = _tokenizer(source, options.tokenizer) if options.per_token else None
    try:
        with calm(), loaded(source, errand.place, team) as there:
            measurer = errand.task.measurer(there, options)
            whole = help_along(measurer, errand.text, per_token=options.per_token, tokenizer=tokenizer, team=team)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if not whole:
        raise SystemExit(1)


def _tokenizer(source: Source, other: str | None) -> Any:
    from layersurgery.loading import tokenizer_of

    tokenizer = tokenizer_of(find_source(other, weights=False) if other else source)
    if tokenizer is None:
        raise SourceError(f"{other or source.label} brings no tokenizer; say whose to take: --tokenizer MODEL")
    return tokenizer


def _arguments(source: Source, options: Options, asked: Asked, task: Task, place: Place) -> dict[str, Any]:
    from layersurgery.runs import versions

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


def _text(asked: Asked, tokenizer: Any, vocabulary: int | None, talk: Talk) -> Text:
    from layersurgery.text import read_text

    with talk.step(f"Reading text: {asked.data}"):
        text = read_text(asked, tokenizer)
    most = int(text.ids[text.mask.bool()].max())
    if vocabulary is not None and most >= vocabulary:
        raise SourceError(
            f"the tokenizer gives token {most}, and the model has a vocabulary of {vocabulary}: it is another model's tokenizer"
        )
    sequences, length = text.ids.shape
    talk.say(f"{text.tokens:,} tokens in {sequences} sequence{'s'[: sequences != 1]} of {'' if asked.pack else 'up to '}{length}")
    for note in text.notes:
        talk.say(f"Note: {note}")
    return text


def _measure(
    run: Run, source: Source, task: Task, text: Text, tokenizer: Any, options: Options, place: Place, talk: Talk, team: Team
) -> None:  # fmt: skip
    from layersurgery.performing import perform

    with calm(), loaded_aloud(source, place, talk, team) as model:
        measurer = task.measurer(model, options)
        on = where(model, place, measurer.stack.path)
        talk.say(
            f"{source.label}: {number(measurer.parameters)} parameters in {place.dtype} on {on}; read out by {measurer.readout.about}"
        )
        _announce(measurer, text, options.batch_size or run.facts.get("batch_size"), talk, team)
        if run.begun:
            talk.say("Going on with what is measured already")
        try:
            with bar(text, talk, task.extremes) as on_progress:
                perform(
                    run,
                    measurer,
                    text,
                    task.outcome(measurer, source, talk),
                    batch_size=options.batch_size,
                    per_token=options.per_token,
                    tokenizer=tokenizer,
                    draw=lambda frame, directory: task.draw(frame, directory, run),
                    on_progress=on_progress,
                    team=team,
                )
        except (KeyboardInterrupt, SystemExit) as stop:
            also = "; if another process has gone, its own message says why" if team.size > 1 else ""
            complain("stopped", f"what was measured is in {run.directory}; the same command goes on with it{also}")
            raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
    if measurer.stack.compiler is not None and (why := measurer.stack.compiler.refused):
        talk.say(f"Note: {why}; blocks were run as they are")
    if measurer.at_once is not None:
        talk.say(
            f"Note: memory ran out, so batches were measured in parts of {measurer.at_once} sequence{'s'[: measurer.at_once != 1]}"
        )


@contextmanager
def loaded_aloud(source: Source, place: Place, talk: Talk, team: Team) -> Iterator[Any]:
    """The model where it is to be, with a word while it is loaded."""
    with ExitStack() as stack:
        with talk.step(f"Loading {source.label}"):
            model = stack.enter_context(loaded(source, place, team))
        yield model


@contextmanager
def calm() -> Iterator[None]:
    """Without other libraries' advice and bars between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("accelerate").setLevel("ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _announce(measurer: Measurer, text: Text, batch_size: int | None, talk: Talk, team: Team) -> None:
    length = text.ids.shape[1]
    batch = min(batch_size or measurer.suggest(length), len(text.ids))
    forecast, plan = measurer.forecast(batch, length), measurer.schedule
    saved = f"{plan.calls_apart:,} without sharing"
    by = f" by {team.size} processes" if team.size > 1 else ""
    edited = f"{len(measurer.routes)} edited models; " if measurer.routes else ""
    shared = f", {saved}" if plan.calls_apart > plan.calls else ""
    talk.say(f"{edited}{plan.calls:,} block calls a batch{shared}{by}")
    if measurer.bytes_to_read:
        way = (
            f"layer by layer, {plan.at_home} block{'s'[: plan.at_home != 1]} at hand at a time"
            if plan.during
            else "route by route"
        )
        talk.say(f"Weights are brought in {way}: {size(measurer.bytes_to_read)} a batch")
    talk.say(
        f"Expecting {size(forecast.total)} of memory for {batch} sequence{'s'[: batch != 1]} at once: weights {size(forecast.weights)}, streams "
        f"{size(forecast.streams)}, a block {size(forecast.block)} or a readout {size(forecast.readout)}"
    )
    for plan_text, reason in measurer.left_out.items():
        talk.say(f"Left out: {plan_text}: {reason}")
