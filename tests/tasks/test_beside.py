"""Tasks that are measured beside a text: the two runs, joined."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import layersurgery as ls
from layersurgery.runs.tasks_beside import TasksBeside
from tests.cli.test_cli import run
from tests.runs.test_kills import check_every_kill, nothing
from tests.support.task_definitions import write_definitions
from tests.support.tiny_checkpoint import checkpoint, tiny_tokenizer
from tests.support.zoo import tiny_model

EDITS = ["drop 2", "swap 1 3"]
TEXT = [f"Once upon a time there were {number} layers." for number in range(7)]
RESAMPLED = "task_completion_perplexity_sem"  # by lm-eval, with other digits each time


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    write_definitions(directory)
    return directory


@pytest.fixture(scope="module")
def given(definitions: Path) -> dict[str, Any]:
    return {"tokenizer": tiny_tokenizer(), "batch_size": 3, "tasks": "choice,completion", "task_path": definitions}


def split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the two separate runs."""
    tasks = {name: given[name] for name in ("tasks", "task_path")}
    shared = {name: given[name] for name in ("tokenizer", "batch_size")}
    return shared, shared | tasks


def joined(text: pd.DataFrame, tasks: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(text).join(pd.DataFrame(tasks)[[name for name in tasks if name.startswith("task_")]])


def same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    columns = sorted(set(one) - {RESAMPLED})
    assert set(one) == set(other)
    return bool(pd.DataFrame(one)[columns].equals(pd.DataFrame(other)[columns]))


@pytest.mark.parametrize("in_directory", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_joined_table_is_that_of_two_separate_runs(
    in_directory: bool, given: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    of_text, of_tasks = split(given)
    until: dict[str, Any] = {"until": "kl=90%", "shuffle": True}
    expected = joined(ls.sweep(model, EDITS, TEXT, **of_text, **until), ls.sweep(model, EDITS, **of_tasks))
    where: dict[str, Any] = {"directory": tmp_path / "out"} if in_directory else {}
    found = ls.sweep(model, EDITS, TEXT, **given, **until, **where)
    assert same(found, expected)
    assert "task_choice_acc_change" in found
    if in_directory:
        record = found.attrs["run"]
        assert record["arguments"]["tasks"] == ["choice", "completion"]
        assert record["until"]["targets"] == "kl_nats to 90 %"
        requests = ls.read_results(tmp_path / "out", "requests")
        assert len(requests) == 3 * (36 + 6)
        assert "until" not in ls.read_results(tmp_path / "out" / "tasks").attrs["run"]
        again = ls.sweep(model, EDITS, TEXT, **given, **until, **where)
        assert pd.DataFrame(again).equals(pd.DataFrame(found))


def test_a_run_that_is_stopped_between_the_two_continues(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    whole = ls.sweep(model, EDITS, TEXT, directory=tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        patch.setattr(TasksBeside, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
            ls.sweep(model, EDITS, TEXT, directory=out, **given)
    assert not (out / "tasks").exists()
    with pytest.raises(ls.SourceError, match="has not finished"):
        ls.read_results(out)

    def stop(done: int, total: int) -> None:
        assert total > len(TEXT) or done == total, "the text is not measured again"
        if total > len(TEXT) and done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ls.sweep(model, EDITS, TEXT, directory=out, progress=stop, **given)
    assert json.loads((out / "tasks" / "run.json").read_text())["state"] == "begun"
    with pytest.raises(ls.SourceError, match="has not finished"):
        ls.read_results(out)
    with pytest.raises(ls.OutputError, match="other arguments: limit nothing there, 2 now"):
        ls.sweep(model, EDITS, TEXT, directory=out, limit=2, **given)
    assert same(ls.sweep(model, EDITS, TEXT, directory=out, **given), whole)


@pytest.mark.slow
def test_another_sweep_in_the_directory_takes_the_tasks_of_the_first_away(
    given: dict[str, Any], tmp_path: Path
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    ls.sweep(model, EDITS, TEXT, directory=out, **given)
    of_text, _ = split(given)
    with pytest.raises(ls.OutputError, match="other arguments"):
        ls.sweep(model, EDITS, TEXT, directory=out, **of_text)
    frame = ls.sweep(model, EDITS, TEXT, directory=out, overwrite=True, **of_text)
    assert not [name for name in frame if name.startswith("task_")]
    assert not (out / "tasks").exists()
    (out / "tasks").mkdir()
    with pytest.raises(ls.OutputError, match="tasks exists, and the results of the tasks would be written there"):
        ls.sweep(model, EDITS, TEXT, directory=out, overwrite=True, **given)
    assert "kl_nats" in ls.read_results(out)


@pytest.mark.slow
def test_the_report_and_the_figure_count_one_run(given: dict[str, Any], tmp_path: Path) -> None:
    ls.sweep(tiny_model("llama"), "drop", TEXT, directory=tmp_path / "all" / "out", **given)
    assert len(ls.report([tmp_path / "all"], tmp_path / "page.html").runs) == 1
    assert ls.plot([tmp_path / "all" / "out"], tmp_path / "figures")


@pytest.mark.slow
def test_on_the_command_line(definitions: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXT))
    asked = ["sweep", path, "--edits", "drop", "--tasks", "choice", "--task-path", definitions, "-o", tmp_path / "out"]
    of_text = ["--data", tmp_path / "text.txt", "-n", "64", "--context", "16", "--per-token", "--read", "1/2"]
    refused = run(*asked, *of_text)
    assert (refused.exit_code, "--per-token needs every position" in refused.output) == (2, True)
    shown = run(*asked, *of_text[:-2])
    assert shown.exit_code == 0, shown.output
    assert "tokens.parquet" in shown.stdout
    assert "tasks/requests.parquet" in shown.stdout
    assert "choice_acc" in shown.stdout
    said = " ".join(shown.output.split())
    assert "36 requests of choice, " in said
    assert "at once" in said
    assert "36 requests of " in shown.stdout  # the cost
    assert len(ls.read_results(tmp_path / "out", "tokens")) > 0
    shutil.rmtree(tmp_path / "out")
    alone = run(*asked, "--confidence", 0.9)
    assert (alone.exit_code, "--confidence has no effect on tasks alone" in alone.output) == (2, True)


@pytest.mark.weekly
@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be left there")
def test_a_kill_in_any_file_operation_loses_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    tasks = given | {"tasks": "choice", "limit": 2, "batch_size": 10}

    def act(place: Path) -> None:
        ls.sweep(model, EDITS[:1], TEXT[:2], directory=place / "run", **tasks)

    check_every_kill(tmp_path, act, nothing)
