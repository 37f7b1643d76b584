"""Test the benchmarks: they notice wrong results, keep their results files, and all of them run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

import layersurgery as ls
from benchmarks import (
    gpu,
    plot_results,
    propagation,
    readout,
    readout_variants,
    startup,
    stopping,
    sweep,
    tasks,
    timing,
)
from benchmarks.peers import common
from layersurgery.metrics.reference import METRICS
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import tiny_model, tokens

ROOT = Path(__file__).parents[2]


def make_result(**changed: float) -> dict[str, Any]:
    row = {"plan": "drop 1", "kl_nats": 1.0, "agreement": 0.5, "entropy_bits": 3.0, "loss_nats": 2.0}
    return {"rows": [row | changed], "tokens": 64, "seconds": [2.0], "version": "1"}


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
        sweep._check_metrics(runs, {("float32", 1): runs[by_hand]})
        assert runs[layersurgery].error.startswith(f"wrong result: {metric} of drop 1 is ")
        assert not runs[by_hand].error
        rows = sweep._make_rows(runs, sweep.Setting("m", 1, 64, 1, "cpu", 1))
        assert rows[0]["tokens_per_second"] is None
        assert rows[1]["tokens_per_second"] == 32


def test_a_method_that_cannot_be_checked_gets_no_speed() -> None:
    method = sweep.Method("layersurgery", "with_layersurgery", "float32", sequences=1)
    runs = {method: sweep.MethodRuns(results=[make_result()])}
    sweep._check_metrics(runs, {("float32", 1): sweep.MethodRuns(error="no compiler")})
    rows = sweep._make_rows(runs, sweep.Setting("m", 1, 64, 1, "cpu", 1))
    assert rows[0]["fault"] == "not checked, because the loop by hand failed: no compiler"
    assert rows[0]["tokens_per_second"] is None
    with pytest.raises(SystemExit, match="layersurgery: not checked"):
        sweep.require_no_fault(rows)
    sweep.require_no_fault([{"way": "layersurgery, fused", "fault": "it is for half precision on CUDA"}])


def test_only_selects_methods_by_name() -> None:
    methods = sweep.list_methods(["float32"], peers=True, sequences=1, slow_sequences=1)
    for only, names in {
        "limit,layersurgery": ["limit", "layersurgery"],
        "surgery": ["layersurgery", "layersurgery --compile", "layersurgery drops"],
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


def run_python(code: str, seconds: float = 60) -> tuple[list[dict[str, Any]], str]:
    """Run code in place of a module."""
    return gpu.run_process(["timeit", "-n", "1", "-r", "1", code], seconds)


def test_a_process_that_fails_costs_its_later_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    row = 'print(\'{"variant": "a"}\', flush=True)'
    assert run_python(row)[0] == [{"variant": "a"}]
    found, fault = run_python(f"{row}; print('{{'); raise ValueError('an illegal access')")
    assert found == [{"variant": "a"}]
    assert fault == "exit code 1: ValueError: an illegal access"
    assert run_python(row, 19)[1] == "no time was left"
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 0)
    started = time.monotonic()
    found, fault = run_python(f"{row}; import time; time.sleep(60)", 2)
    assert (found, fault) == ([{"variant": "a"}], "stopped after 2 s")
    assert time.monotonic() - started < 20


def test_faults_of_variants_and_parts_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"tokens": 8192, "width": 2048, "vocabulary": 50304, "tiling": "", "teraflops": 700.0}
    rows = {
        "product alone": [shape | {"milliseconds": 2.0}],
        "fused": [shape | {"milliseconds": 2.5}, shape | {"fault": "OutOfMemoryError: 2 GiB"}],
        "whole measure": [shape | {"milliseconds": 3.0, "bytes_extra": 70 << 20, "fault": "wrong result: kl is 1"}],
        "Liger": [],
    }

    def process(command: Sequence[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
        if command[0] == "benchmarks.observe":
            raise OSError("no process")
        found = [{"variant": command[1], **row} for row in rows.get(command[1], [])]
        return found, "" if found else "exit code 1"

    monkeypatch.setattr(gpu, "run_process", process)
    settings = gpu.Settings(directory=tmp_path, only="product alone,fused,whole measure,Liger", dry=True)
    failed = gpu.measure(["observe", "readout"], settings)
    assert failed == [
        "observe: OSError: no process",
        "readout, fused: OutOfMemoryError: 2 GiB",
        "readout, whole measure: wrong result: kl is 1",
        "readout, whole measure, soft-cap: exit code 1",
    ]
    said = " ".join(capsys.readouterr().out.split())
    for text in ("8192 x (2048, 50304) fused 2.500 0.80 700", "0.80 │ >= 0.8", "70.00 MiB │ <= 64 MiB", "Liger: exit"):
        assert text in said.replace("┃", "│").replace(" │ 2.5", " 2.5").replace("│ 0.80 │ 700", "0.80 700")
    written = (tmp_path / "gpu-readout.csv").read_text().splitlines()
    assert len(written) == 1 + 6


def test_what_does_not_fit_into_the_time_is_named_and_is_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = gpu.Settings(minutes=0.1, directory=tmp_path, only="fused", dry=True)
    assert gpu.measure(["readout", "small", "offloaded", "observe"], settings) == []
    said = capsys.readouterr().out
    assert "fused: 1 rows, no time was left" in said
    assert "small: left out, since --only selects none of its methods" in said


def test_a_goal_is_met_or_not() -> None:
    report = gpu.Report("GPU")
    report.add("share", 0.8, 0.8)
    report.add("share", 0.79, 0.8)
    report.add("time", 2.0, 1.5, unit=" min", at_most=True)
    report.add("time", None, 1.5, unit=" min", at_most=True)
    report.add("change", 1e-3, 0, at_most=True)
    report.goals.append(("ratio", "2.10", "", None))
    assert [met for *_, met in report.goals] == [True, False, False, False, False, None]
    measured = [measured for _, measured, _, _ in report.goals]
    assert measured == ["0.80", "0.79", "2.00 min", "not measured", "1.0e-03", "2.10"]
    assert [*report.table(dry=False).columns[3].cells] == ["yes", "no", "no", "no", "no", ""]


def test_a_sweep_does_nothing_twice_before_its_first_number(tmp_path: Path) -> None:
    """Modules that only the results need are not imported yet, and files are read once."""
    command = [sys.executable, "-m", "benchmarks.first_number", "layersurgery", "sweep"]
    model, output = str(checkpoint(tmp_path / "tiny")), str(tmp_path / "out")
    text = ["--data", "pydoc", "--tokens", "64", "--context", "64"]
    done = subprocess.run([*command, model, *text, "-o", output], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    once = {"config", "hash of the weights", "tokenizer", "text", "weights", "checks", "first number"}
    assert {phase: count for phase, count in facts["calls"].items() if phase != "imports"} == dict.fromkeys(once, 1)
    assert not {"pandas", "pyarrow", "datasets", "matplotlib", "sklearn"} & set(facts["modules"])
    assert set(facts["seconds"]) == once | {"imports", "other"}


@pytest.mark.slow
def test_the_time_to_the_first_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    rows = startup.measure(1, str(checkpoint(tmp_path / "tiny")), 64)
    total = {row["way"]: row["cpu_seconds"] for row in rows if row["phase"] == "total"}
    assert list(total)[:2] == [startup.FLOOR, startup.SWEEP]
    assert max(total["layersurgery --help"], total["layersurgery drop --help"]) < total[startup.FLOOR]
    for way in (startup.FLOOR, startup.SWEEP):
        phases = sum(row["cpu_seconds"] for row in rows if row["way"] == way and row["phase"] != "total")
        assert 0.9 * total[way] < phases <= total[way]
    assert len((tmp_path / "startup.csv").read_text().splitlines()) == 1 + len(rows)


def test_a_first_number_that_differs_is_noticed() -> None:
    startup.check_same_loss([{"loss_nats": 2.0}, {"loss_nats": 2.0001}])
    for wrong in (2.1, float("nan")):
        with pytest.raises(SystemExit, match="wrong result: the losses"):
            startup.check_same_loss([{"loss_nats": 2.0}, {"loss_nats": wrong}])


@pytest.mark.weekly
def test_the_whole_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry", "-o", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = {path.stem: list(csv.DictReader(path.open())) for path in tmp_path.glob("*.csv")}
    assert set(rows) == {"gpu-readout", "gpu-small", "gpu-large", "gpu-offloaded", "gpu-observe"}
    faults = {
        row.get("variant") or row["way"]: row["fault"] for part in rows.values() for row in part if row.get("fault")
    }
    assert set(faults) == {"cut-cross-entropy", "Liger"}  # they are not installed
    variants = {row["variant"] for row in rows["gpu-readout"] if row["milliseconds"]}
    assert variants | set(faults) == set(readout_variants.VARIANTS)
    assert [row["way"] for row in rows["gpu-small"]] == [
        "limit",
        "layersurgery",
        "loop by hand",
        "layersurgery --compile",
    ]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows["gpu-small"] + rows["gpu-offloaded"])


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


@pytest.mark.parametrize(("of", "order"), [("propagation", "layer-major"), ("tails", "depth-first")])
def test_what_propagation_costs_is_measured_in_pairs(
    of: str, order: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["propagation", "tiny", "--of", of, "--sequences", "1", "--context", "32", "--pairs", "1"]
    monkeypatch.setattr(sys, "argv", given)
    propagation.main()
    row = json.loads(capsys.readouterr().out)
    assert (row["tokens"], row["block_calls"], row["order"]) == (32, 10, order)
    assert row["ratio"] == row["ratio_lowest"] == row["seconds"] / row["seconds_without"] > 0


def test_a_sweep_that_stops_is_simulated_from_its_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    model = tiny_model("llama")
    ls.sweep(model, "swap,drop", tokens(40, 32), directory=tmp_path / "sweep")
    rows = stopping.measure(tmp_path / "sweep", "agreement=5pt,kl=25%", 2, 100, name="stopping-quick")
    shares = {row["what"]: row["share"] for row in rows if row["part"] == "coverage"}
    assert len(shares) == 4
    assert all(share >= 0.95 for what, share in shares.items() if "every stopping time" in what)
    saving, race, _ = rows[-3:]
    assert saving["ratio"] > 30
    assert saving["spearman"] > 0.8
    assert race["ratio"] >= 1
    assert race["share"] >= 0.8
    assert (tmp_path / "stopping-quick.csv").exists()


def test_the_kept_sums_are_those_of_the_sweep(tmp_path: Path) -> None:
    frame = ls.sweep(tiny_model("llama"), "drop", tokens(6, 10), directory=tmp_path / "sweep")
    kept = stopping.KeptSums.read(tmp_path / "sweep")
    assert kept.context == 10
    for index, metric in enumerate(METRICS):
        assert kept.means()[:, index] == pytest.approx(frame[metric].to_numpy(float))


@pytest.mark.slow
def test_tasks_by_one_sweep_and_by_lm_eval_give_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    path = checkpoint(tmp_path / "model", max_position_embeddings=2048)
    (row,) = tasks.measure(str(path), "drop", 6, 2, 2, 4, result="tasks-quick")
    assert (row["models"], row["evaluated"], row["different"], row["fault"]) == (7, 3, 0, "")
    assert row["lm_eval_seconds"] > 0
    assert "estimated from 3" in " ".join(capsys.readouterr().out.split())
    assert len((tmp_path / "results" / "tasks-quick.csv").read_text().splitlines()) == 2

    measured = ls.sweep

    def wrong(*args: Any, **options: Any) -> Any:
        frame = measured(*args, **options)
        frame.loc[3, f"task_{tasks.TASK}_acc"] += 0.5
        return frame

    monkeypatch.setattr(ls, "sweep", wrong)
    (row,) = tasks.measure(str(path), "drop", 6, 2, 2, 4, result="tasks-quick")
    assert row["different"] == 1
    assert "drop 2: lm-eval" in row["fault"]
