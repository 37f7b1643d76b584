"""Other ways to the same sums of logits, to be timed beside the kernel of the package: for weights without bias or cap.

`logit_sums_tma` loads tiles by tensor descriptors (TMA). `logit_sums_slices` lets cuBLAS make slices of float32 logits
that stay in the L2 cache, and one kernel reads each of them once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from layersurgery.metrics import triton_kernel
from layersurgery.metrics.triton_kernel import LogitSums, Tiling, _add_tile

_LN2 = math.log(2)
_TO_BASE_2 = 1 / _LN2


@triton.jit
def _summing_tma(
    x_tiles, w_tiles, target, m_out, S_out, A_out, top_out, wanted_out, T, V, D, tiles_per_part, to_base_2,
    WIDEN: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    part, offset = tl.program_id(0), tl.program_id(1) * BT
    row = offset + tl.arange(0, BT)
    in_T = row < T
    goal = tl.load(target + row, mask=in_T, other=-1).to(tl.int32)
    m = tl.full((BT,), -1e30, dtype=tl.float32)
    S = tl.zeros((BT,), dtype=tl.float32)
    A = tl.zeros((BT,), dtype=tl.float32)
    wanted = tl.zeros((BT,), dtype=tl.float32)
    top = tl.zeros((BT,), dtype=tl.int32)
    first = part * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, tl.cdiv(V, BV))):
        begin = tile * BV
        z = tl.zeros((BT, BV), dtype=tl.float32)
        for start in range(0, D, BD):
            x_tile, w_tile = x_tiles.load([offset, start]), w_tiles.load([begin, start])
            if WIDEN:
                x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
            z = tl.dot(x_tile, tl.trans(w_tile), z)
        m, S, A, top, wanted = _add_tile(z, m, S, A, top, wanted, goal - begin, begin, V - begin, to_base_2, BV)
    at = part.to(tl.int64) * T + row
    tl.store(m_out + at, m, mask=in_T)
    tl.store(S_out + at, S, mask=in_T)
    tl.store(A_out + at, A, mask=in_T)
    tl.store(top_out + at, top, mask=in_T)
    tl.store(wanted_out + at, wanted, mask=in_T)


@triton.jit
def _reducing(
    z_at, target, m_at, S_at, A_at, top_at, wanted_at, R, C, begin, z_stride, to_base_2,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add a slice of logits in memory, (R, C), to the running sums of its rows."""
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    in_R = row < R
    goal = tl.load(target + row, mask=in_R, other=-1).to(tl.int32) - begin
    goal = tl.where(goal < C, goal, -1)
    m = tl.load(m_at + row, mask=in_R, other=0.0)
    S = tl.load(S_at + row, mask=in_R, other=0.0)
    A = tl.load(A_at + row, mask=in_R, other=0.0)
    top = tl.load(top_at + row, mask=in_R, other=0)
    wanted = tl.load(wanted_at + row, mask=in_R, other=0.0)
    z_at += tl.minimum(row, R - 1).to(tl.int64)[:, None] * z_stride
    for start in range(0, C, BC):
        col = start + tl.arange(0, BC)[None, :]
        z = tl.load(z_at + col, mask=col < C, other=-1e30)
        m, S, A, top, wanted = _add_tile(z, m, S, A, top, wanted, goal - start, begin + start, BC, to_base_2, BC)
    tl.store(m_at + row, m, mask=in_R)
    tl.store(S_at + row, S, mask=in_R)
    tl.store(A_at + row, A, mask=in_R)
    tl.store(top_at + row, top, mask=in_R)
    tl.store(wanted_at + row, wanted, mask=in_R)


def logit_sums_tma(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor, tiling: Tiling) -> LogitSums:
    """Reduce the logits as `triton_kernel.logit_sums` does, with tensor descriptors; rows must be 16-byte aligned."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    launch = triton_kernel._Launch(x, w, None, 1.0, None, tiling)
    descriptor: Any = TensorDescriptor.from_tensor
    x_tiles = descriptor(x, [tiling.tokens, tiling.width])
    w_tiles = descriptor(w, [tiling.vocabulary, tiling.width])
    m, S, A, wanted = (x.new_empty((launch.parts, len(x)), dtype=torch.float32) for _ in range(4))
    top = x.new_empty((launch.parts, len(x)), dtype=torch.int32)
    _summing_tma[launch.grid](
        x_tiles, w_tiles, target, m, S, A, top, wanted, len(x), *launch.sizes, _TO_BASE_2, WIDEN=not x.is_cuda,
        BT=tiling.tokens, BV=tiling.vocabulary, BD=tiling.width, num_warps=tiling.warps, num_stages=tiling.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return triton_kernel._merge_parts(m.double() * _LN2, S, A.double() * _LN2, top, wanted.double())


def logit_sums_slices(
    x: torch.Tensor, w: torch.Tensor, target: torch.Tensor, rows: int = 4096, columns: int = 2048
) -> LogitSums:
    """Reduce the logits as `triton_kernel.logit_sums` does, in slices of 32 MiB that cuBLAS computes."""
    count = len(x)
    m = x.new_full((1, count), -1e30, dtype=torch.float32)
    S, A, wanted = (x.new_zeros((1, count), dtype=torch.float32) for _ in range(3))
    top = x.new_zeros((1, count), dtype=torch.int32)
    buffer = x.new_empty(min(rows, count) * columns, dtype=torch.float32)
    for first in range(0, count, rows):
        span = slice(first, min(count, first + rows))
        part = x[span]
        for begin in range(0, len(w), columns):
            slab = w[begin : begin + columns]
            z = buffer[: len(part) * len(slab)].view(len(part), len(slab))
            if x.is_cuda:
                torch.mm(part, slab.T, out_dtype=torch.float32, out=z)
            else:
                torch.mm(part.float(), slab.float().T, out=z)
            _reducing[(triton.cdiv(len(part), 4),)](
                z, target[span], m[0, span], S[0, span], A[0, span], top[0, span], wanted[0, span],
                len(part), len(slab), begin, z.stride(0), _TO_BASE_2, BT=4, BC=1024, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return triton_kernel._merge_parts(m.double() * _LN2, S, A.double() * _LN2, top, wanted.double())
