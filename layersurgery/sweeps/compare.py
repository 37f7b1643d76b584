"""What an edit does to a model's predictions, worked out the plain dense way: for small jobs, and to judge faster ways by."""

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
    """Means over all positions that have a next token inside their sequence; p is the first model, q the second.

    Attributes:
        tokens: how many positions.
        kl_nats: KL(p||q).
        agreement: share of positions where both have the same most likely token.
        loss_nats: cross-entropy of q with the true next token.
        loss_change_nats: the same, q minus p.
        entropy_bits: H(q).
        entropy_change_bits: H(q) - H(p).
        accuracy: share of positions where q's most likely token is the true next one.
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
        """exp of the second model's loss."""
        return math.exp(self.loss_nats)


def compare(
    model: nn.Module,
    other: nn.Module | Edit,
    tokens: torch.Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: torch.Tensor | None = None,
    batch_size: int = 1,
) -> Comparison:
    """Compare two models, or one with an edit of itself, on the same tokens.

    Logits become float64 before anything is summed; a whole sequence's logits are held at a time.

    Args:
        model: a causal language model, p.
        other: another one over the same vocabulary, or a plan, its text or a route for `model`: q.
        tokens: token ids, (sequences, length).
        attention_mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: sequences in one forward.

    Raises:
        PlanError: no position has a next token, the vocabularies differ, or the plan does not fit.

    Example:
        >>> compare(model, "drop 20", tokens).kl_nats  # doctest: +SKIP
    """
    ids, mask = as_tokens(tokens, attention_mask)
    sums = torch.zeros(1 + len(METRICS), dtype=torch.float64)
    with ExitStack() as runner:
        runner.enter_context(eval_no_grad(model))
        edited, editing = _second(model, other, runner)
        for rows, real in zip(torch.split(ids, batch_size), torch.split(mask, batch_size), strict=True):
            p = _logits(model, rows, real)
            with editing():
                q = _logits(edited, rows, real)
            if p.shape != q.shape:
                raise PlanError(
                    f"the models' logits have the shapes {tuple(p.shape)} and {tuple(q.shape)}, so they cannot be compared"
                )
            for sequence in zip(p, q, rows, real, strict=True):
                sums += _sums(*sequence)
    count, *totals = sums.tolist()
    return Comparison(tokens=int(count), **{name: total / count for name, total in zip(METRICS, totals, strict=True)})


def _second(
    model: nn.Module, other: nn.Module | Edit, runner: ExitStack
) -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]:
    """The model that gives q, and what to do around each of its forwards."""
    if isinstance(other, nn.Module):
        runner.enter_context(eval_no_grad(other))
        return other, nullcontext
    route = as_route(other, len(find_decoder_blocks(model).blocks))
    # A skipped branch needs it; once is enough.
    known = None if all(visit.whole for visit in route) else anatomy(model)
    return model, partial(operate, model, route, anatomy=known)


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(**model_inputs(model, ids, mask)).logits
    return logits


def _sums(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The number of positions and the sum of each metric over one sequence; p and q are logits, (length, vocabulary)."""
    following = has_next_token(mask[None])[0]
    p, q = (logits[:-1].cpu()[following] for logits in (p, q))
    sums = measure(p, q, ids[1:].cpu()[following]).sum(-1)
    return torch.cat([following.sum()[None].double(), sums])
