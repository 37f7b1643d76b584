"""Which figures an analysis has, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from . import probes, pruning, subjoiners
from .signals import attention, lens, neurons, norms, similarity, stages
from .style import ModelTables, save

_MAKERS: dict[str, Callable[[Sequence[ModelTables]], Figure]] = {
    "stages": stages, "lens": lens, "attention": attention, "norms": norms, "neurons": neurons, "similarity": similarity,
}  # fmt: skip


def draw_signals(models: Sequence[ModelTables], directory: Path) -> list[Path]:
    """Draw all that the tables hold, as PNG and SVG; returns the files."""
    figures: dict[str, Figure] = {}
    for name, make in (_MAKERS | pruning.MAKERS | subjoiners.MAKERS | probes.MAKERS).items():
        some = [model for model in models if name in model.tables and len(model.tables[name])]
        if some:
            figures[name] = make(some)
    return save(figures, directory)
