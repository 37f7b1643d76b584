"""The cost of tasks is known before, without the model's weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import layersurgery as ls
from tests.cli.test_cli import run
from tests.support.task_definitions import write_definitions
from tests.support.tiny_checkpoint import checkpoint


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    write_definitions(directory)
    return directory


def without_time(estimate: Any) -> dict[str, Any]:
    record = dataclasses.asdict(estimate)
    return {name: value for name, value in record.items() if name not in ("seconds", "program", "tasks")}


def test_it_is_what_the_run_takes(definitions: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    given: dict[str, Any] = {"tasks": "choice,completion", "task_path": definitions, "batch_size": 8}
    frame = ls.sweep(path, "drop", directory=tmp_path / "out", **given)
    facts = frame.attrs["run"]
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    cost = ls.estimate(path, "drop", **given)
    size = cost.measured
    assert (size.sequences, size.length) == (facts["text"]["sequences"], facts["text"]["length"])
    assert (size.tokens, size.read, size.noun) == (facts["text"]["tokens"], frame.tokens[0], "request")
    assert cost.block_calls == facts["schedule"]["block_calls"]
    assert (cost.sequences, cost.batches) == (8, -(-size.sequences // 8))
    assert cost.seconds is not None
    assert cost.seconds > 0
    assert size.positions < size.tokens - size.sequences, "answers share the context of their question"
    others = ls.estimate(path, "drop", **given | {"tasks": "completion"})
    assert others.measured.positions == others.measured.tokens - others.measured.sequences

    text: dict[str, Any] = {"data": "pydoc", "tokens": 64, "context": 16}
    both = ls.estimate(path, "drop", **given, **text, until="kl=5%")
    assert both.tasks is not None
    assert without_time(both.tasks) == without_time(cost)
    assert without_time(both) == without_time(ls.estimate(path, "drop", batch_size=8, **text))
    assert both.seconds is None
    assert both.tasks.seconds is not None


@pytest.mark.slow
def test_on_the_command_line(definitions: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    asked = ["sweep", path, "--edits", "drop", "--tasks", "choice", "--task-path", definitions, "--estimate"]
    shown = run(*asked)
    assert shown.exit_code == 0, shown.output
    assert "36 requests of " in shown.stdout
    assert "1 batch of 36 requests, " in shown.stdout
    both = run(*asked, "--data", "pydoc", "-n", 64, "--context", 16)
    assert "4 sequences" in both.stdout
    assert "Then choice:" in both.stdout
    value = json.loads(run(*asked, "--data", "pydoc", "--json").stdout)
    assert value["tasks"]["measured"]["sequences"] == 36
    refused = run(*asked, "--until", "kl=2%")
    assert (refused.exit_code, "metrics of a text need a text (--data)" in refused.output) == (2, True)
