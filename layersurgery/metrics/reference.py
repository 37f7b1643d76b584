"""Define every metric: dense, in float64, a few lines each. The faster implementations are tested against it."""

from __future__ import annotations

import math

import torch

from .. import registry

METRICS = tuple(column.name for column in registry.METRICS)
"""Rows of what `measure` returns; p is the unedited model, q the edited one. The list is `registry.METRICS`."""
TOKEN_TAILS = ("probability_change", "top5_overlap", "confidence")
"""Rows of what `measure_tails` returns."""
TOP = 5
"""Number of most likely tokens whose overlap is measured; all of a smaller vocabulary."""


def measure(p_TV: torch.Tensor, q_TV: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """Compute all metrics of single predictions.

    Args:
        p_TV: logits of the unedited model, (tokens, vocabulary).
        q_TV: logits of the edited model, the same shape.
        target_T: the true next tokens, (tokens,).

    Returns:
        float64, (len(METRICS), tokens). `registry.METRICS` has the definitions in words.
    """
    p_TV, q_TV = p_TV.double().log_softmax(-1), q_TV.double().log_softmax(-1)
    loss_p, loss_q = (-log.gather(-1, target_T[:, None]).squeeze(-1) for log in (p_TV, q_TV))
    entropy_p, entropy_q = (-_weighted(log, log).sum(-1) / math.log(2) for log in (p_TV, q_TV))
    top = q_TV.argmax(-1)
    values = {
        "kl_nats": _weighted(p_TV, p_TV - q_TV).sum(-1),
        "agreement": (p_TV.argmax(-1) == top).double(),
        "entropy_bits": entropy_q,
        "entropy_change_bits": entropy_q - entropy_p,
        "loss_nats": loss_q,
        "loss_change_nats": loss_q - loss_p,
        "accuracy": (top == target_T).double(),
    }
    return stack_metrics(values)


def measure_tails(p_TV: torch.Tensor, q_TV: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """Compute what the columns of the tails need of single predictions, in addition to the metrics.

    Args:
        p_TV: logits of the unedited model, (tokens, vocabulary).
        q_TV: logits of the edited model, the same shape.
        target_T: the true next tokens, (tokens,).

    Returns:
        float64, (len(TOKEN_TAILS), tokens): q - p of the true next token; the share of p's five most likely tokens (the
        lowest ones of equals) than which fewer than five tokens are more likely under q; q of q's most likely token.
    """
    count = min(TOP, p_TV.shape[1])
    p_least, q_least = (z_TV.topk(count).values[:, -1:] for z_TV in (p_TV, q_TV))
    above, equal = p_TV > p_least, p_TV == p_least
    top_TV = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    overlap = (top_TV & (q_TV >= q_least)).sum(-1).double() / count
    p_TV, q_TV = p_TV.double().softmax(-1), q_TV.double().softmax(-1)
    change = (q_TV - p_TV).gather(-1, target_T[:, None]).squeeze(-1)
    return torch.stack([change, overlap, q_TV.amax(-1)])


def stack_metrics(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stack values of all metrics in the order of `METRICS`.

    Raises:
        KeyError: a metric of the registry has no value, or a value has no metric.
    """
    if values.keys() != set(METRICS):
        raise KeyError(f"metrics of the registry and computed values differ: {sorted(values.keys() ^ set(METRICS))}")
    return torch.stack([values[name] for name in METRICS])


def _weighted(log: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return exp(log) * value, and 0 where exp(log) is 0. NaN stays NaN, so that it is not counted as agreement."""
    weight = log.exp()
    return torch.where(weight == 0, 0.0, weight * value)
