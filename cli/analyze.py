"""`layersurgery analyze` and `layersurgery stages`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersurgery.sources import find_source
from layersurgery.weights import fingerprint

from .analyses import draw_analysis, show_analysis, summary
from .asking import looked_at
from .bench import calm, loaded_aloud
from .command import given
from .measuring import run_task
from .placement import Place, place_of
from .talk import Talk, number

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.measuring import Measurer
    from layersurgery.performing import Outcome
    from layersurgery.runs import Run
    from layersurgery.sources import Source

    from .sweep import Options


@dataclass(frozen=True, slots=True)
class Analysing:
    """An analysis of text: one signal, or all for the stages."""

    word: str
    depth: int

    @property
    def kind(self) -> str:
        """An analysis."""
        from layersurgery.runs import ANALYSIS

        return ANALYSIS

    def arguments(self) -> dict[str, Any]:
        """Which."""
        return {"analysis": self.word}

    def measurer(self, model: Any, options: Options) -> Measurer:
        """Measures its signals."""
        from layersurgery.analyses.keeping import signals_of
        from layersurgery.analyses.signals import measurer_of

        return measurer_of(model, signals_of(self.word), self.depth, blocks=options.blocks)

    def outcome(self, measurer: Measurer, source: Source, talk: Talk) -> Outcome:
        """Its tables."""
        from layersurgery.analyses.keeping import OfAnalysis

        return OfAnalysis(self.word, measurer, source.label, _on_neurons(talk))

    def draw(self, _frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Its figures."""
        return draw_analysis(directory, run.facts)

    def extremes(self, frame: pd.DataFrame) -> str:
        """Results so far."""
        return summary(frame)

    def show(self, run: Run, talk: Talk) -> None:
        """Its tables and, for the stages, what they say."""
        show_analysis(run, talk)


def run_analysis(word: str, model: str, options: Options, talk: Talk) -> None:
    """Measure, showing what happens, and end with the results."""
    run_task(model, options, talk, lambda depth: Analysing(word, depth))


def run_neurons(model: str, options: Options, talk: Talk) -> None:
    """Look at all neurons' weights; on a CPU, blocks stay on disk but for the one that is looked at."""
    if os.environ.get("RANK", "0") != "0":
        return
    from layersurgery.analyses.keeping import NEURONS, SCORES, write_tables
    from layersurgery.analyses.vocabulary import counted, neuron_scores
    from layersurgery.performing import drawn_by
    from layersurgery.runs import ANALYSIS, open_run, versions
    from layersurgery.team import Alone

    looked_at(model, options, talk)
    source = find_source(model, revision=options.revision)
    place = _for_a_look(source, options, talk)
    arguments = {
        "analysis": NEURONS,
        "model": {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)},
        **place.arguments(),
        "blocks": options.blocks,
        "versions": versions(),
    }
    directory = options.output or Path(f"{source.name}-{NEURONS}")
    with open_run(directory, arguments, kind=ANALYSIS, overwrite=options.overwrite, command=given()) as run:
        if run.finished:
            talk.say(f"The run in {run.directory} has finished; nothing to do. --overwrite measures it anew")
        else:
            with calm(), loaded_aloud(source, place, talk, Alone()) as there, _bar(talk) as on_layer:
                scores = neuron_scores(there, blocks=options.blocks, progress=on_layer)
            talk.say(f"{source.label}: {number(len(scores))} neurons")
            run.begin()
            table = counted(scores, source.label)
            run.note(files=write_tables(run.directory, {NEURONS: table, SCORES: scores}))
            figures, fault = drawn_by(lambda _, directory: draw_analysis(directory, run.facts), table, run.directory)
            run.note(state="finished", figures=figures, figures_fault=fault, left_out=scores.attrs["left_out"])
        show_analysis(run, talk)


def _for_a_look(source: Source, options: Options, talk: Talk) -> Place:
    """Where each weight is looked at once, a CPU's memory need not hold them all, nor in another dtype than their own."""
    own = options.dtype == "auto"
    place = place_of(dataclasses.replace(options, dtype="float32") if own else options, source, talk)
    place = dataclasses.replace(place, dtype="auto") if own else place
    if place.device != "cpu" or place.device_map is not None:
        return place
    from transformers import AutoConfig

    from layersurgery.estimating import blocks_on_disk

    return dataclasses.replace(place, device_map=blocks_on_disk(AutoConfig.from_pretrained(source.directory), options.blocks))


def _on_neurons(talk: Talk) -> Any:
    told = False

    def on_layer(_done: int, of: int) -> None:
        nonlocal told
        if not told:
            told = True
            talk.say(f"Looking at the neurons of {of} blocks")

    return on_layer


@contextmanager
def _bar(talk: Talk) -> Iterator[Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} blocks"),
        TextColumn("<"),
        TimeRemainingColumn(),
    )
    on = talk.err.is_terminal and not talk.err.quiet
    with Progress(*columns, console=talk.err, disable=not on, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)
