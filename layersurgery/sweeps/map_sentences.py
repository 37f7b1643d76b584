"""Say in sentences what the maps of a sweep show: spans that are nearly free, repeats that help, pairs by two edits.

The sentences need the columns `from` and `to` of the results; see `plans.families.Family.axes`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..metrics.intervals import CONFIDENCE, asymptotic_errors, student_errors
from .results import CELL, STOPPING

if TYPE_CHECKING:
    import pandas as pd

NEARLY_FREE = 0.1
"""KL in nats below which a dropped span is called nearly free."""
_DROPS, _REPEATS = ("drop-spans", "jump"), ("repeat-spans", "jump")
_FEWEST_PAIRS = 3


def describe_maps(frame: pd.DataFrame) -> list[str]:
    """Say what the maps of a sweep show, in sentences without a full stop.

    Args:
        frame: results of a sweep.

    Returns:
        A sentence about dropped spans, one or two about repeated spans, and one about replaced and swapped pairs, for
        the families that were measured. Empty for a sweep without maps.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.sweeps.map_sentences import describe_maps
        >>> cells = pd.DataFrame({"plan": ["drop 4", "drop 5"], "from": [4, 5], "to": [5, 6], "kl_nats": [0.06, 0.2]})
        >>> describe_maps(cells.assign(edit="drop-spans"))
        ['dropping layer 4 costs 0.06 nats of KL, the least of 2 spans of one layer']
    """
    if not set(CELL) <= set(frame.columns):
        return []
    sentences = [drop_sentence(frame), *repeat_sentences(frame), pair_sentence(frame)]
    return [sentence for sentence in sentences if sentence]


def drop_sentence(frame: pd.DataFrame, most: float = NEARLY_FREE) -> str:
    """Say which dropped spans are nearly free: the lowest KL of one layer, of two, and of the longest such span.

    Args:
        frame: results of a sweep, with the families drop-spans or jump.
        most: KL in nats below which a span is nearly free.

    Returns:
        The spans with their KL and its interval; the span with the lowest KL if none is nearly free. Empty if no spans
        were dropped.
    """
    rows = _finite(frame[frame.edit.isin(_DROPS) & (frame["from"] < frame["to"]).fillna(False)], "kl_nats")
    if rows.empty:
        return ""
    lengths = (rows["to"] - rows["from"]).astype(int)
    best = rows.loc[rows.kl_nats.groupby(lengths).idxmin()]
    free = best[best.kl_nats < most]
    if free.empty:
        lowest = rows.loc[rows.kl_nats.idxmin()]
        return (
            f"no span costs less than {most:g} nats of KL; the lowest of {len(rows)} is {_named(lowest)}: {_kl(lowest)}"
        )
    shown = free if len(free) <= 3 else free.iloc[[0, 1, -1]]
    clauses = []
    for _, row in shown.iterrows():
        length = int(row["to"] - row["from"])
        count = int((lengths == length).sum())
        among = (
            f"the least of {count} spans of {_layers(length)}" if count > 1 else f"the only span of {_layers(length)}"
        )
        clauses.append(f"{_named(row)} costs {_kl(row)}, {among}")
    longest = int((free["to"] - free["from"]).max())
    if longest < lengths.max():
        clauses.append(f"no span that is longer costs less than {most:g} nats")
    return "; ".join(clauses)


def repeat_sentences(frame: pd.DataFrame) -> list[str]:
    """Say which repeated span lowers the loss, if any does, and which costs least of those longer than one layer.

    The lowest of many repeats looks good by chance. Its interval is therefore corrected for their number N
    (Bonferroni): all N intervals at the confidence 1 - 0.05 / N hold together with a probability of at least 95 %.

    Args:
        frame: results of a sweep, with the families repeat-spans or jump.

    Returns:
        The sentences; empty if no spans were repeated.
    """
    rows = _finite(frame[frame.edit.isin(_REPEATS) & (frame["from"] > frame["to"]).fillna(False)], "loss_change_nats")
    if rows.empty:
        return []
    stopped = "interval" in rows and rows.interval.iloc[0].endswith(STOPPING)
    errors = asymptotic_errors if stopped else student_errors
    confidence = 1 - (1 - CONFIDENCE) / len(rows)
    widths = {count: errors(int(count), confidence) for count in rows.sequences.unique()}
    halves = rows.loss_change_nats_sem.astype(float) * rows.sequences.map(widths)
    sure = rows[rows.loss_change_nats + halves < 0]
    row = (sure if len(sure) else rows).sort_values("loss_change_nats", kind="stable").iloc[0]
    change, half = float(row.loss_change_nats), float(halves[row.name])
    choice = f", corrected for the choice among {len(rows)}" if len(rows) > 1 else ""
    low, high = change - half, change + half
    if len(sure):
        gain = f"{_number(-change, low, high)} nats ({_ends(-high, -low)}{choice})"
        first = f"{_named(row)} lowers the loss by {gain}"
    else:
        value = f"{_number(change, low, high)} nats ({_ends(low, high)}{choice})"
        if not math.isfinite(half):
            value = f"{_number(change, low, high)} nats (no interval)"
        finding = "surely lowers the loss; the lowest" if change < 0 else "lowers the loss; the least harmful"
        first = f"no repeat {finding} is {_named(row)}, which changes it by {value}"
    longer = _finite(rows[rows["from"] - rows["to"] > 1], "kl_nats")
    if longer.empty:
        return [first]
    least = longer.loc[longer.kl_nats.idxmin()]
    among = f"the least of {len(longer)} repeats" if len(longer) > 1 else "the only repeat"
    return [first, f"{_named(least)} costs {_kl(least)}, {among} longer than one layer"]


def pair_sentence(frame: pd.DataFrame) -> str:
    """Say how alike the costs of replacing and of swapping two layers are, by Spearman's rank correlation of KL.

    "No Free Swap" (arXiv 2605.16234) finds that the two choose different layers. Pairs share layers, so that no p-value
    is given.

    Args:
        frame: results of a sweep, with the families replace and swap-pairs.

    Returns:
        The correlation over all pairs that were replaced in both directions and swapped; empty for fewer than three.
    """
    import pandas as pd
    from scipy.stats import spearmanr

    replaced = _finite(frame[frame.edit == "replace"], "kl_nats")
    swapped = _finite(frame[frame.edit == "swap-pairs"], "kl_nats")
    if replaced.empty or swapped.empty:
        return ""
    directed = replaced.set_index([*CELL]).kl_nats.astype(float)
    both = pd.DataFrame({"one": directed, "other": directed.swaplevel().rename_axis([*CELL])})
    pairs = both.assign(swap=swapped.set_index([*CELL]).kl_nats.astype(float)).dropna()
    if len(pairs) < _FEWEST_PAIRS:
        return ""
    means = (pairs.one + pairs.other) / 2
    if means.nunique() < 2 or pairs.swap.nunique() < 2:
        return ""
    correlation = float(spearmanr(means, pairs.swap).statistic)
    return (
        "the KL of replacing a layer by another (mean of both directions) and of swapping the two have a rank "
        f"correlation (Spearman) of {correlation:.2f} over {len(pairs)} pairs of layers"
    )


def _finite(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows whose metric is finite, each plan once."""
    import numpy as np

    if rows.empty:
        return rows
    return rows[np.isfinite(rows[metric].astype(float))].drop_duplicates("plan").reset_index(drop=True)


def _named(row: pd.Series) -> str:
    verb, _, span = str(row.plan).partition(" ")
    return f"{ {'drop': 'dropping', 'repeat': 'repeating'}[verb] } layer{'s'[: ':' in span]} {span}"


def _kl(row: pd.Series) -> str:
    low, high = (float(row.get(f"kl_nats_{end}", math.nan)) for end in ("low", "high"))
    ends = f" ({_ends(low, high)})" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{_number(float(row.kl_nats), low, high)} nats of KL{ends}"


def _layers(count: int) -> str:
    words = ("one layer", "two layers", "three layers", "four layers")
    return words[count - 1] if count <= len(words) else f"{count} layers"


def _ends(low: float, high: float) -> str:
    return f"{_number(low, low, high)} to {_number(high, low, high)}"


def _number(value: float, low: float, high: float) -> str:
    """Round a value to two digits of half the width of its interval; without an interval, to three digits."""
    half = (high - low) / 2
    if not (math.isfinite(half) and half > 0):
        return f"{value:.3g}"
    return f"{value:.{min(8, max(0, 1 - math.floor(math.log10(half))))}f}"
