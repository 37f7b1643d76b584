"""Kinds of layers are named, stand in the tables of edits and of signals, and are marked in figures."""

from __future__ import annotations

import numpy as np
import pytest

import layersurgery as ls
from layersurgery.figures import signals as signal_figures
from layersurgery.figures.style import ModelTables
from layersurgery.figures.sweeps import Sweep, robustness
from layersurgery.models.anatomy import anatomy
from layersurgery.models.layer_kinds import layer_kinds
from layersurgery.reports.charts import _line
from tests.support.zoo import tiny_model, tokens

FULL, SLIDING = "full attention", "sliding attention"


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", []),
        ("mixtral", []),
        ("falcon_h1", []),
        ("gemma3_text", [SLIDING, SLIDING, FULL] * 2),
        ("gpt_neo", ["global", "local"] * 3),
        ("smollm3", [*["rotary embedding"] * 2, "no rotary embedding"] * 2),
        ("recurrent_gemma", ["linear attention", "linear attention", SLIDING] * 2),
        ("deepseek_v3", [*["dense MLP"] * 2, *["experts"] * 4]),
        ("lfm2_moe", ["conv, dense MLP", f"{FULL}, dense MLP", *["conv, experts", f"{FULL}, experts"] * 2]),
    ],
)
def test_kinds_of_layers_are_named(name: str, kinds: list[str]) -> None:
    model = tiny_model(name)
    assert list(layer_kinds(model, anatomy(model))) == kinds


def test_a_sweep_has_them_and_its_figure_marks_the_rarer_kind() -> None:
    frame = ls.sweep(tiny_model("gemma3_text"), "swap,drop,drop-span:2", tokens(2))
    assert frame[frame.edit.isin(["none", "drop-span"])].layer_kind.isna().all()
    by_edit = {edit: list(part.layer_kind) for edit, part in frame.groupby("edit")}
    assert by_edit["drop"] == [SLIDING, SLIDING, FULL] * 2
    pairs = [SLIDING, f"{SLIDING} + {FULL}", f"{FULL} + {SLIDING}"] * 2
    assert by_edit["swap"] == pairs[:5]
    figure = robustness([Sweep.of(frame, "pydoc")])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [FULL]
    dropped = frame[frame.edit == "drop"]
    values, marks = figure.axes[3].get_lines()[:2]
    np.testing.assert_allclose(np.asarray(values.get_ydata(), float), dropped.kl_nats)
    np.testing.assert_allclose(np.asarray(marks.get_xdata(), float), [2 / 5, 1])
    np.testing.assert_allclose(np.asarray(marks.get_ydata(), float), dropped.kl_nats.iloc[[2, 5]])
    names = _line(dropped, "tiny", ["kl_nats"])["name"]
    assert names[1:3] == [f"drop 1 ({SLIDING})", f"drop 2 ({FULL})"]


def test_models_of_one_kind_have_no_such_column_or_mark() -> None:
    frame = ls.sweep(tiny_model("llama"), "drop", tokens(2))
    assert "layer_kind" not in frame
    figure = robustness([Sweep.of(frame, "pydoc")])
    assert not figure.legends
    assert len(figure.axes[0].get_lines()) == 1


def test_stages_have_them() -> None:
    model, ids = tiny_model("gemma3_text"), tokens(3, 14)
    stages = ls.analyses.stages(model, ids)
    assert list(stages.layer_kind) == [SLIDING, SLIDING, FULL] * 2
    assert "drop KL (4 of 6 layers: sliding attention)" in stages.attrs["boundaries"][0]["why"]
    one = ModelTables({"stages": stages}, "tiny", "42 tokens")
    labels = [text.get_text() for text in signal_figures.stages([one]).axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels[-1] == FULL
    other = ls.analyses.lens(tiny_model("llama"), ids)
    both = [
        ModelTables({"lens": table}, name, "") for name, table in (("a", other), ("b", ls.analyses.lens(model, ids)))
    ]
    figure = signal_figures.lens(both)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", FULL]
    assert [len(line.get_xdata()) for line in figure.axes[0].get_lines()] == [6, 6, 2]  # type: ignore[arg-type]
