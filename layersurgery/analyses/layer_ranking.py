"""Rank layers by the cost of their removal, measured and estimated by cheap scores from the literature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import nn

from ..errors import MeasurementError, PlanError, warn
from ..metrics.aggregation import SequenceSums
from ..metrics.reference import METRICS
from ..models.anatomy import Anatomy
from ..models.block_list import find_decoder_blocks
from ..plans.route import whole_number
from ..runs.tables import as_records
from ..runtime.inputs import as_tokens
from ..sweeps.quantities import CHANGE
from ..sweeps.race import Race
from ..sweeps.sweep import collect_sums
from .signal_tables import DROP, SignalTables, make_measurer

CRITERIA = {"kl": "kl_nats", "influence": "block_influence", "angular": "angular_distance"}
"""Criteria for choosing layers to remove, and the score of each. The layer with the lowest score is removed first."""
SIGNALS = (CHANGE, DROP)
_DISTANCES = ("angular_distance", "angular_distance_last")
_DROPPED = ("kl_nats", "agreement", "loss_change_nats", "entropy_change_bits")


def max_span(depth: int, spans: int | None = None) -> int:
    """Return the length in blocks of the longest span to measure.

    It is half of the model's depth if not given, and at least one block remains.
    """
    longest = 0 if spans is None else whole_number(spans, "spans")
    return max(1, min(longest or depth // 2, depth - 1))


def check_lowest(lowest: int | None, depth: int) -> int | None:
    """Return how many layers a race searches; None for no race.

    Raises:
        PlanError: there are not so many others.
    """
    if lowest is None:
        return None
    number = whole_number(lowest, "lowest")
    if not 1 <= number < depth:
        raise PlanError(f"cannot search the {number} lowest of {depth} layers; give 1 to {depth - 1}")
    return number


def rank(
    model: nn.Module,
    tokens: torch.Tensor | Sequence[Sequence[int]],
    *,
    spans: int | None = None,
    lowest: int | None = None,
    attention_mask: torch.Tensor | None = None,
    batch_size: int | None = None,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Rank layers by the cost of their removal: measured, and estimated by two cheap scores, in one pass over the data.

    Measured: KL from the unedited model when the block is dropped, and the other metrics of a sweep. Estimated: block
    influence, 1 - cosine between the stream before and after the block (ShortGPT, arXiv 2403.03853), and the angular
    distance over spans of blocks, arccos(cosine) / pi (The Unreasonable Ineffectiveness of the Deeper Layers, arXiv
    2403.17887). Both scores are means over all real tokens. The authors of the second use only the last token of each
    sequence; this value is given as well, as angular_distance_last.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        spans: longest span of blocks to measure angular distances over; half of the model's depth if not given.
        lowest: find so many layers with the lowest KL by a race: a layer is measured until it is sure, with an error
            probability of 5 %, whether it is one of them. By default every layer is measured on all text.
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: sequences per batch; chosen by free memory if not given.
        blocks: path of the list of blocks ("model.layers"), if it cannot be found automatically.
        anatomy: the model's anatomy; found if not given.
        progress: called after each batch with the number of sequences done and the total.

    Returns:
        One row for each block: layer, relative_depth, tokens, sequences, kl_nats, agreement, loss_change_nats,
        entropy_change_bits (all four for the model without the block), block_influence, angular_distance (over the
        block alone), angular_distance_last, each with a standard error over sequences; and kl_rank, influence_rank,
        angular_rank (1 is removed first). After a race, `race` says what is sure of a layer ("lowest", "higher" or
        "open"), layers that are surely higher rank last, and kl_tokens says on how much text its KL was measured; the
        two scores are of all text that the race took. `analyses.spans(frame)` returns the angular distances over longer
        spans.

    Raises:
        PlanError: tokens that cannot be measured.
        UnsupportedEditError: the model's blocks cannot be run in another order.
        MeasurementError: predictions that are NaN or infinite, or too little memory.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> ranks = ls.rank(model, tokens)
        >>> len(ranks.sort_values("kl_rank").layer.head(6))
        6
    """
    ids, mask = as_tokens(tokens, attention_mask)
    depth = len(find_decoder_blocks(model, blocks).blocks)
    measurer = make_measurer(model, SIGNALS, depth, blocks=blocks, anatomy=anatomy, spans=max_span(depth, spans))
    lowest = check_lowest(lowest, depth)
    rule = None if lowest is None else Race(lowest)
    sums = collect_sums(measurer, ids, mask, batch_size, progress, rule)
    tables = SignalTables(measurer, sums, type(model).__name__, rule)
    if tables.skipped:
        name, reason = next(iter(tables.skipped.items()))
        warn(f"{name} was skipped: {reason} ({len(tables.skipped)} skipped in total, see frame.attrs['skipped'])")
    frame = rank_table(tables)
    frame.attrs |= {"spans": as_records(span_table(tables)), "skipped": tables.skipped}
    return frame


def spans(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the angular distances over spans of blocks that `rank` measured.

    Args:
        frame: the table that `rank` returned, or `read_results` for the results of `rank`.

    Returns:
        One row for each span: layer (its first block), relative_depth, tokens, sequences, span (number of blocks),
        angular_distance and angular_distance_last, each with a standard error over sequences.

    Raises:
        MeasurementError: the table has no spans.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> spans = ls.analyses.spans(ls.rank(model, tokens, spans=3))
        >>> spans.groupby("span").angular_distance.count().to_dict()
        {1: 30, 2: 29, 3: 28}
    """
    if "spans" not in frame.attrs:
        raise MeasurementError(
            "this table has no spans: give the table that rank or read_results returned; pandas drops what a table "
            "holds besides its columns when it joins several"
        )
    table = pd.DataFrame(frame.attrs["spans"])
    floats = [name for name in table if name.removesuffix("_sem") in ("relative_depth", *_DISTANCES)]
    return table.astype({"layer": "Int64", **dict.fromkeys(floats, "float64")})


def rank_table(tables: SignalTables) -> pd.DataFrame:
    """Build the table of `rank`."""
    change = tables.change()
    frame = change[change.span == 1].drop(columns="span").reset_index(drop=True)
    dropped = tables.drop()
    dropped = dropped[dropped.edit == DROP].set_index("layer")
    position = list(frame.columns).index("sequences") + 1
    for name in reversed([column for metric in _DROPPED for column in (metric, f"{metric}_sem")]):
        frame.insert(position, name, dropped[name].reindex(frame.layer).to_numpy(float))
    for criterion, score in CRITERIA.items():
        frame[f"{criterion}_rank"] = frame[score].rank(method="first").astype("Int64")
    if "race" in dropped:
        frame["kl_tokens"] = dropped.tokens.reindex(frame.layer).astype("Int64").to_numpy()
        frame["race"] = dropped.race.reindex(frame.layer).to_numpy()
        assert isinstance(tables.rule, Race)
        variants = tables.measurer.variants
        ranked = [variants[row].layer for row in race_order(tables.rule, tables.sums_by_sequence)]
        places = {layer: place for place, layer in enumerate(ranked, 1)}
        frame["kl_rank"] = pd.array([places.get(layer) for layer in frame.layer], dtype="Int64")
        frame.loc[frame.kl_nats.isna(), "kl_rank"] = pd.NA
    return frame


def race_order(race: Race, sums: SequenceSums) -> list[int]:
    """Return the rows that raced, the lowest first: those surely lowest, those left open, those surely higher.

    Means on different text cannot be compared, so within each of the three they are taken over the sequences that all
    of its rows were measured on. Rows that are not finite are last.
    """
    metric = METRICS.index(race.metric)
    classes: dict[str, list[int]] = {"lowest": [], "open": [], "higher": []}
    for row in range(1, sums.values.shape[1]):
        classes[race.outcome(row)].append(row)
    order: list[int] = []
    for rows in classes.values():
        shared = min((len(sums.of_row(row)[1]) for row in rows), default=0)
        totals = {row: float(sums.of_row(row)[0][:shared, metric].sum()) for row in rows}
        order += sorted(rows, key=lambda row: totals[row] if math.isfinite(totals[row]) else math.inf)
    return order


def span_table(tables: SignalTables) -> pd.DataFrame:
    """Build the table of spans."""
    change = tables.change()
    return change.drop(columns=["block_influence", "block_influence_sem"])
