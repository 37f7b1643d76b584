"""A view of a block: another tree of modules over the very same parameters.

A block that the stream visits twice needs two modules: each writes its own row of the key-value cache, under its own
`layer_idx`. Putting the same module into the list twice is silently wrong as soon as there is a cache.
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

_NUMBER = re.compile(r"^_?(layer|block)_?(idx|index|id|number|num|no)$")

Copies = Mapping[int, nn.Module]


def share_parameters(block: nn.Module) -> nn.Module:
    """A module tree of the same classes that shares every parameter with `block` and no module.

    Assigning to an attribute of one is not seen in the other; changing a parameter's values is. What a library has bound to the
    instance (accelerate's `forward` of a dispatched module, say) is bound to the view instead, and a compiled call is left out.

    Raises:
        UnsupportedEditError: the block carries something that cannot be bound to another module.
    """
    modules = list(block.modules())
    copies: dict[int, nn.Module] = {}
    for module in modules:
        _check(module)
        copies[id(module)] = type(module).__new__(type(module))
    for module in modules:
        twin = vars(copies[id(module)])
        for name, value in vars(module).items():
            twin[name] = _rebound(value, copies)
        twin["_compiled_call_impl"] = None
        for name, parameter in twin["_parameters"].items():
            if parameter is not None and parameter.is_meta:
                # Stands for an offloaded weight, which the module's own name finds; shared, it would pass for a tied one.
                twin["_parameters"][name] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copies[id(block)]


def _check(module: nn.Module) -> None:
    forward = vars(module).get("forward")
    if forward is not None and not isinstance(forward, types.MethodType | functools.partial):
        raise UnsupportedEditError(
            f"the forward of a {type(module).__name__} was replaced by {getattr(forward, '__qualname__', forward)!r}, which cannot be bound "
            "to a second module with the same parameters; operate first and replace it afterwards"
        )
    if type(module).__name__.startswith("FSDP"):
        raise UnsupportedEditError(
            "the model is sharded by FSDP, and parameters of two modules cannot be sharded as one; operate before sharding"
        )


def _rebound(value: Any, copies: Copies) -> Any:
    """The value with every module of the block replaced by the view's; containers are copied."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if isinstance(value, functools.partial):
        return _rebound_partial(value, copies)
    if type(value) is list or type(value) is tuple:
        return type(value)(_rebound(item, copies) for item in value)
    if isinstance(value, dict):
        copied = value.copy()
        for key, item in value.items():
            copied[key] = (
                _rebound(item, copies) if isinstance(item, nn.Module | types.MethodType | functools.partial) else item
            )
        return copied
    return set(value) if type(value) is set else value


def _rebound_partial(value: functools.partial[Any], copies: Copies) -> functools.partial[Any]:
    keywords = {key: _rebound(item, copies) for key, item in value.keywords.items()}
    bound = functools.partial(value.func, *(_rebound(item, copies) for item in value.args), **keywords)
    vars(bound).update({key: _rebound(item, copies) for key, item in vars(value).items()})
    return bound


def clone_in_state_dict(block: nn.Module) -> None:
    """Make `block.state_dict()` bring copies, so that a model which holds a view beside its original can be saved.

    Safetensors refuses tensors that share memory. Parameters themselves (`keep_vars=True`) stay shared.
    """
    if _copied not in block._state_dict_hooks.values():
        block.register_state_dict_post_hook(_copied)  # type: ignore[no-untyped-call] # torch's own


def _copied(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    names = [f"{prefix}{name}" for name in _tensor_names(module)]
    for name in names:
        tensor = state.get(name)
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter) and not tensor.is_meta:
            state[name] = tensor.clone()


def _tensor_names(module: nn.Module) -> Iterator[str]:
    for name, _ in module.named_parameters(remove_duplicate=False):
        yield name
    for name, _ in module.named_buffers(remove_duplicate=False):
        yield name


def position_name(module: nn.Module) -> str | None:
    """The attribute in which a module itself keeps its position."""
    return next((name for name, value in vars(module).items() if type(value) is int and _NUMBER.match(name)), None)


def positions(block: nn.Module) -> Iterator[tuple[dict[str, Any], str, int]]:
    """Attributes in which a block's modules keep its position: their dictionary, name and value."""
    for module in block.modules():
        attributes = vars(module)
        for name, value in attributes.items():
            if type(value) is int and _NUMBER.match(name):
                yield attributes, name, value


def check_positions(block: nn.Module, position: int) -> None:
    """Refuse a block that counts its position otherwise than from the list it stands in.

    Raises:
        UnsupportedEditError: with the attribute's name and value.
    """
    for module in block.modules():
        # Versions of transformers that know the scale from construction keep it in `scaling`.
        if vars(module).get("scale_attn_by_inverse_layer_idx") and not hasattr(module, "scaling"):
            raise UnsupportedEditError(
                "scale_attn_by_inverse_layer_idx: this version of transformers scales the attention of each layer by its position while it "
                "runs, so a block that moves would compute something else"
            )
    for _, name, value in positions(block):
        if value - position not in (0, 1):
            raise UnsupportedEditError(
                f"a module of block {position} ({type(block).__name__}) has {name} = {value}, and what it counts is not known, so the block "
                "cannot be moved"
            )
