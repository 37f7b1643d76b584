"""Logging to experiment trackers, read by TensorBoard's own reader. trackio and wandb are not run here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import layersurgery as ls
from layersurgery.errors import LayerSurgeryWarning
from layersurgery.runs.tracking import run_name
from tests.cli.test_cli import result_of, run
from tests.support.tiny_checkpoint import checkpoint

TEXT = ["Once upon a time there was a model with many layers in it."] * 12


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # TensorBoard's files are in ./runs
    return checkpoint(tmp_path / "tiny")


def scalars(directory: str) -> dict[str, list[tuple[int, float]]]:
    """Read the numbers of a run, with their steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(directory, size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_sweep_logs_each_edit_as_it_becomes_known(tiny: Path) -> None:
    frame = ls.sweep(
        tiny, "drop", TEXT, directory="out/sweep", context=16, batch_size=3, track="tensorboard"
    )  # fmt: skip
    logged = scalars("runs/out/sweep")
    assert [value for _, value in logged["progress/sequences"]] == pytest.approx([3, 6, 9, 12])
    assert [value for _, value in logged["progress/share"]] == pytest.approx([0.25, 0.5, 0.75, 1])
    for row in frame[frame.edit == "drop"].itertuples():
        points = logged[f"kl_nats/{row.name}"]
        assert points[0][0] == 3  # after the first batch
        assert points[-1][0] == 12
        assert points[-1][1] == pytest.approx(row.kl_nats)
    # The run's arguments are next to it.
    [parameters] = Path("runs/out/sweep").glob("*/hparams.yml")
    assert "model/weights" in parameters.read_text()


def test_edits_that_two_families_have_in_common_are_logged_for_both(tiny: Path) -> None:
    frame = ls.sweep(tiny, "swap,swap-pairs", TEXT, directory="both", context=16, track="tensorboard")
    logged = scalars("runs/both")
    row = frame[(frame.edit == "swap-pairs") & (frame["name"] == "swap 1 2")].iloc[0]
    assert logged["kl_nats/swap-pairs swap 1 2"][-1][1] == pytest.approx(row.kl_nats)
    assert "kl_nats/swap swap 1 2" in logged


def test_pruning_logs_what_each_criterion_costs(tiny: Path) -> None:
    ls.prune(tiny, TEXT, remove=2, output="pruned", context=16, track="tensorboard")
    costs = pd.read_parquet("pruned-results/costs/costs.parquet")
    logged = scalars("runs/pruned-results/costs")
    row = costs[(costs.criterion == "influence") & (costs.removed == 2)].iloc[0]
    assert logged["kl_nats/influence 2"][-1][1] == pytest.approx(row.kl_nats)


def test_an_analysis_logs_each_layer(tiny: Path) -> None:
    frame = ls.analyses.lens(tiny, TEXT, directory="lens", context=16, track="tensorboard")
    logged = scalars("runs/lens")
    for row in frame.itertuples():
        assert logged[f"lens_kl_nats/{row.layer}"][-1][1] == pytest.approx(row.lens_kl_nats)


def test_healing_logs_each_step(tiny: Path) -> None:
    ls.edit_checkpoint(tiny, "drop 2", "pruned")
    value = result_of(
        "heal", "pruned", "--teacher", tiny, "--data", "pydoc", "--context", 16, "-n", 400, "--batch-size", 2,
        "--steps", 3, "--evaluate-every", 2, "-o", "healed", "--track", "tensorboard",
    )  # fmt: skip
    logged = scalars("runs/healed")
    assert [step for step, _ in logged["training/objective_nats"]] == [1, 2, 3]
    assert [step for step, _ in logged["held_out/kl_nats"]] == [row["step"] for row in value["steps"]] == [0, 2, 3]
    expected = [row["kl_nats"] for row in value["steps"]]
    assert [kl for _, kl in logged["held_out/kl_nats"]] == pytest.approx(expected)


def test_nothing_is_imported_or_written_when_not_asked(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import would fail
    ls.sweep(tiny, "drop", TEXT, directory="out", context=16)
    assert not Path("runs").exists()


def test_a_tracker_that_fails_does_not_stop_the_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def broken(values: dict[str, float], step: int) -> None:
        calls.append((values, step))
        raise ConnectionError("the server went away")

    tracker = SimpleNamespace(log=broken, finish=lambda: None)
    monkeypatch.setattr("layersurgery.runs.tracking._start", lambda *_, **__: tracker)
    with pytest.warns(LayerSurgeryWarning, match="tensorboard failed and is not used any more: the server went away"):
        frame = ls.sweep(tiny, "drop", TEXT, directory="out", context=16, track="tensorboard")
    assert len(frame) == 7
    assert len(calls) == 1


def test_a_resumed_run_goes_on_in_the_trackers_which_are_told_no_directories(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []

    class Tracker:
        requires_logging_directory = False

        def __init__(self, _project: str, **own: Any) -> None:
            started.append(own)

        def store_init_configuration(self, config: dict[str, Any]) -> None:
            assert str(tiny.parent) not in str(config)
            assert config["batch_size"] == 3

        def start(self) -> None: ...
        def log(self, *_: Any, **__: Any) -> None: ...
        def finish(self) -> None: ...

    def measure(name: str, progress: Any = None) -> None:
        options: dict[str, Any] = {"context": 16, "batch_size": 3, "track": name, "progress": progress}
        ls.sweep(tiny, "drop", TEXT, directory=tiny.parent / name, **options)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layersurgery.runs.tracking.find_spec", lambda _: True)
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"wandb": Tracker, "trackio": Tracker})
    for name in ("wandb", "trackio"):
        with pytest.raises(KeyboardInterrupt):
            measure(name, stop)
        measure(name)
    first, second, began, resumed = started
    assert first == second
    assert (first["name"], first["resume"], len(first["id"])) == ("wandb", "allow", 16)
    assert (began, resumed) == ({"name": "trackio"}, {"name": "trackio", "resume": "allow"})


def test_what_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ls.PlanError, match="tracker 'tensorbord' is unknown; use tensorboard, trackio, wandb"):
        ls.sweep(tiny, "drop", TEXT, directory="out", track="tensorbord")
    with pytest.raises(ls.PlanError, match="`track` is for runs that are written, so it needs `directory`"):
        ls.sweep(tiny, "drop", TEXT, track="tensorboard")
    with pytest.raises(ls.PlanError, match="`track` is for runs batch by batch, and neurons is measured in one go"):
        ls.analyze("neurons", tiny, directory="out", track="tensorboard")
    monkeypatch.setattr("layersurgery.runs.tracking.find_spec", lambda _: None)
    for name, package in (("tensorboard", "layersurgery[track]"), ("wandb", "wandb"), ("trackio", "trackio")):
        result = run("sweep", tiny, "--data", "pydoc", "-o", "out", "--track", name)
        assert result.exit_code == 1
        assert f"track {name} needs a package that is not installed: pip install '{package}'" in result.stderr
    assert not Path("out").exists()


def test_a_tracker_that_does_not_start_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ModuleType("torch.utils.tensorboard")  # without SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", broken)
    monkeypatch.setattr("torch.utils.tensorboard", broken, raising=False)
    with pytest.raises(ls.OutputError, match="cannot start tensorboard: .*SummaryWriter"):
        ls.sweep(tiny, "drop", TEXT, directory="out", context=16, track="tensorboard")


def test_a_runs_name_is_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_name(tmp_path / "pruned-results" / "rank") == "pruned-results/rank"
    assert run_name(tmp_path.parent / "elsewhere") == "elsewhere"


def test_the_last_numbers_of_a_run_that_ends_early_are_of_what_was_measured(tiny: Path) -> None:
    frame = ls.sweep(
        tiny, "drop", TEXT * 4, directory="out", context=16, batch_size=2, until="agreement=30pt", track="tensorboard"
    )  # fmt: skip
    logged = scalars("runs/out")
    done = frame.sequences.max()
    assert done < len(TEXT * 4)
    assert logged["progress/sequences"][-1][0] == logged["kl_nats/unedited"][-1][0] == done
