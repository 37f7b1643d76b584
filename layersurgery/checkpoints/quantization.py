"""Renumber the layers that quantization settings name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UnsupportedEditError

# Prefixes that mark a pattern of module names (compressed-tensors; GPTQModel's `dynamic`).
_PATTERN_MARKS = ("re:", "+:", "-:")


def rename_layers(value: Any, rename: Callable[[int], Sequence[int]], prefix: str) -> Any:
    """Renumber layers in a JSON value that contains module names, such as `quantization_config`.

    Args:
        value: any JSON value; it is not modified.
        rename: returns the new positions of a block; empty if the block is dropped.
        prefix: the last component of the blocks' prefix, such as "layers" or "h".

    Returns:
        A copy of the value with the new layer numbers.

    Raises:
        UnsupportedEditError: a pattern names layers by number in a way that cannot be renumbered.
    """
    pattern = re.compile(rf"(?<!\w){re.escape(prefix)}\.(\d+)(?=\.|$)")

    # A layer number inside a pattern, such as "layers.6*" or "layers.[12]".
    numbered = re.compile(rf"(?<!\w){re.escape(prefix)}\\?\.[\d\[({{]")

    def new_names(text: str) -> list[str]:
        if re.search(r"vision|visual|audio|image", text, re.IGNORECASE):
            return [text]
        match = pattern.search(text)
        if match is None:
            if (text.startswith(_PATTERN_MARKS) and re.search(r"\d", text)) or numbered.search(text):
                raise UnsupportedEditError(
                    f"the quantization settings name layers by the pattern {text!r}, which cannot be renumbered"
                )
            return [text]
        if numbered.search(text, match.end()) or text.startswith(_PATTERN_MARKS):
            raise UnsupportedEditError(
                f"the quantization settings name several layers at once by the pattern {text!r}, which cannot be "
                "renumbered"
            )
        return [f"{text[: match.start(1)]}{position}{text[match.end(1) :]}" for position in rename(int(match[1]))]

    if isinstance(value, dict):
        return {name: rename_layers(item, rename, prefix) for key, item in value.items() for name in new_names(key)}
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            items.extend(new_names(item) if isinstance(item, str) else [rename_layers(item, rename, prefix)])
        return items
    if isinstance(value, str):
        new = new_names(value)
        return new[0] if len(new) == 1 else value
    return value
