"""``norm_rows.py`` for rows that do not fit in registers: a program walks over one row in blocks of columns. Only the
first walk comes from memory, the others find the row in the caches. Arguments are as there; the sums, zero before, are
a row of memory for each program, which no other program touches.
"""

import triton
import triton.language as tl

from .dropout import drop, keeps
from .emulation import rounded
from .norm import affine, rstd_of
from .rows import offsets

__all__ = ["norm_backward_wide", "norm_forward_wide"]


@triton.jit
def _read(row, columns, D: tl.constexpr):
    """A block of a row as (1, BLOCK)."""
    return tl.load(row + columns, columns < D, 0.0).to(tl.float32)[None, :]


@triton.jit
def _statistics(x_row, eps, D: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """``(mean, rstd, share)`` of a row, each (1, 1); the mean is 0 except for layer."""
    mean = tl.zeros((1, 1), tl.float32)
    if NORM == "layer":
        total = tl.zeros((1, BLOCK), tl.float32)
        for start in range(0, D, BLOCK):
            total += _read(x_row, start + tl.arange(0, BLOCK), D)
        mean = tl.sum(total, 1)[:, None] / D
    squares = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        centred = tl.where((columns < D)[None, :], _read(x_row, columns, D) - mean, 0.0)
        squares += centred * centred
    rstd, share = rstd_of(tl.sum(squares, 1)[:, None], eps, D, NORM)
    return mean, rstd, share


@triton.jit(do_not_specialize=["M"])
def norm_forward_wide(
    x, weight, bias, n, copy, eps, M, x_inner, x_outer, x_stride,
    D: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    tl.static_assert(ROWS == 1)
    row = tl.program_id(0).to(tl.int64)
    x_row = x + offsets(row, x_inner, x_outer, x_stride, ALIGN)
    if NORM != "none":
        mean, rstd, _ = _statistics(x_row, eps, D, NORM, BLOCK)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = (columns < D)[None, :]
        at = row * D + columns[None, :]
        y = _read(x_row, columns, D)
        if copy is not None:
            tl.store(copy + at, rounded(y, copy.dtype.element_ty), inside)
        if NORM != "none":
            y = (y - mean) * rstd
        tl.store(n + at, rounded(affine(y, weight, bias, columns, D), n.dtype.element_ty), inside)


@triton.jit
def _add(sums, values, columns, D: tl.constexpr):
    """Adds to the program's row of the sums."""
    at = sums + tl.program_id(0) * D + columns[None, :]
    inside = (columns < D)[None, :]
    tl.store(at, tl.load(at, inside, 0.0) + values, inside)


@triton.jit(do_not_specialize=["M"])
def norm_backward_wide(
    grad, x, weight, bias, n, residual, total, dropped, sum_weight, sum_bias, sum_output, a, eps, M,
    g_inner, g_outer, g_stride, x_inner, x_outer, x_stride, r_inner, r_outer, r_stride,
    seed, stream, p, scale, DROP: tl.constexpr, OF_RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    tl.static_assert(ROWS == 1)
    if DROP:
        seed = tl.load(seed)
    for tile in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64)
        rows = row + tl.arange(0, 1)
        g_row = grad + offsets(row, g_inner, g_outer, g_stride, ALIGN)
        x_row = x + offsets(row, x_inner, x_outer, x_stride, ALIGN)
        if NORM != "none":
            mean, rstd, share = _statistics(x_row, eps, D, NORM, BLOCK)
            ones = tl.zeros((1, BLOCK), tl.float32)
            products = tl.zeros((1, BLOCK), tl.float32)
            for start in range(0, D, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                g = affine(_read(g_row, columns, D), weight, None, columns, D)
                ones += g
                products += g * (_read(x_row, columns, D) - mean) * rstd
            g_y = tl.sum(products, 1)[:, None] * share
            g_1 = tl.sum(ones, 1)[:, None] / D if NORM == "layer" else 0.0
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = (columns < D)[None, :]
            at = row * D + columns[None, :]
            g = _read(g_row, columns, D)
            if NORM != "none":
                y = (_read(x_row, columns, D) - mean) * rstd
                if n is not None:
                    tl.store(n + at, rounded(affine(y, weight, bias, columns, D), n.dtype.element_ty), inside)
                if sum_weight is not None:
                    _add(sum_weight, g * y, columns, D)
                if sum_bias is not None:
                    _add(sum_bias, g, columns, D)
                g = rstd * (affine(g, weight, None, columns, D) - g_1 - y * g_y)
            if residual is not None:
                r = _read(residual + offsets(row, r_inner, r_outer, r_stride, ALIGN), columns, D)
                g += a * r
                if OF_RESIDUAL:
                    _add(sum_output, r, columns, D)
            if total is not None:
                tl.store(total + at, rounded(g, total.dtype.element_ty), inside)
            if dropped is not None or (sum_output is not None and not OF_RESIDUAL):
                g = drop(g, keeps(rows, columns, D, seed, stream, p, DROP), scale, DROP)
                if dropped is not None:
                    tl.store(dropped + at, rounded(g, dropped.dtype.element_ty), inside)
                if sum_output is not None and not OF_RESIDUAL:
                    _add(sum_output, g, columns, D)
