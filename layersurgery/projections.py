"""Which way round a weight lies: along which of its dimensions it reads, and along which it writes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .errors import InexpressibleError


def writing_dim(module: nn.Module, name: str, width: int) -> int:
    """The dimension along which a weight of a projection writes the residual stream; the others are neurons (and experts).

    Args:
        module: that holds it.
        name: the parameter's name in the module.
        width: of the stream.

    Raises:
        InexpressibleError: it cannot be told.
    """
    return _dim(module, name, width, linear=0)


def reading_dim(module: nn.Module, name: str, width: int) -> int:
    """The dimension along which a weight reads something as wide as the residual stream.

    Raises:
        InexpressibleError: it cannot be told.
    """
    return _dim(module, name, width, linear=1)


def _dim(module: nn.Module, name: str, width: int, linear: int) -> int:
    """`linear` is the dimension it has in an nn.Linear, (outputs, inputs)."""
    shape = tuple(getattr(module, name).shape)
    first = len(shape) - 2  # experts come before
    places = [place for place in (first, first + 1) if place >= 0 and shape[place] == width]
    if not places:
        raise InexpressibleError(
            f"{name} of {type(module).__name__}, of shape {shape}, has no dimension of the stream's width {width}"
        )
    if len(places) == 1:
        return places[0]
    # As many inputs as outputs.
    kind = type(module).__name__
    turned = getattr(module, "is_transposed", None)
    if isinstance(module, nn.Linear) or turned is False:
        return first + linear
    if kind == "Conv1D" or turned is True:
        return first + 1 - linear
    raise InexpressibleError(f"{name} of {kind}, of shape {shape}, may lie either way round")


def written_rows(module: nn.Module, name: str, width: int, most: int) -> Iterator[torch.Tensor]:
    """A projection's weight with a row for each neuron, up to `most` neurons at a time, (neurons, width); experts one after another.

    Raises:
        InexpressibleError: it cannot be told which way round it lies.
    """
    weight: torch.Tensor = getattr(module, name).detach()
    wide = weight.movedim(writing_dim(module, name, width), -1)
    for expert in wide if wide.dim() == 3 else (wide,):
        yield from torch.split(expert, most)
