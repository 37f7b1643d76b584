"""Measure signals of every layer on text, one function for each signal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..models.anatomy import Anatomy
from ..runtime.inputs import as_tokens
from ..sweeps.quantities import ATTENTION, NORMS, SIGNALS, SIMILARITY
from .signal_tables import FROM_TEXT, LENS, measure_tables

Tokens = torch.Tensor | Sequence[Sequence[int]]


def lens(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """Measure the logit lens: predictions read from the stream after each block by the final norm and unembedding.

    Each block costs one readout. Before measuring, the readout after the last block is checked against the model's own
    logits.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: as for `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        One row for each block: layer, relative_depth, tokens, sequences, and the means over all positions that have a
        next token: lens_kl_nats (KL(final || lens)), lens_entropy_bits, lens_agreement (share of positions where the
        lens has the model's own top token). Each has a standard error over sequences (lens_kl_nats_sem).
    """
    return measure(model, tokens, [LENS], **options)[LENS]


def attention(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """Measure how much attention goes to the five previous tokens, as a mean over heads.

    The weights are computed from the queries, keys and log-sum-exps of the model's own attention kernel, without a
    tokens x tokens matrix.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: as for `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        One row for each block: layer, relative_depth, tokens (those with five tokens before them), sequences, mixer
        (the class that mixes tokens), attention_prev5 (the share of all attention that goes to the five previous
        tokens: their sum, as a mean over heads and positions that have five) and attention_prev5_mean (mean over all
        pairs of a token and one of its five previous tokens, as in figure 4 of the paper). Each has a standard error
        over sequences. NaN for blocks without softmax attention.
    """
    return measure(model, tokens, [ATTENTION], **options)[ATTENTION]


def norms(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """Measure the norms of what attention and MLP add to the residual stream, as means over tokens.

    A contribution is what is added to the stream, not the output of a module: output norms and multipliers are applied,
    and the residual is subtracted where a module adds it itself. If every norm that reads the stream is a LayerNorm,
    the mean over channels is removed, because no norm passes it on.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: as for `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        One row for each block: layer, relative_depth, tokens, sequences, mixer (the class that mixes tokens),
        attention_norm and mlp_norm (L2), attention_to_mlp_ratio (ratio of the means). Each has a standard error over
        sequences. NaN for a branch that the block does not have.
    """
    return measure(model, tokens, [NORMS], **options)[NORMS]


def similarity(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """Measure how a block's contribution changes when it is swapped with the next block, as mean cosines over tokens.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: as for `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        Three rows for each swap of blocks l and l + 1: layer (l), part ("attention", "mlp" or "block"), and cosines
        between two contributions to the stream: self (block l, swapped and not swapped), index (at position l: block
        l + 1 when swapped, block l when not), adjacent (blocks l and l + 1, not swapped). Each has a standard error
        over sequences.
    """
    return measure(model, tokens, [SIMILARITY], **options)[SIMILARITY]


def measure(
    model: nn.Module,
    tokens: torch.Tensor | Sequence[Sequence[int]],
    signals: Collection[str] = (LENS, *SIGNALS),
    *,
    attention_mask: torch.Tensor | None = None,
    batch_size: int | None = None,
    blocks: str | None = None,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, pd.DataFrame]:
    """Measure several signals in one pass over the data.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        signals: any of "lens", "attention", "norms", "similarity", "cka", "cosine", "stream" and "drop" (the sweep's
            table of dropped blocks).
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: sequences per batch; chosen by free memory if not given.
        blocks: path of the list of blocks ("model.layers"), if it cannot be found automatically.
        anatomy: the model's anatomy; found if not given.
        progress: called after each batch with the number of sequences done and the total.

    Returns:
        One table for each signal, by its name; see the functions of these names.

    Raises:
        PlanError: an unknown signal, or tokens that cannot be measured.
        UnsupportedEditError: the model's list of blocks cannot be identified.
        MeasurementError: predictions that are NaN or infinite, or too little memory.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> tables = ls.analyses.measure(model, tokens, ["lens", "norms"])
        >>> list(tables), len(tables["lens"])
        (['lens', 'norms'], 30)
    """
    signals = [signals] if isinstance(signals, str) else signals
    ids, mask = as_tokens(tokens, attention_mask)
    tables = measure_tables(model, ids, mask, signals, batch_size, blocks, anatomy, progress)
    return {signal: tables.table(signal) for signal in FROM_TEXT if signal in signals}
