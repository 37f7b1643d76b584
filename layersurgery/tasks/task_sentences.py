"""Say in sentences with which edits the metrics of tasks are best and worst."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..registry import column, first_metrics

if TYPE_CHECKING:
    import pandas as pd


def task_sentences(frame: pd.DataFrame) -> list[str]:
    """Say for each task how its metric changes, in sentences without a full stop.

    Args:
        frame: results of a sweep.

    Returns:
        Of each task with an accuracy, the edits with which it is highest and lowest; of another one, the edits with
        which its metrics change least and most. Empty for a sweep without tasks.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.tasks.task_sentences import task_sentences
        >>> results = pd.DataFrame({"edit": ["none", "drop", "drop"], "name": ["unedited", "drop 0", "drop 1"]})
        >>> print(*task_sentences(results.assign(task_arc_easy_acc=[0.6, 0.25, 0.58])))
        accuracy on arc_easy is 0.6 in the unedited model; under edits it is highest with drop 1 (0.58) and lowest ...
    """
    sentences = []
    for metric in first_metrics(frame):
        base, edited = frame[frame.edit == "none"], frame[frame.edit != "none"]
        rows = edited[np.isfinite(edited[metric].astype(float))]
        if base.empty or len(rows) < 2:
            continue
        before, values = float(base.iloc[0][metric]), rows[metric].astype(float)
        is_accuracy = metric.endswith("_acc")
        change = -values if is_accuracy else (values - before).abs()
        best, worst = (rows.loc[index] for index in (change.idxmin(), change.idxmax()))
        words = ("is highest", "lowest") if is_accuracy else ("changes least", "most")
        equal = int((change == change.min()).sum()) - 1
        others = f", as with {equal} other edit{'s'[: equal != 1]}," if equal else ""
        sentences.append(
            f"{column(metric).label} is {before:.3g} in the unedited model; under edits it {words[0]} with "
            f"{_value(best, metric)}{others} and {words[1]} with {_value(worst, metric)}"
        )
    return sentences


def _value(row: pd.Series, metric: str) -> str:
    """Name an edit, with its value, and the interval of its change where it is known."""
    low, high = (float(row.get(f"{metric}_change_{end}", math.nan)) for end in ("low", "high"))
    change = f"; change {low:+.2g} to {high:+.2g}" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{row['name']} ({row[metric]:.3g}{change})"
