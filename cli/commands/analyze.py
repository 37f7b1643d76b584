"""`layersurgery analyze` and `layersurgery stages`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersurgery.checkpoints.sources import find_source
from layersurgery.checkpoints.tensor_index import fingerprint

from ..session.figures import draw_analysis
from ..session.inputs import looked_at
from ..session.model_session import calm, loaded_aloud
from ..session.one_shot import Made, look
from ..session.placement import Place, place_of
from ..session.processes import run_task
from ..terminal.analysis_results import show_analysis, summary
from ..terminal.console import Talk, number
from ..terminal.progress import counting

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.checkpoints.sources import Source
    from layersurgery.runs.run_directory import Run
    from layersurgery.runs.runner import Outcome
    from layersurgery.sweeps.measurer import Measurer

    from ..session.run_options import Options


@dataclass(frozen=True, slots=True)
class Analysing:
    """An analysis of text: one signal, or all for the stages."""

    word: str
    depth: int

    @property
    def kind(self) -> str:
        """An analysis."""
        from layersurgery.runs.run_directory import ANALYSIS

        return ANALYSIS

    def arguments(self) -> dict[str, Any]:
        """Which."""
        return {"analysis": self.word}

    def measurer(self, model: Any, options: Options) -> Measurer:
        """Measures its signals."""
        from layersurgery.analyses.outcomes import signals_of
        from layersurgery.analyses.signal_tables import measurer_of

        return measurer_of(model, signals_of(self.word), self.depth, blocks=options.blocks)

    def outcome(self, measurer: Measurer, source: Source, talk: Talk) -> Outcome:
        """Its tables."""
        from layersurgery.analyses.outcomes import OfAnalysis

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
    from layersurgery.analyses.outcomes import NEURONS, SCORES
    from layersurgery.analyses.prediction_neurons import counted, neuron_scores
    from layersurgery.runs.distributed import Alone

    looked_at(model, options, talk)
    source = find_source(model, revision=options.revision)
    place = _for_a_look(source, options, talk)

    def make() -> Made:
        with calm(), loaded_aloud(source, place, talk, Alone()) as there, counting(talk, "blocks") as on_layer:
            scores = neuron_scores(there, blocks=options.blocks, progress=on_layer)
        talk.say(f"{source.label}: {number(len(scores))} neurons")
        return {NEURONS: counted(scores, source.label), SCORES: scores}, {"left_out": scores.attrs["left_out"]}

    arguments = {
        "analysis": NEURONS,
        "model": {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)},
        **place.arguments(),
        "blocks": options.blocks,
    }
    directory = options.output or Path(f"{source.name}-{NEURONS}")
    show_analysis(look(directory, arguments, talk, make, anew=options.overwrite), talk)


def _for_a_look(source: Source, options: Options, talk: Talk) -> Place:
    """Where each weight is looked at once, a CPU's memory need not hold them all, nor in another dtype than their own."""
    own = options.dtype == "auto"
    place = place_of(dataclasses.replace(options, dtype="float32") if own else options, source, talk)
    place = dataclasses.replace(place, dtype="auto") if own else place
    if place.device != "cpu" or place.device_map is not None:
        return place
    from transformers import AutoConfig

    from layersurgery.sweeps.estimate import blocks_on_disk

    return dataclasses.replace(place, device_map=blocks_on_disk(AutoConfig.from_pretrained(source.directory), options.blocks))


def _on_neurons(talk: Talk) -> Any:
    told = False

    def on_layer(_done: int, of: int) -> None:
        nonlocal told
        if not told:
            told = True
            talk.say(f"Looking at the neurons of {of} blocks")

    return on_layer
