"""Say in sentences which edits change the metrics of tasks least and most."""

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
        Of each task with an accuracy, the edits under which it falls least and most; of another one, the edits under
        which its metrics change least and most. Empty for a sweep without tasks.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.tasks.task_sentences import task_sentences
        >>> results = pd.DataFrame({"edit": ["none", "drop", "drop"], "name": ["unedited", "drop 0", "drop 1"]})
        >>> task_sentences(results.assign(task_arc_easy_acc=[0.6, 0.25, 0.58]))
        ['arc_easy_acc, 0.6 in the unedited model, falls least under drop 1 (0.58) and most under drop 0 (0.25)']
    """
    sentences = []
    for metric in first_metrics(frame):
        base, edited = frame[frame.edit == "none"], frame[frame.edit != "none"]
        rows = edited[np.isfinite(edited[metric].astype(float))]
        if base.empty or len(rows) < 2:
            continue
        before = float(base.iloc[0][metric])
        falls = metric.endswith("_acc")
        change = (before - rows[metric].astype(float)) if falls else (rows[metric].astype(float) - before).abs()
        least, most = (rows.loc[index] for index in (change.idxmin(), change.idxmax()))
        word = "falls" if falls else "changes"
        equal = int((change == change.min()).sum())
        others = f", as under {equal - 1} other edit{'s'[: equal != 2]}" if equal > 1 else ""
        sentences.append(
            f"{column(metric).label}, {before:.3g} in the unedited model, {word} least under "
            f"{_value(least, metric)}{others} and most under {_value(most, metric)}"
        )
    return sentences


def _value(row: pd.Series, metric: str) -> str:
    """Name an edit, with its value, and the interval of its change where it is known."""
    low, high = (float(row.get(f"{metric}_change_{end}", math.nan)) for end in ("low", "high"))
    change = f"; change {low:+.2g} to {high:+.2g}" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{row['name']} ({row[metric]:.3g}{change})"
