"""Remember the modules, parameters and settings of a model, to restore them after another program has replaced them."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModuleTree:
    """Record the modules, parameters and config objects of a model as they are now."""

    def __init__(self, model: nn.Module) -> None:
        dictionaries: dict[int, dict[str, Any]] = {}
        for module in model.modules():
            for dictionary in (module._modules, module._parameters, module._buffers):
                dictionaries[id(dictionary)] = dictionary
            config = vars(module).get("config")
            if hasattr(config, "get_text_config"):
                dictionaries[id(vars(config))] = vars(config)
        self._contents = [(dictionary, dict(dictionary)) for dictionary in dictionaries.values()]

    def restore(self) -> None:
        """Put the same objects back in their places."""
        for dictionary, before in self._contents:
            dictionary.clear()
            dictionary.update(before)
