"""Make tables of the tasks' metrics from measured sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.aggregation import SequenceSums, ratio
from ..metrics.intervals import fixed_interval
from ..metrics.reference import METRICS
from .harness import Harness
from .request_text import Answer, RequestText

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Key = tuple[str, str, str]
"""Names of a task, of a metric and of lm-eval's filter."""
PREFIX = "task_"
"""What the names of columns of tasks begin with."""
_LOSS, _ACCURACY = METRICS.index("loss_nats"), METRICS.index("accuracy")


def answers(text: RequestText, sums: SequenceSums, row: int) -> list[Answer]:
    """Return a model's answers to the requests.

    Args:
        text: the requests as sequences.
        sums: the measured sums of all sequences.
        row: the model's row in the sums.
    """
    losses, right = sums.values[:, row, _LOSS], sums.values[:, row, _ACCURACY]
    return [
        Answer(-float(losses[number]), bool(round(right[number]) == sums.counts[number])) for number in text.sequence_of
    ]


def task_columns(harness: Harness, sums: SequenceSums) -> pd.DataFrame:
    """Compute the metrics of all tasks for every model.

    Args:
        harness: the tasks.
        sums: the measured sums of all sequences; row 0 is the unedited model.

    Returns:
        A row for each model. For each metric of a task: its value (`task_arc_easy_acc`), its standard error as lm-eval
        computes it (`..._sem`), and where the metric is a mean over documents, the mean difference to the unedited
        model on the same documents (`..._change`) with its standard error (`..._change_sem`) and the ends of its 95 %
        interval (`..._change_low`, `..._change_high`). NaN for a model whose predictions are not finite.
    """
    import pandas as pd

    return pd.DataFrame([entry for entry, _, _ in evaluations(harness, sums)])


def evaluations(
    harness: Harness, sums: SequenceSums
) -> Iterator[tuple[dict[str, float], Mapping[Key, np.ndarray], Mapping[str, Any] | None]]:
    """Yield for each model its row of `task_columns`, its metrics of each document, and what lm-eval returned.

    The metrics are by task, metric and filter; empty arrays for a metric that is not a mean over documents. None and
    nothing for a model whose predictions are not finite.
    """
    base: Mapping[Key, np.ndarray] = {}
    for row in range(sums.values.shape[1]):
        if not np.isfinite(sums.values[:, row, _LOSS]).all():
            yield {}, {}, None
            continue
        results = harness.evaluate(answers(harness.text, sums, row))
        values = {key: _values(results, *key) for key in _keys(results)}
        base = base or values
        entry: dict[str, float] = {}
        for (task, metric, kind), of_documents in values.items():
            name = column_name(task, metric, kind)
            scores = results["results"][task]
            entry[name] = float(scores[f"{metric},{kind}"])
            error = scores.get(f"{metric}_stderr,{kind}")
            entry[f"{name}_sem"] = float(error) if isinstance(error, int | float) else math.nan
            if len(of_documents):
                differences, ones = of_documents - base[task, metric, kind], np.ones(len(of_documents))
                entry[f"{name}_change"], entry[f"{name}_change_sem"] = ratio(differences, ones)
                entry[f"{name}_change_low"], entry[f"{name}_change_high"] = fixed_interval(differences, ones)
        yield entry, values, results


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
    values = sums.values[numbers]
    greedy = np.round(values[:, :, _ACCURACY]) == sums.counts[numbers][:, None]
    return pa.table(
        {
            "request": pa.array(np.repeat(np.arange(len(numbers)), each), pa.int32()),
            "task": pa.array([task for task, _ in harness.labels for _ in names]).dictionary_encode(),
            "document": pa.array(np.repeat([document for _, document in harness.labels], each), pa.int32()),
            "row": pa.array(np.tile(np.arange(each), len(numbers)), pa.int32()),
            "name": pa.array(list(names) * len(numbers)).dictionary_encode(),
            "tokens": pa.array(np.repeat(sums.counts[numbers].astype("int64"), each), pa.int32()),
            "log_likelihood": pa.array(-values[:, :, _LOSS].reshape(-1)),
            "is_greedy": pa.array(greedy.reshape(-1)),
        }
    )


def _keys(results: Mapping[str, Any]) -> Iterator[Key]:
    """Yield task, metric and filter of each metric that has a value."""
    for task, scores in results["results"].items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield task, metric, kind


def _values(results: Mapping[str, Any], task: str, metric: str, kind: str) -> np.ndarray:
    """Return a metric of each document if the task's value is the mean of these; else nothing."""
    samples = [sample for sample in results["samples"].get(task, ()) if sample["filter"] == kind]
    found = [sample.get(metric) for sample in samples]
    if not found or not all(isinstance(value, int | float) for value in found):
        return np.zeros(0)
    values = np.asarray(found, float)
    mean = results["results"][task][f"{metric},{kind}"]
    return values if math.isclose(values.mean(), mean, rel_tol=1e-9, abs_tol=1e-12) else np.zeros(0)
