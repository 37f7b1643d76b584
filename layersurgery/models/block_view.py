"""Create a view of a block: a second module tree that shares the block's parameters.

A block that the stream visits twice needs two modules: each writes its own row of the key-value cache, under its own
`layer_idx`. Putting one module into the list twice gives wrong results, without an error, as soon as there is a cache.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from .other_wrappers import without_nnsight

POSITION_NAME = re.compile(r"^_?(layer|block)_?(idx|index|id|number|num|no)$")

Copies = Mapping[int, nn.Module]


def share_parameters(block: nn.Module) -> nn.Module:
    """Create a module tree of the same classes that shares every parameter with `block`, but no module.

    An attribute assigned in one tree does not change the other; a parameter's values change in both. Methods that a
    library has bound to the original instance (such as accelerate's `forward` of a dispatched module) are bound to the
    view instead. A compiled call is not copied.

    Raises:
        UnsupportedEditError: the block holds something that cannot be bound to another module.
    """
    modules = list(block.modules())
    copies: dict[int, nn.Module] = {}
    for module in modules:
        _check_copyable(module)
        copies[id(module)] = type(module).__new__(type(module))
    for module in modules:
        attributes = vars(copies[id(module)])
        for name, value in without_nnsight(module).items():
            attributes[name] = _rebind(value, copies)
        attributes["_compiled_call_impl"] = None
        for name, parameter in attributes["_parameters"].items():
            if parameter is not None and parameter.is_meta:
                # A placeholder for an offloaded weight, which is found by the module's name. Shared, it would look
                # tied.
                attributes["_parameters"][name] = nn.Parameter(
                    parameter.detach(), requires_grad=parameter.requires_grad
                )
    return copies[id(block)]


def own_parameters(block: nn.Module) -> None:
    """Give a view of a block copies of all its parameters and buffers, so that training it changes no other block.

    Raises:
        UnsupportedEditError: a weight is offloaded, so it has no values to copy.
    """
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter.is_meta:
                raise UnsupportedEditError(
                    f"{name} is offloaded, and a copy needs its values; load the model without offloading, or edit the "
                    "checkpoint on disk"
                )
            module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()


def _check_copyable(module: nn.Module) -> None:
    """Refuse a module with a replaced forward that cannot be bound to a copy, or one sharded by FSDP."""
    forward = without_nnsight(module).get("forward")
    if forward is not None and not isinstance(forward, types.MethodType | functools.partial):
        raise UnsupportedEditError(
            f"the forward of a {type(module).__name__} was replaced by {getattr(forward, '__qualname__', forward)!r}, "
            "which cannot be bound to a second module with the same parameters; edit the model first and replace "
            "forward afterwards"
        )
    if type(module).__name__.startswith("FSDP"):
        raise UnsupportedEditError(
            "the model is sharded by FSDP, which cannot shard parameters that two modules share; edit the model before "
            "sharding"
        )


def _rebind(value: Any, copies: Copies) -> Any:
    """Replace every module of the block in a value by its copy in the view; containers are copied."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if isinstance(value, functools.partial):
        return _rebind_partial(value, copies)
    if type(value) is list or type(value) is tuple:
        return type(value)(_rebind(item, copies) for item in value)
    if isinstance(value, dict):
        copied = value.copy()
        for key, item in value.items():
            copied[key] = (
                _rebind(item, copies) if isinstance(item, nn.Module | types.MethodType | functools.partial) else item
            )
        return copied
    return set(value) if type(value) is set else value


def _rebind_partial(value: functools.partial[Any], copies: Copies) -> functools.partial[Any]:
    """Replace the block's modules in a partial function's arguments and attributes."""
    keywords = {key: _rebind(item, copies) for key, item in value.keywords.items()}
    bound = functools.partial(value.func, *(_rebind(item, copies) for item in value.args), **keywords)
    vars(bound).update({key: _rebind(item, copies) for key, item in vars(value).items()})
    return bound


def clone_in_state_dict(block: nn.Module) -> None:
    """Make `block.state_dict()` return copies of its tensors, so that a model with views can be saved.

    Safetensors refuses tensors that share memory. Parameters themselves (`keep_vars=True`) stay shared.
    """
    if _clone_tensors not in block._state_dict_hooks.values():
        block.register_state_dict_post_hook(_clone_tensors)  # type: ignore[no-untyped-call] # untyped in torch


def _clone_tensors(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Replace the module's tensors in a state dict by copies."""
    # Also what a quantized module adds to its tensors, such as scales.
    for name in [name for name in state if name.startswith(prefix)]:
        tensor = state[name]
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter) and not tensor.is_meta:
            state[name] = tensor.clone()


def position_name(module: nn.Module) -> str | None:
    """Return the name of the attribute in which a module stores its position; None if there is none."""
    return next(
        (name for name, value in vars(module).items() if type(value) is int and POSITION_NAME.match(name)), None
    )


def positions(block: nn.Module) -> Iterator[tuple[dict[str, Any], str, int]]:
    """List the attributes that store a position in a block's modules: attribute dictionary, name and value."""
    for module in block.modules():
        attributes = vars(module)
        for name, value in attributes.items():
            if type(value) is int and POSITION_NAME.match(name):
                yield attributes, name, value


def check_positions(block: nn.Module, position: int) -> None:
    """Refuse a block whose modules count positions in another way than by the list of blocks.

    Raises:
        UnsupportedEditError: gives the attribute's name and value.
    """
    for module in block.modules():
        # Versions of transformers that compute the scale in the constructor store it in `scaling`.
        if vars(module).get("scale_attn_by_inverse_layer_idx") and not hasattr(module, "scaling"):
            raise UnsupportedEditError(
                "scale_attn_by_inverse_layer_idx: this version of transformers scales the attention of each layer by "
                "its position at run time, so a block that moves would compute something else"
            )
    for _, name, value in positions(block):
        if value - position not in (0, 1):
            raise UnsupportedEditError(
                f"a module of block {position} ({type(block).__name__}) has {name} = {value}, and the meaning of this "
                "number is unknown, so the block cannot be moved"
            )
