"""Figures of analyses, as the paper draws them: over relative depth, several models together. Tables in, matplotlib Figures out."""

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
_UNTOLD = "#EFEFEF"
_SHADES = ("#DCE9F5", "#E3F1E6", "#FBF3D9", "#F8E3DC")
_STAGES = ("detokenization", "feature engineering", "prediction ensembling", "residual sharpening")
_FIGURE_1 = (
    ("drop_kl_nats", "KL when dropped", "1 = {:.3g} nats"),
    ("attention_prev5", "attention to previous 5", "1 = {:.3g} of all"),
    ("prediction_percent", "prediction neurons", "1 = {:.3g} %"),
    ("suppression_percent", "suppression neurons", "1 = {:.3g} %"),
)
_EACH = (
    ("drop_kl_nats", "KL when the block is dropped (nats)", "log"),
    ("attention_prev5", "attention to the previous five", "linear"),
    ("attention_to_mlp_ratio", "norm of attention / MLP", "linear"),
    ("lens_kl_nats", "logit lens: KL to the end (nats)", "linear"),
    ("lens_entropy_bits", "logit lens: entropy (bits)", "linear"),
    ("mlp_norm", "norm of the MLP's output", "log"),
)


def lens(models: Sequence[ModelTables]) -> Figure:
    """What the logit lens says behind each block: KL to the model's own prediction, entropy, share of top tokens (figures 6 and 8)."""
    panels = (
        ("lens_kl_nats", "KL(final || lens), nats", 1),
        ("lens_entropy_bits", "entropy (bits)", 1),
        ("lens_agreement", "model's own top token (%)", 100),
    )
    return _panels(models, "lens", panels)


def attention(models: Sequence[ModelTables]) -> Figure:
    """Attention to the previous five tokens (figure 4): as a share of all, and the paper's mean."""
    panels = (
        ("attention_prev5", "share of attention on the previous five", 1),
        ("attention_prev5_mean", "mean attention to each of them", 1),
    )
    return _panels(models, "attention", panels)


def norms(models: Sequence[ModelTables]) -> Figure:
    """Sizes of what attention and MLP add (figures 5 and 7)."""
    panels = (
        ("attention_to_mlp_ratio", "norm of attention / norm of MLP", 1),
        ("mlp_norm", "norm of what the MLP adds", 1),
        ("attention_norm", "norm of what attention adds", 1),
    )
    return _panels(models, "norms", panels)


def neurons(models: Sequence[ModelTables]) -> Figure:
    """Prediction and suppression neurons, with the logit lens's KL where it was measured (figure 6): a panel for each model."""
    with new_figure(4.6 * min(3, len(models)), 3.4 * -(-len(models) // 3)) as figure:
        grid = np.ravel(figure.subplots(-(-len(models) // 3), min(3, len(models)), squeeze=False))
        for axis, model in zip(grid, models, strict=False):
            table = model.tables["neurons"]
            for place, kind in ((2, "prediction"), (1, "suppression")):
                values = table[f"{kind}_percent"].to_numpy(float)
                line(axis, table.relative_depth, values, 0 * values, place, f"{kind} neurons")
            axis.set_ylabel("neurons of the block (%)")
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
    """Cosines of contributions of swapped blocks (figures 11 and 12): a row of panels for each part."""
    kinds = (
        ("self", "the block itself, swapped and not"),
        ("index", "what was and what is at its place"),
        ("adjacent", "two neighbours"),
    )
    parts = ("attention", "mlp", "block")
    with new_figure(11, 7.6) as figure:
        grid = figure.subplots(3, 3, sharex=True, sharey=True)
        for axes, part in zip(grid, parts, strict=True):
            for axis, (kind, words) in zip(axes, kinds, strict=True):
                for place, model in enumerate(models):
                    rows = model.tables["similarity"]
                    rows = rows[rows.part == part]
                    line(axis, rows.relative_depth, rows[kind], rows[f"{kind}_sem"], place, model.label)
                axis.axhline(0, color="#888888", linewidth=0.8, zorder=0)
                if part == parts[0]:
                    axis.set_title(f"{kind}: {words}", loc="left", fontsize=8)
                if part == parts[-1]:
                    axis.set_xlabel("relative depth of the first of the two")
            axes[0].set_ylabel(f"cosine, {'MLP' if part == 'mlp' else part}")
        add_title_and_legend(figure, models, grid[0][0])
    return figure


def stages(models: Sequence[ModelTables]) -> Figure:
    """The signals of figure 1, each as a share of its greatest value, over shaded stages: a panel for each model, and all signals of a single one."""
    alone = len(models) == 1
    columns = min(3, len(models))
    rows = -(-len(models) // columns)
    with new_figure(11 if alone else 4.6 * columns, 8.6 if alone else 3.8 * rows) as figure:
        if alone:
            grid = figure.subplot_mosaic([["top"] * 3, list("abc"), list("def")], height_ratios=[1.5, 1, 1])
            panels = [grid["top"]]
            for key, (name, label, scale) in zip("abcdef", _EACH, strict=True):
                _one(grid[key], models[0].tables["stages"], name, label, scale)
        else:
            panels = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
        for axis, model in zip(panels, models, strict=False):
            _figure_1(axis, model)
            if not alone:
                axis.set_title(model.label, loc="left", fontweight="bold", parse_math=False, pad=26)
        _hide(panels[len(models) :])
        if alone:
            figure.suptitle(f"{models[0].label}: {models[0].caption}", fontsize=10, parse_math=False)
    return figure


def _figure_1(axis: Axes, model: ModelTables) -> None:
    table = model.tables["stages"]
    _shade(axis, table, words=True)
    # Of neurons of both kinds, the same share: which outnumbers which is what counts.
    neurons = [table[name].to_numpy(float) for name, *_ in _FIGURE_1[2:]]
    for place, (name, label, unit) in enumerate(_FIGURE_1):
        values = table[name].to_numpy(float)
        compared = np.concatenate(neurons) if place > 1 else values
        most = np.nanmax(compared) if np.isfinite(compared).any() else 0
        if most > 0:
            error = table[f"{name}_sem"].to_numpy(float) if f"{name}_sem" in table else 0 * values
            line(
                axis,
                table.relative_depth,
                values / most,
                error / most,
                (0, 3, 2, 1)[place],
                f"{label} ({unit.format(most)})",
            )
    axis.set_ylim(0, 1.12)
    axis.set_ylabel("share of the greatest value")
    axis.set_xlabel(_DEPTH)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _one(axis: Axes, table: pd.DataFrame, name: str, label: str, scale: str) -> None:
    _shade(axis, table)
    values = table[name].to_numpy(float)
    line(axis, table.relative_depth, values, table[f"{name}_sem"], 0, "")
    if scale == "log" and np.isfinite(values).any() and np.nanmin(values) > 0:
        axis.set_yscale("log")
        near = np.nanmax(values) < 8 * np.nanmin(values)
        axis.yaxis.set_major_formatter(_plain)
        axis.yaxis.set_minor_formatter(_plain if near else NullFormatter())
        axis.tick_params(which="minor", labelsize=6)
    elif np.isfinite(values).any():
        _from_zero(axis, values)
    else:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", color="#666666", transform=axis.transAxes)
    axis.set_ylabel(label, fontsize=8)
    axis.set_xlabel(_DEPTH, fontsize=8)


def _plain(value: float, _place: float) -> str:
    return f"{value:g}"


def _from_zero(axis: Axes, *drawn: Any) -> None:
    """From nothing to a little above what is drawn, however flat it is."""
    values = np.concatenate([np.asarray(one, float) for one in drawn])
    most = np.nanmax(values) if np.isfinite(values).any() else 0
    axis.set_ylim(0, 1.08 * most if most > 0 else 1)


def _shade(axis: Axes, table: pd.DataFrame, *, words: bool = False) -> None:
    """The stages; above a panel with words, a bar where 95 % of resamples put each limit."""
    depth = len(table)

    def at(layer: float) -> float:
        return (layer - 0.5) / max(1, depth - 1)

    limits = table.attrs.get("boundaries", [])
    edges, names = [0], [[_STAGES[0]]]
    for limit in limits:
        if limit["layer"] is None:
            names[-1].append(limit["begins"])
            continue
        edges.append(limit["layer"])
        names.append([limit["begins"]])
        axis.axvline(at(limit["layer"]), color="#555555", linewidth=1, linestyle="--", zorder=1)
        if words and limit["low"] is not None:
            reach = [at(limit["low"]), at(limit["high"])]
            axis.plot(
                reach, [1, 1], "|-", color="#555555", linewidth=2.5, transform=axis.get_xaxis_transform(), clip_on=False
            )
    edges.append(depth)
    for first, last, stage in zip(edges, edges[1:], names, strict=False):
        shade = _SHADES[_STAGES.index(stage[0])] if len(stage) == 1 else _UNTOLD
        axis.axvspan(at(first), at(last), color=shade, linewidth=0, zorder=0.5)
        if words:
            middle = (max(0.0, at(first)) + min(1.0, at(last))) / 2
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
    axis.set_xlim(at(0), at(depth))


def _panels(models: Sequence[ModelTables], name: str, panels: Sequence[tuple[str, str, float]]) -> Figure:
    with new_figure(3.7 * len(panels), 3.3 + 0.2 * (len(models) > 1)) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (column, label, times) in zip(grid, panels, strict=True):
            for place, model in enumerate(models):
                table = model.tables[name]
                line(
                    axis,
                    table.relative_depth,
                    times * table[column],
                    times * table[f"{column}_sem"],
                    place,
                    model.label,
                )
            axis.set_ylabel(label)
            axis.set_xlabel(_DEPTH)
            axis.set_xlim(-0.02, 1.02)
            _from_zero(axis, *(times * model.tables[name][column] for model in models))
        add_title_and_legend(figure, models, grid[0])
    return figure


def _hide(axes: Any) -> None:
    for axis in axes:
        axis.set_visible(False)
