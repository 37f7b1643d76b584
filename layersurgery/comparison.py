"""What an edit does to a model's predictions, worked out the plain dense way: for small jobs, and to judge faster ways by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from .blocks import locate, transformers_part
from .dissection import anatomy
from .errors import PlanError
from .plan import Plan
from .route import Route
from .surgery import as_route, operate
from .witness import resting

Edit = Plan | Route | str
_COLUMNS = (
    "tokens", "kl_nats", "agreement", "loss_nats", "loss_change_nats", "entropy_bits", "entropy_change_bits", "accuracy",
)  # fmt: skip


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
    try:
        ids = torch.as_tensor(tokens)
    except ValueError as error:
        raise PlanError(f"tokens must be sequences of one length; pad them and give a mask ({error})") from None
    mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask)
    if ids.dim() != 2 or mask.shape != ids.shape:
        raise PlanError(
            f"tokens have the shape (sequences, length), and a mask the same; found {tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    sums = torch.zeros(len(_COLUMNS), dtype=torch.float64)
    with ExitStack() as stack:
        stack.enter_context(resting(model))
        edited, editing = _second(model, other, stack)
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
    total = dict(zip(_COLUMNS, sums.tolist(), strict=True))
    count = total.pop("tokens")
    if not count:
        raise PlanError("no position has a next token: give sequences of at least two tokens")
    return Comparison(tokens=int(count), **{name: value / count for name, value in total.items()})


def _second(
    model: nn.Module, other: nn.Module | Edit, stack: ExitStack
) -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]:
    """The model that gives q, and what to do around each of its forwards."""
    if isinstance(other, nn.Module):
        stack.enter_context(resting(other))
        return other, nullcontext
    route = as_route(other, len(locate(model).blocks))
    # A skipped branch needs it; once is enough.
    known = None if all(visit.whole for visit in route) else anatomy(model)
    return model, partial(operate, model, route, anatomy=known)


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    place = transformers_part(model).get_input_embeddings().weight.device
    device = torch.device("cpu") if place.type == "meta" else place
    given: dict[str, torch.Tensor] = {} if bool(mask.all()) else {"attention_mask": mask.to(device)}
    if not bool(mask[:, 0].all()) and "position_ids" in signature(transformers_part(model).forward).parameters:
        # Otherwise models with learned positions number the padding on the left, too.
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
    logits: torch.Tensor = model(ids.to(device), use_cache=False, **given).logits
    return logits


def _sums(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums over one sequence in the order of `_COLUMNS`; p and q are logits, (length, vocabulary)."""
    following = (mask[:-1] * mask[1:]).bool()
    p, q = (logits[:-1].cpu()[following].double().log_softmax(-1) for logits in (p, q))
    wanted = ids[1:].cpu()[following]
    loss_p, loss_q = (-log.gather(-1, wanted[:, None]).squeeze(-1) for log in (p, q))
    entropy_p, entropy_q = (-_weighted(log, log).sum(-1) / math.log(2) for log in (p, q))
    columns = {
        "tokens": torch.ones_like(loss_p),
        "kl_nats": _weighted(p, p - q).sum(-1),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "loss_nats": loss_q,
        "loss_change_nats": loss_q - loss_p,
        "entropy_bits": entropy_q,
        "entropy_change_bits": entropy_q - entropy_p,
        "accuracy": (q.argmax(-1) == wanted).double(),
    }
    return torch.stack([columns[name].sum() for name in _COLUMNS])


def _weighted(log: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """exp(log) * value, where nothing times anything is nothing; NaN stays NaN, for it must not pass for agreement."""
    weight = log.exp()
    return torch.where(weight == 0, 0.0, weight * value)
