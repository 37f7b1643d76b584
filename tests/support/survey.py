"""Survey every causal language model of the installed transformers: build it small, edit it, and compare.

Run `python -m tests.support.survey [TYPE ...]`. Each edit is made in memory and on disk. The result is compared with
a reference that uses nothing of the package's surgery (`tests/support/reference.py`): the model's own blocks, called
by hand in the new order. A skipped branch is compared with a copy of the model whose output projections, found by
their names in a table below, are zeros.
"""

from __future__ import annotations

import copy
import gc
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import layersurgery as ls
from layersurgery.models.block_list import find_block_list
from layersurgery.plans.plan import Plan
from tests.support.reference import logits_along, logits_of
from tests.support.unsupported import BLOCK_EDITS, SKIP_EDITS
from tests.support.zoo import DEPTH, SMALL, ZOO, tokens

EDITS = ["swap 0 1", *BLOCK_EDITS, *SKIP_EDITS]
# Above this number of parameters a model is not built: a field that sets its size is missing below.
_MOST = 7_000_000

# Fields that the small values do not cover, by model type.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_INDEXER: dict[str, Any] = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
_DECODER: dict[str, Any] = {
    "encoder_layers": DEPTH, "decoder_layers": DEPTH, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4,
}  # fmt: skip
_DOTS3 = {
    **_LATENT, "head_dim": 16, "shared_experts_intermediate_size": 16,
    **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
    **{f"swa_{name}": 8 for name in ("q_lora_rank", "kv_lora_rank", "v_head_dim")},
    **{f"swa_{name}": 8 for name in ("qk_nope_head_dim", "qk_rope_head_dim")},
    "swa_head_dim": 16,
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 128, "global_head_dim": 16,
    "num_kv_shared_layers": 0,
}  # fmt: skip
_INKLING: dict[str, Any] = {
    "unpadded_vocab_size": 128, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "d_rel": 4, "rel_extent": 8, "sliding_window_size": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 3,
}  # fmt: skip
_COMMON = {**_DECODER, **_LINEAR, **_INDEXER, "is_decoder": True, "n_shared_experts": 1}

FIELDS: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": {**_LATENT, "num_expert_group": 2, "layer_group_size": 3, "num_nextn_predict_layers": 0},
    "beam": {"n_group": 2, "topk_group": 1},
    "deepseek_v2": {**_LATENT, "n_group": None, "topk_group": None},
    "deepseek_v32": _LATENT,
    "dots3_note_text": _DOTS3,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * DEPTH},
        "audio_config": {"adapter_out_dim": 32, "adapter_input_size": 32, "downsample_hidden_size": 8},
    },
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "kimi_linear": {**_LATENT, "num_expert_group": 1},
    "longcat_flash": {**_LATENT, "zero_expert_num": 2},
    "minicpm3": _LATENT,
    "mllama": {"text_config": {"cross_attention_layers": [1, 4]}},
    "sarvam_mla": _LATENT,
    "youtu": _LATENT,
    "bart-unequal": {"encoder_layers": 8},
    "blt": {
        "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3], "patch_size": 4,
        "patching_mode": "static", "vocab_size": 260, "cross_attn_k": 1,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "cpmant": {"dim_head": 8, "dim_ff": 64, "vocab_size": 128},
    "deepseek_v4": {
        "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "num_key_value_heads": 1, "hc_mult": 2,
        "num_nextn_predict_layers": 0, "qk_rope_head_dim": 4,
        "layer_types": ["heavily_compressed_attention", "sliding_attention", "compressed_sparse_attention"] * 2,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 2,
        "laurel_rank": 8, "intermediate_size": 64, "activation_sparsity_pattern": [0.0] * DEPTH,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma4_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "git": {"vision_config": {"num_hidden_layers": 2, "image_size": 32}},
    "hy_v4": {**_LATENT, "num_key_value_heads": 4, "hc_mult": 2},
    "inkling_text": _INKLING,
    "inkling2_text": {**_INKLING, "n_layers_per_attn_res_block": 2},
    "inkling2_loop_text": {
        **_INKLING, "n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2, "loop_layer_index_end": 4,
        "loop_num_passes": 2, "loop_gate_rank": 4,
    },
    "lara_mini": {"layer_types": ["linear_attention", "sliding_attention", "full_attention"] * 2},
    "minimax_m3_vl_text": {"dense_intermediate_size": 64, "shared_intermediate_size": 16, "rotary_dim": 4},
    "phi4_multimodal": {"pad_token_id": 0},
    "prophetnet": {
        "num_encoder_layers": DEPTH, "num_decoder_layers": DEPTH, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "hc_count": 2, "hc_lowrank": 8, "ple_embed_dim": 32,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * DEPTH, "feed_forward_size": 64},
    "roc_bert": {
        "pronunciation_embed_dim": 8, "pronunciation_vocab_size": 128, "shape_embed_dim": 8, "shape_vocab_size": 128,
    },
    "xlnet": {"d_inner": 64, "d_head": 8, "attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "use_mamba_kernels": False, "mamba_dt_rank": 4, "mamba_d_state": 8, "attention_head_dim": 16,
        "attention_hidden_size": 64, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2,
    },
    "zamba2": {
        "use_mamba_kernels": False, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 4,
        "attention_head_dim": 16, "attention_hidden_size": 64, "adapter_rank": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """Record what one edit of one model type did.

    Attributes:
        type: the model type.
        plan: the edit.
        way: "memory" or "disk".
        result: "right", "refused", "wrong", or "error" for any other exception.
        detail: the reason.
    """

    type: str
    plan: str
    way: str
    result: str
    detail: str = ""


def small_config(name: str, config_class: Any = None, **overrides: Any) -> Any:
    """Return a small config of a model type, with small sections."""
    config_class = config_class or CONFIG_MAPPING[name]
    default = config_class()
    aliases = config_class.attribute_map
    known = set(default.to_dict()) | set(aliases)
    fields = {key: value for key, value in {**SMALL, **_COMMON}.items() if key in known}
    fields = {key: value for key, value in fields.items() if aliases.get(key, key) == key or aliases[key] not in fields}
    for key in getattr(config_class, "sub_configs", {}):
        section = getattr(default, key, None)
        if isinstance(section, PretrainedConfig):
            given = {**FIELDS.get(name, {}), **overrides}.get(key, {})
            fields[key] = small_config(section.model_type, type(section), **given)
    sections = getattr(config_class, "sub_configs", {})
    fields |= {key: value for key, value in {**FIELDS.get(name, {}), **overrides}.items() if key not in sections}
    return config_class(**fields)


def build(name: str) -> Any:
    """Return a small model of a type, in float32 and evaluation mode, without weights that are zero or one."""
    if name in ZOO:
        from tests.support.zoo import tiny_model

        return tiny_model(name)
    model_type = name if name in CONFIG_MAPPING else name.rpartition("-")[0]
    config = small_config(model_type, **FIELDS.get(name, {}))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST:
        raise ValueError(f"{size} parameters: a field that sets the size is missing")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as some classes do when they load (Youtu)
    return model.eval().float()


# The last projection of a token mixer and of an MLP, by the names that modelling files use.
_ATTENTION = r"attn|attention|mixer|mamba|conv|temporal_block|linear_attn|delta|recurrent"
_OUTPUT = r"o_proj|out_proj|c_proj|dense|wo|linear_out|output_linear|o|resid_proj"


def zeroed(model: Any, block: int, branch: str) -> Any | None:
    """Return a copy with zeros in the output projections of one branch, by name; None if no name is known."""
    edited = copy.deepcopy(model)
    module = find_block_list(edited, DEPTH).blocks[block]
    attention = re.compile(rf"^\w*({_ATTENTION})\w*\.(\w+\.)*({_OUTPUT})\.(weight|bias)$")
    mlp = re.compile(
        r"^(\w*(mlp|feed_forward|ffn|ff|moe|experts)\w*)\.(\w+\.)*"
        r"(down_proj|dense_4h_to_h|c_proj|fc2|w2|output_linear|fc_out|down_proj_bias|dense|proj_2|2)(\.(weight|bias))?$"
        r"|^fc2\.(weight|bias)$"
    )
    pattern = attention if branch == "skip-attention" else mlp
    found = [parameter for name, parameter in module.named_parameters() if pattern.search(name)]
    with torch.no_grad():
        for parameter in found:
            parameter.zero_()
    return edited if found else None


def reference(model: Any, plan: str, ids: torch.Tensor) -> torch.Tensor | None:
    """Return the logits of the edited model, computed without the package's surgery; None if no name is known."""
    verb, _, number = plan.partition(" ")
    if plan in SKIP_EDITS:
        edited = zeroed(model, int(number), verb)
        return None if edited is None else logits_of(edited, ids)
    return logits_along(model, Plan.parse(plan).route(DEPTH), ids)


def rebuilt(model: Any, plan: str) -> Any:
    """Return a model with the blocks in the new order, built from a config whose lists are permuted by hand.

    Blocks that pass results to others need this reference, since a recorded argument would be that of the old order.
    """
    order = Plan.parse(plan).route(DEPTH).blocks
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == DEPTH:
            vars(text)[name] = [value[block] for block in order]
        if name == "cross_attention_layers":
            vars(text)[name] = [position for position, block in enumerate(order) if block in value]
    text.num_hidden_layers = len(order)
    new = type(model)._from_config(config).eval().float()
    source, blocks = model.state_dict(), re.compile(r"(.*?\.)(\d+)(\..*)")
    state = {}
    for name in new.state_dict():
        match = blocks.fullmatch(name)
        state[name] = source[f"{match[1]}{order[int(match[2])]}{match[3]}" if match else name]
    new.load_state_dict(state)
    return new


def reload(path: Path, model_class: Any = AutoModelForCausalLM) -> Any:
    """Load a checkpoint as a user would, and require that each weight comes from the files."""
    model, info = model_class.from_pretrained(path, output_loading_info=True)
    missing = {key: value for key, value in info.items() if value}
    assert not missing, missing
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # mapped memory is not aligned, and kernels may round differently
    return model.eval().float()


def generates_alike(model: Any) -> bool | None:
    """Return whether greedy text with a cache is that of the model without one; None if it does not generate."""
    ids = tokens(2, 9)
    try:
        text = model.generate(
            ids, max_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    except Exception:
        return None
    cached = torch.stack(text.logits, 1)
    whole = logits_of(model, text.sequences)[:, ids.shape[1] - 1 : -1]
    return torch.allclose(cached.float(), whole.float(), atol=1e-3, rtol=1e-3)


def examine(name: str, edits: list[str] | None = None) -> Iterator[Case]:
    """Try every edit on one model type, in memory and on disk."""
    try:
        model = build(name)
        ids = tokens()
        logits = logits_of(model, ids)
    except Exception as error:
        yield Case(name, "", "", "not built", f"{type(error).__name__}: {error}"[:300])
        return
    alike = generates_alike(model)
    try:
        same = torch.equal(logits_along(model, Plan().route(DEPTH), ids), logits)
        note = "" if same else "the reference differs from the model on the identity"
    except Exception as error:
        note = f"no reference: {type(error).__name__}: {error}"[:200]
    passes_results = bool(note) or getattr(model.config, "indexer_types", None) is not None
    yield Case(name, "", "", "built", note)
    with TemporaryDirectory() as directory:
        source = Path(directory) / "source"
        model.save_pretrained(source)
        load_as: Any = AutoModelForCausalLM
        for load_as in (AutoModelForCausalLM, type(model)):
            try:
                if torch.equal(logits_of(reload(source, load_as), ids), logits):
                    break
                yield Case(name, "", "", "built", "the unedited model reloads as another")
            except Exception as error:
                yield Case(name, "", "", "built", f"the unedited model does not reload: {error}"[:300])
        for number, plan in enumerate(edits or EDITS):
            found: dict[str, torch.Tensor] = {}
            try:
                by_config = passes_results and plan not in SKIP_EDITS
                meant, no_reference = (
                    logits_of(rebuilt(model, plan), ids) if by_config else reference(model, plan, ids),
                    "",
                )
            except Exception as error:
                meant, no_reference = None, f"reference: {type(error).__name__}: {error}"[:300]
            for way in ("memory", "disk"):
                try:
                    if way == "memory":
                        with ls.operate(model, plan):
                            found[way] = logits_of(model, ids)
                            cached = generates_alike(model)
                        if not torch.equal(logits_of(model, ids), logits):
                            yield Case(name, plan, way, "wrong", "undo")
                    else:
                        ls.edit_checkpoint(source, plan, Path(directory) / str(number))
                        edited = reload(Path(directory) / str(number), load_as)
                        found[way] = logits_of(edited, ids)
                        cached = generates_alike(edited)
                        del edited
                except ls.UnsupportedEditError as error:
                    yield Case(name, plan, way, "refused", str(error))
                    continue
                except Exception as error:
                    yield Case(name, plan, way, "error", f"{type(error).__name__}: {error}"[:300])
                    continue
                if no_reference:
                    yield Case(name, plan, way, "error", no_reference)
                    continue
                other = found.get("memory")
                if meant is None and way == "memory":
                    yield Case(name, plan, way, "right", "unnamed")
                elif not torch.allclose(found[way], other if meant is None else meant, atol=2e-5, rtol=1e-4):  # type: ignore[arg-type]
                    error_size = (found[way] - (other if meant is None else meant)).abs().max().item()  # type: ignore[operator]
                    yield Case(name, plan, way, "wrong", f"logits off by {error_size:.2g}")
                elif alike and cached is False:
                    yield Case(name, plan, way, "wrong", "text with a cache differs from text without")
                elif alike and cached is None:
                    yield Case(name, plan, way, "wrong", "does not generate")
                elif torch.equal(found[way], logits) and not by_config:
                    # Only a layer that the model does not run without an image may go unnoticed.
                    yield Case(name, plan, way, "wrong", "changes nothing")
                else:
                    exact = torch.equal(found[way], other if meant is None else meant)  # type: ignore[arg-type]
                    yield Case(name, plan, way, "right", "" if exact else "up to rounding")
        gc.collect()


def types() -> list[str]:
    """Return every type of transformers with a causal language model, and the variants of the zoo."""
    return list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *ZOO]))


def main(names: list[str]) -> None:
    """Print the cases as lines of JSON."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    for name in names or types():
        for case in examine(name):
            print(json.dumps(asdict(case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
