"""Run `layersurgery prune`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from layersurgery.analyses.removal_goal import Goal
from layersurgery.quick_imports import quick_imports
from layersurgery.units import format_bytes, format_count

from ..terminal.console import Console
from .edit import EditOptions, as_json, describe_result, refuse_for_gguf, revision_of, write_edits
from .heal import heal_progress, healing_lines, healing_values

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.analyses.layer_pruning import Pruning
    from layersurgery.runs.options import RunOptions
    from layersurgery.runs.session import ModelSession

_CRITERION_NAMES = {
    "kl": "KL", "influence": "block influence", "angular": "angular distance", "loss": "rise of loss",
}  # fmt: skip
_SIZES: tuple[tuple[str, str, Callable[[int], str]], ...] = (
    ("parameters", "parameters", format_count),
    ("multiplications", "multiplications per token", format_count),
    ("cache_bytes", "cache per token", format_bytes),
)


def run_prune(
    model: str,
    options: RunOptions,
    goal: dict[str, Any],
    by: str,
    greedy: bool,
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
    """Choose the layers to remove, measure the cost, and write the pruned checkpoint; or only estimate the work."""
    wanted = Goal.of(**goal)
    with quick_imports():
        from layersurgery.analyses.layer_pruning import check_criterion
        from layersurgery.analyses.layer_ranking import MEASURED
        from layersurgery.analyses.plan_run import card_rows, check_heal, check_target, heal_session, results_directory
        from layersurgery.analyses.prune_run import run_prune as run_in
        from layersurgery.analyses.task_criterion import given_task
        from layersurgery.runs.processes import run_session

    check_criterion(by, wanted, greedy=greedy)
    given = given_task(by, options=options, **task)
    check_heal(heal, given)
    if estimate:
        from .estimate import show_removals

        again = "After each removal, those that remain are measured again. " if greedy else ""
        show_removals(
            model, wanted.kinds, lambda depth: wanted.checked(depth).keep, by, task, options, console,
            may_stop=race and by in MEASURED,
            then=f"{again}Then the models without the parts that were chosen are measured in full.",
        )  # fmt: skip
        return

    refuse_for_gguf(output, link, console)

    def lead(session: ModelSession) -> tuple[Path, Path, Pruning]:
        wanted.checked(session.model.depth)
        criterion = f"{by.replace(':', '-')}{'-greedy' if greedy else ''}"
        out = output or Path(f"{session.model.name}-prune-{wanted.name}-{criterion}")
        check_target(session, out, overwrite=overwrite, heals=heal is not None)
        if console.dry_run:
            console.log(f"The pruned checkpoint would be {out}; this is measured first:")
        directory = results or results_directory(out)
        pruning = run_in(session, directory, wanted, by=by, greedy=greedy, race=race, overwrite=overwrite)
        if heal is not None:
            pruning = replace(pruning, healing=heal_session(session, pruning.plan, heal_progress(console)))
        return out, directory, pruning

    done = run_session(model, options, lead, reporter=console, given=given)
    if done is None:
        return
    out, directory, pruning = done
    edit_options = EditOptions(out, overwrite, link, verify, options.revision, options.blocks)
    healing = pruning.healing
    [result], source = write_edits(
        {None: pruning.plan},
        model,
        edit_options,
        console,
        None if healing is None else healing.maps,
        card_rows(pruning),
    )
    frame = pruning.costs
    before, after = (
        frame.iloc[0],
        _row(frame, "greedy" if greedy else "task" if by not in _CRITERION_NAMES else by, len(pruning.parts)),
    )
    value = {
        **as_json(result, source.label, revision_of(source, edit_options)),
        "by": by,
        "greedy": greedy,
        "layers": list(pruning.layers),
        "parts": [part.name for part in pruning.parts],
        "before": _numbers(before),
        "after": _numbers(after),
        "results": str(directory),
        "costs": json.loads(frame.drop(columns=["model"]).to_json(orient="records", double_precision=15)),
    }
    figures = [f"costs/{name}" for name in frame.attrs["run"]["figures"]]
    others = [f"{path.name}/" for path in sorted(directory.iterdir()) if path.is_dir() and path.name != "costs"]
    lines: list[Any] = [_table(frame), *_describe_cost(pruning, before, after)]
    if after is not None:
        value["saved"] = {name: float(after[name]) for name in frame if "_saved" in name or name.endswith("_of_blocks")}
        lines += ["", _savings(after), *_about_savings(after)]
    if healing is not None:
        value |= healing_values(healing)
        lines += ["", *healing_lines(healing)]
    lines += [
        escape(line)
        for line in (*describe_result(result), f"The measurements are in {directory}: {', '.join([*figures, *others])}")
    ]
    console.result(value, *lines, written=result.path)


def _row(frame: pd.DataFrame, criterion: str, removed: int) -> pd.Series | None:
    rows = frame[(frame.criterion == criterion) & (frame.removed == removed)]
    return None if rows.empty else rows.iloc[0]


def _numbers(row: pd.Series | None) -> dict[str, float] | None:
    names = ("perplexity", "loss_nats", "kl_nats", "agreement", "accuracy", "entropy_bits")
    return None if row is None else {name: float(row[name]) for name in names}


def _table(frame: pd.DataFrame) -> Table:
    metric = _metric_column(frame)
    criteria = [str(criterion) for criterion in frame.criterion.unique() if criterion != "unedited"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{_noun(frame, 2)}\nremoved", justify="right")
    for criterion in criteria:
        table.add_column(f"{criterion}\nKL", justify="right", no_wrap=True)
        table.add_column(f"\n{frame.metric.iloc[0] if metric else 'ppl.'}", justify="right", no_wrap=True)
    for removed in range(int(frame.removed.max()) + 1):
        rows = [_row(frame, criterion, removed) if removed else frame.iloc[0] for criterion in criteria]
        table.add_row(str(removed), *[cell for row in rows for cell in _cells(row, metric or "perplexity")])
    return table


def _cells(row: pd.Series | None, other: str) -> list[str]:
    return ["-", "-"] if row is None else [f"{row.kl_nats:.3f}", f"{row[other]:.4g}"]


def _noun(frame: pd.DataFrame, count: int) -> str:
    from layersurgery.analyses.removable_parts import NOUNS, plural

    return plural(NOUNS[str(frame.of.iloc[0])], count)


def _savings(row: pd.Series) -> Table:
    """Return a table of what the pruned model saves of the cost of all blocks."""
    skips = "skip-" in row.plan
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("saved, of the layers", no_wrap=True)
    for heading in ("in this checkpoint", *(["if a program skips the branches"] if skips else [])):
        table.add_column(heading, justify="right")
    for name, label, size in _SIZES:
        cells = [row[f"{name}_saved"], *([row[f"{name}_saved_if_skipped"]] if skips else [])]
        total = row[f"{name}_of_blocks"]
        shown = (
            "not known" if math.isnan(cell) else f"{size(int(cell))} ({100 * cell / total:.1f} %)" for cell in cells
        )
        table.add_row(label, *(shown if total else ["none"] * len(cells)))
    return table


def _about_savings(row: pd.Series) -> Iterator[str]:
    yield f"Embeddings are not counted. Multiplications are estimated, for texts of {int(row.context):,} tokens."
    if "skip-" in row.plan:
        yield (
            "A skipped branch stays in the checkpoint, with output weights of zero; programs compute it as before,\n"
            "unless they skip it."
        )


def _metric_column(frame: pd.DataFrame) -> str:
    """Return the column of the task's metric; empty if the costs are of a text."""
    if "cost" not in frame:
        return ""
    return f"task_{str(frame.by.iloc[0]).removeprefix('task:')}_{frame.metric.iloc[0]}"


def _describe_cost(pruning: Pruning, before: pd.Series, after: pd.Series | None) -> Iterator[str]:
    from layersurgery.analyses.removable_parts import describe_parts
    from layersurgery.tasks.task_costs import metric_on_task, ties_sentence

    of_blocks = pruning.parts[0].branch is None
    layers = f"layer{'s'[: len(pruning.layers) != 1]} {', '.join(map(str, pruning.layers))}"
    numbers = layers if of_blocks else describe_parts(pruning.parts)
    method = (
        "measured again after each removal"
        if pruning.greedy
        else "as one span"
        if pruning.by == "angular" and of_blocks
        else f"measured one {_noun(pruning.costs, 1)} at a time"
    )
    metric = _metric_column(pruning.costs)
    name = _CRITERION_NAMES.get(pruning.by) or f"fall of {metric_on_task(pruning.costs)}"
    yield f"\nRemoved {numbers} (criterion: {name}, {method})"
    if after is None:
        yield "The pruned model was not measured: there was not enough memory"
        return
    what, column = (metric_on_task(pruning.costs), metric) if metric else ("Perplexity", "perplexity")
    if metric:
        yield f"{ties_sentence(pruning.costs)}"
    yield (
        f"[bold]{what} {before[column]:.4g} before, {after[column]:.4g} after[/]; "
        f"KL {after.kl_nats:.3g} nats, top-1 agreement {100 * after.agreement:.1f} % ({int(after.tokens):,} tokens)"
    )
