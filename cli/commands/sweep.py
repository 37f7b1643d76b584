"""`layersurgery sweep`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersurgery.plans.variants import Variant, variants

from ..session.figures import draw_sweep
from ..session.inputs import edits_of, layers_of
from ..session.processes import run_task
from ..session.run_options import MeasureOptions
from ..terminal.console import Console
from ..terminal.sweep_results import show_sweep

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.checkpoints.sources import Source
    from layersurgery.runs.run_directory import Run
    from layersurgery.runs.runner import RunOutput
    from layersurgery.sweeps.measurer import Measurer


@dataclass(frozen=True, slots=True)
class SweepTask:
    """Edited models to measure."""

    variants: list[Variant]
    word: str = "sweep"

    @property
    def kind(self) -> str:
        """A sweep."""
        from layersurgery.runs.run_directory import SWEEP

        return SWEEP

    def arguments(self) -> dict[str, Any]:
        """The edits."""
        return {"edits": [[variant.edit, variant.name, str(variant.route)] for variant in self.variants]}

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Measures them."""
        from layersurgery.sweeps.measurer import Measurer

        return Measurer(model, self.variants, blocks=options.blocks, compiled=options.compile, order=options.schedule)

    def outcome(self, measurer: Measurer, source: Source, _console: Console) -> RunOutput:
        """A row for each."""
        from layersurgery.runs.runner import SweepOutput

        return SweepOutput(measurer.variants, source.label)

    def draw(self, frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Their figures."""
        return draw_sweep(frame, directory, run.arguments["text"]["data"])

    def extremes(self, frame: pd.DataFrame) -> str:
        """What hurts most and least so far."""
        edited = frame[frame.edit != "none"].dropna(subset=["kl_nats"])
        if edited.empty:
            return ""
        worst, best = edited.loc[edited.kl_nats.idxmax()], edited.loc[edited.kl_nats.idxmin()]
        return f"worst {worst['name']} ({worst.kl_nats:.2g} nats), best {best['name']} ({best.kl_nats:.2g})"

    def show(self, run: Run, console: Console) -> None:
        """The table."""
        show_sweep(run, console)


def run_sweep(model: str, options: MeasureOptions, console: Console) -> None:
    """Measure, or say what it would take."""
    if options.estimate:
        if os.environ.get("RANK", "0") != "0":  # of several processes, one says it
            return
        from .estimate import show_estimate

        show_estimate(model, options, console)
        return
    asked = edits_of(options)
    run_task(model, options, console, lambda depth: SweepTask(variants(asked, depth, layers_of(options.layers, depth))))
