"""What a norm does behind normalising: its scale and shift for each channel, and whether it takes the mean away. Found by running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UnsupportedEditError
from .call_tracing import first_tensor

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True, slots=True)
class NormAffine:
    """A norm as the function scale * n(x) + shift, where n divides by the root of the mean square and may take the mean away before.

    Attributes:
        scale_D: float64, (width,).
        shift_D: float64, (width,).
        centres: whether the mean over channels is taken away (LayerNorm, not RMSNorm).
    """

    scale_D: torch.Tensor
    shift_D: torch.Tensor
    centres: bool


def fit_norm(norm: nn.Module, width: int, like: torch.Tensor) -> NormAffine | None:
    """Scale and shift of a norm; None where it is another function than LayerNorm or RMSNorm.

    Args:
        norm: in evaluation mode.
        width: of what it is given.
        like: a tensor of the dtype and on the device that it is to be run on.
    """

    def run(x: torch.Tensor) -> torch.Tensor:
        given = x.to(like.device, like.dtype)[None]
        output = first_tensor(norm(given))
        if output is None or output.shape != given.shape:
            raise ValueError
        return output[0].double().cpu()

    # Away from zero and from their mean, so that nothing is divided by next to nothing; large, so that no epsilon counts; with a mean that
    # is much larger still, so that taking it away or not cannot be confused in half precision, however wide the model is.
    drawn = torch.randn(2, width, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x, other = (1024 + drawn.sign() * (drawn.abs() + 0.5) * 64).to(like.dtype).double()
    tolerance = _TOLERANCE.get(like.dtype, 4e-2)
    with torch.no_grad():
        try:
            shift = run(torch.zeros(1, width, dtype=torch.float64))[0]
            found, checked = run(x[None])[0], run(other[None])[0]
        except Exception:  # a module may raise anything on what it does not expect
            return None
    best: tuple[float, NormAffine] | None = None
    for centres in (False, True):
        scale = (found - shift) / _normed(x, centres)
        wanted = scale * _normed(other, centres) + shift
        off = float((checked - wanted).abs().max() / wanted.abs().max())
        if off <= tolerance and (best is None or off < best[0]):
            best = off, NormAffine(scale, shift, centres)
    return None if best is None else best[1]


def _normed(x: torch.Tensor, centres: bool) -> torch.Tensor:
    x = x - x.mean() if centres else x
    return x / x.square().mean().sqrt()


def output_dim(module: nn.Module, name: str, width: int) -> int:
    """The dimension along which a weight of a projection writes the residual stream; the others are neurons (and experts).

    Args:
        module: that holds it.
        name: the parameter's name in the module.
        width: of the stream.

    Raises:
        UnsupportedEditError: it cannot be told.
    """
    return _dim(module, name, width, linear=0)


def input_dim(module: nn.Module, name: str, width: int) -> int:
    """The dimension along which a weight reads something as wide as the residual stream.

    Raises:
        UnsupportedEditError: it cannot be told.
    """
    return _dim(module, name, width, linear=1)


def _dim(module: nn.Module, name: str, width: int, linear: int) -> int:
    """`linear` is the dimension it has in an nn.Linear, (outputs, inputs)."""
    shape = tuple(getattr(module, name).shape)
    first = len(shape) - 2  # experts come before
    places = [place for place in (first, first + 1) if place >= 0 and shape[place] == width]
    if not places:
        raise UnsupportedEditError(
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
    raise UnsupportedEditError(f"{name} of {kind}, of shape {shape}, may lie either way round")


def output_weight_rows(module: nn.Module, name: str, width: int, most: int) -> Iterator[torch.Tensor]:
    """A projection's weight with a row for each neuron, up to `most` neurons at a time, (neurons, width); experts one after another.

    Raises:
        UnsupportedEditError: it cannot be told which way round it lies.
    """
    weight: torch.Tensor = getattr(module, name).detach()
    wide = weight.movedim(output_dim(module, name, width), -1)
    for expert in wide if wide.dim() == 3 else (wide,):
        yield from torch.split(expert, most)
