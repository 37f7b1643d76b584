"""Tables of what each attention head does for the model's predictions: a sweep of the family of heads, read by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..models.model_weights import count_heads
from ..plans.variants import Layers, layer_range, variants
from ..registry import METRICS
from ..sweeps.measurer import Measurer
from ..sweeps.results import results_table
from .measurements import TableMeasurement

if TYPE_CHECKING:
    from pathlib import Path

    from ..runs.options import RunOptions
    from ..runs.run_directory import Run
    from ..runs.session import ModelSession
    from .signal_tables import SignalTables

HEADS = "heads"
_KL = METRICS[0].name
_LISTED = 3


@dataclass(frozen=True, slots=True)
class HeadMeasurement(TableMeasurement):
    """Measurement of the model with each attention head off, one at a time.

    Attributes:
        blocks: the blocks whose heads are measured.
    """

    blocks: range = range(0)

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        return HEADS

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis, and the blocks."""
        return {"analysis": self.name, "layers": [self.blocks.start, self.blocks.stop]}

    def measurer(self, model: Any, options: RunOptions) -> Measurer:
        """Make the measurer of all heads."""
        heads = variants(HEADS, self.depth, self.blocks, heads=count_heads(model, blocks=options.blocks))
        return Measurer(model, heads, blocks=options.blocks, read=options.read_positions)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make a table with a row for each head."""
        return {HEADS: head_table(tables)}


def head_table(tables: SignalTables) -> pd.DataFrame:
    """Return a row for each head: its block in `layer` and `from`, its number in `head` and `to`, and all metrics."""
    frame = results_table(tables.measurer.variants, tables.sums_by_sequence, tables.model)
    frame = frame[frame.edit == HEADS].drop(columns=["edit", "name"]).reset_index(drop=True)
    frame.insert(2, "head", frame["to"])
    return frame


def run_heads(
    session: ModelSession,
    directory: Path,
    *,
    analysis: str = HEADS,  # noqa: ARG001 - every analysis is given its name
    overwrite: bool = False,
    layers: Layers = None,
) -> Run:
    """Measure each head on the session's text, or resume it, or use the finished run in the directory.

    Args:
        session: the model and the text.
        directory: where to write.
        analysis: the analysis's name.
        overwrite: replace what another run has left in the directory.
        layers: measure only the heads of these blocks; a range, adjacent numbers, or "4:20".
    """
    depth = session.model.depth
    measurement = HeadMeasurement(depth, layer_range(layers, depth) or range(depth))
    return session.run(measurement, directory, overwrite=overwrite)


def describe_heads(frame: pd.DataFrame) -> str:
    """Say which heads cost most when they are off, and how much of the cost the dearest heads have.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.analyses.head_ablation import describe_heads
        >>> frame = pd.DataFrame({"layer": [0, 0, 1], "head": [0, 1, 0], "kl_nats": [0.5, 0.1, 0.2]})
        >>> describe_heads(frame).partition("; ")[0]
        'Heads whose absence costs most: 0.0 (0.5 nats), 1.0 (0.2 nats), 0.1 (0.1 nats)'
    """
    rows = frame.dropna(subset=[_KL]).sort_values(_KL, ascending=False)
    if rows.empty:
        return ""
    dearest = ", ".join(
        f"{row['layer']}.{row['head']} ({row[_KL]:.2g} nats)" for row in rows[:_LISTED].to_dict("records")
    )
    share = rows[_KL].cumsum() / rows[_KL].sum()
    half = int((share < 0.5).sum()) + 1
    return (
        f"Heads whose absence costs most: {dearest}; written block.head. Half of the sum over all {len(rows)} heads is "
        f"that of {half} head{'s'[: half != 1]}."
    )
