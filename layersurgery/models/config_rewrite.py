"""Rewrite the per-layer fields of a config for a route. Plain dictionaries in and out; no torch.

config.json is edited as JSON: saving it again through a config class would lose keys that older readers need. An
unknown list with one value for each layer, or an unknown number that counts layers, is refused, and the error gives its
name.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

from ..errors import UnsupportedEditError
from ..plans.route import Route
from .block_dependencies import rewrite_sources
from .config_fields import (
    CYCLES,
    DEPTH_FIELDS,
    EXTRA_FIELDS,
    INDEX_LISTS,
    LISTS,
    NOT_PER_LAYER,
    NOT_TEXT,
    ONE_BASED_LISTS,
    POSITIONAL_ONLY,
    POSITIONAL_WITH_LIST,
    PREFIX_COUNTS,
    PREFIX_LIST,
    SOURCE_LISTS,
    SUFFIX_COUNTS,
    DecoderSection,
    Json,
    is_count,
    is_subsection,
    sections,
)
from .config_periods import PERIODS, follow_periods

_LAYER_NUMBER = re.compile(r"0|[1-9]\d*")
_NUMBERS_AS_TEXT = re.compile(r"\d+(, *\d+)*")
_NAMES_LAYERS = re.compile(r"layer|idx|indices|indexes", re.IGNORECASE)
# Names of numbers that count layers from one end of the model, or name one of them: n_input_layers, layers_in_coda.
_COUNTS_LAYERS = re.compile(r"(^|_)layers(_in_\w+)?$|(^|_)layer_(index|idx)(_|$)", re.IGNORECASE)
_OTHER_LAYERS = re.compile(f"{NOT_TEXT.pattern}|decoder|connector|adapter", re.IGNORECASE)
_KNOWN_COUNTS = frozenset(
    (*DEPTH_FIELDS, *EXTRA_FIELDS, *PREFIX_COUNTS, *SUFFIX_COUNTS, *POSITIONAL_WITH_LIST, *POSITIONAL_ONLY, *PERIODS)
)


def rewrite(config: Json, section: DecoderSection, route: Route) -> Json:
    """Rewrite a config for a route: depth, lists, lists of layer numbers, counts and overrides of single layers.

    A number that describes all positions (`POSITIONAL_WITH_LIST`, `POSITIONAL_ONLY`) is not changed where there is no
    list next to it: only the config class can interpret it.

    Raises:
        UnsupportedEditError: a field that cannot describe the new order; gives its name.
    """
    config = copy.deepcopy(config)
    for _, fields in list(sections(config, ())):
        # Some configs hold the decoder's fields twice, at the top and in their section.
        depth_fields = [key for key in section.depth_fields if fields.get(key) == section.depth]
        if depth_fields:
            others = {key: value for key, value in fields.items() if key not in depth_fields}
            rewritten = rewrite_fields(others, section.depth, route) | dict.fromkeys(depth_fields, len(route))
            order = [key for key in fields if key in rewritten]
            fields.clear()
            fields.update({key: rewritten[key] for key in (*order, *rewritten)})
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
    rewritten = {
        key: rewrite_fields(value, depth, route, reloaded=reloaded)
        if is_subsection(key, value)
        else _rewrite_value(key, value, depth, route)
        for key, value in fields.items()
    }
    _rewrite_counts(rewritten, depth, route, reloaded)
    return follow_periods(rewritten, len(route))


def _rewrite_value(key: str, value: Any, depth: int, route: Route) -> Any:
    """Return the value of one field for the new order of blocks."""
    order = route.blocks
    if isinstance(value, list) and value:
        if key in CYCLES:
            kinds = [value[block % len(value)] for block in range(depth)]
            new = [kinds[block] for block in order]
            return value if all(kind == value[position % len(value)] for position, kind in enumerate(new)) else new
        if key in SOURCE_LISTS and len(value) == depth:
            return rewrite_sources(value, order)
        first = int(key in ONE_BASED_LISTS)
        if first or key in INDEX_LISTS or value == list(range(depth)):
            if not _are_layer_numbers(value, first, depth):
                raise UnsupportedEditError(
                    f"config.json: {key!r} should hold layer numbers from {first} to {depth - 1 + first}, but holds "
                    f"{value!r}"
                )
            return _renumber(value, first, order)
        if len(value) == depth and key not in NOT_PER_LAYER:
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
        _refuse_unknown_numbers(key, value, depth, order)
    if isinstance(value, str) and key in INDEX_LISTS and _NUMBERS_AS_TEXT.fullmatch(value):
        return ",".join(map(str, _rewrite_value(key, [int(item) for item in value.split(",")], depth, route)))
    if isinstance(value, str) and key in LISTS and len(value) == depth:
        return "".join(value[block] for block in order)
    if isinstance(value, dict) and value and key != "id2label" and all(_LAYER_NUMBER.fullmatch(str(k)) for k in value):
        if all(int(k) < depth for k in value):
            values = {int(k): item for k, item in value.items()}
            kind = type(next(iter(value)))  # text in JSON, a number in a config object
            return {kind(position): values[block] for position, block in enumerate(order) if block in values}
    if key in SUFFIX_COUNTS and value:
        return _rewrite_suffix_count(key, value, depth, order)
    return value


def _are_layer_numbers(values: list[Any], first: int, depth: int) -> bool:
    return all(type(item) is int and first <= item < depth + first for item in values)


def _renumber(numbers: Sequence[int], first: int, order: Sequence[int]) -> list[int]:
    """Return the new numbers, which begin at `first`, of the layers that a list names."""
    return [position + first for position, block in enumerate(order) if block + first in numbers]


def _refuse_unknown_numbers(key: str, value: list[Any], depth: int, order: Sequence[int]) -> None:
    """Refuse a list that seems to hold numbers of layers that move, since it may count from 0 or from 1."""
    if key in LISTS or not _NAMES_LAYERS.search(key) or NOT_TEXT.search(key):
        return
    for first in (0, 1):
        if _are_layer_numbers(value, first, depth) and len(set(value)) == len(value):
            if _renumber(value, first, order) != sorted(value):
                raise UnsupportedEditError(
                    f"config.json: {key!r} seems to hold layer numbers, {value!r}, but its meaning is unknown; ask us "
                    "to add it, and edit a copy without the field until then"
                )


def _refuse_unknown_counts(fields: Json, depth: int) -> None:
    """Refuse a number that seems to count or name layers, since it would then mean other layers.

    Looped models give in this way the layers that they run several times. In memory, a forward shows that.
    """
    for key, value in fields.items():
        if key in _KNOWN_COUNTS or not _COUNTS_LAYERS.search(key) or _OTHER_LAYERS.search(key):
            continue
        if is_count(value) and value <= depth:
            raise UnsupportedEditError(
                f"config.json: {key} = {value} seems to count or name layers of {depth}, but its meaning is unknown; "
                "ask us to add it, or, if the model does not read it, edit a copy without the field"
            )


def _rewrite_counts(fields: Json, depth: int, route: Route, reloaded: bool) -> None:
    """Rewrite, in place, the counts and intervals that describe the first layers or every n-th layer."""
    if reloaded:
        _refuse_unknown_counts(fields, depth)
    for key in PREFIX_COUNTS & fields.keys():
        count = fields[key]
        if not is_count(count):
            continue
        if not _breaks_prefix(count, route):
            fields[key] = sum(block < count for block in route.blocks)
        elif isinstance(fields.get(PREFIX_LIST), list):
            del fields[key]  # transformers reads the list; other programs would read a number that contradicts it
        elif reloaded:
            raise UnsupportedEditError(
                f"config.json: {key} = {count} means that the first {count} layers are of another kind, and {route} "
                "would put one of them after a layer of the other kind, which the field cannot describe"
            )
    scale = fields.get("scale_depth")
    if isinstance(scale, int | float) and len(route) != depth:
        # MiniCPM's blocks multiply what they add to the stream by scale_depth / sqrt(depth).
        fields["scale_depth"] = scale * math.sqrt(len(route) / depth)
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


def _breaks_prefix(count: int, route: Route) -> bool:
    """Check whether a route puts one of the first layers after a layer of the other kind."""
    in_prefix = [block < count for block in route.blocks]
    return sorted(in_prefix, reverse=True) != in_prefix


def breaks_prefix(fields: Json, route: Route) -> bool:
    """Check whether a count of the first layers, which no list describes, cannot describe the new order."""
    counts = [fields[key] for key in PREFIX_COUNTS & fields.keys() if is_count(fields[key])]
    return not isinstance(fields.get(PREFIX_LIST), list) and any(_breaks_prefix(count, route) for count in counts)


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
