"""Draw probes: on neurons, and on the sense of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import COLORS, MARKERS, ModelTables, add_title_and_legend, disable_mathtext, label_depth, new_figure

_KINDS = {
    "prediction": (2, "prediction neurons"),
    "suppression": (1, "suppression neurons"),
    "both": (0, "both kinds"),
    "random": (3, "random neurons"),
}
_REFERENCES = {
    "model, top token": ("model's top token", "#000000", "--"),
    "model, probability": ("model's class probability", "#000000", ":"),
    "shuffled labels": ("shuffled labels", "#888888", "-"),
}
_COLUMNS = 6
_CLASS, _REST = COLORS[1], "#B8B8B8"


def probe(models: Sequence[ModelTables]) -> Figure:
    """Draw single neurons, the best k neurons, and the output weights of two neurons (figure 10); a row for each model.

    The model's own accuracy is drawn for reference.
    """
    with new_figure(12, 3.9 * len(models)) as figure:
        grid = figure.subplots(len(models), 3, squeeze=False, gridspec_kw={"width_ratios": [1, 1, 0.8]})
        for axes, model in zip(grid, models, strict=True):
            _draw_single_neurons(axes[0], model)
            _draw_top_k(axes[1], model)
            axes[1].sharey(axes[0])
            axes[2].set_axis_off()
            _draw_histograms(axes[2], model)
            if len(models) > 1:
                axes[0].set_title(model.label, loc="left", fontweight="bold", parse_math=False)
        handles = {
            text: handle
            for axis in grid[:, :2].flat
            for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
        add_title_and_legend(figure, models, grid[0][0], legend=False)
    return figure


def _draw_single_neurons(axis: Axes, model: ModelTables) -> None:
    table = model.tables["single_neurons"]
    for kind, (index, label) in _KINDS.items():
        rows = table[table.kind == kind]
        if len(rows):
            _draw_intervals(axis, rows["rank"], rows, index, label, linestyle="none", alpha=0.9)
    _draw_references(axis, model)
    axis.set_xlabel("neuron, ranked by training accuracy")
    axis.set_ylabel("held-out accuracy (%)")
    axis.text(0.02, 0.98, "a  single neurons", transform=axis.transAxes, va="top", fontweight="bold")


def _draw_top_k(axis: Axes, model: ModelTables) -> None:
    table = model.tables["top_k"]
    for kind, (index, label) in _KINDS.items():
        rows = table[table.kind == kind]
        if len(rows):
            k = rows.k.to_numpy(float)
            axis.fill_between(k, 100 * rows.low, 100 * rows.high, color=COLORS[index], alpha=0.15, linewidth=0)
            axis.plot(k, 100 * rows.accuracy, color=COLORS[index], label=label if kind == "both" else None)
    _draw_references(axis, model)
    axis.set_xlabel("number of neurons (k)")
    axis.text(0.02, 0.98, "b  best k neurons", transform=axis.transAxes, va="top", fontweight="bold")


def _draw_intervals(axis: Axes, x: pd.Series, rows: pd.DataFrame, index: int, label: str, **style: Any) -> None:
    y = 100 * rows.accuracy.to_numpy(float)
    error = [y - 100 * rows.low.to_numpy(float), 100 * rows.high.to_numpy(float) - y]
    axis.errorbar(
        x.to_numpy(float), y, error, color=COLORS[index], marker=MARKERS[index], label=label, elinewidth=0.7, **style
    )


def _draw_references(axis: Axes, model: ModelTables) -> None:
    table = model.tables["probe"]
    for name, (label, color, style) in _REFERENCES.items():
        for row in table[table.probe == name].itertuples():
            axis.axhspan(100 * row.low, 100 * row.high, color=color, alpha=0.07, linewidth=0, zorder=0.5)
            axis.axhline(100 * row.accuracy, color=color, linestyle=style, linewidth=1.1, label=label, zorder=1)


def _draw_histograms(axis: Axes, model: ModelTables) -> None:
    """Draw the neuron of each kind with the largest effect."""
    table = model.tables["effects"]
    kinds = [kind for kind in ("suppression", "prediction") if (table.kind == kind).any()]
    for index, kind in enumerate(kinds):
        inset = axis.inset_axes((0.06, 0.6 - 0.6 * index, 0.94, 0.38))
        of_kind = table[table.kind == kind]
        rows = of_kind[of_kind["rank"] == of_kind["rank"].min()]
        _draw_histogram(inset, rows)
        first = rows.iloc[0]
        inset.set_title(
            f"{'c  ' if index == 0 else ''}{kind}: layer {first.layer}, neuron {first.neuron}", loc="left", fontsize=9
        )
        inset.set_ylabel("tokens")
        if index == len(kinds) - 1:
            inset.set_xlabel(r"$W_U \cdot w_{out}$")
        if index == 0:
            inset.legend(fontsize=7, loc="upper right")


def _draw_histogram(axis: Axes, rows: pd.DataFrame) -> None:
    edges = np.append(rows.low.to_numpy(float), float(rows.high.iloc[-1]))
    for name, label, color, alpha in (
        ("rest_tokens", "other tokens", _REST, 1.0),
        ("class_tokens", "class tokens", _CLASS, 0.75),
    ):
        axis.stairs(rows[name].to_numpy(float), edges, fill=True, color=color, alpha=alpha, label=label, linewidth=0)
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_ylim(bottom=0.7)


def effects(models: Sequence[ModelTables]) -> Figure:
    """Draw what the neurons with the largest effects add to the logits (figure 16); a grid for each model."""
    panels_by_model = [list(model.tables["effects"].groupby("rank")) for model in models]
    row_counts = [-(-len(panels) // _COLUMNS) for panels in panels_by_model]
    with new_figure(11, 1.35 * sum(row_counts) + 0.9) as figure:
        # A constrained layout of so many panels takes half a minute, so the margins are fixed.
        figure.set_layout_engine(None)
        margin = 0.45 / figure.get_figheight()
        figure.subplots_adjust(left=0.06, right=0.99, bottom=1.3 * margin, top=1 - 1.3 * margin, wspace=0.3, hspace=0.5)
        grid = figure.subplots(sum(row_counts), _COLUMNS, squeeze=False)
        row = 0
        for model, panels, rows in zip(models, panels_by_model, row_counts, strict=True):
            axes = grid[row : row + rows].ravel()
            row += rows
            for axis, (_, panel) in zip(axes, panels, strict=False):
                _draw_histogram(axis, panel)
                first = panel.iloc[0]
                prefix = f"{model.label}\n" if len(models) > 1 and first["rank"] == 1 else ""
                axis.set_title(
                    f"{prefix}{first.layer}.{first.neuron} {first.kind}", fontsize=7.5, pad=2, parse_math=False
                )
                axis.tick_params(labelsize=6, pad=1.5)
            for axis in axes[len(panels) :]:
                axis.set_visible(False)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower right", ncols=2, fontsize=8)
        figure.supxlabel(r"$W_U \cdot w_{out}$ (layer.neuron and kind above each panel)", fontsize=9)
        figure.supylabel("tokens", fontsize=9)
        add_title_and_legend(figure, models, grid[0][0], legend=False)
    return figure


def wic(models: Sequence[ModelTables]) -> Figure:
    """Draw how well the sense of a word is predicted over depth, from the embeddings on; a line for each model.

    Dashed lines are the accuracies with shuffled labels, and the dotted one is that of the more frequent label.
    """
    with new_figure(7.5, 4.4 + 0.2 * (len(models) > 1)) as figure:
        axis = figure.subplots()
        for index, model in enumerate(models):
            table = model.tables["wic"].sort_values("layer")
            x = table.relative_depth.to_numpy(float)
            color = COLORS[index % len(COLORS)]
            low, high = (100 * table[f"accuracy_{end}"].to_numpy(float) for end in ("low", "high"))
            axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            axis.plot(
                x, 100 * table.accuracy.to_numpy(float), color=color, marker=MARKERS[index % len(MARKERS)],
                label=model.label if len(models) > 1 else "probe of the stream after the block",
            )  # fmt: skip
            axis.plot(
                x, 100 * table.shuffled.to_numpy(float), color=color, linestyle="--", linewidth=1,
                label=None if index else "shuffled labels",
            )  # fmt: skip
        for share in sorted({round(float(model.tables["wic"].majority.iloc[0]), 6) for model in models}):
            axis.axhline(100 * share, color="#000000", linestyle=":", linewidth=1.1, label="more frequent label")
        axis.set_ylabel("accuracy on held-out pairs (%)")
        label_depth(axis, [model.tables["wic"] for model in models], "block; the first point is the embeddings")
        disable_mathtext(axis.legend(fontsize=8, ncols=2).get_texts())
        add_title_and_legend(figure, models, axis, legend=False)
    return figure
