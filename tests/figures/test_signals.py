"""Figures of analyses show the values of the tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import layersurgery as ls
from layersurgery.analyses.stage_boundaries import as_records, boundaries, stage_of
from layersurgery.figures import signals as figures
from layersurgery.figures.analyses import draw_signals
from layersurgery.figures.style import ModelTables, labeled_blocks
from tests.analyses.test_boundaries import L, planted
from tests.support.zoo import tiny_model, tokens


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    model, ids = tiny_model("gpt2"), tokens(3, 12)
    found = ls.analyses.measure(model, ids)
    return {**found, "neurons": ls.analyses.neurons(model), "stages": ls.analyses.stages(model, ids)}


def test_lines_are_columns(tables: dict[str, pd.DataFrame]) -> None:
    models = [ModelTables(tables, "one", "36 tokens"), ModelTables(tables, "other", "36 tokens")]
    for name, columns in (
        ("lens", {"lens_kl_nats": 1, "lens_entropy_bits": 1, "lens_agreement": 100}),
        ("attention", {"attention_prev5": 1, "attention_prev5_mean": 1}),
        ("norms", {"attention_norm": 1, "mlp_norm": 1, "attention_to_mlp_ratio": 1}),
    ):
        figure = getattr(figures, name)(models)
        for axis, (column, times) in zip(figure.axes, columns.items(), strict=True):
            assert len(axis.get_lines()) == 2
            np.testing.assert_allclose(np.asarray(axis.get_lines()[1].get_ydata(), float), times * tables[name][column])
            np.testing.assert_allclose(axis.get_lines()[1].get_xdata(), tables[name].relative_depth)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "other"]
    similar = figures.similarity(models[:1])
    rows = tables["similarity"][tables["similarity"].part == "mlp"]
    np.testing.assert_allclose(np.asarray(similar.axes[4].get_lines()[0].get_ydata(), float), rows["index"])


def test_stages_are_shaded_where_they_were_found() -> None:
    stage_boundaries = boundaries(planted())
    signals = planted()
    table = pd.DataFrame(
        {"layer": range(L), "relative_depth": np.arange(L) / (L - 1), "stage": stage_of(stage_boundaries, L)}
    )
    for name in ("drop_kl_nats", "attention_prev5", "lens_kl_nats", "lens_entropy_bits"):
        table[name], table[f"{name}_sem"] = signals[name], 0.0
    for name in ("mlp_norm", "attention_to_mlp_ratio"):
        table[name], table[f"{name}_sem"] = 1.0, 0.0
    for kind in ("prediction", "suppression"):
        table[f"{kind}_percent"] = signals[kind] / 10
    table.attrs["boundaries"] = as_records(stage_boundaries)
    top = figures.stages([ModelTables({"stages": table}, "planted", "no text")]).axes[0]
    spans = sorted(patch.get_x() for patch in top.patches)  # type: ignore[attr-defined]
    np.testing.assert_allclose(spans, [(layer - 0.5) / (L - 1) for layer in (0, 3, 12, 20)])
    assert {text.get_text() for text in top.texts} == {
        "detokenization", "feature engineering", "prediction ensembling", "residual sharpening",
    }  # fmt: skip
    line = next(line for line in top.get_lines() if str(line.get_label()).startswith("KL when the block is dropped"))
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), signals["drop_kl_nats"] / 6)
    two = figures.stages([ModelTables({"stages": table}, name, "no text") for name in ("a$x$", "b")])
    assert [axis.get_title(loc="left") for axis in two.axes] == ["a$x$", "b"]


def test_files_are_the_same_each_time_and_odd_tables_are_drawn(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    one = [ModelTables({name: tables[name] for name in ("stages", "lens")}, "a$b_$", "36 tokens of we$ird")]
    files = draw_signals(one, tmp_path)
    assert len(files) == 4
    before = {path: path.read_bytes() for path in files}
    assert {path: path.read_bytes() for path in draw_signals(one, tmp_path)} == before
    nothing = {name: table.copy() for name, table in tables.items()}
    for name, table in nothing.items():
        for column in table.select_dtypes("float").columns:
            table[column] = 0.0 if name == "norms" else np.nan
        table["relative_depth"] = tables[name].relative_depth
        table.attrs = tables[name].attrs
    assert len(draw_signals([ModelTables(nothing, "x", "y")] * 2, tmp_path)) == 12


def lens_of(depth: int) -> pd.DataFrame:
    layers = np.arange(depth)
    values = dict.fromkeys(("lens_kl_nats", "lens_entropy_bits", "lens_agreement"), layers / depth)
    errors = dict.fromkeys((f"{name}_sem" for name in values), 0.01)
    return pd.DataFrame({"layer": layers, "relative_depth": layers / (depth - 1), **values, **errors})


@pytest.mark.parametrize("depth", [2, 6, 30, 80, 126])
def test_blocks_of_one_depth_are_numbered(depth: int) -> None:
    figure = figures.lens([ModelTables({"lens": lens_of(depth)}, name, "no text") for name in ("one", "same depth")])
    for axis in figure.axes:
        labels = [text.get_text().split("\n") for text in axis.get_xticklabels()]
        blocks = [int(block) for block, _ in labels]
        assert blocks == labeled_blocks(depth - 1, 8)
        assert blocks[0] == 0
        assert blocks[-1] == depth - 1
        assert 2 <= len(blocks) <= 8
        np.testing.assert_allclose(axis.get_xticks(), np.array(blocks) / (depth - 1))
        np.testing.assert_allclose([float(relative) for _, relative in labels], axis.get_xticks(), atol=0.006)
        assert axis.get_xlabel() == "block (below: relative depth)"
        assert len(blocks) + len(axis.get_xticks(minor=True)) == depth


def test_models_of_several_depths_have_relative_depth_alone() -> None:
    figure = figures.lens([ModelTables({"lens": lens_of(depth)}, str(depth), "no text") for depth in (6, 30)])
    assert {axis.get_xlabel() for axis in figure.axes} == {"relative depth of the block"}
