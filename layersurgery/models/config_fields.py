"""List the fields of a config that describe single layers, and find the section of the text decoder. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SourceError
from ..plans.route import Route

Json = dict[str, Any]

DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")  # the last is xLSTM's
# Names of the depths of a decoder and of an encoder. Where the decoder was taken out of an encoder-decoder (BART),
# its config has both, num_hidden_layers is that of the encoder, and no encoder is built.
_DECODER_AND_ENCODER = (("decoder_layers", "encoder_layers"), ("num_decoder_layers", "num_encoder_layers"))
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config", "text_model_config")

# Words in names of modules and tensors that show that a list of layers is not the text decoder.
NOT_TEXT = re.compile(
    r"vision|visual|\bvit\b|\bsam_model|audio|image|video|speech|talker|2wav|encoder|codec|mtp|qformer|resampler|"
    r"projector|draft",
    re.IGNORECASE,
)
_NOT_TEXT_BUT_ENCODER = re.compile(NOT_TEXT.pattern.replace("|encoder|", "|"), re.IGNORECASE)
# An encoder in such a module is the text decoder's own name for its layers.
_LANGUAGE_MODEL = re.compile(r"\b(language|text)_(model|decoder)\b", re.IGNORECASE)

# One value per layer.
LISTS = frozenset(
    [
        "layer_types",
        "mlp_layer_types",
        "layers_block_type",
        "indexer_types",
        "no_rope_layers",
        "attention_layers",
        "block_configs",
        "intermediate_size",
        "intermediate_sizes",
        "ffn_multipliers",
        "num_query_heads",
        "num_kv_heads",
        "num_key_value_heads",
        "num_attention_heads",
        "num_attention_heads_per_layer",
        "num_key_value_heads_per_layer",
        "activation_sparsity_pattern",
        "layer_rope_theta",
        "compress_ratios",
        "moe_layer_freq",
        "hybrid_override_pattern",
        "sparse_attention_freq",
    ]
)
# These may have one entry for each layer only by accident.
NOT_PER_LAYER = frozenset(
    [
        "architectures",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "keys_to_ignore_at_inference",
        "long_factor",
        "short_factor",
        "mrope_section",
    ]
)
# Dictionaries that do not describe single layers, or that are edited elsewhere.
_NOT_LAYERS = frozenset(
    ["quantization_config", "compression_config", "quantization", "auto_map", "id2label", "label2id"]
)
# Lists of layer numbers, in any order; some are written as text, "1,3,5".
INDEX_LISTS = frozenset(
    [
        "mlp_only_layers",
        "moe_layers",
        "attn_layer_indices",
        "attn_layer_idx",
        "cross_attention_layers",
        "full_attention_layers",
        "full_attn_idxs",
        "global_attn_idx",
        "hybrid_layer_ids",
        "layer_ids",
        "moe_layer_indices",
        "dense_layers",
        "kv_reuse_group",
        "moe_layers_enum",
        "rope_scaling_layers",
    ]
)
# For each layer, the number of the layer whose keys it uses.
SOURCE_LISTS = frozenset(("kv_source_layers",))
# Lists of layer numbers that begin at 1 (Kimi-Linear).
ONE_BASED_LISTS = frozenset(("full_attn_layers", "kda_layers"))
# Cycles of layer kinds, repeated over the depth.
CYCLES = frozenset(("block_types",))
# Counts of layers of another kind at the start of the model.
PREFIX_COUNTS = frozenset(("first_k_dense_replace", "num_dense_layers", "num_hash_layers"))
# The list that many config classes derive from such a count, and accept in its place.
PREFIX_LIST = "mlp_layer_types"
# Counts of layers of another kind at the end of the model.
SUFFIX_COUNTS = frozenset(("num_kv_shared_layers",))
# Numbers from which a config class derives the kind of each position, and the value for which all positions are the
# same. For POSITIONAL_WITH_LIST the class derives a list, and accepts that list from the config instead; for
# POSITIONAL_ONLY there is no such list.
POSITIONAL_WITH_LIST: Mapping[str, object] = {
    "sliding_window_pattern": 1,
    "_sliding_window_pattern": 1,
    "max_window_layers": 0,
    "full_attention_interval": 1,
    "no_rope_layer_interval": 0,
    "global_attn_every_n_layers": 1,
}
# Model types whose classes treat all layers alike, so that config.json describes each layer completely.
IDENTICAL_LAYER_TYPES = frozenset(
    [
        "bloom",
        "codegen",
        "cohere",
        "falcon",
        "gemma",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gptj",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "mpt",
        "olmo",
        "olmo2",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "stablelm",
        "starcoder2",
    ]
)
POSITIONAL_ONLY: Mapping[str, object] = {
    "attn_layer_offset": 0,
    "attn_layer_period": 1,
    "cross_attention_frequency": 1,
    "decoder_sparse_step": 1,
    "expert_layer_offset": 0,
    "expert_layer_period": 1,
    "interleave_moe_layer_step": 1,
    "moe_every_n_layers": 1,
    "moe_layer_freq": 1,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 0,
}
EXTRA_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


@dataclass(frozen=True, slots=True)
class DecoderSection:
    """The part of config.json that describes the text decoder.

    Attributes:
        path: the keys that lead to the section; empty for a plain language model.
        depth_fields: the keys that hold the number of blocks.
        depth: number of blocks.
        extra_blocks: number of blocks after the decoder's own, which it does not run.
    """

    path: tuple[str, ...]
    depth_fields: tuple[str, ...]
    depth: int
    extra_blocks: int

    def get_fields(self, config: Json) -> Json:
        """Return the section of a config."""
        for key in self.path:
            config = config[key]
        return config


def find_section(config: Json, depth_field: str | None = None) -> DecoderSection:
    """Find the decoder's section and depth.

    Args:
        config: the parsed config.json.
        depth_field: name of the depth field, if it is not one of the usual names.

    Raises:
        SourceError: no field gives the number of layers.
    """
    for path, section in sections(config, ()):
        candidates = (depth_field, *_lone_decoder_fields(section), *DEPTH_FIELDS)
        names = [name for name in candidates if name and is_count(section.get(name))]
        if names:
            depth = section[names[0]]
            fields = tuple(dict.fromkeys(name for name in names if section[name] == depth))
            extra = max((section[name] for name in EXTRA_FIELDS if is_count(section.get(name))), default=0)
            return DecoderSection(path, fields, depth, extra)
    raise SourceError(
        f"config.json has no number of layers: it has none of {', '.join(DEPTH_FIELDS)}. Check that this is the config "
        "of a language model"
    )


def _lone_decoder_fields(section: Json) -> tuple[str, ...]:
    """Return the names of the depths of a decoder without its encoder: its own, and the one that the encoder had."""
    if section.get("is_encoder_decoder") is not False:
        return ()
    return next((names for names in _DECODER_AND_ENCODER if all(is_count(section.get(name)) for name in names)), ())


def depth_field(config: Any) -> str:
    """Return the name of the attribute with the number of decoder blocks of a config object.

    Args:
        config: the config of a text decoder, not of an encoder-decoder.
    """
    for decoder, encoder in _DECODER_AND_ENCODER:
        if hasattr(config, decoder) and hasattr(config, encoder):
            return decoder
    return str(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))


def sections(config: Json, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Json]]:
    """List a config and its nested text sections, with their paths."""
    yield path, config
    for name in _TEXT_SECTIONS:
        if isinstance(config.get(name), dict):
            yield from sections(config[name], (*path, name))


def text_paths(paths: Iterable[str]) -> list[str]:
    """Return the paths of lists of layers that can be the text decoder, by their names; empty if none can."""
    paths = [path for path in paths if not _NOT_TEXT_BUT_ENCODER.search(path)]
    # Some text decoders are called encoders (BLIP, GIT), so that the others may be all that tells them apart.
    return [path for path in paths if not NOT_TEXT.search(path) or _LANGUAGE_MODEL.search(path)] or paths


def is_subsection(key: str, value: object) -> bool:
    """Check whether a field is a dictionary that may hold further per-layer fields of the decoder."""
    return (
        isinstance(value, dict)
        and not (key in _NOT_LAYERS or key in _TEXT_SECTIONS or NOT_TEXT.search(key))
        and not any(name in value for name in DEPTH_FIELDS)
        and not all(str(name).isdigit() for name in value)
    )


def is_count(value: object) -> bool:
    """Check whether a value is a positive whole number."""
    return type(value) is int and value > 0


def new_positions(route: Route, section: DecoderSection) -> dict[int, list[int]]:
    """Return the new positions of each block that is kept; the extra blocks stay after the decoder's own."""
    positions: dict[int, list[int]] = {}
    for position, block in enumerate(route.blocks):
        positions.setdefault(block, []).append(position)
    for number in range(section.extra_blocks):
        positions[section.depth + number] = [len(route) + number]
    return positions


def is_layerwise(key: str, value: Any, depth: int) -> bool:
    """Check whether a list or string holds one value for each layer, or layer numbers."""
    if not isinstance(value, list | str) or key in NOT_PER_LAYER:
        return False
    if key in INDEX_LISTS:
        return isinstance(value, list)
    return len(value) == depth and (isinstance(value, list) or key in LISTS)


def non_default_fields(fields: Json, table: Mapping[str, object]) -> list[str]:
    """List the fields of `table` with a value that makes layers differ."""
    return [
        key
        for key, default in table.items()
        if fields.get(key) not in (None, default) and not isinstance(fields[key], list)
    ]
