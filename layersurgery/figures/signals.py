"""Draw analyses as the paper does: over relative depth, several models together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..registry import ANALYSES, STAGES, Column, column
from .layer_kinds import kind_handles, mark_kinds, rare_kinds
from .style import (
    COLORS,
    MARKERS,
    ModelTables,
    add_title,
    add_title_and_legend,
    disable_mathtext,
    label_axis,
    label_depth,
    line,
    new_figure,
)

_UNCERTAIN = "#EFEFEF"
_RESAMPLES = "95 % of resamples of a boundary"
_SHADES = ("#DCE9F5", "#E3F1E6", "#FBF3D9", "#F8E3DC")
_MIN_LOG_RATIO = 3
_FIGURE_1 = ("drop_kl_nats", "attention_prev5", "prediction_percent", "suppression_percent")
_SIGNAL_PANELS = (
    "drop_kl_nats", "attention_prev5", "attention_to_mlp_ratio", "lens_kl_nats", "lens_entropy_bits", "mlp_norm",
)  # fmt: skip


_MAX_PANELS = 4  # in a row
_MOST_BLOCKS = 8  # that have a label in a panel of one of several models


def lens(models: Sequence[ModelTables]) -> Figure:
    """Draw the logit lens after each block: KL to the final prediction, entropy, agreement (figures 6 and 8)."""
    return draw_columns(models, "lens")


def attention(models: Sequence[ModelTables]) -> Figure:
    """Draw attention to the five previous tokens (figure 4): as a share of all, and the paper's mean."""
    return draw_columns(models, "attention")


def norms(models: Sequence[ModelTables]) -> Figure:
    """Draw the norms of attention and MLP contributions (figures 5 and 7)."""
    return draw_columns(models, "norms")


def stream(models: Sequence[ModelTables]) -> Figure:
    """Draw the size of the stream, and what attention and MLP add to it in comparison."""
    return draw_columns(models, "stream")


def neurons(models: Sequence[ModelTables]) -> Figure:
    """Draw prediction and suppression neurons (figure 6), a panel for each model.

    The KL of the logit lens is drawn as well if it was measured.
    """
    with new_figure(4.6 * min(3, len(models)), 3.4 * -(-len(models) // 3)) as figure:
        grid = np.ravel(figure.subplots(-(-len(models) // 3), min(3, len(models)), squeeze=False))
        for axis, model in zip(grid, models, strict=False):
            table = model.tables["neurons"]
            for index, share in ((2, column("prediction_percent")), (1, column("suppression_percent"))):
                values = table[share.name].to_numpy(float)
                line(axis, table.relative_depth, values, 0 * values, index, share.label)
            axis.set_ylabel("neurons in block (%)")
            if "lens" in model.tables:
                right = axis.twinx()
                right.grid(visible=False)
                right.spines["right"].set_visible(True)
                rows, kl = model.tables["lens"], column("lens_kl_nats")
                line(right, rows.relative_depth, rows[kl.name], rows[f"{kl.name}_sem"], 0, kl.label, linestyle="--")
                label_axis(right, kl)
                right.set_ylim(bottom=0)
                axis.plot([], [], color=COLORS[0], marker=MARKERS[0], linestyle="--", label=kl.label)
            axis.set_ylim(bottom=0)
            label_depth(axis, [table], "block")
            axis.set_title(model.label, loc="left", fontweight="bold", parse_math=False)
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.27), ncols=2)
        _hide(grid[len(models) :])
    return figure


def similarity(models: Sequence[ModelTables]) -> Figure:
    """Draw cosines of contributions of swapped blocks (figures 11 and 12), a row of panels for each part."""
    parts = ("attention", "mlp", "block")
    rare = rare_kinds([model.tables["similarity"] for model in models])
    with new_figure(11, 7.6) as figure:
        grid = figure.subplots(3, 3, sharex=True, sharey=True)
        for axes, part in zip(grid, parts, strict=True):
            for axis, cosine in zip(axes, ANALYSES["similarity"].columns, strict=True):
                for index, model in enumerate(models):
                    rows = model.tables["similarity"]
                    rows = rows[rows.part == part]
                    line(axis, rows.relative_depth, rows[cosine.name], rows[f"{cosine.name}_sem"], index, model.label)
                    mark_kinds(axis, rows, rows[cosine.name], COLORS[index % len(COLORS)], rare)
                axis.axhline(0, color="#888888", linewidth=0.8, zorder=0)
                if part == parts[0]:
                    axis.set_title(cosine.label, loc="left", fontsize=8)
                if part == parts[-1]:
                    label_depth(axis, [model.tables["similarity"] for model in models], "first block")
            axes[0].set_ylabel(f"cosine, {'MLP' if part == 'mlp' else part}")
        add_title_and_legend(figure, models, grid[0][0], others=kind_handles(rare))
    return figure


def stages(models: Sequence[ModelTables]) -> Figure:
    """Draw the signals of figure 1, each as a share of its maximum, over shaded stages: a panel for each model.

    For a single model, each signal also has a panel of its own.
    """
    is_single = len(models) == 1
    columns = min(3, len(models))
    rows = -(-len(models) // columns)
    with new_figure(11 if is_single else 4.6 * columns, 8.6 if is_single else 4.2 * rows) as figure:
        if is_single:
            grid = figure.subplot_mosaic([["top"] * 3, list("abc"), list("def")], height_ratios=[1.5, 1, 1])
            panels = [grid["top"]]
            for key, name in zip("abcdef", _SIGNAL_PANELS, strict=True):
                _draw_signal(grid[key], models[0].tables["stages"], column(name))
        else:
            panels = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
        for axis, model in zip(panels, models, strict=False):
            _draw_figure_1(axis, model, 20 if is_single else _MOST_BLOCKS)
            if not is_single:
                axis.set_title(model.label, loc="left", fontweight="bold", parse_math=False, pad=10)
        _hide(panels[len(models) :])
        if is_single:
            add_title(figure, f"{models[0].label}: {models[0].caption}")
    return figure


def _draw_figure_1(axis: Axes, model: ModelTables, most: int) -> None:
    table = model.tables["stages"]
    is_wide = most > _MOST_BLOCKS
    named = _shade(axis, table, bars=True, names=is_wide)
    rare = rare_kinds([table])
    # Both kinds of neurons share one scale, so that the figure shows which outnumber the other.
    neurons = [table[name].to_numpy(float) for name in _FIGURE_1[2:]]
    for index, shown in enumerate(map(column, _FIGURE_1)):
        values = table[shown.name].to_numpy(float)
        compared = np.concatenate(neurons) if index > 1 else values
        maximum = np.nanmax(compared) if np.isfinite(compared).any() else 0
        if maximum > 0:
            error = table[f"{shown.name}_sem"].to_numpy(float) if f"{shown.name}_sem" in table else 0 * values
            label = f"{shown.label} (1 = {maximum:.3g}{f' {shown.unit}' if shown.unit else ''})"
            line(axis, table.relative_depth, values / maximum, error / maximum, (0, 3, 2, 1)[index], label)
            if not index:
                mark_kinds(axis, table, values / maximum, COLORS[0], rare)
    axis.set_ylim(0, 1.12)
    axis.set_ylabel("share of maximum")
    limits = axis.get_xlim()
    label_depth(axis, [table], "block", most)
    axis.set_xlim(limits)
    lines = sorted(axis.get_legend_handles_labels()[0], key=lambda handle: handle.get_label() == _RESAMPLES)
    handles = [*lines, *kind_handles(rare)]
    if handles := [*handles, *([] if is_wide else named)]:  # a narrow panel has no room for the names
        box = axis.legend(
            handles=handles,
            fontsize=7,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.22 if is_wide else -0.27),
            ncols=1 + is_wide,
        )
        disable_mathtext(box.get_texts())


def _draw_signal(axis: Axes, table: pd.DataFrame, shown: Column) -> None:
    _shade(axis, table)
    values = table[shown.name].to_numpy(float)
    line(axis, table.relative_depth, values, table[f"{shown.name}_sem"], 0, "")
    mark_kinds(axis, table, values, COLORS[0], rare_kinds([table]))
    label_axis(axis, shown, 28, fontsize=8)
    if np.isfinite(values).any():
        _scale(axis, shown, values)
    else:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", color="#666666", transform=axis.transAxes)
    limits = axis.get_xlim()
    label_depth(axis, [table], "block", fontsize=8)
    axis.set_xlim(limits)


def _scale(axis: Axes, shown: Column, *lines: Any) -> None:
    """Make an axis logarithmic if the column's is and its values allow it; else let it begin at zero, or show it."""
    values = np.concatenate([np.asarray(line, float) for line in lines])
    low, high = np.nanmin(values, initial=np.inf), np.nanmax(values, initial=0)
    if shown.log and low > 0 and high > _MIN_LOG_RATIO * low:
        axis.set_yscale("log")
    elif not shown.signed:
        axis.set_ylim(0, 1.08 * high if high > 0 else 1)


def _shade(axis: Axes, table: pd.DataFrame, *, bars: bool = False, names: bool = False) -> list[Patch]:
    """Shade the stages, and return what a legend shows of them.

    Args:
        axis: the panel.
        table: the table of stages.
        bars: whether to draw a bar where 95 % of resamples put each boundary.
        names: whether to name the stages above the panel.
    """
    depth = len(table)

    def edge_of(layer: float) -> float:
        return (layer - 0.5) / max(1, depth - 1)

    boundaries = table.attrs.get("boundaries", [])
    edges, stages_between, legend = [0], [[STAGES[0]]], []
    for boundary in boundaries:
        if boundary["layer"] is None:
            stages_between[-1].append(boundary["begins"])
            continue
        edges.append(boundary["layer"])
        stages_between.append([boundary["begins"]])
        axis.axvline(edge_of(boundary["layer"]), color="#555555", linewidth=1, linestyle="--", zorder=1)
        if bars and boundary["low"] is not None:
            named = axis.get_legend_handles_labels()[1]  # one entry of the legend is enough
            interval = [edge_of(boundary["low"]), edge_of(boundary["high"])]
            axis.plot(
                interval,
                [1, 1],
                "|-",
                color="#555555",
                linewidth=2.5,
                label="" if named else _RESAMPLES,
                transform=axis.get_xaxis_transform(),
                clip_on=False,
            )
    edges.append(depth)
    for first, last, stage in zip(edges, edges[1:], stages_between, strict=False):
        shade = _SHADES[STAGES.index(stage[0])] if len(stage) == 1 else _UNCERTAIN
        axis.axvspan(edge_of(first), edge_of(last), color=shade, linewidth=0, zorder=0.5)
        legend.append(Patch(color=shade, label=" or ".join(stage)))
        if names:
            middle = (max(0.0, edge_of(first)) + min(1.0, edge_of(last))) / 2
            axis.text(
                middle,
                1.03,
                "\nor ".join(stage),
                ha="center",
                va="bottom",
                fontsize=7,
                transform=axis.get_xaxis_transform(),
                clip_on=False,
            )
    axis.set_xlim(edge_of(0), edge_of(depth))
    return legend


def draw_columns(models: Sequence[ModelTables], name: str) -> Figure:
    """Draw the columns of an analysis over depth: a panel for each, at most four in a row, a line for each model.

    Args:
        models: tables of the models, which include the analysis's main table.
        name: name of the analysis, and of its main table.
    """
    columns = ANALYSES[name].columns
    rows = -(-len(columns) // _MAX_PANELS)
    wide = -(-len(columns) // rows)
    with new_figure(3.7 * wide, 3.5 * rows + 0.2 * (len(models) > 1)) as figure:
        grid = np.ravel(figure.subplots(rows, wide, squeeze=False))
        _hide(grid[len(columns) :])
        tables = [model.tables[name] for model in models]
        rare = rare_kinds(tables)
        for axis, shown in zip(grid, columns, strict=False):
            values = [shown.factor * table[shown.name] for table in tables]
            for index, (model, table) in enumerate(zip(models, tables, strict=True)):
                errors = table.get(f"{shown.name}_sem", 0 * table[shown.name])
                line(axis, table.relative_depth, values[index], shown.factor * errors, index, model.label)
                mark_kinds(axis, table, values[index], COLORS[index % len(COLORS)], rare)
            _scale(axis, shown, *values)
            label_axis(axis, shown)
            label_depth(axis, tables, "block")
            axis.set_xlim(-0.02, 1.02)
        add_title_and_legend(figure, models, grid[0], others=kind_handles(rare))
    return figure


def _hide(axes: Any) -> None:
    for axis in axes:
        axis.set_visible(False)
