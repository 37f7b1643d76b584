"""Smooth a signal over depth, and fit two lines to it, so that no single layer decides the result.

A robust loss, such as least absolute deviations over all bends, does not suffice for the lines: a first line through
only the first two layers absorbs an outlying first layer at no cost, whatever the loss. So the layer that fits worst is
left out instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..metrics.aggregation import Array

MIN_LAYERS = 6


def smooth(values: Array) -> Array:
    """Return the running median of three layers; the first and the last follow the trend of their neighbors.

    An end is the median of its value, its neighbor's median, and the line through the two medians next to it
    (Tukey's rule of end points), so that an end counts only if its neighbors lead to it.

    Args:
        values: the signal, (layers,).
    """
    if len(values) < 3:
        return values
    inner = np.median(np.stack([values[:-2], values[1:-1], values[2:]]), 0)
    if len(inner) < 2:
        return np.full(3, inner[0])
    first = np.median([values[0], inner[0], 3 * inner[0] - 2 * inner[1]])
    last = np.median([values[-1], inner[-1], 3 * inner[-1] - 2 * inner[-2]])
    return np.concatenate([[first], inner, [last]])


@dataclass(frozen=True, slots=True)
class Bend:
    """Hold two straight lines that meet at a layer.

    Attributes:
        layer: the layer where they meet.
        height: the value of both lines there.
        first_slope: slope of the first line, for each layer.
        second_slope: slope of the second line.
        left_out: the layer that is left out.
        share: share of one line's squared error that the two lines leave; 1 if one line fits exactly. One layer is left
            out of that line, too.
    """

    layer: int
    height: float
    first_slope: float
    second_slope: float
    left_out: int
    share: float


def fit_bend(values: Array) -> Bend:
    """Fit two lines that meet at a layer by least squares, without the layer that fits worst.

    The bend and the layer left out are those with the lowest squared error of all. Two layers or more are before the
    bend, and three or more after it.

    Args:
        values: the signal, (layers,), with at least `MIN_LAYERS` layers.
    """
    bends, designs, residual_makers = _designs(len(values))
    residuals = residual_makers @ values
    # Without a layer, the squared error of a least-squares fit is lower by r^2 / (1 - h), h being its leverage.
    freedom = np.diagonal(residual_makers, axis1=1, axis2=2)
    gains = np.where(freedom > 1e-9, residuals**2 / np.maximum(freedom, 1e-9), 0)
    errors = (residuals**2).sum(1) - gains.max(1)
    best = 1 + int(errors[1:].argmin())
    left_out = int(gains[best].argmax())
    kept = np.arange(len(values)) != left_out
    height, first, second = np.linalg.lstsq(designs[best][kept], values[kept], rcond=None)[0].tolist()
    rounding = 1e-12 * float((values**2).sum())
    share = float(errors[best] / errors[0]) if errors[0] > rounding else 1.0
    return Bend(int(bends[best]), height, first, second, left_out, share)


@lru_cache(maxsize=8)
def _designs(depth: int) -> tuple[Array, Array, Array]:
    """Return the layers of the bends, the designs of the fits, and the matrices that make residuals of values.

    The first is that of one line; its design has a column of zeros.
    """
    layers = np.arange(depth, dtype=float)
    bends = np.array([0, *range(2, depth - 3)], dtype=float)
    from_bend = layers - bends[:, None]
    designs = np.stack([np.ones_like(from_bend), np.minimum(0, from_bend), np.maximum(0, from_bend)], -1)
    return bends, designs, np.eye(depth) - designs @ np.linalg.pinv(designs)
