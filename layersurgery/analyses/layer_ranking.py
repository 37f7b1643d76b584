"""Which layers a model misses least: what their removal costs, beside the cheap scores of the literature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import nn

from ..models.anatomy import Anatomy
from ..models.block_list import find_decoder_blocks
from ..runtime.inputs import as_tokens
from ..sweeps.observer import CHANGE
from .signal_tables import DROP, SignalTables, collect_sums, measurer_of

CRITERIA = {"kl": "kl_nats", "influence": "block_influence", "angular": "angular_distance"}
"""Ways of choosing layers to remove, and the score that each goes by; the least is removed first."""
SIGNALS = (CHANGE, DROP)
_DROPPED = ("kl_nats", "agreement", "loss_change_nats", "entropy_change_bits")


def max_span(depth: int, spans: int | None = None) -> int:
    """Blocks of the longest span to look at: half of a model, if nothing is asked; at least one stays behind."""
    return max(1, min(spans or depth // 2, depth - 1))


def rank(
    model: nn.Module,
    tokens: torch.Tensor | Sequence[Sequence[int]],
    *,
    spans: int | None = None,
    attention_mask: torch.Tensor | None = None,
    batch_size: int | None = None,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Order layers by what their removal costs: measured, and guessed by two cheap scores, in one pass over the data.

    Measured: KL from the unedited model when the block is dropped, and what a sweep has beside it. Guessed: block influence, 1 - cosine of
    the stream before and behind the block (ShortGPT, arXiv 2403.03853), and the angular distance over spans of blocks, arccos(cosine) / pi
    (The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887). Both means are over all real tokens; the latter's authors take
    each sequence's last, which is given beside it.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        spans: angular distances over up to so many blocks; half of the model's if not given.
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: sequences at once; by the free memory if not given.
        blocks: path of the list of blocks ("model.layers"), where it cannot be found.
        anatomy: the model's, found if not given.
        progress: is called after each batch with the number of sequences done and of all.

    Returns:
        One row for each block: layer, relative_depth, tokens, sequences, kl_nats, agreement, loss_change_nats, entropy_change_bits (of the model
        without it), block_influence, angular_distance (over the block alone), angular_distance_last, each with its standard error over sequences;
        and kl_rank, influence_rank, angular_rank (1 is missed least). `frame.attrs["spans"]` has a row for each span of blocks: layer (its
        first), span (how many), angular_distance and angular_distance_last.

    Raises:
        PlanError: tokens that cannot be measured.
        UnsupportedEditError: the model's blocks cannot be run in another order.
        MeasurementError: predictions that are no numbers, or too little memory.

    Example:
        >>> rank(model, tokens).sort_values("kl_rank").layer.head(6)  # doctest: +SKIP
    """
    ids, mask = as_tokens(tokens, attention_mask)
    depth = len(find_decoder_blocks(model, blocks).blocks)
    measurer = measurer_of(model, SIGNALS, depth, blocks=blocks, anatomy=anatomy, spans=max_span(depth, spans))
    tables = SignalTables(measurer, collect_sums(measurer, ids, mask, batch_size, progress), type(model).__name__)
    if tables.skipped:
        what, why = next(iter(tables.skipped.items()))
        warnings.warn(f"{what} is left out: {why} ({len(tables.skipped)} such in frame.attrs['skipped'])", stacklevel=2)
    frame = rank_table(tables)
    frame.attrs |= {"spans": span_table(tables), "skipped": tables.skipped}
    return frame


def rank_table(tables: SignalTables) -> pd.DataFrame:
    """The table of `rank`."""
    change = tables.change()
    frame = change[change.span == 1].drop(columns="span").reset_index(drop=True)
    dropped = tables.drop()
    dropped = dropped[dropped.edit == DROP].set_index("layer")
    place = list(frame.columns).index("sequences") + 1
    for name in reversed([column for metric in _DROPPED for column in (metric, f"{metric}_sem")]):
        frame.insert(place, name, dropped[name].reindex(frame.layer).to_numpy(float))
    for way, score in CRITERIA.items():
        frame[f"{way}_rank"] = frame[score].rank(method="first").astype("Int64")
    return frame


def span_table(tables: SignalTables) -> pd.DataFrame:
    """The table of spans."""
    change = tables.change()
    return change.drop(columns=["block_influence", "block_influence_sem"])
