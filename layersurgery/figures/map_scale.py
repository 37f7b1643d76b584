"""Choose how a map is drawn, in figures and in a report alike: its scale, its colors, its shape, its lowest cells.

A map is a table with a row for each cell, its place in the columns `from` and `to`. This file does not import
matplotlib, which starts slowly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..registry import Column

Kind = Literal["linear", "log", "signed"]

SEQUENTIAL = ("#00224e", "#1a386f", "#434e6c", "#61656f", "#7d7c78", "#9b9476", "#bcae6c", "#dec958", "#fee838")
"""Colors of values from low to high, at equal steps: cividis (Nuñez et al., doi 10.1371/journal.pone.0199239)."""
DIVERGING = ("#005596", "#517aaf", "#89a0c8", "#bec9df", "#f4f3f2", "#e9c0ad", "#d19072", "#b4623b", "#923302")
"""Colors of changes from negative to positive, white at zero: equal steps of lightness in CIELAB, blue and orange."""
_DECADE = 10.0
_MOST_LINEAR = 20.0  # times the lower quartile of the sizes of changes: in between, a linear scale shows most of them
_MOST_DECADES = 6  # of a logarithmic scale: smaller values are rounding noise, and would take colors from the rest
_BAND = 3  # a map this many times as long as its band is wide is drawn along the band


@dataclass(frozen=True, slots=True)
class MapScale:
    """Scale from the values of a map to its colors.

    Attributes:
        kind: "linear"; "log"; or "signed", which is linear near zero and logarithmic far from it, on both sides.
        low: value of the first color.
        high: value of the last color.
        bend: size at which a scale of kind "signed" turns from linear to logarithmic.
        ticks: values to label.
        diverging: whether the scale is centered at zero.
    """

    kind: Kind
    low: float
    high: float
    bend: float
    ticks: tuple[float, ...]
    diverging: bool

    @classmethod
    def of(cls, values: npt.ArrayLike, column: Column) -> MapScale:
        """Choose the scale of a column's values, in the unit in which they are shown.

        A change is centered at zero, and logarithmic if most changes are small and some are large. Another column is
        logarithmic if the registry says so and its values span more than a decade.

        Args:
            values: the values, with NaN for cells that have none.
            column: the column.

        Example:
            >>> from layersurgery.figures.map_scale import MapScale
            >>> from layersurgery.registry import column
            >>> MapScale.of([0.01, 0.2, 7], column("kl_nats")).ticks
            (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
            >>> MapScale.of([-1, 0.5], column("loss_change_nats")).low
            -1.0
        """
        known = np.asarray(values, float).reshape(-1)
        known = known[np.isfinite(known)]
        if column.signed:
            return cls._of_changes(np.abs(known[known != 0]))
        positive = known[known > 0]
        if column.log and len(positive) and positive.max() >= _DECADE * positive.min():
            high = float(positive.max())
            low = max(float(positive.min()), high / 10**_MOST_DECADES)
            return cls("log", low, high, 1, _log_ticks(low, high), False)
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value is in the middle of the scale
            room = max(abs(high), 1e-9) / 2 if high else 1.0
            low, high = low - room, high + room
        return cls("linear", low, high, 1, _linear_ticks(low, high), False)

    @classmethod
    def _of_changes(cls, sizes: npt.NDArray[np.float64]) -> MapScale:
        """Choose the scale of changes, from their sizes."""
        high = float(sizes.max()) if len(sizes) else 1.0
        if not len(sizes) or high < _MOST_LINEAR * np.quantile(sizes, 0.25):
            return cls("linear", -high, high, 1, _linear_ticks(-high, high), True)
        bend = max(10 ** math.floor(math.log10(np.quantile(sizes, 0.1))), high / 10**_MOST_DECADES)
        powers = [10.0**power for power in range(math.ceil(math.log10(bend)), math.floor(math.log10(high)) + 1)]
        room = math.log1p(high / bend) / 6  # around zero, for its own label
        powers = [power for power in powers if math.log1p(power / bend) > room]
        powers = powers[:: max(1, -(-len(powers) // 3))]  # at most three on a side
        ticks = (*(-power for power in reversed(powers)), 0.0, *powers)
        return cls("signed", -high, high, bend, ticks, True)

    @property
    def colors(self) -> tuple[str, ...]:
        """Return the colors, at equal steps of the scale."""
        return DIVERGING if self.diverging else SEQUENTIAL

    def forward(self, values: Any) -> Any:
        """Turn values into numbers that are proportional to the distance along the scale."""
        if self.kind == "log":
            return np.log(np.maximum(values, self.low * 1e-9))
        return np.sign(values) * np.log1p(np.abs(values) / self.bend) if self.kind == "signed" else values

    def inverse(self, numbers: Any) -> Any:
        """Turn numbers that `forward` returned into values again."""
        if self.kind == "log":
            return np.exp(numbers)
        return np.sign(numbers) * np.expm1(np.abs(numbers)) * self.bend if self.kind == "signed" else numbers


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    decades = math.log10(high / low)
    steps = (1,) if decades > 4 else (1, 3) if decades > 2 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks = (float(f"{step}e{power}") for power in powers for step in steps)
    return tuple(tick for tick in ticks if low * 0.999 <= tick <= high * 1.001)


def is_band(frame: pd.DataFrame) -> bool:
    """Tell whether a map's cells are a band along its diagonal, so that a square around them is nearly empty.

    Args:
        frame: the map, with columns from and to.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.figures.map_scale import is_band
        >>> is_band(pd.DataFrame({"from": range(60), "to": range(4, 64)}))
        True
    """
    start, stop = frame["from"].to_numpy(int), frame["to"].to_numpy(int)
    if not len(frame):
        return False
    offsets = stop - start
    return bool(_BAND * (offsets.max() - offsets.min() + 1) <= start.max() - start.min() + 1)


def lowest_cells(frame: pd.DataFrame, column: str, count: int = 1, *, symmetric: bool = False) -> pd.DataFrame:
    """Return the cells with the lowest values: `count` on each side of the diagonal, of a symmetric map in all.

    Args:
        frame: the map, with columns from and to.
        column: the column to compare.
        count: number of cells.
        symmetric: whether a cell stands for both orders of its two blocks.

    Returns:
        The rows, those above the diagonal (from < to) first, each side in the order of the values. The diagonal and
        values that are not finite are not among them.

    Example:
        >>> import pandas as pd
        >>> from layersurgery.figures.map_scale import lowest_cells
        >>> frame = pd.DataFrame({"from": [0, 0, 1], "to": [1, 2, 0], "kl_nats": [0.3, 0.2, 0.4]})
        >>> lowest_cells(frame, "kl_nats")[["from", "to"]].to_numpy().tolist()
        [[0, 2], [1, 0]]
    """
    known = frame[np.isfinite(frame[column].to_numpy(float))].sort_values(column, kind="stable")
    above, below = known[known["from"] < known["to"]], known[known["from"] > known["to"]]
    if symmetric:
        return (above if len(above) else below).head(count)
    return pd.concat([above.head(count), below.head(count)])
