"""Draw what a model loses without neurons of one kind, and without random ones."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..registry import NEURON_KINDS, column
from .style import ModelTables, add_title_and_legend, label_axis, label_depth, line, new_figure

_PANELS = tuple(map(column, ("kl_nats", "entropy_change_bits", "loss_change_nats")))


def ablation(models: Sequence[ModelTables]) -> Figure:
    """Draw KL, change in entropy and change in loss over the block whose neurons are off: a row for each model.

    Lines are neurons of one kind, dashed lines as many random neurons of the same block.
    """
    with new_figure(4.2 * len(_PANELS), 3.6 * len(models)) as figure:
        grid = figure.subplots(len(models), len(_PANELS), squeeze=False)
        for axes, model in zip(grid, models, strict=True):
            table = model.tables["ablate-neurons"]
            table = table[table.layer.notna()]
            for axis, shown in zip(axes, _PANELS, strict=True):
                for index, kind in enumerate(NEURON_KINDS):
                    rows = table[table.kind == kind]
                    for name, label, style in (
                        (shown.name, f"{kind} neurons off", {}),
                        (f"{shown.name}_random", f"as many random ones as {kind}", {"linestyle": "--", "alpha": 0.6}),
                    ):
                        line(axis, rows.relative_depth, rows[name], rows[f"{name}_sem"], index, label, **style)
                if shown.log:
                    axis.set_yscale("log", nonpositive="mask")
                label_axis(axis, shown)
                label_depth(axis, [table], "block")
            if len(models) > 1:
                axes[0].set_title(model.label, loc="left", fontsize=9, parse_math=False)
        add_title_and_legend(figure, models, grid[0, 0], legend=False)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return figure
