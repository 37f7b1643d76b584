"""Choose layers to remove, measure the cost, and write the pruned checkpoint; resumable if it writes a directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..plans.visit import whole_number
from ..runs.frames import as_result
from ..runs.options import SWEEP_ONLY
from ..runs.requests import read_given_text
from ..runs.tables import read_results, table_names
from .analyze import split_options
from .layer_pruning import (
    GREEDY,
    Pruning,
    check_removal,
    greedy_removals,
    prefixes,
    removal_orders,
    removal_plan,
)
from .layer_ranking import CRITERIA, TASK_CRITERIA
from .measurements import CostMeasurement, GreedyStepMeasurement, TableMeasurement, rank_measurement
from .plan_run import Measure, choose_plan, measure_in_memory, run_or_reuse
from .task_criterion import NO_RACE, given_task, harness_of

if TYPE_CHECKING:
    from ..runs.session import ModelSession
    from ..runs.text import TokenizedText


def prune(
    model: Any,
    text: Any = None,
    *,
    remove: int,
    by: str = "kl",
    greedy: bool = False,
    race: bool = True,
    limit: int | None = None,
    shots: int | None = None,
    task_path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    attention_mask: Any = None,
    directory: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Pruning:
    """Choose layers to remove, measure the cost of removing them, and write the pruned checkpoint if it is wanted.

    A loaded model is not changed: `operate_(model, pruning.plan)` removes the layers.

    Args:
        model: a transformers causal language model, a wrapper around one, or the name of one.
        text: token ids, (sequences, length); a tokenizer's output; a list of strings or of conversations; a Hugging
            Face dataset; a path; "pydoc"; or the id of a Hub dataset. Default: what the option `data` names.
        remove: number of layers to remove.
        by: the criterion, see `rank`: "kl" (layers whose removal changes predictions least, measured one at a time),
            "influence" (lowest block influence, ShortGPT), "angular" (the span of adjacent blocks with the lowest
            angular distance, Gromov et al.), or "task:arc_easy" (layers whose removal lowers the first metric of this
            task of lm-eval least, see `rank`; its requests are measured instead of a text).
        greedy: remove one layer at a time and measure the remaining layers again after each removal. With "angular"
            this chooses single blocks, not a span.
        race: with "kl": stop measuring a layer once it is sure, with an error probability of about 5 %, whether it is
            among those with the lowest KL. The two scores of the other criteria are then of the text that the race
            took. The costs are measured on all text. By a task there is no race.
        limit: by a task: number of its documents; by default all.
        shots: by a task: number of examples before each document; by default the task's own number.
        task_path: by a task: directories with your own task definitions.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        directory: where to write the measurements. A run that was interrupted resumes there. Default: nothing is
            written.
        output: directory to write the pruned checkpoint to, for a model that is given by its name.
        overwrite: replace the output, and measurements made with other arguments.
        progress: called with the name of the current measurement, how much is done and how much there is in total.
        options: as `layersurgery.runs.options.RunOptions`.

    Returns:
        The layers, the plan that drops them, and the costs of every criterion for 1 to `remove` layers. The criterion
        "greedy" is the greedy variant of `by`. By a task, the criteria are "task" and "kl", and the table has the
        columns of `rank` by a task.

    Raises:
        PlanError: an unknown criterion, too many layers to remove, or text that cannot be measured.
        UnsupportedEditError: the model's blocks cannot be run in another order.
        MeasurementError: no remaining layer can be removed, predictions that are NaN or infinite, or too little memory.
        OutputError: the output exists, or the directory holds something else.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> pruning = ls.prune(model, ["The capital of France is Paris."], remove=2, tokenizer=tokenizer)
        >>> pruned = ls.operate_(model, pruning.plan)
        >>> model.config.num_hidden_layers
        28
    """
    remove = whole_number(remove, "remove")
    run_options, _ = split_options(options, prune)
    run_options.refuse(SWEEP_ONLY, "is for sweep; prune does not take it")
    task = given_task(by, limit, shots, task_path, run_options, has_text=text is not None)
    run_options, given = read_given_text(text, run_options, attention_mask)

    def in_memory(session: ModelSession, loaded: Any, tokens: TokenizedText) -> Pruning:
        check_removal(session.model.depth, remove, by)
        measure = measure_in_memory(session, loaded, tokens, progress)
        pruning = choose_layers(session, measure, remove=remove, by=by, greedy=greedy, race=race)
        costs = as_result(pruning.costs.assign(model=session.model.label), "costs", session.caption(tokens))
        return replace(pruning, costs=costs)

    def in_directory(session: ModelSession, results: Path) -> Pruning:
        return run_prune(session, results, remove=remove, by=by, greedy=greedy, race=race, overwrite=overwrite)

    return choose_plan(
        model,
        run_options,
        task or given,
        in_memory=in_memory,
        in_directory=in_directory,
        directory=directory,
        output=output,
        overwrite=overwrite,
        progress=progress,
    )


def run_prune(
    session: ModelSession,
    directory: Path,
    *,
    remove: int,
    by: str,
    greedy: bool,
    race: bool = True,
    overwrite: bool = False,
) -> Pruning:
    """Choose layers to remove and measure the cost, in directories below `directory`, or use the finished runs there.

    Args:
        session: the model and the text.
        directory: where to write: "rank", "step-01" and so on for a greedy choice, and "costs".
        remove: number of layers to remove.
        by: the criterion.
        greedy: measure the remaining layers again after each removal.
        race: with "kl", stop measuring a layer once it is sure whether it is among those to remove.
        overwrite: replace measurements made with other arguments.
    """
    check_removal(session.model.depth, remove, by)
    reporter = session.reporter

    def measure(measurement: TableMeasurement, name: str, subject: str) -> dict[str, pd.DataFrame]:
        reporter.log(f"{subject[0].upper()}{subject[1:]}")
        reporter.subject = subject
        run = run_or_reuse(session, measurement, directory / name, overwrite=overwrite)
        tables: dict[str, pd.DataFrame] = {
            table: read_results(run.directory, table) for table in table_names(run.facts)
        }
        for frame in tables.values():
            frame.attrs["skipped"] = frame.attrs["run"]["skipped"]
        return tables

    return choose_layers(session, measure, remove=remove, by=by, greedy=greedy, race=race)


def choose_layers(
    session: ModelSession, measure: Measure, *, remove: int, by: str, greedy: bool, race: bool
) -> Pruning:
    """Choose layers to remove, and measure the cost.

    Args:
        session: the model, and the text or the task.
        measure: measures a measurement.
        remove: number of layers to remove.
        by: the criterion.
        greedy: measure the remaining layers again after each removal.
        race: with "kl", stop measuring a layer once it is sure whether it is among those to remove.
    """
    depth, log = session.model.depth, session.reporter.log
    harness = harness_of(session)
    race = race and by == "kl"
    if harness is not None:
        log(NO_RACE)
    ranking = rank_measurement(session, None if harness else remove, remove if race else None)
    ranked = measure(ranking, "rank", "ranking layers" if harness is None else f"ranking layers on {harness.tasks[0]}")
    ranks, spans = ranked["rank"], ranked.get("spans", pd.DataFrame())
    orders = {
        criterion: removal_orders(ranks, spans, remove, criterion)
        for criterion in (CRITERIA if harness is None else TASK_CRITERIA)
    }
    if greedy:

        def measure_step(removed: tuple[int, ...]) -> Any:
            step = GreedyStepMeasurement(depth, by, removed, race, harness=harness)
            subject = f"choosing layer {len(removed) + 1} of {remove}"
            return measure(step, f"step-{len(removed) + 1:02}", subject)[step.name]

        removed: list[int] = []
        for layer, score in greedy_removals(remove, by, measure_step):
            log(f"Removing layer {layer} ({'cost' if harness else CRITERIA[by]} {score:.3g})")
            removed.append(layer)
        orders[GREEDY] = prefixes(removed)
    costs = CostMeasurement(depth, orders, harness=harness)
    frame = measure(costs, costs.name, "measuring the cost of each criterion")[costs.name]
    layers = orders[GREEDY if greedy else "task" if harness else by][-1]
    return Pruning(removal_plan(layers), layers, by, greedy, frame)
