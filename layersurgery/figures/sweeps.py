"""Draw sweeps. Bands are one standard error over sequences to each side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plans.route import Route
from .style import COLORS, MARKERS, disable_mathtext, new_figure, save

_BY_LAYER = ("swap", "drop", "skip-attention", "skip-mlp", "drop-span")
_PANELS = (
    ("kl_nats", "KL from the unedited model (nats)", "log"),
    ("agreement", "predictions kept (%)", "linear"),
    ("entropy_change_bits", "change in entropy (bits)", "linear"),
)


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep to draw.

    Attributes:
        frame: its results.
        label: name of the model.
        caption: the text that it was measured on.
    """

    frame: pd.DataFrame
    label: str
    caption: str

    @classmethod
    def of(cls, frame: pd.DataFrame, data: str) -> Sweep:
        """Make a sweep to draw from results and the name of the data."""
        row = frame.iloc[0]
        sequences = f"{row.sequences} sequence{'s' if row.sequences > 1 else ''}"
        return cls(frame, str(row.model).rpartition("/")[2], f"{row.tokens:,} tokens of {data} in {sequences}")


def draw(sweeps: Sequence[Sweep], directory: Path) -> list[Path]:
    """Draw all figures that the results allow, as PNG and SVG, and return the files."""
    figures = {}
    edits = {edit for sweep in sweeps for edit in sweep.frame.edit}
    if edits & set(_BY_LAYER):
        figures["robustness"] = robustness(sweeps)
    for index, sweep in enumerate(sweeps):
        suffix = f"-{index + 1}" if len(sweeps) > 1 else ""
        if (sweep.frame.edit == "swap-pairs").any():
            figures[f"swap-pairs{suffix}"] = swap_pairs(sweep)
        if (sweep.frame.edit == "plan").any():
            figures[f"plans{suffix}"] = plans(sweep)
    return save(figures, directory)


def robustness(sweeps: Sequence[Sweep]) -> Figure:
    """Draw the effect of edits of single layers over relative depth: a row for each edit, a line for each model.

    The panels show KL, predictions kept and the change in entropy, as in figure 3 of the paper (swap above drop) and
    its figures 13 to 15.
    """
    kinds = [edit for edit in _BY_LAYER if any((sweep.frame.edit == edit).any() for sweep in sweeps)]
    with new_figure(11, 0.7 + 2.4 * len(kinds)) as figure:
        grid = figure.subplots(len(kinds), len(_PANELS), sharex=True, sharey="col", squeeze=False)
        for axes, kind in zip(grid, kinds, strict=True):
            for index, sweep in enumerate(sweeps):
                rows = sweep.frame[sweep.frame.edit == kind].sort_values("layer")
                lengths = rows.depth - rows.route.map(lambda route: len(Route.parse(route)))
                for length_index, (length, of_length) in enumerate(rows.groupby(lengths)):
                    label = (
                        f"{sweep.label}, {length} blocks"
                        if kind == "drop-span" and lengths.nunique() > 1
                        else sweep.label
                    )
                    for axis, (metric, _, _) in zip(axes, _PANELS, strict=True):
                        _line(axis, of_length, metric, index + length_index * len(sweeps), label)
            if kind == "drop-span":
                _label_spans(axes[0])
            axes[0].set_title(_LABELS[kind], loc="left", fontweight="bold")
            for axis, (_, label, scale) in zip(axes, _PANELS, strict=True):
                axis.set_ylabel(label)
                axis.set_yscale(scale if scale == "linear" or _has_positive(sweeps, kind) else "linear")
        for axis in grid[-1]:
            axis.set_xlabel("relative depth of the (first) block edited")
            axis.set_xlim(-0.02, 1.02)
        for axis in grid[:, 1]:
            axis.set_ylim(0, 102)
        for axis in grid[:, 2]:
            axis.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        if len(sweeps) > 1:
            legend = figure.legend(
                *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(sweeps))
            )
            disable_mathtext(legend.get_texts())
        _add_title(figure, sweeps)
    return figure


def _label_spans(axis: Axes) -> None:
    """Add a legend to a panel that shows spans of several lengths."""
    if axis.get_legend_handles_labels()[1] and any(
        label.endswith(" blocks") for label in axis.get_legend_handles_labels()[1]
    ):
        disable_mathtext(axis.legend(fontsize=7).get_texts())


def _has_positive(sweeps: Sequence[Sweep], kind: str) -> bool:
    """Tell whether there is a value that a logarithmic axis can show."""
    return any(
        (np.isfinite(values) & (values > 0)).any()
        for sweep in sweeps
        for values in [sweep.frame[sweep.frame.edit == kind].kl_nats.to_numpy(float)]
    )


_LABELS = {
    "swap": "swap a block with the next",
    "drop": "drop a block",
    "skip-attention": "skip a block's attention",
    "skip-mlp": "skip a block's MLP",
    "drop-span": "drop adjacent blocks",
}


def _line(axis: Axes, rows: pd.DataFrame, metric: str, index: int, label: str) -> None:
    factor = 100 if metric == "agreement" else 1
    x = rows.relative_depth.to_numpy(float)
    y, error = (factor * rows[name].to_numpy(float) for name in (metric, f"{metric}_sem"))
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    low = y - error
    if metric == "kl_nats":
        y = np.where(y > 0, y, np.nan)  # a logarithmic axis cannot show zero
        low = np.maximum(low, y / 100)
    axis.fill_between(x, low, y + error, color=color, alpha=0.2, linewidth=0)
    axis.plot(x, y, color=color, marker=marker, label=label)


def swap_pairs(sweep: Sweep) -> Figure:
    """Draw the KL of swapping any two blocks as a matrix with a cell for each pair."""
    rows = sweep.frame[sweep.frame.edit == "swap-pairs"]
    depth = int(rows.depth.iloc[0])
    matrix = np.full((depth, depth), np.nan)
    for plan, value in zip(rows.plan, rows.kl_nats, strict=True):
        first, second = map(int, plan.split()[1:])
        matrix[first, second] = matrix[second, first] = value
    with new_figure(6.4, 5.4) as figure:
        axis = figure.subplots()
        axis.grid(visible=False)
        positive = matrix[np.isfinite(matrix) & (matrix > 0)]
        norm = (
            matplotlib.colors.LogNorm(positive.min(), positive.max())
            if len(positive) and positive.min() < positive.max()
            else None
        )
        image = axis.imshow(matrix, cmap="cividis", origin="lower", norm=norm, interpolation="nearest")
        figure.colorbar(image, label="KL from the unedited model (nats)")
        axis.set_xlabel("block")
        axis.set_ylabel("swapped with block")
        _add_title(figure, [sweep])
    return figure


def plans(sweep: Sweep) -> Figure:
    """Draw KL and predictions kept of user plans as bars, the lowest KL on top."""
    rows = sweep.frame[sweep.frame.edit == "plan"].sort_values("kl_nats", ascending=False)
    with new_figure(9, 1.4 + 0.28 * len(rows)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        names = [name if len(name) < 44 else f"{name[:40]} ..." for name in rows.name]
        positions = np.arange(len(rows))
        left.barh(positions, rows.kl_nats, xerr=rows.kl_nats_sem, color=COLORS[0], ecolor="#444444")
        left.set_yticks(positions, names)
        disable_mathtext(left.get_yticklabels())
        left.set_xlabel("KL from the unedited model (nats)")
        right.barh(positions, 100 * rows.agreement, xerr=100 * rows.agreement_sem, color=COLORS[1], ecolor="#444444")
        right.set_xlabel("predictions kept (%)")
        right.set_xlim(0, 100)
        for axis in (left, right):
            axis.grid(visible=False, axis="y")
        _add_title(figure, [sweep])
    return figure


def _add_title(figure: Figure, sweeps: Sequence[Sweep]) -> None:
    captions = list(dict.fromkeys(sweep.caption for sweep in sweeps))
    if len(sweeps) == 1:
        figure.suptitle(f"{sweeps[0].label}: {captions[0]}", fontsize=10, parse_math=False)
    else:
        text = captions[0] if len(captions) == 1 else "; ".join(f"{sweep.label} {sweep.caption}" for sweep in sweeps)
        figure.suptitle(text, fontsize=10 if len(text) < 120 else 7, parse_math=False)
