"""All metrics in one pass over the logits, tile by tile, on any device; tokens x vocabulary is never in memory.

Names say shapes: T tokens, D width of what is read, V vocabulary, C one slice of it.

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

import torch

from ..readout import Readout

TILE_ELEMENTS = 1 << 22
ROWS = 512


@dataclass(frozen=True, slots=True)
class Summary:
    """What is kept of one model's logits: float64, (tokens,).

    Attributes:
        lse: log-sum-exp, nats.
        entropy: of the distribution, nats.
        loss: cross-entropy with the true next token, nats.
        top: the most likely token; the lowest, where several are equal.
    """

    lse: torch.Tensor
    entropy: torch.Tensor
    loss: torch.Tensor
    top: torch.Tensor


@dataclass(frozen=True, slots=True)
class Baseline:
    """What edited models are compared with.

    Attributes:
        x_TD: what the unedited model reads.
        target_T: the true next tokens.
        summary: of its logits.
        mean_TD: the expected row of the unembedding, mu; None where the readout is not affine.
    """

    x_TD: torch.Tensor
    target_T: torch.Tensor
    summary: Summary
    mean_TD: torch.Tensor | None


@contextmanager
def _in_full(device: torch.device) -> Iterator[None]:
    """Single precision in earnest: a difference of large sums would turn a shorter mantissa's noise into divergence."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def baseline(readout: Readout, x_TD: torch.Tensor, target_T: torch.Tensor) -> Baseline:
    """Read the unedited model at some positions.

    Args:
        readout: how to read.
        x_TD: what `readout.final` gave.
        target_T: the true next tokens.
    """
    with _in_full(x_TD.device):
        summary = _summary(readout, x_TD, target_T)
        mean_TD = None
        if readout.affine:
            mean_TD = torch.zeros_like(x_TD)
            for rows in _rows(readout, len(x_TD)):
                lse = summary.lse[rows, None].to(x_TD.device)
                for start, stop in _slices(readout, rows):
                    p_TC = readout.tile(x_TD[rows], start, stop).sub_(lse).exp_()
                    mean_TD[rows] += p_TC @ readout.weight(start, stop)
        return Baseline(x_TD, target_T, summary, mean_TD)


def measure(readout: Readout, x_TD: torch.Tensor, base: Baseline) -> torch.Tensor:
    """All metrics of an edited model at the positions of the baseline: float64, in the order of `reference.METRICS`, (7, tokens)."""
    with _in_full(x_TD.device):
        q = _summary(readout, x_TD, base.target_T)
        if base.mean_TD is None:
            kl = _side_by_side(readout, x_TD, base, q)
        else:
            moved = (x_TD.double() - base.x_TD.double()).mul_(base.mean_TD).sum(-1)
            kl = q.lse - base.summary.lse - moved.to(q.lse.device)
    # Rounding alone can make it negative.
    return _metrics(kl.clamp(min=0), q, base)


def measure_unedited(base: Baseline) -> torch.Tensor:
    """The baseline's own row: the same, for the model as it is."""
    return _metrics(torch.zeros_like(base.summary.lse), base.summary, base)


def _metrics(kl: torch.Tensor, q: Summary, base: Baseline) -> torch.Tensor:
    p, bit = base.summary, math.log(2)
    rows = [
        kl, (p.top == q.top).double(), q.entropy / bit, (q.entropy - p.entropy) / bit, q.loss, q.loss - p.loss,
        (q.top == base.target_T.to(q.top.device)).double(),
    ]  # fmt: skip
    # A prediction that is none must not pass for a wrong one.
    return torch.where(q.lse.isfinite() & p.lse.isfinite(), torch.stack(rows), math.nan)


def _rows(readout: Readout, tokens: int) -> Iterator[slice]:
    step = readout.rows or ROWS
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _slices(readout: Readout, rows: slice) -> Iterator[tuple[int, int]]:
    step = max(1, TILE_ELEMENTS // max(1, rows.stop - rows.start)) if readout.rows is None else readout.vocabulary
    for start in range(0, readout.vocabulary, step):
        yield start, min(start + step, readout.vocabulary)


def _summary(readout: Readout, x_TD: torch.Tensor, target_T: torch.Tensor) -> Summary:
    parts = [_summary_of_rows(readout, x_TD[rows], target_T[rows], rows) for rows in _rows(readout, len(x_TD))]
    return Summary(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _summary_of_rows(readout: Readout, x_TD: torch.Tensor, target_T: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
    """Running maximum m, S = sum e^(z-m) and A = sum e^(z-m) (z-m); entropy is log S - A/S."""
    tokens = len(x_TD)
    m = S = A = wanted = top = torch.empty(0)
    for start, stop in _slices(readout, rows):
        z_TC = readout.tile(x_TD, start, stop)
        peak, where = z_TC.max(-1)
        here = target_T.to(z_TC.device) - start
        inside = (here >= 0) & (here < stop - start)
        hit = z_TC.gather(-1, here.clamp(0, stop - start - 1)[:, None])[:, 0].double()
        z_TC = z_TC.sub_(peak[:, None]) if readout.rows is None else z_TC - peak[:, None]
        e_TC = z_TC.exp()
        part_S = e_TC.sum(-1).double()
        if readout.rows is not None:  # a model may give tokens that do not exist minus infinity
            z_TC = torch.where(e_TC == 0, 0.0, z_TC)
        part_A = e_TC.mul_(z_TC).sum(-1).double()
        peak = peak.double()
        if start == 0:
            m, S, A, top = peak, part_S, part_A, where
            wanted = torch.where(inside, hit, torch.full_like(hit, math.nan))
            continue
        # The first of equal ones wins, as in argmax; NaN must not lose against a number.
        top = torch.where((peak > m) | (peak.isnan() & ~m.isnan()), where + start, top)
        new = torch.maximum(m, peak)
        old_by, part_by = (m - new).exp(), (peak - new).exp()
        A = old_by * (A + (m - new) * S) + part_by * (part_A + (peak - new) * part_S)
        S = old_by * S + part_by * part_S
        m, wanted = new, torch.where(inside, hit, wanted)
    assert len(m) == tokens
    lse = m + S.log()
    return lse, S.log() - A / S, lse - wanted, top


def _side_by_side(readout: Readout, x_TD: torch.Tensor, base: Baseline, q: Summary) -> torch.Tensor:
    """KL(p||q) = sum p (z_p - z_q) - lse_p + lse_q."""
    parts = []
    for rows in _rows(readout, len(x_TD)):
        moved = torch.zeros_like(q.lse[rows])
        for start, stop in _slices(readout, rows):
            p_TC, q_TC = readout.tile(base.x_TD[rows], start, stop), readout.tile(x_TD[rows], start, stop)
            weight = (p_TC - base.summary.lse[rows, None].to(p_TC.device)).exp_()
            moved += torch.where(weight == 0, 0.0, weight * (p_TC - q_TC)).sum(-1).double()
        parts.append(moved - base.summary.lse[rows] + q.lse[rows])
    return torch.cat(parts)
