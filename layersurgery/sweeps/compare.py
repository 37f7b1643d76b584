"""Compare the predictions of two models, or of a model with and without an edit, from their full logits.

This is the simple way, for small amounts of text and as a reference for the faster ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..metrics.reference import METRICS, measure
from ..models.anatomy import anatomy
from ..models.block_list import find_decoder_blocks
from ..models.call_tracing import eval_no_grad
from ..plans.plan import Plan
from ..plans.route import Route
from ..runtime.inputs import as_tokens, has_next_token, model_inputs
from ..surgery.operate import as_route, operate

Edit = Plan | Route | str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Means over all positions that have a next token in their sequence; p is the first model, q the second.

    Attributes:
        tokens: number of positions.
        kl_nats: KL(p||q).
        agreement: share of positions where both models have the same most likely token, 0 to 1.
        loss_nats: cross-entropy of q with the true next token.
        loss_change_nats: cross-entropy of q minus that of p.
        entropy_bits: H(q).
        entropy_change_bits: H(q) - H(p).
        accuracy: share of positions where q's most likely token is the true next token, 0 to 1.
    """

    tokens: int
    kl_nats: float
    agreement: float
    loss_nats: float
    loss_change_nats: float
    entropy_bits: float
    entropy_change_bits: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """Return the second model's perplexity, exp(loss_nats)."""
        return math.exp(self.loss_nats)


def compare(
    model: nn.Module,
    other: nn.Module | Edit,
    tokens: torch.Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: torch.Tensor | None = None,
    batch_size: int = 1,
) -> Comparison:
    """Compare two models, or a model with an edit of itself, on the same tokens.

    Logits are converted to float64 before they are summed. The logits of one whole batch are in memory at a time.

    Args:
        model: a causal language model: p.
        other: another model with the same vocabulary, or an edit of `model` (a plan, its text or a route): q.
        tokens: token ids, (sequences, length).
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: number of sequences in one forward.

    Returns:
        The means of all metrics over all positions that have a next token.

    Raises:
        PlanError: no position has a next token, the vocabularies differ, or the plan does not fit the model.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> comparison = ls.compare(model, "drop 20", tokens)
        >>> comparison.kl_nats > 0
        True
    """
    ids, mask = as_tokens(tokens, attention_mask)
    sums = torch.zeros(1 + len(METRICS), dtype=torch.float64)
    with ExitStack() as contexts:
        contexts.enter_context(eval_no_grad(model))
        second, editing = _second_model(model, other, contexts)
        for batch_ids, batch_mask in zip(torch.split(ids, batch_size), torch.split(mask, batch_size), strict=True):
            p = _logits(model, batch_ids, batch_mask)
            with editing():
                q = _logits(second, batch_ids, batch_mask)
            if p.shape != q.shape:
                raise PlanError(
                    f"the models' logits have the shapes {tuple(p.shape)} and {tuple(q.shape)}, "
                    "so they cannot be compared"
                )
            for sequence in zip(p, q, batch_ids, batch_mask, strict=True):
                sums += _sum_metrics(*sequence)
    count, *totals = sums.tolist()
    return Comparison(tokens=int(count), **{name: total / count for name, total in zip(METRICS, totals, strict=True)})


def _second_model(
    model: nn.Module, other: nn.Module | Edit, contexts: ExitStack
) -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]:
    """Return the model that gives q, and a context manager to enter around each of its forwards."""
    if isinstance(other, nn.Module):
        contexts.enter_context(eval_no_grad(other))
        return other, nullcontext
    route = as_route(other, len(find_decoder_blocks(model).blocks))
    # Only a skipped branch needs the anatomy. Find it once, not in every batch.
    known_anatomy = None if all(visit.whole for visit in route) else anatomy(model)
    return model, partial(operate, model, route, anatomy=known_anatomy)


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(**model_inputs(model, ids, mask)).logits
    return logits


def _sum_metrics(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the number of positions, then the sum of each metric, for one sequence.

    Args:
        p: logits of the first model, (length, vocabulary).
        q: logits of the second model, the same shape.
        ids: tokens, (length,).
        mask: 1 for a token and 0 for padding, (length,).
    """
    has_next = has_next_token(mask[None])[0]
    p, q = (logits[:-1].cpu()[has_next] for logits in (p, q))
    sums = measure(p, q, ids[1:].cpu()[has_next]).sum(-1)
    return torch.cat([has_next.sum()[None].double(), sums])
