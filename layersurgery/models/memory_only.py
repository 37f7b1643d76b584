"""Change what a block, or a module of it, returns: by a class derived from its own, in a view of the block.

The module stays an instance of its class with its own parameters, attributes and hooks. What it then computes has no
place in a checkpoint.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError


class MemoryOnlyModule(nn.Module):
    """A module that no checkpoint can express."""

    not_savable = ""
    """Why no checkpoint can express it."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - documented in torch
        if not kwargs.get("keep_vars", False):
            raise UnsupportedEditError(self.not_savable)
        return super().state_dict(*args, **kwargs)


@cache
def _derived_class(base: Any, kind: Any) -> Any:
    """Return the class under the name of `kind` that derives from `base` and from it."""
    return type(kind)(kind.__name__, (base, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def derive(module: nn.Module, base: Any, **attributes: Any) -> None:
    """Give a module of a view a class that derives from `base`, a `MemoryOnlyModule`, and its own class, in place.

    Raises:
        UnsupportedEditError: another program replaced the module's forward.
    """
    kind: Any = type(module)
    derived = _derived_class(base, kind)
    if "forward" in vars(module):
        # accelerate's hooks call `_old_forward`.
        old = vars(module).get("_old_forward")
        if not isinstance(old, types.MethodType) or old.__func__ is not kind.forward:
            raise UnsupportedEditError(
                f"the forward of a {kind.__name__} was replaced, so what it returns cannot be changed; edit the model "
                "first and replace forward afterwards"
            )
        vars(module)["_old_forward"] = types.MethodType(derived.forward, module)
    # Bypass nn.Module.__setattr__: a module among the attributes must not become a child.
    vars(module).update(attributes)
    module.__class__ = derived


def refuse_memory_only(blocks: Iterable[nn.Module]) -> None:
    """Refuse blocks that an earlier edit has changed in a way that no checkpoint can express.

    Raises:
        UnsupportedEditError: gives the reason.
    """
    for block in blocks:
        for module in block.modules():
            if isinstance(module, MemoryOnlyModule):
                raise UnsupportedEditError(
                    f"{module.not_savable}. Nor can its blocks be edited again, or run one by one: write all edits as "
                    "one plan of the unedited model"
                )


def stream_of(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the residual stream that a block is given.

    Raises:
        UnsupportedEditError: it is neither the first argument nor called hidden_states.
    """
    stream = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(stream, torch.Tensor):
        raise UnsupportedEditError(
            f"a {type(block).__name__} is given the residual stream neither as its first argument nor as "
            "hidden_states, so what it returns cannot be changed"
        )
    return stream


def with_first(output: Any, value: torch.Tensor) -> Any:
    """Return what a module returned, with another tensor in the place of the first or only one."""
    return type(output)((value, *output[1:])) if isinstance(output, tuple | list) else value
