"""Compute all metrics of an edited model in one pass over its logits, with the fastest kernel for the device.

Suffixes of names give shapes: T tokens, D width of the readout's input.

Let p be the unedited model's distribution, q the edited model's, and x the input of each readout. For an affine
readout the divergence is a Bregman divergence of log-sum-exp:

    KL(p||q) = lse(z_q) - lse(z_p) - (x_q - x_p) . mu,   mu = sum_v p_v w_v

So mu, one vector per token, replaces p, and an edited model needs only its own logits. The difference x_q - x_p makes
the result exactly zero for equal models, and accurate for nearly equal ones. A soft-cap is not affine: then the logits
of both models are computed together, tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from ..runtime.float32_matmul import float32_products
from ..runtime.unembedding import Readout, Unembedding
from . import tiled
from .reference import stack_metrics
from .tiled import LogitStats

_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Baseline:
    """The unedited model's predictions, with which edited models are compared.

    Attributes:
        x_TD: the input of the unedited model's readout.
        target_T: the true next tokens.
        stats: statistics of its logits.
        mean_TD: the mean row of the unembedding under p, mu, float32; None if the readout is not affine.
        compiled: whether loops compiled by torch may be used.
        top_TK: the most likely tokens, whose overlap with those of edited models is measured; None if it is not.
    """

    x_TD: torch.Tensor
    target_T: torch.Tensor
    stats: LogitStats
    mean_TD: torch.Tensor | None
    compiled: bool
    top_TK: torch.Tensor | None = None


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Disable TF32 and autocast: their rounding error would appear as KL."""
    with float32_products("highest"), torch.autocast(device.type, enabled=False):
        yield


def baseline(
    readout: Readout, x_TD: torch.Tensor, target_T: torch.Tensor, *, compiled: bool = False, tails: bool = False
) -> Baseline:
    """Compute the unedited model's statistics at some positions.

    Args:
        readout: the model's readout.
        x_TD: the output of `readout.normalize`.
        target_T: the true next tokens.
        compiled: use loops compiled by torch.
        tails: also measure what `reference.measure_tails` does. The fused kernel does not keep several logits, so tiles
            are read instead.
    """
    with _full_precision(x_TD.device):
        target_T = target_T.to(x_TD.device)
        top_TK = tiled.top_tokens(readout, x_TD) if tails else None
        stats = _logit_stats(readout, x_TD, target_T, compiled=compiled, top_TK=top_TK)
        mean_TD = None
        if readout.affine:
            mean_TD = torch.zeros_like(x_TD, dtype=torch.float32)
            for rows in tiled.rows_of(readout, len(x_TD)):
                lse = stats.lse[rows, None].to(x_TD.device)
                for start, stop in tiled.slices(readout, x_TD[rows]):
                    p_TC = readout.logits_tile(x_TD[rows], start, stop).sub_(lse).exp_()
                    mean_TD[rows] += readout.mean_weight_row(p_TC, start, stop)
        return Baseline(x_TD, target_T, stats, mean_TD, compiled, top_TK)


def measure(readout: Readout, x_TD: torch.Tensor, base: Baseline) -> torch.Tensor:
    """Compute all metrics of an edited model at the baseline's positions.

    Returns:
        float64, (len(METRICS), tokens), in the order of `reference.METRICS`; with tails followed by the rows of
        `reference.TOKEN_TAILS`.
    """
    with _full_precision(x_TD.device):
        q = _logit_stats(readout, x_TD, base.target_T, compiled=base.compiled, top_TK=base.top_TK)
        if base.mean_TD is None:
            kl = _kl_not_affine(readout, x_TD, base, q)
        else:
            kl = q.lse - base.stats.lse - _kl_cross_term(readout, x_TD, base.x_TD, base.mean_TD).to(q.lse.device)
    # Only rounding can make KL negative.
    return _metrics(kl.clamp(min=0), q, base)


def measure_unedited(base: Baseline) -> torch.Tensor:
    """Compute the same metrics for the unedited model itself."""
    return _metrics(torch.zeros_like(base.stats.lse), base.stats, base)


def can_fuse(readout: Readout, x_TD: torch.Tensor) -> bool:
    """Return whether the fused kernel is used: for half precision on CUDA, from compute capability 8.0 on.

    In float32, cuBLAS and a pass over each tile are used, because Triton multiplies exact float32 without tensor cores.
    On older devices (T4, V100) Triton does not use them for half precision either.
    """
    return (
        isinstance(readout, Unembedding)
        and readout.scale > 0
        and x_TD.dtype == readout.matrix.dtype
        and x_TD.dtype in (torch.bfloat16, torch.float16)
        and _kernel_for(x_TD) is not None
    )


def _kernel_for(tensor: torch.Tensor) -> ModuleType | None:
    """Return the module of Triton kernels if they run fast where a tensor is."""
    has_tensor_cores = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= _LEAST_CAPABILITY
    return _triton_kernel() if has_tensor_cores else None


@lru_cache(1)
def _triton_kernel() -> ModuleType | None:
    try:
        from . import triton_kernel
    except ImportError:  # torch installs Triton only on Linux
        return None
    return triton_kernel


def _logit_stats(
    readout: Readout,
    x_TD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    compiled: bool,
    top_TK: torch.Tensor | None = None,
) -> LogitStats:
    kernel = _triton_kernel() if top_TK is None and can_fuse(readout, x_TD) else None
    if kernel is None:
        return tiled.logit_stats(readout, x_TD, target_T, compiled=compiled, top_TK=top_TK)
    assert isinstance(readout, Unembedding)
    sums = kernel.logit_sums(x_TD, readout.matrix, target_T, bias_V=readout.bias, scale=readout.scale, cap=readout.cap)
    return LogitStats.of(sums.m, sums.S, sums.A, sums.wanted, sums.top)


def _kl_not_affine(readout: Readout, x_TD: torch.Tensor, base: Baseline, q: LogitStats) -> torch.Tensor:
    """Compute KL(p||q) = sum p (z_p - z_q) - lse_p + lse_q, for a readout that is not affine."""
    # Both sums are of the same logits, whose rounding then cancels.
    p, kernel = base.stats, _triton_kernel() if base.top_TK is None and can_fuse(readout, x_TD) else None
    if kernel is None:
        cross_term = tiled.kl_cross_term(readout, x_TD, p, base.x_TD)
    else:
        assert isinstance(readout, Unembedding)
        cross_term = kernel.kl_terms(
            base.x_TD, x_TD, readout.matrix, p.lse, bias_V=readout.bias, scale=readout.scale, cap=readout.cap
        )
    return cross_term - p.lse + q.lse


def _kl_cross_term(readout: Readout, x_TD: torch.Tensor, p_x_TD: torch.Tensor, mean_TD: torch.Tensor) -> torch.Tensor:
    """Return (x_q - x_p) . mu, float64."""
    kernel = _triton_kernel() if can_fuse(readout, x_TD) else None
    if kernel is not None:
        terms: torch.Tensor = kernel.cross_term(x_TD, p_x_TD, mean_TD)
        return terms
    parts = [
        (x_TD[rows].double() - p_x_TD[rows].double()).mul_(mean_TD[rows]).sum(-1)
        for rows in tiled.rows_of(readout, len(x_TD))
    ]
    return torch.cat(parts)


def _metrics(kl: torch.Tensor, q: LogitStats, base: Baseline) -> torch.Tensor:
    p, bit = base.stats, math.log(2)
    values = {
        "kl_nats": kl,
        "agreement": (p.top == q.top).double(),
        "entropy_bits": q.entropy / bit,
        "entropy_change_bits": (q.entropy - p.entropy) / bit,
        "loss_nats": q.loss,
        "loss_change_nats": q.loss - p.loss,
        "accuracy": (q.top == base.target_T.to(q.top.device)).double(),
    }
    stacked = stack_metrics(values)
    if q.overlap is not None:
        stacked = torch.cat([stacked, torch.stack([(-q.loss).exp() - (-p.loss).exp(), q.overlap, q.confidence])])
    # Report NaN for non-finite logits instead of counting them as wrong.
    return torch.where(q.lse.isfinite() & p.lse.isfinite(), stacked, math.nan)
