"""A dry run of an edit checks all that the edit checks, says what it would write, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layersurgery_cli.app import app
from typer.testing import CliRunner

import layersurgery as ls
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
