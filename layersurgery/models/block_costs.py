"""Count what the blocks of a model and their branches cost: parameters, multiplications and bytes of the cache.

Parameters are counted from the modules, and bytes of the key-value cache from the cache that the model fills. The
multiplications are an estimate: each number of a weight matrix is used once for each token (in a mixture of experts,
the share of the active ones), and softmax attention multiplies each query with the keys and its weights with the
values. Norms, activations, states of recurrent layers and the embeddings are not counted.

>>> from layersurgery.models.block_costs import PartCost
>>> attention = PartCost(parameters=40, matrices=40, scores=8, cache_bytes=16, window=None)
>>> attention.multiplications(context=3)  # a token attends to 1, 2 or 3 tokens
56.0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedEditError
from ..library_logs import quiet_libraries
from ..plans.visit import BRANCHES, Branch
from .anatomy import Anatomy
from .block_list import find_decoder_blocks, text_config
from .block_probe import probe_forward
from .call_tracing import eval_no_grad
from .quantized import quantized_numbers

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class PartCost:
    """Hold the cost of a block, or of one of its branches.

    Attributes:
        parameters: number of parameters.
        matrices: multiplications for each token with weights.
        scores: multiplications for each token and each token that it attends to.
        cache_bytes: bytes of keys and values for each token that the cache holds; NaN if they are not known.
        window: number of tokens that the attention reaches back and the cache holds; None for all.
    """

    parameters: int
    matrices: float
    scores: float = 0
    cache_bytes: float = 0
    window: int | None = None

    def multiplications(self, context: int) -> float:
        """Return the multiplications for each token, as a mean over a text of so many tokens."""
        reach = context if self.window is None else min(context, self.window)
        attended = (reach * (reach + 1) / 2 + (context - reach) * reach) / context
        return self.matrices + self.scores * attended

    def bytes_per_token(self, context: int) -> float:
        """Return the bytes of the cache after a text of so many tokens, divided by its tokens."""
        return self.cache_bytes * min(1.0, (context if self.window is None else self.window) / context)


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Hold the cost of a block and of its branches; a branch that the block does not have is not among them."""

    block: PartCost
    branches: dict[Branch, PartCost]


def block_costs(model: nn.Module, anatomy: Anatomy) -> list[BlockCost]:
    """Return the cost of every block of a loaded model.

    A branch has the parameters of its own modules. Norms before and after it are counted with the block only.
    """
    blocks = find_decoder_blocks(model, anatomy.blocks).blocks
    config, caches = text_config(model), _cache_costs(model, len(blocks))
    share = active_share(config)
    costs = []
    for number, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
        parts = anatomy.parts(number)
        branches = {
            branch: _weights(map(block.get_submodule, paths), share)
            for branch, paths in zip(BRANCHES, (parts.attention, parts.mlp), strict=True)
            if paths
        }
        if "attention" in branches:
            branches["attention"] = _with_cache(branches["attention"], cache, _heads(config, number))
        whole = _with_cache(_weights([block], share), cache, _heads(config, number))
        costs.append(BlockCost(whole, branches))
    return costs


def active_share(config: Any) -> float:
    """Return the share of the experts that a token uses; 1 for a model without experts."""
    experts = next((value for name in _EXPERTS if isinstance(value := getattr(config, name, None), int) and value), 1)
    return min(1.0, (getattr(config, "num_experts_per_tok", None) or experts) / experts)


def is_expert(name: str) -> bool:
    """Return whether a parameter belongs to experts that not every token uses, by its name."""
    return "experts" in name and "shared" not in name


def _weights(modules: Iterable[nn.Module], share: float) -> PartCost:
    """Return the cost of the weights of some modules of a block."""
    parameters, matrices = 0, 0.0
    seen: set[int] = set()
    for module in modules:
        quantized, packed = quantized_numbers(module)
        parameters += quantized - packed
        matrices += quantized - packed
        for name, parameter in module.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            parameters += parameter.numel()
            if parameter.dim() > 1:
                matrices += parameter.numel() * (share if is_expert(name) else 1)
    return PartCost(parameters, matrices)


def _heads(config: Any, block: int) -> int:
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, Sequence):
        heads = heads[block]
    return int(heads or 0)


@dataclass(frozen=True, slots=True)
class _Cache:
    """Hold the size of one layer of a key-value cache: bytes for each token, and the widths of a key and a value."""

    cache_bytes: float = 0
    key: int = 0
    value: int = 0
    heads: int = 0
    window: int | None = None


def _with_cache(cost: PartCost, cache: _Cache, heads: int) -> PartCost:
    scores = max(heads, cache.heads) * (cache.key + cache.value)
    return replace(cost, scores=scores, cache_bytes=cache.cache_bytes, window=cache.window)


def _cache_costs(model: nn.Module, depth: int) -> list[_Cache]:
    """Return the size of each layer of the cache that the model fills when it runs on a few tokens."""
    unknown = [_Cache(cache_bytes=float("nan"))] * depth
    try:
        with quiet_libraries(), eval_no_grad(model):  # some models warn about the name of what is read
            cache = getattr(probe_forward(model, use_cache=True), "past_key_values", None)
    except UnsupportedEditError:
        return unknown
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if layers is None or len(layers) != depth:
        return unknown
    return [_layer_size(layer) for layer in layers]


def _layer_size(layer: Any) -> _Cache:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or keys.ndim != 4:
        return _Cache()  # a state of one size, whatever the number of tokens
    sizes = [tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in (keys, values)]
    return _Cache(sum(sizes), keys.shape[3], values.shape[3], keys.shape[1], getattr(layer, "sliding_window", None))
