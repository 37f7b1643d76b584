"""Compute moments, over the whole vocabulary, of cosines between neurons' output weights and the unembedding.

Suffixes of names give shapes: N neurons, V vocabulary, D width. The mean is known in advance from the mean direction
of the unembedding, so central moments are summed tile by tile without the cancellation of raw moments. A neurons x
vocabulary tensor never exists.
"""

from __future__ import annotations

import torch

from ..runtime.float32_matmul import float32_products

NEURON_TILE, VOCAB_TILE = 512, 2048


def moments(w_ND: torch.Tensor, u_VD: torch.Tensor) -> torch.Tensor:
    """Compute mean, variance, skewness and kurtosis of each neuron's cosines with all rows of `u_VD`: float64, (4, N).

    Population moments (ddof 0), and Pearson's kurtosis (3 for a Gaussian), as `scipy.stats.skew(x)` and
    `scipy.stats.kurtosis(x, fisher=False)`. NaN for a neuron whose cosines are all equal, as in scipy.

    Args:
        w_ND: output weights, any dtype; a row of zeros has cosine 0 with every row.
        u_VD: rows of length 1 (see `unit_rows`), float32 or float64.
    """
    direction_D = torch.zeros(u_VD.shape[1], dtype=torch.float64, device=u_VD.device)
    for words in torch.split(u_VD, VOCAB_TILE):
        direction_D += words.double().sum(0)
    direction_D /= len(u_VD)
    with float32_products("highest"), torch.autocast(u_VD.device.type, enabled=False):
        return torch.cat(
            [
                _moments(unit_rows(part.to(u_VD.device, u_VD.dtype)), u_VD, direction_D)
                for part in torch.split(w_ND, NEURON_TILE)
            ],
            1,
        )


def _moments(w_ND: torch.Tensor, u_VD: torch.Tensor, direction_D: torch.Tensor) -> torch.Tensor:
    mean_N = w_ND.double() @ direction_D
    minus = -mean_N.to(u_VD.dtype)[:, None]
    sums = torch.zeros(4, len(w_ND), dtype=torch.float64, device=u_VD.device)
    for words in torch.split(u_VD, VOCAB_TILE):
        x = torch.addmm(minus, w_ND, words.T)
        square = x * x
        # The residual mean, from rounding.
        sums[0] += x.sum(1)
        sums[1] += square.sum(1)
        sums[2] += x.mul_(square).sum(1)
        sums[3] += square.mul_(square).sum(1)
    offset, second, third, fourth = sums / len(u_VD)
    variance = second - offset**2
    fourth = fourth - 4 * offset * third + 6 * offset**2 * second - 3 * offset**4
    third = third - 3 * offset * second + 2 * offset**3
    # A variance below the rounding error of equal numbers is zero, and has no higher moments.
    is_zero = variance <= (torch.finfo(u_VD.dtype).eps * (1e-3 + mean_N.abs())) ** 2
    variance = variance.masked_fill(is_zero, 0)
    return torch.stack([mean_N + offset, variance, third / variance**1.5, fourth / variance**2])


def unit_rows(x_ND: torch.Tensor) -> torch.Tensor:
    """Scale the rows to length 1; rows of zeros stay zero."""
    length: torch.Tensor = x_ND.norm(dim=-1, keepdim=True)
    return x_ND / length.clamp(min=torch.finfo(x_ND.dtype).tiny)
