"""Draw a search: the score of every route that was tried, and the best routes, over the depth and the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..registry import SEARCH_SCORES, Column, column
from .style import COLORS, ModelTables, add_title_and_legend, label_axis, new_figure

_UNITS = ((1e9, "billions of parameters"), (1e6, "millions of parameters"), (1e3, "thousands of parameters"))
_PER_DECADE = 20  # a logarithmic axis is used if the scores span more


def search(models: Sequence[ModelTables]) -> Figure:
    """Draw the scores of a search's routes over their block calls and their parameters: a row for each model.

    Points are candidates, dark ones those of the beams, on the text that each was measured on. The lines are of the
    routes that were measured on all text.
    """
    with new_figure(9.5, 3.6 * len(models) + 0.4) as figure:
        grid = figure.subplots(len(models), 2, squeeze=False, sharey="row")
        for axes, model in zip(grid, models, strict=True):
            full = model.tables["search"]
            score = column(SEARCH_SCORES[str(full.by.iloc[0])])
            unit, label = next((pair for pair in _UNITS if full.parameters.max() >= pair[0]), (1.0, "parameters"))
            for axis, cost, scale, name in (
                (axes[0], "block_calls", 1.0, "blocks in the route"),
                (axes[1], "parameters", unit, f"{label} in the checkpoint"),
            ):
                _draw(axis, full, model.tables.get("tried"), score, cost, scale)
                axis.set_xlabel(name)
            axes[0].xaxis.get_major_locator().set_params(integer=True)
            label_axis(axes[0], score)
            if len(models) > 1:
                axes[0].set_title(model.label, loc="left", fontweight="bold", parse_math=False)
        handles = {
            text: handle for axis in grid[:, 0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        add_title_and_legend(figure, models, grid[0][0], legend=False)
    return figure


def _draw(axis: Axes, full: pd.DataFrame, tried: pd.DataFrame | None, score: Column, cost: str, scale: float) -> None:
    """Draw one panel."""
    values = [full[score.name].to_numpy(float)[1:]]
    if tried is not None:
        measured = tried.dropna(subset=["score"])
        points: tuple[tuple[pd.DataFrame, str, dict[str, Any]], ...] = (
            (measured[~measured.kept], "candidate", {"alpha": 0.35, "color": "#888888", "markersize": 2.5}),
            (measured[measured.kept], "in the beam", {"alpha": 0.8, "color": "#444444", "markersize": 3.5}),
        )
        for rows, text, style in points:
            axis.plot(rows[cost].to_numpy(float) / scale, rows.score.to_numpy(float), "o", label=text, mew=0, **style)
        values.append(measured.score.to_numpy(float))
    lines = (
        (full[full.one_shot | (full.level == 0)], "one block at a time", COLORS[4], "s", "--"),
        (full[full[f"front_{cost}"]], "Pareto front", COLORS[0], "o", "-"),
    )
    for rows, text, color, marker, dashes in lines:
        ordered = rows.sort_values(cost)
        x, y = ordered[cost].to_numpy(float) / scale, ordered[score.name].to_numpy(float)
        axis.plot(x, y, label=text, color=color, marker=marker, linestyle=dashes)
    winner = full[full.winner].iloc[0]
    ends = [[winner[score.name] - winner[f"{score.name}_low"]], [winner[f"{score.name}_high"] - winner[score.name]]]
    axis.errorbar(
        float(winner[cost]) / scale, winner[score.name], yerr=np.nan_to_num(ends), label="chosen", color=COLORS[1],
        marker="*", markersize=11, capsize=3, linestyle="none", zorder=5,
    )  # fmt: skip
    shown = np.concatenate(values)
    shown = shown[np.isfinite(shown)]
    if score.log and shown.size and shown.min() > 0 and shown.max() > _PER_DECADE * shown.min():
        axis.set_yscale("symlog", linthresh=float(shown.min()), linscale=0.3)
