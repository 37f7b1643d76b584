"""Draw the ranking of layers, and the cost of removing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from .style import COLORS, MARKERS, ModelTables, add_title_and_legend, line, new_figure

_SCORES = (
    ("kl_nats", "KL when dropped (nats)"),
    ("block_influence", "block influence (1 - cosine)"),
    ("angular_distance", "angular distance (fraction of 180°)"),
)
_LOG_SCALE_RATIO = 4
_CRITERIA = {
    "kl": "lowest KL, one layer at a time",
    "influence": "lowest block influence",
    "angular": "span with lowest angular distance",
    "greedy": "greedy, remeasured each time",
}


def rank(models: Sequence[ModelTables]) -> Figure:
    """Draw the cost of dropping each block, and the two scores that estimate it.

    For a single model, also draw the angular distance of every span.
    """
    is_single = len(models) == 1 and "spans" in models[0].tables
    panels = len(_SCORES) + is_single
    with new_figure(3.7 * panels, 3.3 + 0.2 * (len(models) > 1)) as figure:
        grid = figure.subplots(1, panels, squeeze=False)[0]
        for axis, (column, label) in zip(grid, _SCORES, strict=False):
            for index, model in enumerate(models):
                table = model.tables["rank"]
                values = table[column].to_numpy(float)
                line(
                    axis,
                    table.relative_depth,
                    np.where(values > 0, values, np.nan),
                    table[f"{column}_sem"],
                    index,
                    model.label,
                )
                if values.size and np.nanmax(values, initial=0) > 0:
                    axis.set_yscale("log")
            axis.set_ylabel(label)
            axis.set_xlabel("relative depth of the block")
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
        add_title_and_legend(figure, models, grid[0])
    return figure


def costs(models: Sequence[ModelTables]) -> Figure:
    """Draw the cost of removing layers over their number: a line for each criterion, a row for each model."""
    panels = (
        ("kl_nats", "KL from the unedited model (nats)", 1),
        ("perplexity", "perplexity", 1),
        ("agreement", "predictions kept (%)", 100),
    )
    with new_figure(11, 3.4 * len(models)) as figure:
        grid = figure.subplots(len(models), len(panels), squeeze=False)
        for axes, model in zip(grid, models, strict=True):
            table = model.tables["costs"]
            base = table[table.criterion == "unedited"].iloc[0]
            for axis, (column, label, factor) in zip(axes, panels, strict=True):
                for index, (criterion, line_label) in enumerate(_CRITERIA.items()):
                    rows = table[table.criterion == criterion].sort_values("removed")
                    if len(rows):
                        axis.plot(
                            [0, *rows.removed.astype(int)],
                            [factor * base[column], *(factor * rows[column])],
                            label=line_label,
                            color=COLORS[index],
                            marker=MARKERS[index],
                            linestyle="--" if criterion == "greedy" else "-",
                        )
                axis.set_xlabel("layers removed")
                axis.xaxis.get_major_locator().set_params(integer=True)
                axis.set_ylabel(label)
            if table.perplexity.max() > _LOG_SCALE_RATIO * base.perplexity:
                axes[1].set_yscale("log")
            axes[2].set_ylim(0, 102)
            if len(models) > 1:
                axes[0].set_title(model.label, loc="left", fontweight="bold", parse_math=False)
        handles = {
            text: handle for axis in grid[:, 0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        add_title_and_legend(figure, models[:1] if len(models) == 1 else models, grid[0][0], legend=False)
    return figure


MAKERS: dict[str, Callable[[Sequence[ModelTables]], Figure]] = {"rank": rank, "costs": costs}
