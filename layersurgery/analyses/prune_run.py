"""Choose layers to remove, measure the cost, and write the pruned checkpoint; resumable if it writes a directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plans.route import whole_number
from ..runs.frames import as_result
from ..runs.options import SWEEP_ONLY
from ..runs.requests import read_given_text
from ..runs.tables import read_results
from .analyze import split_options
from .layer_pruning import (
    GREEDY,
    Pruning,
    check_removal,
    greedy_removals,
    prefixes,
    prune_tokens,
    removal_orders,
    removal_plan,
)
from .layer_ranking import CRITERIA
from .measurements import CostMeasurement, GreedyStepMeasurement, RankMeasurement
from .plan_run import choose_plan, run_or_reuse

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
            "influence" (lowest block influence, ShortGPT), or "angular" (the span of adjacent blocks with the lowest
            angular distance, Gromov et al.).
        greedy: remove one layer at a time and measure the remaining layers again after each removal. With "angular"
            this chooses single blocks, not a span.
        race: with "kl": stop measuring a layer once it is sure, with an error probability of about 5 %, whether it is
            among those with the lowest KL. The two scores of the other criteria are then of the text that the race
            took. The costs are measured on all text.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        directory: where to write the measurements. A run that was interrupted resumes there. Default: nothing is
            written.
        output: directory to write the pruned checkpoint to, for a model that is given by its name.
        overwrite: replace the output, and measurements made with other arguments.
        progress: called with the name of the current measurement, how much is done and how much there is in total.
        options: as `layersurgery.runs.options.RunOptions`.

    Returns:
        The layers, the plan that drops them, and the costs of every criterion for 1 to `remove` layers. The criterion
        "greedy" is the greedy variant of `by`.

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
    run_options, own = split_options(options, prune_tokens)
    run_options.refuse(SWEEP_ONLY, "is for sweep; prune does not take it")
    run_options, given = read_given_text(text, run_options, attention_mask)

    def in_memory(session: ModelSession, loaded: Any, tokens: TokenizedText) -> Pruning:
        pruning = prune_tokens(
            loaded,
            tokens.ids,
            tokens.mask,
            remove=remove,
            by=by,
            greedy=greedy,
            race=race,
            batch_size=run_options.batch_size,
            blocks=run_options.blocks,
            progress=progress,
            **own,
        )
        costs = as_result(pruning.costs.assign(model=session.model.label), "costs", session.caption(tokens))
        return replace(pruning, costs=costs)

    def in_directory(session: ModelSession, results: Path) -> Pruning:
        return run_prune(session, results, remove=remove, by=by, greedy=greedy, race=race, overwrite=overwrite)

    return choose_plan(
        model,
        run_options,
        given,
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
    race = race and by == "kl"
    check_removal(session.model.depth, remove, by)
    log = session.reporter.log
    reporter = session.reporter
    log(f"Ranking {session.model.depth} layers")
    reporter.subject = "ranking layers"
    rank = run_or_reuse(
        session,
        RankMeasurement(session.model.depth, remove, remove if race else None),
        directory / "rank",
        overwrite=overwrite,
    )
    ranks, spans = read_results(rank.directory), read_results(rank.directory, "spans")
    ranks.attrs["skipped"] = ranks.attrs["run"]["skipped"]
    orders = {criterion: removal_orders(ranks, spans, remove, criterion) for criterion in CRITERIA}
    if greedy:

        def measure_step(removed: tuple[int, ...]) -> Any:
            log(f"Choosing layer {len(removed) + 1} of {remove}")
            reporter.subject = f"choosing layer {len(removed) + 1} of {remove}"
            step = GreedyStepMeasurement(session.model.depth, by, removed, race)
            path = directory / f"step-{len(removed) + 1:02}"
            return read_results(run_or_reuse(session, step, path, overwrite=overwrite).directory)

        removed: list[int] = []
        for layer, score in greedy_removals(remove, by, measure_step):
            log(f"Removing layer {layer} ({CRITERIA[by]} {score:.3g})")
            removed.append(layer)
        orders[GREEDY] = prefixes(removed)
    log("Measuring the cost of each criterion")
    reporter.subject = "measuring the cost of each criterion"
    costs = run_or_reuse(
        session, CostMeasurement(session.model.depth, orders), directory / "costs", overwrite=overwrite
    )
    layers = orders[GREEDY if greedy else by][-1]
    return Pruning(removal_plan(layers), layers, by, greedy, read_results(costs.directory))
