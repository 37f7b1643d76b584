"""Measure the effect of many edits on a model's predictions in one pass over the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import warn
from ..metrics.aggregation import SequenceSums
from ..models.anatomy import Anatomy
from ..models.means import Means
from ..models.taken_blocks import TakenBlocks
from ..plans.variants import Variant
from ..registry import PROPAGATION
from .measurer import Measurer
from .precision import Precision
from .propagation_results import propagation_rows
from .read_positions import Reads
from .results import results_table, with_layer_kinds
from .row_progress import RowProgress, StopRule

if TYPE_CHECKING:
    import pandas as pd


def sweep_tokens(
    model: nn.Module,
    edited_models: Sequence[Variant],
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    label: str,
    batch_size: int | None = None,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    compiled: bool = False,
    order: str | None = None,
    precision: Precision | StopRule | None = None,
    read: Reads | None = None,
    propagation: bool = False,
    means: Means | None = None,
    tails: bool = False,
    progress: Callable[[int, int], None] | None = None,
    table: Callable[[Sequence[Variant], SequenceSums, str, Any], pd.DataFrame] = results_table,
    taken: TakenBlocks | None = None,
) -> pd.DataFrame:
    """Measure edited models against the unedited one on the same tokens, in memory.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        edited_models: the models to measure.
        ids: token ids, (sequences, length).
        mask: 1 for a token and 0 for padding, of the same shape.
        label: the model's name in the table.
        batch_size: number of sequences in a batch; by default chosen from the free memory. If memory runs out, batches
            are halved, with a warning.
        blocks: path of the list of blocks ("model.layers"), if it cannot be found automatically.
        anatomy: the model's anatomy; found if not given.
        compiled: let torch compile the blocks. This takes some seconds once, and each compiled block is first checked
            against the uncompiled one.
        order: order in which the edited models are run, "depth-first" or "layer-major"; the digits are the same. The
            default is depth-first, and layer-major if accelerate keeps weights of blocks on disk or in main memory, so
            that each block is loaded once per batch.
        precision: measure each edit until it is known this precisely, or until a rule has enough; None to measure all
            tokens.
        read: the positions at which predictions are read; None for all.
        propagation: measure how much what later blocks add changes, too.
        means: the means of the model's branches, for edits that add them.
        tails: measure the columns of the tails (`registry.TAILS`), too.
        progress: called after each batch with the number of sequences done and the number of all sequences.
        table: makes the table of results, as `results_table` does.
        taken: the blocks of other checkpoints that the edited models have; None for none.

    Returns:
        The table of results, one row for each model, the unedited one first. With propagation, its `attrs` have the
        rows of the table of propagation.
    """
    measurer = Measurer(
        model, edited_models, blocks=blocks, anatomy=anatomy, compiled=compiled, order=order, read=read,
        propagation=propagation, taken=taken, means=means, tails=tails,
    )  # fmt: skip
    if measurer.skipped:
        plan, reason = next(iter(measurer.skipped.items()))
        warn(f"{len(measurer.skipped)} edits are not measured; the first of them is '{plan}': {reason}")
    for what, reason in () if measurer.propagation is None else measurer.propagation.skipped.items():
        warn(f"{what} is not measured: {reason}")
    rule = precision.for_text(mask) if isinstance(precision, Precision) else precision
    sums = collect_sums(measurer, ids, mask, batch_size, progress, rule)
    frame = with_layer_kinds(table(measurer.variants, sums, label, rule), measurer.layer_kinds)
    if measurer.propagation is not None:
        frame.attrs[PROPAGATION] = propagation_rows(measurer.variants, measurer.propagation, sums, label)
    return frame


def collect_sums(
    measurer: Measurer,
    ids: torch.Tensor,
    mask: torch.Tensor,
    batch_size: int | None,
    progress: Callable[[int, int], None] | None,
    rule: StopRule | None = None,
) -> SequenceSums:
    """Measure all tokens once, batch by batch, and return the sums of each sequence.

    Args:
        measurer: the model and its variants.
        ids: tokens, (sequences, length).
        mask: 1 for a token and 0 for padding, the same shape.
        batch_size: number of sequences in a batch; chosen from the free memory if None.
        progress: called after each batch with the number of sequences done and the number of all sequences.
        rule: says after each batch which rows need no more text; None to measure all rows on all text.
    """
    size = min(batch_size or measurer.suggest(ids.shape[1], stops=rule is not None), len(ids))
    batches = measurer.batches(ids, mask, size, fixed=batch_size is not None)
    rows = RowProgress(len(measurer.variants), len(batches), rule)
    while work := rows.next(1):
        ((batch, missing),) = work
        rows.add(batch, measurer.measure_batch(ids, mask, batches.span(batch), missing))
        if progress is not None:
            progress(batches.ends[batch], len(ids))
    sums = rows.sums()
    if non_finite := measurer.names_of_non_finite(sums):
        warn(f"not finite: {', '.join(non_finite[:8])}{' ...'[: 4 * (len(non_finite) > 8)]} gave NaN or infinity")
    return sums
