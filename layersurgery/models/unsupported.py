"""List the model types with layers that cannot be moved, and the reasons.

Without a refusal, each of them would silently compute something else.
"""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedEditError
from ..plans.route import Route
from ..plans.visit import Visit
from .block_dependencies import DEPENDENCY_FIELDS, refuse_other_sources

MEASURE_MEANS = (
    "measure the means first: means = ls.measure_means(model, text), or layersurgery means MODEL -o means.safetensors, "
    "and pass them on (means=..., --means FILE)"
)
"""What to do if an edit adds means that are not given."""

_ALWAYS = {
    "diffusion_gemma_text": "runs each of its layers in an encoder and in a decoder",
    "hrm_text": "runs its blocks in nested cycles and not one after another",
    "longcat_flash": "keeps two cache rows for each block",
    "dory": "runs its middle blocks several times, and splits its list of blocks at fixed numbers",
    "inkling2_loop_text": "runs its blocks several times",
    "reformer": "is reversible and draws its hash functions by position",
    "xlm": "keeps the parts of its layers in separate lists",
    "inkling2_text": "lets its blocks read the outputs of earlier blocks, by position",
    "zaya": "passes the state of each layer's router to the next layer",
    "zamba": "shares one block's weights among several positions",
    "zamba2": "shares one block's weights among several positions",
}


def refusal_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a config object that the refusals depend on."""
    names = ("model_type", "hidden_size_per_layer_input", "rescale_every", *DEPENDENCY_FIELDS)
    return {name: getattr(config, name, None) for name in names}


def refuse_architecture(fields: dict[str, Any]) -> None:
    """Refuse an architecture that ties blocks to each other, so that no edit of single layers is correct.

    Args:
        fields: the text decoder's section of the config, with the model type.

    Raises:
        UnsupportedEditError: gives the reason.
    """
    model_type = fields.get("model_type")
    reason = _ALWAYS.get(str(model_type))
    if fields.get("hidden_size_per_layer_input"):
        reason = "gives every layer its own columns of one embedding table, outside the layers"
    if reason:
        raise UnsupportedEditError(f"{model_type} {reason}; its layers cannot be edited")


def refuse_route(fields: dict[str, Any], route: Route, *, live: bool = False) -> None:
    """Refuse an order in which some block would compute something else than at its original position.

    Args:
        fields: the text decoder's section of the config, with the model type.
        route: the new order.
        live: whether the edit changes a model in memory instead of files.

    Raises:
        UnsupportedEditError: gives the reason.
    """
    for visit in route:
        _refuse_visit(visit, live=live)
    step = fields.get("rescale_every")
    if live and step and any(block // step != position // step for position, block in enumerate(route.blocks)):
        raise UnsupportedEditError(
            f"{fields.get('model_type')} halves the weights of its blocks every {step} positions when it runs "
            "(rescale_every), so a block cannot move between these groups in memory; edit the checkpoint, or set "
            "rescale_every to 0 in the config before loading"
        )
    if live and step and (scaled := [visit for visit in route if visit.source and visit.block >= step]):
        raise UnsupportedEditError(
            f"{scaled[0]}: {fields.get('model_type')} halves the weights of its blocks in place when it runs "
            "(rescale_every), so those of another model cannot be shared; edit the checkpoint, or set rescale_every to "
            "0 in both configs before loading"
        )
    if fields.get("model_type") == "rwkv" and [
        position for position, block in enumerate(route.blocks) if block == 0
    ] != [0]:
        raise UnsupportedEditError(
            "rwkv: block 0 holds the norm of the embedding and works only at position 0; keep it there, once"
        )
    refuse_other_sources(fields, route, live=live)


def _refuse_visit(visit: Visit, *, live: bool) -> None:
    """Refuse a change of a block that cannot be made in memory, or in files."""
    where = "in memory" if live else "by a checkpoint, which has weights only"
    if visit.start and not live:
        raise UnsupportedEditError(
            f"{visit}: a change of some tokens only cannot be expressed {where} and treats all tokens alike; use it in "
            "memory (operate) or measure it (sweep)"
        )
    if (visit.parallel or visit.divisor != 1) and not live:
        raise UnsupportedEditError(
            f"{visit}: parallel blocks and averages cannot be expressed {where} and is run block after block; use them "
            "in memory (operate) or measure them (sweep)"
        )
