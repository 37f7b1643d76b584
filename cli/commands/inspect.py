"""Run `layersurgery plan` and `layersurgery inspect`, which change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.table import Table

from layersurgery.checkpoints.inspection import Inspection, TensorGroup, inspect, read_for_inspection, size_after
from layersurgery.plans.plan import Plan
from layersurgery.plans.route import Route
from layersurgery.units import format_bytes, format_count

from ..terminal.console import Console


def show_plan(
    text: str, model: str | None, depth: int | None, revision: str | None, blocks: str | None, console: Console
) -> None:
    """Print what a plan does to a model, or to a model of a given depth."""
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
        partial = Plan(plan.edits[:count])
        table.add_row(escape(str(plan.edits[count - 1])), escape(_route_after(partial, depth)))
    lines = [f"\n{len(route)} blocks, from {depth}. {escape(_describe_route(route, depth))}"]
    if checkpoint is not None:
        change = size_after(checkpoint, route)
        value |= dataclasses.asdict(change)
        saving = _describe_saving(change.nbytes - change.nbytes_after)
        lines.append(
            f"{format_count(change.parameters_after)} parameters in {format_bytes(change.nbytes_after)}, from "
            f"{format_count(change.parameters)} in {format_bytes(change.nbytes)}: {saving}"
        )
    console.result(value, table, *lines)


def _route_after(plan: Plan, depth: int) -> str:
    route = Route.identity(depth)
    for edit in plan.edits:
        route = edit.apply(route, depth)
    return str(route) or "(none)"


def _describe_route(route: Route, depth: int) -> str:
    if route.is_identity(depth):
        return "This is the unedited model."
    visited = set(route.blocks)
    removed = sorted(set(range(depth)) - visited)
    repeated = sorted({block for block in visited if route.blocks.count(block) > 1})
    skipped = [str(visit) for visit in route if not visit.whole and visit.skips_only]
    changed = [str(visit) for visit in route if not visit.skips_only]
    sentences = [
        f"Removed: {Route(removed)}." if removed else "",
        f"Repeated: {Route(repeated)}." if repeated else "",
        f"Branch skipped: {' '.join(skipped)}." if skipped else "",
        f"Changed: {' '.join(changed)}." if changed else "",
        "" if removed or repeated or skipped or changed else "No block is removed, repeated, skipped or changed.",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _describe_saving(nbytes: int) -> str:
    if nbytes > 0:
        return f"{format_bytes(nbytes)} saved"
    return f"{format_bytes(-nbytes)} more" if nbytes else "same size"


def show_anatomy(model: str, revision: str | None, blocks: str | None, console: Console) -> None:
    """Print a checkpoint's blocks and tensors."""
    inspection = inspect(model, revision=revision, blocks=blocks)
    value = dataclasses.asdict(inspection)
    for group in value["groups"]:
        group["blocks"] = f"{group['blocks']['start']}:{group['blocks']['stop']}"
    console.result(value, *_anatomy(inspection))


def _anatomy(inspection: Inspection) -> Iterable[str | Table]:
    dtypes = ", ".join(
        f"{dtype} {100 * count / max(inspection.parameters, 1):.3g}%"
        for dtype, count in sorted(inspection.dtypes.items())
    )
    width = f", width {inspection.width}" if inspection.width else ""
    vocabulary = f", {inspection.vocabulary} tokens" if inspection.vocabulary else ""
    yield f"[bold]{escape(inspection.name)}[/]  {escape(inspection.architecture)} ({escape(inspection.model_type)})"
    yield f"{inspection.depth} blocks at {escape(inspection.prefix)}{width}{vocabulary}"
    yield (
        f"{format_count(inspection.parameters)} parameters, {format_bytes(inspection.nbytes)} in "
        f"{inspection.files} file{'s'[: inspection.files > 1]}, {dtypes}\n"
    )
    blocks = Table(
        "blocks",
        "kind",
        "tensors",
        "parameters",
        "bytes",
        title="Blocks (sizes per block)",
        title_justify="left",
        box=None,
    )
    for group in inspection.groups:
        kind = ", ".join(f"{key} {value}" for key, value in group.traits.items()) or "identical"
        count = sum(tensor.count for tensor in group.tensors)
        blocks.add_row(
            str(group.blocks), escape(kind), str(count), format_count(group.parameters), format_bytes(group.nbytes)
        )
    yield blocks
    shown: list[tuple[TensorGroup, ...]] = []
    for group in inspection.groups:
        if group.tensors not in shown:
            shown.append(group.tensors)
            yield _tensor_table(f"\nIn block {group.blocks.start}", group.tensors)
    yield _tensor_table("\nOutside the blocks", inspection.outside)


def _tensor_table(title: str, tensors: Iterable[TensorGroup]) -> Table:
    table = Table("tensor", "dtype", "shape", title=title, title_justify="left", box=None)
    for tensor in tensors:
        times = f"  x {tensor.count}" if tensor.count > 1 else ""
        table.add_row(escape(tensor.name), tensor.dtype, " x ".join(map(str, tensor.shape)) + times)
    return table
