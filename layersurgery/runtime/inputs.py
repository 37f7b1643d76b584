"""What a model is given: token ids, and where some are padding, what it must be told of it."""

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
    """Token ids and their mask (1 for a token, 0 for padding), both (sequences, length), int64, in main memory.

    Raises:
        PlanError: another shape, or none of the positions has a next token.
    """
    try:
        ids = torch.as_tensor(tokens)
    except ValueError as error:
        raise PlanError(f"tokens must be sequences of one length; pad them and give a mask ({error})") from None
    mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask)
    if ids.dim() != 2 or mask.shape != ids.shape:
        raise PlanError(
            f"tokens have the shape (sequences, length), and a mask the same; found {tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    if not bool(has_next_token(mask).any()):
        raise PlanError("no position has a next token: give sequences of at least two tokens")
    return ids.long().cpu(), mask.long().cpu()


def has_next_token(mask: torch.Tensor) -> torch.Tensor:
    """Positions that have a next token inside their sequence: (sequences, length - 1), of type bool."""
    return (mask[:, :-1] * mask[:, 1:]).bool()


def model_inputs(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments for one forward without a cache, on the device of the model's embedding."""
    inner = unwrap_transformers(model)
    place = inner.get_input_embeddings().weight.device
    device = torch.device("cpu") if place.type == "meta" else place
    given: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
    if getattr(text_config(model), "output_router_logits", False):
        given["output_router_logits"] = False  # they would be gathered from blocks that may stand aside
    if not bool(mask.all()):
        given["attention_mask"] = mask.to(device)
    if not bool(mask[:, 0].all()) and "position_ids" in signature(inner.forward).parameters:
        # Otherwise models with learned positions number the padding on the left, too.
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
    return given
