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
    ids = _as_tensor(tokens, "tokens must be sequences of one length; pad them and give a mask")
    mask = (
        torch.ones_like(ids) if attention_mask is None else _as_tensor(attention_mask, "a mask has the tokens' shape")
    )
    if ids.dim() != 2 or mask.shape != ids.shape:
        raise PlanError(
            f"tokens and mask must have the same shape (sequences, length); found {tuple(ids.shape)} and "
            f"{tuple(mask.shape)}"
        )
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise PlanError(f"token ids are whole numbers, not {str(ids.dtype).removeprefix('torch.')}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise PlanError("a mask is 1 for a token and 0 for padding, and this one holds other numbers")
    ids, mask = ids.long().cpu(), mask.long().cpu()
    if not bool(has_next_token(mask).any()):
        raise PlanError("no position has a next token: give sequences of at least two tokens")
    return ids, mask


def _as_tensor(numbers: Any, shape: str) -> torch.Tensor:
    """Convert numbers in any form to a tensor.

    Args:
        numbers: the numbers.
        shape: says which shape they should have, for errors.

    Raises:
        PlanError: they are not numbers, or their sequences have several lengths.
    """
    if isinstance(numbers, Sequence) and any(hasattr(row, "tolist") for row in numbers):
        numbers = [row.tolist() if hasattr(row, "tolist") else row for row in numbers]
    try:
        tensor = torch.as_tensor(numbers)
    except ValueError as error:
        raise PlanError(f"{shape} ({error})") from None
    except (TypeError, RuntimeError) as error:
        raise PlanError(f"tokens and masks are given as numbers, and these are not ({error})") from None
    if tensor.is_meta or tensor.layout != torch.strided:
        raise PlanError("tokens and masks are given as dense tensors with values, not as meta or sparse tensors")
    return tensor


def has_next_token(mask: torch.Tensor) -> torch.Tensor:
    """Mark the positions that have a next token in their sequence: bool, (sequences, length - 1)."""
    return (mask[:, :-1] * mask[:, 1:]).bool()


def model_inputs(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments for one forward without a cache, on the device of the model's embedding."""
    inputs = _input_ids(model, ids)
    device = inputs["input_ids"].device
    if not bool(mask.all()):
        inputs["attention_mask"] = mask.to(device)
    if not bool(mask[:, 0].all()) and takes_positions(model):
        # Without position ids, models with learned positions would also count the padding on the left.
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
    return inputs


def packed_inputs(
    model: nn.Module, ids: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor
) -> dict[str, Any]:
    """Return the keyword arguments for one forward of tokens that do not all see what is on their left.

    Args:
        model: a model whose forward takes position ids.
        ids: tokens, (sequences, length).
        positions: position of each token, the same shape.
        visible: True where a token (the second dimension) sees another one, (sequences, length, length).
    """
    inputs = _input_ids(model, ids)
    device, dtype = inputs["input_ids"].device, unwrap_transformers(model).get_input_embeddings().weight.dtype
    # Numbers to be added, since not every attention understands a mask of booleans.
    hidden = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    return {**inputs, "attention_mask": hidden[:, None].to(device), "position_ids": positions.to(device)}


def takes_positions(model: nn.Module) -> bool:
    """Return whether the model's forward takes position ids."""
    return "position_ids" in signature(unwrap_transformers(model).forward).parameters


def _input_ids(model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    embedding_device = unwrap_transformers(model).get_input_embeddings().weight.device
    device = torch.device("cpu") if embedding_device.type == "meta" else embedding_device
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
    if getattr(text_config(model), "output_router_logits", False):
        inputs["output_router_logits"] = False  # they would be collected from blocks that may be skipped
    return inputs
