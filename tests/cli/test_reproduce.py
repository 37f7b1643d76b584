"""`layersurgery reproduce`: all experiments on two tiny models, planned, gone on with, and reported."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from layersurgery.reports import reproduce
from layersurgery.reports.reproduce import PAPER, paper_options
from layersurgery.runs.options import RunOptions
from tests.analyses.test_probe import PLACE, knowing
from tests.cli.test_cli import result_of, run
from tests.support.tiny_checkpoint import LETTERS

ING = len(LETTERS) + 5


def tokenizer() -> Any:
    """A token for each letter, and one for "ing"."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **PLACE, "in": ING - 1, "ing": ING}
    made = Tokenizer(models.BPE(words, [("i", "n"), ("in", "g")], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reproduce")
    model = knowing()
    with torch.no_grad():
        model.lm_head.weight[ING] = model.lm_head.weight[PLACE["x"]]
    for name in ("one", "two"):
        model.save_pretrained(path / name)
        tokenizer().save_pretrained(path / name)
    picked = random.Random(0)
    letters = [letter for letter in LETTERS[1:27] if letter not in "in"]
    (path / "story.txt").write_text(
        " ".join(
            "".join(picked.choices(letters, k=picked.choice((1, 2, 4)))) + picked.choice(("", "", "ing"))
            for _ in range(3000)
        )
    )
    return path


def asked(place: Path, *models: object) -> list[Any]:
    text = ["--data", place / "story.txt", "-n", 120, "--context", 30]
    return ["reproduce", "--models", ",".join(map(str, models)), *text, "-o", place / "out"]


@pytest.mark.slow
def test_plan_run_and_go_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = asked(place, place / "one", place / "two")
    plan = result_of(*words, "--estimate")["plan"]
    assert [part["left"] for part in plan] == [list(reproduce.EXPERIMENTS)] * 2
    assert all(part["flops"] > 0 and part["seconds"] > 0 and part["depth"] == 6 for part in plan)
    assert not (place / "out").exists()

    value = result_of(*words)
    assert value["not_done"] == {}
    directories = [place / "out" / name / experiment for name in ("one", "two") for experiment in reproduce.EXPERIMENTS]
    assert value["done"] == list(map(str, directories))
    for directory in directories:
        facts = json.loads((directory / "run.json").read_text())
        assert facts["state"] == "finished"
        assert facts["command"].startswith("layersurgery reproduce --models")
    edits = json.loads((place / "out" / "one" / "sweep" / "run.json").read_text())["arguments"]["edits"]
    assert {edit for edit, *_ in edits} == {"swap", "drop", "skip-attention", "skip-mlp"}
    figures = {file.name for file in (place / "out" / "figures").iterdir()}
    drawn = {
        "robustness",
        "stages",
        "lens",
        "attention",
        "norms",
        "neurons",
        "similarity",
        "subjoiners",
        "examples",
        "probe",
        "effects",
    }
    assert drawn <= {name.removesuffix(".png") for name in figures}
    page = (place / "out" / "report.html").read_text()
    assert page.count("<h2") > 3
    assert "subjoiner head" in page
    assert "Held-out accuracy" in page

    # Nothing is measured twice, and what is missing is made.
    before = {file: file.stat().st_mtime_ns for file in (place / "out").rglob("*.parquet")}
    (place / "out" / "two" / "probe" / "run.json").unlink()
    for file in (place / "out" / "two" / "probe").iterdir():
        file.unlink()
        before.pop(file, None)
    assert [part["left"] for part in result_of(*words, "--estimate")["plan"]] == [[], ["probe"]]
    again = run(*words)
    assert again.exit_code == 0
    assert again.stderr.count("has finished; nothing to do") == 7
    assert "At least 0 s in total" in again.stderr
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert (place / "out" / "two" / "probe" / "probe.parquet").exists()
    assert "8 runs are in" in again.stdout


@pytest.mark.slow
def test_what_cannot_be_done_is_said_and_the_rest_is_done(place: Path, tmp_path: Path) -> None:
    found = run(*asked(place, place / "one", tmp_path / "missing"))
    assert found.exit_code == 1
    assert "Cannot be read" in found.stderr
    assert f"Not done: {tmp_path / 'missing'}" in found.stdout
    assert "4 runs are in" in found.stdout
    other = run(*[word if word != 120 else 90 for word in asked(place, place / "one")])
    assert other.exit_code == 1
    assert "one, sweep: " in other.stdout
    assert "text tokens 120 there, 90 now" in other.stdout
    alone = run(*asked(place, tmp_path / "missing"))
    assert alone.exit_code == 1
    assert "nothing could be measured" in alone.stderr
    assert run(*asked(place, tmp_path / "missing"), "--estimate").exit_code == 1


def test_what_cannot_be_meant(place: Path, tmp_path: Path) -> None:
    same = run(*asked(place, place / "one", tmp_path / "one"))
    assert same.exit_code == 2
    assert "would both be written to" in same.stderr
    assert run("reproduce", "--models", " , ").exit_code == 2


def test_the_papers_models() -> None:
    assert len(set(reproduce.PAPER)) == 11
    assert sum("pythia" in name for name in reproduce.PAPER) == sum("gpt2" in name for name in reproduce.PAPER) == 4


def test_the_papers_models_get_the_first_token_that_the_paper_gives_them() -> None:
    assert paper_options(PAPER[0], RunOptions()).bos is True
    assert paper_options(PAPER[0], RunOptions(bos="no")).bos == "no"
    assert paper_options("smollm2-135m", RunOptions()) == RunOptions()
