"""Build the result tables of a sweep, and summarize them in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import registry
from ..metrics.aggregation import SequenceSums
from ..metrics.intervals import CONFIDENCE
from ..metrics.reference import METRICS
from ..metrics.tails import SUMS
from ..plans.families import FAMILIES
from ..plans.variants import Variant
from .precision import Precision, row_intervals

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_BOUNDS = {column.name: column.bounds for column in registry.METRICS}
FIXED, STOPPING = "for this number of sequences", "at every number of sequences"
"""Names of what a table's intervals hold for; see `metrics.intervals`."""
CELL = ("from", "to")
"""Columns of an edit's place in the map of its family: the row and the column; see `plans.families.Family.axes`."""


def results_table(
    variants: Sequence[Variant],
    sums: SequenceSums,
    model: str,
    precision: Precision | None = None,
) -> pd.DataFrame:
    """Build the table of results: one row for each measured model, the unedited one first.

    Args:
        variants: the models, in the order of the sums' rows; the first is the unedited one.
        sums: the measured sums.
        model: the model's name.
        precision: the precision at which an edit was finished; None if all text was measured.
    """
    import pandas as pd

    means, errors = sums.means_and_errors()
    depth = len(variants[0].route)
    kind = f"{100 * (precision.confidence if precision else CONFIDENCE):g} %, {STOPPING if precision else FIXED}"
    has_cells = any(variant.cell for variant in variants)
    rows = []
    for number, variant in enumerate(variants):
        values, counts = sums.of_row(number)
        row: dict[str, Any] = {
            "model": model,
            "name": variant.name,
            "plan": variant.plan,
            "edit": variant.edit,
            "layer": variant.layer,
            "relative_depth": None if variant.layer is None else variant.layer / max(1, depth - 1),
            "depth": depth,
            "route": str(variant.route),
            **({} if not has_cells else dict(zip(CELL, variant.cell or (None, None), strict=True))),
            "tokens": int(counts.sum()),
            "sequences": len(counts),
        }
        intervals = row_intervals(precision, values, counts, means[number], errors[number])
        for column, (metric, (low, high)) in enumerate(zip(METRICS, intervals, strict=True)):
            row[metric] = means[number, column]
            row[f"{metric}_sem"] = errors[number, column]
            row[f"{metric}_low"], row[f"{metric}_high"] = np.clip((low, high), *_BOUNDS[metric])
        row |= sums.tail_columns(number)
        row["interval"] = kind
        if precision is not None:
            row["precise"] = None if not number else precision.reached(values, counts)
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.astype({"layer": "Int64", "relative_depth": "float64", **dict.fromkeys(CELL * has_cells, "Int64")})


def with_layer_kinds(frame: pd.DataFrame, kinds: Sequence[str], width: int = 1) -> pd.DataFrame:
    """Return a table with the kinds of its layers in a column `layer_kind`; unchanged if all layers are of one kind.

    An edit of adjacent blocks of several kinds has them in their order, joined by " + ".

    Args:
        frame: a table with the columns layer and relative_depth.
        kinds: the kind of each layer of the model; empty if all are of one kind.
        width: number of adjacent blocks that a row is about, where the table has no column `edit`.
    """
    if not kinds:
        return frame
    widths = [width] * len(frame) if "edit" not in frame else [_width(edit) for edit in frame.edit]
    names = [
        " + ".join(dict.fromkeys(kinds[int(layer) : int(layer) + blocks])) if blocks else None
        for layer, blocks in zip(frame.layer.fillna(0), widths, strict=True)
    ]
    place = frame.columns.get_loc("relative_depth") + 1
    return frame.assign(layer_kind=names)[[*frame.columns[:place], "layer_kind", *frame.columns[place:]]]


def _width(edit: str) -> int:
    """Return the number of adjacent blocks that each edit of a family changes; 0 if they differ in it."""
    return FAMILIES[edit].width if edit in FAMILIES else 0


def sequence_table(variants: Sequence[Variant], sums: SequenceSums) -> pa.Table:
    """Build the table of sums: one row for each sequence and each model that was measured on it.

    The means, standard errors and intervals of the results can be computed again from it.
    """
    import numpy as np
    import pyarrow as pa

    each = len(variants)
    columns: dict[str, Any] = {
        "sequence": pa.array(np.repeat(sums.numbers, each), pa.int32()),
        "row": pa.array(np.tile(np.arange(each), len(sums)), pa.int32()),
        "edit": pa.array([variant.edit for variant in variants] * len(sums)).dictionary_encode(),
        "plan": pa.array([variant.plan for variant in variants] * len(sums)).dictionary_encode(),
        "tokens": pa.array(np.repeat(sums.counts.astype("int64"), each), pa.int32()),
    }
    for column, metric in enumerate(METRICS):
        columns[f"{metric}_sum"] = pa.array(sums.values[:, :, column].reshape(-1))
    if sums.tails is not None:
        for column, name in enumerate((*(f"{name}_sum" for name in SUMS), "kl_nats_max")):
            columns[name] = pa.array(sums.tails.values[:, :, column].reshape(-1))
    table = pa.table(columns)
    return table if sums.used is None else table.filter(pa.array(sums.used.reshape(-1)))


def intermediate_rows(frame: pd.DataFrame, edit: str) -> pd.DataFrame:
    """Return the rows of one family of edits that change neither the first two blocks nor the last two."""
    rows = frame[frame.edit == edit]
    last_offset = max(0, FAMILIES[edit].width - 1) if edit in FAMILIES else 0  # a swap also changes the next block
    return rows[(rows.layer >= 2) & (rows.layer + last_offset <= rows.depth - 3)]


def summary_sentence(frame: pd.DataFrame) -> str:
    """Summarize in a sentence how many predictions stay the same when intermediate layers are edited.

    Args:
        frame: results of a sweep.

    Returns:
        The range and median of the agreement for each family of edits. Empty if the model has no layers other than the
        first two and the last two.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> ls.summary_sentence(ls.sweep(model, "drop", tokens))
        'intermediate layers keep ... % of predictions under drop, median ... %'
    """
    clauses = []
    for edit in (name for name, family in FAMILIES.items() if family.width):
        agreement = 100 * intermediate_rows(frame, edit).agreement
        if len(agreement) and agreement.notna().all():
            low, high, median = (f"{share:.0f}" for share in (agreement.min(), agreement.max(), agreement.median()))
            clauses.append(
                f"{low} % under {edit}" if low == high else f"{low}-{high} % under {edit}, median {median} %"
            )
    if not clauses:
        return ""
    first = clauses[0].replace(" % under", " % of predictions under", 1)
    return "intermediate layers keep " + "; ".join([first, *clauses[1:]])


def precision_sentence(frame: pd.DataFrame) -> str:
    """Say in a sentence how precisely the text tells the edits' agreement and KL, or how many edits are as asked.

    Args:
        frame: results of a sweep.

    Returns:
        Half widths of the intervals, medians over the edits. Empty if there are no intervals, as for one sequence or a
        table of an earlier version.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> frame = ls.sweep(model, "drop", "pydoc", tokenizer=tokenizer, tokens=128, context=32)
        >>> ls.sweeps.results.precision_sentence(frame)
        'for a typical edit, the agreement is known to ... percentage points and the KL to ... % (...)'
    """
    if "interval" not in frame:
        return ""
    edited = frame[frame.edit != "none"]
    points = (50 * (edited.agreement_high - edited.agreement_low)).median()
    share = (50 * (edited.kl_nats_high - edited.kl_nats_low) / edited.kl_nats.abs().where(edited.kl_nats != 0)).median()
    if not (math.isfinite(points) and math.isfinite(share)):
        return ""
    kind = frame.interval.iloc[0]
    points, share = (float(f"{width:.2g}") for width in (points, share))  # two digits; 240 %, not 2.4e+02 %
    known = (
        f"for a typical edit, the agreement is known to {points:g} percentage points and the KL to {share:g} % (half "
        f"widths of intervals; {kind})"
    )
    if "precise" not in frame:
        return known
    reached = int(edited.precise.astype(bool).sum())
    return f"{reached} of {len(edited)} edits are known as precisely as asked; {known}"
