"""Run `layersurgery heal-linear` and `layersurgery heal`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from layersurgery.plans.plan import Plan
from layersurgery.quick_imports import quick_imports

from ..terminal.console import Console
from .edit import EditOptions, as_json, describe_result, revision_of, write_edits

if TYPE_CHECKING:
    from layersurgery.analyses.heal_run import TrainedHealing
    from layersurgery.analyses.heal_training import TrainingOptions
    from layersurgery.analyses.linear_healing import LinearHealing
    from layersurgery.runs.options import RunOptions
    from layersurgery.runs.session import ModelSession


def run_heal_linear(
    model: str,
    plan: Plan,
    options: RunOptions,
    output: Path | None,
    link: bool,
    verify: bool,
    overwrite: bool,
    console: Console,
) -> None:
    """Fit the maps, print what they change, and write the healed checkpoint."""
    with quick_imports():
        from layersurgery.analyses.linear_healing import find_cuts
        from layersurgery.analyses.plan_run import check_target, heal_session
        from layersurgery.runs.dry_run import DryRun, state_of_output
        from layersurgery.runs.processes import run_session

    def lead(session: ModelSession) -> tuple[Path, LinearHealing]:
        find_cuts(plan.route(session.model.depth), session.model.depth)
        out = output or Path(f"{session.model.name}-{plan.slug}-healed")
        check_target(session, out, overwrite=overwrite, heals=True)
        if console.dry_run:
            session.check()
            caption, state = session.caption(session.texts.text), state_of_output(out)
            raise DryRun(session.model.label, caption, out, state, "fit linear maps to")
        return out, heal_session(session, plan, heal_progress(console))

    done = run_session(model, options, lead, reporter=console)
    if done is None:
        return
    out, healing = done
    edit_options = EditOptions(out, overwrite, link, verify, options.revision, options.blocks)
    [result], source = write_edits({None: plan}, model, edit_options, console, healing.maps)
    value = {
        **as_json(result, source.label, revision_of(source, edit_options)),
        **healing_values(healing),
    }
    console.result(value, *healing_lines(healing), *map(escape, describe_result(result)), written=result.path)


def healing_values(healing: LinearHealing) -> dict[str, Any]:
    """Return what was fitted and what it changes, for --json."""
    tables = {"cuts": healing.cuts, "healing": healing.costs}
    return {name: json.loads(table.to_json(orient="records", double_precision=15)) for name, table in tables.items()}


def run_heal(
    checkpoint: str,
    teacher: str,
    options: RunOptions,
    training: TrainingOptions,
    output: Path | None,
    overwrite: bool,
    console: Console,
) -> None:
    """Train the checkpoint, print what it changed, and write the healed one."""
    with quick_imports():
        from layersurgery.analyses.heal_run import run_heal as heal

    out = output or Path(f"{Path(checkpoint).name}-healed")
    healing = heal(checkpoint, teacher, options, training, out, overwrite=overwrite, reporter=console)
    if int(os.environ.get("RANK", "0")):  # another process prints
        return
    value = {
        "output": str(healing.written),
        "text": healing.text,
        "steps": json.loads(healing.steps.to_json(orient="records", double_precision=15)),
    }
    console.result(value, *training_lines(healing), written=healing.written)


def training_lines(healing: TrainedHealing) -> Iterator[Any]:
    """Yield a table of the evaluations, and the result in words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "KL", "loss", "ppl."):
        table.add_column(column, justify="right")
    for row in healing.steps.to_dict("records"):
        perplexity = math.exp(min(row["loss_nats"], 700))
        table.add_row(str(int(row["step"])), f"{row['kl_nats']:.3f}", f"{row['loss_nats']:.3f}", f"{perplexity:.4g}")
    yield table
    before, after = healing.steps.iloc[0], healing.steps.iloc[-1]
    yield (
        f"\n[bold]KL {before.kl_nats:.3g} nats before, {after.kl_nats:.3g} healed[/]; loss {before.loss_nats:.4g} and "
        f"{after.loss_nats:.4g}, teacher {after.teacher_loss_nats:.4g} ({int(after.tokens):,} held-out tokens)"
    )
    yield escape(f"Wrote {healing.written}: the model after step {int(after.step)}")


def healing_lines(healing: LinearHealing) -> Iterator[Any]:
    """Yield a table of the unedited, the edited and the healed model, and what was fitted in words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "KL", "loss", "ppl.", "agree"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in healing.costs.to_dict("records"):
        perplexity = math.exp(min(row["loss_nats"], 700))
        numbers = f"{row['kl_nats']:.3f}", f"{row['loss_nats']:.3f}", f"{perplexity:.4g}"
        table.add_row(row["model"], *numbers, f"{100 * row['agreement']:.1f} %")
    yield table
    unedited, edited, healed = (healing.costs.iloc[number] for number in range(3))
    yield (
        f"\n[bold]KL {edited.kl_nats:.3g} nats after the cut, {healed.kl_nats:.3g} healed[/]; loss "
        f"{edited.loss_nats:.4g} and {healed.loss_nats:.4g}, unedited {unedited.loss_nats:.4g} "
        f"({int(healed.tokens):,} tokens that the fit has not seen)"
    )
    for cut in healing.cuts.itertuples():
        yield _describe_cut(cut)


def _describe_cut(cut: Any) -> str:
    where = f"Block {cut.block}, before the cut of {cut.removed}:"
    if cut.ridge == float("inf"):
        return f"{where} no map lowers the error on other text, so the block is as it was"
    return (
        f"{where} error of the stream behind the cut {cut.error_before:.3f} before, {cut.error_after:.3f} after "
        f"(ridge {cut.ridge:g})"
    )


def heal_progress(console: Console) -> Any:
    """Return a function that says each step of healing once."""
    said: set[str] = set()

    def progress(what: str, _done: int, _total: int) -> None:
        if what not in said:
            said.add(what)
            console.log(f"{what[0].upper()}{what[1:]}")

    return progress
