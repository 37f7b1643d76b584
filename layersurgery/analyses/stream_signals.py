"""Measure the residual stream over depth: how it grows, what is added to it, and between which depths it is similar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..registry import ANALYSES, Column
from ..sweeps.quantities import CKA, COSINE, STREAM
from .layer_signals import measure

Tokens = torch.Tensor | Sequence[Sequence[int]]
_ALIKE = 0.9


def cka(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """Measure the similarity of the residual stream between all pairs of depths by linear CKA.

    State k is the stream before block k, and state L, for a model of L blocks, is the stream after the last block,
    before the final norm. HSIC between two states is estimated without bias from the tokens of one sequence (Nguyen,
    Raghu and Kornblith, arXiv 2010.15327, equation 3), and CKA is HSIC_ij / sqrt(HSIC_ii HSIC_jj) of the means over
    sequences. If every norm that reads the stream is a LayerNorm, each token's mean over channels is removed, because
    no norm passes it on. Sequences with fewer than four tokens are left out.

    Tokens weigh in HSIC with the squares of their streams' lengths. In many models the stream of the first token is
    hundreds of times as long as that of others, and CKA is then about this token alone. So it is also computed without
    the first token of each sequence.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: as for `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        One row for each pair of states: from and to (numbers of states, from <= to), cka, cka_without_first (without
        the first token of each sequence), their standard errors over sequences (cka_sem, by the delta method), and the
        tokens and sequences of cka.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> table = ls.analyses.cka(model, tokens)
        >>> len(table), round(float(table.query("to == 30").cka.iloc[-1]), 3)  # the last state with itself
        (496, 1.0)
    """
    return measure(model, tokens, [CKA], **options)[CKA]


def cosine(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """Measure the similarity of the residual stream between all pairs of depths by the cosine of each token's streams.

    States are numbered as by `cka`. The mean is over all real tokens, the first of each sequence included: however
    large its stream is, it counts as one token. If every norm that reads the stream is a LayerNorm, each token's mean
    over channels is removed.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: as for `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        One row for each pair of states: from and to (numbers of states, from <= to), cosine, its standard error over
        sequences (cosine_sem), tokens, sequences.
    """
    return measure(model, tokens, [COSINE], **options)[COSINE]


def stream(model: nn.Module, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """Measure the size of the residual stream over depth, and of what attention and MLP add to it in comparison.

    A contribution is compared with the stream that it is added to: that before the block for the first branch, and that
    plus the first branch's contribution for the second (stream + attention, as the MLP comes second). If both branches
    read the same stream (GPT-NeoX, GPT-J, Falcon), both are compared with that. If every norm that reads the stream is
    a LayerNorm, the mean over channels is removed from the stream and from contributions.

    Args:
        model: a transformers causal language model, or a wrapper around one; it is not changed.
        tokens: token ids, (sequences, length).
        options: as for `measure`: attention_mask, batch_size, blocks, anatomy, progress.

    Returns:
        One row for each block: layer, relative_depth, tokens, sequences, and means over tokens: stream_norm (L2),
        first_token_norm (the same over the first tokens of sequences, which may be hundreds of times as large) and
        stream_variance (over channels) of the stream before the block, variance_growth (ratio of the mean variances
        after and before the block), attention_to_stream and mlp_to_stream (norm of the contribution / norm of the
        stream), attention_cosine and mlp_cosine (cosine of the contribution with the stream). Each has a standard error
        over sequences. NaN for a branch that the block does not have.
    """
    return measure(model, tokens, [STREAM], **options)[STREAM]


def describe_map(frame: pd.DataFrame) -> str:
    """Describe which blocks change the stream most and least, over how many blocks it stays similar, and the ends.

    Args:
        frame: the table of `cka` or `cosine`.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.analyses.stream_signals import describe_map
        >>> pairs = {"from": [0, 0, 0, 1, 1, 2], "to": [0, 1, 2, 1, 2, 2]}
        >>> describe_map(pd.DataFrame({**pairs, "cka": [1, 0.25, 0.125, 1, 0.95, 1]})).partition("; ")[0]
        'CKA of the streams: before and after a block, lowest for block 0 (0.25) and highest for block 1 (0.95)'
    """
    about = ANALYSES[CKA if CKA in frame else COSINE].columns
    return " ".join(filter(None, (_describe(frame, shown) for shown in about if shown.name in frame)))


def _describe(frame: pd.DataFrame, shown: Column) -> str:
    cells = frame.pivot(index="from", columns="to", values=shown.name).to_numpy(float)
    depth = len(cells) - 1
    steps = np.diagonal(cells, 1)
    if not np.isfinite(steps).all():
        return ""
    label = f"{shown.label[0].upper()}{shown.label[1:]}"
    if depth == 1:
        return f"{label}: {steps[0]:.3g} before and after the only block."
    lowest, highest = int(steps.argmin()), int(steps.argmax())
    first, last = _longest_alike(cells)
    span = f"longest span of blocks over which it stays at least {_ALIKE}: {first}:{last}; " if last > first else ""
    return (
        f"{label}: before and after a block, lowest for block {lowest} ({steps[lowest]:.3g}) and highest for block "
        f"{highest} ({steps[highest]:.3g}); {span}before and after all blocks: {cells[0, depth]:.3g}."
    )


def _longest_alike(cells: np.ndarray) -> tuple[int, int]:
    """Return the first and the last state of the longest span in which all pairs are alike."""
    best, start = (0, 0), 0
    for state in range(len(cells)):
        while not (cells[start : state + 1, state] >= _ALIKE).all():
            start += 1
        best = max(best, (start, state), key=lambda span: span[1] - span[0])
    return best
