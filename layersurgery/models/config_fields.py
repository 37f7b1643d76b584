"""Rewrite the per-layer fields of a config for a route. Plain dictionaries in and out; no torch.

config.json is edited as JSON: saving it again through a config class would lose keys that older readers need. The
tables below list the known fields; an unknown list with one value for each layer is refused, and the error gives its
name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SourceError, UnsupportedEditError
from ..plans.route import Route

Json = dict[str, Any]

DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config", "text_model_config")

# Words in names of modules and tensors that show that a list of layers is not the text decoder.
NOT_TEXT = re.compile(r"vision|visual|audio|image|video|speech|encoder|mtp|qformer|resampler|draft", re.IGNORECASE)

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
    ]
)
# These may have one entry for each layer only by accident.
_NOT_PER_LAYER = frozenset(
    ["architectures", "eos_token_id", "bos_token_id", "pad_token_id", "keys_to_ignore_at_inference"]
)
# Lists of layer numbers, in any order.
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
    ]
)
# Cycles of layer kinds, repeated over the depth.
_CYCLES = frozenset(("block_types",))
# Counts of layers of another kind at the start of the model.
_PREFIX_COUNTS = frozenset(("first_k_dense_replace", "num_dense_layers", "num_hash_layers"))
# Counts of layers of another kind at the end of the model.
_SUFFIX_COUNTS = frozenset(("num_kv_shared_layers",))
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
_EXTRA_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
_LAYER_NUMBER = re.compile(r"0|[1-9]\d*")


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
    for path, section in _sections(config, ()):
        names = [name for name in (depth_field, *DEPTH_FIELDS) if name and _is_count(section.get(name))]
        if names:
            depth = section[names[0]]
            fields = tuple(dict.fromkeys(name for name in names if section[name] == depth))
            extra = max((section[name] for name in _EXTRA_FIELDS if _is_count(section.get(name))), default=0)
            return DecoderSection(path, fields, depth, extra)
    raise SourceError(
        f"config.json has no number of layers: it has none of {', '.join(DEPTH_FIELDS)}. Check that this is the config "
        "of a language model"
    )


def _sections(config: Json, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Json]]:
    """List a config and its nested text sections, with their paths."""
    yield path, config
    for name in _TEXT_SECTIONS:
        if isinstance(config.get(name), dict):
            yield from _sections(config[name], (*path, name))


def _is_count(value: object) -> bool:
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


def rewrite(config: Json, section: DecoderSection, route: Route) -> Json:
    """Rewrite a config for a route: depth, lists, lists of layer numbers, counts and overrides of single layers.

    A number that describes all positions (`POSITIONAL_WITH_LIST`, `POSITIONAL_ONLY`) is not changed: only the config
    class can interpret it.

    Raises:
        UnsupportedEditError: a field that cannot describe the new order; gives its name.
    """
    config = copy.deepcopy(config)
    for _, fields in list(_sections(config, ())):
        # Some configs hold the decoder's fields twice, at the top and in their section.
        depth_fields = [key for key in section.depth_fields if fields.get(key) == section.depth]
        if depth_fields:
            fields.update(rewrite_fields(fields, section.depth, route))
            fields.update(dict.fromkeys(depth_fields, len(route)))
    return config


def rewrite_fields(fields: Json, depth: int, route: Route, *, reloaded: bool = True) -> Json:
    """Rewrite the fields of one section for a route, except the depth itself.

    Args:
        fields: the section.
        depth: number of blocks.
        route: the new order of blocks.
        reloaded: whether a model will be built from the result. Otherwise a field that only a constructor reads is
            left unchanged if it cannot describe the new order.

    Raises:
        UnsupportedEditError: a field that cannot describe the new order; gives its name.
    """
    if route.blocks == tuple(range(depth)):
        return dict(fields)
    rewritten = {key: _rewrite_value(key, value, depth, route) for key, value in fields.items()}
    _rewrite_counts(rewritten, depth, route, reloaded)
    return rewritten


def is_layerwise(key: str, value: Any, depth: int) -> bool:
    """Check whether a list or string holds one value for each layer, or layer numbers."""
    if not isinstance(value, list | str) or key in _NOT_PER_LAYER:
        return False
    if key in INDEX_LISTS:
        return isinstance(value, list)
    return len(value) == depth and (isinstance(value, list) or key in LISTS)


def _rewrite_value(key: str, value: Any, depth: int, route: Route) -> Any:
    """Return the value of one field for the new order of blocks."""
    order = route.blocks
    if isinstance(value, list) and value:
        if key in _CYCLES:
            kinds = [value[block % len(value)] for block in range(depth)]
            new = [kinds[block] for block in order]
            return value if all(kind == value[position % len(value)] for position, kind in enumerate(new)) else new
        if key in INDEX_LISTS or value == list(range(depth)):
            if not all(type(item) is int and 0 <= item < depth for item in value):
                raise UnsupportedEditError(
                    f"config.json: {key!r} should hold layer numbers below {depth}, but holds {value!r}"
                )
            return [position for position, block in enumerate(order) if block in value]
        if len(value) == depth and key not in _NOT_PER_LAYER:
            new = [value[block] for block in order]
            if key not in LISTS and new != value:
                raise UnsupportedEditError(
                    f"config.json: {key!r} is a list of {depth} values for {depth} layers, and its meaning is unknown; "
                    "if it has one value per layer, ask us to add it, and edit a copy without the field until then"
                )
            return new
        if key in LISTS and len(value) > depth:  # the values after these belong to prediction heads
            return [value[block] for block in order] + value[depth:]
        if key in LISTS and any(item != value[0] for item in value):
            raise UnsupportedEditError(
                f"config.json: {key!r} has {len(value)} values for {depth} layers, so it is unclear which layers they "
                "belong to"
            )
    if isinstance(value, str) and key in LISTS and len(value) == depth:
        return "".join(value[block] for block in order)
    if isinstance(value, dict) and value and key != "id2label" and all(_LAYER_NUMBER.fullmatch(str(k)) for k in value):
        if all(int(k) < depth for k in value):
            values = {int(k): item for k, item in value.items()}
            kind = type(next(iter(value)))  # text in JSON, a number in a config object
            return {kind(position): values[block] for position, block in enumerate(order) if block in values}
    if key in _SUFFIX_COUNTS and value:
        return _rewrite_suffix_count(key, value, depth, order)
    return value


def _rewrite_counts(fields: Json, depth: int, route: Route, reloaded: bool) -> None:
    """Rewrite, in place, the counts and intervals that describe the first layers or every n-th layer."""
    for key in _PREFIX_COUNTS & fields.keys():
        count = fields[key]
        if not _is_count(count):
            continue
        in_prefix = [block < count for block in route.blocks]
        if sorted(in_prefix, reverse=True) == in_prefix:
            fields[key] = sum(in_prefix)
        elif reloaded and not isinstance(fields.get("mlp_layer_types"), list):
            raise UnsupportedEditError(
                f"config.json: {key} = {count} means that the first {count} layers are of another kind, and {route} "
                "would put one of them after a layer of the other kind, which the field cannot describe"
            )
    _rewrite_interval(fields, route)
    _rewrite_cycle(fields, depth, route)
    if reloaded and fields.get("scale_attn_by_inverse_layer_idx") and route.blocks != tuple(range(len(route))):
        # Old versions of transformers do this at run time, so a comparison of the built models cannot detect it.
        raise UnsupportedEditError(
            "config.json: scale_attn_by_inverse_layer_idx scales the attention of each layer by its position, so a "
            "block that moves would compute something else"
        )
    step = fields.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1:
        # mlp_only_layers has been remapped already; add the layers that the step leaves dense.
        dense = {position for position, block in enumerate(route.blocks) if (block + 1) % step}
        fields["mlp_only_layers"] = sorted(dense.union(fields.get("mlp_only_layers") or []))
        fields["decoder_sparse_step"] = 1


def _rewrite_interval(fields: Json, route: Route) -> None:
    """Rewrite the first and last layer of an interval in which all layers are of one kind (ERNIE's mixtures)."""
    start, end = (fields.get(f"moe_layer_{name}_index") for name in ("start", "end"))
    if not isinstance(start, int) or not isinstance(end, int) or fields.get("moe_layer_interval", 1) != 1:
        return
    inside = [position for position, block in enumerate(route.blocks) if block >= start and (end < 0 or block <= end)]
    if inside and inside == list(range(inside[0], inside[-1] + 1)):
        fields["moe_layer_start_index"] = inside[0]
        fields["moe_layer_end_index"] = end if end < 0 and inside[-1] == len(route) - 1 else inside[-1]
    # Otherwise the reload check reports which block would be built as another kind.


def _rewrite_cycle(fields: Json, depth: int, route: Route) -> None:
    """Rewrite GPT-Neo's list of kinds: [[["global", "local"], 12]] repeats that pair twelve times."""
    cycles = fields.get("attention_types")
    if not isinstance(cycles, list) or not all(isinstance(cycle, list) and len(cycle) == 2 for cycle in cycles):
        return
    kinds = [kind for pattern, times in cycles for kind in list(pattern) * int(times)]
    if len(kinds) == depth and route.blocks != tuple(range(depth)):
        fields["attention_types"] = [[[kinds[block] for block in route.blocks], 1]]


def _rewrite_suffix_count(key: str, count: int, depth: int, order: Sequence[int]) -> int:
    # Layers that share the keys of an earlier layer find it by its position, so no block before them may move.
    """Return the number of layers of another kind at the end of the edited model."""
    if tuple(order[: depth - count]) != tuple(range(depth - count)) or any(
        block < depth - count for block in order[depth - count :]
    ):
        raise UnsupportedEditError(
            f"config.json: {key} = {count} ties the last {count} layers to keys and values of earlier layers by "
            f"position; only edits within the last {count} layers preserve that"
        )
    return len(order) - (depth - count)


def non_default_fields(fields: Json, table: Mapping[str, object]) -> list[str]:
    """List the fields of `table` with a value that makes layers differ."""
    return [
        key
        for key, default in table.items()
        if fields.get(key) not in (None, default) and not isinstance(fields[key], list)
    ]
