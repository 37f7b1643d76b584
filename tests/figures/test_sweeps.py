"""Figures of sweeps show the values of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import layersurgery as ls
from layersurgery.figures.style import COLORS
from layersurgery.figures.sweeps import Sweep, draw, maps, plans, robustness, sweep_figures
from tests.support.zoo import tiny_model, tokens


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    edits: Any = ["swap,drop,skip-attention,skip-mlp,drop-span:2,swap-pairs", {"mine": "drop 1 3", "other": "repeat 2"}]
    return ls.sweep(tiny_model("llama"), edits, tokens(3))


def test_lines_are_the_columns_of_the_table(frame: pd.DataFrame) -> None:
    figure = robustness([Sweep.of(frame, "pydoc")])
    kinds = ["swap", "drop", "skip-attention", "skip-mlp", "drop-span"]
    grid = np.array(figure.axes).reshape(len(kinds), 3)
    assert [row[0].get_title(loc="left").split()[0] for row in grid] == ["swap", "drop", "skip", "skip", "drop"]
    for axes, kind in zip(grid, kinds, strict=True):
        rows = frame[frame.edit == kind]
        for axis, (metric, by) in zip(
            axes, [("kl_nats", 1), ("agreement", 100), ("entropy_change_bits", 1)], strict=True
        ):
            line = axis.get_lines()[0]
            assert line.get_color() == COLORS[0]
            np.testing.assert_allclose(line.get_xdata(), rows.layer / 5)
            np.testing.assert_allclose(line.get_ydata(), by * rows[metric])
            band = axis.collections[0].get_paths()[0].vertices
            assert band[:, 1].max() == pytest.approx((by * rows[f"{metric}_high"]).max())
        assert axes[1].get_ylabel() == "top-1 agreement (%)"
    labels = [text.get_text().partition("\n")[0] for text in grid[-1][0].get_xticklabels()]
    assert labels == ["0", "1", "2", "3", "4", "5"]
    assert figure.get_suptitle().startswith("LlamaForCausalLM: 33 tokens of pydoc in 3 sequences")
    assert figure.get_suptitle().endswith("; bands: 95 % intervals")


def test_several_sweeps_share_panels_and_a_legend(frame: pd.DataFrame) -> None:
    other = frame.assign(model="someone/other")
    figure = robustness([Sweep.of(frame, "pydoc"), Sweep.of(other, "pydoc")])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LlamaForCausalLM", "other"]
    assert len({line.get_marker() for line in figure.axes[0].get_lines()[:2]}) == 2


@pytest.mark.parametrize("earlier", [False, True])
def test_maps_and_plans(frame: pd.DataFrame, earlier: bool) -> None:
    table = frame.drop(columns=["from", "to"]) if earlier else frame
    figure = maps(Sweep.of(table, "pydoc"))["swap-pairs"]
    by_plan = frame[frame.edit == "swap-pairs"].set_index("plan")
    for axis, metric, factor in zip(
        figure.axes, ("kl_nats", "agreement", "loss_change_nats"), (1, 100, 1), strict=False
    ):
        square: Any = axis.get_images()[0].get_array()
        assert square[1, 4] == square[4, 1] == factor * by_plan[metric]["swap 1 4"]
    bars = plans(Sweep.of(frame, "pydoc")).axes[0]
    assert {label.get_text() for label in bars.get_yticklabels()} == {"mine", "other"}
    widths = [getattr(bar, "get_width")() for bar in bars.patches]  # noqa: B009 - patches are of many kinds
    assert sorted(widths) == sorted(frame[frame.edit == "plan"].kl_nats)


def test_files_are_drawn_and_the_same_each_time(frame: pd.DataFrame, tmp_path: Path) -> None:
    files = draw([Sweep.of(frame, "pydoc")], tmp_path)
    assert sorted(path.name for path in files) == [
        f"{name}.{kind}" for name in ("plans", "robustness", "swap-pairs") for kind in ("png", "svg")
    ]
    first = {path: path.read_bytes() for path in files}
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 800
                assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50
    assert draw([Sweep.of(frame, "pydoc")], tmp_path) == files
    assert {path: path.read_bytes() for path in files} == first


def test_one_sequence_has_no_band_and_is_drawn_all_the_same(tmp_path: Path) -> None:
    frame = ls.sweep(tiny_model("llama"), ["swap,drop", {"nothing": "swap 1 2; swap 1 2"}], tokens(1))
    assert frame.kl_nats_sem.isna().all()
    assert len(draw([Sweep.of(frame, "pydoc")], tmp_path)) == 4


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_nothing_that_a_logarithm_can_show(frame: pd.DataFrame, tmp_path: Path, value: float) -> None:
    flat = frame.assign(kl_nats=value, kl_nats_sem=value, model="a$b_$/c$d_$", name="$x_$")
    assert len(draw([Sweep.of(flat, "we$ird_$.txt"), Sweep.of(flat, "pydoc")], tmp_path)) == 10


def test_copied_layers_are_drawn_by_their_entropy(tmp_path: Path) -> None:
    frame = ls.sweep(tiny_model("llama"), "copy:1,copy:2", tokens(2), layers="1:6")
    figure = sweep_figures([Sweep.of(frame, "pydoc")])["copies"]
    (axis,) = figure.axes
    lines = {str(line.get_label()): line for line in axis.get_lines()}
    assert list(lines) == [
        "LlamaForCausalLM, 1 copy, from block 1",
        "LlamaForCausalLM, 2 copies, from block 1",
        "unedited model",
    ]
    rows = frame[frame.edit == "copy"]
    drawn: Any = lines["LlamaForCausalLM, 2 copies, from block 1"].get_ydata()
    np.testing.assert_allclose(drawn, rows.entropy_bits[5:])
    np.testing.assert_allclose(np.array(lines["unedited model"].get_ydata(), float), frame.entropy_bits[0])
    assert axis.get_ylabel() == "entropy of the prediction (bits)"
    both = sweep_figures([Sweep.of(frame, "pydoc"), Sweep.of(frame.assign(model="other"), "pydoc")])["copies"]
    assert len(both.axes[0].get_lines()) == 6
