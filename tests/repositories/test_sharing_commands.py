"""`--push`, `layersurgery push` and `layersurgery fetch-results`, as a person at a terminal uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import result_of, run
from tests.support.hub_double import Hub
from tests.support.tiny_checkpoint import checkpoint


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "tiny")


def test_an_edit_is_pushed_as_it_was_written(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    value = result_of("drop", tiny, "--layer", 2, "-o", tmp_path / "out", "--push", "me/dropped")
    repository = hub.repositories["models", "me/dropped"]
    assert repository.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert value["pushed"]["url"] == f"{hub.url}/me/dropped"
    assert value["pushed"]["private"] is repository.private is True


def test_a_sweep_is_pushed_fetched_and_reported(hub: Hub, small: list[Any], tmp_path: Path) -> None:
    out = Path(small[small.index("-o") + 1])
    value = result_of(*small, "--push", "me/sweep", "--public")
    assert value["pushed"]["kind"] == "dataset"
    assert not hub.repositories["datasets", "me/sweep"].private
    assert "--push" not in json.loads((out / "run.json").read_text())["command"]
    listed = result_of("fetch-results", "me/sweep", "-o", tmp_path / "fetched", "--dry-run")
    assert listed["files"]["results.csv"] == (out / "results.csv").stat().st_size
    assert not (tmp_path / "fetched").exists()
    fetched = result_of("fetch-results", "me/sweep", "-o", tmp_path / "fetched")["path"]
    assert {str(path.relative_to(fetched)) for path in Path(fetched).rglob("*") if path.is_file()} == {*listed["files"]}
    assert (Path(fetched) / "results.csv").read_bytes() == (out / "results.csv").read_bytes()
    assert result_of("report", fetched, "-o", tmp_path / "page.html")["runs"] == [fetched]


def test_no_token_is_said_before_the_work(
    hub: Hub, small: list[Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for command in (small, ["swap", tiny, "--layer", 1, "-o", tmp_path / "out"]):
        result = run(*command, "--push", "me/name")
        assert result.exit_code == 1
        assert "does not accept the token (401); run: hf auth login" in result.stderr
        assert not (tmp_path / "out").exists()


def test_a_push_that_fails_at_the_end_leaves_the_result(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    hub.forbidden = True
    result = run("swap", tiny, "--layer", 1, "-o", tmp_path / "out", "--push", "me/name")
    assert result.exit_code == 1
    assert f"Wrote {tmp_path / 'out'}" in result.stdout
    assert f"to push it later, run: layersurgery push {tmp_path / 'out'} me/name" in result.stderr
    hub.forbidden = False
    assert result_of("push", tmp_path / "out", "me/name", "-m", "second try")["commit"]
    assert hub.repositories["models", "me/name"].commits == ["second try"]


def test_a_dry_run_lists_the_files(hub: Hub, tiny: Path) -> None:
    result = run("push", tiny, "me/name", "--dry-run")
    assert "model.safetensors" in result.stdout
    assert "to the private model repository me/name" in result.stdout
    assert not hub.requests


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("swap", "--layer", 1, "--public"), "give --push, too"),
        (("swap", "--layer", 1, "--push", "name"), "is not the name of a repository (USER/NAME)"),
        (("sweep", "--estimate", "--push", "me/name"), "this writes no directory"),
        (("edit", "--recipe", "recipe.yaml", "--push", "me/name"), "a recipe may write several checkpoints"),
        (("swap", "--layer", 1, "-o", "out.gguf", "--push", "me/name"), "a GGUF file has no model card"),
    ],
)
def test_what_is_refused(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("outputs:\n  first: swap 1\n  second: drop 1\n", encoding="utf-8")
    result = run(arguments[0], tiny, *arguments[1:])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())


def test_the_program_finds_the_hub_by_its_environment(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_write", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "layersurgery_cli", "push", tiny, "me/name"]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"to the private model repository {hub.url}/me/name" in " ".join(done.stdout.split())


def test_a_dry_run_of_an_edit_is_not_pushed(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    result = run("swap", tiny, "--layer", 1, "-o", tmp_path / "out", "--push", "me/name", "--dry-run")
    assert result.exit_code == 2
    assert "a dry run writes nothing" in result.stderr
    assert not hub.repositories
