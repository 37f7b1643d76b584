"""`layersurgery sweep --estimate`: what it would take, from the config alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rich.table import Table

from layersurgery.plans.variants import variants

from ..session.inputs import asked_text, edits_of, layers_of, looked_at
from ..session.placement import place_of
from ..terminal.console import Talk, number, size

if TYPE_CHECKING:
    from layersurgery.sweeps.estimate import Estimate

    from ..session.run_options import Options


def show_estimate(model: str, options: Options, talk: Talk) -> None:
    """Say what a sweep would take."""
    from transformers import AutoConfig

    asked_edits = edits_of(options)
    source, depth, positions, _ = looked_at(model, options, talk)
    chosen = variants(asked_edits, depth, layers_of(options.layers, depth))
    asked = asked_text(model, options, positions)
    place = place_of(options, source, talk)
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
    talk.result(value, *_lines(source.label, place.dtype, found))


def _lines(label: str, dtype: str, found: Estimate) -> list[str | Table]:
    forecast = found.forecast
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in (("memory", False), ("where", False), ("", True)):
        table.add_column(name, justify="right" if right else "left")
    for place, count in found.weights.items():
        table.add_row("weights", place, size(count))
    if found.passing:
        table.add_row("offloaded weights at hand", found.device, size(found.passing))
    table.add_row("streams, at the widest point", found.device, size(forecast.streams))
    table.add_row("a block, or a readout", found.device, size(max(forecast.block, forecast.readout)))
    table.add_row("text", "cpu", size(found.text))
    table.add_row("Python and libraries", "cpu", size(found.program))
    for place, count in found.peak.items():
        table.add_row("[bold]in all[/]", f"[bold]{place}[/]", f"[bold]{size(count)}[/]")
    traffic = ""
    if found.read_a_batch:
        home = f", {found.at_home} block{'s'[: found.at_home != 1]} at hand at a time" if found.at_home else ""
        traffic = f"; weights brought in: {size(found.read_a_batch)} a batch ({found.order}{home})"
    plural = "es"[: 2 * (found.batches != 1)]
    return [
        f"{label}: {number(found.parameters)} parameters in {dtype} on {found.devices}",
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
