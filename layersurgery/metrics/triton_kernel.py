"""Unembedding and metrics in one kernel (Triton): the logits of a tile live in registers, and never in a device's memory.

Names say shapes: T tokens, D width of what is read, V vocabulary, S parts of the vocabulary.

A program takes a block of tokens and one part of the vocabulary, tile by tile, and keeps for each token the running maximum m,
S = sum e^(z-m), A = sum e^(z-m) (z-m), the place of the maximum and the target's logit. The parts are put together afterwards, in
float64 and in their order, so that equal input gives equal digits. Memory beside the result is 20 bytes a token and part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

_MAX_SPLITS = 32


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is cut.

    Attributes:
        tokens: of a tile.
        vocabulary: of a tile.
        width: of what is multiplied at once.
        warps: of a program.
        stages: tiles that are loaded ahead.
    """

    tokens: int
    vocabulary: int
    width: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory that the tiles loaded ahead need."""
        return (self.tokens + self.vocabulary) * self.width * itemsize * self.stages


# From the largest to the smallest; the first that fits a device's shared memory is taken. Chosen by reasoning, not yet by timing.
HALF = (Tiling(128, 256, 64, 8, 3), Tiling(128, 128, 64, 8, 3), Tiling(64, 128, 32, 4, 3), Tiling(32, 64, 32, 4, 2))
FULL = (Tiling(64, 128, 32, 8, 3), Tiling(32, 64, 32, 4, 2))


@dataclass(frozen=True, slots=True)
class LogitSums:
    """What one pass keeps of each token: float64, (tokens,); `top` is an index.

    Attributes:
        m: greatest logit.
        S: sum of e^(z-m).
        A: sum of e^(z-m) (z-m).
        top: place of the greatest logit, the lowest where several are equal.
        wanted: the target's logit.
    """

    m: torch.Tensor
    S: torch.Tensor
    A: torch.Tensor
    top: torch.Tensor
    wanted: torch.Tensor


@triton.jit
def _logits(
    x, w, bias, tokens, vocabulary, D, x_stride, w_stride, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A tile of logits, float32, minus infinity beyond the vocabulary; x, w and bias point to its beginning, and so much is left of them."""
    in_T, in_V = tl.arange(0, BT) < tokens, tl.arange(0, BV) < vocabulary
    # Offsets within a tile are small: 32 bits of them spare the registers that wide pointers would take.
    x_at, w_at = tl.arange(0, BT)[:, None] * x_stride, tl.arange(0, BV)[:, None] * w_stride
    sums = tl.zeros((BT, BV), dtype=tl.float32)
    for start in range(0, D, BD):
        here = start + tl.arange(0, BD)[None, :]
        if EVEN:
            x_tile = tl.load(x + (x_at + here), mask=in_T[:, None], other=0.0)
            w_tile = tl.load(w + (w_at + here), mask=in_V[:, None], other=0.0)
        else:
            x_tile = tl.load(x + (x_at + here), mask=in_T[:, None] & (here < D), other=0.0)
            w_tile = tl.load(w + (w_at + here), mask=in_V[:, None] & (here < D), other=0.0)
        if WIDEN:
            x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
        sums = tl.dot(x_tile, tl.trans(w_tile), sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + tl.arange(0, BV), mask=in_V, other=0.0).to(tl.float32)[None, :]
    sums *= scale
    if HAS_CAP:
        sums = cap * (2 * tl.sigmoid(2 * sums / cap) - 1)
    return tl.where(in_V[None, :], sums, float("-inf"))


@triton.jit
def _summing(
    x, w, bias, target, m_out, S_out, A_out, top_out, wanted_out, T, V, D, tiles_a_part, x_stride, w_stride, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    part, place = tl.program_id(1), tl.program_id(0) * BT
    row = place + tl.arange(0, BT)
    in_T = row < T
    goal = tl.load(target + row, mask=in_T, other=-1).to(tl.int32)
    m = tl.full((BT,), float("-inf"), dtype=tl.float32)
    S = tl.zeros((BT,), dtype=tl.float32)
    A = tl.zeros((BT,), dtype=tl.float32)
    wanted = tl.zeros((BT,), dtype=tl.float32)
    top = tl.zeros((BT,), dtype=tl.int32)
    x += place.to(tl.int64) * x_stride
    first = part * tiles_a_part
    for tile in range(first, tl.minimum(first + tiles_a_part, tl.cdiv(V, BV))):
        begin = tile * BV
        z = _logits(
            x, w + begin.to(tl.int64) * w_stride, bias + begin, T - place, V - begin, D, x_stride, w_stride, scale, cap,
            HAS_BIAS, HAS_CAP, EVEN, WIDEN, BT, BV, BD,
        )  # fmt: skip
        col = begin + tl.arange(0, BV)
        # What is no number makes S none; it need not be sorted as well.
        known = tl.where(z == z, z, float("-inf"))
        peak = tl.max(known, 1)
        top = tl.where(peak > m, begin + tl.argmax(known, 1, tie_break_left=True), top)
        wanted += tl.sum(tl.where(col[None, :] == goal[:, None], z, 0.0), 1)
        new = tl.maximum(m, peak)
        z -= new[:, None]
        e = tl.exp(z)
        fell = tl.where(m == float("-inf"), 0.0, m - new)
        by = tl.where(m == float("-inf"), 0.0, tl.exp(fell))
        A = by * (A + fell * S) + tl.sum(tl.where(col[None, :] < V, e * z, 0.0), 1)
        S = by * S + tl.sum(e, 1)
        m = new
    at = part.to(tl.int64) * T + row
    tl.store(m_out + at, m, mask=in_T)
    tl.store(S_out + at, S, mask=in_T)
    tl.store(A_out + at, A, mask=in_T)
    tl.store(top_out + at, top, mask=in_T)
    tl.store(wanted_out + at, wanted, mask=in_T)


@triton.jit
def _diverging(
    p_x, q_x, w, bias, p_lse, moved_out, T, V, D, tiles_a_part, p_stride, q_stride, w_stride, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    part, place = tl.program_id(1), tl.program_id(0) * BT
    row = place + tl.arange(0, BT)
    in_T = row < T
    lse = tl.load(p_lse + row, mask=in_T, other=0.0)
    moved = tl.zeros((BT,), dtype=tl.float32)
    p_x += place.to(tl.int64) * p_stride
    q_x += place.to(tl.int64) * q_stride
    first = part * tiles_a_part
    for tile in range(first, tl.minimum(first + tiles_a_part, tl.cdiv(V, BV))):
        begin = tile * BV
        w_here, left = w + begin.to(tl.int64) * w_stride, V - begin
        p_z = _logits(
            p_x,
            w_here,
            bias + begin,
            T - place,
            left,
            D,
            p_stride,
            w_stride,
            scale,
            cap,
            HAS_BIAS,
            HAS_CAP,
            EVEN,
            WIDEN,
            BT,
            BV,
            BD,
        )
        q_z = _logits(
            q_x,
            w_here,
            bias + begin,
            T - place,
            left,
            D,
            q_stride,
            w_stride,
            scale,
            cap,
            HAS_BIAS,
            HAS_CAP,
            EVEN,
            WIDEN,
            BT,
            BV,
            BD,
        )
        inside = (tl.arange(0, BV) < left)[None, :]
        moved += tl.sum(tl.where(inside, tl.exp(p_z - lse[:, None]) * (p_z - q_z), 0.0), 1)
    tl.store(moved_out + part.to(tl.int64) * T + row, moved, mask=in_T)


def logit_sums(
    x_TD: torch.Tensor,
    w_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    scale: float = 1,
    cap: float | None = None,
    tiling: Tiling | None = None,
) -> LogitSums:
    """One pass over the logits scale * (x w^T + bias), soft-capped as cap * tanh(logit / cap).

    Args:
        x_TD: what is read.
        w_VD: the unembedding, of the same dtype: bfloat16, float16 or float32 (summed in float32; tf32 is not used).
        target_T: the true next tokens.
        bias_V: of the unembedding.
        scale: of the logits.
        cap: soft-cap.
        tiling: how to cut the work; by the device if not given.
    """
    x_TD, w_VD = _rows_together(x_TD), _rows_together(w_VD)
    tokens, cut = len(x_TD), _LaunchConfig(x_TD, w_VD, bias_V, scale, cap, tiling)
    m, S, A, wanted = (x_TD.new_empty((cut.parts, tokens), dtype=torch.float32) for _ in range(4))
    top = x_TD.new_empty((cut.parts, tokens), dtype=torch.int32)
    target_T = target_T.to(x_TD.device).contiguous()
    _summing[cut.grid](
        x_TD, w_VD, cut.bias, target_T, m, S, A, top, wanted, tokens, *cut.sizes, x_TD.stride(0), w_VD.stride(0), *cut.bends, **cut.options,
    )  # fmt: skip
    return _together(m, S, A, top, wanted)


def kl_terms(
    p_x_TD: torch.Tensor,
    q_x_TD: torch.Tensor,
    w_VD: torch.Tensor,
    p_lse_T: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    scale: float = 1,
    cap: float | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """sum_v p_v (z_p - z_q), float64, (tokens,), with the logits of two models side by side; arguments as in `summed`."""
    p_x_TD, q_x_TD, w_VD = map(_rows_together, (p_x_TD, q_x_TD, w_VD))
    tokens, cut = len(p_x_TD), _LaunchConfig(p_x_TD, w_VD, bias_V, scale, cap, tiling)
    moved = p_x_TD.new_empty((cut.parts, tokens), dtype=torch.float32)
    _diverging[cut.grid](
        p_x_TD, q_x_TD, w_VD, cut.bias, p_lse_T.float().contiguous(), moved, tokens, *cut.sizes,
        p_x_TD.stride(0), q_x_TD.stride(0), w_VD.stride(0), *cut.bends, **cut.options,
    )  # fmt: skip
    return moved.double().sum(0)


def _together(m: torch.Tensor, S: torch.Tensor, A: torch.Tensor, top: torch.Tensor, wanted: torch.Tensor) -> LogitSums:
    """The parts of the vocabulary as one: (parts, tokens) each."""
    m, S, A = m.double(), S.double(), A.double()
    peak = m.amax(0)
    by = (m - peak).exp()
    first = m.argmax(0, keepdim=True)  # of equal ones the first
    chosen = top.gather(0, first)[0].long()
    # The target is in one part, and the others have added nothing.
    return LogitSums(peak, (by * S).sum(0), (by * (A + (m - peak) * S)).sum(0), chosen, wanted.double().sum(0))


class _LaunchConfig:
    """Grid, sizes, scale and soft-cap, and compile-time constants of a launch."""

    def __init__(
        self,
        x_TD: torch.Tensor,
        w_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        scale: float,
        cap: float | None,
        tiling: Tiling | None,
    ) -> None:
        assert x_TD.dtype == w_VD.dtype, "what is read and the unembedding are of one dtype"
        assert x_TD.shape[1] == w_VD.shape[1]
        tiling = tiling or tiling_for(x_TD)
        (tokens, width), vocabulary = x_TD.shape, len(w_VD)
        blocks, tiles = triton.cdiv(tokens, tiling.tokens), triton.cdiv(vocabulary, tiling.vocabulary)
        # Enough programs for every multiprocessor to have several; no part is empty.
        wanted = triton.cdiv(4 * _processors(x_TD.device), max(1, blocks))
        a_part = triton.cdiv(tiles, min(tiles, wanted, _MAX_SPLITS))
        self.parts = triton.cdiv(tiles, a_part)
        self.grid = (blocks, self.parts)
        self.sizes = (vocabulary, width, a_part)
        self.bias = w_VD if bias_V is None else bias_V.contiguous()  # without one, anything: it is not read
        self.bends = (float(scale), float(cap or 1))
        self.options: dict[str, Any] = {
            # Triton's interpreter multiplies bfloat16's bits as if they were whole numbers.
            "EVEN": width % tiling.width == 0, "WIDEN": not x_TD.is_cuda, "BT": tiling.tokens, "BV": tiling.vocabulary, "BD": tiling.width,
            "HAS_BIAS": bias_V is not None, "HAS_CAP": cap is not None, "num_warps": tiling.warps, "num_stages": tiling.stages,
        }  # fmt: skip


def tiling_for(x_TD: torch.Tensor) -> Tiling:
    """The largest tiles that the device's shared memory takes."""
    choices = HALF if x_TD.element_size() == 2 else FULL
    if not x_TD.is_cuda:
        return choices[-1]
    room = torch.cuda.get_device_properties(x_TD.device).shared_memory_per_block_optin
    return next((tiling for tiling in choices if tiling.shared_bytes(x_TD.element_size()) <= room), choices[-1])


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _rows_together(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
