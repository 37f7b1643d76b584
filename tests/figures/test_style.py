"""Axes have labels that can be read, and titles say what bands are."""

from __future__ import annotations

import pandas as pd

from layersurgery.figures.style import ModelTables, add_title_and_legend, line, new_figure


def test_a_short_logarithmic_axis_is_labelled_with_plain_numbers() -> None:
    with new_figure(4, 3) as figure:
        short, long = figure.subplots(1, 2)
        short.plot([0, 1], [0.03, 0.6])
        long.plot([0, 1], [1e-4, 1e3])
        for axis in (short, long):
            axis.set_yscale("log")
    figure.draw_without_rendering()
    labels = [[text.get_text() for text in axis.get_yticklabels()] for axis in (short, long)]
    assert {"0.05", "0.1", "0.2", "0.5"} <= set(labels[0])
    assert any("10^{-3}" in label for label in labels[1])


def test_the_title_names_bands_only_where_there_are_some() -> None:
    model = ModelTables({"lens": pd.DataFrame()}, "tiny", "10 tokens")
    for error, title in (([0.1, 0.2], "tiny: 10 tokens; bands: one standard error"), ([0, 0], "tiny: 10 tokens")):
        with new_figure(4, 3) as figure:
            axis = figure.subplots()
            line(axis, [0, 1], [1, 2], error, 0, "tiny")
            add_title_and_legend(figure, [model], axis)
        assert figure.get_suptitle() == title
        assert axis.get_legend_handles_labels()[1] == ["tiny"]
