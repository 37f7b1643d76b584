"""Figures of sweeps: a table in, a matplotlib Figure out. Bands are one standard error over sequences to each side."""

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
    ("entropy_change_bits", "change of entropy (bits)", "linear"),
)


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep to draw.

    Attributes:
        frame: its results.
        label: the model's name.
        caption: what it was measured on.
    """

    frame: pd.DataFrame
    label: str
    caption: str

    @classmethod
    def of(cls, frame: pd.DataFrame, data: str) -> Sweep:
        """Results with words for a figure."""
        row = frame.iloc[0]
        sequences = f"{row.sequences} sequence{'s' if row.sequences > 1 else ''}"
        return cls(frame, str(row.model).rpartition("/")[2], f"{row.tokens:,} tokens of {data} in {sequences}")


def draw(sweeps: Sequence[Sweep], directory: Path) -> list[Path]:
    """Draw all that the results hold, as PNG and SVG; returns the files."""
    figures = {}
    edits = {edit for sweep in sweeps for edit in sweep.frame.edit}
    if edits & set(_BY_LAYER):
        figures["robustness"] = robustness(sweeps)
    for number, sweep in enumerate(sweeps):
        suffix = f"-{number + 1}" if len(sweeps) > 1 else ""
        if (sweep.frame.edit == "swap-pairs").any():
            figures[f"swap-pairs{suffix}"] = swap_pairs(sweep)
        if (sweep.frame.edit == "plan").any():
            figures[f"plans{suffix}"] = plans(sweep)
    return save(figures, directory)


def robustness(sweeps: Sequence[Sweep]) -> Figure:
    """What each edit of single layers does, over relative depth: a row of panels for each kind of edit, a line for each model.

    KL, predictions kept and the change of entropy, as in figure 3 of the paper (swap above drop) and its figures 13 to 15.
    """
    kinds = [edit for edit in _BY_LAYER if any((sweep.frame.edit == edit).any() for sweep in sweeps)]
    with new_figure(11, 0.7 + 2.4 * len(kinds)) as figure:
        grid = figure.subplots(len(kinds), len(_PANELS), sharex=True, sharey="col", squeeze=False)
        for axes, kind in zip(grid, kinds, strict=True):
            for place, sweep in enumerate(sweeps):
                rows = sweep.frame[sweep.frame.edit == kind].sort_values("layer")
                lengths = rows.depth - rows.route.map(lambda route: len(Route.parse(route)))
                for number, (length, part) in enumerate(rows.groupby(lengths)):
                    label = (
                        f"{sweep.label}, {length} blocks"
                        if kind == "drop-span" and lengths.nunique() > 1
                        else sweep.label
                    )
                    for axis, (metric, _, _) in zip(axes, _PANELS, strict=True):
                        _line(axis, part, metric, place + number * len(sweeps), label)
            if kind == "drop-span":
                _label_spans(axes[0])
            axes[0].set_title(_WORDS[kind], loc="left", fontweight="bold")
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
        _entitle(figure, sweeps)
    return figure


def _label_spans(axis: Axes) -> None:
    """Several lengths of spans in one panel need a legend of their own."""
    if axis.get_legend_handles_labels()[1] and any(
        label.endswith(" blocks") for label in axis.get_legend_handles_labels()[1]
    ):
        disable_mathtext(axis.legend(fontsize=7).get_texts())


def _has_positive(sweeps: Sequence[Sweep], kind: str) -> bool:
    """Whether there is anything that a logarithmic axis can show."""
    return any(
        (np.isfinite(values) & (values > 0)).any()
        for sweep in sweeps
        for values in [sweep.frame[sweep.frame.edit == kind].kl_nats.to_numpy(float)]
    )


_WORDS = {
    "swap": "swap a block with the next",
    "drop": "drop a block",
    "skip-attention": "skip a block's attention",
    "skip-mlp": "skip a block's MLP",
    "drop-span": "drop neighbouring blocks",
}


def _line(axis: Axes, rows: pd.DataFrame, metric: str, place: int, label: str) -> None:
    by = 100 if metric == "agreement" else 1
    x = rows.relative_depth.to_numpy(float)
    y, error = (by * rows[name].to_numpy(float) for name in (metric, f"{metric}_sem"))
    colour, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
    low = y - error
    if metric == "kl_nats":
        y = np.where(y > 0, y, np.nan)  # none at all has no place on a logarithmic axis
        low = np.maximum(low, y / 100)
    axis.fill_between(x, low, y + error, color=colour, alpha=0.2, linewidth=0)
    axis.plot(x, y, color=colour, marker=marker, label=label)


def swap_pairs(sweep: Sweep) -> Figure:
    """KL of swapping any two blocks: a square with a cell for each pair."""
    rows = sweep.frame[sweep.frame.edit == "swap-pairs"]
    depth = int(rows.depth.iloc[0])
    square = np.full((depth, depth), np.nan)
    for plan, value in zip(rows.plan, rows.kl_nats, strict=True):
        one, other = map(int, plan.split()[1:])
        square[one, other] = square[other, one] = value
    with new_figure(6.4, 5.4) as figure:
        axis = figure.subplots()
        axis.grid(visible=False)
        found = square[np.isfinite(square) & (square > 0)]
        norm = matplotlib.colors.LogNorm(found.min(), found.max()) if len(found) and found.min() < found.max() else None
        image = axis.imshow(square, cmap="cividis", origin="lower", norm=norm, interpolation="nearest")
        figure.colorbar(image, label="KL from the unedited model (nats)")
        axis.set_xlabel("block")
        axis.set_ylabel("swapped with block")
        _entitle(figure, [sweep])
    return figure


def plans(sweep: Sweep) -> Figure:
    """KL and predictions kept of plans of one's own: a bar for each, the mildest on top."""
    rows = sweep.frame[sweep.frame.edit == "plan"].sort_values("kl_nats", ascending=False)
    with new_figure(9, 1.4 + 0.28 * len(rows)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        names = [name if len(name) < 44 else f"{name[:40]} ..." for name in rows.name]
        places = np.arange(len(rows))
        left.barh(places, rows.kl_nats, xerr=rows.kl_nats_sem, color=COLORS[0], ecolor="#444444")
        left.set_yticks(places, names)
        disable_mathtext(left.get_yticklabels())
        left.set_xlabel("KL from the unedited model (nats)")
        right.barh(places, 100 * rows.agreement, xerr=100 * rows.agreement_sem, color=COLORS[1], ecolor="#444444")
        right.set_xlabel("predictions kept (%)")
        right.set_xlim(0, 100)
        for axis in (left, right):
            axis.grid(visible=False, axis="y")
        _entitle(figure, [sweep])
    return figure


def _entitle(figure: Figure, sweeps: Sequence[Sweep]) -> None:
    captions = list(dict.fromkeys(sweep.caption for sweep in sweeps))
    if len(sweeps) == 1:
        figure.suptitle(f"{sweeps[0].label}: {captions[0]}", fontsize=10, parse_math=False)
    else:
        each = captions[0] if len(captions) == 1 else "; ".join(f"{sweep.label} {sweep.caption}" for sweep in sweeps)
        figure.suptitle(each, fontsize=10 if len(each) < 120 else 7, parse_math=False)
