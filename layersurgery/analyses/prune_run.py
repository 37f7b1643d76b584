"""Choose layers to remove, measure the cost, and write the pruned checkpoint; resumable if it writes a directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..errors import MeasurementError
from ..runs.frames import as_result
from ..runs.options import SWEEP_ONLY
from ..runs.requests import read_given_text
from ..runs.run_directory import saying_what_is_kept
from ..runs.tables import read_results, table_names
from .analyze import split_options
from .layer_pruning import GREEDY, Pruning, check_criterion, greedy_removals, prefixes, removal_orders
from .layer_ranking import CRITERIA, MEASURED, TASK_CRITERIA
from .measurements import CostMeasurement, GreedyStepMeasurement, TableMeasurement, rank_measurement
from .part_costs import PARTS, PartCosts
from .plan_run import Measure, choose_plan, measure_in_memory, run_or_reuse
from .removable_parts import BLOCKS, NOUNS, Part, plural, removal_plan
from .removal_goal import Goal
from .task_criterion import NO_RACE, given_task, harness_of

if TYPE_CHECKING:
    from ..runs.session import ModelSession
    from ..runs.text import TokenizedText


def prune(
    model: Any,
    text: Any = None,
    *,
    remove: int | None = None,
    remove_attention: int | None = None,
    remove_mlp: int | None = None,
    remove_branches: int | None = None,
    budget: str | None = None,
    of: str | None = None,
    keep: Any = None,
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
    heal: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Pruning:
    """Choose layers to remove, measure the cost of removing them, and write the pruned checkpoint if it is wanted.

    Also chooses attentions and MLPs to skip. A loaded model is not changed: `operate_(model, pruning.plan)` removes the
    layers. Give one of `remove`, `remove_branches` and `budget`, or `remove_attention`, `remove_mlp` or both.

    Args:
        model: a transformers causal language model, a wrapper around one, or the name of one.
        text: token ids, (sequences, length); a tokenizer's output; a list of strings or of conversations; a Hugging
            Face dataset; a path; "pydoc"; or the id of a Hub dataset. Default: what the option `data` names.
        remove: number of layers to remove.
        remove_attention: number of blocks whose attention is skipped. Their attention's output weights are zeros in the
            checkpoint, so it is as large and as slow as before; a block without attention and MLP is dropped.
        remove_mlp: number of blocks whose MLP is skipped.
        remove_branches: number of branches to skip, chosen among all attentions and MLPs together.
        budget: how much to remove, instead of a number: at least this share of what all blocks cost. "params=20%" (of
            parameters), "flops=25%" (of multiplications for each token, an estimate) or "kv-cache=30%" (of the cache's
            bytes for each token). A skipped branch counts as removed, so this is saved by a program that skips it.
        of: with a budget: "blocks" (the default), "attention", "mlp" or "branches".
        keep: layers that stay as they are: "0:2,-1" (half-open ranges and numbers, also from the end), or numbers.
        by: the criterion, see `rank`: "kl" (layers or branches whose removal changes predictions least, measured one at
            a time), "loss" (those whose removal raises the loss least), "influence" (lowest block influence, ShortGPT),
            "angular" (the span of adjacent blocks with the lowest angular distance, Gromov et al.; of branches the
            single ones), or "task:arc_easy" (layers whose removal lowers the first metric of this
            task of lm-eval least, see `rank`; its requests are measured instead of a text).
        greedy: remove one layer at a time and measure the remaining layers again after each removal. With "angular"
            this chooses single blocks, not a span. Branches are chosen greedily by "kl", "loss" or a task.
        race: with "kl" or "loss": stop measuring a layer once it is sure, with an error probability of about 5 %,
            whether it is among those with the lowest scores. The two scores of the other criteria are then of the text
            that the race took. The costs are measured on all text. By a task, and one at a time with a budget, there is
            no race.
        limit: by a task: number of its documents; by default all.
        shots: by a task: number of examples before each document; by default the task's own number.
        task_path: by a task: directories with your own task definitions.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        directory: where to write the measurements. A run that was interrupted resumes there. Default: nothing is
            written.
        output: directory to write the pruned checkpoint to, for a model that is given by its name.
        overwrite: replace the output, and measurements made with other arguments.
        heal: "linear" to fold linear maps, fitted on the same text, into the blocks before the cuts; see `heal_linear`.
        progress: called with the name of the current measurement, how much is done and how much there is in total.
        options: as `layersurgery.runs.options.RunOptions`.

    Returns:
        The parts that were chosen, the plan that removes them, and the costs of every criterion for each number of
        parts, with what is saved: as a plain checkpoint (`parameters_saved`, `multiplications_saved`,
        `cache_bytes_saved`), and by a program that skips the skipped branches (`..._saved_if_skipped`). The criterion
        "greedy" is the greedy variant of `by`. By a task, the criteria are "task" and "kl", and the table has the
        columns of `rank` by a task.

    Raises:
        PlanError: an unknown criterion, not one way to say how much is removed, too many layers to remove, or text
            that cannot be measured.
        UnsupportedEditError: the model's blocks cannot be run in another order.
        MeasurementError: no remaining layer can be removed, a budget that cannot be reached, predictions that are NaN
            or infinite, or too little memory.
        OutputError: the output exists, or the directory holds something else.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> pruning = ls.prune(model, ["The capital of France is Paris."], remove=2, tokenizer=tokenizer)
        >>> pruned = ls.operate_(model, pruning.plan)
        >>> model.config.num_hidden_layers
        28
    """
    goal = Goal.of(
        remove=remove, remove_attention=remove_attention, remove_mlp=remove_mlp, remove_branches=remove_branches,
        budget=budget, of=of, keep=keep,
    )  # fmt: skip
    run_options, _ = split_options(options, prune)
    run_options.refuse(SWEEP_ONLY, "is for sweep; prune does not take it")
    check_criterion(by, goal, greedy=greedy)
    task = given_task(by, limit, shots, task_path, run_options, has_text=text is not None)
    run_options, given = read_given_text(text, run_options, attention_mask)

    def in_memory(session: ModelSession, loaded: Any, tokens: TokenizedText) -> Pruning:
        wanted = goal.checked(session.model.depth)
        measure = measure_in_memory(session, loaded, tokens, progress)
        pruning = choose_parts(session, measure, wanted, by=by, greedy=greedy, race=race)
        costs = as_result(pruning.costs.assign(model=session.model.label), "costs", session.caption(tokens))
        return replace(pruning, costs=costs)

    def in_directory(session: ModelSession, results: Path) -> Pruning:
        return run_prune(session, results, goal, by=by, greedy=greedy, race=race, overwrite=overwrite)

    return choose_plan(
        model,
        run_options,
        task or given,
        in_memory=in_memory,
        in_directory=in_directory,
        directory=directory,
        output=output,
        overwrite=overwrite,
        heal=heal,
        progress=progress,
    )


def run_prune(
    session: ModelSession,
    directory: Path,
    goal: Goal,
    *,
    by: str,
    greedy: bool,
    race: bool = True,
    overwrite: bool = False,
) -> Pruning:
    """Choose parts to remove and measure the cost, in directories below `directory`, or use the finished runs there.

    Args:
        session: the model and the text.
        directory: where to write: "rank" (of branches "rank-attention" and so on), "step-01" and so on for a greedy
            choice, and "costs".
        goal: what is removed, and how much.
        by: the criterion.
        greedy: measure the remaining parts again after each removal.
        race: with "kl" or "loss", stop measuring a part once it is sure whether it is among those to remove.
        overwrite: replace measurements made with other arguments.
    """
    goal = goal.checked(session.model.depth)
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

    with saying_what_is_kept(directory):
        return choose_parts(session, measure, goal, by=by, greedy=greedy, race=race)


def choose_parts(session: ModelSession, measure: Measure, goal: Goal, *, by: str, greedy: bool, race: bool) -> Pruning:
    """Choose parts to remove, and measure the cost.

    Args:
        session: the model, and the text or the task.
        measure: measures a measurement.
        goal: what is removed, and how much, checked for the model.
        by: the criterion.
        greedy: measure the remaining parts again after each removal.
        race: with "kl" or "loss", stop measuring a part once it is sure whether it is among those to remove.
    """
    depth, log = session.model.depth, session.reporter.log
    harness = harness_of(session)
    race = race and by in MEASURED
    if harness is not None:
        log(NO_RACE)
    ranked = [_rank(session, measure, goal, kind, by, race=race) for kind in goal.kinds]
    costs = PartCosts(ranked[0][PARTS])
    spans = ranked[0].get("spans", pd.DataFrame())
    orders: dict[str, list[tuple[Part, ...]]] = {}
    for criterion in _compared(by, race=race and goal.budget is None, on_task=harness is not None):
        try:
            orders[criterion] = removal_orders([tables["rank"] for tables in ranked], spans, goal, costs, criterion)
        except MeasurementError:
            if criterion == by or goal.budget is None:
                raise
            log(f"Note: the budget {goal.budget} cannot be reached by {criterion}, so its costs are not measured")
    if greedy:

        def measure_step(removed: tuple[Part, ...]) -> pd.DataFrame:
            candidates = tuple(goal.candidates(depth, removed))
            step = GreedyStepMeasurement(depth, by, removed, candidates, race, costs.single, harness=harness)
            of = f" of {goal.count}" if goal.budget is None else f" ({goal.budget} to remove)"
            subject = f"choosing {goal.noun} {len(removed) + 1}{of}"
            return measure(step, f"step-{len(removed) + 1:02}", subject)[step.name]

        removed: list[Part] = []
        for part, score in greedy_removals(by, measure_step, lambda parts: goal.is_reached(parts, costs), goal.noun):
            log(f"Removing {part.words} ({'cost' if harness else CRITERIA[by]} {score:.3g})")
            removed.append(part)
        orders[GREEDY] = prefixes(removed)
    measurement = CostMeasurement(depth, orders, costs.single, harness=harness)
    frame = measure(measurement, measurement.name, "measuring the cost of each criterion")[measurement.name]
    chosen = orders[GREEDY if greedy else "task" if harness else by][-1]
    return Pruning(removal_plan(chosen, costs.single), chosen, by, greedy, frame)


def _rank(
    session: ModelSession, measure: Measure, goal: Goal, kind: str, by: str, *, race: bool
) -> dict[str, pd.DataFrame]:
    """Rank the parts of one kind; return the tables."""
    depth, on_task = session.model.depth, session.texts.has_tasks
    lowest = goal.counts.get(kind) if race and goal.counts.get(kind) != len(goal.parts(kind, depth)) else None
    spans = None
    if kind == BLOCKS and not on_task:
        # The length of the span that reaches a budget is not known before.
        spans = goal.count or (depth - 1 if by == "angular" else None)
    measurement = rank_measurement(session, spans, lowest, kind, goal.keep, CRITERIA.get(by, "kl_nats"))
    noun = plural(NOUNS[kind], 2)
    subject = f"ranking {noun} on {measurement.harness.tasks[0]}" if measurement.harness else f"ranking {noun}"
    return measure(measurement, "rank" if kind == BLOCKS else f"rank-{kind}", subject)


def _compared(by: str, *, race: bool, on_task: bool) -> list[str]:
    """Return the criteria whose costs are measured.

    A race by KL measures the loss of each part on other text, and the reverse, so these two are not compared then.
    """
    if on_task:
        return list(TASK_CRITERIA)
    return [name for name in CRITERIA if name == by or not (name == "loss" or (race and name in MEASURED))]
