"""Measure what each attention head does for the model's predictions: the model with that head off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from ..errors import UnsupportedEditError
from ..models.anatomy import anatomy as find_anatomy
from ..models.block_weights import ModelWeights
from ..plans.plan import heads_off
from ..plans.variants import Layers, Variant, layer_range
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
        return make_head_measurer(model, self.blocks, blocks=options.blocks, read=options.read_positions)

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make a table with a row for each head."""
        return {HEADS: head_table(tables)}


def make_head_measurer(
    model: nn.Module, layers: range | None = None, *, blocks: str | None = None, **options: Any
) -> Measurer:
    """Make a measurer of the model with each attention head off, one at a time.

    Blocks without heads (state-space mixers, gated or latent attention whose heads cannot be told apart) are left out;
    `Measurer.skipped` says why.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        layers: the blocks whose heads are measured; all by default.
        blocks: path of the list of blocks, if it cannot be found automatically.
        options: other arguments of `Measurer`.

    Raises:
        UnsupportedEditError: no block has heads.
    """
    anatomy = find_anatomy(model, blocks=blocks)
    weights = ModelWeights(model, model.get_submodule(anatomy.blocks), anatomy)  # type: ignore[arg-type]
    variants: list[Variant] = []
    skipped: dict[str, str] = {}
    for block in layers or range(anatomy.depth):
        try:
            count = weights.count_units(block, "attention")
        except UnsupportedEditError as error:
            skipped[f"heads of block {block}"] = str(error)
            continue
        variants += (
            Variant.from_plan(HEADS, heads_off(block, head), anatomy.depth, block, (block, head))
            for head in range(count)
        )
    if not variants:
        raise UnsupportedEditError(next(iter(skipped.values()), "the model has no blocks"))
    measurer = Measurer(model, variants, blocks=blocks, anatomy=anatomy, **options)
    measurer.skipped.update(skipped)
    return measurer


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
