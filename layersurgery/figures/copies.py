"""Draw the entropy of models that pass several times through each block of a growing range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from ..plans.edits import parse_edit
from ..plans.families import FAMILIES
from ..registry import column
from .style import COLORS, disable_mathtext, label_depth, line, new_figure

if TYPE_CHECKING:
    from .sweeps import Sweep

COPIES = "copies"
"""Name of the figure."""


def copies(sweeps: Sequence[Sweep]) -> Figure:
    """Draw entropy in bits over the last block of the range of copied blocks: a line for each model and number.

    A dashed line is the entropy of the unedited model. The paper's later version shows such curves.
    """
    shown, family = column("entropy_bits"), FAMILIES["copy"]
    with new_figure(7.5, 4.2) as figure:
        axis = figure.subplots()
        tables, index = [], 0
        for sweep in sweeps:
            rows = sweep.frame[sweep.frame.edit == family.name].sort_values("layer")
            if rows.empty:
                continue
            tables.append(rows)
            names = np.array(family.lines(rows.plan, rows.layer, int(rows.depth.iloc[0])), dtype=str)
            for name, part in rows.groupby(names, sort=False):
                start = min(parse_edit(str(part.plan.iloc[0])).first_blocks(int(part.depth.iloc[0])))
                label = ", ".join(filter(None, [sweep.label, str(name), f"from block {start}"]))
                line(axis, part.relative_depth, part[shown.name], part[f"{shown.name}_sem"], index, label)
                index += 1
            for value in sweep.frame[sweep.frame.edit == "none"][shown.name][:1]:
                label = f"{sweep.label}, unedited" if len(sweeps) > 1 else "unedited model"
                color = COLORS[(index - 1) % len(COLORS)] if len(sweeps) > 1 else "#000000"
                axis.axhline(float(value), color=color, linestyle="--", linewidth=1, label=label)
        axis.set_ylabel(f"{shown.label} of the prediction ({shown.unit})")
        axis.set_ylim(bottom=0)
        label_depth(axis, tables, "last block of the range")
        disable_mathtext(axis.legend(fontsize=8).get_texts())
        captions = "; ".join(dict.fromkeys(sweep.caption for sweep in sweeps))
        figure.suptitle(
            f"Each block of a growing range is passed several times: {captions}", fontsize=9, parse_math=False
        )
    return figure
