"""`layersurgery search`, as a person at a terminal uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

import layersurgery as ls
from layersurgery.analyses.route_search import SearchSpace
from layersurgery.analyses.search_cost import forecast
from layersurgery.reports.collect import collect
from tests.cli.test_analyze import words
from tests.cli.test_cli import result_of, run
from tests.cli.test_prune import place, tokens_of
from tests.runs.test_python import same_files
from tests.support.zoo import DEPTH

__all__ = ["place"]  # a fixture


def asked_of(place: Path, *more: Any) -> list[Any]:
    return ["search", place / "tiny", *words(place), "--device", "cpu", *more]


def test_the_checkpoint_is_the_route_that_was_found(place: Path, tmp_path: Path) -> None:
    value = result_of(*asked_of(place, "--remove", 2, "--beam", 2, "-o", tmp_path / "out"))
    whole, tokens = ls.load(place / "tiny").model, tokens_of(place)
    found = ls.search(whole, tokens, remove=2, beam=2)
    assert (value["plan"], value["route"], value["blocks"]) == (str(found.plan), str(found.route), DEPTH - 2)
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    best = next(row for row in value["search"] if row["winner"])
    assert best["kl_nats"] == pytest.approx(ls.compare(whole, edited, tokens).kl_nats, abs=1e-6)
    assert best["parameters"] == sum(parameter.numel() for parameter in edited.parameters())
    results = tmp_path / "out-results"
    assert {file.name for file in results.iterdir()} == {"level-01", "level-02", "search"}
    assert {"search.png", "search.svg", "search.csv", "tried.csv"} <= {
        path.name for path in (results / "search").iterdir()
    }
    assert Image.open(results / "search" / "search.png").width > 800
    tried = ls.read_results(results / "search", "tried")
    assert len(tried) == value["tried"] == len(found.tried)
    assert run(*asked_of(place, "--remove", 2, "--beam", 2, "-o", tmp_path / "out")).exit_code == 1, "the output exists"


def test_python_writes_the_commands_files(place: Path, tmp_path: Path) -> None:
    asked = asked_of(place, "--repeat", 2, "--beam", 1, "--by", "loss", "-o", tmp_path / "command")
    value = result_of(*asked)
    found = ls.search(
        str(place / "tiny"), place / "story.txt", repeat=2, beam=1, by="loss", output=tmp_path / "python",
        tokens=120, context=30, device="cpu",
    )  # fmt: skip
    for name in ("level-01", "level-02", "search"):
        same_files(tmp_path / "command-results" / name, tmp_path / "python-results" / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("command", "python")]
    assert weights[0] == weights[1]
    assert found.written is not None
    assert found.written.path == tmp_path / "python"
    assert value["plan"] == str(found.plan)
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "command")
    assert edited.config.num_hidden_layers == DEPTH + 2
    ids = torch.tensor(tokens_of(place))
    with torch.no_grad(), ls.operate(ls.load(place / "tiny").model, found.plan) as repeated:
        torch.testing.assert_close(edited(ids).logits, repeated(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_what_a_person_sees(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(*asked_of(place, "--depth", DEPTH - 1, "--beam", 2))
    assert found.exit_code == 0, found.stderr
    cost = sum(cost.block_calls for cost in forecast(SearchSpace.of(DEPTH, remove=1, beam=2)))
    assert f"with {cost} block calls for each token; less with races" in " ".join(found.stderr.split())
    assert f"With {DEPTH - 1} of {DEPTH} blocks: drop 1, KL " in found.stdout
    assert "A race is wrong" not in found.stdout, "four sequences are too few to race"
    assert "The measurements are in tiny-search-5-kl: search/search.png, search/search.svg" in found.stdout
    assert f"Write the checkpoint with: layersurgery edit {place / 'tiny'} --plan 'drop " in found.stdout
    table = [line.split() for line in found.stdout.splitlines()[:4]]
    assert table[0] == ["blocks", "plan", "KL", "loss", "ppl.", "agree"]
    assert table[1][:2] == [str(DEPTH), "unedited"]
    assert table[2][-2:] == ["chosen,", "one-shot"]
    assert table[2][:4] == [str(DEPTH - 1), "drop", "1", table[2][3]]
    assert "…" not in found.stdout
    assert not (tmp_path / "tiny-search-5-kl" / "model.safetensors").exists()
    ls.report(tmp_path / "tiny-search-5-kl", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"With {DEPTH - 1} of {DEPTH} blocks: drop 1, KL " in page
    assert "data:image/svg+xml" in page
    # The candidates of the levels are in one table.
    runs = collect([tmp_path / "tiny-search-5-kl"]).runs
    assert {run.path.name: list(run.tables) for run in runs} == {"level-01": [], "search": ["search", "tried"]}


def test_the_cost_is_said_before(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = asked_of(place, "--remove", 3, "--beam", 2, "--estimate")
    value = result_of(*asked)
    costs = forecast(SearchSpace.of(DEPTH, remove=3, beam=2))
    assert [level["block_calls"] for level in value["levels"]] == [cost.block_calls for cost in costs]
    shown = run(*asked).stdout.splitlines()
    assert "name its directory with --output" in run(*asked, "--link").stderr
    assert shown[1].split() == ["level-01", "5", "6", "21"]
    assert shown[2].split()[:4] == ["level-02", "4", "≤", "10"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        ([], 2, "a search needs one of --depth, --remove and --repeat; none is given"),
        (["--remove", 1, "--depth", 5], 2, "not both --depth and --remove"),
        (["--depth", DEPTH], 2, f"depth {DEPTH} is the model's own"),
        (["--depth", 0], 2, f"depth 0 is out of range for a model of {DEPTH} blocks"),
        (["--remove", DEPTH], 2, f"cannot remove {DEPTH} of {DEPTH} layers; give 1 to {DEPTH - 1}"),
        (["--remove", 1, "--beam", 0], 2, "should be greater than or equal to 1"),
        (["--remove", 1, "--max-span", 2], 2, "--max-span is 1 to 1, the number of layers to change, not 2"),
        (["--remove", 1, "--by", "task:arc_easy"], 2, "data has no effect on tasks"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_measured(
    place: Path, tmp_path: Path, asked: list[Any], code: int, said: str
) -> None:
    found = run(*asked_of(place, *asked, "-o", tmp_path / "out"))
    assert found.exit_code == code, found.stderr
    assert said in " ".join(found.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_find_the_same(place: Path, tmp_path: Path) -> None:
    asked = asked_of(place, "--remove", 2, "--beam", 2, "-b", 1)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "layersurgery_cli", *map(str, asked), "-o", str(tmp_path / "both"), "--json"]
    both = subprocess.run(command, capture_output=True, text=True, env=env)
    assert both.returncode == 0, both.stderr
    found = json.loads(both.stdout[both.stdout.index("{") :])
    alone = result_of(*asked, "-o", tmp_path / "alone")
    assert found["plan"] == alone["plan"]
    frames = [ls.read_results(tmp_path / name / "search") for name in ("both-results", "alone-results")]
    pd.testing.assert_frame_equal(*frames, rtol=1e-6)
