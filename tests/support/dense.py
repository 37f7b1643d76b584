"""Compute the expected results of analyses in a dense way: forward hooks, eager attention matrices and loops."""

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


def _first_output(_args: Any, _kwargs: Any, output: Any) -> torch.Tensor:
    value: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return value


def _minus_argument(index: int) -> Pick:
    """Return a function that subtracts an argument, for modules that add the argument to their output."""
    return lambda args, kwargs, output: _first_output(args, kwargs, output) - args[index]


def _scaled_by(factor: float) -> Pick:
    return lambda args, kwargs, output: factor * _first_output(args, kwargs, output)


# Modules that return what attention and MLP add to the stream, found by reading each architecture's source.
BRANCH_MODULES: dict[str, tuple[list[tuple[str, Pick]], list[tuple[str, Pick]]]] = {
    "gpt2": ([("attn", _first_output)], [("mlp", _first_output)]),
    "gpt_neox": ([("attention", _first_output)], [("mlp", _first_output)]),
    "phi": ([("self_attn", _first_output)], [("mlp", _first_output)]),
    "llama": ([("self_attn", _first_output)], [("mlp", _first_output)]),
    "mistral": ([("self_attn", _first_output)], [("mlp", _first_output)]),
    "qwen2-listed": ([("self_attn", _first_output)], [("mlp", _first_output)]),
    "gemma2": ([("post_attention_layernorm", _first_output)], [("post_feedforward_layernorm", _first_output)]),
    "gemma3_text": ([("post_attention_layernorm", _first_output)], [("post_feedforward_layernorm", _first_output)]),
    "olmo2": ([("post_attention_layernorm", _first_output)], [("post_feedforward_layernorm", _first_output)]),
    "bloom": ([("self_attention", _minus_argument(1))], [("mlp", _minus_argument(1))]),
    "mpt": ([("attn", _first_output)], [("ffn", _minus_argument(1))]),
    "mixtral": ([("self_attn", _first_output)], [("mlp", _first_output)]),
    "granite": ([("self_attn", _scaled_by(0.3))], [("mlp", _scaled_by(0.3))]),
    "opt": ([("self_attn", _first_output)], [("fc2", _first_output)]),
    "falcon": ([("self_attention", _first_output)], [("mlp", _first_output)]),
    "gpt_oss": ([("self_attn", _first_output)], [("mlp", _first_output)]),
    "cohere": ([("self_attn", _first_output)], [("mlp", _first_output)]),
    "deepseek_v3": ([("self_attn", _first_output)], [("mlp", _first_output)]),
    "dbrx": ([("norm_attn_norm.attn", _first_output)], [("ffn", _first_output)]),
    "falcon_h1": ([("mamba", _first_output), ("self_attn", _first_output)], [("feed_forward", _first_output)]),
}
LAYER_NORM = {"gpt2", "gpt_neox", "phi", "bloom", "mpt", "opt", "falcon", "cohere", "dbrx"}
FIELDS: dict[str, dict[str, Any]] = {"granite": {"residual_multiplier": 0.3}}


def model_of(name: str) -> Any:
    """Return a tiny model, with residual multipliers if its architecture has them."""
    return tiny_model(name, **FIELDS.get(name, {}))


def blocks_of(model: Any) -> nn.ModuleList:
    """Return the list of a model's blocks."""
    return find_block_list(model, model.config.get_text_config(decoder=True).num_hidden_layers).blocks


@contextmanager
def hooked(model: Any, name: str) -> Iterator[dict[tuple[str, int], torch.Tensor]]:
    """Record, inside the context, what attention and MLP of each block add in forwards: float64, by (branch, block)."""
    added: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for number, block in enumerate(blocks_of(model)):
        for branch, modules in zip(("attention", "mlp"), BRANCH_MODULES[name], strict=True):
            for path, pick in modules:

                def record(
                    _m: Any, args: Any, kwargs: Any, output: Any, key: Any = (branch, number), pick: Pick = pick
                ) -> None:
                    value = pick(args, kwargs, output).detach().clone().double()
                    added[key] = added[key] + value if key in added else value

                handles.append(block.get_submodule(path).register_forward_hook(record, with_kwargs=True))
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def contributions(model: Any, name: str, ids: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """Return what attention, MLP and each block add in one forward: (batch, length, width), centered for LayerNorm."""
    batch, length = ids.shape
    with hooked(model, name) as added:
        model(ids, use_cache=False)
    sums = {key: value.view(batch, length, -1) for key, value in added.items()}
    for number in range(len(blocks_of(model))):
        sums["block", number] = sums["attention", number] + sums["mlp", number]
    if name in LAYER_NORM:
        sums = {key: value - value.mean(-1, keepdim=True) for key, value in sums.items()}
    return sums


@torch.no_grad()
def matrices(model: Any, ids: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """Return the attention matrices of all layers from eager attention: (batch, heads, length, length)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        attentions = model(ids, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return [matrix.double().numpy() for matrix in attentions if matrix is not None]


def previous_five(matrix: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the share of attention on the previous five tokens, at positions that have five, and the mean per pair."""
    batch, heads, length, _ = matrix.shape
    shares, pairs = [], []
    for sequence in range(batch):
        for head in range(heads):
            for t in range(length):
                if t >= 5:
                    shares.append(sum(matrix[sequence, head, t, t - k] for k in range(1, 6)))
                pairs += [matrix[sequence, head, t, t - k] for k in range(1, 6) if t - k >= 0]
    return float(np.mean(shares)), float(np.mean(pairs))
