"""Run `layersurgery analyze` and `layersurgery stages`."""

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
from ..session.one_shot import TablesAndFacts, run_once
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
    """Analysis on text: one signal, or all signals for the stages."""

    name: str
    depth: int

    @property
    def kind(self) -> str:
        """Return the kind of result directory: an analysis."""
        from layersurgery.runs.run_directory import ANALYSIS

        return ANALYSIS

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis."""
        return {"analysis": self.name}

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Make the measurer of the analysis's signals."""
        from layersurgery.analyses.outcomes import signals_of
        from layersurgery.analyses.signal_tables import measurer_of

        return measurer_of(model, signals_of(self.name), self.depth, blocks=options.blocks)

    def output(self, measurer: Measurer, source: Source, console: Console) -> RunOutput:
        """Make the output: the analysis's tables."""
        from layersurgery.analyses.outcomes import AnalysisOutput

        return AnalysisOutput(self.name, measurer, source.label, _announce_neurons(console))

    def draw(self, _frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Draw the figures; return their paths."""
        return draw_analysis(directory, run.facts)

    def summarize(self, frame: pd.DataFrame) -> str:
        """Summarize the results so far."""
        return progress_line(frame)

    def show(self, run: Run, console: Console) -> None:
        """Print the tables and, for the stages, a summary in words."""
        show_analysis(run, console)


def run_analysis(name: str, model: str, options: MeasureOptions, console: Console) -> None:
    """Run an analysis on text, show its progress, and print the results."""
    run_task(model, options, console, lambda depth: AnalysisTask(name, depth))


def run_neurons(model: str, options: MeasureOptions, console: Console) -> None:
    """Score all neurons by their weights; on a CPU, only one block is in memory at a time."""
    if os.environ.get("RANK", "0") != "0":
        return
    from layersurgery.analyses.outcomes import NEURONS, SCORES
    from layersurgery.analyses.prediction_neurons import neuron_scores, neurons_per_block
    from layersurgery.runs.distributed import SingleProcess

    read_model_info(model, options, console)
    source = find_source(model, revision=options.revision)
    placement = _choose_one_pass_placement(source, options, console)

    def make() -> TablesAndFacts:
        with (
            silence_libraries(),
            load_with_status(source, placement, console, SingleProcess()) as loaded,
            counter(console, "blocks") as on_layer,
        ):
            scores = neuron_scores(loaded, blocks=options.blocks, progress=on_layer)
        console.log(f"{source.label}: {format_count(len(scores))} neurons")
        return {NEURONS: neurons_per_block(scores, source.label), SCORES: scores}, {"skipped": scores.attrs["skipped"]}

    arguments = {
        "analysis": NEURONS,
        "model": {"name": source.label, "revision": source.revision, "weights": fingerprint(source.directory)},
        **placement.arguments(),
        "blocks": options.blocks,
    }
    directory = options.output or Path(f"{source.name}-{NEURONS}")
    show_analysis(run_once(directory, arguments, console, make, overwrite=options.overwrite), console)


def _choose_one_pass_placement(source: Source, options: MeasureOptions, console: Console) -> Placement:
    """Choose where to load a model of which each weight is read once.

    On a CPU, the blocks stay on disk and are loaded one at a time. Weights keep their own dtype unless --dtype is
    given.
    """
    is_auto = options.dtype == "auto"
    placement = choose_placement(dataclasses.replace(options, dtype="float32") if is_auto else options, source, console)
    placement = dataclasses.replace(placement, dtype="auto") if is_auto else placement
    if placement.device != "cpu" or placement.device_map is not None:
        return placement
    from transformers import AutoConfig

    from layersurgery.sweeps.estimate import blocks_on_disk

    return dataclasses.replace(
        placement, device_map=blocks_on_disk(AutoConfig.from_pretrained(source.directory), options.blocks)
    )


def _announce_neurons(console: Console) -> Any:
    announced = False

    def on_layer(_done: int, total: int) -> None:
        nonlocal announced
        if not announced:
            announced = True
            console.log(f"Scoring the neurons of {total} blocks")

    return on_layer
