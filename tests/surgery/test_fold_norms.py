"""Folding norms and centering weights keeps the function, and reports what was not folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import layersurgery as ls
from layersurgery.models.weight_conventions import fit_norm
from layersurgery.surgery.fold_weights import WeightUndo
from tests.support.dense import LAYER_NORM
from tests.support.reference import logits_of
from tests.support.zoo import ZOO, tiny_model, tokens

# Norms that cannot be folded, of those before attention and MLP, and the final one.
LEFT = {
    "llama4_text": 3,  # experts scale their input by the router's weight
    "dbrx": 6,
    "phimoe": 6,
    "minimax": 12,
    "jetmoe": 12,
    "opt-postnorm": 6,
    "mamba": 0,
}
ARCHITECTURES = [
    *sorted(LAYER_NORM), "llama", "llama-tied", "qwen2", "gemma2", "gemma3_text", "mixtral", "gpt_oss", "olmo2",
    "granite", "jamba", "deepseek_v3", "nemotron", "olmo", "phimoe", "jetmoe", "minimax", "llama4_text",
    "opt-postnorm", "mamba", "nanochat", "dbrx",
]  # fmt: skip


@pytest.mark.parametrize("name", dict.fromkeys(ARCHITECTURES))
def test_the_function_stays(name: str) -> None:
    model, ids = tiny_model(name), tokens(2, 12)
    before = logits_of(model, ids)
    result = ls.fold(model, unembedding=False)
    torch.testing.assert_close(logits_of(model, ids), before, rtol=0, atol=5e-5)
    other = tiny_model(name)
    ls.fold(other)
    torch.testing.assert_close(logits_of(other, ids).log_softmax(-1), before.log_softmax(-1), rtol=0, atol=5e-5)
    norms = [what for what in result.not_folded if "norm" in what.rpartition(".")[2] or ".ln" in what]
    assert len(norms) == LEFT.get(name, 0), result.not_folded
    assert name in ("nanochat", "olmo", "opt-postnorm") or result.folded
    assert ("what writes the stream" in result.not_folded) == (not _reads_are_mean_free(model))


def _reads_are_mean_free(model: Any) -> bool:
    from layersurgery.runtime.block_runner import BlockRunner
    from layersurgery.runtime.contributions import reads_are_mean_free

    return reads_are_mean_free(BlockRunner(model, ls.anatomy(model)))


def test_what_is_folded_is_gone_from_the_norms() -> None:
    for name in ("gpt2", "llama", "gemma2"):
        model = tiny_model(name)
        result = ls.fold(model)
        assert len(result.folded) == 13
        for path in result.folded:
            norm = model.get_submodule(path)
            gain = fit_norm(norm, 32, torch.zeros(1))
            assert gain is not None
            torch.testing.assert_close(gain.scale_D, torch.ones(32, dtype=torch.float64), rtol=0, atol=1e-5)
            assert gain.shift_D.abs().max() == 0


def test_centered_weights_have_no_mean() -> None:
    model = tiny_model("gpt2")
    result = ls.fold(model)
    block = model.transformer.h[2]
    for value in (
        model.transformer.wte.weight.mean(1),
        model.transformer.wpe.weight.mean(1),
        block.attn.c_attn.weight.mean(0),
        block.mlp.c_fc.weight.mean(0),
        block.attn.c_proj.weight.mean(1),
        block.mlp.c_proj.weight.mean(1),
        block.mlp.c_proj.bias.mean(),
        model.lm_head.weight.mean(1),
        model.lm_head.weight.mean(0),
    ):
        assert value.abs().max() < 1e-6
    assert "transformer.wte.weight" in result.centered
    assert "transformer.h.2.mlp.c_proj.bias" in result.centered
    assert not result.not_folded


def test_a_tied_unembedding_is_untied_and_the_result_can_be_saved(tmp_path: Path) -> None:
    model, ids = tiny_model("llama-tied"), tokens()
    before = logits_of(model, ids)
    ls.fold(model, unembedding=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "folded")
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "folded"), ids), before, rtol=0, atol=2e-5
    )


def test_what_is_not_folded_is_unchanged_and_named() -> None:
    model = tiny_model("gemma2")
    result = ls.fold(model)
    assert "the soft-cap" in result.not_folded["mean of lm_head over the vocabulary"]
    model = tiny_model("phimoe")
    kept = {
        name: parameter.clone()
        for name, parameter in model.named_parameters()
        if ".experts." in name or "post_attention" in name
    }
    result = ls.fold(model)
    assert "has no bias that can absorb its shift" in result.not_folded["model.layers.0.post_attention_layernorm"]
    assert all(
        torch.equal(kept[name], parameter)
        for name, parameter in model.named_parameters()
        if name in kept and "down_proj" not in name
    )


@torch.no_grad()
def test_undoing_restores_a_weight_that_was_changed_twice() -> None:
    linear, undo = nn.Linear(2, 2), WeightUndo()
    original, before = linear.weight, linear.weight.detach().clone()
    undo.keep(linear, "weight").mul_(2)
    undo.keep(linear, "weight").add_(1)
    undo.set_parameter(linear, "weight", nn.Parameter(torch.zeros(2, 2)))
    undo.keep(linear, "weight").add_(1)
    undo.run()
    assert linear.weight is original
    assert torch.equal(original, before)


def test_weights_that_are_elsewhere_are_not_folded(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.lm_head.to("meta")
    with pytest.raises(ls.UnsupportedEditError, match="load the whole model into memory"):
        ls.fold(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 33, 2560, 4096, 5120])
def test_gains_are_found_by_running(dtype: torch.dtype, width: int) -> None:
    norm = nn.LayerNorm(width).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    rms = nn.RMSNorm(width, eps=1e-5).to(dtype)
    nn.init.normal_(rms.weight)
    near = 4e-2 if dtype.itemsize == 2 else 1e-5
    for module, centres in ((norm, True), (rms, False)):
        gain = fit_norm(module, width, torch.zeros(1, dtype=dtype))
        assert gain is not None
        assert gain.subtracts_mean == centres
        torch.testing.assert_close(gain.scale_D, module.weight.detach().double(), rtol=near, atol=near)
        assert gain.shift_D.any() == centres
    for other in (nn.Tanh(), nn.Linear(width, width).to(dtype), nn.Linear(width, 2).to(dtype)):
        assert fit_norm(other, width, torch.zeros(1, dtype=dtype)) is None


def test_the_zoo_is_known() -> None:
    assert set(ARCHITECTURES) <= set(ZOO)
