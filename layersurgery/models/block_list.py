"""Find the list of decoder blocks in a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import PlanError, UnsupportedEditError
from .config_fields import depth_field, text_paths
from .other_wrappers import refuse_wrapper


@dataclass(frozen=True, slots=True)
class BlockList:
    """The decoder blocks of a model: the dotted path of the list, and the `nn.ModuleList` itself."""

    path: str
    blocks: nn.ModuleList


def find_block_list(
    model: nn.Module, depth: int, kind: type[nn.Module] = nn.Module, *, path: str | None = None
) -> BlockList:
    """Find the list of decoder blocks: the outermost `nn.ModuleList` as long as the number of layers in the config.

    Args:
        model: a transformers model.
        depth: number of blocks.
        kind: a class that at least one of the blocks must have, if it is known.
        path: path of the list, if it is known.

    Raises:
        UnsupportedEditError: no list fits, or several do; lists what was found.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    listed = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
    if path is not None:
        # The caller may omit a wrapper's prefix: "model.layers" also finds base_model.model.model.layers.
        matching = [name for name in lists if name == path] or [name for name in lists if name.endswith(f".{path}")]
        if len(matching) != 1 or len(lists[matching[0]]) != depth:
            raise UnsupportedEditError(
                f"blocks={path!r} is not the path of a list of {depth} modules of {type(model).__name__} "
                f"(module lists: {listed})"
            )
        return BlockList(matching[0], lists[matching[0]])
    candidates = [
        name
        for name, module in lists.items()
        if len(module) == depth and any(isinstance(block, kind) for block in module)
    ]
    outermost = [name for name in candidates if not any(name.startswith(f"{other}.") for other in candidates)]
    if len(outermost) > 1:
        outermost = text_paths(outermost) or outermost
    if not outermost:
        raise UnsupportedEditError(
            f"{type(model).__name__} has no list of {depth} modules, the number of layers in its config (module lists: "
            f"{listed}), so its decoder blocks cannot be found"
        )
    if len(outermost) > 1:
        raise UnsupportedEditError(
            f"{type(model).__name__} has {len(outermost)} lists of {depth} modules that could be its decoder blocks: "
            f"{', '.join(outermost)}. Choose one: "
            f'blocks="{outermost[0]}"'
        )
    return BlockList(outermost[0], lists[outermost[0]])


def require_model(model: object) -> None:
    """Refuse what is not a loaded model: its name, what `load` returns, a pipeline, or a wrapper of another program.

    Raises:
        PlanError: says how to load a model, or what to edit instead.
        UnsupportedEditError: TransformerLens has replaced modules of the model.
    """
    refuse_wrapper(model)
    if isinstance(model, nn.Module):
        return
    if isinstance(getattr(model, "model", None), nn.Module):  # what `load` returns, a pipeline, a trainer
        raise PlanError(f"expected a loaded model, not a {type(model).__name__}; give its attribute .model")
    is_name = isinstance(model, str | Path)
    what = repr(str(model)) if is_name else "a tuple" if isinstance(model, tuple) else f"a {type(model).__name__}"
    name = str(model) if is_name else "smollm2-135m"
    raise PlanError(f"expected a loaded model, not {what}; load one: model, tokenizer = layersurgery.load({name!r})")


def unwrap_transformers(model: nn.Module) -> Any:
    """Return the model itself, or the transformers model inside a wrapper that does not forward attributes (DDP).

    Raises:
        PlanError: this is not a loaded model.
        UnsupportedEditError: there is no transformers model.
    """
    require_model(model)
    for module in model.modules():
        # Modules inside a model, such as an attention, have its config, too.
        if hasattr(getattr(module, "config", None), "get_text_config") and hasattr(module, "get_input_embeddings"):
            return module
    raise UnsupportedEditError(
        f"{type(model).__name__} has no transformers config; only transformers models can be edited"
    )


def text_config(model: nn.Module) -> Any:
    """Return the config of the text decoder.

    Raises:
        UnsupportedEditError: the model is an encoder-decoder.
    """
    config = unwrap_transformers(model).config
    refuse_encoder_decoder(config, type(model).__name__)
    return config.get_text_config(decoder=True)


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Refuse a model that is an encoder and a decoder of text.

    Raises:
        UnsupportedEditError: the config says that it is one.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedEditError(
            f"{name} is an encoder-decoder model, and an edit cannot specify which of the two it changes; only "
            "decoder-only models can be edited"
        )


def find_decoder_blocks(model: nn.Module, blocks: str | None = None) -> BlockList:
    """Find the decoder blocks of a loaded model, using the depth in its config.

    Args:
        model: a transformers causal language model, or a wrapper around one (PEFT, DDP, torch.compile).
        blocks: path of the list of blocks, if it cannot be found automatically.

    Raises:
        UnsupportedEditError: no list could be the decoder blocks, or several could.
    """
    config = text_config(model)
    depth = getattr(config, name := depth_field(config), None)
    if not isinstance(depth, int) or depth < 1:
        raise UnsupportedEditError(
            f"the config of {type(model).__name__} does not give the number of layers ({name} is {depth!r})"
        )
    return find_block_list(model, depth, path=blocks)
