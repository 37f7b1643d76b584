"""`layersurgery sweep --estimate`: what it would take, from the config alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rich.table import Table

from layersurgery.plans.variants import variants

from ..session.inputs import edits_of, layers_of, read_model_info, text_request
from ..session.placement import choose_placement
from ..terminal.console import Console, format_bytes, format_count

if TYPE_CHECKING:
    from layersurgery.sweeps.estimate import Estimate

    from ..session.run_options import MeasureOptions


def show_estimate(model: str, options: MeasureOptions, console: Console) -> None:
    """Say what a sweep would take."""
    from transformers import AutoConfig

    asked_edits = edits_of(options)
    source, depth, positions, _ = read_model_info(model, options, console)
    chosen = variants(asked_edits, depth, layers_of(options.layers, depth))
    asked = text_request(model, options, positions)
    place = choose_placement(options, source, console)
    # What a run brings into this process is counted with it.
    from layersurgery.figures import sweeps  # noqa: F401
    from layersurgery.runs import runner  # noqa: F401
    from layersurgery.sweeps.estimate import estimate

    found = estimate(
        AutoConfig.from_pretrained(source.directory),
        chosen,
        tokens=asked.tokens,
        context=asked.context,
        dtype="float32" if place.dtype == "auto" else place.dtype,
        device=place.device,
        device_map=place.device_map,
        max_memory=place.max_memory,
        batch_size=options.batch_size,
        order=options.schedule,
        blocks=options.blocks,
    )
    value = dataclasses.asdict(found) | {"model": source.label, "dtype": place.dtype, "peak": found.peak}
    console.result(value, *_lines(source.label, place.dtype, found))


def _lines(label: str, dtype: str, found: Estimate) -> list[str | Table]:
    forecast = found.memory
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in (("memory", False), ("where", False), ("", True)):
        table.add_column(name, justify="right" if right else "left")
    for place, count in found.weights.items():
        table.add_row("weights", place, format_bytes(count))
    if found.in_flight_bytes:
        table.add_row("offloaded weights at hand", found.device, format_bytes(found.in_flight_bytes))
    table.add_row("streams, at the widest point", found.device, format_bytes(forecast.streams))
    table.add_row("a block, or a readout", found.device, format_bytes(max(forecast.block, forecast.readout)))
    table.add_row("text", "cpu", format_bytes(found.text))
    table.add_row("Python and libraries", "cpu", format_bytes(found.program))
    for place, count in found.peak.items():
        table.add_row("[bold]in all[/]", f"[bold]{place}[/]", f"[bold]{format_bytes(count)}[/]")
    traffic = ""
    if found.bytes_loaded_per_batch:
        home = (
            f", {found.resident_blocks} block{'s'[: found.resident_blocks != 1]} at hand at a time"
            if found.resident_blocks
            else ""
        )
        traffic = f"; weights brought in: {format_bytes(found.bytes_loaded_per_batch)} a batch ({found.order}{home})"
    plural = "es"[: 2 * (found.batches != 1)]
    return [
        f"{label}: {format_count(found.parameters)} parameters in {dtype} on {found.devices}",
        table,
        f"{found.batches:,} batch{plural} of {found.sequences} sequence{'s'[: found.sequences != 1]}, {found.block_calls:,} block calls and "
        f"{found.readouts} readouts each{traffic}",
        f"Multiplications: {flops(found.flops)}",
    ]


def flops(count: float) -> str:
    """Multiplications and additions for people."""
    unit = ""
    for unit in ("k", "M", "G", "T", "P", "E"):
        count /= 1000
        if count < 1000 or unit == "E":
            break
    return f"{count:.3g} {unit}FLOP"
