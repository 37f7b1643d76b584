"""Figures of tasks show the values of the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import layersurgery as ls
from layersurgery.figures.sweeps import Sweep, draw, sweep_figures
from layersurgery.figures.tasks import tasks_over_depth
from layersurgery.registry import column, first_metrics
from layersurgery.tasks.task_sentences import task_sentences
from tests.support.zoo import tiny_model, tokens


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """A sweep with the columns of two tasks, one with an accuracy and one whose metric is no mean over documents."""
    frame = ls.sweep(tiny_model("llama"), "swap,drop,swap-pairs", tokens(3)).to_pandas()
    values = np.random.default_rng(0).uniform(0.2, 0.8, len(frame))
    change = {"": 0.0, "_sem": 0.02, "_low": -0.05, "_high": 0.05}
    return frame.assign(
        task_arc_easy_acc=values,
        task_arc_easy_acc_sem=0.05,
        **{
            f"task_arc_easy_acc_change{end}": (values - values[0]) * (end != "_sem") + offset
            for end, offset in change.items()
        },
        task_arc_easy_acc_norm=values / 2,
        task_arc_easy_acc_norm_sem=0.05,
        task_text_byte_perplexity=np.exp(10 * values),
        task_text_byte_perplexity_sem=0.1,
    )


def test_lines_and_bands_are_the_columns_of_the_table(frame: pd.DataFrame) -> None:
    assert first_metrics(frame) == ["task_arc_easy_acc", "task_text_byte_perplexity"]
    figure = tasks_over_depth([Sweep.of(frame, "arc_easy")])["tasks"]
    grid = np.array(figure.axes).reshape(2, 2)
    base = frame[frame.edit == "none"].iloc[0]
    for axes, kind in zip(grid, ("swap", "drop"), strict=True):
        rows = frame[frame.edit == kind].sort_values("layer")
        for axis, metric in zip(axes, first_metrics(frame), strict=True):
            unedited, line = axis.get_lines()
            np.testing.assert_allclose(unedited.get_ydata(), base[metric])
            np.testing.assert_allclose(line.get_xdata(), rows.layer / 5)
            np.testing.assert_allclose(line.get_ydata(), rows[metric])
        assert [axis.get_ylabel() for axis in axes] == ["accuracy on arc_easy", "task text_byte_perplexity"]
        band = axes[0].collections[0].get_paths()[0].vertices
        assert band[:, 1].max() == pytest.approx(
            min(1, (base.task_arc_easy_acc + rows.task_arc_easy_acc_change_high).max())
        )
    assert grid[0][1].get_yscale() == "log"


def test_several_models_share_panels_and_maps_have_their_own_figure(frame: pd.DataFrame, tmp_path: Path) -> None:
    sweeps = [Sweep.of(frame, "arc_easy"), Sweep.of(frame.assign(model="someone/other"), "arc_easy")]
    figures = sweep_figures(sweeps)
    assert len(figures["tasks"].axes[0].get_lines()) == 4
    labels = [text.get_text() for text in figures["tasks"].legends[0].get_texts()]
    assert labels == ["LlamaForCausalLM, unedited", "LlamaForCausalLM", "other, unedited", "other"]
    assert {"tasks-swap-pairs-1", "tasks-swap-pairs-2"} <= set(figures)
    image = figures["tasks-swap-pairs-1"].axes[0].get_images()[0].get_array()
    pair = frame[frame.plan == "swap 1 4"].iloc[0]
    assert image is not None
    assert pair.task_arc_easy_acc_change in np.asarray(image)
    assert tmp_path / "tasks.png" in draw(sweeps[:1], tmp_path)
    assert not tasks_over_depth([Sweep.of(frame[["model", "edit", "tokens", "sequences"]], "pydoc")])


def test_the_words_name_the_best_and_the_worst_edit(frame: pd.DataFrame) -> None:
    sentences = task_sentences(frame)
    edited = frame[frame.edit != "none"]
    best = edited.loc[edited.task_arc_easy_acc.idxmax()]
    assert f"is highest with {best['name']} ({best.task_arc_easy_acc:.3g}; change " in sentences[0]
    assert sentences[1].startswith("task text_byte_perplexity is ")
    assert task_sentences(frame[["edit", "name"]]) == []
    assert column("task_arc_easy_acc_change").label == "change in accuracy on arc_easy"
