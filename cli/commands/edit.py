"""Running edits, with words and a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from layersurgery.atomic_io import check_output
from layersurgery.checkpoints.edit_checkpoint import (
    EditResult,
    PreparedEdit,
    default_output,
    prepare_edit,
    read_checkpoint,
    write_edit,
)
from layersurgery.checkpoints.sources import Source, find_source, needs_conversion
from layersurgery.plans.plan import Plan

from ..terminal.console import Console, format_bytes


@dataclass(frozen=True, slots=True)
class EditOptions:
    """What all writing commands take."""

    output: Path | None
    overwrite: bool
    link: bool
    verify: bool
    revision: str | None
    blocks: str | None


def edit(plans: Mapping[str | None, Plan], model: str, options: EditOptions, console: Console) -> None:
    """Write an edited checkpoint for each plan, and say so."""
    results, source = edited(plans, model, options, console)
    values = [as_json(result, source.label, source.revision) for result in results]
    shown = [escape(line) for result in results for line in lines(result)]
    console.result(values[0] if list(plans) == [None] else values, *shown)


def edited(
    plans: Mapping[str | None, Plan], model: str, options: EditOptions, console: Console
) -> tuple[list[EditResult], Source]:
    """Write an edited checkpoint for each plan; every one of them is checked before the first is written."""
    if needs_conversion(model):
        with console.status(f"Converting {model} to safetensors (once)"):
            source = find_source(model)
    else:  # the hub's client has progress bars of its own
        source = find_source(model, revision=options.revision)
    outputs = {name: _output(name, options) or default_output(source, plan) for name, plan in plans.items()}
    for out in outputs.values():
        check_output(out, source.directory, overwrite=options.overwrite)
    checkpoint = read_checkpoint(source, blocks=options.blocks)
    files = len(checkpoint.tensors.shards)
    console.log(
        f"{model}: {checkpoint.depth} blocks, {format_bytes(checkpoint.tensors.nbytes)} in {files} file{'s'[: files > 1]}"
    )
    drafts: dict[str | None, PreparedEdit] = {}
    for name, plan in plans.items():
        route = plan.route(checkpoint.depth)
        console.log(f"{f'{name}: ' if name else ''}{plan}  ->  {route}")
        if options.verify:
            with console.status("Checking that a reload would be this model"):
                drafts[name] = prepare_edit(checkpoint, plan, verify=True)
        else:
            drafts[name] = prepare_edit(checkpoint, plan, verify=False)
    results = []
    for name, sketch in drafts.items():
        with console.byte_progress(sketch.nbytes) as progress:
            results.append(
                write_edit(sketch, outputs[name], overwrite=options.overwrite, link=options.link, progress=progress)
            )
    if options.link and not any(result.bytes_linked for result in results):
        console.log(
            "No file could be linked: each one changes, or the output is on another file system. All was copied"
        )
    return results, source


def _output(name: str | None, options: EditOptions) -> Path | None:
    if name is None:
        return options.output
    return (options.output or Path()) / name


def lines(result: EditResult) -> list[str]:
    """What was written, and how to load it."""
    linked = f", {format_bytes(result.bytes_linked)} of it hard-linked to the source" if result.bytes_linked else ""
    total = format_bytes(result.bytes_written + result.bytes_linked)
    return [
        f"Wrote {result.path}: {len(result.route)} blocks, {total}{linked}, in {result.seconds:.1f} s",
        f'Load it with: transformers.pipeline("text-generation", model="{result.path}")',
    ]


def as_json(result: EditResult, source: str, revision: str | None) -> dict[str, Any]:
    """A result for a program."""
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
    }
