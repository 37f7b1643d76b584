"""Draw analyses as the paper does: over relative depth, several models together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .style import COLORS, MARKERS, ModelTables, add_title_and_legend, line, new_figure

_DEPTH = "relative depth of the block"
_UNCERTAIN = "#EFEFEF"
_SHADES = ("#DCE9F5", "#E3F1E6", "#FBF3D9", "#F8E3DC")
_STAGES = ("detokenization", "feature engineering", "prediction ensembling", "residual sharpening")
_FIGURE_1 = (
    ("drop_kl_nats", "KL when dropped", "1 = {:.3g} nats"),
    ("attention_prev5", "attention to previous 5 tokens", "1 = {:.3g} of all"),
    ("prediction_percent", "prediction neurons", "1 = {:.3g} %"),
    ("suppression_percent", "suppression neurons", "1 = {:.3g} %"),
)
_SIGNAL_PANELS = (
    ("drop_kl_nats", "KL when the block is dropped (nats)", "log"),
    ("attention_prev5", "attention to previous 5 tokens", "linear"),
    ("attention_to_mlp_ratio", "attention norm / MLP norm", "linear"),
    ("lens_kl_nats", "logit lens: KL to final output (nats)", "linear"),
    ("lens_entropy_bits", "logit lens: entropy (bits)", "linear"),
    ("mlp_norm", "norm of MLP contribution", "log"),
)


def lens(models: Sequence[ModelTables]) -> Figure:
    """Draw the logit lens after each block: KL to the final prediction, entropy, agreement (figures 6 and 8)."""
    panels = (
        ("lens_kl_nats", "KL(final || lens), nats", 1),
        ("lens_entropy_bits", "entropy (bits)", 1),
        ("lens_agreement", "agreement with final top token (%)", 100),
    )
    return _draw_panels(models, "lens", panels)


def attention(models: Sequence[ModelTables]) -> Figure:
    """Draw attention to the five previous tokens (figure 4): as a share of all, and the paper's mean."""
    panels = (
        ("attention_prev5", "attention to previous 5 tokens (share)", 1),
        ("attention_prev5_mean", "mean attention per previous token", 1),
    )
    return _draw_panels(models, "attention", panels)


def norms(models: Sequence[ModelTables]) -> Figure:
    """Draw the norms of attention and MLP contributions (figures 5 and 7)."""
    panels = (
        ("attention_to_mlp_ratio", "attention norm / MLP norm", 1),
        ("mlp_norm", "norm of MLP contribution", 1),
        ("attention_norm", "norm of attention contribution", 1),
    )
    return _draw_panels(models, "norms", panels)


def neurons(models: Sequence[ModelTables]) -> Figure:
    """Draw prediction and suppression neurons (figure 6), a panel for each model.

    The KL of the logit lens is drawn as well if it was measured.
    """
    with new_figure(4.6 * min(3, len(models)), 3.4 * -(-len(models) // 3)) as figure:
        grid = np.ravel(figure.subplots(-(-len(models) // 3), min(3, len(models)), squeeze=False))
        for axis, model in zip(grid, models, strict=False):
            table = model.tables["neurons"]
            for index, kind in ((2, "prediction"), (1, "suppression")):
                values = table[f"{kind}_percent"].to_numpy(float)
                line(axis, table.relative_depth, values, 0 * values, index, f"{kind} neurons")
            axis.set_ylabel("neurons in block (%)")
            if "lens" in model.tables:
                right = axis.twinx()
                right.grid(visible=False)
                right.spines["right"].set_visible(True)
                rows = model.tables["lens"]
                line(
                    right,
                    rows.relative_depth,
                    rows.lens_kl_nats,
                    rows.lens_kl_nats_sem,
                    0,
                    "KL(final || lens)",
                    linestyle="--",
                )
                right.set_ylabel("KL(final || lens), nats")
                right.set_ylim(bottom=0)
                axis.plot([], [], color=COLORS[0], marker=MARKERS[0], linestyle="--", label="KL(final || lens)")
            axis.set_ylim(bottom=0)
            axis.set_xlabel(_DEPTH)
            axis.set_title(model.label, loc="left", fontweight="bold", parse_math=False)
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        _hide(grid[len(models) :])
    return figure


def similarity(models: Sequence[ModelTables]) -> Figure:
    """Draw cosines of contributions of swapped blocks (figures 11 and 12), a row of panels for each part."""
    kinds = (
        ("self", "same block, swapped vs. not"),
        ("index", "same position, swapped vs. not"),
        ("adjacent", "adjacent blocks, not swapped"),
    )
    parts = ("attention", "mlp", "block")
    with new_figure(11, 7.6) as figure:
        grid = figure.subplots(3, 3, sharex=True, sharey=True)
        for axes, part in zip(grid, parts, strict=True):
            for axis, (kind, label) in zip(axes, kinds, strict=True):
                for index, model in enumerate(models):
                    rows = model.tables["similarity"]
                    rows = rows[rows.part == part]
                    line(axis, rows.relative_depth, rows[kind], rows[f"{kind}_sem"], index, model.label)
                axis.axhline(0, color="#888888", linewidth=0.8, zorder=0)
                if part == parts[0]:
                    axis.set_title(f"{kind}: {label}", loc="left", fontsize=8)
                if part == parts[-1]:
                    axis.set_xlabel("relative depth of the first block")
            axes[0].set_ylabel(f"cosine, {'MLP' if part == 'mlp' else part}")
        add_title_and_legend(figure, models, grid[0][0])
    return figure


def stages(models: Sequence[ModelTables]) -> Figure:
    """Draw the signals of figure 1, each as a share of its maximum, over shaded stages: a panel for each model.

    For a single model, each signal also has a panel of its own.
    """
    is_single = len(models) == 1
    columns = min(3, len(models))
    rows = -(-len(models) // columns)
    with new_figure(11 if is_single else 4.6 * columns, 8.6 if is_single else 3.8 * rows) as figure:
        if is_single:
            grid = figure.subplot_mosaic([["top"] * 3, list("abc"), list("def")], height_ratios=[1.5, 1, 1])
            panels = [grid["top"]]
            for key, (name, label, scale) in zip("abcdef", _SIGNAL_PANELS, strict=True):
                _draw_signal(grid[key], models[0].tables["stages"], name, label, scale)
        else:
            panels = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
        for axis, model in zip(panels, models, strict=False):
            _draw_figure_1(axis, model)
            if not is_single:
                axis.set_title(model.label, loc="left", fontweight="bold", parse_math=False, pad=26)
        _hide(panels[len(models) :])
        if is_single:
            figure.suptitle(f"{models[0].label}: {models[0].caption}", fontsize=10, parse_math=False)
    return figure


def _draw_figure_1(axis: Axes, model: ModelTables) -> None:
    table = model.tables["stages"]
    _shade(axis, table, labels=True)
    # Both kinds of neurons share one scale, so that the figure shows which outnumber the other.
    neurons = [table[name].to_numpy(float) for name, *_ in _FIGURE_1[2:]]
    for index, (name, label, unit) in enumerate(_FIGURE_1):
        values = table[name].to_numpy(float)
        compared = np.concatenate(neurons) if index > 1 else values
        maximum = np.nanmax(compared) if np.isfinite(compared).any() else 0
        if maximum > 0:
            error = table[f"{name}_sem"].to_numpy(float) if f"{name}_sem" in table else 0 * values
            line(
                axis,
                table.relative_depth,
                values / maximum,
                error / maximum,
                (0, 3, 2, 1)[index],
                f"{label} ({unit.format(maximum)})",
            )
    axis.set_ylim(0, 1.12)
    axis.set_ylabel("share of maximum")
    axis.set_xlabel(_DEPTH)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _draw_signal(axis: Axes, table: pd.DataFrame, name: str, label: str, scale: str) -> None:
    _shade(axis, table)
    values = table[name].to_numpy(float)
    line(axis, table.relative_depth, values, table[f"{name}_sem"], 0, "")
    if scale == "log" and np.isfinite(values).any() and np.nanmin(values) > 0:
        axis.set_yscale("log")
        narrow_range = np.nanmax(values) < 8 * np.nanmin(values)
        axis.yaxis.set_major_formatter(_format_number)
        axis.yaxis.set_minor_formatter(_format_number if narrow_range else NullFormatter())
        axis.tick_params(which="minor", labelsize=6)
    elif np.isfinite(values).any():
        _from_zero(axis, values)
    else:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", color="#666666", transform=axis.transAxes)
    axis.set_ylabel(label, fontsize=8)
    axis.set_xlabel(_DEPTH, fontsize=8)


def _format_number(value: float, _position: float) -> str:
    return f"{value:g}"


def _from_zero(axis: Axes, *lines: Any) -> None:
    """Set the limits from zero to slightly above the maximum of all lines."""
    values = np.concatenate([np.asarray(line, float) for line in lines])
    maximum = np.nanmax(values) if np.isfinite(values).any() else 0
    axis.set_ylim(0, 1.08 * maximum if maximum > 0 else 1)


def _shade(axis: Axes, table: pd.DataFrame, *, labels: bool = False) -> None:
    """Shade the stages; in a panel with labels, add a bar where 95 % of resamples put each boundary."""
    depth = len(table)

    def edge_of(layer: float) -> float:
        return (layer - 0.5) / max(1, depth - 1)

    boundaries = table.attrs.get("boundaries", [])
    edges, names = [0], [[_STAGES[0]]]
    for boundary in boundaries:
        if boundary["layer"] is None:
            names[-1].append(boundary["begins"])
            continue
        edges.append(boundary["layer"])
        names.append([boundary["begins"]])
        axis.axvline(edge_of(boundary["layer"]), color="#555555", linewidth=1, linestyle="--", zorder=1)
        if labels and boundary["low"] is not None:
            interval = [edge_of(boundary["low"]), edge_of(boundary["high"])]
            axis.plot(
                interval,
                [1, 1],
                "|-",
                color="#555555",
                linewidth=2.5,
                transform=axis.get_xaxis_transform(),
                clip_on=False,
            )
    edges.append(depth)
    for first, last, stage in zip(edges, edges[1:], names, strict=False):
        shade = _SHADES[_STAGES.index(stage[0])] if len(stage) == 1 else _UNCERTAIN
        axis.axvspan(edge_of(first), edge_of(last), color=shade, linewidth=0, zorder=0.5)
        if labels:
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


def _draw_panels(models: Sequence[ModelTables], name: str, panels: Sequence[tuple[str, str, float]]) -> Figure:
    with new_figure(3.7 * len(panels), 3.3 + 0.2 * (len(models) > 1)) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (column, label, factor) in zip(grid, panels, strict=True):
            for index, model in enumerate(models):
                table = model.tables[name]
                line(
                    axis,
                    table.relative_depth,
                    factor * table[column],
                    factor * table[f"{column}_sem"],
                    index,
                    model.label,
                )
            axis.set_ylabel(label)
            axis.set_xlabel(_DEPTH)
            axis.set_xlim(-0.02, 1.02)
            _from_zero(axis, *(factor * model.tables[name][column] for model in models))
        add_title_and_legend(figure, models, grid[0])
    return figure


def _hide(axes: Any) -> None:
    for axis in axes:
        axis.set_visible(False)
