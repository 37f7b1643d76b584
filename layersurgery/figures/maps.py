"""Draw maps: a value for each pair of blocks, as a matrix of colors.

Block 0 is at the top left, as in a written matrix: cells with from < to are above the diagonal. Cells without a value
are hatched, so that they look different from low ones.
"""

from __future__ import annotations

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, LinearSegmentedColormap
from matplotlib.figure import Figure

from ..registry import METRICS, Column
from .map_scale import MapScale, is_band, lowest_cells
from .style import labeled_blocks, new_figure

_PANELS = tuple(metric for metric in METRICS if metric.name in ("kl_nats", "agreement", "loss_change_nats"))
_KL = _PANELS[0]
_MISSING = {"facecolor": "white", "edgecolor": "#c9c9c9", "hatch": "////", "linewidth": 0}
_LABELS = 8  # of blocks along a side
_WIDTH = 56  # characters in a line below a map


def draw_map(
    figure: Figure,
    axis: Axes,
    frame: pd.DataFrame,
    column: Column,
    *,
    rows: str,
    columns: str,
    best: int = 0,
    symmetric: bool = False,
) -> None:
    """Draw a column of a map, `from` downwards and `to` to the right, with a scale of its colors.

    Changes have a scale that is centered at zero. A scale is logarithmic where values span decades; values that it
    cannot show are counted below the map, and so are those that are not finite. A map that is only a band along the
    diagonal is drawn along the band: `from` to the right, and `to - from` upwards.

    Args:
        figure: the figure, for the scale of colors.
        axis: the axis to draw on.
        frame: the map, with integer columns from and to, the column, and optionally the names of cells in `name`.
        column: the column, from the registry.
        rows: what `from` is.
        columns: what `to` is.
        best: number of cells to mark with a ring and to name: those with the lowest values, on each side of the
            diagonal.
        symmetric: whether a cell stands for both orders of its two blocks; it is drawn twice, and marked once.
    """
    cells = _unique(frame)
    band = is_band(cells)
    start, stop = (cells[name].to_numpy(int) for name in ("from", "to"))
    values = column.factor * cells[column.name].to_numpy(float)
    if symmetric and not band:
        start, stop = np.concatenate([start, stop]), np.concatenate([stop, start])
        values = np.concatenate([values, values])
    down, right = (stop - start, start) if band else (start, stop)
    limits = [(int(side.min()), int(side.max())) if len(side) else (0, 0) for side in (down, right)]
    (top, bottom), (left, last) = limits
    matrix = np.full((bottom - top + 1, last - left + 1), np.nan)
    matrix[down - top, right - left] = np.where(np.isfinite(values), values, np.nan)

    scale = MapScale.of(values, column)
    axis.grid(visible=False)
    axis.patch.set(**_MISSING)
    image = axis.imshow(
        matrix,
        cmap=LinearSegmentedColormap.from_list("map", scale.colors),
        norm=FuncNorm((scale.forward, scale.inverse), scale.low, scale.high, clip=True),
        origin="lower" if band else "upper",
        extent=(left - 0.5, last + 0.5, *((top - 0.5, bottom + 0.5) if band else (bottom + 0.5, top - 0.5))),
        aspect="auto" if band else "equal",
        interpolation="nearest",
    )
    # An inset is as high as the map, which a color bar next to the axis is not if cells are squares.
    bar = figure.colorbar(image, cax=axis.inset_axes((1.02, 0, 0.02 if band else 0.04, 1)))
    bar.set_ticks(list(scale.ticks), labels=[_number(tick) for tick in scale.ticks])
    bar.minorticks_off()
    axis.set_title(fill(column.axis, 50), loc="left", fontsize=9, parse_math=False)
    undefined = ~np.isfinite(values)
    axis.plot(right[undefined], down[undefined], "x", color="black", markersize=3)
    for (first, end), set_ticks in zip(limits, (axis.set_yticks, axis.set_xticks), strict=True):
        set_ticks(labeled_blocks(end, _LABELS, first))
    marked = lowest_cells(cells, column.name, best, symmetric=symmetric) if best else cells[:0]
    ring(axis, marked, band)
    axis.set_ylabel("" if band else rows, parse_math=False)
    sides = f"→ {rows}    ↑ {columns} \N{MINUS SIGN} {rows}" if band else columns
    below = [sides, *_notes(values, matrix, scale, max(1, len(values) // max(1, len(cells)))), *_names(marked, column)]
    axis.set_xlabel("\n".join(below), parse_math=False)


def ring(axis: Axes, cells: pd.DataFrame, band: bool) -> None:
    """Mark cells of a map with rings that are seen on every color.

    Args:
        axis: the axis of the map.
        cells: the cells, with columns from and to.
        band: whether the map is drawn along its band (`map_scale.is_band`).
    """
    if cells.empty:
        return
    start, stop = (cells[name].to_numpy(int) for name in ("from", "to"))
    x, y = (start, stop - start) if band else (stop, start)
    for width, color in ((3.2, "black"), (1.4, "white")):
        axis.plot(
            x, y, "o", markersize=8, markerfacecolor="none", markeredgecolor=color, markeredgewidth=width, clip_on=False
        )


def edit_map(
    rows: pd.DataFrame, axes: tuple[str, str], title: str, *, symmetric: bool = False, best: int = 1
) -> Figure:
    """Draw KL, top-1 agreement and change in loss of a family of edits that has a map.

    The edits with the lowest KL on each side of the diagonal have a ring in all panels, if `best` is 1.

    Args:
        rows: the family's rows of a sweep's results.
        axes: what `from` and `to` are.
        title: title of the figure.
        symmetric: whether a cell stands for both orders of its two blocks.
        best: number of cells on each side of the diagonal that have a ring; 0 if the map has no diagonal.
    """
    cells = _unique(rows)
    band = is_band(cells)
    marked = lowest_cells(cells, _KL.name, best, symmetric=symmetric)
    height = int((cells["to"] - cells["from"]).max() - (cells["to"] - cells["from"]).min()) + 1 if band else 0
    with new_figure(*((9.5, 0.6 + 3 * (1.3 + 0.09 * height)) if band else (14, 5))) as figure:
        panels = figure.subplots(*((3, 1) if band else (1, 3)), squeeze=False).reshape(-1)
        for axis, metric in zip(panels, _PANELS, strict=True):
            draw_map(
                figure, axis, cells, metric, rows=axes[0], columns=axes[1],
                best=best * (metric is _KL), symmetric=symmetric,
            )  # fmt: skip
            if metric is not _KL:
                ring(axis, marked, band)
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _unique(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that have a cell, the first of each cell."""
    return frame[frame["from"].notna() & frame["to"].notna()].drop_duplicates(["from", "to"])


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _notes(values: np.ndarray, matrix: np.ndarray, scale: MapScale, each: int) -> list[str]:
    """Say how cells are drawn that have no color of their own; each is drawn `each` times."""
    notes = []
    if undefined := int((~np.isfinite(values)).sum()) // each:
        notes.append(f"\N{MULTIPLICATION SIGN}: not a finite number ({undefined})")
    if np.isnan(matrix).sum() > each * undefined:
        notes.append("hatched: not measured")
    if below := int((values < scale.low).sum()) // each:
        limit = "of zero or less" if (values[values < scale.low] <= 0).all() else f"below {scale.low:.2g}"
        notes.append(f"{below} cell{'s'[: below != 1]} {limit} in the lowest color")
    return [fill("; ".join(notes), _WIDTH)] if notes else []


def _names(marked: pd.DataFrame, about: Column) -> list[str]:
    """Name the marked cells, with their values."""
    parts = []
    for _, row in marked.iterrows():
        name = str(row["name"]) if "name" in row else f"{row['from']:.0f}, {row['to']:.0f}"
        value = _number(float(f"{about.factor * row[about.name]:.3g}"))
        parts.append(f"{name if len(name) < 40 else f'{name[:36]} ...'}: {value} {about.unit}".rstrip())
    return [fill(f"○ lowest: {'; '.join(parts)}", _WIDTH)] if parts else []
