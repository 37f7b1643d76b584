"""Simulate sweeps and races that stop when they are sure, from the sums by sequence of a finished sweep.

Nothing is measured again. A simulated text draws the sweep's own sequences, each as often as chance wants (the
bootstrap), so that the true means are known: those of the sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layersurgery.metrics.aggregation import BatchResult
from layersurgery.metrics.intervals import MIN_SEQUENCES, Interval, fixed_interval
from layersurgery.metrics.reference import METRICS
from layersurgery.plans.route import Route
from layersurgery.runs.tables import read_results
from layersurgery.sweeps.precision import Precision
from layersurgery.sweeps.race import Race
from layersurgery.sweeps.row_progress import RowProgress, StopRule
from layersurgery.sweeps.schedule import schedule

from .timing import append_results, make_table, wide_console

Array = npt.NDArray[np.float64]
_KL = METRICS.index("kl_nats")
_PAPER_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class KeptSums:
    """Sums by sequence of a finished sweep.

    Attributes:
        frame: its results.
        values: sums, (sequences, rows, len(METRICS)).
        counts: positions of each sequence, (sequences,).
        context: tokens of the longest sequence.
    """

    frame: pd.DataFrame
    values: Array
    counts: Array
    context: int

    @classmethod
    def read(cls, directory: Path) -> KeptSums:
        """Read the sums of a sweep that measured all of its text."""
        frame, table = read_results(directory), read_results(directory, "sequences")
        shape = (table.sequence.nunique(), len(frame))
        columns = [table[f"{metric}_sum"].to_numpy().reshape(shape) for metric in METRICS]
        counts = table.tokens.to_numpy(float).reshape(shape)[:, 0]
        return cls(frame, np.stack(columns, -1), counts, int(counts.max()) + 1)

    def means(self) -> Array:
        """Return the means over all positions, (rows, len(METRICS))."""
        return np.asarray(self.values.sum(0) / self.counts.sum())

    def calls(self, rows: list[int]) -> int:
        """Return the block calls of a batch on these rows and the unedited model."""
        routes = [Route.parse(self.frame.route[row]) for row in rows if row]
        return schedule(routes, int(self.frame.depth[0])).calls

    def rows(self, edit: str) -> list[int]:
        """Return the rows of a family of edits."""
        return list(np.flatnonzero(self.frame.edit == edit))


def stop(
    kept: KeptSums, rule: StopRule, order: npt.NDArray[np.int64], rows: list[int], size: int
) -> tuple[RowProgress, float]:
    """Let rows stop on a text of these sequences; return who stopped where, and block calls times positions.

    Args:
        kept: the sums.
        rule: says which rows need no more text.
        order: numbers of the text's sequences.
        rows: rows of the sweep that are measured; they are numbered from 1 here.
        size: sequences of a batch.
    """
    progress, cost = RowProgress(len(rows) + 1, -(-len(order) // size), rule), 0.0
    calls: dict[tuple[int, ...] | None, int] = {}
    while work := progress.next(1):
        ((batch, missing),) = work
        chosen = order[batch * size : (batch + 1) * size]
        values, counts = kept.values[chosen][:, [0, *rows]], kept.counts[chosen]
        if missing is not None:
            values[:, [row for row in range(len(rows) + 1) if row not in missing]] = np.nan
        if missing not in calls:
            calls[missing] = kept.calls(rows if missing is None else [rows[row - 1] for row in missing if row])
        cost += calls[missing] * counts.sum()
        empty = np.zeros((len(chosen), 0))
        progress.add(batch, BatchResult(batch * size, counts.astype(int).tolist(), values, empty, rows=missing))
    return progress, cost


def coverage(kept: KeptSums, precision: Precision, orders: int, most: int) -> list[dict[str, Any]]:
    """Count how often the true mean lies in the interval where a row stops, for both kinds of interval.

    Each order measures one edit, the next one in turn.
    """
    truth, rows = kept.means(), []
    edits = [row for row in range(1, len(kept.frame)) if kept.frame.kl_nats[row] > 0]
    for target in precision.targets:
        alone = Precision((target,), precision.confidence, kept.context - 1)
        column = METRICS.index(target.metric)

        def at_every_stop(
            values: Array, counts: Array, alone: Precision = alone, metric: str = target.metric
        ) -> Interval:
            return alone.interval(metric, values, counts)

        def for_a_fixed_number(values: Array, counts: Array, column: int = column) -> Interval:
            return fixed_interval(values[:, column], counts, precision.confidence)

        ways: dict[str, Callable[[Array, Array], Interval]] = {
            "at every stopping time": at_every_stop,
            "for a fixed number": for_a_fixed_number,
        }
        for way, interval in ways.items():
            held, sequences = 0, []
            for number in range(orders):
                order = np.random.default_rng(number).integers(len(kept.counts), size=most)
                row, n = edits[number % len(edits)], MIN_SEQUENCES
                while True:
                    low, high = interval(kept.values[order[:n], row], kept.counts[order[:n]])
                    if target.reached((low, high)) or n >= most:
                        break
                    n = min(most, n + max(1, n // 20))
                held += low <= truth[row, column] <= high
                sequences.append(n)
            rows.append(
                {
                    "part": "coverage", "what": f"{target}, interval {way}", "orders": orders, "share": held / orders,
                    "sequences": float(np.median(sequences)),
                }
            )  # fmt: skip
    return rows


def saving(kept: KeptSums, precision: Precision, repetitions: int, most: int) -> list[dict[str, Any]]:
    """Count the block calls of a sweep that stops, against those of the paper's million tokens."""
    rows = list(range(1, len(kept.frame)))
    rule = replace(precision, positions=kept.context - 1)
    whole = kept.calls(rows) * _PAPER_TOKENS
    ratios, correlations = [], []
    for number in range(repetitions):
        order = np.random.default_rng(number).integers(len(kept.counts), size=most)
        progress, cost = stop(kept, rule, order, rows, max(1, 512 // kept.context))
        ratios.append(whole / cost)
        found = progress.sums().means_and_errors()[0][1:, _KL]
        correlations.append(
            min(
                pd.Series(found[[row - 1 for row in kept.rows(edit)]]).corr(
                    pd.Series(kept.means()[kept.rows(edit), _KL]), method="spearman"
                )
                for edit in ("swap", "drop")
            )
        )
    return [
        {
            "part": "saving", "what": f"block calls x tokens of a million tokens / until {precision}",
            "orders": repetitions, "ratio": float(np.median(ratios)), "spearman": float(min(correlations)),
        }
    ]  # fmt: skip


def race(kept: KeptSums, lowest: int, repetitions: int, sequences: int) -> list[dict[str, Any]]:
    """Race for the layers with the lowest KL on resampled texts of so many sequences."""
    rows, same, extra, ratios = kept.rows("drop"), 0, [], []
    size, truth = max(1, 512 // kept.context), kept.means()[kept.rows("drop"), _KL]
    for number in range(repetitions):
        order = np.random.default_rng(number).integers(len(kept.counts), size=sequences)
        rule = Race(lowest)
        progress, cost = stop(kept, rule, order, rows, size)
        whole = kept.values[order][:, rows, _KL].sum(0)
        means = progress.sums().means_and_errors()[0][1:, _KL]
        # As `analyses.layer_ranking.race_order` does: the race's own answer first, then the values.
        keys = [
            (rule.outcome(row) == "higher", rule.outcome(row) != "lowest", means[row - 1])
            for row in range(1, len(rows) + 1)
        ]
        chosen = sorted(range(len(rows)), key=lambda row: keys[row])[:lowest]
        best = np.argsort(whole, kind="stable")[:lowest]
        same += set(chosen) == set(best.tolist())
        extra.append(truth[chosen].sum() / truth[best].sum() - 1)
        ratios.append(kept.calls(rows) * kept.counts[order].sum() / cost)
    return [
        {
            "part": "race", "what": f"the {lowest} lowest of {len(rows)} drops, {sequences} sequences",
            "orders": repetitions,
            "share": same / repetitions, "ratio": float(np.median(ratios)), "worst_extra_kl": float(max(extra)),
        }
    ]  # fmt: skip


def measure(
    directory: Path, until: str, lowest: int, orders: int, *, as_json: bool = False, name: str = "stopping"
) -> list[dict[str, Any]]:
    """Simulate everything, and print it; the rows are appended to the results.

    Args:
        directory: a finished sweep of swap and drop that measured all of its text.
        until: the precision.
        lowest: number of layers that the race searches.
        orders: number of random texts for coverage; a tenth of it for the race, a hundredth for the saving.
        as_json: print progress on stderr, since stdout is for JSON.
        name: name of the results file.
    """
    kept, precision = KeptSums.read(directory), Precision.parse(until)
    most = _PAPER_TOKENS // kept.context
    found = [
        *coverage(kept, precision, orders, most),
        *saving(kept, precision, max(1, orders // 100), most),
        *race(kept, lowest, max(1, orders // 10), len(kept.counts)),
        *race(kept, lowest, max(1, orders // 10), 4 * len(kept.counts)),
    ]
    rows = [{"model": kept.frame.model[0], "context": kept.context, **row} for row in found]
    title = f"{kept.frame.model[0]}, {len(kept.counts)} kept sequences of {kept.context} tokens, resampled"
    table = make_table(title, "what", "texts", "held / same", "x fewer", "sequences", "rank correlation", "extra KL")
    for row in rows:
        cells = [
            row.get("share"),
            row.get("ratio"),
            row.get("sequences"),
            row.get("spearman"),
            row.get("worst_extra_kl"),
        ]
        table.add_row(row["what"], str(row["orders"]), *("" if cell is None else f"{cell:.3g}" for cell in cells))
    console = wide_console(stderr=as_json)
    console.print(table)
    console.print(f"Appended to {append_results(name, rows)}")
    return rows
