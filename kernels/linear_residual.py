"""A matrix product and the residual sum in one kernel.

    y = a x + c drop(A B + bias)

Forward with A = h (M, F), B = W_out^T: the second half of the FFN step. Backward with A = dz, B = W_in, no bias and no
dropout: the gradient of N(x), or where there is no norm the whole gradient of x, x being then the incoming gradient.
2 M N K FLOP; beside the operands x is read and y written once. The sum is float32 and is rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import launch
from .dropout import Dropout, drop, keeps
from .emulation import rounded
from .product import as_matrix, precision, product, tile_at
from .rows import Rows, offsets
from .slices import slices
from .tiles import tile

__all__ = ["linear_residual"]


@triton.jit(do_not_specialize=["M"])
def linear_residual_kernel(
    left, right, bias, x, y, a, c, M, N, K, left_stride, right_k, right_column, x_inner, x_outer, x_stride,
    seed, stream, p, scale, DROP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A program: one tile of y (contiguous)."""
    tile_row, tile_column = tile_at(tl.program_id(0), M, N, BM, BN, GROUP)
    rows = tile_row * BM + tl.arange(0, BM)
    columns = tile_column * BN + tl.arange(0, BN)
    tile = product(left, right, rows, columns, M, N, 0, K, left_stride, 1, right_k, right_column, BM, BN, BK, PRECISION)
    parts = slices(tile, BM, BN, SLICES)
    long_rows = rows.to(tl.int64)
    for i in tl.static_range(SLICES):
        at = tile_column * BN + i * (BN // SLICES) + tl.arange(0, BN // SLICES)
        inside = (rows < M)[:, None] & (at < N)[None, :]
        u = parts[i]
        if bias is not None:
            u += tl.load(bias + at, at < N, 0.0).to(tl.float32)[None, :]
        u = c * drop(u, keeps(rows, at, N, seed, stream, p, DROP), scale, DROP)
        if x is not None:
            x_at = offsets(long_rows, x_inner, x_outer, x_stride)[:, None] + at[None, :]
            u += a * tl.load(x + x_at, inside, 0.0).to(tl.float32)
        tl.store(y + long_rows[:, None] * N + at[None, :], rounded(u, y.dtype.element_ty), inside)


def linear_residual(
    left: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Rows | None,
    dtype: torch.dtype,
    *,
    transposed: bool,
    a: float = 1.0,
    c: float = 1.0,
    dropout: Dropout | None = None,
) -> Tensor:
    """``a residual + c drop(left weight + bias)``, (M, N) in ``dtype``, or left weight^T where transposed."""
    w = as_matrix(weight)
    count, length = left.shape
    width = w.shape[0] if transposed else w.shape[1]
    y = torch.empty((count, width), dtype=dtype, device=left.device)
    t = tile("linear", w.dtype, left.device, count, width, length)
    strides = (1, w.stride(0)) if transposed else (w.stride(0), 1)
    dropout = dropout or Dropout.of(0.0, None, 0)
    x = (None, 0, 1, 0, 0) if residual is None else residual
    launch(
        linear_residual_kernel, t.count(count, width), left.device,
        left, w, bias, x[0], y, a, c, count, width, length, left.stride(0), *strides, *x[2:],
        *dropout, DROP=dropout.drops, PRECISION=precision(w.dtype), **t.with_slices(),
    )  # fmt: skip
    return y
