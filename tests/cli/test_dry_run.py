"""A dry run of an edit checks all that the edit checks, says what it would write, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layersurgery_cli.app import app
from typer.testing import CliRunner

import layersurgery as ls
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import tiny_model


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "source", max_shard_size="60KB")
    return tmp_path / "source"


@pytest.mark.parametrize("more", [(), ("--link",)])
def test_it_says_what_the_edit_writes(source: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    args = ("drop", source, "--layer", 5, "-o", tmp_path / "out", *more, "--json")
    tried = run(*args, "--dry-run")
    assert tried.exit_code == 0, tried.output
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    written = json.loads(run(*args).stdout)
    same = ("path", "plan", "route", "blocks", "bytes_written", "bytes_linked", "verified")
    assert {name: json.loads(tried.stdout)[name] for name in same} == {name: written[name] for name in same}
    assert (json.loads(tried.stdout)["dry_run"], written["dry_run"]) == (True, False)


def test_it_is_refused_as_the_edit_is(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert run("drop", source, "--layer", 5, "-o", tmp_path / "full", "--dry-run").exit_code == 1
    assert run("drop", source, "--layer", 50, "--dry-run").exit_code == 2


def test_it_finds_what_would_stop_the_edit(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = run("drop", source, "--layer", 5, "-o", tmp_path / "file" / "out", "--dry-run")
    assert (refused.exit_code, "is not a directory" in " ".join(refused.output.split())) == (1, True)
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    result = ls.edit_checkpoint(source, "drop 5", other / "layersurgery-dry-run", link=True, dry_run=True)
    assert result.bytes_linked == 0
    assert result.bytes_written == ls.edit_checkpoint(source, "drop 5", tmp_path / "out").bytes_written


def test_from_python_and_in_words(source: Path, tmp_path: Path) -> None:
    result = ls.edit_checkpoint(source, "swap 1 2", tmp_path / "out", dry_run=True)
    assert result.dry_run
    assert not result.path.exists()
    said = run("edit", source, "--plan", "swap 1 2", "-o", tmp_path / "out", "--dry-run").output
    assert f"Would write {tmp_path / 'out'}: 6 blocks" in said.replace("\n", "")
    assert "it would reload as this model; nothing was written" in said


_TEXT = ("--data", "text.txt", "-n", 60, "--context", 20)
_MEASURING = {
    "sweep": (),
    "stages": (),
    "rank": (),
    "analyze lens": (),
    "analyze heads": (),
    "analyze subjoiners": ("--samples", 8),
    "means": (),
    "prune": ("--remove", 2),
    "search": ("--remove", 2, "-o", "found"),
    "heal-linear": ("--plan", "drop 5"),
    "heal": ("--teacher", "tiny", "--steps", 1, "-b", 1),
}


@pytest.fixture
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a directory with a tiny checkpoint and a text."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("Once upon a time there were words in it. " * 40, "utf-8")
    return tmp_path


@pytest.mark.parametrize("command", [*_MEASURING])
def test_a_measuring_command_says_what_it_would_do_and_writes_nothing(command: str, at_hand: Path) -> None:
    text: tuple[Any, ...] = {"analyze subjoiners": _TEXT[:2], "heal": (*_TEXT[:2], *_TEXT[4:])}.get(command, _TEXT)
    before = sorted(at_hand.rglob("*"))
    found = run(*command.split(), "tiny", *text, *_MEASURING[command], "--dry-run", "--json")
    assert found.exit_code == 0, found.output
    value = json.loads(found.stdout)
    assert (value["dry_run"], value["model"], value["state"]) == (True, "tiny", "new")
    assert "text.txt" in value["text"]
    assert not (at_hand / value["path"]).exists()
    assert sorted(at_hand.rglob("*")) == before


def test_a_dry_run_knows_the_run_in_its_directory(at_hand: Path) -> None:
    sweep = ("sweep", "tiny", *_TEXT, "--edits", "drop 5", "-o", "out")

    def state(*args: Any) -> str:
        return str(json.loads(run(*args, "--dry-run", "--json").stdout)["state"])

    assert run(*sweep).exit_code == 0
    record = (at_hand / "out/run.json").read_text("utf-8")
    assert state(*sweep) == "finished"
    assert state(*sweep, "--overwrite") == "replaced"
    refused = run(*sweep[:-3], "drop 4", "-o", "out", "--dry-run")
    assert (refused.exit_code, "other arguments" in refused.output) == (1, True)
    assert (at_hand / "out/run.json").read_text("utf-8") == record


def test_a_dry_run_of_weights_reads_no_text(at_hand: Path) -> None:
    found = run("analyze", "neurons", "tiny", "--dry-run")
    assert found.exit_code == 0
    assert "Would measure tiny, and write tiny-neurons; nothing was measured or written" in found.stdout


def test_a_dry_run_knows_what_is_at_the_output(at_hand: Path) -> None:
    def state(*args: Any) -> str:
        return str(json.loads(run(*args, "--dry-run", "--json").stdout)["state"])

    heal = ("heal", "tiny", "--teacher", "tiny", "--data", "text.txt", "--context", 20, "--steps", 1, "-o", "healed")
    (at_hand / "healed-healing").mkdir()
    assert (state(*heal), state(*heal, "--overwrite")) == ("resumed", "new")
    (at_hand / "tiny-means.safetensors").touch()
    assert state("means", "tiny", *_TEXT, "--overwrite") == "replaced"
    refused = run("means", "tiny", *_TEXT, "--dry-run")
    assert (refused.exit_code, "exists; choose another output" in refused.output) == (1, True)
