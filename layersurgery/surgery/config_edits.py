"""Where a model remembers the position of its layers outside the list itself: in its modules and in its config object.

The row of the key-value cache that a block writes is `layer_idx`; which mask it gets, which cache class its row has and how many
rows there are is read off the config by position. All of them change together with the list, or generation with a cache is
silently wrong. Changes are kept in a log that undoes them exactly.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import UnsupportedEditError
from ..models.block_view import positions
from ..models.config_fields import DEPTH_FIELDS, INDEX_LISTS, LISTS, is_layerwise, rewrite_fields
from ..plans.route import Route

_BORDER = re.compile(r"(layer|block)_?(idx|index)$")
_MISSING = object()


class UndoLog:
    """Changes of attributes, to be undone in reverse. A value that somebody else changed since is noticed."""

    def __init__(self) -> None:
        self.changes: list[tuple[dict[str, Any], str, Any, Any, str]] = []

    def set(self, owner: dict[str, Any], name: str, value: Any, label: str) -> None:
        """Set a key of a dictionary (an object's attributes), and remember what was there."""
        # Noted before it is made, so that no interrupt can fall between.
        self.changes.append((owner, name, owner.get(name, _MISSING), value, label))
        owner[name] = value

    def changed_since(self) -> list[str]:
        """What no longer has the value that was set here."""
        latest = {(id(owner), name): (owner, name, value, label) for owner, name, _, value, label in self.changes}
        return [
            label for owner, name, value, label in latest.values()
            if owner.get(name, _MISSING) is not value and owner.get(name, _MISSING) != value
        ]  # fmt: skip

    def undo(self) -> None:
        """Put back the very objects that were there."""
        for owner, name, before, _, _ in reversed(self.changes):
            if before is _MISSING:
                owner.pop(name, None)
            else:
                owner[name] = before
        self.changes.clear()


def renumber_block(block: nn.Module, was: int, now: int, log: UndoLog | None = None) -> None:
    """Tell a block's modules their new position."""
    if was == now:
        return
    for attributes, name, value in list(positions(block)):
        if log is None:
            attributes[name] = value - was + now
        else:
            log.set(attributes, name, value - was + now, f"{name} of block {was}")


def edit_config(config: Any, depth: int, route: Route, log: UndoLog) -> None:
    """Give a decoder's config object the depth and the lists of the edited model.

    Raises:
        UnsupportedEditError: a field that cannot say the new order, by name; what was changed until then is in the log.
    """
    attributes = vars(config)
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()}
    rewritten = rewrite_fields(fields, depth, route, reloaded=False)
    derived = {
        name: value
        for name in sorted(LISTS - attributes.keys())
        if is_layerwise(name, value := _read(config, name), depth)
    }
    for name, value in rewritten.items():
        if value is not fields[name] and value != fields[name]:
            log.set(attributes, name, tuple(value) if isinstance(attributes[name], tuple) else value, f"config.{name}")
    field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for name in {field, *DEPTH_FIELDS}:
        if attributes.get(name) == depth and len(route) != depth:
            log.set(attributes, name, len(route), f"config.{name}")
    _edit_overrides(attributes, route, log)
    if config.num_hidden_layers != len(route):
        raise UnsupportedEditError(
            f"the config class {type(config).__name__} works out its number of layers itself and takes no other, so {route} cannot be said in it"
        )
    for name, value in rewrite_fields(derived, depth, route, reloaded=False).items():
        if list(_read(config, name) or []) != list(value):
            raise UnsupportedEditError(
                f"the config class {type(config).__name__} works out {name} from the positions of layers and takes no list instead, so {route} "
                "cannot be said in it, and the model reads it while it runs"
            )


def _read(config: Any, name: str) -> Any:
    try:
        value = getattr(config, name)
    except Exception:  # a field of other models, or one that differs by layer and refuses to be read as one
        return None
    return list(value) if isinstance(value, tuple) else value


def _edit_overrides(attributes: dict[str, Any], route: Route, log: UndoLog) -> None:
    """Fields that transformers keeps for single layers, beside the config's own."""
    spec = attributes.get("_heterogeneity_spec")
    overrides = getattr(spec, "per_layer_overrides", None)
    if overrides and dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        moved = {place: overrides[block] for place, block in enumerate(route.blocks) if block in overrides}
        log.set(
            attributes,
            "_heterogeneity_spec",
            dataclasses.replace(spec, per_layer_overrides=moved),
            "config.per_layer_config",
        )


def edit_parent_modules(modules: Iterator[nn.Module], depth: int, route: Route, log: UndoLog) -> None:
    """The same for what the modules above the blocks keep: the depth, and lists with one value per layer.

    Raises:
        UnsupportedEditError: a list as long as the model is deep of which it is not known what it means.
    """
    for module in modules:
        attributes = vars(module)
        for name, value in list(attributes.items()):
            if name in DEPTH_FIELDS and value == depth:
                log.set(attributes, name, len(route), f"{name} of {type(module).__name__}")
            elif type(value) is int and _BORDER.search(name):
                border = _border(module, name, value, depth, route)
                if border != value:
                    log.set(attributes, name, border, f"{name} of {type(module).__name__}")
            elif name in INDEX_LISTS and type(value) in (list, tuple, set, frozenset):
                new = type(value)(place for place, block in enumerate(route.blocks) if block in value)
                if new != value:
                    log.set(attributes, name, new, f"{name} of {type(module).__name__}")
            elif (
                type(value) in (list, tuple)
                and len(value) == depth
                and name[0] != "_"
                and all(map(_plain, value))
                and not _names(value)
            ):
                new = _moved(module, name, value, depth, route)
                if new != value:
                    log.set(attributes, name, new, f"{name} of {type(module).__name__}")


def _border(module: nn.Module, name: str, place: int, depth: int, route: Route) -> int:
    """Where a model above its blocks keeps the place at which layers of another kind begin; the depth, if none do."""
    if place == depth:
        return len(route)
    if 0 <= place < depth and (
        route.blocks[:place] != tuple(range(place))
        or any(block < place for block in route.blocks[place:])
        or len(route) <= place
    ):
        raise UnsupportedEditError(
            f"{type(module).__name__}.{name} = {place} names a place among the layers, and what it means is not known, so only layers behind it "
            "can be moved, among themselves"
        )
    return place


def edit_depth(blocks: Iterable[nn.Module], names: Iterable[str], depth: int, now: int, log: UndoLog) -> None:
    """Tell modules inside the blocks how many blocks there are, where they keep it under one of `names`."""
    if depth == now:
        return
    for block in blocks:
        for module in block.modules():
            attributes = vars(module)
            for name in names:
                if attributes.get(name) == depth:
                    log.set(attributes, name, now, f"{name} of {type(module).__name__}")


def _names(values: Any) -> bool:
    """Whether these are paths of modules (PEFT keeps those it has wrapped), and no facts on layers."""
    return all(isinstance(value, str) and "." in value for value in values)


def _plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _moved(module: nn.Module, name: str, value: Any, depth: int, route: Route) -> Any:
    kind: Callable[[Any], Any] = type(value)
    if list(value) == list(range(depth)):
        return kind(range(len(route)))
    new = kind(value[block] for block in route.blocks)
    if name not in LISTS and new != value and any(item != value[0] for item in value):
        raise UnsupportedEditError(
            f"{type(module).__name__}.{name} is a list of {depth} values for {depth} layers, and what it means is not known, so the layers "
            "cannot be moved"
        )
    return new
