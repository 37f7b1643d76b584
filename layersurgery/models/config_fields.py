"""Config fields that speak of single layers, rewritten along a route. Plain dictionaries in and out; no torch.

config.json is edited as the JSON it is: re-saving it through a config class loses keys that older readers need. What is
known about a field is said in the tables below; an unknown list that is as long as the model is deep is refused by name.
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
# As long as the model is deep by accident only.
_NOT_PER_LAYER = frozenset(
    ["architectures", "eos_token_id", "bos_token_id", "pad_token_id", "keys_to_ignore_at_inference"]
)
# Numbers of layers, in any order.
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
# Kinds of layers, repeated over the depth.
_CYCLES = frozenset(("block_types",))
# The first so many layers are of another kind.
_PREFIX_COUNTS = frozenset(("first_k_dense_replace", "num_dense_layers", "num_hash_layers"))
# The last so many layers are of another kind.
_SUFFIX_COUNTS = frozenset(("num_kv_shared_layers",))
# One number from which a class works out what each position is, and the value at which all positions are alike. From the
# first kind it makes a list, and takes that list from the config instead; nothing can be said instead of the second kind.
POSITIONAL_WITH_LIST: Mapping[str, object] = {
    "sliding_window_pattern": 1,
    "_sliding_window_pattern": 1,
    "max_window_layers": 0,
    "full_attention_interval": 1,
    "no_rope_layer_interval": 0,
    "global_attn_every_n_layers": 1,
}
# Types whose layers are all alike by their class, so that what config.json says is all there is to say.
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
        path: the keys that lead to it; empty for a plain language model.
        depth_fields: the keys that hold the number of blocks.
        depth: that number.
        extra: blocks behind the decoder's own that it does not run.
    """

    path: tuple[str, ...]
    depth_fields: tuple[str, ...]
    depth: int
    extra: int

    def of(self, config: Json) -> Json:
        """The section within a config."""
        for key in self.path:
            config = config[key]
        return config


def find_section(config: Json, depth_field: str | None = None) -> DecoderSection:
    """Find the decoder's section and depth.

    Args:
        config: the parsed config.json.
        depth_field: the name of the depth field, where the usual names are not enough.

    Raises:
        SourceError: no field that gives the number of layers.
    """
    for path, section in _sections(config, ()):
        names = [name for name in (depth_field, *DEPTH_FIELDS) if name and _count(section.get(name))]
        if names:
            depth = section[names[0]]
            fields = tuple(dict.fromkeys(name for name in names if section[name] == depth))
            extra = max((section[name] for name in _EXTRA_FIELDS if _count(section.get(name))), default=0)
            return DecoderSection(path, fields, depth, extra)
    raise SourceError(
        f"config.json has no number of layers: none of {', '.join(DEPTH_FIELDS)} is there. Is it the config of a language model?"
    )


def _sections(config: Json, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Json]]:
    yield path, config
    for name in _TEXT_SECTIONS:
        if isinstance(config.get(name), dict):
            yield from _sections(config[name], (*path, name))


def _count(value: object) -> bool:
    return type(value) is int and value > 0


def new_positions(route: Route, section: DecoderSection) -> dict[int, list[int]]:
    """New positions of each block kept; blocks behind the decoder's own stay behind it."""
    found: dict[int, list[int]] = {}
    for place, block in enumerate(route.blocks):
        found.setdefault(block, []).append(place)
    for number in range(section.extra):
        found[section.depth + number] = [len(route) + number]
    return found


def rewrite(config: Json, section: DecoderSection, route: Route) -> Json:
    """The config of the edited model: depth, lists, index lists, counts and overrides of single layers.

    What one number says for all positions (`DERIVED`, `BARE`) is left as it is: only the config class knows what it reads from it.

    Raises:
        UnsupportedEditError: a field that cannot say the new order, by name.
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
    """The same for one section's fields, the depth itself apart.

    Args:
        fields: the section.
        depth: number of blocks.
        route: their new order.
        reloaded: whether a model is to be built from the result. What only a constructor reads is otherwise left as it is where
            it cannot say the new order.

    Raises:
        UnsupportedEditError: a field that cannot say the new order, by name.
    """
    if route.blocks == tuple(range(depth)):
        return dict(fields)
    rewritten = {key: _rewritten(key, value, depth, route) for key, value in fields.items()}
    _rewrite_counts(rewritten, depth, route, reloaded)
    return rewritten


def is_layerwise(key: str, value: Any, depth: int) -> bool:
    """Whether a list or string speaks of single layers."""
    if not isinstance(value, list | str) or key in _NOT_PER_LAYER:
        return False
    if key in INDEX_LISTS:
        return isinstance(value, list)
    return len(value) == depth and (isinstance(value, list) or key in LISTS)


def _rewritten(key: str, value: Any, depth: int, route: Route) -> Any:
    order = route.blocks
    if isinstance(value, list) and value:
        if key in _CYCLES:
            kinds = [value[block % len(value)] for block in range(depth)]
            new = [kinds[block] for block in order]
            return value if all(kind == value[place % len(value)] for place, kind in enumerate(new)) else new
        if key in INDEX_LISTS or value == list(range(depth)):
            if not all(type(item) is int and 0 <= item < depth for item in value):
                raise UnsupportedEditError(
                    f"config.json: {key!r} should hold layer numbers below {depth}, and holds {value!r}"
                )
            return [place for place, block in enumerate(order) if block in value]
        if len(value) == depth and key not in _NOT_PER_LAYER:
            new = [value[block] for block in order]
            if key not in LISTS and new != value:
                raise UnsupportedEditError(
                    f"config.json: {key!r} is a list of {depth} values for {depth} layers, and what it means is not known; "
                    "if it has one value per layer, ask for it to be added, and edit a copy without the field until then"
                )
            return new
        if key in LISTS and len(value) > depth:  # what follows belongs to prediction heads
            return [value[block] for block in order] + value[depth:]
        if key in LISTS and any(item != value[0] for item in value):
            raise UnsupportedEditError(
                f"config.json: {key!r} has {len(value)} values for {depth} layers, so it is not clear whose they are"
            )
    if isinstance(value, str) and key in LISTS and len(value) == depth:
        return "".join(value[block] for block in order)
    if isinstance(value, dict) and value and key != "id2label" and all(_LAYER_NUMBER.fullmatch(str(k)) for k in value):
        if all(int(k) < depth for k in value):
            given = {int(k): item for k, item in value.items()}
            kind = type(next(iter(value)))  # text in JSON, a number in a config object
            return {kind(place): given[block] for place, block in enumerate(order) if block in given}
    if key in _SUFFIX_COUNTS and value:
        return _suffix_count(key, value, depth, order)
    return value


def _rewrite_counts(fields: Json, depth: int, route: Route, reloaded: bool) -> None:
    """Prefix counts, and the one step that an index list beside it can stand in for."""
    for key in _PREFIX_COUNTS & fields.keys():
        count = fields[key]
        if not _count(count):
            continue
        kept = [block < count for block in route.blocks]
        if sorted(kept, reverse=True) == kept:
            fields[key] = sum(kept)
        elif reloaded and not isinstance(fields.get("mlp_layer_types"), list):
            raise UnsupportedEditError(
                f"config.json: {key} = {count} says that the first {count} layers are of another kind, and {route} would set "
                "one of them behind a layer of the other kind, which the field cannot say"
            )
    _rewrite_interval(fields, route)
    _rewrite_cycle(fields, depth, route)
    if reloaded and fields.get("scale_attn_by_inverse_layer_idx") and route.blocks != tuple(range(len(route))):
        # Old versions of transformers do this while the model runs, where no comparison of models sees it.
        raise UnsupportedEditError(
            "config.json: scale_attn_by_inverse_layer_idx scales the attention of each layer by its position, so a block that "
            "moves would compute something else"
        )
    step = fields.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1:
        # mlp_only_layers was remapped already; the layers that the step leaves dense join it.
        dense = {place for place, block in enumerate(route.blocks) if (block + 1) % step}
        fields["mlp_only_layers"] = sorted(dense.union(fields.get("mlp_only_layers") or []))
        fields["decoder_sparse_step"] = 1


def _rewrite_interval(fields: Json, route: Route) -> None:
    """The first and the last layer of a kind that every layer between them is of (ERNIE's mixtures)."""
    start, end = (fields.get(f"moe_layer_{name}_index") for name in ("start", "end"))
    if not isinstance(start, int) or not isinstance(end, int) or fields.get("moe_layer_interval", 1) != 1:
        return
    inside = [place for place, block in enumerate(route.blocks) if block >= start and (end < 0 or block <= end)]
    if inside and inside == list(range(inside[0], inside[-1] + 1)):
        fields["moe_layer_start_index"] = inside[0]
        fields["moe_layer_end_index"] = end if end < 0 and inside[-1] == len(route) - 1 else inside[-1]
    # Otherwise the reload check says which block would come back as another kind.


def _rewrite_cycle(fields: Json, depth: int, route: Route) -> None:
    """GPT-Neo's way of writing one kind per layer: [[["global", "local"], 12]] is that pair, twelve times."""
    cycles = fields.get("attention_types")
    if not isinstance(cycles, list) or not all(isinstance(cycle, list) and len(cycle) == 2 for cycle in cycles):
        return
    kinds = [kind for pattern, times in cycles for kind in list(pattern) * int(times)]
    if len(kinds) == depth and route.blocks != tuple(range(depth)):
        fields["attention_types"] = [[[kinds[block] for block in route.blocks], 1]]


def _suffix_count(key: str, count: int, depth: int, order: Sequence[int]) -> int:
    # Layers that share the keys of an earlier layer find it by position, so nothing up to them may move.
    if tuple(order[: depth - count]) != tuple(range(depth - count)) or any(
        block < depth - count for block in order[depth - count :]
    ):
        raise UnsupportedEditError(
            f"config.json: {key} = {count} ties the last {count} layers to keys and values of earlier ones, by position; only "
            f"edits within the last {count} layers keep that"
        )
    return len(order) - (depth - count)


def non_default_fields(fields: Json, table: Mapping[str, object]) -> list[str]:
    """The fields of `table` that say more than "all layers alike"."""
    return [
        key
        for key, alike in table.items()
        if fields.get(key) not in (None, alike) and not isinstance(fields[key], list)
    ]
