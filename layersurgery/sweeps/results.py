"""Results of a sweep as tables: their columns, and a sentence that sums them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..metrics.aggregation import MetricSums
from ..metrics.reference import METRICS
from ..plans.variants import Variant

if TYPE_CHECKING:
    import pyarrow as pa


def results_table(variants: Sequence[Variant], sums: MetricSums, model: str) -> pd.DataFrame:
    """One row for each model measured, the unedited one first.

    Args:
        variants: the models, in the order of the sums' routes; the first is the unedited one.
        sums: what was measured.
        model: its name.
    """
    means, errors = sums.means(), sums.errors()
    depth = len(variants[0].route)
    rows = []
    for number, variant in enumerate(variants):
        row: dict[str, Any] = {
            "model": model,
            "name": variant.name,
            "plan": variant.plan,
            "edit": variant.edit,
            "layer": variant.layer,
            "relative_depth": None if variant.layer is None else variant.layer / max(1, depth - 1),
            "depth": depth,
            "route": str(variant.route),
            "tokens": sums.tokens,
            "sequences": len(sums),
        }
        for place, metric in enumerate(METRICS):
            row[metric] = means[number, place]
            row[f"{metric}_sem"] = errors[number, place]
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.astype({"layer": "Int64", "relative_depth": "float64"})


def sequence_table(variants: Sequence[Variant], sums: MetricSums) -> pa.Table:
    """Sums of each sequence: one row for each sequence and model, from which the results' means and errors can be had again."""
    import numpy as np
    import pyarrow as pa

    sequences = [sequence for sequence, _, _ in sums]
    values = np.stack([array for _, _, array in sums])
    each = len(variants)
    columns: dict[str, Any] = {
        "sequence": pa.array(np.repeat(sequences, each), pa.int32()),
        "row": pa.array(np.tile(np.arange(each), len(sequences)), pa.int32()),
        "edit": pa.array([variant.edit for variant in variants] * len(sequences)).dictionary_encode(),
        "plan": pa.array([variant.plan for variant in variants] * len(sequences)).dictionary_encode(),
        "tokens": pa.array(np.repeat([count for _, count, _ in sums], each), pa.int32()),
    }
    for place, metric in enumerate(METRICS):
        columns[f"{metric}_sum"] = pa.array(values[:, :, place].reshape(-1))
    return pa.table(columns)


def intermediate(frame: pd.DataFrame, edit: str) -> pd.DataFrame:
    """Rows of one family of edits that touch neither the first two blocks nor the last two."""
    rows = frame[frame.edit == edit]
    reach = 1 if edit == "swap" else 0
    return rows[(rows.layer >= 2) & (rows.layer + reach <= rows.depth - 3)]


def summary_sentence(frame: pd.DataFrame) -> str:
    """How much of the predictions intermediate layers keep, in a sentence; empty where no layer is intermediate."""
    parts = []
    for edit in ("swap", "drop", "skip-attention", "skip-mlp"):
        kept = 100 * intermediate(frame, edit).agreement
        if len(kept) and kept.notna().all():
            parts.append(f"{kept.min():.0f}-{kept.max():.0f} % under {edit}, median {kept.median():.0f} %")
    if not parts:
        return ""
    first = parts[0].replace(" % under", " % of predictions under", 1)
    return "intermediate layers keep " + "; ".join([first, *parts[1:]])
