"""Run `layersurgery compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from layersurgery.atomic_io import atomic_file
from layersurgery.registry import METRICS, TAILS

from ..terminal.console import Console

if TYPE_CHECKING:
    from layersurgery.runs.options import RunOptions


def run_compare(model: str, other: str, options: RunOptions, output: Path | None, console: Console) -> None:
    """Compare two models, or a model with an edit of itself, and print all metrics."""
    from layersurgery import compare
    from layersurgery.errors import PlanError

    if output is not None and output.suffix not in (".parquet", ".csv"):
        raise PlanError(f"--per-token {output}: give a file that ends in .parquet or .csv")
    with console.status(f"Comparing {model} with {other}"):
        result = compare(model, other, per_token=output is not None, **options.given())
    value: dict[str, Any] = {"model": model, "other": other, **result.to_pandas().to_dict()}
    table = Table(box=None, pad_edge=False, show_header=False)
    for entry in (*METRICS, *TAILS):
        if entry.name in result.metrics:
            table.add_row(entry.label, f"{entry.factor * getattr(result, entry.name):.4g} {entry.unit}".strip())
    lines: list[Any] = [table, f"{result.tokens:,} tokens"]
    if result.non_finite:
        value["non_finite"] = dict(result.non_finite)
        text = result.describe_non_finite()
        lines.append(f"[bold red]{text[0].upper()}{text[1:]}[/]")
    if output is not None and result.positions is not None:
        with atomic_file(output) as partial:
            if output.suffix == ".csv":
                result.positions.to_csv(partial, index=False)
            else:
                result.positions.to_parquet(partial, index=False)
        value["per_token"] = str(output)
        lines.append(f"Wrote {output}")
    console.result(value, *lines)
