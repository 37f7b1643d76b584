"""Multiply matrices with float32 sums, whatever the dtype of the factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


def matmul(
    x_TD: torch.Tensor,
    w_CD: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1,
) -> torch.Tensor:
    """Compute scale * (x w^T + bias), (tokens, C), with float32 sums and a float32 result, whatever the factors' dtype.

    Half-precision factors are passed to the matrix units unchanged, which is exact: only rounding the sums would lose
    digits.
    """
    same_dtype = x_TD.dtype == w_CD.dtype
    if same_dtype and x_TD.is_cuda and x_TD.dtype in (torch.bfloat16, torch.float16):
        sums = torch.mm(x_TD, w_CD.T, out_dtype=torch.float32)
        sums = sums if bias is None else sums.add_(bias)
        return sums if scale == 1 else sums.mul_(scale)
    x_TD, w_DC = x_TD.float(), w_CD.float().T
    # "medium" lets oneDNN round float32 factors to bfloat16, which is exact for values that were bfloat16 before.
    with (
        float32_products("medium")
        if same_dtype and w_CD.dtype == torch.bfloat16 and not w_CD.is_cuda
        else nullcontext()
    ):
        if bias is None and scale == 1:
            return x_TD @ w_DC
        addend = x_TD.new_zeros(1) if bias is None else bias.float()
        return torch.addmm(addend, x_TD, w_DC, beta=0 if bias is None else scale, alpha=scale)


def probability_times_weights(p_TC: torch.Tensor, w_CD: torch.Tensor) -> torch.Tensor:
    """Compute p w in float32, (T, D), for float32 probabilities p.

    Rounding p to half precision would change KL by thousandths of a nat. On CUDA, p is split into a sum of three
    half-precision numbers that represent it: three products on the matrix units, instead of one float32 product that is
    many times slower.
    """
    if not (w_CD.is_cuda and w_CD.dtype in (torch.bfloat16, torch.float16)):
        return p_TC @ w_CD.float()
    upscale = 2.0**14 if w_CD.dtype == torch.float16 else 1.0  # keeps small probabilities in float16's range
    rest, sums = p_TC * upscale, torch.zeros(len(p_TC), w_CD.shape[1], device=w_CD.device)
    for _ in range(3):
        half_part = rest.to(w_CD.dtype)
        sums += torch.mm(half_part, w_CD, out_dtype=torch.float32)
        rest -= half_part
    return sums.div_(upscale)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set torch's precision of float32 matrix products ("highest", "high" or "medium") inside the context."""
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        yield
    finally:
        torch.set_float32_matmul_precision(previous)
