"""Build tiny models of many architectures from configs, with random weights; nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

DEPTH = 6
VOCAB = 128

# Set if a config class has the field; ZOO adds fields for single architectures.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "num_hidden_layers": DEPTH,
    "num_layers": DEPTH,
    "n_layers": DEPTH,
    "n_layer": DEPTH,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 64,
    "sliding_window": 4,
    "attention_chunk_size": 4,
}
_SLIDING = ["sliding_attention", "full_attention"] * (DEPTH // 2)

ZOO: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]], "window_size": 4, "intermediate_size": 64},
    "gptj": {"n_inner": 64},
    "gpt_neox": {},
    "gpt_bigcode": {},
    "codegen": {"n_inner": 64},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"num_key_value_heads": 4},
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen2-listed": {"use_sliding_window": True, "layer_types": _SLIDING},
    "qwen3": {"use_sliding_window": True, "layer_types": _SLIDING},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window_pattern": 3},
    "mistral": {},
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [1, 4]},
    "qwen3_moe": {"mlp_only_layers": [2]},
    "qwen3_moe-step": {"decoder_sparse_step": 2},
    "llama4_text": {"no_rope_layer_interval": 3, "interleave_moe_layer_step": 2, "use_qk_norm": True},
    "gpt_oss": {},
    "bloom": {},
    "opt": {},
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "falcon-alibi": {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
    "mpt": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": {},
    "smollm3": {"no_rope_layer_interval": 3},
    "cohere": {},
    "cohere2": {},
    "deepseek_v3": {
        "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "num_nextn_predict_layers": 0,
    },
    "starcoder2": {},
    "stablelm": {},
    "granite": {},
    "granitemoe": {},
    "glm4": {},
    "exaone4": {},
    "nemotron": {},
    "xglm": {"attention_heads": 4},
    "biogpt": {},
    "persimmon": {},
    "mamba": {"state_size": 8},
    "jamba": {
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_period": 3,
        "attn_layer_offset": 1,
    },
    "qwen3_next": {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    },
    "lfm2": {"block_multiple_of": 8, "layer_types": ["conv", "full_attention"] * (DEPTH // 2)},
    "ernie4_5": {},
    "seed_oss": {},
    "arcee": {},
    "helium": {},
    "gpt2-inverse": {"scale_attn_by_inverse_layer_idx": True},
    "diffllama": {},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64, "rescale_every": 0},
    "recurrent_gemma": {
        "lru_width": 32, "block_types": ["recurrent", "recurrent", "attention"], "attention_window_size": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "apertus": {},
    "olmo3": {"layer_types": _SLIDING},
    "glm4_moe": {"first_k_dense_replace": 1},
    "minimax_m2": {},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "hunyuan_v1_dense": {},
    "nanochat": {},
    "afmoe": {},
    "vaultgemma": {"query_pre_attn_scalar": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4, "expand": 2},
    "falcon_mamba": {"state_size": 8},
    "bamba": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4, "attn_layer_indices": [1, 4],
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4,
        "layer_types": ["mamba", "attention"] * 3, "shared_intermediate_size": 16,
    },
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 4, "n_groups": 1,
        "hybrid_override_pattern": "M*-M*-",
    },
    "phimoe": {},
    "opt-postnorm": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "hunyuan_v1_moe": {},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 3, "block_size": 4},
    "qwen3_5_text": {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "jetmoe": {"kv_channels": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3, "num_dense_layers": 2},
    "olmo_hybrid": {},
    "ctrl": {},
    "gpt_neox_japanese": {},
}  # fmt: skip


def slow(value: Any) -> Any:
    """Return a parameter of a test that is a slow one for this value."""
    return pytest.param(value, marks=pytest.mark.slow)


def rotate(plans: Sequence[str], *, count: int = 1, always: Iterable[tuple[str, str]] = ()) -> list[Any]:
    """Return every pair of an architecture and a plan, for `parametrize`; all but a few pairs are slow tests.

    Args:
        plans: the edits of a test.
        count: how many plans of each architecture are quick; the next architecture has the next ones.
        always: pairs that do not count and are quick anyway, because the edit is refused and the test short.
    """
    pairs = []
    always = set(always)
    for number, name in enumerate(ZOO):
        edits = [plan for plan in plans if (name, plan) not in always]
        quick = {edits[(number * count + turn) % len(edits)] for turn in range(count)} if edits else set()
        pairs += [
            pytest.param(name, plan, marks=() if plan in quick or (name, plan) in always else pytest.mark.slow)
            for plan in plans
        ]
    return pairs


def tiny_config(name: str, **overrides: Any) -> Any:
    """Return the config of one entry of the zoo."""
    model_type = name.partition("-")[0]
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    fields = {key: value for key, value in SMALL.items() if key in known}
    fields = {
        key: value
        for key, value in fields.items()
        if config_class.attribute_map.get(key, key) not in fields or key not in config_class.attribute_map
    }
    return config_class(**{**fields, **ZOO.get(name, {}), **overrides})


def tiny_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return one model of the zoo in float32 and evaluation mode; noise makes sure that no weight is zero or one."""
    if overrides:
        return _build(name, seed, **overrides)
    model, random_state = _build_once(name, seed)
    torch.set_rng_state(random_state)  # the same, whether another test built it or this one
    return copy.deepcopy(model)


@cache
def _build_once(name: str, seed: int) -> tuple[PreTrainedModel, torch.Tensor]:
    return _build(name, seed), torch.get_rng_state()


def _build(name: str, seed: int, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().float()


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    """Return random token ids, (batch, length)."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
