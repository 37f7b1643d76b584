"""Heads off and neurons off, one at a time and by kind: the tables equal operate and dense metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import layersurgery as ls
from layersurgery.analyses.head_ablation import describe_heads
from layersurgery.analyses.neuron_ablation import ablation_variants, most_edits
from layersurgery.metrics.reference import METRICS, measure
from layersurgery.plans.variants import variants
from layersurgery.sweeps import neuron_scores as scoring
from layersurgery.sweeps.neuron_scores import neuron_scores
from tests.support.reference import logits_of
from tests.support.zoo import tiny_model, tokens


def dense(model: Any, plan: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean of each metric, float64."""
    p = logits_of(model, ids)[:, :-1].flatten(0, 1)
    with ls.operate(model, plan):
        q = logits_of(model, ids)[:, :-1].flatten(0, 1)
    return measure(p, q, ids[:, 1:].flatten()).mean(-1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_every_head_is_measured(name: str, tmp_path: Path) -> None:
    model, ids = tiny_model(name), tokens(2, 10)
    frame = ls.analyze("heads", model, ids, directory=tmp_path / "out")
    heads = model.config.num_attention_heads
    assert frame[["layer", "head"]].to_numpy(int).tolist() == [[b, h] for b in range(6) for h in range(heads)]
    for row in frame.sample(4, random_state=0).to_dict("records"):
        meant = dense(model, ls.heads_off(row["layer"], row["head"]), ids)
        np.testing.assert_allclose([row[metric] for metric in METRICS], meant, rtol=0, atol=1e-6)
    assert (tmp_path / "out" / "heads.png").exists()
    highest = frame.loc[frame.kl_nats.idxmax()]
    assert "cost" in describe_heads(frame)
    assert f"{highest['layer']}.{highest['head']} (" in describe_heads(frame)


def test_heads_of_some_blocks(tmp_path: Path) -> None:
    model, ids = tiny_model("llama"), tokens(2, 10)
    every = ls.analyze("heads", model, ids, directory=tmp_path / "all").set_index(["layer", "head"])
    some = ls.analyze("heads", model, ids, directory=tmp_path / "some", layers="2:4").set_index(["layer", "head"])
    pd.testing.assert_frame_equal(pd.DataFrame(some), pd.DataFrame(every.loc[2:3]))
    with pytest.raises(ls.PlanError, match="out of range"):
        ls.analyze("heads", model, ids, directory=tmp_path / "none", layers="4:9")


def test_a_sweep_of_heads_is_the_same_measurement(tmp_path: Path) -> None:
    model, ids = tiny_model("llama"), tokens(2, 10)
    analysis = ls.analyze("heads", model, ids, directory=tmp_path / "analysis")
    for frame in (
        ls.sweep(model, "heads,drop", ids),
        ls.sweep(model, ["heads", "drop"], ids, directory=tmp_path / "sweep"),
    ):
        swept = frame[frame.edit == "heads"]
        columns = ["layer", "from", "to", "plan", "route", "tokens", *METRICS]
        pd.testing.assert_frame_equal(
            pd.DataFrame(swept[columns].reset_index(drop=True)), pd.DataFrame(analysis[columns]), rtol=0, atol=1e-9
        )
        assert len(frame) == 1 + len(swept) + 6
    assert (tmp_path / "sweep" / "heads.png").exists()
    ls.report([tmp_path / "sweep"], tmp_path / "page.html")
    assert "head off" in (tmp_path / "page.html").read_text(encoding="utf-8")
    some = ls.sweep(model, "heads", ids, layers="2:3")
    assert some.plan.tolist() == ["", *(f"heads-off {head} of 2" for head in range(4))]


def test_blocks_without_heads_are_left_out_by_name() -> None:
    with pytest.warns(UserWarning, match="edits are not measured.*'heads-off 0 of .'.*side by side"):
        frame = ls.sweep(tiny_model("jamba"), "heads", tokens())
    assert frame.layer.nunique() == 2
    with pytest.raises(ls.UnsupportedEditError, match="side by side"):
        ls.sweep(tiny_model("mamba"), "heads", tokens())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_estimate_counts_heads_without_weights(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / name)
    cost = ls.estimate(str(tmp_path / name), "heads", data="pydoc", tokens=64, context=16)
    assert cost.readouts == 1 + len(ls.sweep(tiny_model(name), "heads", tokens()).iloc[1:])


def test_an_estimate_without_a_number_of_heads_is_refused(tmp_path: Path) -> None:
    tiny_model("mamba").save_pretrained(tmp_path / "mamba")
    with pytest.raises(ls.PlanError, match="does not say how many attention heads"):
        ls.estimate(str(tmp_path / "mamba"), "heads", data="pydoc", tokens=64, context=16)
    with pytest.raises(ls.PlanError, match="not known without a model"):
        variants("heads", 6)


def test_kinds_of_neurons_in_every_block_are_the_most_edits() -> None:
    kind = ["prediction", "suppression"] + [""] * 8
    of_block = {"neuron": range(10), "kind": kind, "partition": [False] * 9 + [True], "expert": None}
    of_block |= {"kurtosis": range(10), "variance": range(10)}
    scores = pd.concat([pd.DataFrame({"layer": block} | of_block) for block in range(6)], ignore_index=True)
    most = most_edits(6, draws=2)
    assert len(most) == len(ablation_variants(scores, 6, draws=2, seed=0)[0])
    assert len({plan.route(6) for plan in most}) == len(most)


def test_kinds_of_neurons_are_compared_with_random_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In few dimensions, cosines are large and their kurtosis is low.
    monkeypatch.setattr(scoring, "VARIANCE", 1.0)
    monkeypatch.setattr(scoring, "KURTOSIS", 5.0)
    model, ids = tiny_model("llama"), tokens(3, 10)
    planted = model.lm_head.weight.data
    for block, token, sign in ((1, 5, 1), (4, 6, -1), (4, 7, -1)):  # one token is raised, or lowered, strongly
        model.model.layers[block].mlp.down_proj.weight.data[:, token] = sign * planted[token]
    scores = neuron_scores(model)
    kinds = scores[scores.kind != ""].groupby(["layer", "kind"]).neuron.apply(list).to_dict()
    frame = ls.analyze("ablate-neurons", model, ids, directory=tmp_path / "out", draws=2)
    rows = {(row["kind"], row["layer"]): row for row in frame.to_dict("records") if row["layer"] is not pd.NA}
    compared = 0
    for (layer, kind), neurons in kinds.items():
        row = rows[kind, layer]
        meant = dense(model, ls.neurons_off(int(layer), [int(n) for n in neurons]), ids)
        for metric in ("kl_nats", "entropy_change_bits", "loss_change_nats"):
            assert row[metric] == pytest.approx(float(meant[METRICS.index(metric)]), abs=1e-6)
            difference = row[metric] - row[f"{metric}_random"]
            assert row[f"{metric}_difference"] == pytest.approx(difference, abs=1e-9)
            assert row[f"{metric}_difference_low"] <= difference <= row[f"{metric}_difference_high"]
        assert row["neurons"] == len(neurons)
        compared += 1
    assert compared >= 2
    again = ls.analyze("ablate-neurons", model, ids, directory=tmp_path / "again", draws=2)
    pd.testing.assert_frame_equal(frame, again)
    with pytest.raises(ls.PlanError, match="`draws` is a whole number of at least 1, not 0"):
        ls.analyze("ablate-neurons", model, ids, directory=tmp_path / "none", draws=0)


def test_plans_and_families_name_neurons_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "KURTOSIS", 2.9)
    monkeypatch.setattr(scoring, "VARIANCE", 0.035)
    model, ids = tiny_model("llama"), tokens(2, 10)
    scores = neuron_scores(model)
    of_block = scores[(scores.layer == 3) & (scores.kind == "suppression")].sort_values("kurtosis", ascending=False)
    assert len(of_block) > 2
    top = ls.resolve_neurons("drop 0; neurons-off top 2 suppression of 3", model)
    assert top == ls.drop(0) + ls.neurons_off(3, of_block.neuron.astype(int)[:2].tolist())
    with ls.operate(model, top):
        meant = logits_of(model, ids)
    comparison = ls.compare(model, "drop 0; neurons-off top 2 suppression of 3", ids)
    frame = ls.sweep(model, [str(top), "drop 0; neurons-off top 2 suppression of 3"], ids)
    assert frame.kl_nats.iloc[1] == frame.kl_nats.iloc[2] == pytest.approx(comparison.kl_nats, abs=1e-6)
    assert frame.name.iloc[2] == "drop 0; neurons-off top 2 suppression of 3"
    assert not torch.equal(meant, logits_of(model, ids))
    with pytest.raises(ls.PlanError, match="resolve_neurons"), ls.operate(model, "neurons-off suppression of 3"):
        pytest.fail("operated")

    families = ls.sweep(model, "suppression-neurons,random-suppression-neurons", ids)
    assert families.edit.tolist()[1:] == sorted(families.edit.tolist()[1:], key=lambda name: name.startswith("random"))
    for row in families.iloc[1:].to_dict("records"):
        kind = scores[scores.layer == row["layer"]].set_index("neuron").kind
        (visit,) = (visit for visit in ls.Route.parse(row["route"]) if not visit.whole)
        expected = "" if row["edit"].startswith("random") else "suppression"
        assert set(kind[list(visit.neurons_off)]) == {expected}
        assert len(visit.neurons_off) == (kind == "suppression").sum()
    model.save_pretrained(tmp_path / "model")
    cost = ls.estimate(str(tmp_path / "model"), "suppression-neurons", data="pydoc", tokens=64, context=16)
    assert cost.readouts == 7


def test_random_neurons_are_of_no_kind_and_as_many() -> None:
    kind = np.array(["suppression"] * 3 + ["prediction"] + [""] * 16)
    scores = pd.DataFrame(
        {"layer": 2, "neuron": range(20), "kind": kind, "partition": [False] * 19 + [True], "expert": None,
         "kurtosis": range(20), "variance": range(20)}
    )  # fmt: skip
    variants, groups = ablation_variants(scores, 6, draws=3, seed=0)
    of_kind = {group.kind: group for group in groups}
    assert [group.neurons for group in of_kind.values()] == [1, 3, 1]
    for group in groups:
        draws = [variants[row - 1].route[2].neurons_off for row in group.random]
        assert all(len(draw) == group.neurons and set(draw) <= set(range(4, 19)) for draw in draws)
    assert len({variants[row - 1].route for row in of_kind["suppression"].random}) > 1
    assert variants[of_kind["suppression"].of_kind - 1].route[2].neurons_off == (0, 1, 2)


def test_models_whose_neurons_cannot_be_turned_off(tmp_path: Path) -> None:
    with pytest.raises(ls.PlanError, match="are those of experts"):
        ls.analyze("ablate-neurons", tiny_model("mixtral"), tokens(), directory=tmp_path / "out")


def test_neurons_that_cannot_be_turned_off_in_one_block_shift_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "VARIANCE", 0.035)
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp

    class InTwoParts(type(mlp)):  # type: ignore[misc]
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            inner = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
            return torch.cat([self.down_proj(part) for part in inner.split(3, dim=1)], 1)

    mlp.__class__ = InTwoParts
    scores = neuron_scores(model)
    assert set(scores[scores.partition].layer) == set(range(6))
    with pytest.raises(ls.UnsupportedEditError, match="neurons of block 1 .* not used as one linear map"):
        ls.analyze("ablate-neurons", model, tokens(), directory=tmp_path / "out")
