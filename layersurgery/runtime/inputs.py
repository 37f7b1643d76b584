"""Prepare a model's inputs: token ids, and for padded batches an attention mask and position ids."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..models.block_list import text_config, unwrap_transformers


def as_tokens(
    tokens: torch.Tensor | Sequence[Sequence[int]], attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert token ids and their mask (1 for a token, 0 for padding) to int64 tensors on the CPU, (sequences, length).

    Raises:
        PlanError: the shapes are wrong, or no position has a next token.
    """
    try:
        ids = torch.as_tensor(tokens)
    except ValueError as error:
        raise PlanError(f"tokens must be sequences of one length; pad them and give a mask ({error})") from None
    mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask)
    if ids.dim() != 2 or mask.shape != ids.shape:
        raise PlanError(
            f"tokens and mask must have the same shape (sequences, length); found {tuple(ids.shape)} and "
            f"{tuple(mask.shape)}"
        )
    if not bool(has_next_token(mask).any()):
        raise PlanError("no position has a next token: give sequences of at least two tokens")
    return ids.long().cpu(), mask.long().cpu()


def has_next_token(mask: torch.Tensor) -> torch.Tensor:
    """Mark the positions that have a next token in their sequence: bool, (sequences, length - 1)."""
    return (mask[:, :-1] * mask[:, 1:]).bool()


def model_inputs(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments for one forward without a cache, on the device of the model's embedding."""
    inner = unwrap_transformers(model)
    embedding_device = inner.get_input_embeddings().weight.device
    device = torch.device("cpu") if embedding_device.type == "meta" else embedding_device
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
    if getattr(text_config(model), "output_router_logits", False):
        inputs["output_router_logits"] = False  # they would be collected from blocks that may be skipped
    if not bool(mask.all()):
        inputs["attention_mask"] = mask.to(device)
    if not bool(mask[:, 0].all()) and "position_ids" in signature(inner.forward).parameters:
        # Without position ids, models with learned positions would also count the padding on the left.
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
    return inputs
