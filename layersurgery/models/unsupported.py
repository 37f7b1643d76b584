"""Architectures whose layers cannot be moved at all, by model type, and why. Each would be silently wrong."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedEditError
from ..plans.route import Route

_ALWAYS = {
    "hrm_text": "runs its blocks in nested cycles and not as one stack",
    "longcat_flash": "keeps two cache rows for each block",
    "reformer": "is reversible and draws its hash functions by position",
    "xlm": "keeps the parts of its layers in separate lists",
    "inkling2_text": "lets its blocks read the outputs of earlier blocks, by position",
    "zaya": "hands the state of each layer's router on to the next",
    "zamba": "shares one block's weights among several positions",
    "zamba2": "shares one block's weights among several positions",
}
# Where a "shared" layer attends to the tokens that the full layer before it has picked.
_INDEXED = frozenset(("glm_moe_dsa", "glm5_next_text", "hy_v4", "mistral_large4_text"))


def refusal_fields(config: Any) -> dict[str, Any]:
    """Of a config object, the fields that a refusal may turn on."""
    names = ("model_type", "hidden_size_per_layer_input", "rescale_every", "indexer_types")
    return {name: getattr(config, name, None) for name in names}


def refuse_architecture(fields: dict[str, Any]) -> None:
    """Refuse an architecture that ties blocks to each other in a way no edit of single layers respects.

    Args:
        fields: the config's section on the text decoder, with its model type.

    Raises:
        UnsupportedEditError: with the reason.
    """
    model_type = fields.get("model_type")
    reason = _ALWAYS.get(str(model_type))
    if fields.get("hidden_size_per_layer_input"):
        reason = "gives every layer its own columns of one embedding table, outside the layers"
    if reason:
        raise UnsupportedEditError(f"{model_type} {reason}; its layers cannot be edited")


def refuse_route(fields: dict[str, Any], route: Route, *, live: bool = False) -> None:
    """Refuse an order in which blocks of an architecture would compute something else than at their own place.

    Args:
        fields: the config's section on the text decoder, with its model type.
        route: the new order.
        live: whether it is the model in memory that is edited, and not its files.

    Raises:
        UnsupportedEditError: with the reason.
    """
    step = fields.get("rescale_every")
    if live and step and any(block // step != place // step for place, block in enumerate(route.blocks)):
        raise UnsupportedEditError(
            f"{fields.get('model_type')} halves the weights of its blocks every {step} places once it runs (rescale_every), so a block cannot "
            "move from one such stretch to another in memory; edit the checkpoint, or set rescale_every to 0 in the config before loading"
        )
    if fields.get("model_type") == "rwkv" and [place for place, block in enumerate(route.blocks) if block == 0] != [0]:
        raise UnsupportedEditError(
            "rwkv: block 0 holds the norm of the embedding, and works at place 0 only; keep it there, once"
        )
    _refuse_indexers(fields, route)


def _refuse_indexers(fields: dict[str, Any], route: Route) -> None:
    kinds = fields.get("indexer_types")
    if kinds is None and fields.get("model_type") in _INDEXED:
        raise UnsupportedEditError(
            f"{fields['model_type']}: write indexer_types out in config.json, one for each layer, so that it can be followed"
        )
    if not kinds or "shared" not in kinds:
        return
    source: list[int | None] = []
    for block, kind in enumerate(kinds):
        source.append(block if kind != "shared" else source[-1] if source else None)
    picked: int | None = None
    for visit in route:
        if visit.block >= len(kinds) or kinds[visit.block] != "shared":
            picked = visit.block if visit.attention else None
        elif visit.attention and picked != source[visit.block]:
            raise UnsupportedEditError(
                f"{fields.get('model_type')}: block {visit.block} attends to the tokens that block {source[visit.block]} picks (indexer_types), and "
                f"on {route} it would get another's; keep them together"
            )
