"""Silencing a branch in a checkpoint: which tensors of the files to zero, and proof that zeroing them is what was meant.

The names come from the model that transformers would build. Which parameters they are is found, and shown to be right, by running
a single block of it with random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..models.anatomy import record_block
from ..models.block_list import find_block_list
from ..models.block_parts import BlockParts, find_block_parts
from ..models.config_fields import DecoderSection, Json, find_section, rewrite
from ..models.meta_model import build_meta_model, load_hf_config, silence_transformers, write_derived_fields
from ..plans.edits import Branch
from ..plans.route import Route
from .tensor_index import BlockPrefix
from .tensor_names import TensorNames, match_names

# A block above this many parameters is run in bfloat16, and above the second not at all.
_FLOAT32_LIMIT = 500_000_000
_RUN_LIMIT = 4_000_000_000
_TINY_VOCABULARY = 256


def tensors_to_zero(
    config: Json, section: DecoderSection, prefix: BlockPrefix, names: Iterable[str], route: Route
) -> dict[int, frozenset[str]]:
    """Names, within the block, of the tensors to zero at each position of the route where a branch is skipped.

    Args:
        config: the source's config.json.
        section: its part on the decoder.
        prefix: where the blocks are among the names.
        names: the names of the source's tensors.
        route: the source's blocks in their new order.

    Raises:
        UnsupportedEditError: they are not known, share a tensor with other weights, or do not behave as they should.
    """
    skipping = {place: visit for place, visit in enumerate(route) if not visit.whole}
    if not skipping:
        return {}
    model = build_meta_model(config)
    found = find_block_list(model, section.depth)
    naming = match_names(model, found.path, prefix, names)
    tried: dict[object, BlockParts] = {}
    silent: dict[int, frozenset[str]] = {}
    for place, visit in skipping.items():
        module = found.blocks[visit.block]
        kind = _kind(module)
        if kind not in tried:
            tried[kind] = _probed_parts(config, section, visit.block, module)
        part: Branch = "attention" if visit.mlp else "mlp"
        silent[place] = frozenset(_tensors(naming, visit.block, module, part, tried[kind]))
    return silent


def _tensors(naming: TensorNames, block: int, module: nn.Module, part: Branch, parts: BlockParts) -> list[str]:
    stubs = parts.skips(part)
    if not stubs:
        raise UnsupportedEditError(
            f"block {block} ({type(module).__name__}) has no {part} that could be skipped; drop it instead"
        )
    if not all(stub.savable for stub in stubs):
        raise UnsupportedEditError(
            f"block {block} ({type(module).__name__}): which weights write its {part} into the residual stream could not be told; "
            "skipping is not supported for this architecture"
        )
    found: list[str] = []
    for parameter in parts.outputs(part):
        names = naming.names(block, parameter)
        if not names:
            raise UnsupportedEditError(
                f"block {block}: no tensor of the checkpoint holds {parameter}, the output of its {part}, and nothing else; skipping is "
                "not supported for this architecture"
            )
        found += names
    return found


def _probed_parts(config: Json, section: DecoderSection, block: int, meant: nn.Module) -> BlockParts:
    """The parts of a block, found by running one of its architecture with random weights."""
    name = f"block {block} ({type(meant).__name__})"
    with torch.no_grad(), silence_transformers():
        model, place = _single_block(config, section, block, meant)
        blocks = find_block_list(model, model.config.num_hidden_layers, type(meant)).blocks
        parts = find_block_parts(blocks[place], record_block(model, blocks, place))
    if parts.fault:
        raise UnsupportedEditError(f"no branch of {name} can be skipped: {parts.fault}")
    return parts


def _kind(module: nn.Module) -> tuple[object, ...]:
    return (type(module), tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters()))


def _single_block(config: Json, section: DecoderSection, block: int, meant: nn.Module) -> tuple[Any, int]:
    """A model of the same classes and widths, of one block and a small vocabulary, with random weights; where that block stands.

    Where the config cannot say a single block, the blocks before it stay.
    """
    from transformers import AutoModelForCausalLM

    text = copy.deepcopy(section.of(config))
    text.setdefault("model_type", config.get("model_type"))
    text |= {"vocab_size": _TINY_VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    alone = find_section(text, section.depth_fields[0])
    why = "its config cannot say this block alone"
    for route in (Route([block]), Route(range(block + 1)), Route.identity(section.depth)):
        try:
            smaller = load_hf_config(write_derived_fields(text, rewrite(text, alone, route), alone, route))
        except UnsupportedEditError as error:
            why = str(error)
            continue
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(smaller)
        place = route.blocks.index(block)
        if _kind(find_block_list(empty, len(route), type(meant)).blocks[place]) != _kind(meant):
            continue
        size = sum(parameter.numel() for parameter in empty.parameters())
        if size > _RUN_LIMIT:
            why = f"it would take {size / 1e9:.1f} billion parameters"
            continue
        model = AutoModelForCausalLM.from_config(
            smaller, dtype=torch.bfloat16 if size > _FLOAT32_LIMIT else torch.float32
        )
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval(), place
    raise UnsupportedEditError(f"block {block} cannot be tried out, so no branch of it is skipped: {why}")
