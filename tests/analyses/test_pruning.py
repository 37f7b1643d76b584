"""Layer ranking and pruning: scores match their definitions, choices match a plain loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import layersurgery as ls
from layersurgery.analyses.layer_pruning import greedy_removals
from layersurgery.analyses.layer_ranking import race_order
from layersurgery.analyses.removable_parts import Part, removal_plan
from layersurgery.errors import PlanError
from layersurgery.metrics.aggregation import SequenceSums
from layersurgery.metrics.reference import METRICS
from layersurgery.runtime.residual_change import angular_distance, block_influence
from layersurgery.sweeps.race import Race
from tests.support.zoo import tiny_model

NAMES = ("llama", "gpt2", "gpt_neox", "gemma2", "bloom")


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 60, (3, 20), generator=torch.Generator().manual_seed(seed))


def streams(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Return the stream before each block and after the last, caught by hooks."""
    path = ls.anatomy(model).blocks
    caught: list[torch.Tensor] = []
    handles = []
    blocks = cast(nn.ModuleList, model.get_submodule(path))
    for block in blocks:
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs: caught.append((args[0] if args else kwargs["hidden_states"]).clone()),
                with_kwargs=True,
            )
        )
    handles.append(
        blocks[-1].register_forward_hook(
            lambda _m, _a, out: caught.append((out[0] if isinstance(out, tuple) else out).clone())
        )
    )
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_what_their_sources_say(name: str) -> None:
    model, ids = tiny_model(name).eval(), tokens()
    found = ls.rank(model, ids)
    states = [state.double() for state in streams(model, ids)]
    depth = len(states) - 1
    for layer in range(depth):
        cosine = nn.functional.cosine_similarity(states[layer], states[layer + 1], dim=-1)
        assert found.block_influence[layer] == pytest.approx(float((1 - cosine).mean()), rel=1e-4, abs=1e-7)
    spans = ls.analyses.spans(found)
    assert sorted(set(spans.span)) == list(range(1, depth // 2 + 1))
    for row in spans.itertuples():
        cosine = nn.functional.cosine_similarity(states[row.layer], states[row.layer + row.span], dim=-1).clamp(-1, 1)
        angle = cosine.arccos() / math.pi
        assert row.angular_distance == pytest.approx(float(angle.mean()), rel=1e-4, abs=1e-6)
        assert row.angular_distance_last == pytest.approx(float(angle[:, -1].mean()), rel=1e-4, abs=1e-6)


def test_padding_is_in_no_score() -> None:
    model, ids = tiny_model("llama"), tokens()
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    padded = ls.rank(model, ids, attention_mask=mask)
    alone = [ls.rank(model, ids[:1]), ls.rank(model, ids[1:2, :12]), ls.rank(model, ids[2:])]
    weights = np.array([20, 12, 20])
    both = (
        sum(weight * one.block_influence.to_numpy() for weight, one in zip(weights, alone, strict=True)) / weights.sum()
    )
    np.testing.assert_allclose(padded.block_influence, both, rtol=1e-4)
    ends = np.mean([one.angular_distance_last.to_numpy() for one in alone], axis=0)
    np.testing.assert_allclose(padded.angular_distance_last, ends, rtol=1e-4)


def test_angles_keep_their_digits_however_small() -> None:
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    aside = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2))
    aside -= (aside * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True) * x
    for angle in (1e-3, 0.5, 3.0):
        turned = math.cos(angle) * x + math.sin(angle) * aside * (x.norm(dim=-1) / aside.norm(dim=-1))[..., None]
        torch.testing.assert_close(
            angular_distance(x, 7 * turned), torch.full((1, 4), angle / math.pi), rtol=1e-3, atol=0
        )
        torch.testing.assert_close(
            block_influence(x, turned), torch.full((1, 4), 1 - math.cos(angle)), rtol=2e-3, atol=0
        )
    assert float(block_influence(x, x).max()) == 0
    large = (x * 1e4).half()  # its squares overflow in half precision
    assert bool(angular_distance(large, -large).isfinite().all())


def test_the_measured_score_is_that_of_a_sweep() -> None:
    model, ids = tiny_model("llama"), tokens()
    found, sweep = ls.rank(model, ids), ls.sweep(model, "drop", ids)
    np.testing.assert_allclose(found.kl_nats, sweep[sweep.edit == "drop"].kl_nats)
    assert list(found.sort_values("kl_rank").layer) == list(found.sort_values("kl_nats").layer)


def drop(*layers: int) -> ls.Plan:
    return removal_plan(map(Part, layers))


def by_hand(model: Any, ids: torch.Tensor, remove: int, by: str) -> list[int]:
    """Choose greedily by operating, measuring and undoing."""
    depth = model.config.num_hidden_layers
    gone: list[int] = []
    while len(gone) < remove:
        left = [block for block in range(depth) if block not in gone]
        if by == "kl":
            scores = [ls.compare(model, drop(*gone, block), ids).kl_nats for block in left]
        else:
            with ls.operate(model, drop(*gone)) if gone else torch.no_grad():
                scores = ls.rank(model, ids)["block_influence" if by == "influence" else "angular_distance"].tolist()
        gone.append(left[int(np.argmin(scores))])
    return gone


@pytest.mark.parametrize("by", ["kl", "influence", "angular"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_greedy_is_measuring_anew_after_each_removal(name: str, by: str) -> None:
    model, ids = tiny_model(name), tokens(3)
    found = ls.prune(model, ids, remove=3, by=by, greedy=True)
    assert list(found.layers) == by_hand(model, ids, 3, by)
    assert found.greedy
    assert set(found.route.blocks).isdisjoint(found.layers)


@pytest.mark.parametrize("by", ["kl", "influence", "angular"])
def test_costs_are_those_of_the_models_that_are_left(by: str) -> None:
    model, ids = tiny_model("llama"), tokens(5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ls.prune(model, ids, remove=2, by=by)
    costs = found.costs[found.costs.criterion == by].set_index("removed")
    for removed, plan in costs.plan.items():
        hand = ls.compare(model, plan, ids)
        assert costs.kl_nats[removed] == pytest.approx(hand.kl_nats, abs=1e-5)
        assert costs.perplexity[removed] == pytest.approx(hand.perplexity, rel=1e-4)
    assert str(found.plan) == costs.plan[2]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if by == "angular":
        assert found.layers[1] == found.layers[0] + 1
    ls.operate_(model, found.plan)
    assert model.config.num_hidden_layers == 4


def test_the_first_layer_is_the_same_greedily_or_not() -> None:
    model, ids = tiny_model("llama"), tokens(7)
    costs = ls.prune(model, ids, remove=1, greedy=True).costs.set_index("criterion")
    assert costs.plan["greedy"] == costs.plan["kl"]


def test_greedy_removals_measure_only_what_is_asked_for() -> None:
    """The caller measures: in memory, or into directories; a missing score is never chosen."""
    scores = {0: 3.0, 1: 1.0, 2: np.nan, 3: 2.0}
    measured: list[tuple[Part, ...]] = []

    def measure_step(removed: tuple[Part, ...]) -> pd.DataFrame:
        measured.append(removed)
        left = [layer for layer in scores if Part(layer) not in removed]
        # After layer 1, layer 0 costs less than layer 3.
        values = [scores[layer] - (2 if Part(1) in removed and layer == 0 else 0) for layer in left]
        return pd.DataFrame({"layer": pd.array(left, dtype="Int64"), "block_influence": values})

    removals = greedy_removals("influence", measure_step, lambda removed: len(removed) == 4)
    assert next(removals) == (Part(1), 1.0)
    assert measured == [()]
    assert [next(removals), next(removals)] == [(Part(0), 1.0), (Part(3), 2.0)]
    assert measured == [(), (Part(1),), (Part(1), Part(0))]
    with pytest.raises(ls.MeasurementError, match="after 3 layers, no other layer can be removed"):
        next(removals)


def test_what_cannot_be_meant_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ls.PlanError, match="unknown criterion 'size'; choose from kl, influence, angular"):
        ls.prune(model, tokens(), remove=1, by="size")
    for remove in (0, 6):
        with pytest.raises(ls.PlanError, match=f"cannot remove {remove} of 6 layers; give 1 to 5"):
            ls.prune(model, tokens(), remove=remove)


def test_a_plan_names_runs_as_ranges() -> None:
    assert str(drop(7, 3, 4, 5)) == "drop 3:6 7"
    assert str(drop(2)) == "drop 2"


def many_tokens(sequences: int) -> torch.Tensor:
    return torch.randint(4, 60, (sequences, 20), generator=torch.Generator().manual_seed(0))


def test_a_race_finds_the_same_layers_with_less_text() -> None:
    model, ids = tiny_model("llama").eval(), many_tokens(96)
    whole = ls.rank(model, ids, batch_size=8)
    raced = ls.rank(model, ids, batch_size=8, lowest=2)
    assert "race" not in whole
    assert raced.kl_tokens.min() < whole.tokens[0]
    lowest, higher = (set(raced.layer[raced.race == outcome]) for outcome in ("lowest", "higher"))
    truth = set(whole.sort_values("kl_nats").layer[:2])
    assert lowest <= truth
    assert not higher & truth
    assert higher
    assert set(raced.sort_values("kl_rank").layer[:2]) == truth
    assert sorted(raced.kl_rank) == list(range(1, len(raced) + 1))
    assert raced.kl_rank[raced.race == "higher"].min() > raced.kl_rank[raced.race != "higher"].max()


@pytest.mark.parametrize("greedy", [False, True])
def test_pruning_with_a_race_removes_the_same_layers(greedy: bool) -> None:
    model, ids = tiny_model("llama").eval(), many_tokens(64)
    raced, whole = (ls.prune(model, ids, remove=2, greedy=greedy, race=race, batch_size=8) for race in (True, False))
    assert raced.plan == whole.plan
    name = "greedy" if greedy else "kl"
    rows = [costs[(costs.criterion == name) & (costs.removed == 2)].iloc[0] for costs in (raced.costs, whole.costs)]
    assert rows[0].tokens == rows[1].tokens == 64 * 19
    assert rows[0].kl_nats == rows[1].kl_nats
    assert set(raced.costs.sequences) == set(whole.costs.sequences) == {64}


@pytest.mark.parametrize("lowest", [0, 6, -1, 1.5, "two"])
def test_a_race_for_a_number_of_layers_that_there_are_not(lowest: Any) -> None:
    with pytest.raises(PlanError, match="lowest"):
        ls.rank(tiny_model("llama"), tokens(), lowest=lowest)


def test_layers_that_are_surely_lowest_come_first_whatever_their_text_was() -> None:
    """Begin with hard sequences, and measure layer 0 on these alone."""
    rng = np.random.default_rng(0)
    hard = np.where(np.arange(48) < 16, 10, 1)[:, None]
    kl = hard * np.array([1, 2, 2, 9]) * (1 + rng.normal(0, 0.02, (48, 4)))
    values = np.zeros((48, 5, len(METRICS)))
    values[:, 1:, METRICS.index("kl_nats")] = 10 * kl
    race = Race(2)
    counts = np.full(48, 10.0)
    left = race.finished(values[:16], counts[:16], [1, 2, 3, 4])
    assert left == {1, 4}
    used = np.ones((48, 5), bool)
    used[16:, list(left)] = False
    sums = SequenceSums(list(range(48)), counts, values, np.zeros((48, 0)), used)
    order = race_order(race, sums)
    assert order[0] == 1
    assert order[-1] == 4
    assert set(order[1:3]) == {2, 3}
    # Within a class, on the text that all of it share.
    race.winners = {1, 2}
    assert race_order(race, sums)[:2] == [1, 2]


def test_a_continued_race_replaces_what_was_made_of_its_ranking(tmp_path: Path) -> None:
    model, ids = tiny_model("llama").eval(), many_tokens(48)
    for greedy, race in ((False, True), (False, False), (True, True), (True, False)):
        found = ls.prune(model, ids, remove=2, greedy=greedy, race=race, directory=tmp_path / "pruned", batch_size=8)
        alone = ls.prune(model, ids, remove=2, greedy=greedy, race=race, batch_size=8)
        assert found.plan == alone.plan
        assert found.costs.kl_nats.tolist() == alone.costs.kl_nats.tolist()
