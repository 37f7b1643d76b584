"""Find how weights are laid out: a norm's scale and shift, and the dimensions of a projection's weight.

A norm is identified by running it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UnsupportedEditError, is_out_of_memory
from .call_tracing import first_tensor
from .numerics import relative_error, tolerance
from .quantized import is_quantized, quantized_rows


@dataclass(frozen=True, slots=True)
class NormAffine:
    """A norm as the function scale * n(x) + shift; n divides by the root mean square, and may subtract the mean first.

    Attributes:
        scale_D: float64, (width,).
        shift_D: float64, (width,).
        subtracts_mean: whether n subtracts the mean over channels (LayerNorm, not RMSNorm).
    """

    scale_D: torch.Tensor
    shift_D: torch.Tensor
    subtracts_mean: bool


def fit_norm(norm: nn.Module, width: int, like: torch.Tensor) -> NormAffine | None:
    """Return the scale and shift of a norm; None if it is neither a LayerNorm nor an RMSNorm.

    Args:
        norm: the norm, in evaluation mode.
        width: width of its input.
        like: a tensor with the dtype and device to run the norm with.
    """

    def run(x: torch.Tensor) -> torch.Tensor:
        batch = x.to(like.device, like.dtype)[None]
        output = first_tensor(norm(batch))
        if output is None or output.shape != batch.shape:
            raise ValueError
        return output[0].double().cpu()

    # The inputs are far from zero and from their mean, so that no divisor is tiny, and large, so that epsilon does not
    # matter. Their mean is much larger still, so that subtracting it makes a clear difference even in half precision,
    # at any width.
    noise = torch.randn(2, width, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x, other = (1024 + noise.sign() * (noise.abs() + 0.5) * 64).to(like.dtype).double()
    with torch.no_grad():
        try:
            shift = run(torch.zeros(1, width, dtype=torch.float64))[0]
            output_x, output_other = run(x[None])[0], run(other[None])[0]
        except Exception as raised:  # a module may raise anything on what it does not expect
            if is_out_of_memory(raised):
                raise
            return None
    best: tuple[float, NormAffine] | None = None
    for centres in (False, True):
        scale = (output_x - shift) / _normalize(x, centres)
        error = relative_error(output_other, scale * _normalize(other, centres) + shift)
        if error <= tolerance("fit", like.dtype) and (best is None or error < best[0]):
            best = error, NormAffine(scale, shift, centres)
    return None if best is None else best[1]


def _normalize(x: torch.Tensor, centres: bool) -> torch.Tensor:
    """Divide by the root mean square, after subtracting the mean if the norm does."""
    x = x - x.mean() if centres else x
    return x / x.square().mean().sqrt()


def output_dim(module: nn.Module, name: str, width: int) -> int:
    """Return the dimension along which a projection's weight writes the residual stream.

    The other dimensions are neurons (and experts).

    Args:
        module: the module that holds the weight.
        name: the parameter's name in the module.
        width: width of the stream.

    Raises:
        UnsupportedEditError: the dimension cannot be determined.
    """
    return _find_dim(module, name, width, linear=0)


def input_dim(module: nn.Module, name: str, width: int) -> int:
    """Return the dimension along which a weight reads an input as wide as the residual stream.

    Raises:
        UnsupportedEditError: the dimension cannot be determined.
    """
    return _find_dim(module, name, width, linear=1)


def _find_dim(module: nn.Module, name: str, width: int, linear: int) -> int:
    """Return the wanted dimension; `linear` is its index in an nn.Linear, (outputs, inputs)."""
    shape = tuple(getattr(module, name).shape)
    first = len(shape) - 2  # experts come before
    dims = [dim for dim in (first, first + 1) if dim >= 0 and shape[dim] == width]
    if not dims:
        raise UnsupportedEditError(
            f"{name} of {type(module).__name__}, of shape {shape}, has no dimension of the stream's width {width}"
        )
    if len(dims) == 1:
        return dims[0]
    # The weight has as many inputs as outputs.
    class_name = type(module).__name__
    is_transposed = getattr(module, "is_transposed", None)
    if isinstance(module, nn.Linear) or is_transposed is False:
        return first + linear
    if class_name == "Conv1D" or is_transposed is True:
        return first + 1 - linear
    raise UnsupportedEditError(
        f"{name} of {class_name}, of shape {shape}, may be transposed or not: its layout is unknown"
    )


def output_weight_rows(module: nn.Module, name: str, width: int, most: int) -> Iterator[torch.Tensor]:
    """Return a projection's weight with one row for each neuron, at most `most` neurons at a time, (neurons, width).

    Experts follow one after another.

    Raises:
        UnsupportedEditError: the weight's layout is unknown.
    """
    if is_quantized(module):
        yield from quantized_rows(module, most)
        return
    weight: torch.Tensor = getattr(module, name).detach()
    rows = weight.movedim(output_dim(module, name, width), -1)
    for expert in rows if rows.dim() == 3 else (rows,):
        yield from torch.split(expert, most)
