"""Build the table of propagation, and summarize it in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..metrics.aggregation import SequenceSums, ratio
from ..plans.families import FAMILIES
from ..plans.variants import Variant

if TYPE_CHECKING:
    import pandas as pd

    from .propagation import Propagation

REMOVALS = ("drop", "skip-attention", "skip-mlp")
"""Families of which each edit removes something of one layer, so that layers can be compared."""


class Rows(list[dict[str, Any]]):
    """Rows of a table, for a frame's `attrs`; not to be changed.

    pandas makes a deep copy of `attrs` with every frame that it derives from another one. Of the tens of thousands of
    rows of a sweep over spans this takes a second, each time. These rows are shared instead.
    """

    def __deepcopy__(self, _memo: dict[int, Any]) -> Rows:
        return self


def propagation_rows(variants: Sequence[Variant], propagation: Propagation, sums: SequenceSums, model: str) -> Rows:
    """Return a row for each edit, later block and branch, with None for a value that is not known.

    Args:
        variants: the models; the unedited one has no rows.
        propagation: what was compared.
        sums: the measured sums.
        model: the model's name.
    """
    observed, rows = sums.observed, Rows()
    tokens = observed[:, 0]
    depth = len(variants[0].route)
    for variant in variants[1:]:
        for response in propagation.responses(variant.route):
            column = response.column
            mean, error = ratio(observed[:, column], tokens)
            largest = float(observed[:, column + 1].max())
            rows.append(
                {
                    "model": model,
                    "name": variant.name,
                    "plan": variant.plan,
                    "edit": variant.edit,
                    "from": variant.layer,
                    "to": response.block,
                    "position": response.position,
                    "part": response.part,
                    "depth": depth,
                    "change_mean": _known(mean),
                    "change_mean_sem": _known(error),
                    "change_max": _known(largest),
                    "tokens": int(tokens.sum()),
                    "sequences": len(sums),
                }
            )
    return rows


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def propagation_table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Build the table from its rows (`propagation_rows`, or a sweep's `frame.attrs["propagation"]`)."""
    import pandas as pd

    return pd.DataFrame(rows).astype(dict.fromkeys(("change_mean", "change_mean_sem", "change_max"), "float64"))


def propagation_sentence(rows: Sequence[dict[str, Any]]) -> str:
    """Say in a sentence how much later layers change after edits of the first and of the second half of the layers.

    Args:
        rows: rows of the table of propagation.

    Returns:
        Medians over pairs of an edited and a later layer, for each family of edits that removes something of one layer.
        Empty if no family has pairs in both halves.

    Example:
        >>> import layersurgery as ls
        >>> from layersurgery.sweeps.propagation_results import propagation_sentence
        >>> model, tokenizer = ls.load("smollm2-135m")
        >>> frame = ls.sweep(model, "drop", ["Layers add up."], tokenizer=tokenizer, propagation=True)
        >>> propagation_sentence(frame.attrs["propagation"])
        'edits of the first half of the layers change what later layers add by ... % (drop), those of the second ...'
    """
    if not rows:
        return ""
    frame = propagation_table(rows)
    medians = {}
    for edit in REMOVALS:
        of_edit = frame[frame.edit == edit]
        in_first = 2 * of_edit["from"] < of_edit.depth
        halves = [100 * of_edit.change_mean[half].median() for half in (in_first, ~in_first)]
        if all(map(math.isfinite, halves)):
            medians[FAMILIES[edit].label] = halves
    if not medians:
        return ""
    first, second = (
        ", ".join(f"{halves[half]:.0f} % ({label})" for label, halves in medians.items()) for half in (0, 1)
    )
    return (
        f"edits of the first half of the layers change what later layers add by {first}, those of the second half by "
        f"{second} (medians)"
    )
