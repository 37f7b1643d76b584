"""Measure a run in this process and write its results, without a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layersurgery.runs.runner import measure_text

if TYPE_CHECKING:
    import pandas as pd


def run_measurement(*args: Any, draw: Any = None, **options: Any) -> pd.DataFrame:
    """Measure what is missing, write the results and return the table; arguments as for `measure_text`."""
    return measure_text(*args, **options)(draw)
