"""Measure the routes of a search: one measurement for each level, and one for the routes that are measured in full."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import PlanError
from ..metrics.aggregation import Array, ratio
from ..metrics.intervals import CONFIDENCE, asymptotic_interval, fixed_interval
from ..metrics.reference import METRICS
from ..plans.route import Route
from ..plans.variants import Variant
from ..registry import SEARCH_SCORES, column, search_score
from ..sweeps.measurer import Measurer
from ..sweeps.race import ERROR, Race
from ..sweeps.results import FIXED, STOPPING, results_table
from ..tasks.task_costs import TaskCosts, metric_on_task, ties_sentence
from .layer_ranking import race_order
from .measurements import TableMeasurement
from .route_search import FINAL, pareto_front, plan_of
from .signal_tables import SignalTables
from .task_criterion import is_task

if TYPE_CHECKING:
    import torch

    from ..runs.options import RunOptions
    from ..sweeps.row_progress import StopRule

LEVEL = "level"
ABOVE_ON_TASK = "above_winner"
_FRONTS = ("block_calls", "parameters")


def check_score(by: str) -> str:
    """Return what a search minimizes.

    Raises:
        PlanError: it is unknown.
    """
    if by not in SEARCH_SCORES and not is_task(by):
        raise PlanError(f"unknown score {by!r}; choose from {', '.join(SEARCH_SCORES)} or task:NAME")
    return by


@dataclass(frozen=True, slots=True)
class _RouteMeasurement(TableMeasurement):
    """Base of the measurements of a search: some routes."""

    by: str
    routes: tuple[Route, ...]

    def measurer(self, model: Any, options: RunOptions) -> Measurer:
        """Make the measurer of the routes. A route that the architecture cannot run is left out, with the reason."""
        plans = [str(plan_of(route, self.depth)) for route in self.routes]
        variants = [Variant(FINAL, plan, route, None, plan) for plan, route in zip(plans, self.routes, strict=True)]
        return Measurer(model, variants, blocks=options.blocks, read=options.read_positions)


@dataclass(frozen=True, slots=True)
class LevelMeasurement(_RouteMeasurement):
    """Measure the candidates of one level of a search.

    Attributes:
        beam: number of routes to find; they race if it is given.
    """

    beam: int | None = None

    @property
    def name(self) -> str:
        """Return the name of the measurement."""
        return LEVEL

    def arguments(self) -> dict[str, Any]:
        """Return the name of the measurement and its parameters."""
        return {"analysis": self.name, "by": self.by, "routes": list(map(str, self.routes))}

    def rule(self, _mask: torch.Tensor | None) -> StopRule | None:
        """Return the race for the beam; None to measure every route on all text."""
        return None if self.beam is None or is_task(self.by) else Race(self.beam, SEARCH_SCORES[self.by])

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make a table with a row for each route."""
        return {self.name: level_table(tables, self.by, self.task_costs(tables))}


@dataclass(frozen=True, slots=True)
class FinalMeasurement(_RouteMeasurement):
    """Measure the routes of a search in full.

    Attributes:
        finalists: number of finalists. They are the first routes.
        one_shot: the routes that one measurement of each block would choose.
        tried: the table of all candidates.
    """

    finalists: int
    one_shot: frozenset[Route]
    tried: pd.DataFrame

    @property
    def name(self) -> str:
        """Return the name of the analysis."""
        return FINAL

    def arguments(self) -> dict[str, Any]:
        """Return the name of the analysis and its parameters."""
        return {
            "analysis": self.name,
            "by": self.by,
            "routes": list(map(str, self.routes)),
            "finalists": self.finalists,
            # The table of candidates is written with these results, so they are of this table only.
            "tried": hashlib.sha256(self.tried.to_csv(index=False).encode()).hexdigest()[:16],
        }

    def tables(self, tables: SignalTables) -> dict[str, pd.DataFrame]:
        """Make the table of these routes, and that of all candidates."""
        table = search_table(tables, self, self.task_costs(tables))
        return {FINAL: table, "tried": self.tried.assign(model=tables.model)}


def level_table(tables: SignalTables, by: str, costs: TaskCosts | None = None) -> pd.DataFrame:
    """Build the table of one level: a row for each route, in the order in which they were given.

    Args:
        tables: the sums.
        by: what the search minimizes.
        costs: the costs on a task, if it is one; None as long as not all requests are measured, too.

    Returns:
        The columns of `tried` that are measured. `place` is the place among the routes; it is missing where the score
        is not finite.
    """
    sums, metric = tables.sums_by_sequence, METRICS.index(SEARCH_SCORES.get(by, "kl_nats"))
    race = tables.rule if isinstance(tables.rule, Race) else None
    order = race_order(race or Race(1, METRICS[metric]), sums) if costs is None else costs.order
    interval = fixed_interval if race is None else asymptotic_interval
    rows = []
    for row, variant in enumerate(tables.measurer.variants[1:], 1):
        values, counts = sums.of_row(row)
        score, error = ratio(values[:, metric], counts)
        low, high = interval(values[:, metric], counts)
        if costs is not None:
            score, error, low, high = costs.costs.loc[row, ["cost", "cost_sem", "cost_low", "cost_high"]]
        elif is_task(by):
            score = error = low = high = math.nan
        rows.append(
            {
                "model": tables.model,
                "plan": variant.plan,
                "route": str(variant.route),
                "by": by,
                "score": score,
                "score_sem": error,
                "score_low": low,
                "score_high": high,
                "interval": f"{100 * CONFIDENCE:g} %, {FIXED if race is None else STOPPING}",
                "tokens": int(counts.sum()),
                "sequences": len(counts),
                "race": None if race is None else race.outcome(row),
                "place": order.index(row) + 1 if math.isfinite(score) else None,
            }
        )
    frame = pd.DataFrame(rows).astype({"tokens": "Int64", "sequences": "Int64", "race": "str", "place": "Int64"})
    frame.insert(3, "parameters", pd.array(_parameters(tables.measurer)[1:], dtype="Int64"))
    if costs is not None:
        others = costs.costs.drop(columns=["by", "cost", "cost_sem", "cost_low", "cost_high"])
        frame = frame.join(others.join(costs.columns)[1:].reset_index(drop=True))
    return frame


def _parameters(measurer: Measurer) -> list[int]:
    """Return the number of parameters of each variant as a checkpoint, which has a copy of a block for each visit."""
    blocks = measurer.block_parameters
    outside = measurer.parameters - sum(blocks)
    return [outside + sum(blocks[block] for block in variant.route.blocks) for variant in measurer.variants]


def search_table(tables: SignalTables, measurement: FinalMeasurement, costs: TaskCosts | None = None) -> pd.DataFrame:
    """Build the table of the routes that are measured in full, the unedited model first.

    Args:
        tables: the sums, on all text.
        measurement: says which routes are finalists and which are of one shot.
        costs: the costs on a task, if the search is by one; None as long as not all requests are measured, too.

    Returns:
        The columns of a sweep, with perplexity and: by, level, block_calls, parameters, finalist, one_shot, winner, two
        columns `front_...` (whether no other route has neither a higher score nor more block calls or parameters), and
        above_winner_nats, the score minus the winner's on the same sequences, with its error and interval (by a task it
        is above_winner, on the same documents; only its mean if the metric is not one over documents).
        `surely_above` says of the other finalists whether it is above 0, with an error probability of 5 % for all of
        them together.
    """
    measurer, sums = tables.measurer, tables.sums_by_sequence
    frame = results_table(measurer.variants, sums, tables.model).drop(
        columns=["edit", "name", "layer", "relative_depth"]
    )
    routes = [variant.route for variant in measurer.variants]
    if costs is not None:
        frame = frame.join(costs.costs.drop(columns="by")).join(costs.columns)
    elif is_task(measurement.by):
        frame["cost"] = math.nan
    score = frame[search_score(measurement.by)].to_numpy(float)
    finalist = np.array([route in measurement.routes[: measurement.finalists] for route in routes])
    places = score if costs is None else np.array([math.nan if place is None else place for place in costs.places()])
    winner = int(np.argmin(np.where(finalist & np.isfinite(score), places, np.inf)))
    calls = list(map(len, routes))
    facts: dict[str, Any] = {
        "by": measurement.by,
        "level": [abs(count - calls[0]) for count in calls],
        "block_calls": calls,
        "parameters": _parameters(measurer),
        "winner": np.arange(len(routes)) == winner,
        "finalist": finalist,
        "one_shot": [route in measurement.one_shot for route in routes],
    }
    facts |= {f"front_{cost}": pareto_front(facts[cost], score.tolist()) for cost in _FRONTS}
    for place, (name, values) in enumerate(facts.items(), 1):
        frame.insert(place, name, values)
    frame.insert(frame.columns.get_loc("loss_nats"), "perplexity", np.exp(frame.loss_nats.clip(upper=700)))
    values, counts = sums.values[:, :, METRICS.index(SEARCH_SCORES.get(measurement.by, "kl_nats"))], sums.counts
    frame["surely_above"] = pd.array([None] * len(routes), dtype="boolean")
    if is_task(measurement.by):
        if costs is None or costs.documents is None:
            frame[ABOVE_ON_TASK] = score - score[winner]
            return frame
        values, counts = costs.documents, np.ones(len(costs.documents))
    differences = [values[:, row] - values[:, winner] for row in range(len(routes))]
    above = [(*ratio(row, counts), *fixed_interval(row, counts)) for row in differences]
    for end, column_values in zip(("", "_sem", "_low", "_high"), zip(*above, strict=True), strict=True):
        frame[f"{above_winner(measurement.by)}{end}"] = column_values
    frame.loc[finalist, "surely_above"] = surely_above(values[:, finalist], counts)
    frame.loc[winner, "surely_above"] = None
    return frame


def above_winner(by: str) -> str:
    """Return the column with the scores minus the winner's."""
    return ABOVE_ON_TASK if is_task(by) else "above_winner_nats"


def surely_above(values: Array, counts: Array) -> list[bool]:
    """Tell which routes surely cost more than the one with the lowest mean, which these values choose.

    The probability that this is wrong about any route is at most `ERROR`. Which route is the lowest is chance, too, so
    it is shared among all pairs of routes: shared among the comparisons with the lowest alone, it would be 7 % for four
    equal routes, and 19 % for sixteen.

    Args:
        values: sums by sequence, (sequences, routes).
        counts: positions of each sequence, (sequences,).
    """
    lowest = values[:, int(np.argmin(np.nan_to_num(values.sum(0), nan=np.inf)))]
    confidence = 1 - ERROR / max(1, math.comb(values.shape[1], 2))
    with np.errstate(invalid="ignore"):  # two infinite sums
        return [bool(fixed_interval(row - lowest, counts, confidence)[0] > 0) for row in values.T]


def describe_search(frame: pd.DataFrame) -> str:
    """Describe the route that a search chose, and how sure the choice is.

    Args:
        frame: the table `search`.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.analyses.search_tables import describe_search
        >>> routes = pd.DataFrame(
        ...     {
        ...         "plan": ["", "drop 2 3", "drop 1 2"],
        ...         "by": "kl",
        ...         "level": [0, 2, 2],
        ...         "block_calls": [6, 4, 4],
        ...         "winner": [False, True, False],
        ...         "finalist": [False, True, False],
        ...         "one_shot": [False, False, True],
        ...         "kl_nats": [0.0, 0.41, 0.47],
        ...         "kl_nats_low": [0.0, 0.39, 0.45],
        ...         "kl_nats_high": [0.0, 0.43, 0.49],
        ...         "above_winner_nats": [-0.41, 0.0, 0.06],
        ...         "surely_above": pd.array([None, None, None], dtype="boolean"),
        ...     }
        ... )
        >>> describe_search(routes)
        'With 4 of 6 blocks: drop 2 3, KL 0.41 nats (0.39 to 0.43), 0.06 below one-shot (drop 1 2).'
    """
    by = str(frame.by.iloc[0])
    score, above = search_score(by), above_winner(by)
    best, depth = frame[frame.winner].iloc[0], int(frame.block_calls.iloc[0])
    name = {"kl_nats": "KL"}.get(score, column(score).label)
    sign = "+" if column(score).signed and not is_task(by) else ""
    unit = "" if is_task(by) else " nats"
    if is_task(by):
        name = f"fall of {metric_on_task(frame)}"
    low, high = best[f"{score}_low"], best[f"{score}_high"]
    known = f" ({low:{sign}.3g} to {high:{sign}.3g})" if math.isfinite(low) and math.isfinite(high) else ""
    blocks = f"{best.block_calls} of {depth}" if best.block_calls < depth else f"{best.block_calls} instead of {depth}"
    sentence = f"With {blocks} blocks: {best.plan}, {name} {best[score]:{sign}.3g}{unit}{known}"
    shot = frame[frame.one_shot & (frame.level == best.level)]
    if len(shot) and math.isfinite(shot.iloc[0][above]):
        other = shot.iloc[0]
        difference = f"{abs(other[above]):.2g} {'below' if other[above] > 0 else 'above'}"
        if other[above] == 0:
            difference = "the same as"
        sentence += ", as one-shot" if other.winner else f", {difference} one-shot ({other.plan})"
    others = frame[frame.finalist & ~frame.winner]
    if is_task(by):
        sentence += f". {ties_sentence(frame)}"
    if others.empty or others.surely_above.isna().all():
        return f"{sentence}."
    surely, count = int(others.surely_above.fillna(value=False).sum()), len(others)
    where = "these documents" if is_task(by) else "this text"
    if not surely:
        rest = "the other finalist" if count == 1 else f"the {count} other finalists"
        return f"{sentence}. On {where}, it cannot be told from {rest} (error probability {100 * ERROR:g} %)."
    which = "the other finalist" if count == 1 else f"{surely} of the {count} other finalists"
    return f"{sentence}. On {where}, {which} surely cost{'s'[: count == 1]} more (error probability {100 * ERROR:g} %)."
