"""Compute what an edited model must return: call each block with the arguments that it gets in the unedited model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layersurgery.models.block_list import find_block_list
from layersurgery.plans.route import Route

_DEPTHS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")


class _Recorder(nn.Module):
    """Module that runs a block and records its arguments."""

    def __init__(self, block: nn.Module, calls: list[Any]) -> None:
        super().__init__()
        self.block, self.calls = block, calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.block(*args, **kwargs)


class _Replay(_Recorder):
    """Module that runs a block and replaces its output with a given value."""

    def __init__(self, block: nn.Module, value: torch.Tensor) -> None:
        super().__init__(block, [])
        self.value = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        return type(output)([self.value, *output[1:]]) if isinstance(output, tuple | list) else self.value


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the model's logits without cache: (batch, length, vocabulary)."""
    logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits


@torch.no_grad()
def logits_along(model: Any, route: Route, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the model with its blocks run in the order of `route` (whole blocks only), without cache."""
    text = model.config.get_text_config(decoder=True)
    # A decoder that was taken out of an encoder-decoder has num_hidden_layers of the encoder.
    depth = next(getattr(text, name) for name in _DEPTHS if hasattr(text, name))
    blocks = find_block_list(model, depth).blocks
    originals = list(blocks)
    calls: list[Any] = []
    try:
        for position, block in enumerate(originals):
            blocks[position] = _Recorder(block, calls)
        model(ids, use_cache=False)
        first_args, first_kwargs = calls[0]
        stream = first_args[0] if first_args else first_kwargs["hidden_states"]
        for group in route.groups:
            given, stream = stream, None
            for visit in group:
                args, kwargs = calls[visit.block]
                output = originals[visit.block](*_replace_first(args, given), **_replace_keyword(kwargs, args, given))
                after = output[0] if isinstance(output, tuple | list) else output
                if len(group) == visit.divisor == 1:
                    stream = after
                else:
                    added = (after - given) / visit.divisor
                    stream = (
                        after
                        if stream is None and visit.divisor == 1
                        else added + (given if stream is None else stream)
                    )
        for position, block in enumerate(originals):
            blocks[position] = _Replay(block, stream)
        return logits_of(model, ids)
    finally:
        for position, block in enumerate(originals):
            blocks[position] = block


def _replace_first(args: tuple[Any, ...], stream: torch.Tensor) -> tuple[Any, ...]:
    return (stream.clone(), *args[1:]) if args else ()


def _replace_keyword(kwargs: dict[str, Any], args: tuple[Any, ...], stream: torch.Tensor) -> dict[str, Any]:
    return kwargs if args else {**kwargs, "hidden_states": stream.clone()}
