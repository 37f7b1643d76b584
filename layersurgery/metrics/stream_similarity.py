"""Compare the residual stream of one sequence between all pairs of depths: unbiased HSIC for CKA, and cosines.

Sums over tokens and over pairs of tokens become one matrix product of all states with all states, a slab of rows at a
time, so that neither a kernel matrix of every state nor a tensor of every pair exists.
Suffixes of names give shapes: S states, N tokens, D width, R rows of a slab, P pairs of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .aggregation import Array
from .cosine_moments import unit_rows

MIN_TOKENS = 4
"""Tokens that the unbiased estimate of HSIC needs."""
_SLAB_ELEMENTS = 1 << 24


def unbiased_hsic(states: Sequence[torch.Tensor], *, mean_free: bool = False) -> torch.Tensor:
    """Estimate HSIC with linear kernels between all pairs of states, with and without the first token.

    With K the matrix of scalar products between the n tokens in one state, its diagonal set to zero, and L that of
    another state (Nguyen, Raghu and Kornblith, arXiv 2010.15327, equation 3, after Song et al., 2012):

        HSIC = (tr(K L) + sum(K) sum(L) / ((n - 1)(n - 2)) - 2 sum(K L) / (n - 2)) / (n (n - 3))

    Scalar products are computed on the device of each state. They are float64: where a token's stream is a thousand
    times as long as that of others, as the first one's often is, float32 would lose all digits of a short sequence.

    Args:
        states: the stream of one sequence at each depth, each (N, D).
        mean_free: remove each token's mean over channels.

    Returns:
        HSIC of all tokens, and of all but the first one: float64, (2, S, S). 0 for fewer than `MIN_TOKENS` tokens.

    Example:
        >>> import torch
        >>> from layersurgery.metrics.stream_similarity import unbiased_hsic
        >>> x = torch.eye(5)
        >>> unbiased_hsic([x, -2 * x]).shape
        torch.Size([2, 2, 2])
    """
    tokens, device = len(states[0]), states[-1].device
    rows = max(1, _SLAB_ELEMENTS // (len(states) * tokens))
    sums_SN = torch.zeros(len(states), tokens, dtype=torch.float64, device=device)
    traces_SS = torch.zeros(len(states), len(states), dtype=torch.float64, device=device)
    first_SN = torch.zeros_like(sums_SN)  # of each kernel matrix, the first row, which is also the first column
    for start in range(0, tokens, rows):
        slab = slice(start, min(start + rows, tokens))
        kernels_SRN = torch.empty(len(states), slab.stop - start, tokens, dtype=torch.float64, device=device)
        for number, state in enumerate(states):
            kernels_SRN[number] = _kernel_rows(state, slab, mean_free=mean_free)
        if start == 0:
            first_SN.copy_(kernels_SRN[:, 0])
        sums_SN[:, slab] = kernels_SRN.sum(-1)
        kernels_SP = kernels_SRN.flatten(1)
        traces_SS += kernels_SP @ kernels_SP.T
    without_first = _estimate(traces_SS - 2 * first_SN @ first_SN.T, (sums_SN - first_SN)[:, 1:])
    return torch.stack([_estimate(traces_SS, sums_SN), without_first])


def _estimate(traces_SS: torch.Tensor, sums_SN: torch.Tensor) -> torch.Tensor:
    """Estimate HSIC, (S, S), from tr(K L) and the sums of each kernel matrix over its rows."""
    n = sums_SN.shape[1]
    if n < MIN_TOKENS:
        return torch.zeros_like(traces_SS)
    total_S = sums_SN.sum(-1)
    hsic: torch.Tensor = traces_SS + total_S.outer(total_S) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums_SN @ sums_SN.T)
    return hsic / (n * (n - 3))


def _kernel_rows(state_ND: torch.Tensor, rows: slice, *, mean_free: bool) -> torch.Tensor:
    """Return some rows of the matrix of scalar products between tokens, with zeros on its diagonal: float64, (R, N)."""
    x_ND = _readable(state_ND, mean_free)
    # The estimate does not depend on what is subtracted from all tokens, but its rounding error does: with the first
    # token in the mean, the difference of two large sums would be all that is left without it.
    x_ND -= x_ND[1:].mean(0)
    kernel_RN = x_ND[rows] @ x_ND.T
    kernel_RN.diagonal(rows.start).zero_()
    return kernel_RN


def cosine_sums(states: Sequence[torch.Tensor], *, mean_free: bool = False) -> torch.Tensor:
    """Sum over tokens the cosine of each token's stream between all pairs of states: float64, (S, S).

    Args:
        states: the stream of one sequence at each depth, each (N, D); a stream of zeros has cosine 0 with any other.
        mean_free: remove each token's mean over channels.

    Example:
        >>> import torch
        >>> from layersurgery.metrics.stream_similarity import cosine_sums
        >>> x = torch.eye(3)
        >>> cosine_sums([x, -2 * x]).tolist()
        [[3.0, -3.0], [-3.0, 3.0]]
    """
    (tokens, width), device = states[0].shape, states[-1].device
    rows = max(1, _SLAB_ELEMENTS // (len(states) * width))
    sums_SS = torch.zeros(len(states), len(states), dtype=torch.float64, device=device)
    for start in range(0, tokens, rows):
        slab = slice(start, min(start + rows, tokens))
        units_SRD = torch.empty(len(states), slab.stop - start, width, dtype=torch.float64, device=device)
        for number, state in enumerate(states):
            units_SRD[number] = unit_rows(_readable(state[slab], mean_free))
        units_SP = units_SRD.flatten(1)
        sums_SS += units_SP @ units_SP.T
    return sums_SS


def _readable(state_ND: torch.Tensor, mean_free: bool) -> torch.Tensor:
    """Return a float64 copy of a state, without each token's mean over channels if wanted."""
    x_ND = state_ND.to(torch.float64, copy=True)
    return x_ND - x_ND.mean(-1, keepdim=True) if mean_free else x_ND


def cka(between: Array, first: Array, second: Array) -> tuple[float, float]:
    """Return the CKA of two states, and its standard error over sequences.

    It is the mean of HSIC between the states over the root of the product of their own means. The error is that of the
    delta method, as for every ratio of means here: NaN for a single sequence. CKA is NaN without sequences, and for a
    state in which all tokens are equal.

    Args:
        between: HSIC between the states in each sequence, (sequences,).
        first: HSIC of the first state with itself.
        second: HSIC of the second state with itself.

    Example:
        >>> import numpy as np
        >>> from layersurgery.metrics.stream_similarity import cka
        >>> hsic = np.array([2.0, 3.0])
        >>> cka(2 * hsic, hsic, 4 * hsic)  # a state, and the same with all numbers doubled
        (1.0, 0.0)
    """
    n = len(between)
    own = float(first.mean()) * float(second.mean()) if n else math.nan
    if not own > 0:
        return math.nan, math.nan
    value = float(between.mean()) / math.sqrt(own)
    if n < 2:
        return value, math.nan
    terms = between / math.sqrt(own) - value / 2 * (first / first.mean() + second / second.mean())
    return value, math.sqrt(n / (n - 1) * float(np.square(terms).sum())) / n
