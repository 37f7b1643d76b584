"""Keep the numbers of a config from which other programs derive the kind of each layer. Plain dictionaries; no torch.

transformers reads a list (`layer_types`) and ignores the number next to it (`full_attention_interval`). Other programs
read only the number, so a number that contradicts the list would give them another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..plans.route import Route
from .config_fields import Json


@dataclass(frozen=True, slots=True)
class Period:
    """Describe a number that places the layers of one kind.

    Attributes:
        list_name: the list that holds the kind of each layer.
        kind: the value of that list for the layers that the number places; None if the list holds their numbers.
        places: whether a number places a layer of that kind at a position; also gets the config.
        first: the smallest number that has a meaning.
    """

    list_name: str
    kind: object
    places: Callable[[int, int, Json], bool]
    first: int = 1

    def layers(self, fields: Json, depth: int) -> list[bool] | None:
        """Return for each layer whether the list gives it this kind; None without a list for this depth."""
        values = fields.get(self.list_name)
        if not isinstance(values, list | tuple) or (self.kind is not None and len(values) < depth):
            return None
        return [index in values if self.kind is None else values[index] == self.kind for index in range(depth)]

    def find(self, layers: list[bool], fields: Json) -> int | None:
        """Return the smallest number that places these layers; None if there is none."""
        for number in range(self.first, len(layers) + 2):
            if [self.places(number, position, fields) for position in range(len(layers))] == layers:
                return number
        return None


def _last_of_period(number: int, position: int, _: Json) -> bool:
    return (position + 1) % number == 0


def _indexer(number: int, position: int, fields: Json) -> bool:
    return bool(max(position - fields.get("index_skip_topk_offset", 2) + 1, 0) % number == 0)


_FULL_ATTENTION = Period("layer_types", "full_attention", _last_of_period)
PERIODS: Mapping[str, Period] = {
    "sliding_window_pattern": _FULL_ATTENTION,
    "_sliding_window_pattern": _FULL_ATTENTION,
    "full_attention_interval": _FULL_ATTENTION,
    "global_attn_every_n_layers": Period("layer_types", "full_attention", lambda number, i, _: i % number == 0),
    "max_window_layers": Period("layer_types", "sliding_attention", lambda number, i, _: i >= number, 0),
    "no_rope_layer_interval": Period("no_rope_layers", 0, _last_of_period),
    "interleave_moe_layer_step": Period("moe_layers", None, _last_of_period),
    "index_topk_freq": Period("indexer_types", "full", _indexer),
}


@dataclass(frozen=True, slots=True)
class PositionReaders:
    """Programs that place the layers of a model type by position, whatever its config says.

    Attributes:
        programs: the programs.
        key: the field of the config that the position stands for.
        number: its value in these programs.
    """

    programs: str
    key: str
    number: int


READ_BY_POSITION: Mapping[str, PositionReaders] = {
    "cohere2": PositionReaders("llama.cpp and mlx-lm", "sliding_window_pattern", 4),
    "gemma2": PositionReaders("llama.cpp", "sliding_window_pattern", 2),
    "gemma3": PositionReaders("llama.cpp and mlx-lm", "sliding_window_pattern", 6),
    "gemma3_text": PositionReaders("llama.cpp and mlx-lm", "sliding_window_pattern", 6),
    "gpt_oss": PositionReaders("llama.cpp", "sliding_window_pattern", 2),
    "llama4": PositionReaders("llama.cpp", "no_rope_layer_interval", 4),
    "llama4_text": PositionReaders("llama.cpp", "no_rope_layer_interval", 4),
    "smollm3": PositionReaders("llama.cpp", "no_rope_layer_interval", 4),
}


def describe_position_readers(model_type: str, fields: Json, depth: int) -> str | None:
    """Describe the programs that would run another model than the edited config describes, and what to do.

    Args:
        model_type: the model type of the checkpoint.
        fields: the decoder's section of the edited config.
        depth: number of blocks of the edited model.

    Returns:
        A sentence or two; None if no such program is known.
    """
    readers = READ_BY_POSITION.get(model_type)
    layers = PERIODS[readers.key].layers(fields, depth) if readers else None
    if readers is None or layers is None or _places(PERIODS[readers.key], readers.number, fields, depth) == layers:
        return None
    list_name, kind = PERIODS[readers.key].list_name, PERIODS[readers.key].kind
    return (
        f"{readers.programs} would run another model: of {model_type}, they take the last of every {readers.number} "
        f"layers for one with {list_name} = {kind!r}, and this order breaks that period (transformers reads the list). "
        f"For them, drop, repeat or move only whole groups of {readers.number} layers."
    )


def follow_periods(fields: Json, depth: int) -> Json:
    """Return the fields with the numbers that describe their lists; a number that cannot describe its list is removed.

    Args:
        fields: the decoder's section of the edited config; its lists have been rewritten.
        depth: number of blocks of the edited model.
    """
    followed = dict(fields)
    for key, period in PERIODS.items():
        layers = period.layers(fields, depth)
        value = fields.get(key)
        if not value or layers is None or (key == "max_window_layers" and not fields.get("use_sliding_window")):
            continue
        if _places(period, value, fields, depth) != layers:
            number = period.find(layers, fields)
            if number is None:
                del followed[key]
            else:
                followed[key] = number
    return followed


def broken_periods(fields: Json, depth: int, route: Route) -> list[str]:
    """Return the numbers that alone describe the layers of a section, and cannot describe their new order."""
    broken = []
    for key, period in PERIODS.items():
        value = fields.get(key)
        if value and period.layers(fields, depth) is None:
            before = _places(period, value, fields, depth)
            after = _places(period, value, fields, len(route))
            if before and after and [before[block] for block in route.blocks] != after:
                broken.append(key)
    return broken


def _places(period: Period, value: Any, fields: Json, depth: int) -> list[bool] | None:
    """Return where a value places layers of its kind: a number, or a cycle of letters in which G is full attention."""
    if isinstance(value, str) and value.strip("LG") == "":
        return [value[position % len(value)] == "G" for position in range(depth)]
    if type(value) is not int or value < period.first:
        return None
    return [period.places(value, position, fields) for position in range(depth)]
