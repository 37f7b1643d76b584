"""Draw the ranking of layers or branches, and the cost of removing them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..registry import ANALYSES, CRITERIA, Column, column
from .style import COLORS, MARKERS, ModelTables, add_title_and_legend, label_axis, label_depth, line, new_figure

_SCORES = ("cost", "kl_nats", "block_influence", "angular_distance")
_COSTS = ("kl_nats", "perplexity", "agreement")
_ON_TASK = ("cost", "kl_nats", "agreement")  # a perplexity of right and wrong answers says nothing
_LOG_SCALE_RATIO = 4


def rank(models: Sequence[ModelTables]) -> Figure:
    """Draw the cost of removing each block or branch, on a task too if ranked by one, and two scores that estimate it.

    Of blocks of a single model, also draw the angular distance of every span.
    """
    is_single = len(models) == 1 and "spans" in models[0].tables
    scores = [score for score in _SCORES if all(score in model.tables["rank"] for model in models)]
    panels = len(scores) + is_single
    with new_figure(3.7 * panels, 3.5 + 0.2 * (len(models) > 1)) as figure:
        grid = figure.subplots(1, panels, squeeze=False)[0]
        for axis, score in zip(grid, map(column, scores), strict=False):
            for index, model in enumerate(models):
                _draw_ranks(axis, model, score, index, len(models))
            label_axis(axis, score)
            removed = "block of the branch removed" if _has_branches(models) else "block removed"
            label_depth(axis, [model.tables["rank"] for model in models], removed, 7)
            axis.set_xlim(-0.02, 1.02)
        if is_single:
            spans = models[0].tables["spans"]
            matrix = spans.pivot_table(index="span", columns="layer", values="angular_distance", dropna=False).astype(
                float
            )
            axis = grid[-1]
            axis.grid(visible=False)
            extent = (-0.5, len(matrix.columns) - 0.5, 0.5, len(matrix) + 0.5)
            image = axis.imshow(
                matrix, cmap="cividis", origin="lower", aspect="auto", extent=extent, interpolation="nearest"
            )
            lowest = matrix.idxmin(axis=1)
            axis.plot(lowest.to_numpy(float), lowest.index, "o", color=COLORS[1], markersize=3)
            axis.set_xlabel("first block of the span")
            axis.set_ylabel("blocks in the span")
            axis.yaxis.get_major_locator().set_params(integer=True)
            figure.colorbar(image, label="angular distance (dots: lowest)")
        lines = grid[0].get_legend_handles_labels()[0] if _has_branches(models) and len(models) == 1 else []
        add_title_and_legend(figure, models, grid[0], others=lines)
    return figure


def _has_branches(models: Sequence[ModelTables]) -> bool:
    return any("part" in model.tables["rank"] for model in models)


def _draw_ranks(axis: Axes, model: ModelTables, score: Column, index: int, models: int) -> None:
    """Draw one score of one model: a line for its blocks, or one for its attentions and a dashed one for its MLPs."""
    table = model.tables["rank"]
    for part, rows in table.groupby("part", sort=False) if "part" in table else [("", table)]:
        values = rows[score.name].to_numpy(float)
        # A logarithmic axis cannot show zero.
        shown = np.where(values > 0, values, np.nan) if score.log else values
        name = {"mlp": "MLP"}.get(str(part), str(part))
        label = ", ".join(filter(None, (model.label if models > 1 else "", name))) or model.label
        style = {"linestyle": "--", "marker": MARKERS[1]} if part == "mlp" else {"marker": MARKERS[0]} if part else {}
        # The branches of a single model have colors; those of several models share that of their model.
        color = int(part == "mlp") if models == 1 else index
        line(axis, rows.relative_depth, shown, rows[f"{score.name}_sem"], color, label, **style)
        if score.log and values.size and np.nanmax(values, initial=0) > 0:
            axis.set_yscale("log")


def costs(models: Sequence[ModelTables]) -> Figure:
    """Draw the cost of removing layers over their number: a line for each criterion, a row for each model."""
    shown = _ON_TASK if all("cost" in model.tables["costs"] for model in models) else _COSTS
    panels = [panel for panel in ANALYSES["costs"].columns if panel.name in shown]
    with new_figure(3.7 * len(panels), 3.4 * len(models)) as figure:
        grid = figure.subplots(len(models), len(panels), squeeze=False)
        for axes, model in zip(grid, models, strict=True):
            table = model.tables["costs"]
            base = table[table.criterion == "unedited"].iloc[0]
            for axis, panel in zip(axes, panels, strict=True):
                for index, (criterion, line_label) in enumerate(CRITERIA.items()):
                    rows = table[table.criterion == criterion].sort_values("removed")
                    if len(rows):
                        axis.plot(
                            [0, *rows.removed.astype(int)],
                            [panel.factor * base[panel.name], *(panel.factor * rows[panel.name])],
                            label=line_label,
                            color=COLORS[index],
                            marker=MARKERS[index],
                            linestyle="--" if criterion == "greedy" else "-",
                        )
                axis.set_xlabel("branches removed" if "of" in table and base.of == "branches" else "layers removed")
                axis.xaxis.get_major_locator().set_params(integer=True)
                label_axis(axis, panel)
                if panel.log and table[panel.name].max() > _LOG_SCALE_RATIO * base[panel.name] > 0:
                    axis.set_yscale("log")
            if len(models) > 1:
                axes[0].set_title(model.label, loc="left", fontweight="bold", parse_math=False)
        handles = {
            text: handle for axis in grid[:, 0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        add_title_and_legend(figure, models[:1] if len(models) == 1 else models, grid[0][0], legend=False)
    return figure
