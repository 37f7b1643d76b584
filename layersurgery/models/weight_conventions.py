"""What a norm does behind normalising: its scale and shift for each channel, and whether it takes the mean away. Found by running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .call_tracing import first_tensor

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True, slots=True)
class Gain:
    """A norm as the function scale * n(x) + shift, where n divides by the root of the mean square and may take the mean away before.

    Attributes:
        scale_D: float64, (width,).
        shift_D: float64, (width,).
        centres: whether the mean over channels is taken away (LayerNorm, not RMSNorm).
    """

    scale_D: torch.Tensor
    shift_D: torch.Tensor
    centres: bool


def gain_of(norm: nn.Module, width: int, like: torch.Tensor) -> Gain | None:
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
    best: tuple[float, Gain] | None = None
    for centres in (False, True):
        scale = (found - shift) / _normed(x, centres)
        wanted = scale * _normed(other, centres) + shift
        off = float((checked - wanted).abs().max() / wanted.abs().max())
        if off <= tolerance and (best is None or off < best[0]):
            best = off, Gain(scale, shift, centres)
    return None if best is None else best[1]


def _normed(x: torch.Tensor, centres: bool) -> torch.Tensor:
    x = x - x.mean() if centres else x
    return x / x.square().mean().sqrt()
