"""Recognize what nnsight and TransformerLens make of a model, and say what to edit instead.

Both number the blocks of a model when they wrap it. nnsight puts a callable of its own before each module's forward,
and leaves it there, inert without a wrapper. TransformerLens replaces the modules themselves. So a model is edited
first and wrapped afterwards.
"""

from __future__ import annotations

import gc
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import nn

from ..errors import PlanError, UnsupportedEditError

_NNSIGHT = "__nnsight__"  # the attribute of a module that nnsight has wrapped
WRAP_AGAIN = "edit the transformers model first, and then wrap it: nnsight.LanguageModel(model, tokenizer=tokenizer)"
BRIDGE_AGAIN = (
    "load it with transformers, edit it, and then make the bridge: "
    "TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)"
)


def refuse_wrapper(model: object) -> None:
    """Refuse an object of nnsight, or a model of TransformerLens.

    Raises:
        PlanError: says what to edit instead.
        UnsupportedEditError: a bridge has replaced modules of this transformers model.
    """
    if not isinstance(model, nn.Module):
        if any(_is_of(base, "nnsight") for base in type(model).__mro__):
            raise PlanError(
                f"expected a transformers model, not a {type(model).__name__} of nnsight, which has numbered its "
                f"blocks; {WRAP_AGAIN}"
            )
    elif _is_of(type(model), "transformer_lens"):
        raise PlanError(
            f"expected a transformers model, not a {type(model).__name__} of TransformerLens, which has its own "
            f"modules in place of the model's; {BRIDGE_AGAIN}"
        )
    elif has_bridge(model):
        raise UnsupportedEditError(
            f"TransformerLens has put its own modules in place of those of this {type(model).__name__}; {BRIDGE_AGAIN}"
        )


def has_bridge(model: nn.Module) -> bool:
    """Return whether TransformerLens has replaced modules of a model."""
    if "transformer_lens" not in sys.modules:
        return False
    return any(_is_of(kind, "transformer_lens") for kind in {type(module) for module in model.modules()})


def may_get_bridge() -> bool:
    """Return whether TransformerLens is installed, so that a bridge could be made of an edited model."""
    return "transformer_lens" in sys.modules or _is_installed("transformer_lens")


def is_traced(model: nn.Module) -> bool:
    """Return whether a wrapper of nnsight around a model exists. Its callables in the modules remain without one."""
    if "nnsight" not in sys.modules or not _has_live_routes(model):
        return False
    gc.collect()  # a wrapper that was deleted may be part of a cycle
    return _has_live_routes(model)


def without_nnsight(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes without the callable of nnsight, if the module's class has the forward under it.

    A view of a block is not traced by the wrappers of the block.
    """
    attributes = vars(module)
    if getattr(attributes.get(_NNSIGHT), "original", None) is not type(module).forward:
        return attributes
    return {name: value for name, value in attributes.items() if name not in (_NNSIGHT, "forward")}


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _has_live_routes(model: nn.Module) -> bool:
    states = [state for module in model.modules() if (state := vars(module).get(_NNSIGHT)) is not None]
    return any(route[0]() is not None for state in states for route in getattr(state, "routes", ()))


def _is_of(kind: type, package: str) -> bool:
    return kind.__module__.partition(".")[0] == package
