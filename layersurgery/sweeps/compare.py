"""Compare the predictions of two models, or of a model with and without an edit, from their full logits.

This is the simple way, for small amounts of text and as a reference for the faster ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .. import registry
from ..checkpoints.block_sources import Sources, take_blocks
from ..errors import PlanError, warn
from ..metrics.aggregation import BatchResult, SequenceSums
from ..metrics.reference import METRICS, TOKEN_TAILS, measure, measure_tails
from ..metrics.tails import Tails, row_tails
from ..models.anatomy import anatomy
from ..models.block_list import find_decoder_blocks
from ..models.call_tracing import eval_no_grad
from ..plans.plan import Plan
from ..plans.route import Route
from ..runtime.inputs import has_next_token, model_inputs
from ..surgery.operate import as_route, operate

if TYPE_CHECKING:
    import pandas as pd

Edit = Plan | Route | str
Editing = Callable[[], AbstractContextManager[Any]]
"""Returns a context inside which the model is edited."""
_NAMES = {*METRICS, *(column.name for column in registry.TAILS)}


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """Means over all positions that have a next token in their sequence; p is the first model, q the second.

    Each metric is an attribute of its name: those of the columns of `sweep`, such as `comparison.kl_nats`. The
    definitions are in `layersurgery.registry.METRICS`, and in `layersurgery.registry.TAILS` for tails.

    Attributes:
        tokens: number of positions.
        metrics: the mean of each metric, by its name, and the tails if they were asked for.
        positions: the metrics of every position, a row each: sequence, position, token_id, token, next_token_id and
            the metrics; None unless they were asked for.
        non_finite: for each metric that is infinite or not a number somewhere, the number of such positions. The loss
            is infinite where a model gives the true token the probability 0.

    Example:
        >>> import layersurgery as ls
        >>> comparison = ls.Comparison(5, {"kl_nats": 0.25, "loss_nats": 3.0})
        >>> comparison.kl_nats, comparison.loss_nats
        (0.25, 3.0)
    """

    tokens: int
    metrics: Mapping[str, float] = field(hash=False)
    positions: pd.DataFrame | None = field(default=None, compare=False)
    non_finite: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __getattr__(self, name: str) -> float:
        if name not in _NAMES or name not in self.metrics:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return self.metrics[name]

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *self.metrics]

    def __repr__(self) -> str:
        metrics = "".join(f", {name}={value!r}" for name, value in self.metrics.items())
        non_finite = f", non_finite={dict(self.non_finite)!r}" if self.non_finite else ""
        return f"{type(self).__name__}(tokens={self.tokens}{metrics}{non_finite})"

    @property
    def perplexity(self) -> float:
        """Return the second model's perplexity, exp(loss_nats)."""
        return math.exp(self.loss_nats)

    def describe_non_finite(self) -> str:
        """Say which metrics are infinite or not a number, and at how many positions; empty if all are finite."""
        if not self.non_finite:
            return ""
        counts = ", ".join(f"{name} at {count:,} of {self.tokens:,}" for name, count in self.non_finite.items())
        return (
            f"not finite: {counts} positions. A loss is infinite where a model gives the true token the probability 0; "
            "per_token shows where"
        )

    def to_pandas(self) -> pd.Series:
        """Return the numbers as a Series."""
        import pandas as pd

        return pd.Series({"tokens": self.tokens, **self.metrics})

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><td>{entry.label}</td><td>{entry.factor * self.metrics[entry.name]:.4g} {entry.unit}</td></tr>"
            for entry in (*registry.METRICS, *registry.TAILS)
            if entry.name in self.metrics
        ]
        return f"<table><tr><td>tokens</td><td>{self.tokens:,}</td></tr>{''.join(rows)}</table>"


def compare_tokens(
    model: nn.Module,
    other: nn.Module | Edit | Editing,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    batch_size: int = 1,
    blocks: str | None = None,
    per_token: bool = False,
    tokenizer: Any = None,
    sources: Sources | None = None,
    tails: bool = False,
) -> Comparison:
    """Compare two models, or a model with an edit of itself, on the same tokens.

    Args:
        model: a causal language model: p.
        other: another model with the same vocabulary, or an edit of `model` (a plan, its text, a route, or a
            function that returns a context in which the model is edited): q.
        ids: token ids, (sequences, length).
        mask: 1 for a token and 0 for padding, of the same shape.
        batch_size: number of sequences in one forward.
        blocks: path of the list of blocks, if it cannot be found automatically.
        per_token: also return the metrics of every position.
        tokenizer: writes tokens as text in the table of positions; None for no text.
        sources: other models, or their names, that the edit takes blocks of.
        tails: also return the tails.

    Returns:
        The means of all metrics over all positions that have a next token.

    Raises:
        PlanError: the vocabularies differ, or the plan does not fit the model.
    """
    sums = torch.zeros(len(METRICS), dtype=torch.float64)
    non_finite = torch.zeros(len(METRICS), dtype=torch.int64)
    count = 0
    rows: list[pd.DataFrame] = []
    of_sequences: list[BatchResult] = []
    with ExitStack() as contexts:
        contexts.enter_context(eval_no_grad(model))
        second, editing = _second_model(model, other, blocks, contexts, sources)
        for first in range(0, len(ids), batch_size):
            batch_ids, batch_mask = ids[first : first + batch_size], mask[first : first + batch_size]
            p = _logits(model, batch_ids, batch_mask)
            with editing():
                q = _logits(second, batch_ids, batch_mask)
            if p.shape != q.shape:
                raise PlanError(
                    f"the models' logits have the shapes {tuple(p.shape)} and {tuple(q.shape)}, "
                    "so they cannot be compared"
                )
            for offset, sequence in enumerate(zip(p, q, batch_ids, batch_mask, strict=True)):
                metrics = _measure_sequence(*sequence, tails=tails)
                sums += metrics[: len(METRICS)].sum(-1)
                non_finite += (~metrics[: len(METRICS)].isfinite()).sum(-1)
                count += metrics.shape[1]
                if tails:
                    of_sequences.append(_with_tails(first + offset, metrics))
                if per_token:
                    rows.append(_position_rows(first + offset, *sequence[2:], metrics, tokenizer))
    means = {name: total / count for name, total in zip(METRICS, sums.tolist(), strict=True)}
    if tails:
        columns = SequenceSums.of(of_sequences).tail_columns(0)
        means |= {column.name: columns[column.name] for column in registry.TAILS}
    found = Comparison(
        count,
        means,
        _joined(rows) if per_token else None,
        {name: number for name, number in zip(METRICS, non_finite.tolist(), strict=True) if number},
    )
    if found.non_finite:
        warn(found.describe_non_finite())
    return found


def _joined(rows: list[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat(rows, ignore_index=True)


def _second_model(
    model: nn.Module,
    other: nn.Module | Edit | Editing,
    blocks: str | None,
    contexts: ExitStack,
    sources: Sources | None,
) -> tuple[nn.Module, Editing]:
    """Return the model that gives q, and a context manager to enter around each of its forwards."""
    if isinstance(other, nn.Module):
        contexts.enter_context(eval_no_grad(other))
        return other, nullcontext
    if callable(other):
        return model, other
    route = as_route(other, len(find_decoder_blocks(model, blocks).blocks))
    # Only a skipped branch needs the anatomy. Find it once, not in every batch.
    taken = take_blocks(model, [route], sources, blocks=blocks)  # loads the sources once, not in every batch
    known_anatomy = None if all(visit.of_own_block.whole for visit in route) else anatomy(model, blocks=blocks)
    return model, partial(operate, model, route, anatomy=known_anatomy, blocks=blocks, sources=taken)


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(**model_inputs(model, ids, mask)).logits
    return logits


def _with_tails(sequence: int, metrics: torch.Tensor) -> BatchResult:
    """Return one sequence's tails, from what `_measure_sequence` returns."""
    count = metrics.shape[1]
    found = Tails.stack({0: row_tails(metrics, [count])}, 1, 1)
    return BatchResult(sequence, [count], np.zeros((1, 1, len(METRICS))), np.zeros((1, 0)), tails=found)


def _measure_sequence(
    p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, *, tails: bool
) -> torch.Tensor:
    """Return the metrics of all positions of one sequence that have a next token, (len(METRICS), positions).

    Args:
        p: logits of the first model, (length, vocabulary).
        q: logits of the second model, the same shape.
        ids: tokens, (length,).
        mask: 1 for a token and 0 for padding, (length,).
        tails: add the rows of `measure_tails`.
    """
    has_next = has_next_token(mask[None])[0]
    p, q = (logits[:-1].cpu()[has_next] for logits in (p, q))
    target = ids[1:].cpu()[has_next]
    found = measure(p, q, target)
    return torch.cat([found, measure_tails(p, q, target)]) if tails else found


def _position_rows(
    sequence: int, ids: torch.Tensor, mask: torch.Tensor, metrics: torch.Tensor, tokenizer: Any
) -> pd.DataFrame:
    """Return a row for each measured position of a sequence."""
    import pandas as pd

    positions = has_next_token(mask[None])[0].nonzero()[:, 0]
    tokens, targets = ids[positions].tolist(), ids[positions + 1].tolist()
    return pd.DataFrame(
        {
            "sequence": sequence,
            "position": positions.tolist(),
            "token_id": tokens,
            "token": [None if tokenizer is None else tokenizer.decode([token]) for token in tokens],
            "next_token_id": targets,
            # Without tails, their rows are missing.
            **dict(zip((*METRICS, *TOKEN_TAILS), metrics.numpy(), strict=False)),
        }
    )
