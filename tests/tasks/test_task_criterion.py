"""Layers are chosen by tasks as a plain loop over lm-eval's own `simple_evaluate` would choose them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import layersurgery as ls
from layersurgery.analyses.descriptions import describe_costs, describe_ranks
from layersurgery.analyses.search_tables import describe_search
from layersurgery.plans.route import Route
from tests.cli.test_cli import result_of, run
from tests.support.tiny_checkpoint import checkpoint, tiny_tokenizer
from tests.support.zoo import DEPTH, slow, tiny_model
from tests.tasks.test_tasks import definitions, theirs

__all__ = ["definitions"]  # a fixture


@pytest.mark.parametrize("task", ["choice", slow("completion")])
def test_the_first_layer_to_go_leaves_the_model_that_lm_eval_finds_best(task: str, definitions: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    column = f"task_{task}_acc"
    before, after = theirs(model, tokenizer, [task], definitions)[column], []
    for layer in range(DEPTH):
        with ls.operate(model, f"drop {layer}"):
            after.append(theirs(model, tokenizer, [task], definitions)[column])
    pruning = ls.prune(model, remove=2, by=f"task:{task}", task_path=definitions, tokenizer=tokenizer)
    assert after[pruning.layers[0]] == max(after)
    assert set(pruning.costs.criterion) == {"unedited", "kl", "task"}
    costs = pruning.costs[pruning.costs.criterion == "task"].set_index("removed")
    assert costs[column][1] == max(after)
    assert costs.cost[1] == pytest.approx(before - max(after), abs=1e-12)
    ranks = ls.rank(model, by=f"task:{task}", task_path=definitions, tokenizer=tokenizer)
    assert pruning.layers == tuple(ranks.sort_values("cost_rank").layer[:2])
    np.testing.assert_allclose(ranks.cost, before - np.array(after), atol=1e-12)


@pytest.mark.slow
def test_the_first_branch_to_go_leaves_the_model_that_lm_eval_finds_best(definitions: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    asked: dict[str, Any] = {"by": "task:choice", "task_path": definitions, "tokenizer": tokenizer}
    before = theirs(model, tokenizer, ["choice"], definitions)["task_choice_acc"]
    after: dict[Any, float] = {}
    for layer, part in itertools.product(range(DEPTH), ("attention", "mlp")):
        with ls.operate(model, f"skip-{part} {layer}"):
            after[layer, part] = theirs(model, tokenizer, ["choice"], definitions)["task_choice_acc"]
    ranks = ls.rank(model, of="branches", **asked)
    np.testing.assert_allclose(ranks.cost, [before - after[row.layer, row.part] for row in ranks.itertuples()])
    pruning = ls.prune(model, remove_branches=2, **asked)
    assert [after[part.layer, part.branch] for part in pruning.parts] == sorted(after.values(), reverse=True)[:2]
    greedy = ls.prune(model, remove_attention=1, greedy=True, **asked)
    assert after[greedy.layers[0], "attention"] == max(after[layer, "attention"] for layer in range(DEPTH))


@pytest.mark.slow
def test_a_metric_that_is_better_when_it_is_low_costs_when_it_rises(definitions: Path) -> None:
    ranks = ls.rank(tiny_model("llama"), by="task:rolling", task_path=definitions, tokenizer=tiny_tokenizer())
    assert set(ranks.metric) == {"word_perplexity"}
    assert ranks.sort_values("cost_rank").task_rolling_word_perplexity.is_monotonic_increasing
    assert ranks.cost_sem.isna().all()


def test_equal_accuracies_are_ordered_by_the_likelihood_of_the_correct_answers(
    definitions: Path, tmp_path: Path
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ranks = ls.rank(model, by="task:choice", task_path=definitions, tokenizer=tokenizer)
    assert ranks.cost.nunique() < DEPTH, "the test needs ties"
    keys = [(row.cost, -row.answer_log_likelihood) for row in ranks.sort_values("cost_rank").itertuples()]
    assert keys == sorted(keys)
    ls.sweep(model, "drop", tasks="choice", task_path=definitions, tokenizer=tokenizer, directory=tmp_path)
    asked = ls.read_results(tmp_path, "requests")
    for row in ranks.itertuples():
        scores = asked[asked.row == row.layer + 1].log_likelihood.to_numpy().reshape(6, 6)
        assert row.answer_log_likelihood == pytest.approx(np.diag(scores).mean(), rel=1e-6)
        assert row.cost_sem == pytest.approx(
            np.std((scores.argmax(1) == np.arange(6)) * 1.0 - _right_before(asked), ddof=1) / math.sqrt(6)
        )


def _right_before(asked: Any) -> Any:
    scores = asked[asked.row == 0].log_likelihood.to_numpy().reshape(6, 6)
    return (scores.argmax(1) == np.arange(6)) * 1.0


@pytest.mark.parametrize("task", ["choice", slow("completion")])
def test_a_beam_of_one_is_greedy_pruning(task: str, definitions: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    asked: dict[str, Any] = {"by": f"task:{task}", "task_path": definitions, "tokenizer": tokenizer, "remove": 3}
    pruning = ls.prune(model, greedy=True, **asked)
    search = ls.search(model, beam=1, directory=tmp_path, **asked)
    assert search.plan == pruning.plan
    kept = [set(range(DEPTH)) - set(Route.parse(route).blocks) for route in search.tried[search.tried.kept].route]
    assert [removed - before for before, removed in itertools.pairwise([set(), *kept])] == [
        {layer} for layer in pruning.layers
    ]
    assert search.tried.race.isna().all()
    gone = [pruning.layers[0]]
    for layer in pruning.layers[1:2]:  # each step leaves the best accuracy of all that it could leave
        scores = {}
        for block in set(range(DEPTH)) - set(gone):
            with ls.operate(model, f"drop {' '.join(map(str, sorted([*gone, block])))}"):
                scores[block] = theirs(model, tokenizer, [task], definitions)[f"task_{task}_acc"]
        assert scores[layer] == max(scores.values())
        gone.append(layer)
    words = describe_search(search.results)
    assert f"fall of acc on {task}" in words
    assert "Equal values are ordered by the log-likelihood of the correct answers" in words


def test_a_search_chooses_the_best_of_its_finalists(definitions: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    search = ls.search(model, remove=2, beam=3, by="task:choice", limit=5, task_path=definitions, tokenizer=tokenizer)
    results = search.results
    finalists = results[results.finalist]
    best = finalists.sort_values(["cost", "answer_log_likelihood"], ascending=[True, False]).iloc[0]
    assert best.plan == str(search.plan)
    np.testing.assert_allclose(results.above_winner, results.cost - best.cost, atol=1e-12)
    assert (results.cost == results.task_choice_acc[0] - results.task_choice_acc).all()


@pytest.mark.slow
def test_on_the_command_line_it_resumes_and_writes_the_checkpoint(definitions: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    asked = ["prune", path, "--remove", 2, "--by", "task:choice", "--task-path", definitions, "--greedy"]
    shown = run(*asked, "-o", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert "a race compares KL, so by a task there is none" in " ".join(shown.stderr.split())
    assert "criterion: fall of acc on choice, measured again after each removal" in " ".join(shown.stdout.split())
    results = tmp_path / "out-results"
    assert {file.name for file in results.iterdir()} == {"rank", "step-01", "step-02", "costs"}
    facts = json.loads((results / "step-02" / "run.json").read_text())
    assert (facts["arguments"]["by"], facts["arguments"]["tasks"]) == ("task:choice", ["choice"])
    files = {file: file.stat().st_mtime_ns for file in results.rglob("*.parquet")}
    value = result_of(*asked, "-o", tmp_path / "out", "--overwrite")
    assert {file: file.stat().st_mtime_ns for file in files} == files
    model = ls.load(path).model
    meant = ls.prune(model, remove=2, by="task:choice", greedy=True, task_path=definitions, tokenizer=str(path))
    assert value["layers"] == list(meant.layers)
    assert (results / "costs" / "costs.png").exists()
    costs, ranks = ls.read_results(results / "costs"), ls.read_results(results / "rank")
    assert "acc on choice " in describe_costs(costs)
    assert "acc on choice falls least without layer" in describe_ranks(ranks)
    found = result_of(
        "search",
        path,
        "--remove",
        1,
        "--by",
        "task:choice",
        "--task-path",
        definitions,
        "--results",
        tmp_path / "found",
    )
    assert found["by"] == "task:choice"
    ranked = run("rank", path, "--by", "task:choice", "--task-path", definitions, "-o", tmp_path / "ranked")
    assert ranked.exit_code == 0, ranked.output
    assert "acc on choice falls least without layer" in " ".join(ranked.stdout.split())


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"by": "task:"}, ls.PlanError, "`by` task: needs the name of one task of lm-eval; for example task:arc_easy"),
        ({"by": "task:choice,shots"}, ls.PlanError, "needs the name of one task of lm-eval, not choice,shots"),
        ({"by": "task:generation"}, ls.PlanError, "the task generation is of the type generate_until"),
        ({"by": "task:choice", "task_path": "nowhere"}, ls.SourceError, "nowhere is not a directory"),
        ({"by": "task:choice", "data": "pydoc"}, ls.PlanError, "`data` has no effect on tasks"),
        ({"by": "task:choice", "text": ["a"]}, ls.PlanError, "a task is measured instead of a text"),
        pytest.param(
            {"by": "task:chioce"},
            ls.PlanError,
            "lm-eval has no task 'chioce'; did you mean choice",
            marks=pytest.mark.slow,  # it looks through all tasks of lm-eval
        ),
    ],
)
def test_what_is_refused(given: dict[str, Any], kind: type[Exception], words: str, definitions: Path) -> None:
    options = {"task_path": definitions, "tokenizer": tiny_tokenizer()} | given
    functions: list[tuple[Any, dict[str, Any]]] = [(ls.prune, {"remove": 1}), (ls.search, {"remove": 1}), (ls.rank, {})]
    for function, more in functions:
        with pytest.raises(kind, match=words):
            function(tiny_model("llama"), **more, **options)


def test_what_has_no_effect_is_refused(definitions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny_model("llama"), {"task_path": definitions, "tokenizer": tiny_tokenizer()}
    with pytest.raises(ls.PlanError, match="`lowest` has no effect by a task"):
        ls.rank(model, by="task:choice", lowest=2, **asked)
    with pytest.raises(ls.PlanError, match="`by` is task:NAME for rank, not 'kl'"):
        ls.rank(model, by="kl")
    with pytest.raises(ls.PlanError, match="`limit` has an effect only by task:NAME"):
        ls.prune(model, [[5, 6, 7]], remove=1, limit=3)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ls.SourceError, match=r"install it with pip install 'layersurgery\[tasks\]'"):
        ls.prune(model, remove=1, by="task:choice", **asked)
