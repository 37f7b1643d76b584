"""Draw subjoiner heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .style import ModelTables, add_title_and_legend, new_figure

_CLASSES = {1: "word of one token", 4: "word of four tokens"}
_MAX_CHARACTERS = 9


def subjoiners(models: Sequence[ModelTables]) -> Figure:
    """Draw the score of every head, by layer; the head shown in `examples` has a frame."""
    with new_figure(4.4 * len(models), 4.2) as figure:
        grid = figure.subplots(1, len(models), squeeze=False)[0]
        for axis, model in zip(grid, models, strict=True):
            table = model.tables["subjoiners"]
            matrix = table.pivot_table(index="layer", columns="head", values="score", dropna=False).astype(float)
            maximum = float(np.nanmax(np.abs(matrix.to_numpy())))
            axis.grid(visible=False)
            extent = (
                -0.5,
                int(matrix.columns.max()) + 0.5,
                int(matrix.index.min()) - 0.5,
                int(matrix.index.max()) + 0.5,
            )
            image = axis.imshow(
                matrix.reindex(range(int(matrix.index.min()), int(matrix.index.max()) + 1)),
                cmap="PuOr_r",
                vmin=-maximum,
                vmax=maximum,
                origin="lower",
                aspect="auto",
                extent=extent,
                interpolation="nearest",
            )
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
                image, label="attention to the word's first three tokens,\nminus attention to other text in their place"
            )
        add_title_and_legend(figure, models, grid[0], legend=False)
    return figure


def examples(models: Sequence[ModelTables]) -> Figure:
    """Draw what the last token of single windows attends to by the best head (figure 9); a row for each model."""
    with new_figure(15, 3.9 * len(models)) as figure:
        grid = figure.subplots(len(models), 2, squeeze=False)
        for axes, model in zip(grid, models, strict=True):
            table = model.tables["examples"]
            for axis, (size, label) in zip(axes, _CLASSES.items(), strict=True):
                rows = table[table.word_tokens == size]
                weights = rows.pivot_table(index="example", columns="back", values="attention").sort_index(
                    axis=1, ascending=False
                )
                texts = rows.pivot_table(index="example", columns="back", values="token", aggfunc="first").sort_index(
                    axis=1, ascending=False
                )
                axis.grid(visible=False)
                image = axis.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
                for (row, column), weight in np.ndenumerate(weights.to_numpy(float)):
                    axis.text(
                        column,
                        row,
                        _cell_text(str(texts.iat[row, column])),
                        ha="center",
                        va="center",
                        fontsize=6,
                        parse_math=False,
                        color="white" if weight > 0.6 else "black",
                    )
                if size > 1:
                    axis.axvline(weights.shape[1] - size - 0.5, color="black", linewidth=1)
                axis.set_xticks(range(weights.shape[1]), [f"−{back}" if back else "0" for back in weights.columns])  # noqa: RUF001
                axis.set_yticks(range(len(weights)), [str(row + 1) for row in weights.index])
                axis.set_xlabel("token position relative to the last")
                axis.set_ylabel("example")
                first = rows.iloc[0]
                prefix = f"{model.label}: " if len(models) > 1 else ""
                axis.set_title(
                    f"{prefix}layer {first.layer}, head {first['head']}: {label}", fontsize=10, parse_math=False
                )
            figure.colorbar(image, ax=axes, label="attention of the last token", fraction=0.02)
        add_title_and_legend(figure, models, grid[0][0], legend=False)
    return figure


def _cell_text(token: str) -> str:
    """Return the text of a token for a cell.

    Line breaks and tabs get a symbol, other unprintable characters a dot, and long texts are shortened.
    """
    shown = (
        "".join(
            {"\n": "⏎", "\t": "⇥"}.get(character, character if character.isprintable() else "·") for character in token
        ).strip(" ")
        or "␣"
    )
    return shown if len(shown) <= _MAX_CHARACTERS else f"{shown[: _MAX_CHARACTERS - 1]}…"
