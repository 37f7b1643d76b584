"""Draw a search: the score of every route that was tried, and the best routes, over depth and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..registry import Column, column, search_score
from ..units import format_count
from .style import COLORS, ModelTables, add_title_and_legend, label_axis, new_figure

_LOG_SCALE_RATIO = 20
_MOST_LABELS = 9


def search(models: Sequence[ModelTables]) -> Figure:
    """Draw the scores of a search's routes over the number of their blocks: a row for each model.

    Points are candidates, dark ones those of the beams, on the text that each was measured on. The lines are of routes
    that were measured on all text. If blocks differ in size, a second panel shows the scores over the parameters.
    """
    fulls = [model.tables["search"] for model in models]
    panels = 1 + any((full.groupby("block_calls").parameters.nunique() > 1).any() for full in fulls)
    with new_figure(6 * panels, 3.6 * len(models) + 0.5) as figure:
        grid = figure.subplots(len(models), panels, squeeze=False, sharey="row")
        for axes, model, full in zip(grid, models, fulls, strict=True):
            score = column(search_score(str(full.by.iloc[0])))
            for axis, cost in zip(axes, ("block_calls", "parameters"), strict=False):
                _draw(axis, full, model.tables.get("tried"), score, cost)
            _label_blocks(axes[0], full, with_parameters=panels == 1)
            if panels > 1:
                axes[1].set_xlabel("parameters of the checkpoint")
                axes[1].xaxis.set_major_formatter(lambda value, _: format_count(value))
            label_axis(axes[0], score)
            if len(models) > 1:
                axes[0].set_title(model.label, loc="left", fontweight="bold", parse_math=False)
        handles = {
            text: handle for axis in grid[:, 0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        add_title_and_legend(figure, models, grid[0][0], legend=False)
    return figure


def _draw(axis: Axes, full: pd.DataFrame, tried: pd.DataFrame | None, score: Column, cost: str) -> None:
    """Draw one panel: points of all candidates, and lines of the routes that were measured on all text."""
    shown = [full[score.name].to_numpy(float)[1:]]
    if tried is not None:
        measured = tried.dropna(subset=["score"])
        points: tuple[tuple[pd.DataFrame, str, dict[str, Any]], ...] = (
            (measured[~measured.kept], "candidate", {"alpha": 0.35, "color": "#888888", "markersize": 2.5}),
            (measured[measured.kept], "in the beam", {"alpha": 0.8, "color": "#444444", "markersize": 3.5}),
        )
        for rows, text, style in points:
            axis.plot(rows[cost].to_numpy(float), rows.score.to_numpy(float), "o", label=text, mew=0, **style)
        shown.append(measured.score.to_numpy(float))
    # The first models of a length that are finite; those on the front have filled markers.
    best = (
        full.sort_values([score.name, *(["kl_nats"] if score.name == "cost" else [])])
        .groupby("level")
        .head(1)
        .sort_values(cost)
    )
    single = full[full.one_shot | (full.level == 0)].sort_values(cost)
    lines: tuple[tuple[pd.DataFrame, str, dict[str, Any]], ...] = (
        (single, "one block at a time", {"color": COLORS[4], "marker": "s", "linestyle": "--"}),
        (best, "lowest of its depth", {"color": COLORS[0], "marker": "o", "markerfacecolor": "white"}),
        (full[full[f"front_{cost}"]], "Pareto front", {"color": COLORS[0], "marker": "o", "linestyle": "none"}),
    )
    for rows, text, style in lines:
        axis.plot(rows[cost].to_numpy(float), rows[score.name].to_numpy(float), label=text, **style)
    winner = full[full.winner].iloc[0]
    ends = [[winner[score.name] - winner[f"{score.name}_low"]], [winner[f"{score.name}_high"] - winner[score.name]]]
    axis.errorbar(
        float(winner[cost]), winner[score.name], yerr=np.nan_to_num(ends), label="chosen", color=COLORS[1], marker="*",
        markersize=11, capsize=3, linestyle="none", zorder=5,
    )  # fmt: skip
    values = np.concatenate(shown)
    values = values[np.isfinite(values)]
    if score.log and values.size and values.max() > _LOG_SCALE_RATIO * values.min() > 0:
        axis.set_yscale("symlog", linthresh=float(values.min()), linscale=0.3)  # the unedited model is at zero


def _label_blocks(axis: Axes, full: pd.DataFrame, *, with_parameters: bool) -> None:
    """Label the horizontal axis with numbers of blocks, and below each the parameters."""
    parameters = dict(sorted(zip(full.block_calls, full.parameters, strict=True)))
    step = -(-len(parameters) // _MOST_LABELS)
    ticks = list(parameters)[::-1][::step]
    axis.set_xticks(
        ticks, [f"{blocks}\n{format_count(parameters[blocks])}" if with_parameters else f"{blocks}" for blocks in ticks]
    )
    axis.set_xlabel(f"blocks of the edited model{' (below: parameters)' if with_parameters else ''}")
