"""Draw how far edits reach: how much what each later layer adds changes, a map for each kind of edit and branch."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from ..errors import MeasurementError
from ..plans.families import FAMILIES
from ..registry import AXES, PROPAGATION, column
from .maps import draw_map
from .style import ModelTables, add_title_and_legend, new_figure

_EDITS = ("drop", "skip-attention", "skip-mlp")
_PARTS = {"attention": "attention", "mlp": "MLP"}


def drawn_edits(table: pd.DataFrame) -> list[str]:
    """Return the families of edits in a table of propagation that are drawn: those that remove a part of one layer."""
    return [edit for edit in _EDITS if len(table) and (table.edit == edit).any()]


def propagation(models: Sequence[ModelTables]) -> Figure:
    """Draw the mean change of what later layers add: a map for attention and one for the MLP, a row for each edit.

    Raises:
        MeasurementError: no edit in the tables removes a part of one layer.
    """
    drawn = [(model, edit) for model in models for edit in drawn_edits(model.tables[PROPAGATION])]
    if not drawn:
        raise MeasurementError(f"only propagation after {', '.join(_EDITS)} has a figure, and these results have none")
    sides = AXES[PROPAGATION]
    with new_figure(10.5, 0.4 + 4.6 * len(drawn)) as figure:
        grid = figure.subplots(len(drawn), len(_PARTS), squeeze=False)
        for axes, (model, edit) in zip(grid, drawn, strict=True):
            table = model.tables[PROPAGATION]
            of_model = f"{model.label}, " if len(models) > 1 else ""
            for axis, (part, name) in zip(axes, _PARTS.items(), strict=True):
                rows = table[(table.edit == edit) & (table.part == part)]
                if rows.empty:
                    axis.set_axis_off()
                    continue
                draw_map(figure, axis, rows, column("change_mean"), rows=sides.rows, columns=sides.columns)
                title = f"{of_model}{FAMILIES[edit].label}:\nmean change of later {name}, relative to its size"
                axis.set_title(title, loc="left", fontweight="bold", parse_math=False)
        add_title_and_legend(figure, models, grid[0][0], legend=False)
    return figure
