"""Edit the positions, depths and per-layer lists that a model keeps in its modules and in its config object.

A block writes the row `layer_idx` of the key-value cache. Its attention mask, the class of its cache row and the number
of rows are read from the config by position. All of them must change together with the list of blocks, or generation
with a cache gives wrong tokens without an error. Changes are recorded in a log that undoes them exactly.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import UnsupportedEditError
from ..models.block_list import BlockList
from ..models.block_view import positions
from ..models.config_fields import DEPTH_FIELDS, INDEX_LISTS, LISTS, depth_field, is_layerwise
from ..models.config_rewrite import rewrite_fields
from ..plans.route import Route

_LAYER_INDEX_NAME = re.compile(r"(layer|block)_?(idx|index)$")
_MISSING = object()


class UndoLog:
    """A log of attribute changes that can undo them, and can detect values that other code changed later."""

    def __init__(self) -> None:
        self.changes: list[tuple[dict[str, Any], str, Any, Any, str]] = []

    def set(self, owner: dict[str, Any], name: str, value: Any, label: str) -> None:
        """Set a key of a dictionary (the attributes of an object), and record the previous value."""
        # Record the change before making it, so that an interrupt between the two loses nothing.
        self.changes.append((owner, name, owner.get(name, _MISSING), value, label))
        owner[name] = value

    def remove(self, owner: dict[str, Any], name: str, label: str) -> None:
        """Remove a key of a dictionary, and record its value."""
        self.changes.append((owner, name, owner[name], _MISSING, label))
        del owner[name]

    def changed_since(self) -> list[str]:
        """Return the labels of attributes that no longer have the value that was set here."""
        latest = {(id(owner), name): (owner, name, value, label) for owner, name, _, value, label in self.changes}
        return [
            label for owner, name, value, label in latest.values()
            if owner.get(name, _MISSING) is not value and owner.get(name, _MISSING) != value
        ]  # fmt: skip

    def undo(self) -> None:
        """Restore the original objects, not copies of them."""
        for owner, name, before, _, _ in reversed(self.changes):
            if before is _MISSING:
                owner.pop(name, None)
            else:
                owner[name] = before
        self.changes.clear()


def renumber_block(block: nn.Module, was: int, now: int, log: UndoLog | None = None) -> None:
    """Set the new position of a block in its modules."""
    if was == now:
        return
    for attributes, name, value in list(positions(block)):
        if log is None:
            attributes[name] = value - was + now
        else:
            log.set(attributes, name, value - was + now, f"{name} of block {was}")


def edit_config(config: Any, depth: int, route: Route, log: UndoLog) -> None:
    """Set the depth and the per-layer lists of the edited model in a decoder's config object.

    Raises:
        UnsupportedEditError: a field cannot represent the new order. The error names it, and the log contains the
            changes made before the error.
    """
    attributes = vars(config)
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()}
    rewritten = rewrite_fields(fields, depth, route, reloaded=False)
    derived = {
        name: value
        for name in sorted(LISTS - attributes.keys())
        if is_layerwise(name, value := _read_field(config, name), depth)
    }
    for name in fields.keys() - rewritten.keys():
        log.remove(attributes, name, f"config.{name}")
    for name, value in rewritten.items():
        if value is not fields[name] and value != fields[name]:
            log.set(attributes, name, tuple(value) if isinstance(attributes[name], tuple) else value, f"config.{name}")
    field = depth_field(config)
    for name in {field, *DEPTH_FIELDS, config.attribute_map.get("num_hidden_layers", field)}:
        if attributes.get(name) == depth and len(route) != depth:
            log.set(attributes, name, len(route), f"config.{name}")
    _edit_overrides(attributes, route, log)
    if getattr(config, field) != len(route):
        raise UnsupportedEditError(
            f"the config class {type(config).__name__} computes its number of layers and accepts no other value, so it "
            f"cannot represent the route {route}"
        )
    for name, value in rewrite_fields(derived, depth, route, reloaded=False).items():
        if list(_read_field(config, name) or []) != list(value):
            raise UnsupportedEditError(
                f"the config class {type(config).__name__} computes {name} from the positions of layers and accepts no "
                f"list, so it cannot represent the route {route}, and the model reads this field when it runs"
            )


def _read_field(config: Any, name: str) -> Any:
    try:
        value = getattr(config, name)
    except Exception:  # a field of other models, or one that differs by layer and raises when read
        return None
    return list(value) if isinstance(value, tuple) else value


def _edit_overrides(attributes: dict[str, Any], route: Route, log: UndoLog) -> None:
    """Move the per-layer overrides that transformers keeps in addition to the config's fields."""
    spec = attributes.get("_heterogeneity_spec")
    overrides = getattr(spec, "per_layer_overrides", None)
    if overrides and dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        moved = {position: overrides[block] for position, block in enumerate(route.blocks) if block in overrides}
        log.set(
            attributes,
            "_heterogeneity_spec",
            dataclasses.replace(spec, per_layer_overrides=moved),
            "config.per_layer_config",
        )


def edit_parent_modules(modules: Iterator[nn.Module], depth: int, route: Route, log: UndoLog) -> None:
    """Set the depth and the per-layer lists of the edited model in the modules that contain the list of blocks.

    Raises:
        UnsupportedEditError: a list has one value per layer, but its meaning is unknown.
    """
    for module in modules:
        attributes = vars(module)
        for name, value in list(attributes.items()):
            if name in DEPTH_FIELDS and value == depth:
                log.set(attributes, name, len(route), f"{name} of {type(module).__name__}")
            elif type(value) is int and _LAYER_INDEX_NAME.search(name):
                index = _edit_layer_index(module, name, value, depth, route)
                if index != value:
                    log.set(attributes, name, index, f"{name} of {type(module).__name__}")
            elif name in INDEX_LISTS and type(value) in (list, tuple, set, frozenset):
                new = type(value)(position for position, block in enumerate(route.blocks) if block in value)
                if new != value:
                    log.set(attributes, name, new, f"{name} of {type(module).__name__}")
            elif (
                type(value) in (list, tuple)
                and len(value) == depth
                and name[0] != "_"
                and all(map(_is_plain, value))
                and not _are_module_paths(value)
            ):
                new = _reorder_list(module, name, value, depth, route)
                if new != value:
                    log.set(attributes, name, new, f"{name} of {type(module).__name__}")


def _edit_layer_index(module: nn.Module, name: str, index: int, depth: int, route: Route) -> int:
    """Return the new value of an attribute that holds a layer index.

    It is assumed to be the index at which layers of another kind begin, or the depth if there are none.
    """
    if index == depth:
        return len(route)
    if 0 <= index < depth and (
        route.blocks[:index] != tuple(range(index))
        or any(block < index for block in route.blocks[index:])
        or len(route) <= index
    ):
        raise UnsupportedEditError(
            f"{type(module).__name__}.{name} = {index} is the index of a layer, but its meaning is unknown, so only "
            f"the layers from {index} on can be rearranged, among themselves"
        )
    return index


def edit_depth(blocks: Iterable[nn.Module], names: Iterable[str], depth: int, now: int, log: UndoLog) -> None:
    """Set the new depth in modules inside the blocks that keep it in an attribute of one of `names`."""
    if depth == now:
        return
    for block in blocks:
        for module in block.modules():
            attributes = vars(module)
            for name in names:
                if attributes.get(name) == depth:
                    log.set(attributes, name, now, f"{name} of {type(module).__name__}")


def _are_module_paths(values: Any) -> bool:
    """Return whether the values are module paths (PEFT keeps the paths that it wrapped), not properties of layers."""
    return all(isinstance(value, str) and "." in value for value in values)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _reorder_list(module: nn.Module, name: str, value: Any, depth: int, route: Route) -> Any:
    list_type: Callable[[Any], Any] = type(value)
    if list(value) == list(range(depth)):
        return list_type(range(len(route)))
    new = list_type(value[block] for block in route.blocks)
    if name not in LISTS and new != value and any(item != value[0] for item in value):
        raise UnsupportedEditError(
            f"{type(module).__name__}.{name} is a list of {depth} values for {depth} layers, but its meaning is "
            "unknown, so the layers cannot be rearranged"
        )
    return new


def parent_modules(model: nn.Module, block_list: BlockList) -> Iterator[nn.Module]:
    """Iterate over the modules that contain the list of blocks, from the model inwards."""
    yield model
    module = model
    for name in block_list.path.split(".")[:-1]:
        module = module.get_submodule(name)
        yield module


def edit_device_map(model: nn.Module, block_list: BlockList, route: Route, log: UndoLog) -> None:
    """Edit accelerate's map from the paths of the blocks to their devices."""
    names = block_list.path.split(".")
    for level, module in enumerate(parent_modules(model, block_list)):
        devices = vars(module).get("hf_device_map")
        if isinstance(devices, dict):
            block_path = re.compile(rf"{re.escape('.'.join(names[level:]))}\.(\d+)(.*)")
            moved: dict[str, Any] = {}
            for path, device in devices.items():
                match = block_path.fullmatch(path)
                positions = [
                    position for position, block in enumerate(route.blocks) if match and block == int(match[1])
                ]
                paths = [f"{path[: match.start(1)]}{position}{match[2]}" for position in positions] if match else [path]
                moved.update(dict.fromkeys(paths, device))
            log.set(vars(module), "hf_device_map", moved, "hf_device_map")
