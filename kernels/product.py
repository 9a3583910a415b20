"""The matrix product inside every kernel that has one: tiles in grouped order, float32 accumulation, one main loop.

    accumulator (BM, BN) = sum over k of A[m, k] B[k, n]

A and B are addressed by two strides each, one of which is 1: the launchers pass it as the number 1, which Triton makes
a constant, so that a transposed operand costs nothing and loads stay 16 bytes wide. On Hopper the loop becomes
asynchronous copies into ``num_stages`` buffers and wgmma.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .emulation import dot

__all__ = ["as_matrix", "precision", "product", "product_pair", "tile_at"]


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as torch's own products of this process."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def as_matrix(w: Tensor) -> Tensor:
    """``w`` (2-d) with a last dimension without gaps, copied only if it has some."""
    return w if w.stride(1) == 1 else w.contiguous()


@triton.jit
def tile_at(program, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """``(row, column)`` of a program's tile: GROUP rows of tiles are walked column by column, so that programs that
    run together share operands in L2."""
    columns = tl.cdiv(N, BN)
    in_group = GROUP * columns
    first = program // in_group * GROUP
    height = min(tl.cdiv(M, BM) - first, GROUP)
    within = program % in_group
    return first + within % height, within // height


@triton.jit
def product(
    a, b, rows, columns, M, N, begin, end, a_row, a_k, b_k, b_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile at ``rows``, ``columns`` of A B over k in [begin, end)."""
    ks = tl.arange(0, BK)
    at = begin + ks.to(tl.int64)
    a_at = a + (rows.to(tl.int64)[:, None] * a_row + at[None, :] * a_k)
    b_at = b + (at[:, None] * b_k + columns.to(tl.int64)[None, :] * b_column)
    accumulator = tl.zeros((BM, BN), tl.float32)
    for k in range(begin, end, BK):
        left = tl.load(a_at, (rows < M)[:, None] & (ks < end - k)[None, :], 0.0)
        right = tl.load(b_at, (ks < end - k)[:, None] & (columns < N)[None, :], 0.0)
        accumulator = dot(left, right, accumulator, PRECISION)
        a_at += BK * a_k
        b_at += BK * b_k
    return accumulator


@triton.jit
def product_pair(
    a, b, other, rows, columns, M, N, K, a_row, b_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles of A B and A C in one loop, where C begins ``other`` elements after B; both A and B have k inside."""
    ks = tl.arange(0, BK)
    a_at = a + (rows.to(tl.int64)[:, None] * a_row + ks[None, :])
    b_at = b + (ks[:, None] + columns.to(tl.int64)[None, :] * b_column)
    first = tl.zeros((BM, BN), tl.float32)
    second = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        inside = (ks < K - k)[:, None] & (columns < N)[None, :]
        left = tl.load(a_at, (rows < M)[:, None] & (ks < K - k)[None, :], 0.0)
        first = dot(left, tl.load(b_at, inside, 0.0), first, PRECISION)
        second = dot(left, tl.load(b_at + other, inside, 0.0), second, PRECISION)
        a_at += BK
        b_at += BK
    return first, second
