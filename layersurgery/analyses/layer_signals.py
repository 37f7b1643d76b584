"""The questions that text answers, one function each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..models.anatomy import Anatomy
from ..runtime.inputs import as_tokens
from ..sweeps.observer import ATTENTION, NORMS, SIGNALS, SIMILARITY
from .signal_tables import FROM_TEXT, LENS, measure_tables

Tokens = torch.Tensor | Sequence[Sequence[int]]


def lens(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """The logit lens: what the model would say behind each of its blocks, read by its own final norm and unembedding.

    Each block costs one readout. What is read behind the last block is first shown to be the model's own output.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: of `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        One row for each block: layer, relative_depth, tokens, sequences, and over all positions that have a next token lens_kl_nats (mean
        KL(final || lens)), lens_entropy_bits, lens_agreement (share of positions with the model's own top token), each with its standard
        error over sequences (lens_kl_nats_sem).
    """
    return measure(model, tokens, [LENS], **options)[LENS]


def attention(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """How much attention goes to the five tokens before, mean over heads.

    The weights are worked out from the queries, keys and sums of the model's own attention kernel; no tokens x tokens matrix is made beside it.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: of `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        One row for each block: layer, relative_depth, tokens (with five before them), sequences, mixer (the class that mixes tokens),
        attention_prev5 (sum over the five tokens before, mean over heads and positions that have five: a share of all attention) and
        attention_prev5_mean (mean over all pairs of a token and one of the five before it, the paper's figure 4), each with its standard
        error over sequences. NaN for blocks that do not attend by softmax.
    """
    return measure(model, tokens, [ATTENTION], **options)[ATTENTION]


def norms(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """The size of what attention and MLP add to the residual stream, mean over tokens.

    Contributions, not outputs of modules: behind norms and multipliers, and without the residual where a module adds it itself. Where every
    norm that reads the stream is a LayerNorm, without the mean over channels, which nobody reads.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: of `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        One row for each block: layer, relative_depth, tokens, sequences, mixer (the class that stands for attention), attention_norm and
        mlp_norm (L2), attention_to_mlp_ratio (of the means), each with its standard error over sequences. NaN for what a block does not have.
    """
    return measure(model, tokens, [NORMS], **options)[NORMS]


def similarity(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """How a block's contribution changes when it is swapped with the next: mean cosines over tokens.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: of `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        Three rows for each swap of blocks l and l + 1: layer (l), part ("attention", "mlp" or "block"), and cosines of what is added to the
        stream: self (block l, swapped and not), index (block l + 1 at position l, and block l there), adjacent (blocks l and l + 1, not
        swapped), each with its standard error over sequences.
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
    """Several signals in one pass over the data.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        signals: of "lens", "attention", "norms", "similarity" and "drop" (the sweep's table of dropped blocks).
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: sequences at once; by the free memory if not given.
        blocks: path of the list of blocks ("model.layers"), where it cannot be found.
        anatomy: the model's, found if not given.
        progress: is called after each batch with the number of sequences done and of all.

    Returns:
        A table for each signal, by its name; see the functions of these names.

    Raises:
        PlanError: an unknown signal, or tokens that cannot be measured.
        UnsupportedEditError: the model's blocks cannot be told apart.
        MeasurementError: predictions that are no numbers, or too little memory.

    Example:
        >>> tables = measure(model, tokens, ["lens", "norms"])  # doctest: +SKIP
        >>> tables["lens"].plot("relative_depth", "lens_kl_nats")  # doctest: +SKIP
    """
    signals = [signals] if isinstance(signals, str) else signals
    ids, mask = as_tokens(tokens, attention_mask)
    tables = measure_tables(model, ids, mask, signals, batch_size, blocks, anatomy, progress)
    return {signal: tables.of(signal) for signal in FROM_TEXT if signal in signals}
