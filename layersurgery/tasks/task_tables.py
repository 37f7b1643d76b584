"""Make tables of the tasks' metrics from measured sums."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.aggregation import SequenceSums, ratio
from ..metrics.intervals import asymptotic_interval, fixed_interval
from .harness import Harness
from .request_text import Answer, RequestText
from .task_precision import TaskRule
from .task_sums import ACCURACY, LOSS, answer_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Key = tuple[str, str, str]
"""Names of a task, of a metric and of lm-eval's filter."""
PREFIX = "task_"
"""What the names of columns of tasks begin with."""
NOT_MEASURED = Answer(0.0, is_greedy=False)
"""Stands for an answer that is not known; the metrics of its document are not used."""


def answers(text: RequestText, sums: SequenceSums, row: int) -> list[Answer]:
    """Return a model's answers to the requests.

    Args:
        text: the requests as sequences.
        sums: the measured sums of all sequences.
        row: the model's row in the sums.
    """
    known = [answer_of(values, count) for values, count in zip(*sums.of_row(row), strict=True)]
    return [known[number] if number < len(known) else NOT_MEASURED for number in text.sequence_of]


def task_columns(harness: Harness, sums: SequenceSums, rule: TaskRule | None = None) -> pd.DataFrame:
    """Compute the metrics of all tasks for every model.

    Args:
        harness: the tasks.
        sums: the measured sums of all sequences; row 0 is the unedited model.
        rule: the rule by which an edit needed no more documents; None if all were measured.

    Returns:
        A row for each model. For each metric of a task: its value (`task_arc_easy_acc`), its standard error as lm-eval
        computes it (`..._sem`), and where the metric is a mean over documents, the mean difference to the unedited
        model on the same documents (`..._change`) with its standard error (`..._change_sem`) and the ends of its
        interval (`..._change_low`, `..._change_high`): of 95 %, or with a rule as it asks. NaN for a model whose
        predictions are not finite. With a rule also `documents`, how many documents are known of the row, and
        `precise`, whether its changes are as precise as asked; groups of tasks have no columns then.
    """
    import pandas as pd

    return pd.DataFrame([entry for entry, _, _ in evaluations(harness, sums, rule)])


def evaluations(
    harness: Harness, sums: SequenceSums, rule: TaskRule | None = None
) -> Iterator[tuple[dict[str, Any], Mapping[Key, np.ndarray], Mapping[str, Any] | None]]:
    """Yield for each model its row of `task_columns`, its metrics of each document, and what lm-eval returned.

    The metrics are by task, metric and filter; empty arrays for a metric that is not a mean over documents. None and
    nothing for a model whose predictions are not finite.
    """
    base: Mapping[Key, Mapping[int, Any]] = {}
    for row in range(sums.values.shape[1]):
        of_row, counts = sums.of_row(row)
        if not np.isfinite(of_row[:, LOSS]).all():
            yield ({} if rule is None else {"documents": 0, "precise": False}), {}, None
            continue
        results = harness.evaluate(answers(harness.text, sums, row))
        known = None if rule is None else frozenset(harness.complete(len(counts)))
        entry: dict[str, Any] = {}
        if known is not None and rule is not None:
            unedited = sums.of_row(0)[0][: len(counts)]
            precise = rule.reached(unedited, of_row, counts, row) if row else None
            entry = {"documents": len(known), "precise": precise}
        values = {key: _values(results, *key, known) for key in _keys(results)}
        base = base or values
        means = {key: np.zeros(0) for key in values}
        for (task, metric, kind), of_documents in values.items():
            if known is not None and not of_documents:
                continue
            name = column_name(task, metric, kind)
            scores = results["results"][task]
            value, error = scores[f"{metric},{kind}"], scores.get(f"{metric}_stderr,{kind}")
            if known is not None:
                value, error = harness.aggregate(task, metric, list(of_documents.values()))
            entry[name] = float(value)
            entry[f"{name}_sem"] = float(error) if isinstance(error, int | float) else math.nan
            if is_mean(of_documents.values(), entry[name]):
                others = base[task, metric, kind]
                differences = np.array([value - others[number] for number, value in of_documents.items()], float)
                ones = np.ones(len(differences))
                entry[f"{name}_change"], entry[f"{name}_change_sem"] = ratio(differences, ones)
                low, high = fixed_interval(differences, ones)
                if rule is not None and row:
                    is_asked = harness.first_metric(task) == metric
                    asked = rule.interval(task, unedited, of_row, counts, row) if is_asked else None
                    low, high = asked or asymptotic_interval(differences, ones, rule.targets.confidence)
                entry[f"{name}_change_low"], entry[f"{name}_change_high"] = low, high
                means[task, metric, kind] = np.array([*of_documents.values()], float)
        yield entry, means, results


def column_name(task: str, metric: str, kind: str = "none") -> str:
    """Return the name of the column of a task's metric.

    Example:
        >>> from layersurgery.tasks.task_tables import column_name
        >>> column_name("arc_easy", "acc")
        'task_arc_easy_acc'
    """
    return f"{PREFIX}{task}_{metric_name(metric, kind)}"


def metric_name(metric: str, kind: str = "none") -> str:
    """Return the name of a metric of a task, with that of its filter if it has one."""
    return metric if kind == "none" else f"{metric}_{kind}"


def request_table(harness: Harness, sums: SequenceSums, names: Sequence[str]) -> pa.Table:
    """Make a table with a row for each request and model, from which the metrics can be computed again.

    Args:
        harness: the tasks.
        sums: the measured sums of all sequences.
        names: names of the models, in the order of the sums' rows.
    """
    import pyarrow as pa

    each = len(names)
    numbers = np.asarray(harness.text.sequence_of)
    requests = np.flatnonzero(numbers < len(sums))  # no edit needs the others
    numbers, labels = numbers[requests], [harness.labels[request] for request in requests]
    values = sums.values[numbers]
    greedy = np.round(values[:, :, ACCURACY]) == sums.counts[numbers][:, None]
    table = pa.table(
        {
            "request": pa.array(np.repeat(requests, each), pa.int32()),
            "task": pa.array([task for task, _ in labels for _ in names]).dictionary_encode(),
            "document": pa.array(np.repeat([document for _, document in labels], each), pa.int32()),
            "row": pa.array(np.tile(np.arange(each), len(numbers)), pa.int32()),
            "name": pa.array(list(names) * len(numbers)).dictionary_encode(),
            "tokens": pa.array(np.repeat(sums.counts[numbers].astype("int64"), each), pa.int32()),
            "log_likelihood": pa.array(-values[:, :, LOSS].reshape(-1)),
            "is_greedy": pa.array(greedy.reshape(-1)),
        }
    )
    return table if sums.used is None else table.filter(pa.array(sums.used[numbers].reshape(-1)))


def _keys(results: Mapping[str, Any]) -> Iterator[Key]:
    """Yield task, metric and filter of each metric that has a value."""
    for task, scores in results["results"].items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield task, metric, kind


def _values(
    results: Mapping[str, Any], task: str, metric: str, kind: str, known: frozenset[tuple[str, int]] | None
) -> dict[int, Any]:
    """Return a metric of each document, by its number; only of those that are known, if some are not."""
    samples = [sample for sample in results["samples"].get(task, ()) if sample["filter"] == kind and metric in sample]
    found = {sample["doc_id"]: sample[metric] for sample in samples}
    return {number: value for number, value in found.items() if known is None or (task, number) in known}


def is_mean(values: Collection[Any], value: float) -> bool:
    """Return whether a metric is the mean of its values of documents."""
    if not values or not all(isinstance(each, int | float) for each in values):
        return False
    return math.isclose(float(np.mean([*values])), value, rel_tol=1e-9, abs_tol=1e-12)
