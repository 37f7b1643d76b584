"""Check what blocks read of earlier blocks: an edit in memory computes what a reload of the checkpoint computes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import layersurgery as ls
from layersurgery.models.unsupported import refuse_route
from tests.support.zoo import DEPTH, tiny_config, tiny_model, tokens

_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2,
}  # fmt: skip
_SHARED = ["full", "shared", "full", "shared", "shared", "full"]
_NEXT = ["full", "shared", "full", "shared", "full", "full"]  # GLM 5.3 has no two layers in a row without an indexer
_LARGE4 = {key: value for key, value in _MLA.items() if key != "q_lora_rank"} | {"no_rope_layers": [1] * DEPTH}
_GLM5 = _MLA | {
    "qk_rope_head_dim": 0, "index_kpool": 2, "linear_head_dim": 8, "linear_num_heads": 4, "hc_mult": 2,
    "mlp_layer_types": ["dense"] * DEPTH, "layer_types": ["indexed_attention"] * DEPTH,
}  # fmt: skip
_VISION = {
    "glm5_next": {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 16,
        "projection_intermediate_size": 16,
    },
    "mistral_large4": {
        "model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "image_size": 28, "patch_size": 14,
    },
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm_moe_dsa": ("glm_moe_dsa", _MLA | {"indexer_types": _SHARED}),
    "hy_v4": ("hy_v4", _MLA | {"indexer_types": _SHARED, "hc_mult": 2}),
    "glm5_next": ("glm5_next_text", _GLM5 | {"indexer_types": _NEXT}),
    "mistral_large4": ("mistral_large4_text", _LARGE4 | {"indexer_types": _SHARED}),
    "mistral_large4-keys": (
        "mistral_large4_text", _LARGE4 | {"indexer_types": ["full"] * DEPTH, "kv_source_layers": [0, 0, 2, 2, 2, 5]}
    ),
    "gemma4_unified": (
        "gemma4_unified_text",
        {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)},
    ),
}  # fmt: skip
# Which of these a model can run. The others are refused, in memory and on disk, by one sentence.
EDITS = {
    "repeat 0": "glm_moe_dsa hy_v4 glm5_next mistral_large4 mistral_large4-keys",
    "repeat 1": "glm_moe_dsa hy_v4 mistral_large4 mistral_large4-keys",
    "repeat 4": "glm_moe_dsa hy_v4 glm5_next mistral_large4 mistral_large4-keys gemma4_unified",
    "repeat 0:2": "glm_moe_dsa hy_v4 glm5_next mistral_large4 mistral_large4-keys",
    "swap 2 3": "",
    "drop 2": "",
    "drop 3": "glm_moe_dsa hy_v4 glm5_next mistral_large4 mistral_large4-keys",
    "drop 4": "glm_moe_dsa hy_v4 glm5_next mistral_large4 mistral_large4-keys gemma4_unified",
    "drop 0:2": "glm_moe_dsa hy_v4 glm5_next mistral_large4 mistral_large4-keys",
}


@cache
def _built(name: str) -> PreTrainedModel:
    model_type, fields = MODELS[name]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    if model_type.removesuffix("_text") not in _VISION:
        return tiny_model(model_type, **fields)
    outer = model_type.removesuffix("_text")
    config = transformers.AutoConfig.for_model(
        outer, text_config=tiny_config(model_type, **fields).to_dict(), vision_config=_VISION[outer]
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().float()


def _answers(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits, and what the model writes with a cache."""
    ids = tokens()
    with torch.no_grad():
        text = model.generate(ids[:, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        return model(input_ids=ids, use_cache=False).logits, text


def _pairs() -> list[Any]:
    """Return every model with every edit; each model has two quick ones of its own, and those that once were wrong."""
    always = {("glm5_next", "repeat 0"), ("glm5_next", "repeat 1"), ("mistral_large4-keys", "swap 2 3")}
    quick = always | {
        (name, list(EDITS)[(2 * number + turn) % len(EDITS)]) for number, name in enumerate(MODELS) for turn in (0, 1)
    }
    return [
        pytest.param(name, plan, marks=() if (name, plan) in quick else pytest.mark.slow)
        for name in MODELS
        for plan in EDITS
    ]


@pytest.mark.parametrize(("name", "plan"), _pairs())
def test_in_memory_and_on_disk(name: str, plan: str, tmp_path: Path) -> None:
    model = _built(name)
    before = _answers(model)
    model.save_pretrained(tmp_path / "source")
    if name not in EDITS[plan].split():
        with pytest.raises(ls.UnsupportedEditError) as in_memory, ls.operate(model, plan):
            pass
        with pytest.raises(ls.UnsupportedEditError) as on_disk:
            ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "edited")
        assert str(in_memory.value) == str(on_disk.value)
        assert "num_kv_shared_layers = 2" in str(on_disk.value) or "keep these blocks" in str(on_disk.value)
        assert not (tmp_path / "edited").exists()
    else:
        ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "edited")
        meant = _answers(type(model).from_pretrained(tmp_path / "edited").eval())
        with ls.operate(model, plan):
            assert all(map(torch.equal, _answers(model), meant))
            # A model in use may be saved, since what its blocks write without a reader changes nothing.
            ls.save(model, tmp_path / "saved")
        assert all(map(torch.equal, _answers(type(model).from_pretrained(tmp_path / "saved").eval()), meant))
    assert all(map(torch.equal, _answers(model), before))


@pytest.mark.parametrize(
    ("name", "plan", "in_memory"),
    [
        ("glm_moe_dsa", "skip-attention 2", False),  # its choice would be missing in block 3
        ("glm_moe_dsa", "skip-attention 3", False),  # it hands the choice of block 2 to block 4
        ("glm_moe_dsa", "skip-attention 4", True),
        ("glm_moe_dsa", "skip-mlp 3", True),
        ("gemma4_unified", "skip-attention 2", False),
        ("gemma4_unified", "skip-attention 1", True),
    ],
)
def test_a_skipped_attention(name: str, plan: str, in_memory: bool, tmp_path: Path) -> None:
    """In a file, its output is zero, and it still chooses tokens and has keys; a skipped module does neither."""
    model = _built(name)
    model.save_pretrained(tmp_path / "source")
    ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "edited")
    meant = _answers(type(model).from_pretrained(tmp_path / "edited").eval())
    if in_memory:
        with ls.operate(model, plan):
            assert all(map(torch.equal, _answers(model), meant))
    else:
        with (
            pytest.raises(ls.UnsupportedEditError, match=r"get none; .* in the checkpoint \(edit_checkpoint\)"),
            ls.operate(model, plan),
        ):
            pass


def test_sources_of_keys_follow_the_route() -> None:
    model = _built("mistral_large4-keys")
    config = model.config.get_text_config()
    for plan, sources in [
        ("repeat 2", [0, 0, 2, 3, 3, 3, 6]),
        ("drop 1", [0, 1, 1, 1, 4]),
        ("move 0:2 after 4", [0, 0, 0, 3, 3, 5]),
    ]:
        with ls.operate(model, plan):
            assert config.kv_source_layers == sources
    assert config.kv_source_layers == [0, 0, 2, 2, 2, 5]


@pytest.mark.parametrize(
    ("plan", "right"), [("drop 0:2", True), ("swap 0 1", False), ("drop 2", False), ("drop 3", True)]
)
def test_blocks_that_use_what_another_picked(plan: str, right: bool) -> None:
    fields = {"model_type": "glm_moe_dsa", "indexer_types": ["full", "shared", "full", "shared"]}
    route = ls.Plan.parse(plan).route(4)
    if right:
        refuse_route(fields, route)
    else:
        with pytest.raises(ls.UnsupportedEditError, match=r"attends to the tokens that block \d selects"):
            refuse_route(fields, route)


def test_a_config_without_the_list() -> None:
    with pytest.raises(ls.UnsupportedEditError, match="add indexer_types to config.json"):
        refuse_route({"model_type": "hy_v4_vl_text"}, ls.Plan.parse("drop 1").route(4))


def test_a_sweep_measures_only_what_it_can_run_block_by_block() -> None:
    """Keys are stored in one place for all routes, so an edit before the last block that stores some is left out."""
    model = _built("gemma4_unified")
    with pytest.warns(UserWarning, match="can measure only edits of the blocks after it"):
        frame = ls.sweep(model, "drop,swap", tokens())
    assert list(frame.plan) == ["", "drop 4", "drop 5", "swap 4 5"]
    for row in frame.iloc[1:].itertuples():
        assert row.kl_nats == pytest.approx(ls.compare(model, row.plan, tokens()).kl_nats, abs=1e-6)
    with pytest.raises(ls.UnsupportedEditError, match="measure 1:6 with compare"):
        ls.sweep(model, ["drop 0"], tokens())


def test_a_sweep_of_blocks_that_hand_on_a_choice_says_what_to_do() -> None:
    model = _built("glm_moe_dsa")
    with pytest.raises(ls.UnsupportedEditError, match="measure single edits with compare"):
        ls.sweep(model, "drop", tokens())
    assert ls.compare(model, "repeat 1", tokens()).kl_nats > 0
