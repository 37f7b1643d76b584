"""Name the kind of each layer of a model that has layers of several kinds: full or sliding attention, mixture or not.

The names of mixers of tokens are those of the config, which tells layers apart that have the same modules. Where it has
none, and for MLPs, they come from the modules.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

from torch import nn

from .anatomy import Anatomy
from .block_list import find_decoder_blocks, text_config
from .config_fields import CYCLES

# Lists of the kinds of layers, by the names of their fields.
_MIXERS = ("layer_types", "layers_block_type", "block_types", "attention_layers")
_ROTARY = "no_rope_layers"  # 1 for a layer with a rotary embedding


def layer_kinds(model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """Return the kind of each layer in words; an empty tuple if all layers are of one kind.

    Args:
        model: a transformers causal language model, or a wrapper around one.
        anatomy: its anatomy.
    """
    config, blocks = text_config(model), find_decoder_blocks(model, anatomy.blocks).blocks
    names = (values for field in _MIXERS if (values := _values(config, field, len(blocks))))
    mixers = next(names, None) or [_classes(block, anatomy.parts(n).attention) for n, block in enumerate(blocks)]
    rotary = [f"{'' if uses else 'no '}rotary embedding" for uses in _values(config, _ROTARY, len(blocks)) or ()]
    mlps = [_mlp(block, anatomy.parts(number).mlp) for number, block in enumerate(blocks)]
    kinds: list[tuple[str, ...]] = [()] * len(blocks)
    for values in ([str(name).replace("_", " ") for name in mixers], rotary, mlps):
        finer = [(*kind, value) for kind, value in zip(kinds, values, strict=False)]
        if len(set(finer)) > len(set(kinds)):  # else it says nothing that the kinds do not say already
            kinds = finer
    return tuple(", ".join(filter(None, kind)) for kind in kinds) if len(set(kinds)) > 1 else ()


def _values(config: Any, field: str, depth: int) -> list[Any] | None:
    """Return a field's values for each layer; None if it has none."""
    values = getattr(config, field, None)
    if not isinstance(values, list | tuple) or not values:
        return None
    if field in CYCLES:
        return list(islice(cycle(values), depth))
    return list(values[:depth]) if len(values) >= depth else None


def _classes(block: nn.Module, paths: tuple[str, ...]) -> str:
    return " and ".join(dict.fromkeys(type(block.get_submodule(path)).__name__ for path in paths))


def _mlp(block: nn.Module, paths: tuple[str, ...]) -> str:
    """Say whether an MLP is a mixture of experts; empty for a block without an MLP."""
    names = [name for path in paths for name, _ in block.get_submodule(path).named_parameters(prefix=path)]
    return "" if not names else "experts" if any("expert" in name for name in names) else "dense MLP"
