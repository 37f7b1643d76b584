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
from ..session.inputs import read_model_info
from ..session.model_session import load_with_status, silence_libraries
from ..session.one_shot import Made, run_once
from ..session.placement import Placement, choose_placement
from ..session.processes import run_task
from ..terminal.analysis_results import progress_line, show_analysis
from ..terminal.console import Console, format_count
from ..terminal.progress import counter

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.checkpoints.sources import Source
    from layersurgery.runs.run_directory import Run
    from layersurgery.runs.runner import RunOutput
    from layersurgery.sweeps.measurer import Measurer

    from ..session.run_options import MeasureOptions


@dataclass(frozen=True, slots=True)
class AnalysisTask:
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

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Measures its signals."""
        from layersurgery.analyses.outcomes import signals_of
        from layersurgery.analyses.signal_tables import measurer_of

        return measurer_of(model, signals_of(self.word), self.depth, blocks=options.blocks)

    def outcome(self, measurer: Measurer, source: Source, console: Console) -> RunOutput:
        """Its tables."""
        from layersurgery.analyses.outcomes import AnalysisOutput

        return AnalysisOutput(self.word, measurer, source.label, _on_neurons(console))

    def draw(self, _frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Its figures."""
        return draw_analysis(directory, run.facts)

    def extremes(self, frame: pd.DataFrame) -> str:
        """Results so far."""
        return progress_line(frame)

    def show(self, run: Run, console: Console) -> None:
        """Its tables and, for the stages, what they say."""
        show_analysis(run, console)


def run_analysis(word: str, model: str, options: MeasureOptions, console: Console) -> None:
    """Measure, showing what happens, and end with the results."""
    run_task(model, options, console, lambda depth: AnalysisTask(word, depth))


def run_neurons(model: str, options: MeasureOptions, console: Console) -> None:
    """Look at all neurons' weights; on a CPU, blocks stay on disk but for the one that is looked at."""
    if os.environ.get("RANK", "0") != "0":
        return
    from layersurgery.analyses.outcomes import NEURONS, SCORES
    from layersurgery.analyses.prediction_neurons import neuron_scores, neurons_per_block
    from layersurgery.runs.distributed import SingleProcess

    read_model_info(model, options, console)
    source = find_source(model, revision=options.revision)
    place = _for_a_look(source, options, console)

    def make() -> Made:
        with (
            silence_libraries(),
            load_with_status(source, place, console, SingleProcess()) as there,
            counter(console, "blocks") as on_layer,
        ):
            scores = neuron_scores(there, blocks=options.blocks, progress=on_layer)
        console.log(f"{source.label}: {format_count(len(scores))} neurons")
        return {NEURONS: neurons_per_block(scores, source.label), SCORES: scores}, {"skipped": scores.attrs["skipped"]}

    arguments = {
        "analysis": NEURONS,
        "model": {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)},
        **place.arguments(),
        "blocks": options.blocks,
    }
    directory = options.output or Path(f"{source.name}-{NEURONS}")
    show_analysis(run_once(directory, arguments, console, make, overwrite=options.overwrite), console)


def _for_a_look(source: Source, options: MeasureOptions, console: Console) -> Placement:
    """Where each weight is looked at once, a CPU's memory need not hold them all, nor in another dtype than their own."""
    own = options.dtype == "auto"
    place = choose_placement(dataclasses.replace(options, dtype="float32") if own else options, source, console)
    place = dataclasses.replace(place, dtype="auto") if own else place
    if place.device != "cpu" or place.device_map is not None:
        return place
    from transformers import AutoConfig

    from layersurgery.sweeps.estimate import blocks_on_disk

    return dataclasses.replace(
        place, device_map=blocks_on_disk(AutoConfig.from_pretrained(source.directory), options.blocks)
    )


def _on_neurons(console: Console) -> Any:
    told = False

    def on_layer(_done: int, of: int) -> None:
        nonlocal told
        if not told:
            told = True
            console.log(f"Looking at the neurons of {of} blocks")

    return on_layer
