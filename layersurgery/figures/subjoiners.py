"""Figures of subjoiner heads: tables in, matplotlib Figures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .style import ModelTables, add_title_and_legend, new_figure

_CLASSES = {1: "a word of one token", 4: "a word of four tokens"}
_LETTERS = 9


def subjoiners(models: Sequence[ModelTables]) -> Figure:
    """The score of every head, by layer; the head that is shown in `examples` is framed."""
    with new_figure(4.4 * len(models), 4.2) as figure:
        grid = figure.subplots(1, len(models), squeeze=False)[0]
        for axis, model in zip(grid, models, strict=True):
            table = model.tables["subjoiners"]
            square = table.pivot_table(index="layer", columns="head", values="score", dropna=False).astype(float)
            most = float(np.nanmax(np.abs(square.to_numpy())))
            axis.grid(visible=False)
            extent = (
                -0.5,
                int(square.columns.max()) + 0.5,
                int(square.index.min()) - 0.5,
                int(square.index.max()) + 0.5,
            )
            image = axis.imshow(
                square.reindex(range(int(square.index.min()), int(square.index.max()) + 1)),
                cmap="PuOr_r", vmin=-most, vmax=most, origin="lower", aspect="auto", extent=extent, interpolation="nearest",
            )  # fmt: skip
            best = table.loc[table.score_chosen.astype(float).idxmax()]
            axis.add_patch(
                Rectangle((best["head"] - 0.5, best.layer - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.2)
            )
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.yaxis.get_major_locator().set_params(integer=True)
            axis.set_xlabel("head")
            axis.set_ylabel("layer")
            if len(models) > 1:
                axis.set_title(model.label, loc="left", fontweight="bold", parse_math=False)
            figure.colorbar(
                image, label="attention to the word's first three tokens,\nless that to other text in their place"
            )
        add_title_and_legend(figure, models, grid[0], legend=False)
    return figure


def examples(models: Sequence[ModelTables]) -> Figure:
    """What the last token of single windows attends to by the best head, with the tokens themselves (figure 9); a row for each model."""
    with new_figure(15, 3.9 * len(models)) as figure:
        grid = figure.subplots(len(models), 2, squeeze=False)
        for axes, model in zip(grid, models, strict=True):
            table = model.tables["examples"]
            for axis, (size, words) in zip(axes, _CLASSES.items(), strict=True):
                rows = table[table.word_tokens == size]
                square = rows.pivot_table(index="example", columns="back", values="attention").sort_index(
                    axis=1, ascending=False
                )
                texts = rows.pivot_table(index="example", columns="back", values="token", aggfunc="first").sort_index(
                    axis=1, ascending=False
                )
                axis.grid(visible=False)
                image = axis.imshow(square, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
                for (row, column), weight in np.ndenumerate(square.to_numpy(float)):
                    axis.text(
                        column, row, _short(str(texts.iat[row, column])), ha="center", va="center", fontsize=6, parse_math=False,
                        color="white" if weight > 0.6 else "black",
                    )  # fmt: skip
                if size > 1:
                    axis.axvline(square.shape[1] - size - 0.5, color="black", linewidth=1)
                axis.set_xticks(range(square.shape[1]), [f"−{back}" if back else "0" for back in square.columns])  # noqa: RUF001
                axis.set_yticks(range(len(square)), [str(row + 1) for row in square.index])
                axis.set_xlabel("token, counted back from the last")
                axis.set_ylabel("example")
                first = rows.iloc[0]
                whose = f"{model.label}: " if len(models) > 1 else ""
                axis.set_title(
                    f"{whose}layer {first.layer}, head {first['head']}: {words}", fontsize=10, parse_math=False
                )
            figure.colorbar(image, ax=axes, label="attention of the last token", fraction=0.02)
        add_title_and_legend(figure, models, grid[0][0], legend=False)
    return figure


def _short(token: str) -> str:
    """A token in a cell: line breaks shown, other unseen characters marked, the rest of a long one left out."""
    shown = (
        "".join({"\n": "⏎", "\t": "⇥"}.get(sign, sign if sign.isprintable() else "·") for sign in token).strip(" ")
        or "␣"
    )
    return shown if len(shown) <= _LETTERS else f"{shown[: _LETTERS - 1]}…"


MAKERS: dict[str, Callable[[Sequence[ModelTables]], Figure]] = {"subjoiners": subjoiners, "examples": examples}
