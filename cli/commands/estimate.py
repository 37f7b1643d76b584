"""Run `--estimate`: print the cost of a sweep, or of a measurement that is one, computed from the config alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from layersurgery.analyses.removable_parts import parts_of
from layersurgery.analyses.task_criterion import given_task
from layersurgery.plans.variants import variants
from layersurgery.runs.estimate import estimate_run
from layersurgery.runs.requests import read_model_info
from layersurgery.runs.sweep import place_tasks, task_request
from layersurgery.tasks.task_costs import TASK
from layersurgery.units import format_bytes, format_count, format_time

from ..terminal.console import Console

if TYPE_CHECKING:
    from layersurgery.runs.options import RunOptions
    from layersurgery.sweeps.estimate import Estimate


def show_removals(
    model: str, kinds: Sequence[str], keep: Callable[[int], Any], by: str | None, task: dict[str, Any],
    options: RunOptions, console: Console, *, may_stop: bool, then: str = "",
) -> None:  # fmt: skip
    """Print what the measurement of each single removal needs.

    Args:
        model: the model's name.
        kinds: what is removed, keys of `KINDS`.
        keep: returns the layers that stay, for a number of blocks.
        by: the criterion; "task:NAME" for a task.
        task: options of a task to measure by.
        options: options of the run.
        console: where to print.
        may_stop: a race may end the measurement of a removal before the end of the text.
        then: what the command measures after it.
    """
    given = given_task(by, options=options, **task)

    def edits(depth: int) -> list[str]:
        kept = keep(depth)
        return [f"{part.edit} {part.layer}" for kind in kinds for part in parts_of(kind, depth, kept)]

    named = {"tasks": None if given is None or by is None else by.removeprefix(TASK), **task}
    why = "a race stops measuring a removal once it is sure about it" if may_stop and given is None else ""
    show_estimate(model, edits, {}, named, options, console, why, then)


def show_estimate(
    model: str, edits: Any, bounds: dict[str, Any], tasks: dict[str, Any], options: RunOptions, console: Console,
    at_most: str = "", then: str = "",
) -> None:  # fmt: skip
    """Print the memory, traffic and arithmetic that a sweep needs.

    Args:
        model: the model's name.
        edits: the edits, or a function that returns them for a number of blocks.
        bounds: what bounds families of edits: `layers` and `max_span`.
        tasks: the arguments of `layersurgery.runs.sweep.task_request`.
        options: options of the run.
        console: where to print.
        at_most: why less may be measured; empty if all is.
        then: what is measured after it, at a cost that depends on the results; empty for nothing.
    """
    if os.environ.get("RANK", "0") != "0":  # with several processes, only one prints
        return
    options, given, beside = place_tasks(task_request(**tasks), options, None)
    info = read_model_info(model, options.revision, console, trust_remote_code=options.trust_remote_code)
    source = info.source
    wanted = edits(info.depth) if callable(edits) else edits
    edited_models = variants(wanted, info.depth, **bounds, heads=info.count_heads, neurons=info.pick_neurons)
    result, placement = estimate_run(model, info, edited_models, options, console, given, beside)
    if at_most:
        result = dataclasses.replace(result, seconds=None)  # no lower bound if fewer edits are measured
    value = dataclasses.asdict(result) | {"model": source.label, "dtype": placement.dtypes, "peak": result.peak}
    if result.tasks is None:
        del value["tasks"]
    else:
        value["tasks"]["peak"] = result.tasks.peak
    if options.precision is not None:
        at_most = f"an edit stops at {options.precision}"
    at_most = f"; at most, since {at_most}" if at_most else ""
    parts = [*_lines(source.label, placement.dtypes, result, at_most)]
    if result.tasks is not None:
        parts += [f"\nThen {beside}:", *_lines(source.label, placement.dtypes, result.tasks, "")[1:]]
    console.result(value, *parts, *([then] if then else []))


def _lines(label: str, dtype: str, cost: Estimate, at_most: str) -> list[str | Table]:
    memory = cost.memory
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, align_right in (("memory", False), ("where", False), ("", True)):
        table.add_column(heading, justify="right" if align_right else "left")
    for device, count in cost.weights.items():
        table.add_row("weights", device, format_bytes(count))
    if cost.taken:
        table.add_row("blocks of other checkpoints", cost.device, format_bytes(cost.taken))
        table.add_row("one of these checkpoints, while it is read", "cpu", format_bytes(cost.source))
    if cost.in_flight_bytes:
        table.add_row("offloaded weights in memory", cost.device, format_bytes(cost.in_flight_bytes))
    table.add_row("residual streams, at the peak", cost.device, format_bytes(memory.streams))
    table.add_row("one block or one readout", cost.device, format_bytes(max(memory.block, memory.readout)))
    table.add_row("text", "cpu", format_bytes(cost.text))
    table.add_row("Python and libraries", "cpu", format_bytes(cost.program))
    for device, count in cost.peak.items():
        table.add_row("[bold]total[/]", f"[bold]{device}[/]", f"[bold]{format_bytes(count)}[/]")
    traffic = ""
    if cost.bytes_loaded_per_batch:
        resident = (
            f", {cost.resident_blocks} block{'s'[: cost.resident_blocks != 1]} in memory at a time"
            if cost.resident_blocks
            else ""
        )
        traffic = f"; weights loaded: {format_bytes(cost.bytes_loaded_per_batch)} per batch ({cost.order}{resident})"
    plural = "es"[: 2 * (cost.batches != 1)]
    edits, noun = cost.readouts - 1, cost.measured.noun
    requests = [f"{cost.measured.sequences:,} requests of {cost.measured.tokens:,} tokens"] if noun == "request" else []
    apart = f" ({cost.block_calls_apart:,} without sharing)" if cost.block_calls_apart > cost.block_calls else ""
    time = (
        ""
        if cost.seconds is None
        else f", at least {format_time(cost.seconds)} at this machine's speed for large products"
    )
    return [
        f"{label}: {format_count(cost.parameters)} parameters in {dtype} on {cost.devices}",
        table,
        *requests,
        f"{cost.batches:,} batch{plural} of {cost.sequences} {noun}{'s'[: cost.sequences != 1]}, "
        f"{cost.block_calls:,} block calls{apart} and {cost.readouts} readouts each{traffic}",
        f"{edits:,} edited model{'s'[: edits != 1]}; arithmetic: {flops(cost.flops)}{time}{at_most}",
    ]


def flops(count: float) -> str:
    """Format a number of floating-point operations."""
    unit = ""
    for unit in ("k", "M", "G", "T", "P", "E"):
        count /= 1000
        if count < 1000 or unit == "E":
            break
    return f"{count:.3g} {unit}FLOP"
