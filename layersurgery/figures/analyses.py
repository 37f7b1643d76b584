"""Draw the figures of the analyses, and write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..registry import figures as registered_figures
from ..registry import resolve
from .style import ModelTables, save


def draw_signals(models: Sequence[ModelTables], directory: Path) -> list[Path]:
    """Draw all figures that the tables allow, as PNG and SVG, and return the files."""
    return save(signal_figures(models), directory)


def signal_figures(models: Sequence[ModelTables]) -> dict[str, Figure]:
    """Draw all figures that the tables allow, and return them by the names of their tables."""
    figures: dict[str, Figure] = {}
    for name, function in registered_figures().items():
        with_table = [model for model in models if name in model.tables and len(model.tables[name])]
        if with_table:
            figures[name] = resolve(function)(with_table)
    return figures
