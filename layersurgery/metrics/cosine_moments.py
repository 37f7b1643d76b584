"""Moments, over the whole vocabulary, of cosines between neurons' output weights and the unembedding.

Names say shapes: N neurons, V vocabulary, D width. The mean is known beforehand from the mean direction of the unembedding, so central
moments are summed up tile by tile without the cancellation that raw ones suffer from. Neurons x vocabulary is never in memory.
"""

from __future__ import annotations

import torch

from ..runtime.float32_matmul import float32_products

NEURON_TILE, VOCAB_TILE = 512, 2048


def moments(w_ND: torch.Tensor, u_VD: torch.Tensor) -> torch.Tensor:
    """Mean, variance, skewness and kurtosis of each neuron's cosines with all rows of `u_VD`: float64, (4, N).

    Population moments (ddof 0), and Pearson's kurtosis (3 for a Gaussian), as `scipy.stats.skew(x)` and
    `scipy.stats.kurtosis(x, fisher=False)`. NaN for a neuron whose cosines are all the same, as there.

    Args:
        w_ND: output weights, any dtype; a row of zeros has the cosine 0 with everything.
        u_VD: rows of length 1 (see `unit_rows`), float32 or float64.
    """
    middle_D = torch.zeros(u_VD.shape[1], dtype=torch.float64, device=u_VD.device)
    for words in torch.split(u_VD, VOCAB_TILE):
        middle_D += words.double().sum(0)
    middle_D /= len(u_VD)
    with float32_products("highest"), torch.autocast(u_VD.device.type, enabled=False):
        return torch.cat(
            [
                _moments(unit_rows(part.to(u_VD.device, u_VD.dtype)), u_VD, middle_D)
                for part in torch.split(w_ND, NEURON_TILE)
            ],
            1,
        )


def _moments(w_ND: torch.Tensor, u_VD: torch.Tensor, middle_D: torch.Tensor) -> torch.Tensor:
    mean_N = w_ND.double() @ middle_D
    minus = -mean_N.to(u_VD.dtype)[:, None]
    sums = torch.zeros(4, len(w_ND), dtype=torch.float64, device=u_VD.device)
    for words in torch.split(u_VD, VOCAB_TILE):
        x = torch.addmm(minus, w_ND, words.T)
        square = x * x
        # What rounding the mean has left.
        sums[0] += x.sum(1)
        sums[1] += square.sum(1)
        sums[2] += x.mul_(square).sum(1)
        sums[3] += square.mul_(square).sum(1)
    off, second, third, fourth = sums / len(u_VD)
    variance = second - off**2
    fourth = fourth - 4 * off * third + 6 * off**2 * second - 3 * off**4
    third = third - 3 * off * second + 2 * off**3
    # Below what rounding of equal numbers makes, there is no shape to speak of.
    none = variance <= (torch.finfo(u_VD.dtype).eps * (1e-3 + mean_N.abs())) ** 2
    variance = variance.masked_fill(none, 0)
    return torch.stack([mean_N + off, variance, third / variance**1.5, fourth / variance**2])


def unit_rows(x_ND: torch.Tensor) -> torch.Tensor:
    """The rows, scaled to length 1; zeros stay zeros."""
    length: torch.Tensor = x_ND.norm(dim=-1, keepdim=True)
    return x_ND / length.clamp(min=torch.finfo(x_ND.dtype).tiny)
