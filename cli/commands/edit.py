"""Write edited checkpoints, with messages and a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from layersurgery.atomic_io import check_output
from layersurgery.checkpoints.checkpoint import read_checkpoint
from layersurgery.checkpoints.edit_checkpoint import (
    EditResult,
    default_output,
    is_gguf_output,
    read_means,
    write_edit,
)
from layersurgery.checkpoints.prepared_edit import PlannedEdit, PreparedEdit, check_edit, plan_edit
from layersurgery.checkpoints.sources import GgufSource, Source, find_gguf, find_source, needs_conversion
from layersurgery.errors import PlanError
from layersurgery.library_logs import quiet_libraries
from layersurgery.plans.block_sources import taken_blocks
from layersurgery.plans.plan import Plan
from layersurgery.units import format_bytes

from ..terminal.console import Console

if TYPE_CHECKING:
    from layersurgery.models.output_maps import OutputMaps


@dataclass(frozen=True, slots=True)
class EditOptions:
    """Options that all writing commands share."""

    output: Path | None
    overwrite: bool
    link: bool
    verify: bool
    revision: str | None
    blocks: str | None
    sources: Mapping[str, str] = field(default_factory=dict)
    means: Path | None = None
    gguf: bool = False
    dry_run: bool = False


def edit(plans: Mapping[str | None, Plan], model: str, options: EditOptions, console: Console) -> None:
    """Write an edited checkpoint for each plan, and print the results."""
    unpushed = "a recipe may write several checkpoints" if list(plans) != [None] else ""
    console.refuse_push("a dry run writes nothing" if options.dry_run else unpushed)
    results, source = write_edits(plans, model, options, console)
    values = [as_json(result, source.label, revision_of(source, options)) for result in results]
    lines = [escape(line) for result in results for line in describe_result(result)]
    written = None if options.dry_run else results[0].path
    console.result(values[0] if list(plans) == [None] else values, *lines, written=written)


def refuse_for_gguf(output: Path | None, link: bool, console: Console) -> None:
    """Refuse what does not go with a GGUF file as the output, before hours of measuring.

    Raises:
        PlanError: a push, or hard links.
    """
    if output is not None and is_gguf_output(output):
        console.refuse_push("a GGUF file has no model card, so it is not pushed")
        if link:
            raise PlanError("a GGUF file is edited without --link; omit it")


def revision_of(source: Source | GgufSource, options: EditOptions) -> str | None:
    """Return the revision of a source; a GGUF file has that which was asked for."""
    return source.revision if isinstance(source, Source) else options.revision


def _write_gguf_edits(
    plans: Mapping[str | None, Plan], model: str, options: EditOptions, console: Console
) -> tuple[list[EditResult], GgufSource]:
    """Write an edited GGUF file for each plan. All plans are checked before the first file is written.

    Raises:
        PlanError: an option of checkpoints was given.
    """
    from layersurgery.checkpoints.gguf_edit import check_gguf_output, plan_gguf_edit, write_gguf_edit

    console.refuse_push("a GGUF file has no model card, so it is not pushed")
    not_for_gguf = {
        "--blocks": options.blocks,
        "--link": options.link,
        "--source": options.sources,
        "--means": options.means,
    }
    if given := [name for name, value in not_for_gguf.items() if value]:
        raise PlanError(f"a GGUF file is edited without {given[0]}; omit it")
    source = find_gguf(model, revision=options.revision)
    outputs = {name: _gguf_output(name, options) or default_output(source, plan) for name, plan in plans.items()}
    _check_distinct(outputs)
    plans = _resolved(plans, str(source.path), options, console)
    for out in outputs.values():
        check_gguf_output(out, source.path, overwrite=options.overwrite)
    planned_edits = {name: plan_gguf_edit(source, plan) for name, plan in plans.items()}
    results = []
    for name, planned in planned_edits.items():
        console.log(f"{f'{name}: ' if name else ''}{planned.plan}  ->  {planned.route}")
        for note in planned.notes:
            console.note(note)
        with console.byte_progress(planned.nbytes) as progress:
            results.append(
                write_gguf_edit(
                    planned, outputs[name], overwrite=options.overwrite, progress=progress, dry_run=options.dry_run
                )
            )
    return results, source


def _gguf_output(name: str | None, options: EditOptions) -> Path | None:
    if name is None:
        return options.output
    return (options.output or Path()) / (name if is_gguf_output(name) else f"{name}.gguf")


def write_edits(
    plans: Mapping[str | None, Plan],
    model: str,
    options: EditOptions,
    console: Console,
    maps: OutputMaps | None = None,
    measured: Mapping[str, str] | None = None,
) -> tuple[list[EditResult], Source | GgufSource]:
    """Write an edited checkpoint for each plan, or an edited GGUF file.

    All plans are checked before the first checkpoint is complete.

    Args:
        plans: the plans, by the names of the outputs; None for the output of the options.
        model: the model's name.
        options: where and how to write.
        console: where to print.
        maps: linear maps that heal the model, by the position in the route.
        measured: rows of the model card: what the measurement that chose the plan says of the result.

    Returns:
        The results, in the order of the plans, and the model's files.
    """
    if options.gguf or (list(plans) == [None] and options.output is not None and is_gguf_output(options.output)):
        return _write_gguf_edits(plans, model, options, console)
    if needs_conversion(model):
        with console.status(f"Converting {model} to safetensors (once)"):
            source = find_source(model)
    else:  # the Hub client shows its own progress bars
        source = find_source(model, revision=options.revision)
    outputs = {name: _output_path(name, options) or default_output(source, plan) for name, plan in plans.items()}
    _check_distinct(outputs)
    plans = _resolved(plans, model, options, console)
    for out in outputs.values():
        check_output(out, source.directory, overwrite=options.overwrite)
    checkpoint = read_checkpoint(source, blocks=options.blocks)
    files = len(checkpoint.tensors.shards)
    size = format_bytes(checkpoint.tensors.nbytes)
    console.log(f"{model}: {checkpoint.depth} blocks, {size} in {files} file{'s'[: files > 1]}")
    routes = {name: plan.route(checkpoint.depth) for name, plan in plans.items()}
    taken_blocks(routes.values(), options.sources)  # a source may be that of some of the plans only
    planned_edits: dict[str | None, PlannedEdit] = {}
    means = read_means(options.means)
    for name, plan in plans.items():
        route = routes[name]
        sources = {visit.source: options.sources[visit.source] for visit in route if visit.source}
        console.log(f"{f'{name}: ' if name else ''}{plan}  ->  {route}")
        planned_edits[name] = plan_edit(
            checkpoint, plan, verify=options.verify, maps=maps, sources=sources, means=means
        )

    @cache
    def check_all() -> dict[str | None, PreparedEdit]:
        prepared_edits: dict[str | None, PreparedEdit] = {}
        for name, planned in planned_edits.items():
            if options.verify:
                console.log("Checking that the edited checkpoint will reload as this model")
            prepared_edits[name] = check_edit(planned)
        for note in dict.fromkeys(note for prepared in prepared_edits.values() for note in prepared.notes):
            console.note(note)
        return prepared_edits

    def check(name: str | None) -> PreparedEdit:
        return check_all()[name]

    results = []
    for name, planned in planned_edits.items():
        with console.byte_progress(planned.nbytes) as progress:
            results.append(
                write_edit(
                    planned, outputs[name], check=partial(check, name), overwrite=options.overwrite,
                    link=options.link, progress=progress, measured=measured, dry_run=options.dry_run,
                )
            )  # fmt: skip
    if options.link and not any(result.bytes_linked for result in results):
        console.log("No file can be linked: every file changes, or the output is on another file system")
    return results, source


def _resolved(
    plans: Mapping[str | None, Plan], model: str, options: EditOptions, console: Console
) -> Mapping[str | None, Plan]:
    """Return plans with the numbers of the neurons that they name by kind; only then is the model loaded."""
    if not any(plan.needs_weights for plan in plans.values()):
        return plans
    from layersurgery.checkpoints.loading import load
    from layersurgery.sweeps.neuron_scores import resolve_neurons

    with console.status(f"Scoring the neurons of {model}"), quiet_libraries():
        loaded = load(model, revision=options.revision).model
        return {name: resolve_neurons(plan, loaded, blocks=options.blocks) for name, plan in plans.items()}


def _check_distinct(outputs: Mapping[str | None, Path]) -> None:
    """Refuse outputs of which one would replace another.

    Raises:
        PlanError: two have one path.
    """
    names: dict[Path, str | None] = {}
    for name, out in outputs.items():
        if (other := names.setdefault(out.resolve(), name)) != name:
            raise PlanError(f"{other} and {name} would both be written to {out}; give them other names")


def _output_path(name: str | None, options: EditOptions) -> Path | None:
    if name is None:
        return options.output
    if is_gguf_output(name):
        raise PlanError(f"the output {name} would be a directory; add --gguf to write GGUF files, or name it otherwise")
    return (options.output or Path()) / name


def describe_result(result: EditResult) -> list[str]:
    """Describe what was written and how to load it."""
    linked = f", {format_bytes(result.bytes_linked)} of it hard-linked to the source" if result.bytes_linked else ""
    total = format_bytes(result.bytes_written + result.bytes_linked)
    if result.dry_run:
        linked = linked and f", {format_bytes(result.bytes_linked)} of it as hard links to the source"
        checked = "it would reload as this model; " if result.verified else ""
        return [f"Would write {result.path}: {len(result.route)} blocks, {total}{linked}; {checked}nothing was written"]
    load = f'transformers.pipeline("text-generation", model="{result.path}")'
    return [
        f"Wrote {result.path}: {len(result.route)} blocks, {total}{linked}, in {result.seconds:.1f} s",
        f"Load it with: {f'llama-cli --model {result.path}' if is_gguf_output(result.path) else load}",
    ]


def as_json(result: EditResult, source: str, revision: str | None) -> dict[str, Any]:
    """Return a result in the form that --json prints."""
    return {
        "path": str(result.path),
        "source": source,
        "revision": revision,
        "plan": str(result.plan),
        "route": str(result.route),
        "depth": result.depth,
        "blocks": len(result.route),
        "bytes_written": result.bytes_written,
        "bytes_linked": result.bytes_linked,
        "seconds": round(result.seconds, 3),
        "verified": result.verified,
        "dry_run": result.dry_run,
        "notes": list(result.notes),
        "sources": {name: [each.label, each.revision] for name, each in result.sources.items()},
    }
