"""Prediction and suppression neurons are compared with scipy on the whole matrix of neurons and tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import layersurgery as ls
from layersurgery.metrics import cosine_moments as kernel
from layersurgery.metrics.cosine_moments import moments, unit_rows
from layersurgery.models.weight_conventions import input_dim, output_dim
from layersurgery.sweeps import neuron_scores as scoring
from tests.support.dense import LAYER_NORM, blocks_of
from tests.support.zoo import DEPTH, tiny_model

Rows = Callable[[Any], torch.Tensor]


def _experts(block: Any, name: str = "mlp") -> torch.Tensor:
    weight: torch.Tensor = getattr(block, name).experts.down_proj  # (experts, width, neurons)
    return torch.cat([expert.T for expert in weight])


# Output weights of a block's neurons, (neurons, width), written down by reading each architecture's source.
HAND: dict[str, Rows] = {
    "gpt2": lambda block: block.mlp.c_proj.weight,
    "gpt_neox": lambda block: block.mlp.dense_4h_to_h.weight.T,
    "phi": lambda block: block.mlp.fc2.weight.T,
    "llama": lambda block: block.mlp.down_proj.weight.T,
    "qwen2": lambda block: block.mlp.down_proj.weight.T,
    "opt": lambda block: block.fc2.weight.T,
    "bloom": lambda block: block.mlp.dense_4h_to_h.weight.T,
    "falcon": lambda block: block.mlp.dense_4h_to_h.weight.T,
    "mpt": lambda block: block.ffn.down_proj.weight.T,
    "gemma2": lambda block: block.mlp.down_proj.weight.T * (1 + block.post_feedforward_layernorm.weight),
    "olmo2": lambda block: block.mlp.down_proj.weight.T * block.post_feedforward_layernorm.weight,
    "cohere": lambda block: block.mlp.down_proj.weight.T,
    "mixtral": lambda block: _experts(block),
    "gpt_oss": lambda block: torch.cat(list(block.mlp.experts.down_proj)),
    "qwen3_next": lambda block: torch.cat([_experts(block), block.mlp.shared_expert.down_proj.weight.T]),
    "deepseek_v3": lambda block: (
        torch.cat([_experts(block), block.mlp.shared_experts.down_proj.weight.T])
        if hasattr(block.mlp, "experts")
        else block.mlp.down_proj.weight.T
    ),
}
FINAL: dict[str, Rows] = {
    "gpt2": lambda model: model.transformer.ln_f.weight,
    "gpt_neox": lambda model: model.gpt_neox.final_layer_norm.weight,
    "phi": lambda model: model.model.final_layernorm.weight,
    "opt": lambda model: model.model.decoder.final_layer_norm.weight,
    "bloom": lambda model: model.transformer.ln_f.weight,
    "falcon": lambda model: model.transformer.ln_f.weight,
    "mpt": lambda model: model.transformer.norm_f.weight,
    "gemma2": lambda model: 1 + model.model.norm.weight,
    "qwen3_next": lambda model: 1 + model.model.norm.weight,
}


@torch.no_grad()
def dense(model: Any, name: str) -> list[np.ndarray[Any, Any]]:
    """Cosines of every neuron with every word, for each block: (neurons, words), float64."""
    usual: Rows = lambda model: model.model.norm.weight  # noqa: E731
    u = model.get_output_embeddings().weight.double() * FINAL.get(name, usual)(model)
    if name in LAYER_NORM:
        u = u - u.mean(1, keepdim=True)
    u = u - u.mean(0)
    found = []
    for block in blocks_of(model):
        w = HAND[name](block).double()
        w = w - w.mean(1, keepdim=True) if name in LAYER_NORM else w
        found.append(torch.nn.functional.normalize(w, dim=1) @ torch.nn.functional.normalize(u, dim=1).T)
    return [cosines.numpy() for cosines in found]


@pytest.mark.parametrize("name", HAND)
def test_scores_are_scipys_of_the_whole_matrix(name: str) -> None:
    model = tiny_model(name, vocab_size=300)
    scores = ls.analyses.neuron_scores(model)
    table = ls.analyses.neurons(model)
    for layer, cosines in enumerate(dense(model, name)):
        mine = scores[scores.layer == layer]
        assert len(mine) == len(cosines)
        kurtosis, skew = stats.kurtosis(cosines, 1, fisher=False), stats.skew(cosines, 1)
        np.testing.assert_allclose(mine["mean"], cosines.mean(1), atol=1e-6)
        np.testing.assert_allclose(mine["variance"], cosines.var(1), rtol=1e-5)
        np.testing.assert_allclose(mine["skew"], skew, atol=1e-4)
        np.testing.assert_allclose(mine["kurtosis"], kurtosis, rtol=1e-4)
        row = table.iloc[layer]
        assert row.neurons == len(cosines)
        assert row.prediction == ((kurtosis > 10) & (skew > 0)).sum()
        assert row.suppression == ((kurtosis > 10) & (skew < 0)).sum()
        assert row.partition == (cosines.var(1) > 0.005).sum()
        assert row.prediction_percent == pytest.approx(100 * row.prediction / len(cosines))


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(3, 60), st.integers(2, 12))
def test_moments_of_any_shape_and_tiling(seed: int, neurons: int, words: int, width: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    w, u = torch.randn(neurons, width, generator=rng), torch.randn(words, width, generator=rng) + 0.3
    cosines = (torch.nn.functional.normalize(w.double()) @ torch.nn.functional.normalize(u.double()).T).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "NEURON_TILE", 4)
        patch.setattr(kernel, "VOCAB_TILE", 7)
        found = moments(w, unit_rows(u.double())).numpy()
    meant = cosines.mean(1), cosines.var(1), stats.skew(cosines, 1), stats.kurtosis(cosines, 1, fisher=False)
    for one, other in zip(found, meant, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_unembedding_may_be_read_in_any_number_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    meant = ls.analyses.neuron_scores(model)
    monkeypatch.setattr(scoring, "_ROWS", 7)
    pd.testing.assert_frame_equal(ls.analyses.neuron_scores(model), meant, rtol=1e-5)


def test_a_neuron_of_zeros_has_no_shape() -> None:
    found = moments(torch.zeros(2, 8), unit_rows(torch.randn(50, 8)))
    assert found[:2].abs().max() == 0
    assert found[2:].isnan().all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_a_planted_neuron_is_found_and_its_negative_suppresses(name: str) -> None:
    """A neuron that writes the direction of a rare class of tokens raises a few of many, so it predicts."""
    model = tiny_model(name, vocab_size=2000, **{"n_embd" if name == "gpt2" else "hidden_size": 128})
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
        head = model.get_output_embeddings().weight
        head[:20] += 6 * torch.randn(128)  # the class
        direction = head[:20].mean(0) - head[20:].mean(0)
        block: Any = blocks_of(model)[3]
        if name == "gpt2":
            block.mlp.c_proj.weight[5], block.mlp.c_proj.weight[6] = direction, -direction
        elif name == "llama":
            block.mlp.down_proj.weight[:, 5], block.mlp.down_proj.weight[:, 6] = direction, -direction
        else:
            block.mlp.experts.down_proj[2, :, 5], block.mlp.experts.down_proj[2, :, 6] = direction, -direction
    scores = ls.analyses.neuron_scores(model)
    found = scores[(scores.layer == 3) & (scores.kind != "")]
    assert list(found.kind) == ["prediction", "suppression"]
    assert list(found.neuron) == [5, 6]
    assert found.expert.isna().all() if name != "mixtral" else list(found.expert) == [2, 2]
    assert found["skew"].iloc[0] == pytest.approx(-found["skew"].iloc[1], abs=1e-3)
    table = ls.analyses.neurons(model)
    assert (table.prediction.sum(), table.suppression.sum()) == (1, 1)
    assert table.prediction_percent[3] > 0


def test_blocks_without_an_mlp_are_named() -> None:
    table = ls.analyses.neurons(tiny_model("nemotron_h"))
    assert list(table.neurons > 0) == [False, False, True] * 2
    assert table.prediction.isna().tolist() == [True, True, False] * 2
    assert table.attrs["skipped"]["neurons of block 0"] == "the block has no mlp"
    with pytest.raises(ls.UnsupportedEditError, match="MambaForCausalLM has no neurons to score: the block has no mlp"):
        ls.analyses.neurons(tiny_model("mamba"))
    with pytest.raises(
        ls.UnsupportedEditError, match="neurons write to a stream of width 32, but the unembedding is of shape"
    ):
        ls.analyses.neurons(tiny_model("opt-postnorm"))


def test_which_way_round_a_weight_lies() -> None:
    linear = torch.nn.Linear(8, 8)
    assert (input_dim(linear, "weight", 8), output_dim(linear, "weight", 8)) == (1, 0)
    wide = torch.nn.Linear(8, 24)
    assert input_dim(wide, "weight", 8) == 1
    with pytest.raises(ls.UnsupportedEditError, match="no dimension of the stream's width 5"):
        input_dim(wide, "weight", 5)

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(8, 8))

    with pytest.raises(ls.UnsupportedEditError, match="may be transposed or not"):
        output_dim(Odd(), "weight", 8)


def test_the_model_may_be_on_disk_and_memory_holds_a_block_at_a_time(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    offloaded = ls.load(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "folder").model
    assert next(offloaded.model.layers[2].parameters()).is_meta
    seen: list[tuple[int, int]] = []
    found = ls.analyses.neuron_scores(offloaded, progress=lambda done, of: seen.append((done, of)))
    assert next(offloaded.model.layers[2].parameters()).is_meta
    assert seen == [(done, DEPTH) for done in range(1, DEPTH + 1)]
    pd.testing.assert_frame_equal(found, ls.analyses.neuron_scores(model))
