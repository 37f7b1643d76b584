"""A run or an edit that is killed in any of its file operations ends as an undisturbed one when it is repeated."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

import layersurgery as ls
from layersurgery.atomic_io import atomic_file
from layersurgery.checkpoints.checkpoint import read_checkpoint
from layersurgery.checkpoints.sources import find_source
from layersurgery.plans.variants import variants
from layersurgery.runs import single_step
from layersurgery.runs.reporter import Reporter
from layersurgery.runs.run_directory import open_run
from layersurgery.runs.runner import SweepOutput
from layersurgery.runs.single_step import run_once
from layersurgery.runs.text import TokenizedText
from layersurgery.sweeps.measurer import Measurer
from tests.support.kills import file_operations
from tests.support.measure_run import run_measurement
from tests.support.tiny_checkpoint import tiny_tokenizer
from tests.support.zoo import DEPTH, tiny_model, tokens

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be left there")


@pytest.fixture(scope="module")
def measurer() -> Measurer:
    return Measurer(tiny_model("llama"), variants("swap 1 2", DEPTH))


def draw(frame: pd.DataFrame, directory: Path, name: str = "new.png") -> list[Path]:
    with atomic_file(directory / name) as partial:
        partial.write_bytes(b"a figure")
    return [directory / name]


def sweep(
    measurer: Measurer,
    directory: Path,
    *,
    seed: int = 0,
    figure: str = "new.png",
    per_token: bool = True,
    overwrite: bool = False,
) -> None:
    ids = tokens(2, 6)
    with open_run(directory, {"seed": seed}, overwrite=overwrite) as run:
        if not run.finished:
            run_measurement(
                run, measurer, TokenizedText(ids, torch.ones_like(ids), "f"), SweepOutput(measurer.variants, "tiny"),
                batch_size=1, per_token=per_token, tokenizer=tiny_tokenizer(),
                draw=lambda frame, path: draw(frame, path, figure),
            )  # fmt: skip


def once(directory: Path, *, name: str = "rank", overwrite: bool = False) -> None:
    table = pd.DataFrame({"layer": [0, 1]})
    run_once(directory, {"analysis": {"name": name}}, Reporter(), lambda: ({name: table}, {}), overwrite=overwrite)


def contents(root: Path) -> dict[str, object]:
    """Return every file below a directory, with a `run.json` without its times."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        content: object = path.is_file() and path.read_bytes()
        if path.name == "run.json" and isinstance(content, bytes):
            record = json.loads(content)
            content = {name: value for name, value in record.items() if "second" not in name}
        found[str(path.relative_to(root))] = content
    return found


def check_every_kill(root: Path, act: Callable[[Path], None], prepare: Callable[[Path], None]) -> None:
    """Kill `act` before and in each of its file operations, and compare what it leaves when it is repeated.

    Args:
        root: an empty directory.
        act: works in the directory that it is given; a checkpoint that it writes there is "out".
        prepare: makes what the directory holds before.
    """
    (root / "undisturbed").mkdir()
    prepare(root / "undisturbed")
    with file_operations(root / "undisturbed") as operations:
        act(root / "undisturbed")
    expected = contents(root / "undisturbed")
    assert len(operations) > 5
    for number, operation in enumerate(operations):
        for torn in [False, True] if operation.startswith(("open", "os.rename")) else [False]:
            place = root / f"{number}{'-torn' * torn}"
            place.mkdir()
            prepare(place)
            with file_operations(place, kill_at=number, torn=torn) as done:
                act(place)
            assert len(done) == number + 1, "the kill took effect"
            if (place / "out").exists():
                read_checkpoint(find_source(place / "out"))  # it is whole
            for lock in place.glob(".lock.*"):  # a run removes those that no process can be about to take
                os.utime(lock, (0, 0))
            act(place)
            left = contents(place)
            assert left == expected, (
                place.name, operation, {name for name in {*left, *expected} if left.get(name) != expected.get(name)}
            )  # fmt: skip


def nothing(place: Path) -> None:
    """Leave the directory empty."""


def test_a_killed_sweep_is_resumed(measurer: Measurer, tmp_path: Path) -> None:
    check_every_kill(tmp_path, lambda place: sweep(measurer, place / "below" / "run"), nothing)


def test_a_killed_sweep_that_replaces_another(measurer: Measurer, tmp_path: Path) -> None:
    check_every_kill(
        tmp_path,
        lambda place: sweep(measurer, place / "run", seed=1, per_token=False, overwrite=True),
        lambda place: sweep(measurer, place / "run", figure="old.png"),
    )


def test_a_killed_analysis_of_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_step, "draw_analysis", lambda path, facts: draw(pd.DataFrame(), path))
    check_every_kill(tmp_path, lambda place: once(place / "run"), nothing)


def test_a_killed_analysis_that_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_step, "draw_analysis", lambda path, facts: draw(pd.DataFrame(), path))
    check_every_kill(
        tmp_path,
        lambda place: once(place / "run", overwrite=True),
        lambda place: once(place / "run", name="norms"),
    )


@pytest.mark.parametrize(
    ("plan", "link", "verify"),
    [
        ("swap 1 2", False, False),
        ("swap 1 2", True, False),
        ("swap 1 2", False, True),
        pytest.param("skip-mlp 3", True, True, marks=pytest.mark.slow),
    ],
)
def test_a_killed_edit_leaves_nothing_or_all(
    sharded: Path, tmp_path: Path, plan: str, link: bool, verify: bool
) -> None:
    def edit(place: Path) -> None:
        out = place / "out"
        ls.edit_checkpoint(sharded, plan, out, link=link, verify=verify, overwrite=out.exists())

    (tmp_path / "kills").mkdir()
    check_every_kill(tmp_path / "kills", edit, nothing)


def test_a_killed_edit_that_replaces_another(sharded: Path, tmp_path: Path) -> None:
    def edit(place: Path, plan: str = "swap 1 2") -> None:
        ls.edit_checkpoint(sharded, plan, place / "out", verify=False, overwrite=True)

    (tmp_path / "kills").mkdir()
    check_every_kill(tmp_path / "kills", edit, lambda place: edit(place, "drop 1"))
