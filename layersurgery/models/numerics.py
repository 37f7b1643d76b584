"""Compare tensors up to rounding: one table of tolerances and two measures of difference, for all checks of models."""

from __future__ import annotations

from typing import Literal

import torch

Comparison = Literal["readout", "fit", "fold", "compile"]

# The largest relative difference that rounding explains, by what is compared and by dtype.
_TOLERANCES: dict[Comparison, dict[torch.dtype, float]] = {
    # Logits of the same product, summed in another order: in float32, also if the model is in float64.
    "readout": {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2},
    # The output of a module, and a function of its parts that should explain it. Parts may compute in float32.
    "fit": {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2},
    # Outputs before and after weights were changed and rounded again.
    "fold": {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2},
    # Outputs of a block and of its compiled form, which rounds in another order, or to TensorFloat-32.
    "compile": {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2},
}


def tolerance(comparison: Comparison, *dtypes: torch.dtype) -> float:
    """Return the largest relative difference that rounding explains; of several dtypes, the coarsest one counts."""
    by_dtype = _TOLERANCES[comparison]
    return max(by_dtype.get(dtype, by_dtype[torch.bfloat16]) for dtype in dtypes)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value of its row (of the last dimension).

    Returns:
        Infinity if the shapes differ. NaN, which is within no tolerance, if a difference is NaN.
    """
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.cpu().double(), expected.cpu().double()
    size = expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return float(((actual - expected).abs() / size).max())


def is_same_change(actual: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, tolerance: float) -> bool:
    """Check whether two residual streams agree, relative to how much `expected` differs from the stream before.

    What rounding the stream itself explains is allowed in addition.
    """
    difference, change, total = (part.float().norm() for part in (actual - expected, expected - before, expected))
    return bool(difference <= tolerance * change + 2 * torch.finfo(expected.dtype).eps * total)
