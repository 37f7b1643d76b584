"""Test the benchmarks: they notice wrong results, keep their results files, and all of them run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from benchmarks import plot_results, readout, sweep, timing
from benchmarks.peers import common

ROOT = Path(__file__).parents[2]


def make_result(**changed: float) -> dict[str, Any]:
    row = {"plan": "drop 1", "kl_nats": 1.0, "agreement": 0.5, "entropy_bits": 3.0, "loss_nats": 2.0}
    return {"rows": [row | changed], "tokens": 64, "seconds": 2.0, "version": "1"}


@pytest.mark.parametrize("metric", common.METRICS)
def test_a_method_with_a_wrong_metric_gets_no_speed(metric: str) -> None:
    layersurgery, by_hand = (
        sweep.Method("layersurgery", "with_layersurgery", "float32", sequences=1),
        sweep.Method("by hand", "with_transformers", "float32", sequences=1),
    )
    for wrong in (2.0 + 1e-2, float("nan")):
        runs = {
            layersurgery: sweep.MethodRuns(results=[make_result(**{metric: wrong})]),
            by_hand: sweep.MethodRuns(results=[make_result()]),
        }
        sweep._check_metrics(runs, {("float32", 1): runs[by_hand].results[-1]})
        assert runs[layersurgery].error.startswith(f"wrong result: {metric} of drop 1 is ")
        assert not runs[by_hand].error
        rows = sweep._make_rows(runs, sweep.Setting("m", 1, 64, 1, "cpu", 1))
        assert rows[0]["tokens_per_second"] is None
        assert rows[1]["tokens_per_second"] == 32


def test_only_selects_methods_by_name() -> None:
    methods = sweep.list_methods(["float32"], peers=True, sequences=1, slow_sequences=1)
    for only, names in {
        "limit,layersurgery": ["limit", "layersurgery"],
        "surgery": ["layersurgery", "layersurgery --compile"],
        "Trans,nnsight": ["TransformerLens 3", "nnsight 0.8"],
        "": [method.name for method in methods],
    }.items():
        assert [method.name for method in methods if sweep._is_selected(method.name, only, methods)] == names


def test_a_wrong_readout_is_noticed() -> None:
    x, w, target = torch.randn(5, 8), torch.randn(70, 8), torch.arange(5)
    method = "layersurgery, in tiles"
    assert readout._find_error(method, readout._dense(x, w, target), x, w, target) == ""
    assert "is off by" in readout._find_error(method, readout._dense(x + 0.01, w, target), x, w, target)


def test_the_dense_metrics_of_the_peers_are_the_definitions() -> None:
    from layersurgery.metrics.reference import METRICS, measure

    p, q, tokens = torch.randn(2, 9, 30), torch.randn(2, 9, 30), torch.randint(0, 30, (2, 9))
    values = common.metrics(common.log_probabilities(p), common.log_probabilities(q), tokens)
    expected = measure(p[:, :-1].flatten(0, 1), q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    for row, metric in enumerate(common.METRICS):
        torch.testing.assert_close(values[row].double(), expected[METRICS.index(metric)], rtol=1e-4, atol=1e-5)


def test_results_of_several_kinds_stay_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    timing.append_results("some", [{"way": "a", "seconds": 1.5}])
    path = timing.append_results("some", [{"way": "b", "seconds": 2, "more": "x"}])
    lines = path.read_text().splitlines()
    assert lines[0].startswith("date,way,seconds,")
    assert "more" in lines[0]
    assert len(lines) == 3


def test_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    rows = [
        {"model": "m", "way": way, "dtype": dtype, "edits": "swap,drop", "tokens_per_second": speed}
        for way, dtype, speed in (
            ("limit", "float32", 9.0),
            ("loop by hand", "float32", 3.0),
            ("layersurgery", "float32", 6.0),
        )
    ]
    path = timing.append_results(
        "sweep", [*rows, rows[2] | {"tokens_per_second": 7.5}, rows[2] | {"way": "broken", "tokens_per_second": None}]
    )
    newest = plot_results.read_newest(path, "m")
    assert {row["way"]: row["tokens_per_second"] for row in newest} == {
        "limit": "9.0",
        "loop by hand": "3.0",
        "layersurgery": "7.5",
    }
    figure = plot_results.plot_bars(newest)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "loop by hand, float32",
        "layersurgery, float32",
    ]
    assert "2.50x" in [text.get_text() for text in figure.axes[0].texts]
    plt.close(figure)
    with pytest.raises(SystemExit, match="has no speed for another"):
        plot_results.read_newest(path, "another")
    with pytest.raises(SystemExit, match="run python -m benchmarks sweep first"):
        plot_results.read_newest(tmp_path / "no.csv", "m")


@pytest.mark.weekly
def test_all_of_them_run_in_five_minutes() -> None:
    started = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "all", "--quick"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert time.monotonic() - started < 300
    for way in ("layersurgery --compile", "TransformerLens 3", "nnsight 0.8", "mergekit"):
        assert way in run.stdout
    assert "wrong result" not in run.stdout
