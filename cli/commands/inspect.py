"""`plan` and `inspect`: looking without touching."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.table import Table

from layersurgery.checkpoints.edit_checkpoint import Checkpoint
from layersurgery.checkpoints.inspection import Inspection, TensorGroup, inspect, read_for_inspection, size_after
from layersurgery.plans.plan import Plan
from layersurgery.plans.route import Route

from ..terminal.console import Console, format_bytes, format_count


def show_plan(
    text: str, model: str | None, depth: int | None, revision: str | None, blocks: str | None, console: Console
) -> None:
    """Explain a plan for a model or a depth."""
    plan = Plan.parse(text)
    checkpoint = None if model is None else read_for_inspection(model, revision=revision, blocks=blocks)
    depth = checkpoint.depth if checkpoint else depth or 0
    route = plan.route(depth)
    value: dict[str, Any] = {
        "plan": str(plan),
        "depth": depth,
        "route": str(route),
        "blocks": len(route),
        "identity": route.is_identity(depth),
        "visits": [dataclasses.asdict(visit) for visit in route],
    }
    table = Table(show_header=True, box=None, pad_edge=False)
    table.add_column("edit")
    table.add_column("route after it")
    for count in range(1, len(plan) + 1):
        so_far = Plan(plan.edits[:count])
        table.add_row(escape(str(plan.edits[count - 1])), _route_after(so_far, depth))
    lines = [f"\n{len(route)} blocks, from {depth}. {_words(route, depth)}"]
    if checkpoint is not None:
        change = size_after(checkpoint, route)
        value |= dataclasses.asdict(change)
        lines.append(
            f"{format_count(change.parameters_after)} parameters in {format_bytes(change.nbytes_after)}, from {format_count(change.parameters)} in "
            f"{format_bytes(change.nbytes)}: {_saved(change.nbytes - change.nbytes_after)}"
        )
    console.result(value, table, *lines)


def _route_after(plan: Plan, depth: int) -> str:
    route = Route.identity(depth)
    for edit in plan.edits:
        route = edit.apply(route, depth)
    return str(route) or "(none)"


def _words(route: Route, depth: int) -> str:
    if route.is_identity(depth):
        return "This is the unedited model."
    visited = set(route.blocks)
    gone = sorted(set(range(depth)) - visited)
    twice = sorted({block for block in visited if route.blocks.count(block) > 1})
    silent = [str(visit) for visit in route if not visit.whole]
    parts = [
        f"Left out: {Route(gone)}." if gone else "",
        f"Run more than once: {Route(twice)}." if twice else "",
        f"Silenced: {' '.join(silent)}." if silent else "",
        "Nothing is left out or repeated." if not gone and not twice and not silent else "",
    ]
    return " ".join(part for part in parts if part)


def _saved(nbytes: int) -> str:
    if nbytes > 0:
        return f"{format_bytes(nbytes)} saved"
    return f"{format_bytes(-nbytes)} more" if nbytes else "the same size"


def show_anatomy(model: str, revision: str | None, blocks: str | None, console: Console) -> None:
    """Show a checkpoint's blocks and tensors."""
    checkpoint: Checkpoint = read_for_inspection(model, revision=revision, blocks=blocks)
    found = inspect(checkpoint)
    value = dataclasses.asdict(found)
    for group in value["groups"]:
        group["blocks"] = f"{group['blocks']['start']}:{group['blocks']['stop']}"
    console.result(value, *_anatomy(found))


def _anatomy(found: Inspection) -> Iterable[str | Table]:
    dtypes = ", ".join(
        f"{dtype} {100 * count / max(found.parameters, 1):.3g}%" for dtype, count in sorted(found.dtypes.items())
    )
    width = f", width {found.width}" if found.width else ""
    vocabulary = f", {found.vocabulary} tokens" if found.vocabulary else ""
    yield f"[bold]{escape(found.name)}[/]  {escape(found.architecture)} ({escape(found.model_type)})"
    yield f"{found.depth} blocks at {escape(found.prefix)}{width}{vocabulary}"
    yield (
        f"{format_count(found.parameters)} parameters, {format_bytes(found.nbytes)} in {found.files} file{'s'[: found.files > 1]}, {dtypes}\n"
    )
    blocks = Table(
        "blocks", "kind", "tensors", "parameters", "bytes", title="Blocks, each", title_justify="left", box=None
    )
    for group in found.groups:
        kind = ", ".join(f"{key} {value}" for key, value in group.traits.items()) or "all alike"
        count = sum(tensor.count for tensor in group.tensors)
        blocks.add_row(
            str(group.blocks), escape(kind), str(count), format_count(group.parameters), format_bytes(group.nbytes)
        )
    yield blocks
    shown: list[tuple[TensorGroup, ...]] = []
    for group in found.groups:
        if group.tensors not in shown:
            shown.append(group.tensors)
            yield _tensors(f"\nIn block {group.blocks.start}", group.tensors)
    yield _tensors("\nOutside the blocks", found.outside)


def _tensors(title: str, tensors: Iterable[TensorGroup]) -> Table:
    table = Table("tensor", "dtype", "shape", title=title, title_justify="left", box=None)
    for tensor in tensors:
        times = f"  x {tensor.count}" if tensor.count > 1 else ""
        table.add_row(escape(tensor.name), tensor.dtype, " x ".join(map(str, tensor.shape)) + times)
    return table
