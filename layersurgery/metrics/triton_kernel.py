"""Compute unembedding and metrics in one Triton kernel: a tile's logits stay in registers and are never stored.

Suffixes of names give shapes: T tokens, D width of the readout's input, V vocabulary, S parts of the vocabulary.

A program takes a block of tokens and one part of the vocabulary, tile by tile. For each token it keeps the running
maximum m, S = sum e^(z-m), A = sum e^(z-m) (z-m), the index of the maximum and the target's logit. Afterwards the
parts are merged in float64 and in their order, so that equal input gives equal digits. The extra memory is 20 bytes
for each token and part.
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
    """Tile sizes of the kernel.

    Attributes:
        tokens: tokens of a tile.
        vocabulary: vocabulary entries of a tile.
        width: width of one product.
        warps: warps of a program.
        stages: number of tiles loaded in advance.
    """

    tokens: int
    vocabulary: int
    width: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int) -> int:
        """Return the shared memory of the tiles that are loaded in advance, in bytes."""
        return (self.tokens + self.vocabulary) * self.width * itemsize * self.stages


# From the largest to the smallest; the first that fits the device's shared memory is used. Reasoned, not yet timed.
HALF = (Tiling(128, 256, 64, 8, 3), Tiling(128, 128, 64, 8, 3), Tiling(64, 128, 32, 4, 3), Tiling(32, 64, 32, 4, 2))
FULL = (Tiling(64, 128, 32, 8, 3), Tiling(32, 64, 32, 4, 2))


@dataclass(frozen=True, slots=True)
class LogitSums:
    """Sums of one pass for each token: float64, (tokens,); `top` is an index.

    Attributes:
        m: greatest logit.
        S: sum of e^(z-m).
        A: sum of e^(z-m) (z-m).
        top: index of the greatest logit; the lowest one of equals.
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
    """Compute a tile of logits, float32, minus infinity beyond the vocabulary.

    x, w and bias point to the tile's beginning; `tokens` and `vocabulary` are the rows left from there.
    """
    in_T, in_V = tl.arange(0, BT) < tokens, tl.arange(0, BV) < vocabulary
    # Offsets within a tile are small: 32-bit offsets need fewer registers than 64-bit pointers.
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
    part, offset = tl.program_id(1), tl.program_id(0) * BT
    row = offset + tl.arange(0, BT)
    in_T = row < T
    goal = tl.load(target + row, mask=in_T, other=-1).to(tl.int32)
    m = tl.full((BT,), float("-inf"), dtype=tl.float32)
    S = tl.zeros((BT,), dtype=tl.float32)
    A = tl.zeros((BT,), dtype=tl.float32)
    wanted = tl.zeros((BT,), dtype=tl.float32)
    top = tl.zeros((BT,), dtype=tl.int32)
    x += offset.to(tl.int64) * x_stride
    first = part * tiles_a_part
    for tile in range(first, tl.minimum(first + tiles_a_part, tl.cdiv(V, BV))):
        begin = tile * BV
        z = _logits(
            x, w + begin.to(tl.int64) * w_stride, bias + begin, T - offset, V - begin, D, x_stride, w_stride,
            scale, cap, HAS_BIAS, HAS_CAP, EVEN, WIDEN, BT, BV, BD,
        )  # fmt: skip
        col = begin + tl.arange(0, BV)
        # NaN makes S NaN; it need not be ordered, too.
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
    part, offset = tl.program_id(1), tl.program_id(0) * BT
    row = offset + tl.arange(0, BT)
    in_T = row < T
    lse = tl.load(p_lse + row, mask=in_T, other=0.0)
    moved = tl.zeros((BT,), dtype=tl.float32)
    p_x += offset.to(tl.int64) * p_stride
    q_x += offset.to(tl.int64) * q_stride
    first = part * tiles_a_part
    for tile in range(first, tl.minimum(first + tiles_a_part, tl.cdiv(V, BV))):
        begin = tile * BV
        w_here, left = w + begin.to(tl.int64) * w_stride, V - begin
        p_z = _logits(
            p_x, w_here, bias + begin, T - offset, left, D, p_stride, w_stride, scale, cap,
            HAS_BIAS, HAS_CAP, EVEN, WIDEN, BT, BV, BD,
        )  # fmt: skip
        q_z = _logits(
            q_x, w_here, bias + begin, T - offset, left, D, q_stride, w_stride, scale, cap,
            HAS_BIAS, HAS_CAP, EVEN, WIDEN, BT, BV, BD,
        )  # fmt: skip
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
    """Reduce the logits scale * (x w^T + bias), soft-capped as cap * tanh(logit / cap), in one pass.

    Args:
        x_TD: the input of the unembedding.
        w_VD: the unembedding, of the same dtype: bfloat16, float16 or float32 (summed in float32; TF32 is not used).
        target_T: the true next tokens.
        bias_V: bias of the unembedding.
        scale: scale of the logits.
        cap: soft-cap.
        tiling: tile sizes; chosen for the device if not given.
    """
    x_TD, w_VD = _row_contiguous(x_TD), _row_contiguous(w_VD)
    tokens, config = len(x_TD), _LaunchConfig(x_TD, w_VD, bias_V, scale, cap, tiling)
    m, S, A, wanted = (x_TD.new_empty((config.parts, tokens), dtype=torch.float32) for _ in range(4))
    top = x_TD.new_empty((config.parts, tokens), dtype=torch.int32)
    target_T = target_T.to(x_TD.device).contiguous()
    _summing[config.grid](
        x_TD, w_VD, config.bias, target_T, m, S, A, top, wanted, tokens, *config.sizes,
        x_TD.stride(0), w_VD.stride(0), *config.scale_and_cap, **config.options,
    )  # fmt: skip
    return _merge_parts(m, S, A, top, wanted)


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
    """Compute sum_v p_v (z_p - z_q) from the logits of two models: float64, (tokens,). Arguments as in `logit_sums`."""
    p_x_TD, q_x_TD, w_VD = map(_row_contiguous, (p_x_TD, q_x_TD, w_VD))
    tokens, config = len(p_x_TD), _LaunchConfig(p_x_TD, w_VD, bias_V, scale, cap, tiling)
    moved = p_x_TD.new_empty((config.parts, tokens), dtype=torch.float32)
    _diverging[config.grid](
        p_x_TD, q_x_TD, w_VD, config.bias, p_lse_T.float().contiguous(), moved, tokens, *config.sizes,
        p_x_TD.stride(0), q_x_TD.stride(0), w_VD.stride(0), *config.scale_and_cap, **config.options,
    )  # fmt: skip
    return moved.double().sum(0)


def _merge_parts(
    m: torch.Tensor, S: torch.Tensor, A: torch.Tensor, top: torch.Tensor, wanted: torch.Tensor
) -> LogitSums:
    """Merge the parts of the vocabulary, (parts, tokens) each."""
    m, S, A = m.double(), S.double(), A.double()
    peak = m.amax(0)
    factor = (m - peak).exp()
    first = m.argmax(0, keepdim=True)  # the first of equals
    chosen = top.gather(0, first)[0].long()
    # The target is in one part; the other parts added zero.
    return LogitSums(peak, (factor * S).sum(0), (factor * (A + (m - peak) * S)).sum(0), chosen, wanted.double().sum(0))


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
        assert x_TD.dtype == w_VD.dtype, "the input and the unembedding must have the same dtype"
        assert x_TD.shape[1] == w_VD.shape[1]
        tiling = tiling or tiling_for(x_TD)
        (tokens, width), vocabulary = x_TD.shape, len(w_VD)
        blocks, tiles = triton.cdiv(tokens, tiling.tokens), triton.cdiv(vocabulary, tiling.vocabulary)
        # Several programs for every multiprocessor; no part is empty.
        wanted = triton.cdiv(4 * _processors(x_TD.device), max(1, blocks))
        tiles_a_part = triton.cdiv(tiles, min(tiles, wanted, _MAX_SPLITS))
        self.parts = triton.cdiv(tiles, tiles_a_part)
        self.grid = (blocks, self.parts)
        self.sizes = (vocabulary, width, tiles_a_part)
        self.bias = w_VD if bias_V is None else bias_V.contiguous()  # any tensor: without a bias it is not read
        self.scale_and_cap = (float(scale), float(cap or 1))
        self.options: dict[str, Any] = {
            # Triton's interpreter multiplies the bits of bfloat16 as integers.
            "EVEN": width % tiling.width == 0, "WIDEN": not x_TD.is_cuda,
            "BT": tiling.tokens, "BV": tiling.vocabulary, "BD": tiling.width,
            "HAS_BIAS": bias_V is not None, "HAS_CAP": cap is not None,
            "num_warps": tiling.warps, "num_stages": tiling.stages,
        }  # fmt: skip


def tiling_for(x_TD: torch.Tensor) -> Tiling:
    """Return the largest tiles that fit the device's shared memory."""
    choices = HALF if x_TD.element_size() == 2 else FULL
    if not x_TD.is_cuda:
        return choices[-1]
    available = torch.cuda.get_device_properties(x_TD.device).shared_memory_per_block_optin
    return next((tiling for tiling in choices if tiling.shared_bytes(x_TD.element_size()) <= available), choices[-1])


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _row_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
