"""Find the four stages of inference: all signals of a model over its depth, and the stages they support."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..errors import UnsupportedEditError, warn
from ..metrics.aggregation import Array
from ..metrics.reference import METRICS
from ..models.anatomy import anatomy as find_anatomy
from ..runtime.inputs import as_tokens
from ..sweeps.neuron_scores import OnLayer
from ..sweeps.quantities import ATTENTION, NORMS, SIGNALS
from ..sweeps.results import with_layer_kinds
from .prediction_neurons import neurons
from .signal_tables import DROP, LENS, SignalTables, measure_tables
from .stage_boundaries import Boundary, Signals, as_records, boundaries, stage_of

_COLUMNS = {
    ATTENTION: ("attention_prev5",),
    LENS: ("lens_kl_nats", "lens_entropy_bits"),
    NORMS: ("attention_norm", "mlp_norm", "attention_to_mlp_ratio"),
}


def stages(
    model: nn.Module,
    tokens: torch.Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: torch.Tensor | None = None,
    batch_size: int | None = None,
    blocks: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_layer: OnLayer | None = None,
) -> pd.DataFrame:
    """Measure all signals of a model over its depth, and the stages they show (figure 1 and table 1 of the paper).

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: sequences per batch; chosen by free memory if not given.
        blocks: path of the list of blocks ("model.layers"), if it cannot be found automatically.
        progress: called after each batch with the number of sequences done and the total.
        on_layer: called after the neurons of each block with the number of blocks done and the total.

    Returns:
        One row for each block: layer, relative_depth, stage, drop_kl_nats, attention_prev5, prediction_percent,
        suppression_percent, lens_kl_nats, lens_entropy_bits, attention_norm, mlp_norm, attention_to_mlp_ratio. Means
        over text have a standard error over sequences. `frame.attrs["boundaries"]` holds the boundaries between the
        stages as dictionaries (fields: `analyses.stage_boundaries.Boundary`); `describe_stages(frame)` describes them
        in words.

    Raises:
        PlanError: tokens that cannot be measured.
        UnsupportedEditError: the model's list of blocks cannot be identified.
        MeasurementError: predictions that are NaN or infinite, or too little memory.
    """
    ids, mask = as_tokens(tokens, attention_mask)
    anatomy = find_anatomy(model, blocks=blocks)
    tables = measure_tables(model, ids, mask, [*SIGNALS, LENS, DROP], batch_size, blocks, anatomy, progress)
    try:
        neuron_table = neurons(model, blocks=blocks, anatomy=anatomy, progress=on_layer)
    except UnsupportedEditError as error:
        warn(f"neurons were skipped: {error}")
        neuron_table = None
    return stage_table(tables, neuron_table)


def stage_table(tables: SignalTables, neuron_table: pd.DataFrame | None) -> pd.DataFrame:
    """Build the table of `stages`.

    Args:
        tables: tables of all signals measured on text.
        neuron_table: the table of neurons; None if the model has none.
    """
    drop = tables.drop()
    dropped = drop[drop.edit == DROP].set_index("layer")
    frame = with_layer_kinds(tables.lens()[["model", "layer", "relative_depth"]], tables.measurer.layer_kinds).copy()
    for name in ("kl_nats", "kl_nats_sem"):
        frame[f"drop_{name}"] = dropped[name].reindex(frame.layer).to_numpy(float)
    for signal, columns in _COLUMNS.items():
        table = tables.table(signal)
        for column in columns:
            frame[column], frame[f"{column}_sem"] = table[column], table[f"{column}_sem"]
    for kind in ("prediction", "suppression"):
        frame[f"{kind}_percent"] = np.nan if neuron_table is None else neuron_table[f"{kind}_percent"].to_numpy(float)
    counts = _neuron_counts(neuron_table, tables.depth)
    stage_boundaries = boundaries(
        _signals(frame, counts), _resampling(tables, counts), kinds=tables.measurer.layer_kinds
    )
    frame.insert(3, "stage", stage_of(stage_boundaries, tables.depth))
    frame.attrs["boundaries"] = as_records(stage_boundaries)
    return frame


def _neuron_counts(neuron_table: pd.DataFrame | None, depth: int) -> dict[str, Array]:
    names = ("prediction", "suppression", "neurons")
    if neuron_table is None:
        return {name: np.full(depth, np.nan) for name in names}
    return {name: neuron_table[name].astype("float64").to_numpy(float) for name in names}


def _signals(frame: pd.DataFrame, counts: dict[str, Array]) -> Signals:
    names = ("drop_kl_nats", "attention_prev5", "lens_kl_nats", "lens_entropy_bits")
    return {name: frame[name].to_numpy(float) for name in names} | counts


def _resampling(tables: SignalTables, counts: dict[str, Array]) -> Callable[[np.random.Generator], Signals] | None:
    """Return a function that draws the signals again from sequences and neurons sampled with replacement.

    Return None if there is only one sequence.
    """
    sums_by_sequence, depth = tables.sums_by_sequence, tables.depth
    sequences = len(sums_by_sequence.counts)
    if sequences < 2:
        return None
    rows = {(variant.edit, variant.layer): row for row, variant in enumerate(tables.measurer.variants)}

    def values(edit: str, metric: str) -> Array:
        by_layer = np.full((sequences, depth), np.nan)
        for layer in range(depth):
            # The lens after the last block is the unedited model. A block that cannot be dropped has no value.
            row = rows.get((edit, layer), 0 if edit == LENS else None)
            if row is not None:
                by_layer[:, layer] = sums_by_sequence.values[:, row, METRICS.index(metric)]
        return by_layer

    predictions = np.repeat(sums_by_sequence.counts[:, None], depth, 1)
    pairs = {
        "drop_kl_nats": (values(DROP, "kl_nats"), predictions),
        "lens_kl_nats": (values(LENS, "kl_nats"), predictions),
        "lens_entropy_bits": (values(LENS, "entropy_bits"), predictions),
    }
    attention_sums = [tables.sums(layer, "attention", "attention_prev5") for layer in range(depth)]
    pairs["attention_prev5"] = (
        np.stack([sums for sums, _ in attention_sums], 1),
        np.stack([count for _, count in attention_sums], 1),
    )

    def draw(rng: np.random.Generator) -> Signals:
        weights = np.bincount(rng.integers(sequences, size=sequences), minlength=sequences).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = {name: (weights @ sums) / (weights @ count) for name, (sums, count) in pairs.items()}
        return drawn | _resample_neurons(counts, rng)

    return draw


def _resample_neurons(counts: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    total = counts["neurons"]
    if not all(np.isfinite(values).all() for values in counts.values()):
        return counts
    shares = np.stack(
        [counts["prediction"], counts["suppression"], total - counts["prediction"] - counts["suppression"]], 1
    )
    drawn = rng.multinomial(total.astype(int), shares / np.maximum(total, 1)[:, None])
    return {"prediction": drawn[:, 0].astype(float), "suppression": drawn[:, 1].astype(float), "neurons": total}


def describe_stages(frame: pd.DataFrame) -> str:
    """Describe in a paragraph which boundaries a table of `stages` shows and which it does not."""
    stage_boundaries = [Boundary(**record) for record in frame.attrs["boundaries"]]
    depth = len(frame)
    sentences = []
    first = 0
    for boundary in stage_boundaries:
        if boundary.layer is None:
            sentences.append(f"The boundary from {boundary.ends} to {boundary.begins} was not found: {boundary.why}.")
            continue
        sentences.append(
            f"{boundary.ends.capitalize()} ends before layer {boundary.layer} of {depth}{_interval(boundary)}: "
            f"{boundary.why}."
        )
        first = boundary.layer
    found = sum(boundary.layer is not None for boundary in stage_boundaries)
    names = list(dict.fromkeys(frame.stage))
    count = {
        0: "None of the three boundaries",
        1: "One of the three boundaries",
        2: "Two of the three boundaries",
        3: "All three boundaries",
    }[found]
    head = f"{count} between the four stages {'was' if found < 2 else 'were'} found"
    last = f"Layers {first} to {depth - 1} are" if first < depth - 1 else f"Layer {first} is"
    tail = f"{last} {names[-1]}." if found else ""
    return " ".join(filter(None, [f"{head}.", *sentences, tail]))


def _interval(boundary: Boundary) -> str:
    if boundary.low is None:
        return " (no interval: there is only one sequence)"
    return (
        f" (95 % of resamples: {boundary.low})"
        if boundary.low == boundary.high
        else f" (95 % of resamples: {boundary.low} to {boundary.high})"
    )
