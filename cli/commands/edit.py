"""Running edits, with words and a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from layersurgery.atomic_io import check_output
from layersurgery.checkpoints.edit_checkpoint import Draft, Edited, default_output, draft, read_checkpoint, write
from layersurgery.checkpoints.sources import Source, find_source, needs_conversion
from layersurgery.plans.plan import Plan

from ..terminal.console import Talk, size


@dataclass(frozen=True, slots=True)
class Options:
    """What all writing commands take."""

    output: Path | None
    overwrite: bool
    link: bool
    verify: bool
    revision: str | None
    blocks: str | None


def edit(plans: Mapping[str | None, Plan], model: str, options: Options, talk: Talk) -> None:
    """Write an edited checkpoint for each plan, and say so."""
    results, source = edited(plans, model, options, talk)
    values = [as_json(result, source.label, source.revision) for result in results]
    shown = [escape(line) for result in results for line in lines(result)]
    talk.result(values[0] if list(plans) == [None] else values, *shown)


def edited(plans: Mapping[str | None, Plan], model: str, options: Options, talk: Talk) -> tuple[list[Edited], Source]:
    """Write an edited checkpoint for each plan; every one of them is checked before the first is written."""
    if needs_conversion(model):
        with talk.step(f"Converting {model} to safetensors (once)"):
            source = find_source(model)
    else:  # the hub's client has progress bars of its own
        source = find_source(model, revision=options.revision)
    outputs = {name: _output(name, options) or default_output(source, plan) for name, plan in plans.items()}
    for out in outputs.values():
        check_output(out, source.directory, overwrite=options.overwrite)
    checkpoint = read_checkpoint(source, blocks=options.blocks)
    files = len(checkpoint.weights.shards)
    talk.say(f"{model}: {checkpoint.depth} blocks, {size(checkpoint.weights.nbytes)} in {files} file{'s'[: files > 1]}")
    drafts: dict[str | None, Draft] = {}
    for name, plan in plans.items():
        route = plan.route(checkpoint.depth)
        talk.say(f"{f'{name}: ' if name else ''}{plan}  ->  {route}")
        if options.verify:
            with talk.step("Checking that a reload would be this model"):
                drafts[name] = draft(checkpoint, plan, verify=True)
        else:
            drafts[name] = draft(checkpoint, plan, verify=False)
    results = []
    for name, sketch in drafts.items():
        with talk.moving(sketch.nbytes) as progress:
            results.append(write(sketch, outputs[name], overwrite=options.overwrite, link=options.link, progress=progress))
    if options.link and not any(result.bytes_linked for result in results):
        talk.say("No file could be linked: each one changes, or the output is on another file system. All was copied")
    return results, source


def _output(name: str | None, options: Options) -> Path | None:
    if name is None:
        return options.output
    return (options.output or Path()) / name


def lines(result: Edited) -> list[str]:
    """What was written, and how to load it."""
    linked = f", {size(result.bytes_linked)} of it hard-linked to the source" if result.bytes_linked else ""
    total = size(result.bytes_written + result.bytes_linked)
    return [
        f"Wrote {result.path}: {len(result.route)} blocks, {total}{linked}, in {result.seconds:.1f} s",
        f'Load it with: transformers.pipeline("text-generation", model="{result.path}")',
    ]


def as_json(result: Edited, source: str, revision: str | None) -> dict[str, Any]:
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
