"""Rank layers by the cost of their removal, measured and estimated by cheap scores from the literature."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pandas as pd
from torch import nn

from ..errors import MeasurementError, PlanError
from ..metrics.aggregation import SequenceSums
from ..metrics.reference import METRICS
from ..plans.variants import family
from ..plans.visit import whole_number
from ..sweeps.measurer import Measurer
from ..sweeps.quantities import BRANCH_CHANGE, CHANGE, Observed
from ..sweeps.race import Race
from ..tasks.task_costs import TaskCosts
from .removable_parts import BLOCKS, NOUNS, Part, parts_of, plural
from .signal_tables import SignalTables

CRITERIA = {"kl": "kl_nats", "influence": "block_influence", "angular": "angular_distance", "loss": "loss_change_nats"}
"""Criteria on a text for choosing layers to remove, and the score of each. The lowest score is removed first."""
MEASURED = ("kl", "loss")
"""Criteria that are measured by removing a part; the others are observed."""
TASK_CRITERIA = {"kl": "kl_nats", "task": "cost"}
"""Criteria on the requests of a task. KL is that of the tokens that the task scores."""
RANKS = {criterion: f"{criterion}_rank" for criterion in CRITERIA} | {"task": "cost_rank"}
"""Column with a layer's rank by each criterion."""
_DISTANCES = ("angular_distance", "angular_distance_last")
_DROPPED = ("kl_nats", "agreement", "loss_change_nats", "entropy_change_bits")


def max_span(depth: int, spans: int | None = None) -> int:
    """Return the length in blocks of the longest span to measure.

    It is half of the model's depth if not given, and at least one block remains.
    """
    longest = 0 if spans is None else whole_number(spans, "`spans`")
    return max(1, min(longest or depth // 2, depth - 1))


def check_lowest(lowest: int | None, of: str, parts: int) -> int | None:
    """Return how many parts a race searches; None for no race.

    Args:
        lowest: the number that was asked for.
        of: the kind of the parts.
        parts: how many there are.

    Raises:
        PlanError: there are not so many others.
    """
    if lowest is None:
        return None
    number = whole_number(lowest, "`lowest`")
    if not 1 <= number < parts:
        raise PlanError(
            f"cannot search the {number} lowest of {parts} {plural(NOUNS[of], parts)}; give 1 to {parts - 1}"
        )
    return number


def make_rank_measurer(
    model: nn.Module, of: str, depth: int, keep: Collection[int], *, spans: int, **options: Any
) -> Measurer:
    """Make a measurer that removes each part of a kind, and on a text also observes what the parts do to the stream.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        of: the kind of the parts.
        depth: number of blocks of the model.
        keep: the layers that are not removed.
        spans: of blocks: largest number of consecutive blocks for which the change of the stream is observed; 0 on a
            task, on which nothing is observed.
        options: other arguments of `Measurer`.
    """
    edits = dict.fromkeys(part.edit for part in parts_of(of, 1))
    variants = [variant for edit in edits for variant in family(edit, depth) if variant.layer not in keep]
    signal = CHANGE if of == BLOCKS else BRANCH_CHANGE
    observe = Observed([signal], spans if of == BLOCKS else 1) if spans else None
    return Measurer(model, variants, observe=observe, **options)


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


def rank_table(tables: SignalTables, of: str = BLOCKS) -> pd.DataFrame:
    """Build the table of `rank`.

    Args:
        tables: the sums.
        of: the kind of parts that are ranked.
    """
    frame, keys = _observed(tables, of), _keys(of)
    measured = _measured(tables, of).set_index(keys)
    at = pd.MultiIndex.from_frame(frame[keys]) if len(keys) > 1 else frame.layer
    position = list(frame.columns).index("sequences") + 1
    for name in reversed([column for metric in _DROPPED for column in (metric, f"{metric}_sem")]):
        frame.insert(position, name, measured[name].reindex(at).to_numpy(float))
    for criterion, score in CRITERIA.items():
        frame[RANKS[criterion]] = frame[score].rank(method="first").astype("Int64")
    if "race" in measured:
        frame["kl_tokens"] = measured.tokens.reindex(at).astype("Int64").to_numpy()
        frame["race"] = measured.race.reindex(at).to_numpy()
        race = tables.rule
        assert isinstance(race, Race)
        variants = tables.measurer.variants
        ranked = [Part.of_variant(variants[row]) for row in race_order(race, tables.sums_by_sequence)]
        places = {part: place for place, part in enumerate(ranked, 1)}
        for criterion in MEASURED:  # means on different text cannot be compared
            rank = RANKS[criterion]
            frame[rank] = pd.array([pd.NA] * len(frame), dtype="Int64")
            if CRITERIA[criterion] == race.metric:
                frame[rank] = pd.array([places.get(part) for part in part_column(frame)], dtype="Int64")
                frame.loc[frame[race.metric].isna(), rank] = pd.NA
    return frame


def _observed(tables: SignalTables, of: str) -> pd.DataFrame:
    """Return the table of what the parts do to the stream, a row for each part."""
    if of == BLOCKS:
        change = tables.change()
        return change[change.span == 1].drop(columns="span").reset_index(drop=True)
    frame = tables.branch_change()
    frame = frame[frame.part.isin([part.name for part in parts_of(of, 1)])].reset_index(drop=True)
    frame.insert(list(frame.columns).index("layer") + 1, "part", frame.pop("part"))
    return frame


def _measured(tables: SignalTables, of: str) -> pd.DataFrame:
    """Return the table of the models without one part, with the column `part` for branches."""
    frame = tables.edited([part.edit for part in parts_of(of, 1)])
    frame = frame[frame.edit != "none"]
    return frame if of == BLOCKS else frame.assign(part=frame.edit.str.removeprefix("skip-"))


def _keys(of: str) -> list[str]:
    return ["layer"] if of == BLOCKS else ["layer", "part"]


def part_column(frame: pd.DataFrame) -> list[Part]:
    """Return the part of each row of a table with the columns layer and, for branches, part."""
    names = frame.part if "part" in frame else ["block"] * len(frame)
    return [Part.of_row(layer, name) for layer, name in zip(frame.layer, names, strict=True)]


def task_rank_table(tables: SignalTables, costs: TaskCosts | None, of: str = BLOCKS) -> pd.DataFrame:
    """Build the table of `rank` by a task.

    Args:
        tables: the sums on the task's requests.
        costs: the costs on the task; None as long as not all requests are measured.
        of: the kind of parts that are ranked.
    """
    frame = _measured(tables, of)
    if costs is not None:
        ranks = pd.Series(costs.places(), dtype="Int64", name=RANKS["task"])
        frame = frame.join(costs.costs).join(ranks).join(costs.columns)
    frame = frame.drop(columns=["edit", "name", "plan", "depth", "route"])
    for position, key in enumerate(_keys(of)):
        frame.insert(position, key, frame.pop(key))
    frame[RANKS["kl"]] = frame.kl_nats.rank(method="first").astype("Int64")
    return frame.sort_values(_keys(of), kind="stable").reset_index(drop=True)


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
