"""Draw maps of how similar the residual stream is between all pairs of depths."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from matplotlib.figure import Figure

from ..registry import ANALYSES
from .maps import draw_map
from .style import ModelTables, add_title_and_legend, new_figure

_STATE = "stream before this block"
_MAX_PANELS = 3  # in a row
_TITLE_WIDTH = 50  # characters


def cka(models: Sequence[ModelTables]) -> Figure:
    """Draw the CKA of the streams, with and without first tokens: two maps for each model."""
    return _draw_maps(models, "cka")


def cosine(models: Sequence[ModelTables]) -> Figure:
    """Draw the mean cosine of the streams, a map for each model."""
    return _draw_maps(models, "cosine")


def _draw_maps(models: Sequence[ModelTables], name: str) -> Figure:
    columns = ANALYSES[name].columns
    panels = [(model, shown) for model in models for shown in columns]
    wide = len(columns) if len(columns) > 1 else min(_MAX_PANELS, len(panels))
    rows = -(-len(panels) // wide)
    with new_figure(5.6 * wide, 5.4 * rows) as figure:
        grid = figure.subplots(rows, wide, squeeze=False).reshape(-1)
        for axis in grid[len(panels) :]:
            axis.set_visible(False)
        for axis, (model, shown) in zip(grid, panels, strict=False):
            frame = model.tables[name]
            end = f"{_STATE} ({frame['to'].max()}: after all blocks)"
            draw_map(figure, axis, frame, shown, rows=_STATE, columns=end, symmetric=True)
            if len(models) > 1:
                title = fill(f"{model.label}: {shown.label}", _TITLE_WIDTH)
                axis.set_title(title, loc="left", fontsize=9, parse_math=False)
        add_title_and_legend(figure, models, grid[0], legend=False)
    return figure
