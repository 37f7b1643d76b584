"""Build tiny models that read text and images or sound, one of each type of transformers, with random weights."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

import layersurgery as ls
from layersurgery.plans.variants import variants
from layersurgery.sweeps.measurer import Measurer
from tests.support.tiny_checkpoint import tiny_tokenizer
from tests.support.zoo import DEPTH, SMALL, VOCAB

# Set in each section of a config that has the field, in addition to those of text models. The parts for images and
# sound are as deep as the text decoder where that is one number, so that only names tell their lists of blocks apart.
_SMALL: dict[str, Any] = SMALL | {
    "depth": DEPTH,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "adapter_input_size": 32,
    "text_hidden_size": 32,
    "output_dim": 32,
    "encoder_layers": DEPTH,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "encoder_hidden_size": 32,
    "projection_hidden_size": 32,
    "projection_intermediate_size": 32,
    "projector_hidden_size": 32,
    "projection_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "base_channels": 32,
    "channel_multiplier": (1, 1),
    "num_embeddings": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": (0, 1),
}


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


_MROPE = _rope(2, 1, 1)
# Half of 16 numbers of each head are rotated.
_HALF_ROTATED = {"rope_parameters": _MROPE["rope_parameters"] | {"partial_rotary_factor": 0.5}, "head_dim": 16}
_ALL_HEADS = {"num_key_value_heads": 4}
_MLA = {**_ALL_HEADS, "head_dim": 8, "qk_head_dim": 16, "first_k_dense_replace": 1}
_HYBRID = {
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 4, "n_groups": 1,
    "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention", "full_attention", "moe"],
    "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
_MAP = {"vocabulary_map": {"<image>": 100, "IMGIMGAAZ": 101, "IMGIMGABZ": 102}}
_THINKER = {"thinker_config": {"text_config": _MROPE}}
_SOUND = {"depths": (1, 1), "downsampling_ratios": (2,), "hidden_size": 32, "num_filters": 4}

# What a type needs to be built, or to be built small.
_FIELDS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "audio_config": {"codebook_dim": 32, "codebook_size": 8}, "vision_config": {"codebook_size": 8},
        "image_token_offset": 100, "audio_token_offset": 108,
    },
    "chameleon": _MAP,
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _MROPE["rope_parameters"]}}},
    "cosmos3_edge": {"text_config": _MROPE},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"] * (DEPTH // 2)},
        "vision_config": {"sam_config": {"global_attn_indexes": (1,), "hidden_size": 32}},
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2}},
    "dots3_note": {
        "text_config": _MLA, "audio_config": _ALL_HEADS, "vision_config": {"pyramid_num_routed": [-1] * DEPTH},
    },
    "emu3": _MAP,
    "ernie4_5_vl_moe": {
        "text_config": {**_rope(1, 1, 2), "moe_intermediate_size": [16, 16], "moe_num_experts": 4, "moe_k": 2},
    },
    "florence2": {
        "vision_config": {"embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4},
    },
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 32, "intermediate_size": 8}},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}},
    "glm46v": {"text_config": _MROPE},
    "glm4v": {"text_config": _MROPE},
    "glm4v_moe": {"text_config": {**_MROPE, "head_dim": 16}},
    "glm5_next": {
        "text_config": {
            **_MLA, "head_dim": 0, "qk_head_dim": 8, "qk_rope_head_dim": 0, "indexer_types": ["full"] * DEPTH,
        },
    },
    "glm_ocr": {"text_config": _HALF_ROTATED},
    "glmga": {"text_config": _HALF_ROTATED},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64}, "deepstack_layer_map": [[0, 1]], "downsample_rate": "1/2",
    },
    "granite_docling": {
        "text_config": {"embedding_multiplier": 1, "logits_scaling": 0.1},
        "vision_config": {"deepstack_visual_indexes": [0, 1]},
    },
    "hunyuan_vl": {"text_config": _MROPE},
    "hy_v4_vl": {"text_config": {**_MLA, **_MROPE, "indexer_types": ["full"] * DEPTH}},
    "idefics": {"cross_layer_interval": 2},
    "inkling2": {"text_config": {"unpadded_vocab_size": VOCAB}},
    "inkling2_loop": {"text_config": {"unpadded_vocab_size": VOCAB}},
    "inkling_mm_model": {"text_config": {"logits_mup_width_multiplier": 0.1}, "vision_config": {"n_layers": 4}},
    "kimi_k25": {"text_config": _MLA},
    "kyutai_speech_to_text": {"audio_pad_token_id": 5, "codec_config": {"upsample_groups": 32}},
    "mistral4": {**_MLA, "head_dim": 16},
    "mistral_large4": {"text_config": {**_MLA, "indexer_types": ["full"] * DEPTH}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}},
    "nemo_speechlm": {
        "text_config": _HYBRID,
        "audio_config": {
            "asr_config": _ALL_HEADS,
            "diarization_config": {"head_config": {"audio_hidden_size": 32}, "audio_config": _ALL_HEADS},
        },
        "word_timestamp_config": {**_ALL_HEADS, "blank_token_id": 3},
    },
    "nemotron_h_omni": {"text_config": _HYBRID, "vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": _MROPE},
    "qwen2_5_omni": {
        **_THINKER,
        "token2wav_config": {
            "bigvgan_config": {"upsample_initial_channel": 64},
            "dit_config": {"look_backward_layers": (0,), "look_ahead_layers": (1,), "emb_dim": 32},
        },
    },
    "qwen2_5_omni_thinker": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_vl": {"text_config": _MROPE},
    "qwen3_omni_moe": {
        **_THINKER,
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 16}},
    },
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _SOUND, "semantic_tokenizer_encoder_config": _SOUND},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    },
}  # fmt: skip

MULTIMODAL = {name: _FIELDS.get(name, {}) for name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}

# Types that cannot be built here, and why.
NOT_BUILT = dict.fromkeys(["fast_vlm", "gemma3n", "perception_lm"], "its vision tower is a model of the package timm")

# Types that are refused, with a pattern of the message.
UNMEASURED = {
    **dict.fromkeys(
        ["florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"],
        "is an encoder-decoder model",
    ),
    "diffusion_gemma": "a key-value cache although use_cache is False|in an encoder and in a decoder",
    "gemma4": "gives every layer its own columns of one embedding table",
    "glm5_next": "do not form one residual stream",
    "hy_v4_vl": "do not form one residual stream",
    "idefics": "could not be run on 7 tokens .*pixel_values",
    "inkling2": "lets its blocks read the outputs of earlier blocks",
    "inkling2_loop": "runs its blocks several times",
    "kyutai_speech_to_text": "could not be run on 7 tokens",
    "mistral_large4": "hands block 1 more than the residual stream",
    "mllama": "does not run all of its 6 blocks on text alone",
    "pi0": "does not give the number of layers",
    "voxtral_realtime": "could not be run on 7 tokens .*input_features",
}  # fmt: skip

# The class of which checkpoints are, where it is not the one that the auto class knows.
_SAVED_BY = {"shieldgemma2": "ShieldGemma2ForImageClassification"}


def multimodal_config(name: str) -> Any:
    """Return the config of a tiny model of one type."""
    config_class = CONFIG_MAPPING[name]
    # A copy: some config classes write into the dictionaries that they are given, and types share some.
    return config_class(**_merged(_shrunk(config_class()), copy.deepcopy(MULTIMODAL[name])))


def _shrunk(config: Any) -> dict[str, Any]:
    """Return the fields of a config that make it small, with those of its sections."""
    config_class = type(config)
    known = set(config.to_dict()) | set(config_class.attribute_map)
    fields = {key: value for key, value in _SMALL.items() if key in known}
    renamed = {key: config_class.attribute_map.get(key, key) for key in fields}
    fields = {key: value for key, value in fields.items() if renamed[key] == key or renamed[key] not in fields}
    for key, section in vars(config).items():
        if isinstance(section, PreTrainedConfig):
            fields[key] = _shrunk(section) | ({"model_type": section.model_type} if section.model_type else {})
    return fields


def _merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a dictionary with the changes of another, section by section."""
    merged = dict(fields)
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(merged.get(key), dict) and key.endswith("config")
        merged[key] = _merged(merged[key], value) if is_section else value
    return merged


def multimodal_model(name: str) -> PreTrainedModel:
    """Return a tiny model of one type, whole, in float32 and evaluation mode."""
    return copy.deepcopy(_build_once(name))


@cache
def _build_once(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    class_name = _SAVED_BY.get(name, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[name])
    model: PreTrainedModel = getattr(transformers, class_name)._from_config(multimodal_config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().float()


def measurable_model(path: Path) -> Any:
    """Return a checkpoint's model as `ls.load` does, after checking that swaps and drops of it can be measured.

    Raises:
        LayerSurgeryError: it is refused.
    """
    model = ls.load(path).model
    Measurer(model, variants("swap,drop", DEPTH))
    return model


def multimodal_checkpoint(path: Path, name: str) -> Path:
    """Save a tiny model of one type with a tokenizer, and return the directory."""
    _build_once(name).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
