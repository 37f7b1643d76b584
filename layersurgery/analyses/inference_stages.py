"""The four stages of inference: all signals of a model side by side over its depth, and what they say of its stages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..metrics.aggregation import Array
from ..metrics.reference import METRICS
from ..models.anatomy import anatomy as find_anatomy
from ..runtime.inputs import as_tokens
from ..sweeps.observer import ATTENTION, NORMS, SIGNALS
from .prediction_neurons import OnLayer, neurons
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
    """All signals of a model over its depth, and the stages that they show (figure 1 and table 1 of the paper).

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: sequences at once; by the free memory if not given.
        blocks: path of the list of blocks ("model.layers"), where it cannot be found.
        progress: is called after each batch with the number of sequences done and of all.
        on_layer: is called after each block's neurons with the number of blocks done and of all.

    Returns:
        One row for each block: layer, relative_depth, stage, drop_kl_nats, attention_prev5, prediction_percent, suppression_percent,
        lens_kl_nats, lens_entropy_bits, attention_norm, mlp_norm, attention_to_mlp_ratio; means over text with their standard errors over
        sequences. `frame.attrs["boundaries"]` holds the limits between stages, as dictionaries (see `staging.Boundary`); `in_words(frame)`
        says them.

    Raises:
        PlanError: tokens that cannot be measured.
        UnsupportedEditError: the model's blocks cannot be told apart.
        MeasurementError: predictions that are no numbers, or too little memory.
    """
    ids, mask = as_tokens(tokens, attention_mask)
    known = find_anatomy(model, blocks=blocks)
    tables = measure_tables(model, ids, mask, [*SIGNALS, LENS, DROP], batch_size, blocks, known, progress)
    try:
        found = neurons(model, blocks=blocks, anatomy=known, progress=on_layer)
    except UnsupportedEditError as error:
        warnings.warn(f"neurons are left out: {error}", stacklevel=2)
        found = None
    return stage_table(tables, found)


def stage_table(tables: SignalTables, found: pd.DataFrame | None) -> pd.DataFrame:
    """The table of `stages`.

    Args:
        tables: of all signals that text tells.
        found: the table of neurons; None where the model has none.
    """
    drop = tables.drop()
    dropped = drop[drop.edit == DROP].set_index("layer")
    frame = tables.lens()[["model", "layer", "relative_depth"]].copy()
    for name in ("kl_nats", "kl_nats_sem"):
        frame[f"drop_{name}"] = dropped[name].reindex(frame.layer).to_numpy(float)
    for signal, columns in _COLUMNS.items():
        table = tables.of(signal)
        for column in columns:
            frame[column], frame[f"{column}_sem"] = table[column], table[f"{column}_sem"]
    for kind in ("prediction", "suppression"):
        frame[f"{kind}_percent"] = np.nan if found is None else found[f"{kind}_percent"].to_numpy(float)
    counts = _counts(found, tables.depth)
    limits = boundaries(_signals(frame, counts), _resampling(tables, counts))
    frame.insert(3, "stage", stage_of(limits, tables.depth))
    frame.attrs["boundaries"] = as_records(limits)
    return frame


def _counts(found: pd.DataFrame | None, depth: int) -> dict[str, Array]:
    names = ("prediction", "suppression", "neurons")
    if found is None:
        return {name: np.full(depth, np.nan) for name in names}
    return {name: found[name].astype("float64").to_numpy(float) for name in names}


def _signals(frame: pd.DataFrame, counts: dict[str, Array]) -> Signals:
    names = ("drop_kl_nats", "attention_prev5", "lens_kl_nats", "lens_entropy_bits")
    return {name: frame[name].to_numpy(float) for name in names} | counts


def _resampling(tables: SignalTables, counts: dict[str, Array]) -> Callable[[np.random.Generator], Signals] | None:
    """Draws signals anew from sequences, and neurons, taken with replacement."""
    sample, depth = tables.sums_by_sequence, tables.depth
    n = len(sample.counts)
    if n < 2:
        return None
    rows = {(variant.edit, variant.layer): row for row, variant in enumerate(tables.measurer.variants)}

    def values(edit: str, metric: str) -> Array:
        found = np.full((n, depth), np.nan)
        for layer in range(depth):
            # The lens behind the last block is the unedited model; a block that cannot be dropped has no value.
            row = rows.get((edit, layer), 0 if edit == LENS else None)
            if row is not None:
                found[:, layer] = sample.values[:, row, METRICS.index(metric)]
        return found

    of_predictions = np.repeat(sample.counts[:, None], depth, 1)
    pairs = {
        "drop_kl_nats": (values(DROP, "kl_nats"), of_predictions),
        "lens_kl_nats": (values(LENS, "kl_nats"), of_predictions),
        "lens_entropy_bits": (values(LENS, "entropy_bits"), of_predictions),
    }
    near = [tables.sums(layer, "attention", "attention_prev5") for layer in range(depth)]
    pairs["attention_prev5"] = np.stack([one for one, _ in near], 1), np.stack([count for _, count in near], 1)

    def draw(rng: np.random.Generator) -> Signals:
        weights = np.bincount(rng.integers(n, size=n), minlength=n).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = {name: (weights @ sums) / (weights @ count) for name, (sums, count) in pairs.items()}
        return drawn | _drawn_neurons(counts, rng)

    return draw


def _drawn_neurons(counts: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    of = counts["neurons"]
    if not all(np.isfinite(values).all() for values in counts.values()):
        return counts
    shares = np.stack(
        [counts["prediction"], counts["suppression"], of - counts["prediction"] - counts["suppression"]], 1
    )
    drawn = rng.multinomial(of.astype(int), shares / np.maximum(of, 1)[:, None])
    return {"prediction": drawn[:, 0].astype(float), "suppression": drawn[:, 1].astype(float), "neurons": of}


def describe_stages(frame: pd.DataFrame) -> str:
    """What a table of `stages` shows and what it does not, as a paragraph."""
    limits = [Boundary(**record) for record in frame.attrs["boundaries"]]
    depth = len(frame)
    parts = []
    first = 0
    for limit in limits:
        if limit.layer is None:
            parts.append(f"Where {limit.ends} gives way to {limit.begins} was not found: {limit.why}.")
            continue
        parts.append(
            f"{limit.ends.capitalize()} ends before layer {limit.layer} of {depth}{_interval(limit)}: {limit.why}."
        )
        first = limit.layer
    told = sum(limit.layer is not None for limit in limits)
    names = list(dict.fromkeys(frame.stage))
    number = {
        0: "None of the three limits",
        1: "One of the three limits",
        2: "Two of the three limits",
        3: "All three limits",
    }[told]
    head = f"{number} between the four stages {'was' if told < 2 else 'were'} found"
    last = f"Layers {first} to {depth - 1} are" if first < depth - 1 else f"Layer {first} is"
    tail = f"{last} {names[-1]}." if told else ""
    return " ".join(filter(None, [f"{head}.", *parts, tail]))


def _interval(limit: Boundary) -> str:
    if limit.low is None:
        return " (a single sequence: no interval)"
    return (
        f" (95 % of resamples: {limit.low})"
        if limit.low == limit.high
        else f" (95 % of resamples: {limit.low} to {limit.high})"
    )
