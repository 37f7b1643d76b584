"""Draw the figures of finished runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from layersurgery.figures.style import ModelTables

_TABLES = (
    *(
        "stages",
        "lens",
        "attention",
        "norms",
        "neurons",
        "similarity",
        "rank",
        "spans",
        "costs",
        "subjoiners",
        "examples",
    ),
    *("probe", "single_neurons", "top_k", "effects"),
)


def model_tables(directory: Path, facts: Mapping[str, Any]) -> ModelTables:
    """Read a directory's tables, with a label and a caption, for drawing."""
    from layersurgery.figures.style import ModelTables
    from layersurgery.runs.tables import read_table

    tables = {name: read_table(directory, name) for name in _TABLES if f"{name}.parquet" in facts["files"]}
    label = str(facts["arguments"]["model"]["name"]).rpartition("/")[2]
    caption = str(facts.get("caption", "from weights alone"))
    if "text" in facts:
        sequences = facts["text"]["sequences"]
        source = facts["arguments"]["text"]["data"]
        caption = f"{facts['text']['tokens']:,} tokens of {source} in {sequences} sequence{'s'[: sequences != 1]}"
    return ModelTables(tables, label, caption)


def draw_analysis(directory: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Draw one directory's tables; write the figures to the same directory."""
    from layersurgery.figures.analyses import draw_signals

    return draw_signals([model_tables(directory, facts)], directory)


def draw_together(directories: Sequence[tuple[Path, Mapping[str, Any]]], output: Path) -> list[Path]:
    """Draw several directories' tables together, each under its own label."""
    from layersurgery.figures.analyses import draw_signals

    models = [model_tables(path, run) for path, run in directories]
    labels = [model.label for model in models]
    for number, (path, _) in enumerate(directories):
        if labels.count(labels[number]) > 1:
            models[number] = dataclasses.replace(models[number], label=f"{labels[number]} ({path.name})")
    return draw_signals(models, output)


def draw_sweep(frame: pd.DataFrame, directory: Path, data: str) -> list[Path]:
    """Draw one sweep's results; write the figures to its directory."""
    from layersurgery.figures.sweeps import Sweep, draw

    return draw([Sweep.of(frame, data)], directory)
