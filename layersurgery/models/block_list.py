"""Where a model keeps its decoder blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedEditError

_NOT_TEXT = re.compile(r"vision|visual|audio|image|video|speech|encoder|mtp|qformer|resampler", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BlockList:
    """The decoder blocks of a model: their dotted path and the `nn.ModuleList` itself."""

    path: str
    blocks: nn.ModuleList


def find_block_list(
    model: nn.Module, depth: int, kind: type[nn.Module] = nn.Module, *, path: str | None = None
) -> BlockList:
    """Find the list of decoder blocks: the outermost `nn.ModuleList` that is as long as the config says the model is deep.

    Args:
        model: a transformers model.
        depth: how many blocks it has.
        kind: a class that one of the blocks must have, where it is known.
        path: the list's own path, where it is known.

    Raises:
        UnsupportedEditError: none or several, with what was found.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
    if path is not None:
        # A wrapper's own prefix may be left out: "model.layers" in base_model.model.model.layers.
        named = [name for name in lists if name == path] or [name for name in lists if name.endswith(f".{path}")]
        if len(named) != 1 or len(lists[named[0]]) != depth:
            raise UnsupportedEditError(
                f"blocks={path!r} names no list of {depth} modules of {type(model).__name__} (module lists: {found})"
            )
        return BlockList(named[0], lists[named[0]])
    fitting = [
        name
        for name, module in lists.items()
        if len(module) == depth and any(isinstance(block, kind) for block in module)
    ]
    outer = [name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting)]
    if len(outer) > 1:
        outer = [name for name in outer if not _NOT_TEXT.search(name)] or outer
    if not outer:
        raise UnsupportedEditError(
            f"{type(model).__name__} has no list of {depth} modules, the number of layers its config gives (module lists: {found}), so its "
            "decoder blocks cannot be told"
        )
    if len(outer) > 1:
        raise UnsupportedEditError(
            f"{type(model).__name__} has {len(outer)} lists of {depth} modules that could be its decoder blocks: {', '.join(outer)}. Say which: "
            f'blocks="{outer[0]}"'
        )
    return BlockList(outer[0], lists[outer[0]])


def unwrap_transformers(model: nn.Module) -> Any:
    """The model itself, or, in a wrapper that passes nothing on (DDP), the model of transformers within.

    Raises:
        UnsupportedEditError: there is none.
    """
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "get_text_config"):
            return module
    raise UnsupportedEditError(
        f"{type(model).__name__} has no transformers config; only models of transformers can be operated on"
    )


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder.

    Raises:
        UnsupportedEditError: the model has none.
    """
    config = unwrap_transformers(model).config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedEditError(
            f"{type(model).__name__} is an encoder with a decoder, and an edit could not say which of the two it means; decoder-only models "
            "can be operated on"
        )
    return config.get_text_config(decoder=True)


def find_decoder_blocks(model: nn.Module, blocks: str | None = None) -> BlockList:
    """The decoder blocks of a loaded model, by its own config.

    Args:
        model: a transformers causal language model, or a wrapper around one (PEFT, DDP, torch.compile).
        blocks: path of the list of blocks, where it cannot be found.

    Raises:
        UnsupportedEditError: none or several lists that could be it.
    """
    depth = getattr(text_config(model), "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 1:
        raise UnsupportedEditError(
            f"the config of {type(model).__name__} gives no number of layers (num_hidden_layers is {depth!r})"
        )
    return find_block_list(model, depth, path=blocks)
