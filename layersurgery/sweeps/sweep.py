"""Measure the effect of many edits on a model's predictions in one pass over the tokens."""

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
    """Measure many edited models against the unedited one on the same tokens, sharing block calls between the edits.

    The results equal those of `compare` with each of the edits, up to rounding. The model is not changed.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        routes: the edits to measure: families of edits ("swap,drop"; see `layersurgery.plans.variants.FAMILIES`), a
            plan, its text, a route, a list of these, or a dictionary of plans by name.
        tokens: token ids, (sequences, length).
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        layers: for families: measure only the edits that change no blocks except these.
        batch_size: number of sequences in a batch; by default chosen from the free memory. If memory runs out, batches
            are halved, with a warning.
        blocks: path of the list of blocks ("model.layers"), if it cannot be found automatically.
        anatomy: the model's anatomy; found if not given.
        compiled: let torch compile the blocks. This takes some seconds once, and each compiled block is first checked
            against the uncompiled one.
        order: order in which the edited models are run, "depth-first" or "layer-major"; the digits are the same. The
            default is depth-first, and layer-major if accelerate keeps weights of blocks on disk or in main memory, so
            that each block is loaded once per batch.
        progress: called after each batch with the number of sequences done and the number of all sequences.

    Returns:
        One row for each edit, the unedited model first. Columns: model, name, plan, edit, layer (the first block that
        the edit names), relative_depth, depth, route, tokens, sequences, and kl_nats, agreement (0 to 1), entropy_bits,
        entropy_change_bits, loss_nats, loss_change_nats, accuracy (0 to 1), each with its standard error over sequences
        (kl_nats_sem).

    Raises:
        PlanError: an edit does not fit the model, or the tokens cannot be measured.
        UnsupportedEditError: blocks of this architecture cannot be run in another order.
        MeasurementError: the unedited model's predictions are NaN or infinite, or memory is too small for one sequence.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> frame = ls.sweep(model, "swap,drop", tokens)
        >>> frame[frame.edit == "drop"].set_index("layer").kl_nats.shape
        (30,)
    """
    ids, mask = as_tokens(tokens, attention_mask)
    edited_models = variants(routes, len(find_decoder_blocks(model, blocks).blocks), layers)
    measurer = Measurer(model, edited_models, blocks=blocks, anatomy=anatomy, compiled=compiled, order=order)
    if measurer.skipped:
        plan, reason = next(iter(measurer.skipped.items()))
        warnings.warn(
            f"{len(measurer.skipped)} edits are not measured; the first of them is '{plan}': {reason}", stacklevel=2
        )
    sums = MetricSums(len(measurer.variants))
    size = min(batch_size or measurer.suggest(ids.shape[1]), len(ids))
    done = 0
    while done < len(ids):
        result = measurer.measure(ids[done : done + size], mask[done : done + size])
        for offset, count in enumerate(result.counts):
            if count:
                sums.add(done + offset, count, result.values[offset])
        done += len(result.counts)
        if progress is not None:
            progress(done, len(ids))
    return results_table(measurer.variants, sums, getattr(model, "name_or_path", "") or type(model).__name__)
