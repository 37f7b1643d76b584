"""A sweep: what every edit does to a model, in one pass over the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..metrics.aggregation import MetricSums
from ..models.anatomy import Anatomy
from ..models.block_list import find_decoder_blocks
from ..plans.variants import variants
from ..runtime.inputs import as_tokens
from .measurer import Measurer
from .results import results_table


def sweep(
    model: nn.Module,
    routes: Any,
    tokens: torch.Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: torch.Tensor | None = None,
    layers: range | None = None,
    batch_size: int | None = None,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    compiled: bool = False,
    order: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Measure edited models against the unedited one, on the same tokens, sharing every block call that can be shared.

    What is measured equals `compare` with each of the edits, up to rounding. The model is not changed.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        routes: what to measure: families of edits ("swap,drop"; see `layersurgery.plans.variants.FAMILIES`), a plan, its text, a route, a list
            of these, or a dictionary of plans by name.
        tokens: token ids, (sequences, length).
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        layers: for families, only edits that touch none but these blocks.
        batch_size: sequences at once; by the free memory if not given. Where memory runs out, batches are halved, and a warning says so.
        blocks: path of the list of blocks ("model.layers"), where it cannot be found.
        anatomy: the model's, found if not given.
        compiled: have torch compile the blocks; takes some seconds once, and each block is first shown equal to itself uncompiled.
        order: which way to go through the edited models, "depth-first" or "layer-major"; the digits are the same. By default layer by layer
            where accelerate keeps weights of blocks on disk or in main memory, so that each block is brought in once a batch.
        progress: is called after each batch with the number of sequences done and of all.

    Returns:
        One row for each edit, the unedited model first. Columns: model, name, plan, edit, layer (the first block named), relative_depth,
        depth, route, tokens, sequences, and kl_nats, agreement (0 to 1), entropy_bits, entropy_change_bits, loss_nats, loss_change_nats,
        accuracy (0 to 1), each with its standard error over sequences (kl_nats_sem).

    Raises:
        PlanError: an edit that does not fit the model, or tokens that cannot be measured.
        UnsupportedEditError: blocks of this architecture cannot be run in another order.
        MeasurementError: predictions that are no numbers, or too little memory.

    Example:
        >>> frame = sweep(model, "swap,drop", tokens)  # doctest: +SKIP
        >>> frame[frame.edit == "drop"].set_index("layer").kl_nats  # doctest: +SKIP
    """
    ids, mask = as_tokens(tokens, attention_mask)
    chosen = variants(routes, len(find_decoder_blocks(model, blocks).blocks), layers)
    measurer = Measurer(model, chosen, blocks=blocks, anatomy=anatomy, compiled=compiled, order=order)
    if measurer.skipped:
        plan, reason = next(iter(measurer.skipped.items()))
        warnings.warn(f"{len(measurer.skipped)} edits are left out, '{plan}' first: {reason}", stacklevel=2)
    sums = MetricSums(len(measurer.variants))
    size = min(batch_size or measurer.suggest(ids.shape[1]), len(ids))
    done = 0
    while done < len(ids):
        measured = measurer.measure(ids[done : done + size], mask[done : done + size])
        for offset, count in enumerate(measured.counts):
            if count:
                sums.add(done + offset, count, measured.values[offset])
        done += len(measured.counts)
        if progress is not None:
            progress(done, len(ids))
    return results_table(measurer.variants, sums, getattr(model, "name_or_path", "") or type(model).__name__)
