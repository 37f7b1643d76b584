"""Say how precisely edits are to be measured, and tell when a row of the results is known well enough.

>>> from layersurgery.sweeps.precision import Precision
>>> str(Precision.parse("agreement=0.5pt, kl=2%"))
'agreement to 0.5 pt, kl_nats to 2 %'
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import PlanError
from ..metrics.intervals import (
    CONFIDENCE,
    MIN_SEQUENCES,
    Interval,
    asymptotic_interval,
    betting_interval,
    student_errors,
)
from ..metrics.reference import METRICS
from ..registry import Column, column

if TYPE_CHECKING:
    import pandas as pd
    import torch

Array = npt.NDArray[np.float64]

_AMOUNT = re.compile(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*([a-z%]+)", re.IGNORECASE)
_POINTS = ("pt", "pts", "pp")


@dataclass(frozen=True, slots=True)
class Target:
    """Half width of the interval that one metric is to have.

    Attributes:
        metric: one of `METRICS`.
        amount: the half width, in the table's unit (a share for percentages), or a share of the mean.
        relative: whether it is a share of the mean.
    """

    metric: str
    amount: float
    relative: bool

    def __str__(self) -> str:
        entry = column(self.metric)
        if self.relative:
            return f"{self.metric} to {100 * self.amount:g} %"
        return f"{self.metric} to {entry.factor * self.amount:g} {_unit(entry)}"

    def reached(self, interval: Interval) -> bool:
        """Return whether an interval is narrow enough; never if it is NaN."""
        low, high = interval
        return (high - low) / 2 <= self.amount * (abs(high + low) / 2 if self.relative else 1)


@dataclass(frozen=True, slots=True)
class Precision:
    """Precision at which an edit is finished: every target must be reached.

    Attributes:
        targets: the half widths that are asked for.
        confidence: probability that the intervals of one metric of one edit hold its true mean, whenever one stops.
        positions: number of positions of each sequence, known before the text is measured; 0 if they differ. Shares
            have betting intervals only where it is known, since these are wide for sequences of unequal length.
    """

    targets: tuple[Target, ...]
    confidence: float = CONFIDENCE
    positions: int = 0

    @classmethod
    def parse(cls, until: str | Mapping[str, str], confidence: float = CONFIDENCE) -> Precision:
        """Parse "agreement=0.5pt,kl=2%".

        Args:
            until: conditions, separated by commas; or the amounts by metric. An amount is relative to the mean (%), or
                absolute with the metric's unit: pt (percentage points), nats or bits.
            confidence: between 0.5 and 1.

        Raises:
            PlanError: an unknown metric (the error names the nearest), or a wrong amount or confidence.
        """
        confidence = check_confidence(confidence)
        if isinstance(until, str):
            conditions = [part.partition("=") for part in until.split(",") if part.strip()]
            pairs = [(name.strip(), amount.strip()) for name, _, amount in conditions]
        elif isinstance(until, Mapping):
            pairs = [(str(name), str(amount)) for name, amount in until.items()]
        else:
            raise PlanError(f'`until` is text such as "agreement=0.5pt,kl=2%", not {until!r}')
        if not pairs:
            raise PlanError('`until` is empty; give for example "agreement=0.5pt,kl=2%"')
        targets = tuple(_parse_target(name, amount) for name, amount in pairs)
        if len({target.metric for target in targets}) < len(targets):
            raise PlanError(f"`until` names a metric twice: {until}")
        return cls(targets, confidence)

    def __str__(self) -> str:
        return ", ".join(map(str, self.targets))

    def sequences_left(self, frame: pd.DataFrame) -> pd.Series:
        """Estimate how many more sequences each row of a table of results needs to be precise enough.

        Widths shrink with the root of the number of sequences; the estimate is rough while there are few.

        Args:
            frame: a table of `results.results_table` with intervals.

        Returns:
            One number for each row of the table; NaN where nothing is known yet.
        """
        needed = 0 * frame.sequences
        for target in self.targets:
            low, high = frame[f"{target.metric}_low"], frame[f"{target.metric}_high"]
            goal = target.amount * ((low + high).abs() / 2 if target.relative else 1)
            needed = np.maximum(needed, frame.sequences * ((high - low) / 2 / goal) ** 2)
        return (needed - frame.sequences).clip(lower=0)

    def for_text(self, mask: torch.Tensor) -> Precision:
        """Return the precision for a text; `mask` is 1 for a token and 0 for padding, (sequences, length)."""
        return replace(self, positions=mask.shape[1] - 1 if bool(mask.all()) else 0)

    def record(self) -> dict[str, Any]:
        """Return what `run.json` records: the targets and the confidence."""
        return {"targets": str(self), "confidence": self.confidence}

    def finished(self, values: Array, counts: Array, rows: Sequence[int]) -> set[int]:
        """Return the rows that are measured precisely enough, and those whose values are not finite.

        Args:
            values: sums by sequence of all rows, (sequences, rows, len(METRICS)).
            counts: positions of each sequence, (sequences,), none of them 0.
            rows: the rows that are still measured.
        """
        columns = [METRICS.index(target.metric) for target in self.targets]
        # A value that is not finite does not become precise.
        broken = {row for row in rows if not np.isfinite(values[:, row][:, columns]).all()}
        return broken | {row for row in rows if self.reached(values[:, row], counts)}

    def reached(self, values: Array, counts: Array) -> bool:
        """Return whether one row is measured precisely enough; arguments as for `interval`."""
        return len(counts) >= MIN_SEQUENCES and all(
            target.reached(self.interval(target.metric, values, counts)) for target in self.targets
        )

    def interval(self, metric: str, values: Array, counts: Array) -> Interval:
        """Return the interval of a metric of one row, which holds whenever one stops.

        Args:
            metric: one of `METRICS`.
            values: the row's sums by sequence, (sequences, len(METRICS)).
            counts: positions of each sequence, (sequences,).
        """
        sums = values[:, METRICS.index(metric)]
        if not (is_share(metric) and self.positions):
            return asymptotic_interval(sums, counts, self.confidence)
        aim = next((target.amount for target in self.targets if target.metric == metric and not target.relative), None)
        return betting_interval(sums, counts, self.positions, self.confidence, aim)


def row_intervals(
    precision: Precision | None, values: Array, counts: Array, means: Array, errors: Array
) -> list[Interval]:
    """Return the intervals of all metrics of a row: for every stopping time, or for a fixed number of sequences.

    Args:
        precision: the precision at which the run stops; None if it measures all text.
        values: the row's sums by sequence, (sequences, len(METRICS)).
        counts: positions of each sequence, (sequences,).
        means: the row's means, (len(METRICS),).
        errors: their standard errors, the same shape.
    """
    if precision is None:
        halves = errors * student_errors(len(counts), CONFIDENCE)
        return list(zip((means - halves).tolist(), (means + halves).tolist(), strict=True))
    return [precision.interval(metric, values, counts) for metric in METRICS]


def is_share(metric: str) -> bool:
    """Return whether each position's value of a metric is between 0 and 1."""
    return column(metric).unit == "%"


def check_confidence(confidence: float) -> float:
    """Return the confidence as a number.

    Raises:
        PlanError: it is not between 0.5 and 1.
    """
    try:
        value = float(confidence)
    except (TypeError, ValueError):
        value = 0.0
    if not 0.5 <= value < 1:
        raise PlanError(f"`confidence` is a share between 0.5 and 1, such as 0.95, not {confidence!r}")
    return value


def _parse_target(name: str, text: str) -> Target:
    metric = _find_metric(name)
    entry = column(metric)
    match = _AMOUNT.fullmatch(text)
    unit = match[2].lower() if match else ""
    amount = float(match[1]) if match else 0.0
    if unit == "%" and amount > 0:
        return Target(metric, amount / 100, relative=True)
    if amount > 0 and (unit in _POINTS if is_share(metric) else unit == entry.unit):
        return Target(metric, amount / entry.factor, relative=False)
    raise PlanError(
        f"`until` {name}={text}: give an amount such as {name}=2% of the mean, or {name}="
        f"{'0.5pt (percentage points)' if is_share(metric) else f'0.01{entry.unit}'}"
    )


def _find_metric(name: str) -> str:
    short = {metric.removesuffix(f"_{column(metric).unit}"): metric for metric in METRICS}
    if name in METRICS or name in short:
        return short.get(name, name)
    near = difflib.get_close_matches(name, [*short, *METRICS], n=1)
    hint = f"did you mean {near[0]}?" if near else f"the metrics are {', '.join(short)}"
    raise PlanError(f"`until` has no metric {name!r}; {hint}")


def _unit(entry: Column) -> str:
    return "pt" if entry.unit == "%" else entry.unit
