"""`layersurgery reproduce`: all experiments on two tiny models, planned, gone on with, and reported."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import layersurgery as ls
from layersurgery.analyses import neuron_probes
from layersurgery.reports.paper_experiments import (
    FIGURES,
    MODELS,
    PaperRequest,
    TaskCost,
    copied_layers,
    give_first_token,
    paper_options,
)
from layersurgery.runs.estimate import estimate_run
from layersurgery.runs.options import RunOptions
from layersurgery.runs.processes import run_session
from layersurgery.runs.reporter import Reporter
from layersurgery.runs.requests import read_model_info
from layersurgery.tasks.task_request import TaskRequest
from tests.analyses.test_probe import PLACE, knowing
from tests.analyses.test_word_senses import toy_rows, write_public
from tests.cli.test_cli import result_of, run
from tests.support.tiny_checkpoint import LETTERS, checkpoint, tiny_tokenizer

ING = len(LETTERS) + 5
FIRST_VERSION = list(PaperRequest.of("v1").experiments)


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
    return ["reproduce", "--paper", "v1", "--models", ",".join(map(str, models)), *text, "-o", place / "out"]


@pytest.mark.weekly
def test_plan_run_and_go_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = asked(place, place / "one", place / "two")
    plan = result_of(*words, "--estimate")["plan"]
    assert [part["left"] for part in plan] == [FIRST_VERSION] * 2
    assert all(part["flops"] > 0 and part["seconds"] > 0 and part["depth"] == 6 for part in plan)
    assert not (place / "out").exists()

    value = result_of(*words)
    assert value["not_done"] == {}
    directories = [place / "out" / name / experiment for name in ("one", "two") for experiment in FIRST_VERSION]
    assert value["done"] == list(map(str, directories))
    for directory in directories:
        facts = json.loads((directory / "run.json").read_text())
        assert facts["state"] == "finished"
        assert facts["command"].startswith("layersurgery reproduce --paper v1 --models")
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
    assert again.stderr.count("Using the finished run in") == 7
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
    assert "--tokens 120 there, 90 now" in other.stdout
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
    first, later = MODELS["v1"], MODELS["v3"]
    assert len(set(first)) == 11
    assert sum("pythia" in name for name in first) == sum("gpt2" in name for name in first) == 4
    assert later[:11] == first
    assert len(set(later)) == 16


def test_the_papers_models_get_the_first_token_that_the_paper_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert paper_options(MODELS["v1"][0], RunOptions()).bos is True
    assert paper_options(MODELS["v3"][-1], RunOptions()).bos is True
    assert paper_options(MODELS["v1"][0], RunOptions(bos="no")).bos == "no"
    assert paper_options("smollm2-135m", RunOptions()) == RunOptions()

    # Qwen's tokenizer has no token for the beginning of text.
    path = str(checkpoint(tmp_path / "qwen"))
    tiny_tokenizer(bos_token=None).save_pretrained(path)
    monkeypatch.setitem(MODELS, "v3", (path,))

    def read(session: Any) -> Any:
        give_first_token(session)
        return session.texts.text.ids[:, 0].unique().tolist()

    options = RunOptions(data="pydoc", tokens=64, context=32)
    assert run_session(path, paper_options(path, options), read) == [2]
    monkeypatch.setitem(MODELS, "v3", ())
    with pytest.raises(ls.PlanError, match="has no beginning-of-text token"):
        run_session(path, RunOptions(data="pydoc", tokens=64, context=32, bos=True), read)


def test_the_later_version_has_all_of_the_first() -> None:
    later = PaperRequest.of(wic="pairs.data.txt")
    assert set(later.experiments) == set(FIGURES) > set(FIRST_VERSION)
    assert later.tasks == TaskRequest.of("lambada_openai,arc_easy,hellaswag")
    assert later.left_out == {}
    assert list(PaperRequest.of("v3", tasks="none").left_out) == ["wic", "tasks"]
    assert PaperRequest.of("v1").left_out == {}
    for depth in (1, 2, 12, 30):
        assert copied_layers(depth).stop == depth
        copied = later.experiments["copying"].variants
        assert copied is not None
        assert len(copied(depth)) == len(copied_layers(depth)) > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--paper", "v2"], "--paper is a version of the paper, v1 or v3, not 'v2'"),
        (["--paper", "v1", "--limit", 3], "limit is for an experiment of v3, and v1 is asked for"),
        (["--tasks", "none", "--limit", 3], "--limit has an effect only with --tasks, which is none"),
        (["--tasks", ","], "no task is named"),
    ],
)
def test_what_is_refused(options: list[Any], words: str) -> None:
    found = run("reproduce", "--models", "smollm2-135m", *options)
    assert (found.exit_code, words in found.stderr) == (2, True), found.stderr


def write_task(directory: Path) -> list[Any]:
    """Write a task of multiple choice, and return the options that name it."""
    rows = [{"text": f"{letter} is", "answer": number % 2} for number, letter in enumerate("abcdefgh")]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "letters.yaml").write_text(f"""
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/rows.jsonl}}, cache_dir: {directory}/cache}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: answer
doc_to_choice: ["good", "not bad"]
output_type: multiple_choice
metric_list: [{{metric: acc}}]
""")
    return ["--tasks", "letters", "--task-path", directory]


def test_the_cost_of_tasks_is_that_of_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path)
    path = str(checkpoint(tmp_path / "model"))
    request = TaskRequest.of("letters", paths=tmp_path)
    info = read_model_info(path, None, Reporter())
    cost = TaskCost(request, Reporter())
    found = cost.estimate(path, info, RunOptions(data="pydoc"))
    # 8 contexts of 4 tokens ("a is"), each with 2 answers of 5 and 8 tokens (" good", " not bad").
    length = 8 * (4 + 5 + 8) // 16
    expected, _ = estimate_run(
        path, info, PaperRequest.of("v1").experiments["sweep"].variants(6)[:11],  # type: ignore[misc]
        RunOptions(data="pydoc", tokens=16 * length, context=length, read=(5 + 8) // 2), Reporter(),
    )  # fmt: skip
    assert found is not None
    assert found.flops == expected.flops
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    missing = TaskCost(request, Reporter())
    assert missing.estimate(path, info, RunOptions()) is None
    assert "lm-eval, which is not installed" in missing.fault


@pytest.mark.slow
def test_the_later_version_runs_resumes_and_says_what_it_leaves_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuron_probes, "NEURONS", 4)  # probes spend their time on fitting regressions
    monkeypatch.setattr(neuron_probes, "SHUFFLES", 2)
    tasks, pairs = write_task(tmp_path), write_public(tmp_path, toy_rows())
    text = ["--data", place / "story.txt", "-n", 120, "--context", 30, "-o", tmp_path / "out"]
    words = ["reproduce", "--models", f"{place / 'one'},{place / 'two'}", *tasks, *text]
    plan = result_of(*words, "--estimate")
    assert list(plan["left_out"]) == ["wic"]
    assert plan["plan"][0]["left"] == list(PaperRequest.of().experiments)
    assert plan["plan"][0]["not_counted"] == ""
    value = result_of(*words)
    assert value["not_done"] == {}
    assert list(value["left_out"]) == ["wic"]
    assert len(value["done"]) == 14
    frame = ls.read_results(tmp_path / "out" / "one" / "tasks")
    assert frame.task_letters_acc.notna().all()
    assert set(frame.edit) == {"none", "swap", "drop"}
    copied = ls.read_results(tmp_path / "out" / "one" / "copying")
    assert copied.layer.dropna().tolist() == [2, 3, 4, 5]
    figures = tmp_path / "out" / "figures"
    assert (figures / "copying" / "copies.png").exists()
    assert (figures / "cka.png").exists()

    again = run(*words, "--wic", pairs)
    assert again.exit_code == 0, again.output
    assert again.stderr.count("Using the finished run in") == 14
    assert (tmp_path / "out" / "two" / "wic" / "wic.png").exists()
    assert (figures / "wic.png").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Shuffled labels" in page
    assert "copies" in page

    # Tasks that cannot be had do not stop the rest.
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    one = ["reproduce", "--models", place / "one", *tasks, *text]
    broken = run(*one[:-1], tmp_path / "broken")
    assert broken.exit_code == 1
    assert "The cost of the tasks is not counted: tasks need lm-eval" in broken.stderr
    assert broken.stdout.count("tasks: tasks need lm-eval, which is not installed") == 1
    assert "6 runs are in" in broken.stdout
