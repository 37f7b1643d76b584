"""Numbers as bars and curves of block characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDTH = 8


def bar_cell(value: float, most: float) -> str:
    """A bar of eighths of a character."""
    if not (math.isfinite(value) and math.isfinite(most)) or most <= 0:
        return ""
    eighths = round(8 * _WIDTH * max(0.0, value) / most)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def sparkline(values: Sequence[float], *, log: bool = False) -> str:
    """A line of one block character a value, from the least to the greatest; a dot for what is no number."""
    scaled = [math.log(value) if log and value > 0 else math.nan if log else value for value in values]
    known = [value for value in scaled if math.isfinite(value)]
    if not known:
        return "·" * len(values)
    low, high = min(known), max(known)
    step = (high - low) or 1
    return "".join(_LEVELS[min(7, int(8 * (value - low) / step))] if math.isfinite(value) else "·" for value in scaled)
