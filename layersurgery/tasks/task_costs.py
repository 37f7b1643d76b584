"""Compute what edits cost on a task: how far its first metric falls, with ties broken by a smoother value.

An accuracy moves in steps of one document, so several edits often cost the same. Of these, the one whose correct
answers are more likely costs less; where lm-eval's samples do not say which answers are correct, the one whose
predictions of the scored tokens change less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PlanError
from ..metrics.aggregation import Array, SequenceSums, ratio
from ..metrics.intervals import fixed_interval
from ..metrics.reference import METRICS
from .harness import Harness
from .task_tables import evaluations, metric_name

if TYPE_CHECKING:
    import pandas as pd

TASK = "task:"
"""What the name of a criterion begins with that is a task."""
ANSWERS = "answer_log_likelihood"


@dataclass(frozen=True, slots=True)
class TaskCosts:
    """Hold what models cost on a task, the unedited one first.

    Attributes:
        costs: a row for each model: by (`task:arc_easy`), metric (`acc`), cost (how much worse the metric is than that
            of the unedited model), its standard error and 95 % interval over documents where the metric is a mean over
            them, and answer_log_likelihood, the mean log-likelihood of the correct answers, where lm-eval's samples
            have it.
        columns: the columns of `task_columns`.
        documents: cost of each document, (documents, models); None if the metric is not a mean over documents.
        kl: mean KL over the scored tokens.
    """

    costs: pd.DataFrame
    columns: pd.DataFrame
    documents: Array | None
    kl: Array

    @property
    def order(self) -> list[int]:
        """Return the edited models in the order of their costs; those whose predictions are not finite are last."""
        ties = -self.costs[ANSWERS].to_numpy(float) if ANSWERS in self.costs else self.kl
        keys = [np.nan_to_num(values, nan=math.inf) for values in (ties, self.costs.cost.to_numpy(float))]
        return [int(row) for row in np.lexsort(keys) if row]

    def places(self) -> list[int | None]:
        """Return the place of each model in the order; None for the unedited one, and where the cost is not finite."""
        places = {row: place for place, row in enumerate(self.order, 1)}
        return [places.get(row) if math.isfinite(cost) else None for row, cost in enumerate(self.costs.cost)]


def task_costs(harness: Harness, sums: SequenceSums) -> TaskCosts:
    """Compute the costs of all models on a task.

    Args:
        harness: the task, and no other one.
        sums: the measured sums of all sequences; row 0 is the unedited model.

    Raises:
        PlanError: lm-eval does not say whether a higher value of the metric is better.
    """
    import pandas as pd

    (task,) = harness.tasks
    key, sign = ("", "", ""), 1
    base: Array = np.zeros(0)
    entries: list[dict[str, float]] = []
    answers: list[float | None] = []
    values, documents = [], []
    for entry, of_documents, results in evaluations(harness, sums):
        if results is None:
            values.append(math.nan)
            documents.append(np.full(len(base), math.nan))
            answers.append(math.nan)
        else:
            if not entries:
                key, sign = _metric(task, [*of_documents], results)
                base = of_documents[key]
            values.append(sign * float(results["results"][task][",".join(key[1:])]))
            documents.append(sign * of_documents[key])
            answers.append(_answer_log_likelihood(harness.task(task), results["samples"][task], key[2]))
        entries.append(entry)
    per_document = None
    if len(base) and all(len(each) == len(base) for each in documents):
        per_document = np.stack(documents, 1)
        per_document = per_document[:, :1] - per_document
    frame = pd.DataFrame({"by": f"{TASK}{task}", "metric": metric_name(*key[1:]), "cost": values[0] - np.array(values)})
    for end, column in zip(("_sem", "_low", "_high"), np.transpose(_spreads(per_document, len(values))), strict=True):
        frame[f"cost{end}"] = column
    if answers[0] is not None:
        frame[ANSWERS] = np.array(answers, float)
    kl = sums.values[:, :, METRICS.index("kl_nats")].sum(0) / sums.counts.sum()
    return TaskCosts(frame, pd.DataFrame(entries), per_document, kl)


def metric_on_task(frame: pd.DataFrame) -> str:
    """Return the metric and the task of a table with costs, in words: "acc on arc_easy"."""
    return f"{frame.metric.iloc[0]} on {str(frame.by.iloc[0]).removeprefix(TASK)}"


def ties_sentence(frame: pd.DataFrame) -> str:
    """Say how the edits of a table with costs are ordered where their costs are equal, without a full stop."""
    by = "the log-likelihood of the correct answers" if ANSWERS in frame else "the KL of the scored tokens"
    return f"Equal values are ordered by {by}"


def _spreads(documents: Array | None, models: int) -> list[tuple[float, float, float]]:
    """Return the standard error and the interval of each model's cost."""
    if documents is None:
        return [(math.nan, math.nan, math.nan)] * models
    ones = np.ones(len(documents))
    return [(ratio(column, ones)[1], *fixed_interval(column, ones)) for column in documents.T]


def _metric(
    task: str, keys: Sequence[tuple[str, str, str]], results: Mapping[str, Any]
) -> tuple[tuple[str, str, str], int]:
    """Return the task's first metric, acc if it has one, and 1 if a higher value of it is better, else -1."""
    directions = results["higher_is_better"][task]
    of_task = [key for key in keys if key[0] == task]
    ranked = sorted(of_task, key=lambda key: (key[1] != "acc", [*directions, key[1]].index(key[1])))
    if not ranked:
        raise PlanError(f"the task {task} has no metric with a number; choose another task")
    key = ranked[0]
    higher = directions.get(key[1])
    if higher is None:
        raise PlanError(f"lm-eval does not say whether a higher {key[1]} of the task {task} is better")
    return key, 1 if higher else -1


def _answer_log_likelihood(task: Any, samples: Sequence[Mapping[str, Any]], kind: str) -> float | None:
    """Return the mean log-likelihood of the correct answers; None where the samples do not have them."""
    found = []
    for sample in samples:
        if sample["filter"] != kind:
            continue
        responses, target = sample["filtered_resps"], sample["target"]
        if isinstance(target, str) and len(responses) > 1:
            choices = list(task.doc_to_choice(sample["doc"]))
            target = choices.index(target) if target in choices else None
        number = 0 if len(responses) == 1 else target
        if not isinstance(number, int) or not 0 <= number < len(responses):
            return None
        response = responses[number]
        found.append(float(response[0] if isinstance(response, tuple | list) else response))
    return math.fsum(found) / len(found) if found else None
