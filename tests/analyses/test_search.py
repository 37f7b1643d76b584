"""Searches on tiny models: the true optimum where the beam is wide, greedy pruning where it is one."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import layersurgery as ls
from layersurgery.analyses import search_run
from layersurgery.analyses.plan_run import Measure
from layersurgery.analyses.route_search import SearchSpace, plan_of
from layersurgery.analyses.search_cost import forecast
from layersurgery.analyses.search_tables import FinalMeasurement, describe_search, surely_above
from layersurgery.analyses.signal_tables import SignalTables
from layersurgery.errors import LayerSurgeryWarning
from layersurgery.plans.route import Route
from layersurgery.runs.options import RunOptions
from layersurgery.sweeps.measurer import Measurer
from layersurgery.sweeps.sweep import collect_sums
from tests.analyses.test_pruning import many_tokens
from tests.analyses.test_route_search import reachable
from tests.support.zoo import slow, tiny_model

DEPTH = 6
ROUTES = {
    "remove": set(itertools.combinations(range(DEPTH), DEPTH - 3)),
    "repeat": reachable(DEPTH, 2),
}


@torch.no_grad()
def scores_of(model: Any, ids: torch.Tensor, visits: set[tuple[int, ...]]) -> dict[Route, dict[str, float]]:
    """Measure routes with the edited model itself and a dense float64 softmax: its KL and its change in loss."""
    before = model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    targets = ids[:, 1:, None]
    found = {}
    for route in map(Route, visits):
        with ls.operate(model, plan_of(route, DEPTH)):
            after = model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        found[route] = {
            "kl": float((before.exp() * (before - after)).sum(-1).mean()),
            "loss": float((before - after).gather(-1, targets).mean()),
        }
    return found


@pytest.mark.parametrize("name", ["llama", slow("gpt2")])
def test_a_wide_beam_finds_the_true_optimum(name: str) -> None:
    model, ids = tiny_model(name).eval(), many_tokens(3)
    for goal, count in (("remove", 3), ("repeat", 2)):
        meant = scores_of(model, ids, ROUTES[goal])
        for by in ("kl", "loss"):
            asked: dict[str, Any] = {goal: count, "by": by}
            search = ls.search(model, ids, beam=1000, race=False, **asked)
            last = search.tried[search.tried.level == count]
            assert set(map(Route.parse, last.route)) == set(meant)
            for route, score in zip(last.route, last.score, strict=True):
                assert score == pytest.approx(meant[Route.parse(route)][by], abs=1e-5)
            assert search.route == min(meant, key=lambda route: meant[route][by])
            assert search.plan.route(DEPTH) == search.route


@pytest.mark.parametrize("race", [True, slow(False)])
def test_a_beam_of_one_is_greedy_pruning(race: bool) -> None:
    model, ids = tiny_model("llama").eval(), many_tokens(32)
    pruning = ls.prune(model, ids, remove=3, greedy=True, race=race, batch_size=8)
    search = ls.search(model, ids, remove=3, beam=1, race=race, batch_size=8)
    assert search.plan == pruning.plan
    kept = [set(range(DEPTH)) - set(Route.parse(route).blocks) for route in search.tried[search.tried.kept].route]
    assert [removed - before for before, removed in itertools.pairwise([set(), *kept])] == [
        {layer} for layer in pruning.layers
    ]
    greedy = pruning.costs[pruning.costs.criterion == "greedy"].set_index("plan").kl_nats
    found = search.results.set_index("plan").kl_nats
    assert found[greedy.index].tolist() == greedy.tolist()


def test_what_is_measured_in_full_and_what_is_on_the_front() -> None:
    model, ids = tiny_model("qwen2_moe").eval(), many_tokens(24)  # its blocks differ in size
    search = ls.search(model, ids, remove=3, beam=3, batch_size=8)
    results = search.results
    assert set(results.sequences) == {24}
    assert results.plan.iloc[0] == ""
    assert results.winner.sum() == 1
    finalists = results[results.finalist]
    assert len(finalists) == 3
    assert results.plan[results.winner].iloc[0] == str(search.plan)
    assert results.kl_nats[results.winner].iloc[0] == finalists.kl_nats.min()
    for plan, parameters in zip(results.plan[1:], results.parameters[1:], strict=True):
        edited = tiny_model("qwen2_moe")
        ls.operate_(edited, plan)
        assert parameters == sum(parameter.numel() for parameter in edited.parameters())
    for cost in ("parameters", "block_calls"):
        for row in results.itertuples():
            beaten = ((results[cost] <= getattr(row, cost)) & (results.kl_nats < row.kl_nats)) | (
                (results[cost] < getattr(row, cost)) & (results.kl_nats <= row.kl_nats)
            )
            assert getattr(row, f"front_{cost}") == (not beaten.any())
    assert set(search.front.plan) == set(results.plan[results.front_parameters | results.front_block_calls])
    best = results[results.winner].iloc[0]
    np.testing.assert_allclose(results.above_winner_nats, results.kl_nats - best.kl_nats, atol=1e-12)
    assert results.surely_above.notna().tolist() == (results.finalist & ~results.winner).tolist()


def test_differences_are_of_the_same_sequences(tmp_path: Path) -> None:
    search = ls.search(tiny_model("llama").eval(), many_tokens(24), remove=2, beam=3, batch_size=8, directory=tmp_path)
    sums = ls.read_results(tmp_path / "search", "sequences").pivot_table(
        index="sequence", columns="plan", values="kl_nats_sum", observed=True
    )
    others = search.results[search.results.finalist & ~search.results.winner]
    assert len(others) == 2
    for row in others.itertuples():
        differences = (sums[row.plan] - sums[str(search.plan)]) / 19  # positions of each sequence
        error = differences.std() / math.sqrt(24)
        assert row.above_winner_nats == pytest.approx(differences.mean())
        assert row.above_winner_nats_sem == pytest.approx(error)
        assert row.above_winner_nats_low == pytest.approx(differences.mean() - stats.t.ppf(0.975, 23) * error)
        # Three pairs of routes, so each may be wrong with a third of the probability.
        assert row.surely_above == (differences.mean() > stats.t.ppf(1 - 0.025 / 3, 23) * error)


@pytest.mark.parametrize("routes", [2, 4, 12])
def test_equal_routes_are_rarely_called_surely_worse_than_the_lowest(routes: int) -> None:
    generator, counts = np.random.default_rng(0), np.full(64, 10.0)
    wrong = [any(surely_above(generator.normal(0, 1, (64, routes)), counts)) for _ in range(400)]
    assert np.mean(wrong) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_a_repeat_counts_as_a_copy_in_the_checkpoint() -> None:
    model, ids = tiny_model("llama").eval(), many_tokens(2)
    search = ls.search(model, ids, repeat=1, beam=1)
    best = search.results[search.results.winner].iloc[0]
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert best.parameters - search.results.parameters[0] == block
    assert best.block_calls == DEPTH + 1


def test_a_race_finds_the_same_route_with_less_text() -> None:
    model, ids = tiny_model("llama").eval(), many_tokens(64)
    raced, full = (ls.search(model, ids, remove=2, beam=2, race=race, batch_size=8) for race in (True, False))
    assert raced.plan == full.plan
    assert set(full.tried.sequences) == {64}
    assert raced.tried.sequences.min() < 64
    assert set(full.tried.interval) == {"95 %, for this number of sequences"}
    assert set(raced.tried.interval) == {"95 %, at every number of sequences"}
    assert not (raced.tried.kept & (raced.tried.race == "higher")).any()
    pd.testing.assert_frame_equal(
        raced.results[raced.results.winner].reset_index(drop=True),
        full.results[full.results.winner].reset_index(drop=True),
    )


def test_stopped_it_resumes_with_the_same_digits(tmp_path: Path) -> None:
    model, ids = tiny_model("llama").eval(), many_tokens(24)
    asked: dict[str, Any] = {"remove": 2, "beam": 2, "batch_size": 8}
    alone = ls.search(model, ids, **asked)

    def stop(what: str, done: int, _total: int) -> None:
        if "level 2 of 2" in what and done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
        ls.search(model, ids, directory=tmp_path, progress=stop, **asked)
    assert {path.name for path in tmp_path.iterdir()} == {"level-01", "level-02"}
    first = (tmp_path / "level-01" / "level.parquet").stat().st_mtime_ns
    resumed: list[int] = []
    found = ls.search(model, ids, directory=tmp_path, progress=lambda _, done, __: resumed.append(done), **asked)
    assert (tmp_path / "level-01" / "level.parquet").stat().st_mtime_ns == first
    assert resumed[0] >= 8, "the first batches of level 2 are not measured again"
    assert found.plan == alone.plan
    for one, other in ((found.results, alone.results), (found.tried, alone.tried)):
        pd.testing.assert_frame_equal(
            pd.DataFrame(one), pd.DataFrame(other)[one.columns], check_exact=True, check_dtype=False
        )
    again = ls.search(model, ids, directory=tmp_path, **asked)
    pd.testing.assert_frame_equal(again.tried, found.tried)
    with pytest.raises(ls.OutputError, match="with other arguments: routes"):
        ls.search(model, ids, repeat=2, directory=tmp_path, batch_size=8)
    with pytest.raises(ls.OutputError, match="with other arguments: by kl there, loss now"):
        ls.search(model, ids, remove=2, by="loss", directory=tmp_path, batch_size=8)


def measure_in_memory(model: Any, ids: torch.Tensor, seen: list[Measurer]) -> Measure:
    """Return a function that measures a task, and keeps the measurers."""

    def measure(task: Any, _name: str, _subject: str) -> dict[str, pd.DataFrame]:
        seen.append(task.measurer(model, RunOptions()))
        sums = collect_sums(seen[-1], ids, torch.ones_like(ids), None, None)
        tables: dict[str, pd.DataFrame] = task.tables(SignalTables(seen[-1], sums, "tiny"))
        return tables

    return measure


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_route_is_chosen_if_no_finalist_has_a_finite_score(value: float) -> None:
    model, ids = tiny_model("llama"), many_tokens(2)

    def measure(task: Any, _name: str, _subject: str) -> dict[str, pd.DataFrame]:
        measurer = task.measurer(model, RunOptions())
        sums = collect_sums(measurer, ids, torch.ones_like(ids), None, None)
        if isinstance(task, FinalMeasurement):
            sums.values[:, 1:] = value
        tables: dict[str, pd.DataFrame] = task.tables(SignalTables(measurer, sums, "tiny"))
        return tables

    with pytest.raises(ls.MeasurementError, match="scores of all 2 finalists are NaN or infinite on all text"):
        search_run.find_route(SearchSpace.of(DEPTH, remove=1, beam=2), measure, race=False)


@pytest.mark.parametrize("goal", ["remove", "repeat"])
def test_block_calls_are_as_forecast(goal: str) -> None:
    space = SearchSpace.of(DEPTH, **{goal: 3}, beam=2)
    seen: list[Measurer] = []
    search_run.find_route(space, measure_in_memory(tiny_model("llama"), many_tokens(2), seen), race=False)
    for cost, measurer in zip(forecast(space), seen, strict=True):
        calls = measurer.measure(many_tokens(1), torch.ones(1, 20, dtype=torch.long)).calls
        assert calls == cost.block_calls if cost.exact else calls <= cost.block_calls
        assert len(measurer.routes) == cost.routes if cost.exact else len(measurer.routes) <= cost.routes


@pytest.mark.slow
def test_a_wider_beam_continues_from_what_was_measured(tmp_path: Path) -> None:
    model, ids = tiny_model("llama").eval(), many_tokens(3)
    ls.search(model, ids, remove=2, beam=1, race=False, directory=tmp_path)
    first = (tmp_path / "level-01" / "level.parquet").stat().st_mtime_ns
    found = ls.search(model, ids, remove=2, beam=3, race=False, directory=tmp_path)
    alone = ls.search(model, ids, remove=2, beam=3, race=False)
    assert (tmp_path / "level-01" / "level.parquet").stat().st_mtime_ns == first
    assert found.plan == alone.plan
    assert found.tried.score.tolist() == alone.tried.score.tolist()


def test_what_an_architecture_cannot_run_is_left_out_and_said() -> None:
    model, ids = tiny_model("rwkv").eval(), many_tokens(3)
    with pytest.warns(LayerSurgeryWarning, match="1 of 6 candidates cannot be run; .* 'drop 0': rwkv: block 0 holds"):
        search = ls.search(model, ids, remove=1)
    tried = search.tried.set_index("plan")
    assert tried.reason["drop 0"].startswith("rwkv: block 0 holds the norm of the embedding")
    assert not tried.measured["drop 0"]
    assert tried.drop(index="drop 0").measured.all()
    assert (tried.drop(index="drop 0").reason == "").all()
    assert 0 in search.route.blocks


def test_the_words_say_what_was_found() -> None:
    model, ids = tiny_model("llama").eval(), many_tokens(3)
    search = ls.search(model, ids, remove=3, beam=2)
    words, best = describe_search(search.results), search.results[search.results.winner].iloc[0]
    assert words.startswith(
        f"With 3 of 6 blocks: {search.plan}, KL {best.kl_nats:.3g} nats ({best.kl_nats_low:.3g} to "
    )
    assert "one-shot" in words
    assert words.endswith("(error probability 5 %).")
    wider = ls.search(model, ids, repeat=1, beam=3, by="loss")
    assert describe_search(wider.results).startswith(f"With 7 instead of 6 blocks: {wider.plan}, change in loss ")


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"remove": 1, "by": "size"}, ls.PlanError, "unknown score 'size'; choose from kl, loss"),
        ({"remove": 1, "by": "task:lambada"}, ls.PlanError, "a task is measured instead of a text; give one of them"),
        ({"remove": 1, "until": "kl=2%"}, ls.PlanError, "`until` is for sweep; search does not take it"),
        ({"remove": 1, "per_token": True}, ls.PlanError, "`per_token` is for sweep; search does not take it"),
        ({"remove": 1, "beem": 3}, ls.PlanError, "there is no option 'beem'; did you mean beam"),
        ({"depth": DEPTH}, ls.PlanError, "`depth` 6 is the model's own"),
        ({"remove": 1, "output": "here"}, ls.PlanError, "output needs the model's name"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ls.search(tiny_model("llama"), many_tokens(2), **asked)
