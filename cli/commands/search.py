"""Run `layersurgery search`."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from layersurgery.errors import PlanError
from layersurgery.quick_imports import quick_imports

from ..terminal.console import Console
from .edit import EditOptions, as_json, describe_result, refuse_for_gguf, revision_of, write_edits
from .heal import heal_progress, healing_lines, healing_values

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.analyses.search_cost import LevelCost
    from layersurgery.analyses.search_run import Search
    from layersurgery.runs.options import RunOptions
    from layersurgery.runs.session import ModelSession

_WRAP_WIDTH = 110


def run_search(
    model: str,
    options: RunOptions,
    goal: dict[str, Any],
    by: str,
    race: bool,
    heal: str | None,
    task: dict[str, Any],
    estimate: bool,
    output: Path | None,
    results: Path | None,
    link: bool,
    verify: bool,
    overwrite: bool,
    console: Console,
) -> None:
    """Search a route, print the routes that were measured in full, and write the edited checkpoint if it is wanted.

    Args:
        model: the model's name.
        options: options of the measurements.
        goal: the keyword arguments of `SearchSpace.of`.
        by: what to minimize.
        race: let the candidates of a level race.
        heal: "linear" to heal the cuts; None not to.
        task: options of a task to search by.
        estimate: print the cost, and do nothing else.
        output: where to write the checkpoint; None for none.
        results: where to write the measurements.
        link: hard-link files that do not change.
        verify: check that the checkpoint reloads as the intended model.
        overwrite: replace the output, and measurements made with other arguments.
        console: where to print.
    """
    with quick_imports():
        from layersurgery.analyses.plan_run import card_rows, check_heal, check_target, heal_session, results_directory
        from layersurgery.analyses.route_search import SearchSpace
        from layersurgery.analyses.search_run import run_search as run_in
        from layersurgery.analyses.search_tables import check_score
        from layersurgery.analyses.task_criterion import given_task
        from layersurgery.runs.processes import run_session

    check_score(by)
    given = given_task(by, options=options, **task)
    check_heal(heal, given)
    if output is None and (link or not verify):
        raise PlanError("--link and --no-verify are for the checkpoint; name its directory with --output")
    if output is None and heal is not None:
        raise PlanError("--heal changes the checkpoint; name its directory with --output")
    if estimate:
        _show_estimate(model, options, goal, console)
        return

    refuse_for_gguf(output, link, console)

    def lead(session: ModelSession) -> tuple[Path, Search]:
        space = SearchSpace.of(session.model.depth, **goal)
        if output is not None:
            check_target(session, output, overwrite=overwrite, heals=heal is not None)
            if console.dry_run:
                console.log(f"The edited checkpoint would be {output}; this is measured first:")
        default = (
            Path(f"{session.model.name}-search-{space.target}-{by.replace(':', '-')}")
            if output is None
            else results_directory(output)
        )
        directory = results or default
        search = run_in(session, directory, space, by=by, race=race, overwrite=overwrite)
        if heal is not None:
            search = dataclasses.replace(search, healing=heal_session(session, search.plan, heal_progress(console)))
        return directory, search

    done = run_session(model, options, lead, reporter=console, given=given)
    if done is None:
        return
    directory, search = done
    value: dict[str, Any] = {"plan": str(search.plan), "route": str(search.route), "blocks": len(search.route)}
    written: list[str] = []
    healed: list[Any] = []
    if output is not None:
        edit_options = EditOptions(output, overwrite, link, verify, options.revision, options.blocks)
        healing = search.healing
        [result], source = write_edits(
            {None: search.plan},
            model,
            edit_options,
            console,
            None if healing is None else healing.maps,
            card_rows(search),
        )
        value, written = as_json(result, source.label, revision_of(source, edit_options)), describe_result(result)
        if healing is not None:
            value |= healing_values(healing)
            healed = ["", *healing_lines(healing)]
    else:
        named = {"--plan": str(search.plan), "--revision": options.revision, "--blocks": options.blocks}
        words = [word for name, value in named.items() if value is not None for word in (name, value)]
        written = [f"Write the checkpoint with: {shlex.join(['layersurgery', 'edit', model, *words])}"]
    shown = _shown(search, directory, value, written)
    console.result(*shown, *healed, written=output or directory)


def _shown(search: Search, directory: Path, value: dict[str, Any], written: Sequence[str]) -> list[Any]:
    """Return what `console.result` takes: the value, the table of routes and the lines after it."""
    from layersurgery.analyses.search_tables import describe_search

    frame, words = search.results, describe_search(search.results)
    value |= {
        "by": search.by,
        "summary": words,
        "results": str(directory),
        "search": json.loads(frame.drop(columns=["model"]).to_json(orient="records", double_precision=15)),
        "tried": int(search.tried.measured.sum()),
    }
    lines: list[Any] = [_table(frame), "", *(escape(line) for line in textwrap.wrap(words, _WRAP_WIDTH))]
    raced = search.tried.race.isin(["lowest", "higher"]).any()
    wrong = " Each race is wrong about its beam with a probability of about 5 % or less." if raced else ""
    lines += [f"{value['tried']:,} routes were measured.{wrong}", *map(escape, written)]
    figures = [f"search/{name}" for name in frame.attrs["run"]["figures"]]
    lines.append(escape(f"The measurements are in {directory}: {', '.join(figures)}"))
    return [value, *lines]


def _table(frame: pd.DataFrame) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    on_task = "cost" in frame
    for heading in ("blocks", "plan", *(["fall"] if on_task else []), "KL", "loss", "ppl.", "agree", ""):
        is_text = heading in ("plan", "")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    order = ["level", "above_winner", "kl_nats"] if on_task else ["level", "above_winner_nats"]
    for row in frame.sort_values(order, kind="stable").to_dict("records"):
        roles = {"chosen": row["winner"], "finalist": row["finalist"] > row["winner"], "one-shot": row["one_shot"]}
        note = ", ".join(role for role, has_role in roles.items() if has_role)
        table.add_row(
            str(row["block_calls"]), escape(row["plan"] or "unedited"),
            *([f"{row['cost']:.4g}"] if on_task else []), f"{row['kl_nats']:.3f}",
            f"{row['loss_change_nats']:+.3f}", f"{row['perplexity']:.4g}", f"{100 * row['agreement']:.1f} %", note,
        )  # fmt: skip
    return table


def _show_estimate(model: str, options: RunOptions, goal: dict[str, Any], console: Console) -> None:
    """Print how many routes a search measures, and their block calls."""
    from layersurgery.analyses.route_search import SearchSpace
    from layersurgery.analyses.search_cost import describe_cost, forecast
    from layersurgery.runs.requests import read_model_info

    if os.environ.get("RANK", "0") != "0":  # with several processes, only one prints
        return
    info = read_model_info(model, options.revision, console, trust_remote_code=options.trust_remote_code)
    costs = forecast(SearchSpace.of(info.depth, **goal))
    value = {"model": info.source.label, "levels": [dataclasses.asdict(cost) for cost in costs]}
    console.result(value, _cost_table(costs), describe_cost(costs))


def _cost_table(costs: Sequence[LevelCost]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("measurement", "blocks", "routes", "block calls for each token"):
        table.add_column(heading, justify="left" if heading == "measurement" else "right")
    for cost in costs:
        at_most = "" if cost.exact else "≤ "
        table.add_row(cost.name, str(cost.blocks), f"{at_most}{cost.routes:,}", f"{at_most}{cost.block_calls:,}")
    return table
