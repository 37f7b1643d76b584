"""Say how precisely the change of a task's metric is to be measured, and tell when an edit needs no more documents.

>>> from layersurgery.tasks.task_precision import TaskTargets
>>> str(TaskTargets.parse({"arc_easy": "2pt"}, 0.95))
'arc_easy to 2 pt'
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MeasurementError, PlanError
from ..metrics.aggregation import Array
from ..metrics.intervals import Interval, betting_interval
from ..sweeps.precision import Precision, check_confidence
from .request_text import Answer
from .task_sums import answer_of

if TYPE_CHECKING:
    from .harness import Harness

_AMOUNT = re.compile(r"([0-9]*\.?[0-9]+)\s*(pt|pts|pp)?")


@dataclass(frozen=True, slots=True)
class TaskTargets:
    """Hold the half width that the interval of the change of each task's first metric is to have.

    Attributes:
        amounts: the half widths by task, as shares.
        confidence: probability that the intervals of one task and edit hold its true change, whenever one stops.
        seed: of the order of the documents.
    """

    amounts: tuple[tuple[str, float], ...]
    confidence: float
    seed: int = 0

    @classmethod
    def parse(cls, amounts: Mapping[str, str], confidence: Any, seed: int = 0) -> TaskTargets:
        """Parse the amount of each task: "2pt" (percentage points), or a share such as "0.02".

        Raises:
            PlanError: an amount or the confidence cannot be understood.
        """
        found = []
        for name, text in amounts.items():
            match = _AMOUNT.fullmatch(text.strip())
            amount = float(match[1]) / (100 if match[2] else 1) if match else 0.0
            if not 0 < amount < 1:
                raise PlanError(
                    f"`until` {name}={text}: give half of the interval's width in percentage points, such as {name}=2pt"
                )
            found.append((name, amount))
        return cls(tuple(found), check_confidence(confidence), seed)

    def __str__(self) -> str:
        return ", ".join(f"{name} to {100 * amount:g} pt" for name, amount in self.amounts)

    def record(self) -> dict[str, Any]:
        """Return what `run.json` records: the targets and the confidence."""
        return {"targets": str(self), "confidence": self.confidence}


class TaskRule:
    """Rule that finishes an edit once the changes of the tasks' metrics are known as precisely as asked.

    The change of a document's value, between -1 and 1, has a betting interval, which holds at every number of documents
    together. It asks for documents in random order.

    Args:
        targets: the half widths.
        harness: the tasks, with their documents in random order; None as long as they are not loaded.
    """

    def __init__(self, targets: TaskTargets, harness: Harness | None) -> None:
        self.targets, self.harness = targets, harness
        self._values: dict[tuple[int, str], dict[int, float]] = {}

    @property
    def precision(self) -> Precision:
        """Return the kind of the intervals of the metrics that nothing is asked of."""
        return Precision((), self.targets.confidence)

    def record(self) -> dict[str, Any]:
        """Return what `run.json` records."""
        return self.targets.record()

    def finished(self, values: Array, counts: Array, rows: Sequence[int]) -> set[int]:
        """Return the rows that are measured precisely enough, and those whose values are not finite."""
        broken = {row for row in rows if not np.isfinite(values[:, row]).all()}
        known = [row for row in rows if row not in broken]
        return broken | {row for row in known if self.reached(values[:, 0], values[:, row], counts, row)}

    def reached(self, base: Array, values: Array, counts: Array, row: int) -> bool:
        """Return whether the changes of a row are known precisely enough; arguments as for `interval`."""
        return all(
            (interval := self.interval(task, base, values, counts, row)) is not None
            and (interval[1] - interval[0]) / 2 <= amount
            for task, amount in self.targets.amounts
        )

    def interval(self, task: str, base: Array, values: Array, counts: Array, row: int) -> Interval | None:
        """Return the interval of the change of a task's first metric; None before any of its documents is measured.

        Args:
            task: the task.
            base: sums of the unedited model, (sequences, len(METRICS)).
            values: sums of the edited model, the same shape.
            counts: tokens that each sequence scores, (sequences,).
            row: number of the edited model.
        """
        harness = self.harness
        assert harness is not None
        documents = [number for name, number in harness.complete(len(counts)) if name == task]
        if not documents:
            return None
        changes = self._of(0, task, documents, base, counts), self._of(row, task, documents, values, counts)
        amount = dict(self.targets.amounts)[task]
        return change_interval(changes[1] - changes[0], self.targets.confidence, amount)

    def _of(self, row: int, task: str, documents: Sequence[int], sums: Array, counts: Array) -> Array:
        """Return the metric of each document; each is computed once."""
        assert self.harness is not None
        known = self._values.setdefault((row, task), {})
        for number in documents:
            if number not in known:
                answers = [
                    answer_of(sums[sequence], counts[sequence]) for sequence in self.harness.sequences_of(task, number)
                ]
                known[number] = value_of(self.harness, task, number, answers)
        return np.array([known[number] for number in documents])


def value_of(harness: Harness, task: str, document: int, answers: Sequence[Answer]) -> float:
    """Return the first metric of a document, which lm-eval computes.

    Raises:
        MeasurementError: it is not between 0 and 1.
    """
    value = harness.document_value(task, document, answers)
    if not 0 <= value <= 1:
        raise MeasurementError(
            f"{task}: lm-eval gave a document {value}, which is not between 0 and 1; leave `until` out"
        )
    return value


def change_interval(changes: Array, confidence: float, half_width: float) -> Interval:
    """Return the interval of the mean of changes between -1 and 1 that holds at every number of documents together."""
    low, high = betting_interval((changes + 1) / 2, np.ones(len(changes)), 1, confidence, half_width / 2)
    return 2 * low - 1, 2 * high - 1
