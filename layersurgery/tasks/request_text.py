"""Turn requests into sequences to measure on: each different request once, those with one context side by side.

>>> from layersurgery.tasks.request_text import Request, RequestText
>>> text = RequestText.of([Request((1, 2), (3,)), Request((1,), (4, 5, 6)), Request((1, 2), (3,))])
>>> text.ids.tolist(), text.scored.int().tolist(), text.sequence_of
([[1, 4, 5, 6], [1, 2, 3, 0]], [[0, 1, 1, 1], [0, 0, 1, 0]], (1, 0, 1))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Request:
    """Ask to score a continuation after a context, both as token ids.

    Attributes:
        context: tokens before the continuation; never empty.
        continuation: tokens to score; never empty.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True, slots=True)
class Answer:
    """Hold what a model says to a request.

    Attributes:
        log_likelihood: sum of the log-probabilities of the continuation's tokens, in nats.
        is_greedy: whether each of these tokens is the most likely one.
    """

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class RequestText:
    """Hold requests as sequences, padded on the right.

    Attributes:
        ids: token ids, (sequences, length).
        mask: 1 for a token and 0 for padding, the same shape.
        scored: True for the tokens of continuations, the same shape.
        sequence_of: number of each request's sequence.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    scored: torch.Tensor
    sequence_of: tuple[int, ...]

    @classmethod
    def of(cls, requests: Sequence[Request], order: Sequence[Request] | None = None) -> RequestText:
        """Make it of requests, of which some may be equal; in another order than the longest first if it is given."""
        different = list(dict.fromkeys(_longest_first(requests) if order is None else order))
        numbers = {request: number for number, request in enumerate(different)}
        ids = torch.zeros(len(different), max(request.length for request in different), dtype=torch.long)
        mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for number, request in enumerate(different):
            ids[number, : request.length] = torch.tensor([*request.context, *request.continuation])
            mask[number, : request.length] = 1
            scored[number, len(request.context) : request.length] = True
        return cls(ids, mask, scored, tuple(numbers[request] for request in requests))


def _longest_first(requests: Sequence[Request]) -> list[Request]:
    """Return the requests with one context side by side, so that a measurement can run their context once."""
    longest: dict[tuple[int, ...], int] = {}
    for request in requests:
        longest[request.context] = max(longest.get(request.context, 0), request.length)
    order = {context: number for number, context in enumerate(longest)}
    return sorted(requests, key=lambda request: (-longest[request.context], order[request.context], -request.length))
