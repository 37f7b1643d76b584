"""Format numbers, and draw bars and sparklines with block characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from layersurgery.registry import Column

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
BAR_WIDTH = 8


def number_cell(value: float, column: Column) -> str:
    """Return a number for a table cell, as its column is shown: scaled, rounded, and a change with its sign.

    A number of a column with a log scale that would be rounded to zero is shown as a power of ten: its order counts.
    """
    unit = " %" if column.unit == "%" and "%" not in column.heading else ""
    number = column.factor * value
    style = ".0e" if column.log and 0 < number < 0.5 * 10**-column.digits else f".{column.digits}f"
    return f"{number:{'+' if column.signed else ''}{style}}{unit}"


def bar_cell(value: float, maximum: float) -> str:
    """Return a bar for a table cell, drawn to an eighth of a character; empty for NaN or infinity."""
    if not (math.isfinite(value) and math.isfinite(maximum)) or maximum <= 0:
        return ""
    eighths = round(8 * BAR_WIDTH * max(0.0, value) / maximum)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def sparkline(values: Sequence[float], *, log: bool = False) -> str:
    """Return one block character per value, scaled from the minimum to the maximum; a dot for NaN or infinity."""
    scaled = [math.log(value) if log and value > 0 else math.nan if log else value for value in values]
    finite = [value for value in scaled if math.isfinite(value)]
    if not finite:
        return "·" * len(values)
    low, high = min(finite), max(finite)
    step = (high - low) or 1
    return "".join(_LEVELS[min(7, int(8 * (value - low) / step))] if math.isfinite(value) else "·" for value in scaled)
