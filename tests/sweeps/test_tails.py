"""A sweep's tails, against the predictions of each edited model, all at once."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import layersurgery as ls
from layersurgery.figures.sweeps import Sweep, sweep_figures
from layersurgery.metrics.reference import measure, measure_tails
from layersurgery.metrics.tails import KL_ERROR
from layersurgery.registry import KL_QUANTILES, METRICS, TAILS
from layersurgery.reports.tables import tails_of
from tests.support.reference import logits_of
from tests.support.zoo import tiny_model, tokens

NAMES = [one.name for one in TAILS]


def sweep(name: str = "llama", **options: Any) -> pd.DataFrame:
    return ls.sweep(tiny_model(name), "drop,skip-mlp", tokens(5, 12), tails=True, **options).to_pandas()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_columns_are_those_of_all_predictions(name: str) -> None:
    model, ids = tiny_model(name), tokens(5, 12)
    frame = sweep(name)
    p, target = logits_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    for _, row in frame.iterrows():
        with ls.operate(model, ls.Route.parse(row.route)):
            q = logits_of(model, ids)[:, :-1].flatten(0, 1)
        kl = measure(p, q, target)[0].numpy()
        change, overlap, confidence = measure_tails(p, q, target).numpy()
        for column, share in KL_QUANTILES.items():
            meant = np.quantile(kl, share, method="inverted_cdf")
            assert row[column] == pytest.approx(meant, rel=KL_ERROR + 1e-4, abs=1e-6), (row.plan, column)
        assert row.kl_nats_max == pytest.approx(kl.max(), abs=1e-5)
        assert row.probability_change_rms == pytest.approx(math.sqrt((change**2).mean()), abs=1e-6)
        assert row.top5_overlap == pytest.approx(overlap.mean(), abs=1e-9)
        assert 0 < row.calibration_error < 1
        correct = (q.argmax(-1) == target).numpy()
        bins = np.ceil(15 * confidence)
        meant = sum(abs(confidence[bins == one].sum() - correct[bins == one].sum()) for one in set(bins)) / len(kl)
        assert row.calibration_error == pytest.approx(meant, abs=1e-6)
    one = ls.compare(model, "drop 2", ids, tails=True, per_token=True)
    of_sweep = frame[frame.plan == "drop 2"].iloc[0]
    assert {name: one.metrics[name] for name in NAMES} == pytest.approx(of_sweep[NAMES].to_dict(), abs=1e-5)
    assert one.top5_overlap == one.metrics["top5_overlap"]
    assert one.positions is not None
    assert one.positions.top5_overlap.mean() == pytest.approx(one.top5_overlap)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_changes_no_more_than_rounding(batch_size: int) -> None:
    pd.testing.assert_frame_equal(sweep(batch_size=batch_size)[NAMES], sweep()[NAMES], check_exact=False, atol=1e-6)


def test_tails_change_nothing_else_and_padding_does_not_count() -> None:
    frame = sweep()
    plain = ls.sweep(tiny_model("llama"), "drop,skip-mlp", tokens(5, 12))
    assert not set(NAMES) & set(plain)
    pd.testing.assert_frame_equal(frame[list(plain)], plain.to_pandas(), check_exact=True)
    assert frame.loc[0, NAMES].tolist() == [*[0.0] * 6, 1.0, frame.calibration_error[0]]
    padded = torch.cat([tokens(5, 12), torch.zeros(5, 3, dtype=torch.long)], 1)
    mask = (torch.arange(15) < 12).long().expand(5, 15)
    other = ls.sweep(tiny_model("llama"), "drop,skip-mlp", padded, attention_mask=mask, tails=True)
    pd.testing.assert_frame_equal(other.to_pandas()[NAMES], frame[NAMES], check_exact=False, atol=1e-6)


def test_a_run_without_tails_is_not_continued_with_them(tmp_path: Path) -> None:
    ls.sweep(tiny_model("llama"), "drop", tokens(3), directory=tmp_path)
    with pytest.raises(ls.OutputError, match="tails"):
        ls.sweep(tiny_model("llama"), "drop", tokens(3), directory=tmp_path, tails=True)
    assert tails_of(ls.read_results(tmp_path)).empty


@pytest.mark.slow
def test_the_report_has_a_table_of_them(tmp_path: Path) -> None:
    frame = ls.sweep(tiny_model("llama"), "drop", tokens(3), directory=tmp_path, tails=True)
    assert {"tails.png", "tails.svg"} <= set(frame.attrs["run"]["figures"])
    page = html.unescape(ls.report(tmp_path, tmp_path).path.read_text())
    assert "LlamaForCausalLM: tails" in page
    for column in TAILS:
        assert page.count(column.label) > 1, column.name


def test_lines_are_the_columns_of_the_table() -> None:
    frame = sweep()
    figure = sweep_figures([Sweep.of(frame, "pydoc")])["tails"]
    left, right, *_ = figure.axes
    rows = frame[frame.edit == "drop"]
    columns = [METRICS[0].name, *(one.name for one in TAILS if one.unit == "nats")]
    for line, name in zip(left.get_lines(), columns, strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata(), float), rows[name])
    shares = ["agreement", *(one.name for one in TAILS if one.unit == "%")]
    for line, name in zip(right.get_lines(), shares, strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata(), float), 100 * rows[name])
    assert len(figure.legends[0].get_texts()) == len(columns) + len(shares)
    assert "tails" not in sweep_figures([Sweep.of(frame.drop(columns=NAMES), "pydoc")])
