"""Rank layers by the cost of their removal, measured and estimated by cheap scores from the literature."""

from __future__ import annotations

import math

import pandas as pd

from ..errors import MeasurementError, PlanError
from ..metrics.aggregation import SequenceSums
from ..metrics.reference import METRICS
from ..plans.visit import whole_number
from ..sweeps.quantities import CHANGE
from ..sweeps.race import Race
from ..tasks.task_costs import TaskCosts
from .signal_tables import DROP, SignalTables

CRITERIA = {"kl": "kl_nats", "influence": "block_influence", "angular": "angular_distance"}
"""Criteria on a text for choosing layers to remove, and the score of each. The lowest score is removed first."""
TASK_CRITERIA = {"kl": "kl_nats", "task": "cost"}
"""Criteria on the requests of a task. KL is that of the tokens that the task scores."""
RANKS = {criterion: f"{criterion}_rank" for criterion in CRITERIA} | {"task": "cost_rank"}
"""Column with a layer's rank by each criterion."""
SIGNALS = (CHANGE, DROP)
_DISTANCES = ("angular_distance", "angular_distance_last")
_DROPPED = ("kl_nats", "agreement", "loss_change_nats", "entropy_change_bits")


def max_span(depth: int, spans: int | None = None) -> int:
    """Return the length in blocks of the longest span to measure.

    It is half of the model's depth if not given, and at least one block remains.
    """
    longest = 0 if spans is None else whole_number(spans, "spans")
    return max(1, min(longest or depth // 2, depth - 1))


def check_lowest(lowest: int | None, depth: int) -> int | None:
    """Return how many layers a race searches; None for no race.

    Raises:
        PlanError: there are not so many others.
    """
    if lowest is None:
        return None
    number = whole_number(lowest, "lowest")
    if not 1 <= number < depth:
        raise PlanError(f"cannot search the {number} lowest of {depth} layers; give 1 to {depth - 1}")
    return number


def spans(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the angular distances over spans of blocks that `rank` measured.

    Args:
        frame: the table that `rank` returned, or `read_results` for the results of `rank`.

    Returns:
        One row for each span: layer (its first block), relative_depth, tokens, sequences, span (number of blocks),
        angular_distance and angular_distance_last, each with a standard error over sequences.

    Raises:
        MeasurementError: the table has no spans.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        >>> spans = ls.analyses.spans(ls.rank(model, tokens, spans=3))
        >>> spans.groupby("span").angular_distance.count().to_dict()
        {1: 30, 2: 29, 3: 28}
    """
    if "spans" not in frame.attrs:
        raise MeasurementError(
            "this table has no spans: give the table that rank or read_results returned; pandas drops what a table "
            "holds besides its columns when it joins several"
        )
    table = pd.DataFrame(frame.attrs["spans"])
    floats = [name for name in table if name.removesuffix("_sem") in ("relative_depth", *_DISTANCES)]
    return table.astype({"layer": "Int64", **dict.fromkeys(floats, "float64")})


def rank_table(tables: SignalTables) -> pd.DataFrame:
    """Build the table of `rank`."""
    change = tables.change()
    frame = change[change.span == 1].drop(columns="span").reset_index(drop=True)
    dropped = tables.drop()
    dropped = dropped[dropped.edit == DROP].set_index("layer")
    position = list(frame.columns).index("sequences") + 1
    for name in reversed([column for metric in _DROPPED for column in (metric, f"{metric}_sem")]):
        frame.insert(position, name, dropped[name].reindex(frame.layer).to_numpy(float))
    for criterion, score in CRITERIA.items():
        frame[f"{criterion}_rank"] = frame[score].rank(method="first").astype("Int64")
    if "race" in dropped:
        frame["kl_tokens"] = dropped.tokens.reindex(frame.layer).astype("Int64").to_numpy()
        frame["race"] = dropped.race.reindex(frame.layer).to_numpy()
        assert isinstance(tables.rule, Race)
        variants = tables.measurer.variants
        ranked = [variants[row].layer for row in race_order(tables.rule, tables.sums_by_sequence)]
        places = {layer: place for place, layer in enumerate(ranked, 1)}
        frame["kl_rank"] = pd.array([places.get(layer) for layer in frame.layer], dtype="Int64")
        frame.loc[frame.kl_nats.isna(), "kl_rank"] = pd.NA
    return frame


def task_rank_table(tables: SignalTables, costs: TaskCosts | None) -> pd.DataFrame:
    """Build the table of `rank` by a task.

    Args:
        tables: the sums on the task's requests.
        costs: the costs on the task; None as long as not all requests are measured.
    """
    frame = tables.drop()
    if costs is not None:
        ranks = pd.Series(costs.places(), dtype="Int64", name=RANKS["task"])
        frame = frame.join(costs.costs).join(ranks).join(costs.columns)
    frame = frame[frame.edit == DROP].drop(columns=["edit", "name", "plan", "depth", "route"])
    frame.insert(0, "layer", frame.pop("layer"))
    frame[RANKS["kl"]] = frame.kl_nats.rank(method="first").astype("Int64")
    return frame.reset_index(drop=True)


def race_order(race: Race, sums: SequenceSums) -> list[int]:
    """Return the rows that raced, the lowest first: those surely lowest, those left open, those surely higher.

    Means on different text cannot be compared, so within each of the three they are taken over the sequences that all
    of its rows were measured on. Rows that are not finite are last.
    """
    metric = METRICS.index(race.metric)
    classes: dict[str, list[int]] = {"lowest": [], "open": [], "higher": []}
    for row in range(1, sums.values.shape[1]):
        classes[race.outcome(row)].append(row)
    order: list[int] = []
    for rows in classes.values():
        shared = min((len(sums.of_row(row)[1]) for row in rows), default=0)
        totals = {row: float(sums.of_row(row)[0][:shared, metric].sum()) for row in rows}
        order += sorted(rows, key=lambda row: totals[row] if math.isfinite(totals[row]) else math.inf)
    return order


def span_table(tables: SignalTables) -> pd.DataFrame:
    """Build the table of spans."""
    change = tables.change()
    return change.drop(columns=["block_influence", "block_influence_sem"])
