"""Products of matrices with sums in single precision, whatever the factors are in."""

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
    """scale * (x w^T + bias) with float32 sums and result, whatever dtype the factors have, (tokens, C).

    Half-precision factors go into the matrix units as they are, which is exact: what costs digits is rounding the sums.
    """
    both = x_TD.dtype == w_CD.dtype
    if both and x_TD.is_cuda and x_TD.dtype in (torch.bfloat16, torch.float16):
        sums = torch.mm(x_TD, w_CD.T, out_dtype=torch.float32)
        sums = sums if bias is None else sums.add_(bias)
        return sums if scale == 1 else sums.mul_(scale)
    x_TD, w_DC = x_TD.float(), w_CD.float().T
    # oneDNN rounds float32 factors to bfloat16 on the way in if it may: nothing is lost of numbers that were bfloat16 before.
    with float32_products("medium") if both and w_CD.dtype == torch.bfloat16 and not w_CD.is_cuda else nullcontext():
        if bias is None and scale == 1:
            return x_TD @ w_DC
        given = x_TD.new_zeros(1) if bias is None else bias.float()
        return torch.addmm(given, x_TD, w_DC, beta=0 if bias is None else scale, alpha=scale)


def probability_times_weights(p_TC: torch.Tensor, w_CD: torch.Tensor) -> torch.Tensor:
    """p w in float32, for probabilities p in float32, (T, D).

    Rounded to half precision, p would move KL by thousandths of a nat. On CUDA it goes into the matrix units as a sum of three numbers in
    half precision, which together hold it, at three products in place of one many times slower.
    """
    if not (w_CD.is_cuda and w_CD.dtype in (torch.bfloat16, torch.float16)):
        return p_TC @ w_CD.float()
    up = 2.0**14 if w_CD.dtype == torch.float16 else 1.0  # away from where float16 ends
    rest, sums = p_TC * up, torch.zeros(len(p_TC), w_CD.shape[1], device=w_CD.device)
    for _ in range(3):
        part = rest.to(w_CD.dtype)
        sums += torch.mm(part, w_CD, out_dtype=torch.float32)
        rest -= part
    return sums.div_(up)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, float32 matrices are multiplied with the precision that torch calls "highest", "high" or "medium"."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        yield
    finally:
        torch.set_float32_matmul_precision(before)
