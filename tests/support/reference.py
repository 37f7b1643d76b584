"""What an edited model must compute, worked out by hand: each block is called with the arguments it got at its own place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layersurgery.models.block_list import find_block_list
from layersurgery.plans.route import Route


class _Recorder(nn.Module):
    """Runs a block and keeps what it was given."""

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
    """Stands for a block and hands the stream on, or puts a given value in its place."""

    def __init__(self, block: nn.Module, value: torch.Tensor) -> None:
        super().__init__(block, [])
        self.value = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        return (self.value, *output[1:]) if isinstance(output, tuple) else self.value


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model as it is, without cache: (batch, length, vocabulary)."""
    logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits


@torch.no_grad()
def logits_along(model: Any, route: Route, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model's blocks run in the order of `route` (whole blocks only), without cache."""
    text = model.config.get_text_config(decoder=True)
    blocks = find_block_list(model, text.num_hidden_layers).blocks
    originals = list(blocks)
    calls: list[Any] = []
    try:
        for place, block in enumerate(originals):
            blocks[place] = _Recorder(block, calls)
        model(ids, use_cache=False)
        stream = None
        for visit in route:
            args, kwargs = calls[visit.block]
            if stream is None:
                first_args, first_kwargs = calls[0]
                stream = first_args[0] if first_args else first_kwargs["hidden_states"]
            output = originals[visit.block](*_with(args, stream), **_with_named(kwargs, args, stream))
            stream = output[0] if isinstance(output, tuple) else output
        assert stream is not None
        for place, block in enumerate(originals):
            blocks[place] = _Replay(block, stream)
        return logits_of(model, ids)
    finally:
        for place, block in enumerate(originals):
            blocks[place] = block


def _with(args: tuple[Any, ...], stream: torch.Tensor) -> tuple[Any, ...]:
    return (stream.clone(), *args[1:]) if args else ()


def _with_named(kwargs: dict[str, Any], args: tuple[Any, ...], stream: torch.Tensor) -> dict[str, Any]:
    return kwargs if args else {**kwargs, "hidden_states": stream.clone()}
