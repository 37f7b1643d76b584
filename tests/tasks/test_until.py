"""An edit leaves the tasks once the change of their first metric is known as precisely as asked."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import layersurgery as ls
from layersurgery.tasks.document_order import DocumentOrder
from layersurgery.tasks.own_requests import OwnRequests
from layersurgery.tasks.task_precision import change_interval
from tests.support.task_definitions import write_definitions
from tests.support.tiny_checkpoint import tiny_tokenizer
from tests.support.zoo import tiny_model

WORDS = ["the", "city", "of", "France", "is", "Paris", "Rome", "layer", "once", "upon", "a", "time"]
EDITS = ["drop 0", "drop 3"]


@pytest.fixture(scope="module")
def mine() -> OwnRequests:
    draw = random.Random(0)
    rows = []
    for question in range(90):
        context, right = " ".join(draw.choices(WORDS, k=4)), draw.randrange(2)
        for answer in range(2):
            continuation = " " + " ".join(draw.choices(WORDS, k=2))
            row = {"context": context, "continuation": continuation, "question": question, "correct": answer == right}
            rows.append(row)
    return ls.tasks.requests(rows)


def measured(mine: Any, **options: Any) -> pd.DataFrame:
    given = {"tokenizer": tiny_tokenizer(), "batch_size": 8} | options
    return pd.DataFrame(ls.sweep(tiny_model("llama"), EDITS, tasks=mine, **given))


def accuracies(directory: Path, mine: OwnRequests, row: int) -> dict[int, float]:
    """Return whether each document is right, from the table of requests; documents with both answers only."""
    table = ls.read_results(directory, "requests")
    table = table[table.row == row]
    found = {}
    for document, answers in table.groupby("document"):
        if len(answers) == 2:
            best = int(np.argmax(answers.sort_values("request").log_likelihood))
            found[int(document)] = float(best == mine.documents[int(document)].correct)
    return found


def test_an_edit_leaves_when_its_change_is_known(mine: OwnRequests, tmp_path: Path) -> None:
    frame = measured(mine, until="mine=35pt", directory=tmp_path / "run")
    assert frame.precise.tolist()[1:] == [True, True]
    assert frame.documents.max() < len(mine.documents)
    assert frame.documents[0] == frame.documents.max()
    for row in (0, 1, 2):
        right = accuracies(tmp_path / "run", mine, row)
        assert len(right) == frame.documents[row]
        assert frame.task_mine_acc[row] == pytest.approx(np.mean([*right.values()]))
        base = accuracies(tmp_path / "run", mine, 0)
        changes = np.array([value - base[number] for number, value in right.items()])
        assert frame.task_mine_acc_change[row] == pytest.approx(changes.mean(), abs=1e-12)
        if row:
            low, high = frame.task_mine_acc_change_low[row], frame.task_mine_acc_change_high[row]
            assert low <= changes.mean() <= high
            assert (high - low) / 2 <= 0.35
    assert "at every number of sequences" in frame.interval[0]
    facts = ls.read_results(tmp_path / "run").attrs["run"]
    assert facts["until"] == {"targets": "mine to 35 pt", "confidence": 0.95}
    assert facts["stopping"]["finished"] == 2


def test_nothing_else_changes_when_all_documents_are_needed(mine: OwnRequests) -> None:
    whole, stopped = measured(mine, limit=20), measured(mine, limit=20, until="mine=1pt")
    assert not stopped.precise[1:].any()
    assert (stopped.documents == 20).all()
    for name in ("acc", "acc_norm", "acc_sem", "greedy", "acc_change", "acc_change_sem"):
        assert stopped[f"task_mine_{name}"].tolist() == whole[f"task_mine_{name}"].tolist(), name
    assert np.allclose(stopped.task_mine_log_likelihood, whole.task_mine_log_likelihood, rtol=1e-6)
    assert np.allclose(stopped.kl_nats, whole.kl_nats, atol=1e-7)


@pytest.mark.slow
def test_an_interruption_and_a_sharper_target_continue_the_run(mine: OwnRequests, tmp_path: Path) -> None:
    def stop(done: int, _total: int) -> None:
        if done >= 24:
            raise KeyboardInterrupt

    whole = measured(mine, until="mine=35pt")
    with pytest.raises(KeyboardInterrupt):
        measured(mine, until="mine=35pt", directory=tmp_path / "run", progress=stop)
    resumed = measured(mine, until="mine=35pt", directory=tmp_path / "run")
    assert resumed[whole.columns].equals(whole)
    sharper = measured(mine, until="mine=30pt", directory=tmp_path / "run")
    assert (sharper.documents >= resumed.documents).all()
    assert sharper.documents.sum() > resumed.documents.sum()


@pytest.mark.slow
def test_text_and_tasks_have_targets_of_their_own(mine: OwnRequests, tmp_path: Path) -> None:
    text = [f"Once upon a time there were {number} layers." for number in range(40)]
    until = {"kl": "90%", "mine": "35pt"}
    frame = measured(mine, text=text, until=until, shuffle=True, directory=tmp_path / "run")
    of_tasks = ls.read_results(tmp_path / "run" / "tasks")
    assert frame.documents.tolist() == of_tasks.documents.tolist()
    assert ls.read_results(tmp_path / "run").attrs["run"]["until"]["targets"] == "kl_nats to 90 %"
    assert of_tasks.attrs["run"]["until"]["targets"] == "mine to 35 pt"
    assert frame.precise[0] is None


def test_the_order_is_drawn_and_documents_stay_together() -> None:
    labels = [("a", document) for document in range(30) for _ in range(3)]
    one, other = (DocumentOrder.of(labels, seed) for seed in (0, 1))
    assert one.documents != other.documents
    assert sorted(one.documents) == sorted(other.documents)
    assert [labels[number] for number in one.requests] == [label for label in one.documents for _ in range(3)]
    sequence_of = np.argsort(one.requests)  # no two requests are equal
    assert one.complete(sequence_of.tolist(), 5) == one.documents[:1]
    assert one.complete(sequence_of.tolist(), 6) == one.documents[:2]
    assert one.complete(sequence_of.tolist(), 90) == one.documents


@pytest.mark.slow
def test_the_interval_where_one_stops_holds_the_change_of_all_documents() -> None:
    """Coverage over 300 random orders, stopping as soon as the half width is reached."""
    rng = np.random.default_rng(0)
    population = rng.choice([-1.0, 0.0, 1.0], p=[0.12, 0.83, 0.05], size=3000)
    covered = []
    for _ in range(300):
        changes = rng.permutation(population)
        for count in range(100, len(changes), 100):
            low, high = change_interval(changes[:count], 0.95, 0.05)
            if (high - low) / 2 <= 0.05:
                break
        assert count < 2900, "it stops before the end"
        covered.append(low <= population.mean() <= high)
    assert np.mean(covered) >= 0.95


@pytest.mark.parametrize(
    ("tasks", "until", "words"),
    [
        ("rolling", "rolling=2pt", "rolling has the metric word_perplexity, whose values are not between 0 and 1"),
        ("choice", "choice=2%", "`until` choice=2%: give half of the interval's width in percentage points"),
        ("choice", "choice=0pt", "`until` choice=0pt"),
        ("choice", "choice=2pt,kl=2%", "metrics of a text need a text"),
        ("choice", "completion=2pt", "metrics of a text need a text"),
    ],
)
def test_what_is_refused(tasks: str, until: str, words: str, tmp_path: Path) -> None:
    write_definitions(tmp_path)
    with pytest.raises(ls.PlanError, match=words):
        measured(tasks, until=until, task_path=tmp_path)
