"""Check that the settings of PEFT adapters name the same layers after an edit, and no base that is not edited.

PEFT saves an adapter with its settings, and places it by them when it is loaded. A setting that names layers
(`layers_to_transform`, a pattern with a number in it) would place it on other blocks of the edited model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import UnsupportedEditError, warn
from ..models.block_list import find_decoder_blocks
from ..plans.route import Route
from .live_check import path_inside, transformers_model

# Adapters that are keys and values in front of those of the text.
_PREFIXES = frozenset(("PREFIX_TUNING", "CARTRIDGE"))
_NAMES_MODULES = re.compile(r"_(modules|parameters|pattern)$|^modules_to_save$")


def check_adapter_settings(model: nn.Module, route: Route, path: str | None = None) -> None:
    """Refuse an edit after which a setting of an adapter would mean other blocks.

    Args:
        model: the edited model, with its adapters.
        route: the edit.
        path: path of the list of blocks, if it cannot be found automatically.

    Raises:
        UnsupportedEditError: there is such a setting. The error names it.
    """
    settings = [*_settings(model)]
    if not settings:
        return
    block_list = find_decoder_blocks(
        transformers_model(model), path_inside(model, path)
    )  # PEFT names modules from there
    paths = sorted({path for block in block_list.blocks for path, _ in block.named_modules()})
    for name, value in settings:
        for position, block in enumerate(route.blocks):
            if any(
                _answer(name, value, block_list.path, position, path)
                != _answer(name, value, block_list.path, block, path)
                for path in (paths if position != block else ())
            ):
                raise UnsupportedEditError(
                    f"the PEFT setting {name} = {value!r} names layers, and after {route} it would not mean the blocks "
                    "that have the adapter, so a saved adapter would be loaded onto other layers; merge the adapter "
                    "first (merge_and_unload), add it after the edit, or edit only temporarily (operate)"
                )


def refuse_prefixes(model: nn.Module, depth: int, route: Route) -> None:
    """Refuse to move blocks of a model with a prefix, whose keys and values PEFT keeps by position.

    A block that moves would attend to the prefix of another.

    Raises:
        UnsupportedEditError: there is such an adapter. The error names it.
    """
    if route.blocks == tuple(range(depth)):
        return
    for config in _configs(model):
        kind = getattr(config, "peft_type", None)
        if (name := str(getattr(kind, "value", kind))) in _PREFIXES:
            raise UnsupportedEditError(
                f"the PEFT adapter {name} gives each layer keys and values by its position, so after {route} blocks "
                "would get those of other blocks; edit the model without the adapter (get_base_model), and train the "
                "adapter on the edited model"
            )


def forget_base(model: nn.Module, depth: int, route: Route) -> None:
    """Remove the name of the model that was loaded, which PEFT saves as the base of an adapter.

    With that name, the adapter would be loaded onto the unedited model. The name in the config stays: pipelines find
    the tokenizer by it.
    """
    if route.is_identity(depth):
        return
    if vars(inner := transformers_model(model)).get("name_or_path"):
        inner.name_or_path = ""
    named = [config for config in _configs(model) if getattr(config, "base_model_name_or_path", None)]
    if named:
        warn(
            f"the adapter was made for {named[0].base_model_name_or_path}, which is not edited, so it no longer names "
            "a base; to load it, give PeftModel.from_pretrained the edited model, or save that (layersurgery.save) and "
            "set base_model_name_or_path in the adapter's settings"
        )
    for config in named:
        config.base_model_name_or_path = ""  # PEFT replaces None by the name in the model's config


def _configs(model: nn.Module) -> list[Any]:
    """Return the settings of all adapters."""
    # Of an adapter in front of the text, PEFT keeps the settings under the second name.
    names = ("peft_config", "_peft_config")
    settings = [vars(module).get(name) for module in model.modules() for name in names]
    return [config for configs in settings if isinstance(configs, dict) for config in configs.values()]


def _settings(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over the settings, of all adapters, that can name layers or modules."""
    for config in _configs(model):
        for name, value in vars(config).items():
            if value is not None and (
                name == "layers_to_transform" or (name != "layers_pattern" and _NAMES_MODULES.search(name))
            ):
                yield name, value


def _answer(name: str, value: Any, blocks: str, number: int, path: str) -> object:
    """Return what a setting says of a module of one layer, as PEFT reads it: a text is a pattern, a list has names."""
    if name == "layers_to_transform":
        return number in ([value] if isinstance(value, int) else value)
    module = f"{blocks}.{number}.{path}".rstrip(".")
    if isinstance(value, str):
        return re.fullmatch(value, module) is not None
    if isinstance(value, dict):
        return next((item for key, item in value.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    names = value if isinstance(value, list | tuple | set) else ()
    return any(module == item or module.endswith(f".{item}") for item in names)
