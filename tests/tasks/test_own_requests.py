"""Requests of your own have the log-likelihoods of lm-eval's model, and its accuracies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import layersurgery as ls
from layersurgery.plans.variants import variants
from layersurgery.sweeps.measurer import Measurer
from layersurgery.tasks.own_requests import OwnRequests
from tests.cli.test_cli import run
from tests.support.task_definitions import CITIES, write_definitions
from tests.support.tiny_checkpoint import checkpoint, tiny_tokenizer
from tests.support.zoo import tiny_model

PAIRS = [
    ("the city of France is", " Paris"),
    ("", "a first word"),
    ("a context that ends with a space ", "and goes on"),
    ("one ", "a"),
    ("one ", "a"),
]
ROWS = [
    {"context": f"the city of {country} is", "continuation": f" {city}", "question": country, "correct": city == right}
    for country, right in CITIES.items()
    for city in CITIES.values()
]


def theirs(model: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """What lm-eval's model answers."""
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    answers: list[tuple[float, bool]] = HFLM(pretrained=model, tokenizer=tiny_tokenizer()).loglikelihood(asked)
    return answers


def test_means_are_those_of_the_answers_of_lm_evals_model() -> None:
    model = tiny_model("llama")
    frame = ls.sweep(model, "drop 2", tasks=ls.tasks.requests(PAIRS), tokenizer=tiny_tokenizer())
    before = np.array(theirs(model, PAIRS))
    with ls.operate(model, "drop 2"):
        after = np.array(theirs(model, PAIRS))
    for number, name in enumerate(("log_likelihood", "greedy")):
        values, base = after[:, number], before[:, number]
        row = frame.iloc[1]
        assert row[f"task_mine_{name}"] == pytest.approx(values.mean(), rel=1e-5)
        assert row[f"task_mine_{name}_sem"] == pytest.approx(values.std(ddof=1) / len(PAIRS) ** 0.5, rel=1e-4)
        assert row[f"task_mine_{name}_change"] == pytest.approx((values - base).mean(), rel=1e-4, abs=1e-7)
    assert frame.sequences[0] == len(PAIRS) - 1, "equal requests are measured once"


@pytest.mark.parametrize("name", ["gpt_neo", "gpt_bigcode"])
@pytest.mark.parametrize("plan", ["skip-mlp 3 from 1", "drop 2 from 3"])
def test_edits_of_later_tokens_see_each_request_alone(name: str, plan: str) -> None:
    """Requests in one row, as others are measured, would have other positions than the edit counts."""
    starts = ("the city of France is the city of France is the city", "of a city", "is a city", "one city", "no city")
    pairs = [(start, f" {end}") for start in starts for end in CITIES.values()]
    model = tiny_model(name, **({"window_size": 64} if name == "gpt_neo" else {}))
    frame = ls.sweep(model, plan, tasks=ls.tasks.requests(pairs), tokenizer=tiny_tokenizer())
    contexts = Measurer(model, variants([ls.Plan.parse(plan)], 6)).contexts
    assert contexts.outcome is not None
    assert contexts.outcome.startswith("an edit leaves the first tokens of each request")
    with ls.operate(model, plan):
        after = np.array(theirs(model, pairs))
    column = next(name for name in frame if name.startswith("task_") and name.endswith("log_likelihood"))
    assert frame[column].iloc[-1] == pytest.approx(after[:, 0].mean(), abs=1e-4)
    assert frame[column].iloc[0] == pytest.approx(np.array(theirs(model, pairs))[:, 0].mean(), abs=1e-4)


def test_questions_have_the_accuracies_of_lm_evals_task(tmp_path: Path) -> None:
    write_definitions(tmp_path)
    model = tiny_model("llama")
    mine = ls.tasks.requests(ROWS, name="cities")
    frame = ls.sweep(model, "drop", tasks=[mine, "choice"], task_path=tmp_path, tokenizer=tiny_tokenizer(), limit=5)
    for end in ("", "_sem", "_change", "_change_low"):
        pd.testing.assert_series_equal(
            frame[f"task_cities_acc{end}"], frame[f"task_choice_acc{end}"], check_names=False
        )
    right = [(f"the city of {country} is", f" {city}") for country, city in CITIES.items()][:5]
    expected = np.mean([log_likelihood for log_likelihood, _ in theirs(model, right)])
    assert frame.task_cities_log_likelihood[0] == pytest.approx(expected, rel=1e-5)
    assert "task_cities_acc_norm" in frame


def test_answers_may_have_contexts_of_their_own() -> None:
    pairs = [("he has it", " now", 1, True), ("she has it", " now", 1, False)]
    pairs += [("the city", " a", 2, False), ("city", " a", 2, True)]
    rows = [dict(zip(("context", "continuation", "question", "correct"), pair, strict=True)) for pair in pairs]
    model = tiny_model("llama")
    frame = ls.sweep(model, "drop 1", tasks=ls.tasks.requests(pd.DataFrame(rows)), tokenizer=tiny_tokenizer())
    found = np.array([value for value, _ in theirs(model, [pair[:2] for pair in pairs])]).reshape(2, 2)
    assert frame.task_mine_acc[0] == (found.argmax(1) == [0, 1]).mean()


def test_all_forms_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "capitals of-1.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    of_file = ls.tasks.requests(path)
    assert of_file.name == "capitals_of-1"
    assert of_file.documents == ls.tasks.requests(ROWS).documents == ls.tasks.requests(pd.DataFrame(ROWS)).documents
    pairs = [(row["context"], row["continuation"]) for row in ROWS]
    table = pd.DataFrame(pairs, columns=["context", "continuation"])
    assert ls.tasks.requests(pairs) == ls.tasks.requests(table)
    assert ls.tasks.requests(pairs).fingerprint != of_file.fingerprint


def test_on_the_command_line_and_resumed(tmp_path: Path) -> None:
    model, path = checkpoint(tmp_path / "model"), tmp_path / "capitals.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    asked = ["sweep", model, "--edits", "drop", "--layers", "2:4", "--requests", path, "-o", tmp_path / "out"]
    shown = run(*asked)
    assert shown.exit_code == 0, shown.output
    assert "capitals_acc" in shown.stdout
    assert "Using the finished run in" in run(*asked).stderr
    swapped = [row | {"correct": not row["correct"]} if number < 2 else row for number, row in enumerate(ROWS)]
    path.write_text("\n".join(map(json.dumps, swapped)))
    refused = run(*asked)
    assert refused.exit_code == 1, "another answer is correct, so these are other requests"
    assert "other arguments: own_requests capitals" in " ".join(refused.stderr.split())
    path.write_text('{"context": "a"}')
    wrong = run(*asked)
    assert (wrong.exit_code, "line 1: continuation is missing" in " ".join(wrong.stderr.split())) == (2, True)


PAIR = {"context": "a", "continuation": " b"}


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], "there are no pairs"),
        ({"context": "a"}, "not dict"),
        (7, "not int"),
        ([PAIR, "ab"], "pair 1 is neither two texts nor has it keys"),
        ([{"context": "a"}], "pair 0: continuation is missing"),
        ([("a", 3)], "pair 0: continuation is of the type int, not text"),
        ([("a", "")], "pair 0: continuation is empty"),
        ([PAIR | {"corect": True}], "pair 0 has the key 'corect'; did you mean correct"),
        ([PAIR | {"question": 1}], "pair 0 has question and no correct"),
        ([PAIR | {"correct": True}], "pair 0 has correct and no question"),
        ([PAIR | {"question": 1, "correct": "yes"}], "correct is 'yes', not true or false"),
        ([PAIR | {"question": [1], "correct": True}], "question is of the type list"),
        ([PAIR | {"question": 1, "correct": True}, PAIR], "pair 1 has no question, and others have"),
        ([PAIR | {"question": 1, "correct": True}], r"the question 1 \(pair 0\) has 1 continuations"),
        ([PAIR | {"question": 1, "correct": True}] * 2, "of which 2 are correct"),
        ("pairs.csv", "pairs.csv is not a .jsonl file"),
    ],
)
def test_what_is_refused(pairs: Any, words: str) -> None:
    with pytest.raises(ls.PlanError, match=words):
        ls.tasks.requests(pairs)


def test_names_and_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ls.SourceError, match="cannot read nowhere.jsonl: No such file"):
        ls.tasks.requests("nowhere.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n{")
    with pytest.raises(ls.PlanError, match="a.jsonl, line 2 is not JSON"):
        ls.tasks.requests(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(ls.PlanError, match="b.jsonl has no pairs"):
        ls.tasks.requests(tmp_path / "b.jsonl")
    with pytest.raises(ls.PlanError, match="only, not 'my pairs'"):
        ls.tasks.requests([PAIR], name="my pairs")
    mine = ls.tasks.requests([PAIR])
    refused: list[tuple[Any, str]] = [([mine, mine], "two tasks are called mine"), ([3], "not int")]
    for tasks, words in refused:
        with pytest.raises(ls.PlanError, match=words):
            ls.sweep(tiny_model("llama"), "drop 2", tasks=tasks, tokenizer=tiny_tokenizer())


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ls.SourceError, match=r"install it with pip install 'layersurgery\[tasks\]'"):
        ls.sweep(tiny_model("llama"), "drop 2", tasks=ls.tasks.requests([PAIR]), tokenizer=tiny_tokenizer())


def test_nothing_large_is_imported_to_read_pairs() -> None:
    code = (
        "import sys, layersurgery as ls; ls.tasks.requests([('a', ' b')]); "
        "print({'torch', 'lm_eval', 'pandas', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
    assert OwnRequests.__doc__
