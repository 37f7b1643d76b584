"""Draw maps of single attention heads: a row for each block, a column for each head."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..registry import AXES, METRICS
from .maps import draw_map
from .style import ModelTables, add_title_and_legend, new_figure

_PANELS = tuple(metric for metric in METRICS if metric.name in ("kl_nats", "loss_change_nats", "entropy_change_bits"))


def heads(models: Sequence[ModelTables]) -> Figure:
    """Draw KL, change in loss and change in entropy with each head off: a row of maps for each model."""
    sides = AXES["heads"]
    with new_figure(4.4 * len(_PANELS), 5.6 * len(models)) as figure:
        grid = figure.subplots(len(models), len(_PANELS), squeeze=False)
        for row, model in zip(grid, models, strict=True):
            for axis, shown in zip(row, _PANELS, strict=True):
                draw_map(figure, axis, model.tables["heads"], shown, rows=sides.rows, columns=sides.columns)
                axis.set_aspect("auto")
            if len(models) > 1:
                row[0].set_title(f"{model.label}: {_PANELS[0].axis}", loc="left", fontsize=9, parse_math=False)
        add_title_and_legend(figure, models, grid[0, 0], legend=False)
    return figure
