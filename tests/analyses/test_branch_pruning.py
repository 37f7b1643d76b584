"""Ranking and pruning of branches: scores and choices match brute force, budgets are reached, kept layers stay."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

import layersurgery as ls
from layersurgery.analyses.descriptions import describe_ranks
from layersurgery.analyses.layer_pruning import greedy_removals, prefixes, removal_orders
from layersurgery.analyses.layer_ranking import CRITERIA, RANKS
from layersurgery.analyses.part_costs import COSTS, PartCosts, parts_table
from layersurgery.analyses.removable_parts import KINDS, Part, parts_of, removal_plan, removed_parts
from layersurgery.analyses.removal_goal import Goal
from layersurgery.figures.pruning import rank as draw_ranks
from layersurgery.figures.style import ModelTables
from layersurgery.metrics.reference import METRICS, measure
from layersurgery.models.block_costs import block_costs
from layersurgery.plans.variants import variants
from layersurgery.sweeps.measurer import Measurer
from tests.support.dense import BRANCH_MODULES, blocks_of, hooked
from tests.support.reference import logits_of
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import DEPTH, slow, tiny_model, tokens

NAMES = ("llama", "gpt_neox", "gemma2")  # branches in turn, parallel branches, norms after branches
KL, LOSS = METRICS.index("kl_nats"), METRICS.index("loss_change_nats")
GREEDY = [("llama", "kl"), ("gpt_neox", "kl"), pytest.param("gemma2", "loss", marks=pytest.mark.slow)]


def dense(model: Any, plan: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean of each metric, float64."""
    p = logits_of(model, ids)[:, :-1].flatten(0, 1)
    with ls.operate(model, plan):
        q = logits_of(model, ids)[:, :-1].flatten(0, 1)
    return measure(p, q, ids[:, 1:].flatten()).mean(-1)


@pytest.mark.parametrize("name", NAMES)
def test_branches_are_ranked_as_by_brute_force(name: str) -> None:
    model, ids = tiny_model(name).eval(), tokens(3, 12)
    frame = ls.rank(model, ids, of="branches")
    assert list(zip(frame.layer, frame.part, strict=True)) == [
        (layer, part) for layer in range(DEPTH) for part in ("attention", "mlp")
    ]
    meant = [dense(model, f"skip-{row.part} {row.layer}", ids) for row in frame.itertuples()]
    np.testing.assert_allclose(frame.kl_nats, [row[KL] for row in meant], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(frame.loss_change_nats, [row[LOSS] for row in meant], rtol=1e-4, atol=1e-6)
    assert frame.kl_rank.tolist() == (np.argsort(np.argsort([float(row[KL]) for row in meant])) + 1).tolist()
    for part in ("attention", "mlp"):
        alone = ls.rank(model, ids, of=part)
        rows = frame[frame.part == part].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone[["kl_nats", "block_influence"]], rows[["kl_nats", "block_influence"]])
        assert alone.kl_rank.tolist() == rows.kl_nats.rank().tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_scores_of_a_branch_compare_the_stream_that_it_is_added_to_with_the_sum(name: str) -> None:
    model, ids = tiny_model(name).eval(), tokens(2, 10)
    streams: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: streams.append((args[0] if args else kwargs["hidden_states"]).double().clone()),
            with_kwargs=True,
        )
        for block in blocks_of(model)
    ]
    with torch.no_grad(), hooked(model, name) as added:
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    frame = ls.rank(model, ids, of="branches").set_index(["layer", "part"])
    for layer, stream in enumerate(streams):
        attention, mlp = (added[part, layer].view(stream.shape) for part in ("attention", "mlp"))
        before = stream if name == "gpt_neox" else stream + attention
        for part, one, two in (("attention", stream, stream + attention), ("mlp", before, before + mlp)):
            cosine = nn.functional.cosine_similarity(one, two, dim=-1).clamp(-1, 1)
            row, angle = frame.loc[(layer, part)], cosine.arccos() / math.pi
            assert row.block_influence == pytest.approx(float((1 - cosine).mean()), rel=1e-3, abs=1e-6)
            assert row.angular_distance == pytest.approx(float(angle.mean()), rel=1e-3, abs=1e-5)
            assert row.angular_distance_last == pytest.approx(float(angle[:, -1].mean()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("name", "by"), GREEDY)
def test_a_greedy_choice_among_all_branches_is_that_of_a_plain_loop(name: str, by: str) -> None:
    model, ids = tiny_model(name).eval(), tokens(3, 12)
    found = ls.prune(model, ids, remove_branches=3, by=by, greedy=True)
    gone: list[Part] = []
    for part in found.parts:
        left = [other for other in parts_of("branches", DEPTH) if other not in gone]
        scores = [float(dense(model, removal_plan([*gone, other]), ids)[KL if by == "kl" else LOSS]) for other in left]
        assert part == left[int(np.argmin(scores))]
        gone.append(part)
    assert found.plan == removal_plan(gone)


def test_attentions_and_mlps_are_counted_apart() -> None:
    model, ids = tiny_model("llama").eval(), tokens(3, 12)
    ranks = ls.rank(model, ids, of="branches")
    lowest = {part: set(ranks[ranks.part == part].nsmallest(3, "kl_nats").layer) for part in ("attention", "mlp")}
    for greedy in (False, True):
        found = ls.prune(model, ids, remove_attention=3, remove_mlp=1, greedy=greedy)
        removed = {part: {each.layer for each in found.parts if each.branch == part} for part in ("attention", "mlp")}
        assert [len(removed[part]) for part in ("attention", "mlp")] == [3, 1]
        if not greedy:
            assert removed["attention"] == lowest["attention"]
            assert removed["mlp"] <= lowest["mlp"]
        costs = found.costs[found.costs.criterion == ("greedy" if greedy else "kl")]
        assert costs.removed.tolist() == [1, 2, 3, 4]
        assert costs.plan.iloc[-1] == str(found.plan)
        assert costs.kl_nats.iloc[-1] == pytest.approx(float(dense(model, found.plan, ids)[KL]), rel=1e-4)


def test_a_block_without_both_branches_is_dropped() -> None:
    both = [Part(2, "mlp"), Part(0, "attention"), Part(2, "attention")]
    assert str(removal_plan(both)) == "drop 2; skip-attention 0"
    assert removal_plan(both).route(4) == ls.Plan.parse("skip-attention 0 2; skip-mlp 2").route(4)
    assert str(removal_plan([Part(1, "attention")], single=[1, 2])) == "drop 1"


def test_the_loss_is_a_criterion_of_layers_too() -> None:
    model, ids = tiny_model("llama").eval(), tokens(3, 12)
    rises = [float(dense(model, f"drop {layer}", ids)[LOSS]) for layer in range(DEPTH)]
    for race in (True, False):
        found = ls.prune(model, ids, remove=2, by="loss", race=race)
        assert found.layers == tuple(np.argsort(rises)[:2])
        assert set(found.costs.criterion) == {"unedited", "influence", "angular", "loss", *([] if race else ["kl"])}
    assert ls.rank(model, ids).loss_rank.tolist() == (np.argsort(np.argsort(rises)) + 1).tolist()


COUNTS = st.one_of(
    st.fixed_dictionaries({"remove": st.integers(1, 3)}),
    st.fixed_dictionaries({"remove_branches": st.integers(1, 6)}),
    st.fixed_dictionaries({"remove_attention": st.integers(1, 3), "remove_mlp": st.integers(1, 3)}),
    st.fixed_dictionaries({"budget": st.sampled_from(["params=30%", "kv-cache=20%", "flops=40%"]),
                           "of": st.sampled_from([*KINDS])}),
)  # fmt: skip
KEEP = st.lists(st.integers(-6, 5), max_size=3)


def parts_frame(sizes: np.random.Generator) -> pd.DataFrame:
    """Return a table of costs of six blocks; a block costs somewhat more than its branches."""
    rows = []
    for layer in range(6):
        costs = {part: dict(zip(COSTS, sizes.uniform(1, 2, 3), strict=True)) for part in ("attention", "mlp")}
        costs["mlp"]["cache_bytes"] = 0
        whole = {name: costs["attention"][name] + costs["mlp"][name] + 0.1 for name in COSTS}
        rows += [{"layer": layer, "part": part, **cost} for part, cost in {"block": whole, **costs}.items()]
    return pd.DataFrame(rows)


@given(asked=COUNTS, keep=KEEP, seed=st.integers(0, 99), by=st.sampled_from([*CRITERIA]), greedy=st.booleans())
def test_kept_layers_stay_and_a_budget_needs_its_last_removal(
    asked: dict[str, Any], keep: list[int], seed: int, by: str, greedy: bool
) -> None:
    goal = Goal.of(**asked, keep=keep).checked(6)
    random = np.random.default_rng(seed)
    costs = PartCosts(parts_frame(random))
    scores = {part: random.uniform(0.1, 1) for part in [*parts_of("blocks", 6), *parts_of("branches", 6)]}
    kept = {layer % 6 for layer in keep}

    def table(parts: Any) -> pd.DataFrame:
        frame = pd.DataFrame(
            {"layer": [part.layer for part in parts], "part": [part.name for part in parts]}
            | {name: [scores[part] for part in parts] for name in CRITERIA.values()}
        )
        return frame.assign(**{RANKS[name]: frame[score].rank() for name, score in CRITERIA.items()})

    spans = pd.DataFrame(
        [{"layer": first, "span": span, "angular_distance": random.uniform()}
         for span in range(1, 6) for first in range(7 - span)]
    )  # fmt: skip
    try:
        if greedy:
            steps = greedy_removals(
                by, lambda gone: table(goal.candidates(6, gone)), lambda p: goal.is_reached(p, costs)
            )
            order = prefixes([part for part, _ in steps])
        else:
            ranks = [table(parts_of(kind, 6)) for kind in goal.kinds]
            order = removal_orders(ranks, spans, goal, costs, by)
    except (ls.MeasurementError, ls.PlanError):
        assert goal.budget is not None or kept
        return
    assert [len(parts) for parts in order] == list(range(1, len(order) + 1))
    assert not {part.layer for parts in order for part in parts} & kept
    last, before = order[-1], order[-2] if len(order) > 1 else ()
    if goal.budget is None:
        assert len(last) == sum(asked.values())
    else:
        share = goal.budget.percent / 100
        assert costs.share(last, goal.budget.name) >= share - 1e-9
        assert costs.share(before, goal.budget.name) < share
    for kind, number in goal.counts.items():
        assert sum(part.branch in KINDS[kind] for part in last) == number


@pytest.mark.parametrize(
    ("asked", "keep"),
    [
        ({"budget": "params=30%"}, "0:2,-1"),
        pytest.param({"budget": "kv-cache=40%", "of": "attention"}, None, marks=pytest.mark.slow),
        ({"budget": "flops=25%", "of": "branches", "greedy": True}, [0, -1]),
        pytest.param({"budget": "params=40%", "of": "mlp", "by": "angular"}, None, marks=pytest.mark.slow),
        pytest.param({"budget": "flops=45%", "by": "angular"}, None, marks=pytest.mark.slow),
    ],
)
def test_a_budget_is_reached_and_not_without_the_last_removal(asked: dict[str, Any], keep: Any, tmp_path: Path) -> None:
    model, ids = tiny_model("llama").eval(), tokens(3, 12)
    found = ls.prune(model, ids, **asked, keep=keep)
    name = {"params": "parameters", "flops": "multiplications", "kv-cache": "cache_bytes"}[
        asked["budget"].split("=")[0]
    ]
    share = float(asked["budget"].split("=")[1].rstrip("%")) / 100
    costs = found.costs[found.costs.criterion == ("greedy" if found.greedy else found.by)].set_index("removed")
    saved = costs[f"{name}_saved_if_skipped"] / costs[f"{name}_of_blocks"]
    assert saved.iloc[-1] >= share - 1e-9
    assert (saved.iloc[:-1] < share).all()
    assert costs.plan.iloc[-1] == str(found.plan)
    assert set(found.layers).isdisjoint([0, 5] if keep else [])
    again = ls.prune(model, ids, **asked, keep=keep, directory=tmp_path / "results")
    assert (again.plan, again.parts) == (found.plan, found.parts)
    numbers = found.costs.select_dtypes("number").columns
    pd.testing.assert_frame_equal(again.costs[numbers], found.costs[numbers], check_exact=False, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "falcon", slow("mixtral"), slow("dbrx")])
def test_saved_parameters_are_those_that_the_built_model_does_not_have(name: str) -> None:
    model = tiny_model(name).eval()
    plan = ls.Plan.parse("drop 3; skip-attention 1; skip-mlp 2 4")
    before, config = sum(parameter.numel() for parameter in model.parameters()), model.config
    skipped = [
        blocks_of(model)[layer].get_submodule(path)
        for layer, branch in ((1, 0), (2, 1), (4, 1))
        for path, _ in _modules(name, branch)
    ]
    of_branches = sum(parameter.numel() for module in skipped for parameter in module.parameters())
    costs = PartCosts(frame_of(model))
    plain, skipping = (costs.saved(plan.route(DEPTH), skipping=skip)[0] for skip in (False, True))
    with ls.operate(model, plan):
        left = sum(parameter.numel() for parameter in model.parameters())
    assert plain == before - left
    assert skipping == plain + of_branches
    assert [str(part) for part in removed_parts(plan.route(DEPTH), DEPTH)] == ["1-attn", "2-mlp", "3", "4-mlp"]
    assert config.num_hidden_layers == DEPTH


def _modules(name: str, branch: int) -> list[tuple[str, Any]]:
    """Return the modules of a branch: where a norm writes it to the stream, those that the norm reads."""
    own = {
        "gemma2": [[("self_attn", None)], [("mlp", None)]],
        "opt": [[("self_attn", None)], [("fc1", None), ("fc2", None)]],
    }
    return own.get(name, BRANCH_MODULES[name])[branch]


def frame_of(model: Any, context: int = 16) -> pd.DataFrame:
    """Return the table of costs of a model's parts."""
    return parts_table(Measurer(model, variants("drop", DEPTH)), "tiny", context)


def test_costs_are_those_of_the_config() -> None:
    model = tiny_model("llama", num_key_value_heads=2)
    config = model.config
    attention = block_costs(model, ls.anatomy(model))[0].branches["attention"]
    width = config.num_attention_heads * config.head_dim
    assert attention.cache_bytes == 2 * config.num_key_value_heads * config.head_dim * 4  # float32
    weights = 2 * config.hidden_size * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    # Token t of 16 is multiplied with t keys, and its weights with t values.
    assert attention.multiplications(16) == weights + sum(2 * width * t for t in range(1, 17)) / 16
    sliding = block_costs(tiny_model("mistral"), ls.anatomy(tiny_model("mistral")))[0].branches["attention"]
    assert sliding.window == 4
    assert sliding.multiplications(16) == weights + sum(2 * width * min(t, 4) for t in range(1, 17)) / 16
    assert sliding.bytes_per_token(16) == sliding.cache_bytes / 4
    experts = tiny_model("mixtral")
    mlp = block_costs(experts, ls.anatomy(experts))[0].branches["mlp"]
    assert mlp.matrices == 3 * 32 * 64 * 2 + 4 * 32  # two of four experts, and the router


def test_a_mixer_without_an_mlp_is_the_whole_block() -> None:
    model, ids = tiny_model("mamba").eval(), tokens(2, 10)
    with pytest.warns(ls.errors.LayerSurgeryWarning, match="has no mlp"):
        frame = ls.rank(model, ids, of="branches")
    assert frame[frame.part == "mlp"][["kl_nats", "block_influence"]].isna().all(axis=None)
    attention = frame[frame.part == "attention"]
    np.testing.assert_allclose(attention.kl_nats, ls.rank(model, ids).kl_nats, rtol=1e-5, atol=1e-8)
    found = ls.prune(model, ids, remove_branches=2)
    assert found.plan == ls.drop(sorted(found.layers))
    assert found.costs.parameters_saved.iloc[-1] == found.costs.parameters_saved_if_skipped.iloc[-1] > 0
    with pytest.raises(ls.UnsupportedEditError, match=r"block 0 \(MambaBlock\) has no mlp that could be skipped"):
        ls.prune(model, ids, remove_attention=1, remove_mlp=2)
    with pytest.raises(ls.MeasurementError, match="kv-cache=10% cannot be reached"):
        ls.prune(model, ids, budget="kv-cache=10%")


def test_a_race_among_branches_finds_the_same_ones() -> None:
    model, ids = tiny_model("llama").eval(), torch.randint(4, 60, (64, 16), generator=torch.Generator().manual_seed(0))
    whole = ls.rank(model, ids, batch_size=8, of="branches")
    raced = ls.rank(model, ids, batch_size=8, of="branches", lowest=3)
    assert raced.kl_tokens.min() < whole.tokens[0]
    truth = {Part.of_row(row.layer, row.part) for row in whole.nsmallest(3, "kl_nats").itertuples()}
    best = {Part.of_row(row.layer, row.part) for row in raced.nsmallest(3, "kl_rank").itertuples()}
    assert best == truth
    assert raced.loss_rank.isna().all()
    assert "branch" in describe_ranks(raced)
    assert set(ls.prune(model, ids, remove_branches=3, batch_size=8).parts) == truth
    plans = [
        ls.prune(model, ids, remove_branches=2, greedy=True, race=race, batch_size=8).plan for race in (True, False)
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("name", ["llama", slow("gemma2")])
def test_the_checkpoint_skips_what_was_chosen(name: str, tmp_path: Path) -> None:
    path, ids = checkpoint(tmp_path / "model", name), tokens(3, 12)
    found = ls.prune(path, ids, remove_attention=1, remove_mlp=2, output=tmp_path / "out")
    model = ls.load(path).model
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with ls.operate(model, found.plan):
        assert torch.equal(logits_of(model, ids), logits_of(written, ids))
    row = found.costs[(found.costs.criterion == "kl") & (found.costs.removed == 3)].iloc[0]
    lost = sum(parameter.numel() for parameter in ls.load(path).model.parameters()) - sum(
        parameter.numel() for parameter in written.parameters()
    )
    assert row.parameters_saved == lost
    assert row.parameters_saved_if_skipped > lost


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "give one of `remove`, `remove_attention`, `remove_mlp`, `remove_branches` and `budget`; .* found none"),
        ({"remove": 1, "remove_mlp": 1}, "found `remove` and `remove_mlp`"),
        ({"remove_attention": 7}, "cannot remove 7 of 6 attention branches; give 1 to 6"),
        ({"remove_branches": 12}, "cannot remove 12 of 12 branches; give 1 to 11"),
        ({"remove_attention": 6, "remove_mlp": 6}, "cannot remove all 12 branches; one of them stays"),
        ({"remove": 5, "keep": [0, -1]}, "cannot remove 5 of 6 layers, and keep 2 of them; give 1 to 4"),
        ({"remove": 1, "keep": "0:6"}, "cannot remove 1 of 6 layers, and keep 6 of them"),
        ({"budget": "params=5%", "keep": "0:6"}, "all layers are kept"),
        ({"remove": 1, "keep": "6"}, "block 6 is out of range"),
        ({"remove": 1, "keep": "1-attn"}, "`keep` takes numbers and half-open ranges of layers"),
        ({"remove": 1, "of": "mlp"}, "`of` says what a budget removes; `remove` says it by itself"),
        ({"budget": "size=5%"}, "cannot read the budget 'size=5%'"),
        ({"budget": "params=5%", "of": "heads"}, "unknown kind of parts 'heads'; choose from blocks, attention"),
        ({"remove": 1, "by": "second-order"}, "it was tried and not kept.*choose from kl, influence, angular, loss"),
        ({"remove_mlp": 1, "by": "influence", "greedy": True}, "a greedy choice of branches by influence"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ls.PlanError, match=words):
        ls.prune(tiny_model("llama"), tokens(), **asked)


def test_a_budget_that_nothing_reaches_is_refused() -> None:
    with pytest.raises(
        ls.MeasurementError, match="kv-cache=10% cannot be reached: .* all 6 MLP branches .* saves is 0 %"
    ):
        ls.prune(tiny_model("llama"), tokens(), budget="kv-cache=10%", of="mlp")


def test_ranks_of_branches_take_no_spans() -> None:
    with pytest.raises(ls.PlanError, match="`spans` are of blocks; leave them out to rank mlp"):
        ls.rank(tiny_model("llama"), tokens(), of="mlp", spans=2)
    with pytest.raises(ls.PlanError, match="cannot search the 12 lowest of 12 branches; give 1 to 11"):
        ls.rank(tiny_model("llama"), tokens(), of="branches", lowest=12)


def test_words_of_plans_name_the_same_models_as_their_parts() -> None:
    for parts in itertools.combinations(parts_of("branches", 3), 3):
        route = removal_plan(parts).route(3)
        named = {(visit.block, branch) for visit in route for branch in visit.skipped}
        named |= {(block, branch) for block in set(range(3)) - set(route.blocks) for branch in ("attention", "mlp")}
        assert named == {(part.layer, part.branch) for part in parts}


@pytest.mark.parametrize("name", ["nemotron_h", slow("mamba2")])
def test_layers_of_one_branch_are_dropped(name: str) -> None:
    costs = PartCosts(frame_of(tiny_model(name).eval()))
    assert costs.single == set(range(DEPTH))
    parts = [part for part in parts_of("branches", DEPTH) if part.layer in (1, 3)]
    assert removal_plan(parts, costs.single) == ls.drop(1, 3)


@pytest.mark.parametrize("name", ["qwen3_moe", slow("qwen2_moe")])
def test_a_config_with_experts_in_every_layer_can_say_that_a_layer_has_no_mlp(name: str, tmp_path: Path) -> None:
    """No other program is known to read weights without rows, so `prune` writes zeros here, too."""
    model, ids = tiny_model(name, mlp_only_layers=[]).eval(), tokens(2, 10)
    config = copy.deepcopy(model.config)
    config.mlp_only_layers, config.intermediate_size = [2], 0
    smaller = AutoModelForCausalLM.from_config(config)
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith("model.layers.2.mlp")}
    smaller.load_state_dict(kept, strict=False)
    smaller.save_pretrained(tmp_path)
    with ls.operate(model, ls.skip_mlp(2)):
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), logits_of(model, ids))
    assert smaller.num_parameters() < model.num_parameters()


def test_the_figure_of_ranks_has_a_line_for_attentions_and_another_for_mlps() -> None:
    frame = ls.rank(tiny_model("llama").eval(), tokens(2, 12), of="branches")
    for models in (1, 2):
        figure = draw_ranks([ModelTables({"rank": frame}, f"model {number}", "text") for number in range(models)])
        assert len(figure.axes) == 3
        for axis, score in zip(figure.axes, ("kl_nats", "block_influence", "angular_distance"), strict=True):
            lines = axis.get_lines()
            assert [line.get_linestyle() for line in lines] == ["-", "--"] * models
            assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 2 * models
            for line, part in zip(lines, ["attention", "mlp"] * models, strict=True):
                np.testing.assert_allclose(
                    np.asarray(line.get_ydata(), float), frame[frame.part == part][score].to_numpy(float)
                )
        assert "attention" in [text.get_text().split(", ")[-1] for text in figure.legends[0].get_texts()]
