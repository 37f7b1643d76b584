"""All metrics of edited models in one pass over their logits, by the fastest way that there is for a device.

Names say shapes: T tokens, D width of what is read.

With p the unedited model's distribution, q the edited one's, and x what each of them reads, the divergence of an affine readout is
a Bregman divergence of log-sum-exp:

    KL(p||q) = lse(z_q) - lse(z_p) - (x_q - x_p) . mu,   mu = sum_v p_v w_v

so that mu, one vector a token, stands for all of p, and an edited model needs its own logits only. The difference x_q - x_p keeps it
exactly zero for equal models, and nearly exact for nearly equal ones. A soft-cap is not affine: there, the logits of both models are
worked out tile by tile, side by side.
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
from .tiled import LogitStats


@dataclass(frozen=True, slots=True)
class Baseline:
    """What edited models are compared with.

    Attributes:
        x_TD: what the unedited model reads.
        target_T: the true next tokens.
        summary: of its logits.
        mean_TD: the expected row of the unembedding, mu, float32; None where the readout is not affine.
        compiled: whether loops that torch compiles may be used.
    """

    x_TD: torch.Tensor
    target_T: torch.Tensor
    stats: LogitStats
    mean_TD: torch.Tensor | None
    compiled: bool


@contextmanager
def _in_full(device: torch.device) -> Iterator[None]:
    """Single precision in earnest: a difference of large sums would turn a shorter mantissa's noise into divergence."""
    with float32_products("highest"), torch.autocast(device.type, enabled=False):
        yield


def baseline(readout: Readout, x_TD: torch.Tensor, target_T: torch.Tensor, *, compiled: bool = False) -> Baseline:
    """Read the unedited model at some positions.

    Args:
        readout: how to read.
        x_TD: what `readout.final` gave.
        target_T: the true next tokens.
        compiled: use loops that torch compiles.
    """
    with _in_full(x_TD.device):
        target_T = target_T.to(x_TD.device)
        summary = _logit_stats(readout, x_TD, target_T, compiled=compiled)
        mean_TD = None
        if readout.affine:
            mean_TD = torch.zeros_like(x_TD, dtype=torch.float32)
            for rows in tiled.rows_of(readout, len(x_TD)):
                lse = summary.lse[rows, None].to(x_TD.device)
                for start, stop in tiled.slices(readout, rows.stop - rows.start):
                    p_TC = readout.logits_tile(x_TD[rows], start, stop).sub_(lse).exp_()
                    mean_TD[rows] += readout.mean_weight_row(p_TC, start, stop)
        return Baseline(x_TD, target_T, summary, mean_TD, compiled)


def measure(readout: Readout, x_TD: torch.Tensor, base: Baseline) -> torch.Tensor:
    """All metrics of an edited model at the positions of the baseline: float64, in the order of `reference.METRICS`, (7, tokens)."""
    with _in_full(x_TD.device):
        q = _logit_stats(readout, x_TD, base.target_T, compiled=base.compiled)
        if base.mean_TD is None:
            kl = _kl_not_affine(readout, x_TD, base, q)
        else:
            kl = q.lse - base.stats.lse - _kl_cross_term(readout, x_TD, base.x_TD, base.mean_TD).to(q.lse.device)
    # Rounding alone can make it negative.
    return _metrics(kl.clamp(min=0), q, base)


def measure_unedited(base: Baseline) -> torch.Tensor:
    """The baseline's own row: the same, for the model as it is."""
    return _metrics(torch.zeros_like(base.stats.lse), base.stats, base)


def can_fuse(readout: Readout, x_TD: torch.Tensor) -> bool:
    """Whether the fused kernel is the way: for half precision on CUDA. In float32, cuBLAS with a pass over each tile is left to it: Triton
    multiplies exact float32 without matrix units."""
    return (
        isinstance(readout, Unembedding)
        and x_TD.is_cuda
        and x_TD.dtype == readout.matrix.dtype
        and x_TD.dtype in (torch.bfloat16, torch.float16)
        and _triton_kernel() is not None
    )


@lru_cache(1)
def _triton_kernel() -> ModuleType | None:
    try:
        from . import triton_kernel
    except ImportError:  # torch brings Triton on Linux only
        return None
    return triton_kernel


def _logit_stats(readout: Readout, x_TD: torch.Tensor, target_T: torch.Tensor, *, compiled: bool) -> LogitStats:
    kernel = _triton_kernel() if can_fuse(readout, x_TD) else None
    if kernel is None:
        return tiled.logit_stats(readout, x_TD, target_T, compiled=compiled)
    assert isinstance(readout, Unembedding)
    sums = kernel.summed(x_TD, readout.matrix, target_T, bias_V=readout.bias, scale=readout.scale, cap=readout.cap)
    return LogitStats.of(sums.m, sums.S, sums.A, sums.wanted, sums.top)


def _kl_not_affine(readout: Readout, x_TD: torch.Tensor, base: Baseline, q: LogitStats) -> torch.Tensor:
    """KL(p||q) = sum p (z_p - z_q) - lse_p + lse_q, where the readout is not affine."""
    p, kernel = base.stats, _triton_kernel() if can_fuse(readout, x_TD) else None
    if kernel is None:
        moved = tiled.kl_cross_term(readout, x_TD, p, base.x_TD)
    else:
        assert isinstance(readout, Unembedding)
        moved = kernel.diverged(
            base.x_TD, x_TD, readout.matrix, p.lse, bias_V=readout.bias, scale=readout.scale, cap=readout.cap
        )
    return moved - p.lse + q.lse


def _kl_cross_term(readout: Readout, x_TD: torch.Tensor, p_x_TD: torch.Tensor, mean_TD: torch.Tensor) -> torch.Tensor:
    """(x_q - x_p) . mu, float64."""
    parts = [
        (x_TD[rows].double() - p_x_TD[rows].double()).mul_(mean_TD[rows]).sum(-1)
        for rows in tiled.rows_of(readout, len(x_TD))
    ]
    return torch.cat(parts)


def _metrics(kl: torch.Tensor, q: LogitStats, base: Baseline) -> torch.Tensor:
    p, bit = base.stats, math.log(2)
    rows = [
        kl, (p.top == q.top).double(), q.entropy / bit, (q.entropy - p.entropy) / bit, q.loss, q.loss - p.loss,
        (q.top == base.target_T.to(q.top.device)).double(),
    ]  # fmt: skip
    # A prediction that is none must not pass for a wrong one.
    return torch.where(q.lse.isfinite() & p.lse.isfinite(), torch.stack(rows), math.nan)
