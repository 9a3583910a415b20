"""Row kernels around a normalisation N, forward and backward: one read and one write of every tensor.

    forward     n = N(x) weight + bias, and on demand x itself in another dtype
    backward    d = gradient of x from that of n;   total = d + a residual;   dropped = drop(total)
                writes total, dropped and n again (each on demand); sums over the rows for the gradients of weight,
                bias, and of the bias whose output was dropped: of dropped, or where nothing was of the residual

N may be none: forward is then a copy in another dtype, backward a dropout with its sum. The backward kernel is thus
d(norm) fused with the residual's gradient (pre placement), and d(norm) fused with the dropout's (post placement).
Statistics are computed again from the row that is read anyway. About 2 FLOP a byte: memory is the limit. Sums over
rows are one partial sum a program and one pass after (``sums``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, launch
from .dropout import Dropout, drop, keeps
from .emulation import rounded
from .norm import affine, standardize, standardize_backward
from .norm_rows_wide import norm_backward_wide, norm_forward_wide
from .rows import Rows, alignment, offsets, row_tiles, stages
from .sums import Later, Sum, partial_sums, sums_of

__all__ = ["normalize_rows", "normalize_rows_backward"]


@triton.jit(do_not_specialize=["M"])
def norm_forward(
    x, weight, bias, n, copy, eps, M, x_inner, x_outer, x_stride,
    D: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program: ROWS whole rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    x_at = offsets(rows, x_inner, x_outer, x_stride, ALIGN)[:, None] + columns[None, :]
    y = tl.load(x + x_at, inside, 0.0).to(tl.float32)
    at = rows[:, None] * D + columns[None, :]
    if copy is not None:
        tl.store(copy + at, rounded(y, copy.dtype.element_ty), inside)
    if NORM != "none":
        y, _, _ = standardize(y, inside, eps, D, NORM)
    tl.store(n + at, rounded(affine(y, weight, bias, columns, D), n.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M"])
def norm_backward(
    grad, x, weight, bias, n, residual, total, dropped, sum_weight, sum_bias, sum_output, a, eps, M,
    g_inner, g_outer, g_stride, x_inner, x_outer, x_stride, r_inner, r_outer, r_stride,
    seed, stream, p, scale, DROP: tl.constexpr, OF_RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program: every so many tiles of ROWS whole rows; the sums are (programs, D)."""
    columns = tl.arange(0, BLOCK)
    by_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    by_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    by_output = tl.zeros((ROWS, BLOCK), tl.float32)
    if DROP:
        seed = tl.load(seed)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < D)[None, :]
        at = rows[:, None] * D + columns[None, :]
        g_at = offsets(rows, g_inner, g_outer, g_stride, ALIGN)[:, None] + columns[None, :]
        if NORM == "none":
            g = tl.load(grad + g_at, inside, 0.0).to(tl.float32)
        else:
            x_at = offsets(rows, x_inner, x_outer, x_stride, ALIGN)[:, None] + columns[None, :]
            y, rstd, share = standardize(tl.load(x + x_at, inside, 0.0).to(tl.float32), inside, eps, D, NORM)
            if n is not None:
                tl.store(n + at, rounded(affine(y, weight, bias, columns, D), n.dtype.element_ty), inside)
            g = tl.load(grad + g_at, inside, 0.0).to(tl.float32)  # not before n is written: registers
            if sum_weight is not None:
                by_weight += tl.where(inside, g * y, 0.0)  # past the last row y is NaN where eps is 0
            if sum_bias is not None:
                by_bias += g
            g = standardize_backward(affine(g, weight, None, columns, D), y, rstd, share, inside, D, NORM)
        if residual is not None:
            r_at = offsets(rows, r_inner, r_outer, r_stride, ALIGN)[:, None] + columns[None, :]
            r = tl.load(residual + r_at, inside, 0.0).to(tl.float32)
            g += a * r
            if OF_RESIDUAL:
                by_output += r
        if total is not None:
            tl.store(total + at, rounded(g, total.dtype.element_ty), inside)
        if dropped is not None or (sum_output is not None and not OF_RESIDUAL):
            g = drop(g, keeps(rows, columns, D, seed, stream, p, DROP), scale, DROP)
            if dropped is not None:
                tl.store(dropped + at, rounded(g, dropped.dtype.element_ty), inside)
            if sum_output is not None and not OF_RESIDUAL:
                by_output += tl.where(inside, g, 0.0)
    at = tl.program_id(0) * D + columns
    if sum_weight is not None:
        tl.store(sum_weight + at, tl.sum(by_weight, 0), columns < D)
    if sum_bias is not None:
        tl.store(sum_bias + at, tl.sum(by_bias, 0), columns < D)
    if sum_output is not None:
        tl.store(sum_output + at, tl.sum(by_output, 0), columns < D)


def normalize_rows(
    x: Rows,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    copy: Tensor | None = None,
) -> Tensor:
    """``N(x) * weight + bias`` as ``(rows, D)`` in ``dtype``; x itself goes to ``copy`` too, if it is given."""
    width, device = x.tensor.shape[-1], x.tensor.device
    n = torch.empty((x.count, width), dtype=dtype, device=device)
    tiles = row_tiles(width)
    launch(
        norm_forward_wide if tiles.wide else norm_forward, ceil_div(x.count, tiles.ROWS), device,
        x.tensor, weight, bias, n, copy, eps, x.count, *x[2:],
        D=width, NORM=norm or "none", ROWS=tiles.ROWS, BLOCK=tiles.BLOCK, ALIGN=alignment(*x[3:]),
        num_warps=tiles.num_warps,
    )  # fmt: skip
    return n


def normalize_rows_backward(
    grad: Rows,
    x: Rows,
    norm: str | None,
    weight: Tensor | None,
    eps: float,
    *,
    bias: Tensor | None = None,
    n: Tensor | None = None,
    residual: Rows | None = None,
    a: float = 1.0,
    total: torch.dtype | None = None,
    dropped: torch.dtype | None = None,
    dropout: Dropout | None = None,
    sums: tuple[Sum | None, Sum | None, Sum | None] = (None, None, None),
    of_residual: bool = False,
    in_place: bool = False,
    later: Later | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """``total`` and ``dropped`` as ``(rows, D)`` in these dtypes (None: not written), and the sums over the rows,
    ``(D,)``, for the gradients of weight, of bias, and of what was added before the dropout, those asked for; the last
    is that of ``dropped``, or with ``of_residual`` of the residual, which is the same where nothing was dropped.
    ``n``, if it is given, gets ``N(x) * weight + bias`` again. With ``in_place`` ``total`` takes the place of ``grad``,
    which is contiguous and the caller's own, where they have one dtype. ``later`` ends the sums (``sums_of``)."""
    width, device = x.tensor.shape[-1], x.tensor.device
    tiles = row_tiles(width)
    programs = tiles.programs(x.count, device)
    assert not in_place or grad.tensor.is_contiguous()
    in_place = in_place and total == grad.tensor.dtype
    written = [
        None if d is None else grad.tensor if here else torch.empty((x.count, width), dtype=d, device=device)
        for d, here in ((total, in_place), (dropped, False))
    ]
    partial = partial_sums(sums, (programs, width), device, zero=tiles.wide)
    r, dropout = residual or grad, dropout or Dropout.of(0.0, None, 0)
    launch(
        norm_backward_wide if tiles.wide else norm_backward, programs, device,
        grad.tensor, x.tensor, weight, None if n is None else bias, n,
        None if residual is None else r.tensor, *written, *partial, a, eps, x.count,
        *grad[2:], *x[2:], *r[2:], *dropout, DROP=dropout.drops, OF_RESIDUAL=of_residual and sums[2] is not None,
        STAGES=stages(device),
        D=width, NORM=norm or "none", ROWS=tiles.ROWS, BLOCK=tiles.BLOCK, ALIGN=alignment(*grad[3:], *x[3:], *r[3:]),
        num_warps=tiles.num_warps,
    )  # fmt: skip
    return *written, sums_of(partial, sums, later)
