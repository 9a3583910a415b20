"""A matrix product and the residual sum in one kernel, and where a tile holds whole rows their norm too.

    y = a x + c drop(A B + bias),    or total = that, y = N(total)

Forward with A = h (M, F), B = W_out^T: the second half of the FFN step. Backward with A = dz, B = W_in, no bias and no
dropout: the gradient of N(x), or where there is no norm the whole gradient of x, x being then the incoming gradient.
2 M N K FLOP; beside the operands x is read and y written once. The sum is float32 and is rounded once.

The norm follows in the same kernel where N is at most :data:`ROW`, the columns of the widest tile: a row is in the
registers of four threads. Few rows are cut in parts along k (``product_parts``): the pass that adds them is this
epilogue over whole rows, of up to 8192 columns where a norm follows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, launch, power_of_2
from .dropout import Dropout, drop, keeps
from .emulation import rounded
from .norm import affine, rstd_of, standardize
from .norm_rows import normalize_rows
from .product import as_matrix, as_operands, as_results, precision, product, put, tile_at, turns
from .product_parts import product_parts, sum_of_parts
from .rows import WIDEST, Rows, aligned, alignment, as_rows, offsets, row_tiles
from .slices import slices
from .tiles import cut, tile

__all__ = ["NO_NORM", "Norm", "linear_residual"]

ROW = 256
COLUMNS = 512  # of a program that adds parts, where no norm follows


@triton.jit
def _with_residual(
    u, bias, x, a, c, rows, at, inside, N, x_inner, x_outer, x_stride, seed, stream, p, scale, DROP: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """``a x + c drop(u + bias)`` of the tile at ``rows`` (int64), ``at``."""
    if bias is not None:
        u += tl.load(bias + at, at < N, 0.0).to(tl.float32)[None, :]
    u = c * drop(u, keeps(rows, at, N, seed, stream, p, DROP), scale, DROP)
    if x is not None:
        x_at = offsets(rows, x_inner, x_outer, x_stride, ALIGN)[:, None] + at[None, :]
        u += a * tl.load(x + x_at, inside, 0.0).to(tl.float32)
    return u


@triton.jit(do_not_specialize=["M"])
def linear_residual_kernel(
    left, right, bias, x, y, total, weight, shift, a, c, eps, M, N, K, left_stride, right_stride,
    x_inner, x_outer, x_stride, seed, stream, p, scale, DROP: tl.constexpr, NORM: tl.constexpr, OF_TOTAL: tl.constexpr,
    RIGHT_ALONG_K: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ALIGN: tl.constexpr, STORES: tl.constexpr, PERSISTENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A program: its share of the tiles of y (contiguous, like total); whole rows where there is a norm."""
    N = aligned(N, ALIGN)
    first, last, step = turns(M, N, BM, BN, PERSISTENT)
    for index in tl.range(first, last, step, flatten=PERSISTENT):
        tile_row, tile_column = tile_at(index, M, N, BM, BN, GROUP)
        tile = product(
            left, right, tile_row * BM, tile_column * BN, M, N, 0, K, left_stride, right_stride,
            True, RIGHT_ALONG_K, DESCRIPTORS, ALIGN, BM, BN, BK, PRECISION,
        )  # fmt: skip
        parts = slices(tile, BM, BN, SLICES)
        rows = tile_row * BM + tl.arange(0, BM).to(tl.int64)
        sums = ()
        for i in tl.static_range(SLICES):
            begin = tile_column * BN + i * (BN // SLICES)
            at = begin + tl.arange(0, BN // SLICES)
            inside = (rows < M)[:, None] & (at < N)[None, :]
            u = _with_residual(
                parts[i], bias, x, a, c, rows, at, inside, N, x_inner, x_outer, x_stride,
                seed, stream, p, scale, DROP, ALIGN,
            )  # fmt: skip
            if NORM == "none":
                put(y, u, tile_row * BM, begin, rows, at, N, inside, STORES)
            else:
                if total is not None:
                    as_written = rounded(u, total.dtype.element_ty)
                    tl.store(total + rows[:, None] * N + at[None, :], as_written, inside)
                    if OF_TOTAL:
                        u = as_written.to(tl.float32)
                sums = sums + (tl.where(inside, u, 0.0),)
        if NORM != "none":
            _write_normalized(sums, y, weight, shift, eps, rows, M, N, NORM, BM, BN // SLICES, SLICES)


@triton.jit
def _write_normalized(
    sums, y, weight, shift, eps, rows, M, N,
    NORM: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """``norm.standardize`` of rows in slices (BM, WIDTH), which are 0 outside."""
    mean = tl.zeros((BM, 1), tl.float32)
    if NORM == "layer":
        for i in tl.static_range(SLICES):
            mean += tl.sum(sums[i], 1)[:, None]
        mean = mean / N
    squares = tl.zeros((BM, 1), tl.float32)
    for i in tl.static_range(SLICES):
        at = i * WIDTH + tl.arange(0, WIDTH)
        centred = tl.where((at < N)[None, :], sums[i] - mean, 0.0)
        squares += tl.sum(centred * centred, 1)[:, None]
    rstd, _ = rstd_of(squares, eps, N, NORM)
    for i in tl.static_range(SLICES):
        at = i * WIDTH + tl.arange(0, WIDTH)
        inside = (rows < M)[:, None] & (at < N)[None, :]
        value = affine((sums[i] - mean) * rstd, weight, shift, at, N)
        tl.store(y + rows[:, None] * N + at[None, :], rounded(value, y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "parts"])
def residual_of_parts_kernel(
    partial, bias, x, y, total, weight, shift, a, c, eps, M, N, parts,
    x_inner, x_outer, x_stride, seed, stream, p, scale, DROP: tl.constexpr, NORM: tl.constexpr, OF_TOTAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The same from the product's parts. A program: ROWS rows, BLOCK columns, which are all where there is a norm."""
    N = aligned(N, ALIGN)
    blocks = tl.cdiv(N, BLOCK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (at < N)[None, :]
    u = _with_residual(
        sum_of_parts(partial, parts, rows, at, M, N, inside),
        bias, x, a, c, rows, at, inside, N, x_inner, x_outer, x_stride, seed, stream, p, scale, DROP, ALIGN,
    )  # fmt: skip
    y_at = rows[:, None] * N + at[None, :]
    if NORM != "none":
        if total is not None:
            as_written = rounded(u, total.dtype.element_ty)
            tl.store(total + y_at, as_written, inside)
            if OF_TOTAL:
                u = as_written.to(tl.float32)
        u, _, _ = standardize(tl.where(inside, u, 0.0), inside, eps, N, NORM)
        u = affine(u, weight, shift, at, N)
    tl.store(y + y_at, rounded(u, y.dtype.element_ty), inside)


class Norm(NamedTuple):
    """What follows the sum; ``total``, if it is given, gets the sum itself, and with ``of_total`` it is the norm of
    that, as it is rounded there."""

    name: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    total: Tensor | None
    of_total: bool = False


NO_NORM = Norm("none", None, None, 0.0, None)


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
    norm: Norm | None = None,
) -> Tensor:
    """``a residual + c drop(left weight + bias)``, (M, N) in ``dtype``, or left weight^T where transposed. Where ``a``
    is 0 the residual is not read, as BLAS reads no C where beta is 0: NaN and infinities in it stay out of the sum."""
    w, residual = as_matrix(weight), residual if a != 0.0 else None
    (count, length), device = left.shape, left.device
    width = w.shape[0] if transposed else w.shape[1]
    plan = cut("few", w.dtype, device, count, width, length)
    if norm is not None and width > (ROW if plan[1] == 1 else WIDEST):
        y = linear_residual(
            left, weight, bias, residual, torch.float32, transposed=transposed, a=a, c=c, dropout=dropout
        )
        return normalize_rows(as_rows(y), norm.name, norm.weight, norm.bias, norm.eps, dtype, norm.total)
    y = torch.empty((count, width), dtype=dtype, device=device)
    x, dropout, n = residual or (None, 0, 1, 0, 0), dropout or Dropout.of(0.0, None, 0), norm or NO_NORM
    if plan[1] > 1:
        partial = product_parts(left, w, (True, transposed), plan)
        tiles = row_tiles(min(width, COLUMNS) if norm is None else width)
        launch(
            residual_of_parts_kernel, ceil_div(count, tiles.ROWS) * ceil_div(width, tiles.BLOCK), device,
            partial, bias, x[0], y, n.total, n.weight, n.bias, a, c, n.eps, count, width, plan[1], *x[2:],
            *dropout, DROP=dropout.drops, NORM=n.name, OF_TOTAL=n.of_total, ROWS=tiles.ROWS, BLOCK=tiles.BLOCK,
            ALIGN=alignment(width, *x[3:]), num_warps=tiles.num_warps,
        )  # fmt: skip
        return y
    name = "linear" if norm is None else "linear_norm_dropout" if dropout.drops else "linear_norm"
    t = tile(name, w.dtype, device, count, width, length)
    if norm is not None:
        t = t._replace(BN=max(power_of_2(width), 16))
    operands, constants = as_operands(left, w, t, True, transposed, width, *x[3:])
    result, stores = as_results(t, y) if norm is None else ((y,), {"STORES": False})
    launch(
        linear_residual_kernel, t.programs(count, width, device), device,
        *operands, bias, x[0], *result, n.total, n.weight, n.bias, a, c, n.eps, count, width, length,
        left.stride(0), w.stride(0), *x[2:], *dropout, DROP=dropout.drops, NORM=n.name, OF_TOTAL=n.of_total,
        RIGHT_ALONG_K=transposed, PRECISION=precision(w.dtype), **constants, **stores, **t.constants(),
    )  # fmt: skip
    return y
