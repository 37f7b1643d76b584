"""From the stream to logits: the fast way is taken where it is the model's own, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import layersurgery as ls
from layersurgery.metrics import dispatch, reference
from layersurgery.runtime.block_runner import BlockRunner
from layersurgery.runtime.unembedding import ModelHead, Unembedding, find_readout, head_logits
from tests.support.reference import logits_of
from tests.support.zoo import DEPTH, ZOO, tiny_config, tiny_model, tokens


def stack_of(model: Any) -> BlockRunner:
    return BlockRunner(model, ls.anatomy(model))


@pytest.mark.parametrize("name", ZOO)
def test_the_readout_is_the_models_own_tail(name: str) -> None:
    model, ids = tiny_model(name), tokens()
    runner = stack_of(model)
    readout = find_readout(runner)
    assert isinstance(readout, Unembedding)
    assert readout.affine == (name not in ("gemma2", "recurrent_gemma", "vaultgemma", "nanochat"))
    own = find_readout(runner, use_model_head=True)
    assert isinstance(own, ModelHead)
    with runner.inference_mode():
        record = runner.record({"input_ids": ids, "use_cache": False}, ())
        end = record.states[DEPTH]
        meant = logits_of(model, ids)
        chosen = torch.arange(ids.numel())
        for way in (readout, own):
            found = way.logits_tile(way.normalize(end, chosen), 0, way.vocabulary).view_as(meant)
            torch.testing.assert_close(found, meant, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "scale", "cap"),
    [
        ("llama", {}, 1, None),
        ("cohere", {"logit_scale": 0.3}, 0.3, None),
        ("granite", {"logits_scaling": 8.0}, 1 / 8, None),
        ("gemma2", {"final_logit_softcapping": 30.0}, 1, 30),
        ("gemma2", {"final_logit_softcapping": 0.5}, 1, 0.5),
        ("gemma2", {"final_logit_softcapping": None}, 1, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_soft_cap_are_found(
    name: str, fields: dict[str, Any], scale: float, cap: float | None, dtype: torch.dtype
) -> None:
    readout = find_readout(stack_of(tiny_model(name, **fields).to(dtype)))
    assert isinstance(readout, Unembedding)
    assert readout.scale == pytest.approx(scale, rel=4e-6 if dtype == torch.float32 else 2e-3)
    assert (readout.cap is None) == (cap is None)
    if cap is not None:
        assert readout.cap == pytest.approx(cap, rel=1e-6 if dtype == torch.float32 else 4e-3)


class _Masking(nn.Linear):
    """An unembedding whose last token does not exist."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        logits[..., -1] = -torch.inf
        return logits


class _Bent(nn.Module):
    """Logits bent in a way nobody has heard of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight = inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(x)
        return logits + logits.pow(2).clamp(max=3)


@pytest.mark.parametrize("kind", ["masked", "bent", "behind"])
def test_where_it_is_not_the_model_reads_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    if kind == "masked":
        masking = _Masking(32, 128, bias=False)
        masking.weight = model.lm_head.weight
        model.lm_head = masking
    elif kind == "bent":
        model.lm_head = _Bent(model.lm_head)
    else:
        forward = model.forward

        def bent(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            out.logits = out.logits.abs()
            return out

        monkeypatch.setattr(model, "forward", bent)
    runner = stack_of(model)
    readout = find_readout(runner)
    assert isinstance(readout, ModelHead)
    ids = tokens()
    p = logits_of(model, ids)[:, :-1].flatten(0, 1)
    target = ids[:, 1:].flatten()
    with runner.inference_mode():
        record = runner.record({"input_ids": ids, "use_cache": False}, {2})
        chosen = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
        base = dispatch.baseline(readout, readout.normalize(record.states[DEPTH], chosen), target)
        found = dispatch.measure(readout, readout.normalize(record.states[2], chosen), base)
        q = head_logits(runner, record.states[2])[:, :-1].flatten(0, 1)
    # A token that does not exist is no next token, and its logit is minus infinity in both models.
    meant = reference.measure(p, q, target)
    torch.testing.assert_close(found, meant, rtol=1e-5, atol=2e-5, equal_nan=True)
    assert meant[0].isfinite().all()


def test_memory_that_runs_out_in_the_head_is_not_a_property_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    runner = stack_of(model)

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.lm_head, "forward", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        find_readout(runner)


def test_a_model_that_predicts_no_tokens_is_refused() -> None:
    import transformers

    config = tiny_config("llama")
    for kind, words in {
        transformers.LlamaForSequenceClassification: (
            "LlamaForSequenceClassification.*(predicts no next tokens|head cannot be run)"
        ),
        transformers.LlamaModel: "LlamaModel predicts no next tokens: it returns no logits. .*AutoModelForCausalLM",
    }.items():
        with pytest.raises(ls.UnsupportedEditError, match=words):
            ls.sweep(kind(config).eval(), "drop", tokens())
