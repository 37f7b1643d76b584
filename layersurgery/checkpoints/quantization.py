"""Renumber the layers that quantization settings name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..errors import UnsupportedEditError
from .checkpoint import Checkpoint

# The fields of a config that hold quantization settings; the last is MLX's.
QUANTIZATION_KEYS = frozenset(("quantization_config", "compression_config", "quantization"))
# Prefixes that mark a pattern of module names (compressed-tensors; GPTQModel's `dynamic`).
_PATTERN_MARKS = ("re:", "+:", "-:")
_PATTERN_CHARACTERS = re.compile(r"[*?+^$|\\\[\](){}]")
_NOT_TEXT = re.compile(r"vision|visual|audio|image", re.IGNORECASE)


def renumber_settings(value: Any, checkpoint: Checkpoint, positions: Mapping[int, Collection[int]]) -> Any:
    """Renumber the layers that a checkpoint's quantization settings name.

    Raises:
        UnsupportedEditError: as for `rename_layers`.
    """
    modules: dict[int, set[str]] = defaultdict(lambda: {""})
    for split in map(checkpoint.block_prefix.split, checkpoint.tensors.names()):
        if split is not None:
            path = split[1].split(".")
            modules[split[0]] |= {".".join(path[:length]) for length in range(1, len(path))}
    return rename_layers(value, positions, checkpoint.block_prefix.prefix, modules)


def rename_layers(
    value: Any, positions: Mapping[int, Collection[int]], prefix: str, modules: Mapping[int, Collection[str]]
) -> Any:
    """Renumber layers in a JSON value that contains module names, such as `quantization_config`.

    A pattern of names is kept if it answers for each module of the edited model as for the same module of the source.

    Args:
        value: any JSON value; it is not modified.
        positions: the new positions of each block that is kept.
        prefix: the blocks' prefix, such as "model.layers" or "transformer.h".
        modules: the names of modules within each block of the source.

    Returns:
        A copy of the value with the new layer numbers.

    Raises:
        UnsupportedEditError: a pattern would answer differently for some block at its new position.
    """
    list_name = re.escape(prefix.rpartition(".")[2])
    literal = re.compile(rf"(?<!\w){list_name}\.(\d+)(?=\.|$)")
    # A layer number inside a pattern, such as "layers.6*" or "layers.[12]".
    numbered = re.compile(rf"(?<!\w){list_name}\\?\.[\d\[({{]")

    def new_names(text: str) -> list[str]:
        marked = text.startswith(_PATTERN_MARKS)
        if _NOT_TEXT.search(text) and not marked:
            return [text]
        match = literal.search(text)
        if match is not None and not marked and not numbered.search(text, match.end()):
            new_positions = positions.get(int(match[1]), ())
            return [f"{text[: match.start(1)]}{position}{text[match.end(1) :]}" for position in new_positions]
        if marked or match is not None or _PATTERN_CHARACTERS.search(text):
            found = _pattern_matches(text, positions, prefix, modules)
            # A pattern of a layer that matches no module was written for other names of the same modules.
            if found is None or (not found and numbered.search(text) and not _NOT_TEXT.search(text)):
                raise UnsupportedEditError(
                    f"the quantization settings name layers by the pattern {text!r}, which cannot be renumbered: it "
                    "would mean other layers of the edited model; list the names of the modules instead of it"
                )
        return [text]

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: renamed(item) for key, item in value.items() for name in new_names(key)}
        if isinstance(value, list):
            return [new for item in value for new in (new_names(item) if isinstance(item, str) else [renamed(item)])]
        if isinstance(value, str):
            new = new_names(value)
            return new[0] if len(new) == 1 else value
        return value

    return renamed(value)


def _pattern_matches(
    text: str, positions: Mapping[int, Collection[int]], prefix: str, modules: Mapping[int, Collection[str]]
) -> bool | None:
    """Return whether a pattern matches a module of a block; None if it depends on the block's position."""
    is_regex = text.startswith(_PATTERN_MARKS)
    pattern = text.partition(":")[2] if is_regex else text
    try:
        regex = re.compile(pattern)
    except re.error:
        regex = None
    # Programs name the same module from different roots.
    components = prefix.split(".")
    prefixes = [".".join(components[start:]) for start in range(len(components))]

    def answers(block: int, rest: str) -> list[bool]:
        names = [f"{start}.{block}.{rest}".rstrip(".") for start in prefixes]
        found = [] if regex is None else [bool(test(name)) for name in names for test in (regex.match, regex.fullmatch)]
        return found if is_regex else [*found, *(fnmatchcase(name, pattern) for name in names)]

    any_match = False
    for block, rests in modules.items():
        for rest in rests:
            before = answers(block, rest)
            any_match |= any(before)
            if any(answers(position, rest) != before for position in positions.get(block, ()) if position != block):
                return None
    return any_match
