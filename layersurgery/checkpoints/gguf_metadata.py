"""Rewrite the metadata of a GGUF file for a route, or refuse what it cannot say. Plain values in and out; no gguf.

llama.cpp takes much of a model from its metadata, and some of it from its own source code: the kinds of layers by their
position, and constants by the number of layers. So the architectures whose loaders are known are listed here, and all
others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SourceError, UnsupportedEditError
from ..plans.route import Route

# Architectures for which llama.cpp treats all layers alike, except for what arrays and counts of the file say.
_UNIFORM = frozenset(
    [
        "bloom",
        "command-r",
        "falcon",
        "gemma",
        "glm4moe",
        "gpt2",
        "gptneox",
        "granite",
        "internlm2",
        "llama",
        "nemotron",
        "olmo",
        "phi2",
        "qwen2",
        "qwen2moe",
        "qwen3",
        "qwen3moe",
        "stablelm",
        "starcoder2",
    ]
)
# Architectures for which llama.cpp takes the last of every so many layers for one of another kind: with full attention,
# or without rotary embedding. Some of its versions read the number from the file if it is there; none reads an array.
_PERIODS: Mapping[str, int] = {"cohere2": 4, "gemma2": 2, "gemma3": 6, "gpt-oss": 2, "olmo2": 4, "smollm3": 4}
# Depths by which llama.cpp recognizes the size of a model, and chooses another scale of its attention.
_DEPTHS_WITH_A_SCALE: Mapping[str, int] = {"gemma2": 46, "gemma3": 62}
# Depths from which on llama.cpp takes a model for the larger one of its family, whose queries and keys have norms.
_DEPTHS_WITH_NORMS: Mapping[str, int] = {"command-r": 64}
# Architectures that normalize what a branch returns before it is added. Others use the same names for other norms.
POST_NORMED = frozenset(("gemma2", "gemma3", "olmo2"))

# One value per layer, where the value is an array.
_LAYER_ARRAYS = frozenset(
    [
        "attention.head_count",
        "attention.head_count_kv",
        "attention.sliding_window_pattern",
        "feed_forward_length",
        "swiglu_clamp_exp",
        "swiglu_clamp_shexp",
    ]
)
# These may have one entry for each layer only by accident.
_NOT_PER_LAYER = re.compile(r"rope\.(dimension_sections|scaling\..*)|classifier\..*")
# Numbers from which the kind of each position follows; any other number that counts layers is refused.
_COUNTED = frozenset(("block_count", "leading_dense_block_count", "nextn_predict_layers"))
_POSITIONAL = frozenset(("full_attention_interval", "interleave_moe_layer_step", "moe_every_n_layers"))
_COUNTS_LAYERS = re.compile(r"layer(?!_?norm)|block", re.IGNORECASE)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """How many blocks of which kind a file has.

    Attributes:
        depth: number of blocks that the decoder runs.
        extra: number of blocks behind them that predict further tokens.
    """

    depth: int
    extra: int


def split_block(name: str) -> tuple[int, str] | None:
    """Split the name of a block's tensor into the number of the block and the rest; None for other tensors.

    >>> from layersurgery.checkpoints.gguf_metadata import split_block
    >>> split_block("blk.12.attn_q.weight")
    (12, 'attn_q.weight')
    """
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def count_blocks(metadata: Mapping[str, Any], arch: str) -> BlockCounts:
    """Return the numbers of blocks that the metadata states.

    Raises:
        SourceError: the number is missing, or is not a positive whole number.
    """
    count = metadata.get(f"{arch}.block_count")
    extra = metadata.get(f"{arch}.nextn_predict_layers", 0)
    if type(count) is not int or type(extra) is not int or not 0 <= extra < count:
        raise SourceError(
            f"the file has {arch}.block_count = {count!r} and {extra!r} of them predict further tokens; both should be "
            "whole numbers, and at least one block should remain"
        )
    return BlockCounts(count - extra, extra)


def check_architecture(arch: str) -> None:
    """Refuse an architecture of which it is not known how llama.cpp reads its layers.

    Raises:
        UnsupportedEditError: it is not known.
    """
    if arch not in _UNIFORM and arch not in _PERIODS:
        raise UnsupportedEditError(
            f"a GGUF file of the architecture {arch!r} is not edited: it is not known whether llama.cpp takes the "
            f"kinds of its layers from their positions. Known are {', '.join(sorted(_UNIFORM | _PERIODS.keys()))}; "
            "edit the safetensors checkpoint, and convert that"
        )


def layer_period(metadata: Mapping[str, Any], arch: str) -> int | None:
    """Return after how many layers llama.cpp takes one for another kind; None if it treats all alike."""
    if arch == "olmo2" and not metadata.get("olmo2.attention.sliding_window"):  # OLMo 2, and not OLMo 3
        return None
    return _PERIODS.get(arch)


def rewrite_metadata(metadata: Mapping[str, Any], arch: str, route: Route) -> dict[str, Any]:
    """Return the values that an order of blocks changes, by key.

    Args:
        metadata: all values of the file, arrays as lists.
        arch: the architecture, `general.architecture`.
        route: the new order of blocks.

    Raises:
        UnsupportedEditError: llama.cpp would take the layers for others than they are, or a key cannot describe the
            new order; gives its name.
        SourceError: the number of blocks is missing.
    """
    counts = count_blocks(metadata, arch)
    check_architecture(arch)
    order = route.blocks
    if order == tuple(range(counts.depth)):
        return {}
    _check_depth(arch, counts.depth, len(order))
    if (known := layer_period(metadata, arch)) is not None:
        own = metadata.get(f"{arch}.attention.sliding_window_pattern")
        for period in {known, own if type(own) is int and own > 0 else known}:
            _check_period(arch, period, order)
    changed: dict[str, Any] = {f"{arch}.block_count": len(order) + counts.extra}
    for key, value in metadata.items():
        name = key.removeprefix(f"{arch}.")
        if name == key:
            continue
        if isinstance(value, list):
            new: Any = _reorder(key, name, value, counts, order)
        elif name == "leading_dense_block_count":
            new = _leading(key, value, order)
        else:
            _check_number(key, name, value, order, known=arch in _PERIODS)
            continue
        if new != value:
            changed[key] = new
    return changed


def _check_depth(arch: str, depth: int, new_depth: int) -> None:
    with_norms = _DEPTHS_WITH_NORMS.get(arch)
    if with_norms is not None and (depth < with_norms) != (new_depth < with_norms):
        raise UnsupportedEditError(
            f"llama.cpp expects norms of queries and keys in a {arch} of {with_norms} layers or more, and none in one "
            f"of fewer, so it cannot read a change from {depth} to {new_depth} blocks; stay on one side of {with_norms}"
        )
    special = _DEPTHS_WITH_A_SCALE.get(arch)
    if depth != new_depth and special in (depth, new_depth):
        raise UnsupportedEditError(
            f"llama.cpp recognizes the {arch} of {special} layers by that number and scales its attention otherwise, "
            f"so it would run another model after a change from {depth} to {new_depth} blocks; keep their number"
        )


def _check_period(arch: str, period: int, order: Sequence[int]) -> None:
    for position, block in enumerate(order):
        if (position + 1) % period == 0 and (block + 1) % period == 0:
            continue
        if (position + 1) % period and (block + 1) % period:
            continue
        raise UnsupportedEditError(
            f"llama.cpp takes the last of every {period} layers of {arch} for one of another kind, whatever the file "
            f"says, and this order puts block {block} at position {position}, where the other kind is. Move, drop or "
            f"repeat whole groups of {period} layers, or edit the safetensors checkpoint"
        )


def _reorder(key: str, name: str, value: list[Any], counts: BlockCounts, order: Sequence[int]) -> list[Any]:
    if name in _LAYER_ARRAYS:
        if len(value) != counts.depth + counts.extra:
            raise UnsupportedEditError(
                f"{key} has {len(value)} values for {counts.depth + counts.extra} blocks, so it is unclear which "
                "blocks they belong to"
            )
        return [value[block] for block in order] + value[counts.depth :]
    if len(value) in (counts.depth, counts.depth + counts.extra) and not _NOT_PER_LAYER.fullmatch(name):
        if [value[block] for block in order] != value[: counts.depth]:
            raise UnsupportedEditError(
                f"{key} is an array of {len(value)} values for {counts.depth} blocks, and its meaning is unknown; if "
                "it has one value per block, ask us to add it, and edit the safetensors checkpoint until then"
            )
    elif _COUNTS_LAYERS.search(name):
        raise UnsupportedEditError(
            f"{key} may name layers, and its meaning is unknown; edit the safetensors checkpoint"
        )
    return value


def _leading(key: str, count: int, order: Sequence[int]) -> int:
    """Return how many blocks at the start of the new order are of the leading kind."""
    leading = [block < count for block in order]
    if leading != sorted(leading, reverse=True):
        raise UnsupportedEditError(
            f"{key} = {count} says that the first {count} blocks have a dense MLP, and in this order they are not the "
            "first; keep them at the start"
        )
    return sum(leading)


def _check_number(key: str, name: str, value: Any, order: Sequence[int], *, known: bool) -> None:
    if type(value) is not int or value == 0 or name in _COUNTED:
        return
    if name == "attention.sliding_window_pattern" and known:  # already checked
        return
    if name in _POSITIONAL or name == "attention.sliding_window_pattern":
        if value > 1 and any(block % value != position % value for position, block in enumerate(order)):
            raise UnsupportedEditError(
                f"{key} = {value} gives each position of a period of {value} layers its kind, and this order breaks "
                f"the period; move, drop or repeat whole groups of {value} layers"
            )
    elif _COUNTS_LAYERS.search(name):
        raise UnsupportedEditError(
            f"{key} = {value} counts layers, and it is not known which; edit the safetensors checkpoint"
        )
