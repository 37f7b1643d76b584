"""Define every metric: dense, in float64, a few lines each. The faster implementations are tested against it."""

from __future__ import annotations

import math

import torch

METRICS = ("kl_nats", "agreement", "entropy_bits", "entropy_change_bits", "loss_nats", "loss_change_nats", "accuracy")
"""Rows of what `measure` returns; p is the unedited model, q the edited one."""


def measure(p_TV: torch.Tensor, q_TV: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """Compute all metrics of single predictions.

    Args:
        p_TV: logits of the unedited model, (tokens, vocabulary).
        q_TV: logits of the edited model, the same shape.
        target_T: the true next tokens, (tokens,).

    Returns:
        float64, (len(METRICS), tokens): KL(p||q) in nats; whether p and q have the same most likely token; H(q) and
        H(q) - H(p) in bits; cross-entropy of q with the target, and its difference from p's, in nats; whether q's most
        likely token is the target.
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
    return torch.stack([values[name] for name in METRICS])


def _weighted(log: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return exp(log) * value, and 0 where exp(log) is 0. NaN stays NaN, so that it is not counted as agreement."""
    weight = log.exp()
    return torch.where(weight == 0, 0.0, weight * value)
