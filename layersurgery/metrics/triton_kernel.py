"""Compute unembedding and metrics in one Triton kernel: a tile's logits stay in registers and are never stored.

Suffixes of names give shapes: T tokens, D width of the readout's input, V vocabulary, S parts of the vocabulary.

A program takes a block of tokens and one part of the vocabulary, tile by tile. For each token it keeps the running
maximum m, S = sum e^(z-m), A = sum e^(z-m) (z-m), the index of the maximum and the target's logit. Afterwards the
parts are merged in float64 and in their order, so that equal input gives equal digits on one device. The extra memory
is 20 bytes for each token and part.

Nothing overlaps with the work on a finished tile, since a program's registers fill a multiprocessor. So that work is
kept small: powers are powers of two, only the last tile of the vocabulary is masked, and only the tile that contains a
target looks for it.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

_LN2 = math.log(2)
# At most so many results of a token and a part: they are merged in float64, which takes 80 bytes for each.
_MAX_PARTIAL_SUMS = 1 << 18
_CACHE_SHARE = 0.4
# The arguments that change from batch to batch. A kernel is not compiled again for each of their divisibilities.
_VARYING = ["T", "tiles_per_part"]


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

    @property
    def programs_per_processor(self) -> int:
        """Return how many programs a multiprocessor runs at once, if each thread uses all registers it may have."""
        return max(1, 8 // self.warps)


# For each compute capability, from the largest to the smallest; the first that fits the device's shared memory is
# used. Two models side by side (PAIR) need two tiles of sums in registers. Chosen so that registers are not spilled to
# memory (a test compiles all), and by reasoning; not yet by timing.
HALF = {
    (8, 0): (Tiling(128, 128, 32, 8, 4), Tiling(64, 128, 32, 4, 3), Tiling(32, 64, 32, 4, 2)),
    (9, 0): (Tiling(128, 256, 64, 8, 3), Tiling(128, 128, 64, 8, 3)),
    (10, 0): (Tiling(128, 128, 64, 8, 3), Tiling(64, 128, 32, 4, 3)),
}
PAIR = {
    (8, 0): (Tiling(64, 128, 32, 8, 3), Tiling(32, 64, 32, 4, 2)),
    (9, 0): (Tiling(128, 128, 64, 8, 3),),
    (10, 0): (Tiling(64, 128, 32, 8, 3),),
}


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
def _products(
    x, w, tokens, vocabulary, D, x_stride, w_stride,
    EVEN: tl.constexpr, WIDEN: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute a tile of x w^T, float32.

    x and w point to the tile's beginning; `tokens` and `vocabulary` are the rows left from there. Rows beyond the last
    one repeat it: so nothing beyond it is read, and the loop needs no mask.
    """
    col = tl.arange(0, BD)[None, :]
    # Offsets within a tile are small: 32-bit offsets need fewer registers than 64-bit pointers.
    x_at = tl.minimum(tl.arange(0, BT), tokens - 1)[:, None] * x_stride + col
    w_at = tl.minimum(tl.arange(0, BV), vocabulary - 1)[:, None] * w_stride + col
    sums = tl.zeros((BT, BV), dtype=tl.float32)
    for start in range(0, D, BD):
        if EVEN:
            x_tile, w_tile = tl.load(x + x_at), tl.load(w + w_at)
        else:
            x_tile = tl.load(x + x_at, mask=start + col < D, other=0.0)
            w_tile = tl.load(w + w_at, mask=start + col < D, other=0.0)
        if WIDEN:
            x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
        sums = tl.dot(x_tile, tl.trans(w_tile), sums, input_precision="ieee")
        x += BD
        w += BD
    return sums


@triton.jit
def _unscaled_logits(
    sums, bias, vocabulary, tanh_scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BV: tl.constexpr
):
    """Add the bias to a tile of products and apply the soft-cap; `tanh_scale` is 2 scale / cap.

    Without a soft-cap, the result is still to be multiplied by the scale.
    """
    if HAS_BIAS:
        sums += tl.load(bias + tl.minimum(tl.arange(0, BV), vocabulary - 1)).to(tl.float32)[None, :]
    if HAS_CAP:
        sums = cap * (2 * tl.sigmoid(tanh_scale * sums) - 1)
    return sums


@triton.jit
def _add_tile(z, m, S, A, top, wanted, goal_col, begin, left, to_base_2, BV: tl.constexpr):
    """Add a tile of unscaled logits to the running sums of its tokens, and return these.

    `goal_col` is the column of the target, which may lie in another tile; `begin` is the first column's number, and
    `left` is the number of columns from there.
    """
    col = tl.arange(0, BV)[None, :]
    if left < BV:  # so small that its exponential is zero, and finite, so that zero times it is zero
        z = tl.where(col < left, z, -1e30)
    if tl.max(((goal_col >= 0) & (goal_col < BV)).to(tl.int32), 0) != 0:
        wanted += tl.sum(tl.where(col == goal_col[:, None], z, 0.0), 1)
    # NaN makes S NaN below; it need not be ordered.
    peak = tl.max(z, 1)
    first_of_equals = tl.min(tl.where(z == peak[:, None], col, BV), 1)
    peak = peak * to_base_2
    top = tl.where(peak > m, begin + first_of_equals, top)
    new = tl.maximum(m, peak)
    z = z * to_base_2 - new[:, None]
    e = tl.math.exp2(z)
    fell = m - new
    by = tl.math.exp2(fell)
    A = by * (A + fell * S) + tl.sum(e * z, 1)
    S = by * S + tl.sum(e, 1)
    return new, S, A, top, wanted


@triton.jit(do_not_specialize=_VARYING)
def _summing(
    x, w, bias, target, m_out, S_out, A_out, top_out, wanted_out, T, V, D, tiles_per_part, x_stride, w_stride,
    tanh_scale, cap, to_base_2,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store m, S and A of the logits to the base 2, which are `to_base_2` times those of `_unscaled_logits`."""
    part, offset = tl.program_id(0), tl.program_id(1) * BT
    row = offset + tl.arange(0, BT)
    in_T = row < T
    goal = tl.load(target + row, mask=in_T, other=-1).to(tl.int32)
    m = tl.full((BT,), -1e30, dtype=tl.float32)
    S = tl.zeros((BT,), dtype=tl.float32)
    A = tl.zeros((BT,), dtype=tl.float32)
    wanted = tl.zeros((BT,), dtype=tl.float32)
    top = tl.zeros((BT,), dtype=tl.int32)
    x += offset.to(tl.int64) * x_stride
    first = part * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, tl.cdiv(V, BV))):
        begin = tile * BV
        left = V - begin
        w_here = w + begin.to(tl.int64) * w_stride
        z = _products(x, w_here, T - offset, left, D, x_stride, w_stride, EVEN, WIDEN, BT, BV, BD)
        z = _unscaled_logits(z, bias + begin, left, tanh_scale, cap, HAS_BIAS, HAS_CAP, BV)
        m, S, A, top, wanted = _add_tile(z, m, S, A, top, wanted, goal - begin, begin, left, to_base_2, BV)
    at = part.to(tl.int64) * T + row
    tl.store(m_out + at, m, mask=in_T)
    tl.store(S_out + at, S, mask=in_T)
    tl.store(A_out + at, A, mask=in_T)
    tl.store(top_out + at, top, mask=in_T)
    tl.store(wanted_out + at, wanted, mask=in_T)


@triton.jit(do_not_specialize=_VARYING)
def _diverging(
    p_x, q_x, w, bias, p_lse, moved_out, T, V, D, tiles_per_part, p_stride, q_stride, w_stride,
    tanh_scale, cap, to_base_2,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store sum_v p_v (z_p - z_q) of unscaled logits; `p_lse` is to the base 2."""
    part, offset = tl.program_id(0), tl.program_id(1) * BT
    row = offset + tl.arange(0, BT)
    in_T = row < T
    lse = tl.load(p_lse + row, mask=in_T, other=0.0)
    moved = tl.zeros((BT,), dtype=tl.float32)
    p_x += offset.to(tl.int64) * p_stride
    q_x += offset.to(tl.int64) * q_stride
    first = part * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, tl.cdiv(V, BV))):
        begin = tile * BV
        w_here, left = w + begin.to(tl.int64) * w_stride, V - begin
        p_z = _products(p_x, w_here, T - offset, left, D, p_stride, w_stride, EVEN, WIDEN, BT, BV, BD)
        p_z = _unscaled_logits(p_z, bias + begin, left, tanh_scale, cap, HAS_BIAS, HAS_CAP, BV)
        q_z = _products(q_x, w_here, T - offset, left, D, q_stride, w_stride, EVEN, WIDEN, BT, BV, BD)
        q_z = _unscaled_logits(q_z, bias + begin, left, tanh_scale, cap, HAS_BIAS, HAS_CAP, BV)
        weight = tl.math.exp2(p_z * to_base_2 - lse[:, None])
        if left < BV:
            weight = tl.where((tl.arange(0, BV) < left)[None, :], weight, 0.0)
        moved += tl.sum(weight * (p_z - q_z), 1)
    tl.store(moved_out + part.to(tl.int64) * T + row, moved, mask=in_T)


@triton.jit(do_not_specialize=["T"])
def _crossing(x, p_x, mean, out, T, D, x_stride, p_stride, mean_stride, BT: tl.constexpr, BD: tl.constexpr):
    """Store (x - p_x) . mean of each row, in float64: the difference of two half-precision numbers is then exact."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    at = tl.minimum(row, T - 1).to(tl.int64)[:, None]
    total = tl.zeros((BT,), dtype=tl.float64)
    for start in range(0, D, BD):
        col = start + tl.arange(0, BD)[None, :]
        x_tile = tl.load(x + at * x_stride + col, mask=col < D, other=0.0).to(tl.float64)
        p_tile = tl.load(p_x + at * p_stride + col, mask=col < D, other=0.0).to(tl.float64)
        mean_tile = tl.load(mean + at * mean_stride + col, mask=col < D, other=0.0).to(tl.float64)
        total += tl.sum((x_tile - p_tile) * mean_tile, 1)
    tl.store(out + row, total, mask=row < T)


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
        scale: scale of the logits, greater than 0.
        cap: soft-cap.
        tiling: tile sizes; chosen for the device if not given.
    """
    x_TD, w_VD = _row_contiguous(x_TD), _row_contiguous(w_VD)
    launch = _Launch(x_TD, w_VD, bias_V, scale, cap, tiling or tiling_for(x_TD))
    m, S, A, wanted = (x_TD.new_empty((launch.parts, len(x_TD)), dtype=torch.float32) for _ in range(4))
    top = x_TD.new_empty((launch.parts, len(x_TD)), dtype=torch.int32)
    with _current(x_TD.device):
        _summing[launch.grid](
            x_TD, w_VD, launch.bias, target_T.to(x_TD.device).contiguous(), m, S, A, top, wanted, len(x_TD),
            *launch.sizes, x_TD.stride(0), w_VD.stride(0), *launch.numbers, **launch.options,
        )  # fmt: skip
    return _merge_parts(
        m.double() * launch.to_nats, S, A.double() * _LN2, top, wanted.double() * (scale if cap is None else 1)
    )


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
    launch = _Launch(p_x_TD, w_VD, bias_V, scale, cap, tiling or tiling_for(p_x_TD, pair=True))
    moved = p_x_TD.new_empty((launch.parts, len(p_x_TD)), dtype=torch.float32)
    lse = (p_lse_T.double() / launch.to_nats).float().contiguous()
    with _current(p_x_TD.device):
        _diverging[launch.grid](
            p_x_TD, q_x_TD, w_VD, launch.bias, lse, moved, len(p_x_TD), *launch.sizes,
            p_x_TD.stride(0), q_x_TD.stride(0), w_VD.stride(0), *launch.numbers, **launch.options,
        )  # fmt: skip
    return moved.double().sum(0) * (scale if cap is None else 1)


def cross_term(x_TD: torch.Tensor, p_x_TD: torch.Tensor, mean_TD: torch.Tensor) -> torch.Tensor:
    """Compute (x - p_x) . mean of each row: float64, (tokens,). It reads every number once and makes no temporaries."""
    x_TD, p_x_TD, mean_TD = map(_row_contiguous, (x_TD, p_x_TD, mean_TD))
    tokens, width = x_TD.shape
    out = x_TD.new_empty(tokens, dtype=torch.float64)
    rows, columns = 4, min(512, triton.next_power_of_2(width))
    with _current(x_TD.device):
        _crossing[(triton.cdiv(tokens, rows),)](
            x_TD, p_x_TD, mean_TD, out, tokens, width, x_TD.stride(0), p_x_TD.stride(0), mean_TD.stride(0),
            BT=rows, BD=columns, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


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


class _Launch:
    """Grid, sizes, scale and soft-cap, and compile-time constants of a launch.

    Attributes:
        parts: number of parts of the vocabulary.
        to_nats: factor from the kernel's base-2 logits to nats. It differs from ln 2 by the rounding of `to_base_2`.
    """

    def __init__(
        self,
        x_TD: torch.Tensor,
        w_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        scale: float,
        cap: float | None,
        tiling: Tiling,
    ) -> None:
        assert x_TD.dtype == w_VD.dtype, "the input and the unembedding must have the same dtype"
        assert x_TD.shape[1] == w_VD.shape[1]
        assert scale > 0
        (tokens, width), vocabulary = x_TD.shape, len(w_VD)
        blocks, tiles = triton.cdiv(tokens, tiling.tokens), triton.cdiv(vocabulary, tiling.vocabulary)
        at_once, cache_bytes = _processors_and_cache(x_TD.device)
        self.parts = choose_parts(
            blocks,
            tiles,
            block_bytes=tiling.tokens * width * x_TD.element_size(),
            at_once=at_once * tiling.programs_per_processor,
            cache_bytes=cache_bytes,
            most=max(1, _MAX_PARTIAL_SUMS // tokens),
        )
        self.grid = (self.parts, blocks)
        self.sizes = (vocabulary, width, triton.cdiv(tiles, self.parts))
        self.bias = w_VD if bias_V is None else bias_V.contiguous()  # any tensor: without a bias it is not read
        factor = scale if cap is None else 1.0
        to_base_2 = float(np.float32(factor / _LN2))
        self.to_nats = factor / to_base_2
        self.numbers = (2 * scale / (cap or 1), float(cap or 1), to_base_2)
        self.options: dict[str, Any] = {
            # Triton's interpreter multiplies the bits of bfloat16 as integers.
            "EVEN": width % tiling.width == 0, "WIDEN": not x_TD.is_cuda,
            "BT": tiling.tokens, "BV": tiling.vocabulary, "BD": tiling.width,
            "HAS_BIAS": bias_V is not None, "HAS_CAP": cap is not None,
            "num_warps": tiling.warps, "num_stages": tiling.stages, "enable_fp_fusion": True,
        }  # fmt: skip


def choose_parts(blocks: int, tiles: int, *, block_bytes: int, at_once: int, cache_bytes: int, most: int) -> int:
    """Choose the number of parts of the vocabulary, so that a device finishes early; no part is empty.

    The parts of one block of tokens run next to each other. All programs that run at once read their blocks of tokens
    again for every tile of the vocabulary, so these should fit into a share of the L2 cache: that gives the least
    number of parts. Of the allowed numbers, the chosen one gives the slowest multiprocessor the fewest tiles.

    Args:
        blocks: blocks of tokens.
        tiles: tiles of the vocabulary.
        block_bytes: bytes of the readout's input of one block of tokens.
        at_once: number of programs that the device runs at once.
        cache_bytes: size of the L2 cache.
        most: the greatest number of parts.
    """
    cache_bytes = int(_CACHE_SHARE * cache_bytes)
    least = 1 if blocks * block_bytes <= cache_bytes else math.ceil(at_once * block_bytes / cache_bytes)
    most = min(tiles, most)
    without_empty = {math.ceil(tiles / math.ceil(tiles / parts)) for parts in range(min(least, most), most + 1)}
    allowed = sorted(parts for parts in without_empty if parts >= least) or [max(without_empty)]
    return min(allowed, key=lambda parts: math.ceil(blocks * parts / at_once) * math.ceil(tiles / parts))


def tiling_for(x_TD: torch.Tensor, *, pair: bool = False) -> Tiling:
    """Return the largest tiles for the device that fit its shared memory; `pair` for two models side by side."""
    tilings = PAIR if pair else HALF
    if not x_TD.is_cuda:
        return tilings[8, 0][-1]
    capability = torch.cuda.get_device_capability(x_TD.device)
    choices = tilings[max(known for known in tilings if known <= capability)]
    available = torch.cuda.get_device_properties(x_TD.device).shared_memory_per_block_optin
    return next((tiling for tiling in choices if tiling.shared_bytes(x_TD.element_size()) <= available), choices[-1])


@functools.cache
def _processors_and_cache(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors and the bytes of the L2 cache."""
    if device.type != "cuda":
        return 2, 1 << 20
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a device is the current one: Triton launches there, wherever the arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _row_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
