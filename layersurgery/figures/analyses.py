"""List the figures of the analyses, and write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from . import probes, pruning, subjoiners
from .signals import attention, lens, neurons, norms, similarity, stages
from .style import ModelTables, save

_MAKERS: dict[str, Callable[[Sequence[ModelTables]], Figure]] = {
    "stages": stages,
    "lens": lens,
    "attention": attention,
    "norms": norms,
    "neurons": neurons,
    "similarity": similarity,
}


def draw_signals(models: Sequence[ModelTables], directory: Path) -> list[Path]:
    """Draw all figures that the tables allow, as PNG and SVG, and return the files."""
    figures: dict[str, Figure] = {}
    for name, maker in (_MAKERS | pruning.MAKERS | subjoiners.MAKERS | probes.MAKERS).items():
        with_table = [model for model in models if name in model.tables and len(model.tables[name])]
        if with_table:
            figures[name] = maker(with_table)
    return save(figures, directory)
