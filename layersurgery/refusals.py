"""Architectures whose layers cannot be moved at all, by model type, and why. Each would be silently wrong."""

from __future__ import annotations

from typing import Any

from .errors import InexpressibleError

_ALWAYS = {
    "hrm_text": "runs its blocks in nested cycles and not as one stack",
    "longcat_flash": "keeps two cache rows for each block",
    "reformer": "is reversible and draws its hash functions by position",
    "xlm": "keeps the parts of its layers in separate lists",
    "inkling2_text": "lets its blocks read the outputs of earlier blocks, by position",
    "zamba": "shares one block's weights among several positions",
    "zamba2": "shares one block's weights among several positions",
}


def refuse_architecture(config: dict[str, Any], fields: dict[str, Any]) -> None:
    """Refuse a checkpoint whose architecture ties blocks to each other in a way no edit of its files respects.

    Args:
        config: the whole config.json.
        fields: its section on the text decoder.

    Raises:
        InexpressibleError: with the reason.
    """
    model_type = fields.get("model_type", config.get("model_type"))
    reason = _ALWAYS.get(str(model_type))
    if fields.get("hidden_size_per_layer_input"):
        reason = "gives every layer its own columns of one embedding table, outside the layers"
    if reason:
        raise InexpressibleError(f"{model_type} {reason}; its layers cannot be edited on disk")
