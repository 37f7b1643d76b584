"""What analyses must give, worked out the plain dense way: forward hooks, eager attention matrices, whole tensors of logits, loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from layersurgery.models.block_list import find_block_list
from tests.support.zoo import tiny_model

Pick = Callable[[tuple[Any, ...], dict[str, Any], Any], torch.Tensor]


def _first(_args: Any, _kwargs: Any, output: Any) -> torch.Tensor:
    value: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return value


def _beside(place: int) -> Pick:
    """The module adds one of its arguments itself."""
    return lambda args, kwargs, output: _first(args, kwargs, output) - args[place]


def _times(factor: float) -> Pick:
    return lambda args, kwargs, output: factor * _first(args, kwargs, output)


# Which module returns what attention and MLP add, written down by reading each architecture's source.
HAND: dict[str, tuple[list[tuple[str, Pick]], list[tuple[str, Pick]]]] = {
    "gpt2": ([("attn", _first)], [("mlp", _first)]),
    "gpt_neox": ([("attention", _first)], [("mlp", _first)]),
    "phi": ([("self_attn", _first)], [("mlp", _first)]),
    "llama": ([("self_attn", _first)], [("mlp", _first)]),
    "mistral": ([("self_attn", _first)], [("mlp", _first)]),
    "qwen2-listed": ([("self_attn", _first)], [("mlp", _first)]),
    "gemma2": ([("post_attention_layernorm", _first)], [("post_feedforward_layernorm", _first)]),
    "gemma3_text": ([("post_attention_layernorm", _first)], [("post_feedforward_layernorm", _first)]),
    "olmo2": ([("post_attention_layernorm", _first)], [("post_feedforward_layernorm", _first)]),
    "bloom": ([("self_attention", _beside(1))], [("mlp", _beside(1))]),
    "mpt": ([("attn", _first)], [("ffn", _beside(1))]),
    "mixtral": ([("self_attn", _first)], [("mlp", _first)]),
    "granite": ([("self_attn", _times(0.3))], [("mlp", _times(0.3))]),
    "opt": ([("self_attn", _first)], [("fc2", _first)]),
    "falcon": ([("self_attention", _first)], [("mlp", _first)]),
    "gpt_oss": ([("self_attn", _first)], [("mlp", _first)]),
    "cohere": ([("self_attn", _first)], [("mlp", _first)]),
    "deepseek_v3": ([("self_attn", _first)], [("mlp", _first)]),
    "dbrx": ([("norm_attn_norm.attn", _first)], [("ffn", _first)]),
    "falcon_h1": ([("mamba", _first), ("self_attn", _first)], [("feed_forward", _first)]),
}
LAYER_NORM = {"gpt2", "gpt_neox", "phi", "bloom", "mpt", "opt", "falcon", "cohere", "dbrx"}
FIELDS: dict[str, dict[str, Any]] = {"granite": {"residual_multiplier": 0.3}}


def model_of(name: str) -> Any:
    """A tiny model, with multipliers where its family has them."""
    return tiny_model(name, **FIELDS.get(name, {}))


def blocks_of(model: Any) -> nn.ModuleList:
    """Its blocks."""
    return find_block_list(model, model.config.get_text_config(decoder=True).num_hidden_layers).blocks


@contextmanager
def hooked(model: Any, name: str) -> Iterator[dict[tuple[str, int], torch.Tensor]]:
    """Inside, forwards note what attention, MLP and whole blocks add, by part and by the block's own number, float64."""
    seen: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for number, block in enumerate(blocks_of(model)):
        for part, places in zip(("attention", "mlp"), HAND[name], strict=True):
            for path, pick in places:

                def note(
                    _m: Any, args: Any, kwargs: Any, output: Any, key: Any = (part, number), pick: Pick = pick
                ) -> None:
                    value = pick(args, kwargs, output).detach().clone().double()
                    seen[key] = seen[key] + value if key in seen else value

                handles.append(block.get_submodule(path).register_forward_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def contributions(model: Any, name: str, ids: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """What each part of each block adds in one forward, centred for LayerNorm models: (batch, length, width)."""
    batch, length = ids.shape
    with hooked(model, name) as seen:
        model(ids, use_cache=False)
    found = {key: value.view(batch, length, -1) for key, value in seen.items()}
    for number in range(len(blocks_of(model))):
        found["block", number] = found["attention", number] + found["mlp", number]
    if name in LAYER_NORM:
        found = {key: value - value.mean(-1, keepdim=True) for key, value in found.items()}
    return found


@torch.no_grad()
def matrices(model: Any, ids: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """Attention matrices of all layers, by eager attention: (batch, heads, length, length)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        found = model(ids, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return [matrix.double().numpy() for matrix in found if matrix is not None]


def previous_five(matrix: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The share of attention on the previous five, over positions that have five; and the mean over all pairs."""
    batch, heads, length, _ = matrix.shape
    shares, pairs = [], []
    for one in range(batch):
        for head in range(heads):
            for t in range(length):
                if t >= 5:
                    shares.append(sum(matrix[one, head, t, t - k] for k in range(1, 6)))
                pairs += [matrix[one, head, t, t - k] for k in range(1, 6) if t - k >= 0]
    return float(np.mean(shares)), float(np.mean(pairs))
