"""Comparing predictions, judged by formulas written out another way."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import layersurgery as ls
from layersurgery.errors import LayerSurgeryWarning
from layersurgery.registry import METRICS
from tests.support.reference import logits_of
from tests.support.zoo import VOCAB, tiny_model, tokens


def test_against_the_formulas() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=3)
    ids = tokens(3, 10)
    found = ls.compare(model, other, ids)
    p, q = (logits_of(one, ids)[:, :-1].double().softmax(-1) for one in (model, other))
    wanted = ids[:, 1:]
    assert found.tokens == 27
    assert found.kl_nats == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), abs=1e-12)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.accuracy == pytest.approx((q.argmax(-1) == wanted).double().mean().item())
    loss_p, loss_q = (torch.nn.functional.nll_loss(x.log().flatten(0, 1), wanted.flatten()).item() for x in (p, q))
    assert found.loss_nats == pytest.approx(loss_q, abs=1e-12)
    assert found.loss_change_nats == pytest.approx(loss_q - loss_p, abs=1e-12)
    bits_p, bits_q = (-(x * x.log2()).sum(-1).mean().item() for x in (p, q))
    assert found.entropy_bits == pytest.approx(bits_q, abs=1e-12)
    assert found.entropy_change_bits == pytest.approx(bits_q - bits_p, abs=1e-12)
    assert found.perplexity == pytest.approx(math.exp(loss_q))
    assert 0 < found.entropy_bits < math.log2(VOCAB)


def test_a_model_with_itself() -> None:
    model = tiny_model("llama").train()
    found = ls.compare(model, model, tokens())
    assert (found.kl_nats, found.agreement, found.loss_change_nats, found.entropy_change_bits) == (0, 1, 0, 0)
    assert model.training


@pytest.mark.parametrize("plan", ["drop 2", "skip-mlp 1; repeat 3"])
def test_an_edit_of_the_model_itself(plan: str) -> None:
    model, edited = tiny_model("llama"), tiny_model("llama")
    ls.operate_(edited, plan)
    one = ls.compare(model, plan, tokens(4), batch_size=3)
    assert one == ls.compare(model, ls.Plan.parse(plan).route(6), tokens(4).tolist(), batch_size=3)
    assert one.metrics == pytest.approx(ls.compare(model, edited, tokens(4)).metrics, abs=1e-6)
    assert one.kl_nats > 0


def test_every_metric_is_an_attribute() -> None:
    found = ls.compare(tiny_model("llama"), "drop 2", tokens(2), per_token=True)
    assert [getattr(found, metric.name) for metric in METRICS] == list(found.metrics.values())
    assert found.positions is not None
    assert {metric.name for metric in METRICS} <= set(dir(found)) & set(found.positions)
    assert list(found.to_pandas()) == [found.tokens, *found.metrics.values()]
    assert repr(found).startswith(f"Comparison(tokens={found.tokens}, kl_nats={found.kl_nats!r}, agreement=")
    for metric in METRICS:
        assert f"<td>{metric.label}</td>" in found._repr_html_()
    for same in (copy.copy(found), pickle.loads(pickle.dumps(found)), replace(found, positions=None)):
        assert same == found
        assert hash(same) == hash(found)
    assert replace(found, metrics={**found.metrics, "kl_nats": 0.0}) != found
    with pytest.raises(AttributeError, match="'Comparison' object has no attribute 'kl_bits'"):
        found.kl_bits  # noqa: B018


def test_padding_does_not_count() -> None:
    model = tiny_model("llama")
    ids = tokens(1, 8)
    longer = torch.cat([ids, torch.full((1, 4), 5)], 1)
    mask = torch.tensor([[1] * 8 + [0] * 4])
    alone, padded = ls.compare(model, "drop 2", ids), ls.compare(model, "drop 2", longer, attention_mask=mask)
    assert padded.tokens == alone.tokens == 7
    assert padded.kl_nats == pytest.approx(alone.kl_nats, abs=1e-6)
    assert padded.loss_nats == pytest.approx(alone.loss_nats, abs=1e-6)


def test_padding_on_the_left_does_not_count_with_learned_positions() -> None:
    model = tiny_model("gpt2")
    ids = tokens(1, 8)
    longer = torch.cat([torch.full((1, 4), 5), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 8])
    alone, padded = ls.compare(model, "drop 2", ids), ls.compare(model, "drop 2", longer, attention_mask=mask)
    assert padded.tokens == alone.tokens == 7
    assert padded.kl_nats == pytest.approx(alone.kl_nats, abs=1e-6)
    assert padded.agreement == alone.agreement


def test_nan_is_not_agreement() -> None:
    model, broken = tiny_model("llama"), tiny_model("llama")
    broken.model.layers[3].mlp.down_proj.weight.data[0, 0] = math.nan
    found = ls.compare(model, broken, tokens())
    assert math.isnan(found.kl_nats)
    assert math.isnan(found.entropy_bits)


def test_infinite_logits_are_no_trouble() -> None:
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    model.lm_head.bias.data[3] = -math.inf
    ids = tokens()
    ids[ids == 3] = 4
    found = ls.compare(model, "drop 2", ids)
    assert math.isfinite(found.kl_nats)
    assert math.isfinite(found.entropy_bits)


def test_what_cannot_be_compared() -> None:
    model = tiny_model("llama")
    with pytest.raises(ls.PlanError, match="no position has a next token"):
        ls.compare(model, "drop 2", tokens(2, 1))
    with pytest.raises(ls.PlanError, match=r"found \(12,\)"):
        ls.compare(model, "drop 2", tokens()[0])
    with pytest.raises(ls.PlanError, match="logits have the shapes"):
        ls.compare(model, tiny_model("llama", vocab_size=64), tokens() % 60)
    with pytest.raises(ls.PlanError, match="sequences of one length"):
        ls.compare(model, "drop 2", [[1, 2, 3], [4, 5]])


def test_a_true_token_of_probability_0_is_reported(tmp_path: Path) -> None:
    model, ids = tiny_model("llama"), tokens()
    with torch.no_grad():
        head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[ids[0, 3]] = -math.inf
    model.lm_head = head
    count = int((ids[:, 1:] == ids[0, 3]).sum())
    with pytest.warns(LayerSurgeryWarning, match=f"not finite: loss_nats at {count} of .* probability 0"):
        found = ls.compare(model, "drop 2", ids, per_token=True)
    assert found.non_finite == {"loss_nats": count, "loss_change_nats": count}
    assert math.isfinite(found.kl_nats)
    assert found.positions is not None
    assert (~np.isfinite(found.positions.loss_nats)).sum() == count
    assert "non_finite" in repr(found)
    with pytest.warns(LayerSurgeryWarning, match="not finite: unedited, drop 0, drop 1, .* gave NaN or infinity"):
        ls.sweep(model, "drop", ids)
    for _ in ("measured", "read again"):
        with pytest.warns(LayerSurgeryWarning, match="not finite: .*drop 0, drop 1, .* gave NaN or infinity"):
            ls.sweep(model, "drop", ids, directory=tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LayerSurgeryWarning)
        assert ls.compare(tiny_model("llama"), "drop 2", ids).non_finite == {}
