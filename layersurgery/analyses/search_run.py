"""Search a route by measurements, and write its checkpoint; resumable if it writes a directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..checkpoints.edit_checkpoint import EditResult
from ..errors import MeasurementError, warn
from ..plans.plan import Plan
from ..plans.route import Route
from ..runs.frames import as_result
from ..runs.options import SWEEP_ONLY
from ..runs.requests import read_given_text
from ..runs.run_directory import saying_what_is_kept
from ..runs.tables import read_results
from .analyze import split_options
from .linear_healing import LinearHealing
from .plan_run import CHOSEN, Measure, Progress, choose_plan, measure_in_memory, run_or_reuse
from .route_search import (
    BEAM,
    FINAL,
    SearchSpace,
    changed_block,
    level_name,
    one_shot,
    search_levels,
)
from .search_cost import describe_cost, forecast
from .search_tables import FinalMeasurement, LevelMeasurement, check_score
from .task_criterion import NO_RACE, given_task, harness_of

if TYPE_CHECKING:
    from ..runs.session import ModelSession
    from ..runs.text import TokenizedText
    from ..tasks.harness import Harness

REFUSED = (*SWEEP_ONLY, "schedule", "compile", "per_token")


@dataclass(frozen=True, slots=True)
class Search:
    """Hold a route that a search found.

    Attributes:
        plan: the edit.
        by: what was minimized: "kl", "loss" or "task:NAME".
        results: the routes that were measured on all text, the unedited model first: the columns of a `sweep` table,
            with perplexity, block_calls (visits for each token), parameters (of the checkpoint, which has a copy of a
            block for each visit), winner, finalist (the last level's beam), one_shot (what one measurement of each
            block would choose), front_block_calls and front_parameters (no other of these routes is better in one of
            score and cost, and not worse in the other), above_winner_nats (score minus the winner's, on the same
            sequences) and surely_above.
        tried: every candidate: level, parent (the route that it was made from), route, plan, block_calls, parameters,
            score with its error and interval, tokens, sequences, race ("lowest", "higher" or "open"), place among the
            level's routes, kept (whether it is in the beam), measured, and reason (why the
            architecture cannot run it).
        written: the edited checkpoint, if one was written.
        healing: the linear maps that heal the model; None if it is not healed.
    """

    plan: Plan
    by: str
    results: pd.DataFrame
    tried: pd.DataFrame
    written: EditResult | None = None
    healing: LinearHealing | None = None

    @property
    def measured(self) -> pd.DataFrame:
        """Return the table of the routes that were measured in full."""
        return self.results

    @property
    def route(self) -> Route:
        """Return the route of the model that was found."""
        return self.plan.route(int(self.results.depth.iloc[0]))

    @property
    def front(self) -> pd.DataFrame:
        """Return the routes that no other one beats in score and block calls, or in score and parameters."""
        return self.results[self.results.front_block_calls | self.results.front_parameters]


def search(
    model: Any,
    text: Any = None,
    *,
    depth: int | None = None,
    remove: int | None = None,
    repeat: int | None = None,
    by: str = "kl",
    beam: int = BEAM,
    max_span: int | None = None,
    keep: Any = None,
    race: bool = True,
    limit: int | None = None,
    shots: int | None = None,
    task_path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    attention_mask: Any = None,
    directory: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    heal: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Search:
    """Search which layers to remove, or which to repeat, and write the edited checkpoint if it is wanted.

    A beam search: each level measures every way to drop (or repeat) one more span of the best routes before, and keeps
    the best of them. At the end the best routes are measured on all text. A loaded model is not changed:
    `operate_(model, search.plan)` edits it.

    Args:
        model: a transformers causal language model, a wrapper around one, or the name of one.
        text: token ids, (sequences, length); a tokenizer's output; a list of strings or of conversations; a Hugging
            Face dataset; a path; "pydoc"; or the id of a Hub dataset. Default: what the option `data` names.
        depth: number of blocks of the edited model: fewer than the model's to remove layers, more to repeat some.
        remove: number of layers to remove; instead of `depth`.
        repeat: number of layers to add by repeats; instead of `depth`.
        by: what to minimize: "kl", the KL from the unedited model; "loss", the change in loss; or "task:arc_easy", the
            fall of this task's first metric, see `rank`. The task's requests are then measured instead of a text.
        beam: number of routes of each level to continue from. One, with spans of one block, is greedy pruning.
        max_span: largest number of adjacent blocks that one move drops or repeats. By default 1 for removals, and for
            repeats the number of layers to add, at most 8.
        keep: layers that are not dropped: "0:2,-1" (half-open ranges and numbers, also from the end), or numbers.
        race: stop measuring a candidate once it is sure, with an error probability of about 5 % for each level, whether
            it is in the beam. The final routes are measured on all text. By a task there is no race.
        limit: by a task: number of its documents; by default all.
        shots: by a task: number of examples before each document; by default the task's own number.
        task_path: by a task: directories with your own task definitions.
        attention_mask: 1 for a token and 0 for padding, for token ids.
        directory: where to write the measurements. A search that was interrupted resumes there. Default: nothing is
            written.
        output: directory to write the edited checkpoint to, for a model that is given by its name.
        overwrite: replace the output, and measurements made with other arguments.
        heal: "linear" to fold linear maps, fitted on the same text, into the blocks before the cuts; see `heal_linear`.
        progress: called with the name of the current measurement, how much is done and how much there is in total.
        options: as `layersurgery.runs.options.RunOptions`.

    Returns:
        The plan, its route, all candidates, and the routes that were measured on all text. The route was chosen on this
        text, so its score on other text is somewhat higher.

    Raises:
        PlanError: a number is out of range, an unknown score, or text that cannot be measured.
        UnsupportedEditError: the architecture can run no candidate of a level.
        MeasurementError: predictions that are NaN or infinite, or too little memory.
        OutputError: the output exists, or the directory holds something else.

    Example:
        >>> import layersurgery as ls
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> search = ls.search(model, ["The capital of France is Paris."], remove=2, beam=2, tokenizer=tokenizer)
        >>> len(search.route), search.tried.groupby("level").size().to_dict()
        (28, {1: 30, 2: 57})
    """
    run_options, _ = split_options(options, search)
    run_options.refuse(REFUSED, "is for sweep; search does not take it")
    check_score(by)
    task = given_task(by, limit, shots, task_path, run_options, has_text=text is not None)
    run_options, given = read_given_text(text, run_options, attention_mask)

    def space_in(blocks: int) -> SearchSpace:
        return SearchSpace.of(
            blocks, depth=depth, remove=remove, repeat=repeat, max_span=max_span, beam=beam, keep=keep
        )

    def in_memory(session: ModelSession, loaded: Any, tokens: TokenizedText) -> Search:
        measure, caption = measure_in_memory(session, loaded, tokens, progress), session.caption(tokens)
        space, harness = space_in(session.model.depth), harness_of(session)
        return find_route(space, measure, by=by, race=race, caption=caption, harness=harness)

    def in_directory(session: ModelSession, results: Path) -> Search:
        return run_search(session, results, space_in(session.model.depth), by=by, race=race, overwrite=overwrite)

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


def run_search(
    session: ModelSession,
    directory: Path,
    space: SearchSpace,
    *,
    by: str = "kl",
    race: bool = True,
    overwrite: bool = False,
) -> Search:
    """Search a route, in directories below `directory`, or use the finished measurements there.

    Args:
        session: the model and the text.
        directory: where to write: "level-01" and so on, and "search".
        space: the routes.
        by: what to minimize.
        race: stop measuring a candidate once it is sure whether it is in the beam.
        overwrite: replace measurements made with other arguments.
    """
    reporter = session.reporter

    def measure(measurement: LevelMeasurement | FinalMeasurement, name: str, subject: str) -> dict[str, pd.DataFrame]:
        reporter.log(f"{subject[0].upper()}{subject[1:]}")
        reporter.subject = subject
        # The candidates of the first level are chosen by no measurement: others there are those of another search.
        chosen = () if name == level_name(1) else CHOSEN
        done = run_or_reuse(session, measurement, directory / name, overwrite=overwrite, chosen=chosen)
        names = [FINAL, "tried"] if name == FINAL else [measurement.name]
        tables: dict[str, pd.DataFrame] = {table: read_results(done.directory, table) for table in names}
        for frame in tables.values():
            frame.attrs["skipped"] = frame.attrs["run"]["skipped"]
        return tables

    harness = harness_of(session)
    cost = f"{describe_cost(forecast(space))}{'; less with races' if race and harness is None else ''}"
    reporter.log(f"Searching a route of {space.target} blocks (the model has {space.depth}): {cost}")
    if harness is not None:
        reporter.log(NO_RACE)
    with saying_what_is_kept(directory):
        return find_route(space, measure, by=check_score(by), race=race, harness=harness)


def find_route(
    space: SearchSpace,
    measure: Measure,
    *,
    by: str = "kl",
    race: bool = True,
    caption: str = "",
    harness: Harness | None = None,
) -> Search:
    """Search a route: measure one level after another, then the best routes on all text.

    Args:
        space: the routes.
        measure: measures a measurement.
        by: what to minimize.
        race: stop measuring a candidate once it is sure whether it is in the beam.
        caption: describes the text.
        harness: the task, if the search is by one.

    Raises:
        MeasurementError: no route is left.
    """

    def measure_level(level: int, routes: Sequence[Route]) -> pd.DataFrame:
        measurement = LevelMeasurement(space.depth, by, tuple(routes), space.beam if race else None, harness=harness)
        subject = f"measuring {len(routes)} routes of {space.visits(level)} blocks (level {level} of {space.levels})"
        return measure(measurement, level_name(level), subject)[measurement.name]

    levels = list(search_levels(space, measure_level))
    tried = pd.concat(levels, ignore_index=True)
    if reasons := dict(tried[tried.reason != ""][["plan", "reason"]].to_numpy()):
        plan, reason = next(iter(reasons.items()))
        warn(f"{len(reasons)} of {len(tried)} candidates cannot be run; the first of them is '{plan}': {reason}")
    ordered = [level.dropna(subset=["place"]).sort_values("place") for level in levels]
    finalists = list(map(Route.parse, ordered[-1].route[: space.beam]))
    best = [Route.parse(level.route.iloc[0]) for level in ordered if len(level)]
    single = one_shot(space, [changed_block(Route.parse(route), space.depth) for route in ordered[0].route])
    routes = tuple(dict.fromkeys([*finalists, *best, *single]))
    final = FinalMeasurement(space.depth, by, routes, len(finalists), frozenset(single), tried, harness=harness)
    tables = measure(final, FINAL, f"measuring {len(routes)} routes on all {'requests' if harness else 'text'}")
    results = as_result(tables[FINAL], FINAL, getattr(tables[FINAL], "caption", caption))
    winner = results[results.winner].iloc[0]
    if not winner.finalist:
        raise MeasurementError(
            f"the scores of all {len(finalists)} finalists are NaN or infinite on all text; the first of them is "
            f"{results[results.finalist].plan.iloc[0]}"
        )
    return Search(Plan.parse(winner.plan), by, results, tables["tried"])
