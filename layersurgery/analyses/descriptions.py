"""Describe in words what the tables of analyses show: for the report, the terminal, and Python."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..registry import ANALYSES, CRITERIA, Column, column, resolve
from ..runs.tables import as_records
from ..tasks.task_costs import TASK, metric_on_task, ties_sentence
from ..tasks.task_tables import PREFIX
from .layer_ranking import part_column, spans
from .removable_parts import describe_parts

_SCORES = ("block_influence", "angular_distance")
_MAX_LISTED = 6
_MAX_SPANS = 8


def describe(analysis: str, tables: Mapping[str, pd.DataFrame]) -> str:
    """Describe in a few sentences what an analysis found.

    Args:
        analysis: name of the analysis, in `layersurgery.registry.ANALYSES`.
        tables: its tables, by name.

    Returns:
        The sentences; empty if the main table is not among the tables, or there is nothing to say.
    """
    if analysis not in ANALYSES or (name := ANALYSES[analysis].tables[0]) not in tables:
        return ""
    frame = tables[name].copy(deep=False)
    if "spans" in tables:
        frame.attrs["spans"] = as_records(tables["spans"])
    return str(resolve(ANALYSES[analysis].describe)(frame)) if len(frame) else ""


def describe_curves(frame: pd.DataFrame) -> str:
    """Describe where each curve of a table over depth is highest and lowest; of contributions, those of whole blocks.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.analyses.descriptions import describe_curves
        >>> describe_curves(pd.DataFrame({"layer": [0, 1, 2], "lens_kl_nats": [9.5, 4.0, 0.25]}))
        'Logit lens: KL to the final prediction: highest in layer 0 (9.5 nats), lowest in layer 2 (0.25 nats).'
    """
    rows = frame[frame.part == "block"] if "part" in frame else frame
    shown = dict.fromkeys(entry for analysis in ANALYSES.values() for entry in analysis.columns if entry.curve)
    return " ".join(_describe_curve(rows, entry) for entry in shown if entry.name in rows and _is_finite(rows, entry))


def _is_finite(rows: pd.DataFrame, entry: Column) -> bool:
    return bool(np.isfinite(rows[entry.name].to_numpy(float, na_value=np.nan)).any())


def _describe_curve(rows: pd.DataFrame, entry: Column) -> str:
    values = rows[entry.name].astype(float)
    label = f"{entry.label[0].upper()}{entry.label[1:]}"
    if values.min() == values.max():
        return f"{label}: {_number(values.min(), entry)} in every layer."
    ends = (f"{word} in layer {rows.layer[index]} ({_number(values[index], entry)})"
            for word, index in (("highest", values.idxmax()), ("lowest", values.idxmin())))  # fmt: skip
    return f"{label}: {', '.join(ends)}."


def _number(value: float, entry: Column) -> str:
    return f"{entry.factor * value:.3g}{f' {entry.unit}' if entry.unit else ''}"


def describe_ranks(frame: pd.DataFrame) -> str:
    """Describe which layers cost least to remove, and how well each score predicts this.

    Args:
        frame: the table of `rank`; `frame.attrs["spans"]` is described too, if it is there.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.analyses.descriptions import describe_ranks
        >>> ranks = pd.DataFrame(
        ...     {
        ...         "layer": [0, 1, 2, 3],
        ...         "kl_nats": [7.1, 0.2, 0.1, 0.4],
        ...         "block_influence": [0.6, 0.2, 0.3, 0.4],
        ...         "angular_distance": [0.4, 0.1, 0.2, 0.3],
        ...     }
        ... )
        >>> describe_ranks(ranks).partition(". ")[0]
        'Lowest KL when removed: layer 2 (0.1 nats), measured one layer at a time'
    """
    if "cost" in frame:
        return _describe_ranks_on_task(frame)
    # After a race, only the ranks can be compared: the KL of each layer is of other text.
    key = "kl_rank" if "race" in frame else "kl_nats"
    measured = frame.dropna(subset=["kl_nats"]).sort_values(key, kind="stable")
    if measured.empty:
        return f"No {'branch' if 'part' in frame else 'layer'} could be removed and measured."
    sure = int((measured.race == "lowest").sum()) if "race" in frame else 0
    count = sure or min(_MAX_LISTED, max(1, len(frame) // 3))
    lowest = measured.head(count)
    low, high = (f"{lowest.kl_nats.iloc[place]:.3g}" for place in (0, -1))
    values = f"{low} nats" if low == high else f"{low} to {high} nats"
    begin = "Surely among those with the lowest KL when removed" if sure else "Lowest KL when removed"
    one = "branch" if "part" in frame else "layer"
    sentences = [f"{begin}: {_parts(lowest)} ({values}), measured one {one} at a time."]
    if "race" in frame and len(left := measured[measured.race == "open"]):
        sentences.append(f"The text does not decide about {_parts(left)}.")
    for name in _SCORES:
        scored = measured.dropna(subset=[name])
        if len(scored) < 2:
            continue
        best = scored.sort_values(name, kind="stable").head(count)
        common = len(set(best.index) & set(lowest.index))
        # Spearman's: the correlation of the ranks.
        correlation = scored[name].astype(float).rank().corr(scored[key].astype(float).rank())
        agreement = "" if np.isnan(correlation) else f"; rank correlation with KL {correlation:.2f}"
        sentences.append(f"Lowest {column(name).label}: {_parts(best)} ({common} of {len(best)} in common{agreement}).")
    return " ".join([*sentences, *_describe_spans(frame)])


def _describe_ranks_on_task(frame: pd.DataFrame) -> str:
    measured = frame.dropna(subset=["cost"]).sort_values("cost_rank")
    if measured.empty:
        return "No layer could be removed and measured."
    count = min(_MAX_LISTED, max(1, len(frame) // 3))
    lowest = measured.head(count)
    ends = [f"{value:.3g}" for value in (lowest.cost.iloc[0], lowest.cost.iloc[-1])]
    by_kl = set(measured.sort_values("kl_nats").head(count).index)
    one = "branch" if "part" in frame else "layer"
    correlation = measured.cost_rank.astype(float).corr(measured.kl_nats.astype(float).rank())
    known = "" if np.isnan(correlation) else f"; rank correlation {correlation:.2f}"
    return (
        f"{metric_on_task(frame)} falls least without {_parts(lowest)} (by {' to '.join(dict.fromkeys(ends))}), "
        f"measured one {one} at a time. {ties_sentence(frame)}. {len(by_kl & set(lowest.index))} of the {count} are "
        f"among those with the lowest KL of the scored tokens{known}."
    )


def _parts(rows: pd.DataFrame) -> str:
    """Name the layers or the branches of rows, in their order."""
    if "part" in rows:
        return describe_parts(part_column(rows))
    numbers = list(map(str, rows.layer))
    return f"layer{'s'[: len(numbers) != 1]} {', '.join(numbers)}"


def _describe_spans(frame: pd.DataFrame) -> list[str]:
    rows = spans(frame).dropna(subset=["angular_distance"]) if "spans" in frame.attrs else pd.DataFrame()
    if rows.empty:
        return []
    best = rows.loc[rows.groupby("span").angular_distance.idxmin()].head(_MAX_SPANS)
    ranges = (f"{row.layer}:{row.layer + row.span}" for row in best.itertuples())
    return [f"Spans of each length with the lowest angular distance: {', '.join(ranges)}."]


def describe_costs(frame: pd.DataFrame) -> str:
    """Describe what the removal of layers costs by the best criterion, and by the others.

    Args:
        frame: the table `costs` of `prune`: the unedited model, then each criterion and number of layers.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.analyses.descriptions import describe_costs
        >>> costs = pd.DataFrame(
        ...     {
        ...         "criterion": ["unedited", "kl", "influence"],
        ...         "removed": [0, 1, 1],
        ...         "plan": ["", "drop 2", "drop 1"],
        ...         "depth": 4,
        ...         "perplexity": [20.0, 22.0, 25.0],
        ...         "kl_nats": [0.0, 0.1, 0.2],
        ...         "agreement": [1.0, 0.9, 0.8],
        ...     }
        ... )
        >>> describe_costs(costs).partition(": perplexity ")[0]
        'Without 1 of 4 layers (drop 2; criterion: lowest KL, one layer at a time)'
    """
    measured = frame.dropna(subset=["kl_nats"])
    before = frame.iloc[0]
    numbers = sorted({int(count) for count in measured.removed if count})
    if not numbers:
        return "No model without some of its layers could be measured."
    sentences = [
        _describe_cost(measured[measured.removed == count], before) for count in sorted({numbers[0], numbers[-1]})
    ]
    return " ".join(sentences)


def _describe_cost(rows: pd.DataFrame, before: pd.Series) -> str:
    on_task = "cost" in rows
    ordered = rows.sort_values(["cost", "kl_nats"] if on_task else "kl_nats", kind="stable")
    best = ordered.iloc[0]
    others = ordered[ordered.plan != best.plan]
    whole = f"of {best.depth} layers"
    if "of" in rows and (rows.of == "branches").any():
        whole = f"branch{'es' if best.removed != 1 else ''} of {best.depth} layers"
    chosen_by = [CRITERIA.get(name, name) for name in ordered[ordered.plan == best.plan].criterion]
    how = "every criterion" if others.empty and len(chosen_by) > 1 else f"criterion: {' or '.join(chosen_by)}"
    if on_task:
        name = f"{PREFIX}{str(best.by).removeprefix(TASK)}_{best.metric}"
        score = f"{metric_on_task(rows)} {before[name]:.4g} before, {best[name]:.4g} after"
    else:
        score = f"perplexity {before.perplexity:.4g} before, {best.perplexity:.4g} after"
    sentence = (
        f"Without {best.removed} {whole} ({best.plan}; {how}): {score}, "
        f"KL {_number(best.kl_nats, column('kl_nats'))}, "
        f"{column('agreement').label} {_number(best.agreement, column('agreement'))}."
    )
    if others.empty:
        return sentence
    what, shown = ("Fall of the metric", "cost") if on_task else ("KL", "kl_nats")
    costs = (
        f"{CRITERIA.get(row.criterion, row.criterion)} ({_number(getattr(row, shown), column(shown))})"
        for row in others.itertuples()
    )
    return f"{sentence} {what} by the other criteria: {', '.join(costs)}."
