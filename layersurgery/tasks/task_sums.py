"""Read what a model says to requests from measured sums."""

from __future__ import annotations

from ..metrics.aggregation import Array
from ..metrics.reference import METRICS
from .request_text import Answer

LOSS, ACCURACY = METRICS.index("loss_nats"), METRICS.index("accuracy")


def answer_of(sums: Array, count: float) -> Answer:
    """Return a model's answer to a request.

    Args:
        sums: the measured sums of the request's sequence, (len(METRICS),).
        count: number of tokens of the continuation.
    """
    return Answer(-float(sums[LOSS]), bool(round(float(sums[ACCURACY])) == count))
