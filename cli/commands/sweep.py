"""Run `layersurgery sweep`."""

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
    """Measurement of edited models."""

    variants: list[Variant]
    name: str = "sweep"

    @property
    def kind(self) -> str:
        """Return the kind of result directory: a sweep."""
        from layersurgery.runs.run_directory import SWEEP

        return SWEEP

    def arguments(self) -> dict[str, Any]:
        """Return the edits."""
        return {"edits": [[variant.edit, variant.name, str(variant.route)] for variant in self.variants]}

    def measurer(self, model: Any, options: MeasureOptions) -> Measurer:
        """Make the measurer of all variants."""
        from layersurgery.sweeps.measurer import Measurer

        return Measurer(model, self.variants, blocks=options.blocks, compiled=options.compile, order=options.schedule)

    def output(self, measurer: Measurer, source: Source, _console: Console) -> RunOutput:
        """Make the output: a table with a row for each variant."""
        from layersurgery.runs.runner import SweepOutput

        return SweepOutput(measurer.variants, source.label)

    def draw(self, frame: pd.DataFrame, directory: Path, run: Run) -> list[Path]:
        """Draw the figures; return their paths."""
        return draw_sweep(frame, directory, run.arguments["text"]["data"])

    def summarize(self, frame: pd.DataFrame) -> str:
        """Name the edits with the highest and the lowest KL so far."""
        edited = frame[frame.edit != "none"].dropna(subset=["kl_nats"])
        if edited.empty:
            return ""
        worst, best = edited.loc[edited.kl_nats.idxmax()], edited.loc[edited.kl_nats.idxmin()]
        return f"worst {worst['name']} ({worst.kl_nats:.2g} nats), best {best['name']} ({best.kl_nats:.2g})"

    def show(self, run: Run, console: Console) -> None:
        """Print the results."""
        show_sweep(run, console)


def run_sweep(model: str, options: MeasureOptions, console: Console) -> None:
    """Measure the effect of the edits, or print the cost with --estimate."""
    if options.estimate:
        if os.environ.get("RANK", "0") != "0":  # with several processes, only one prints
            return
        from .estimate import show_estimate

        show_estimate(model, options, console)
        return
    edits = edits_of(options)
    run_task(model, options, console, lambda depth: SweepTask(variants(edits, depth, layers_of(options.layers, depth))))
