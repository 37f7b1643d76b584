"""Layer names inside the settings of quantisers, which follow their layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UnsupportedEditError

# How quantisers mark a pattern of module names (compressed-tensors; GPTQModel's `dynamic`).
_PATTERN_MARKS = ("re:", "+:", "-:")


def rename_layers(value: Any, rename: Callable[[int], Sequence[int]], prefix: str) -> Any:
    """Rename layers inside a JSON value that names modules, such as `quantization_config`.

    Args:
        value: any JSON value; a copy is returned.
        rename: the new positions of a block, none if it is dropped.
        stack_name: the last part of the blocks' prefix, such as "layers" or "h".

    Raises:
        UnsupportedEditError: a pattern that speaks of layer numbers in a way that cannot be followed.
    """
    pattern = re.compile(rf"(?<!\w){re.escape(prefix)}\.(\d+)(?=\.|$)")

    # A layer number that is a part of a pattern: "layers.6*", "layers.[12]".
    numbered = re.compile(rf"(?<!\w){re.escape(prefix)}\\?\.[\d\[({{]")

    def names(text: str) -> list[str]:
        if re.search(r"vision|visual|audio|image", text, re.IGNORECASE):
            return [text]
        match = pattern.search(text)
        if match is None:
            if (text.startswith(_PATTERN_MARKS) and re.search(r"\d", text)) or numbered.search(text):
                raise UnsupportedEditError(
                    f"the quantisation settings name layers by the pattern {text!r}, which cannot be renumbered"
                )
            return [text]
        if numbered.search(text, match.end()) or text.startswith(_PATTERN_MARKS):
            raise UnsupportedEditError(
                f"the quantisation settings name several layers at once by {text!r}, which cannot be renumbered"
            )
        return [f"{text[: match.start(1)]}{place}{text[match.end(1) :]}" for place in rename(int(match[1]))]

    if isinstance(value, dict):
        return {name: rename_layers(item, rename, prefix) for key, item in value.items() for name in names(key)}
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            items.extend(names(item) if isinstance(item, str) else [rename_layers(item, rename, prefix)])
        return items
    if isinstance(value, str):
        new = names(value)
        return new[0] if len(new) == 1 else value
    return value
