"""What the passes of ``sphere_attend_step`` share, and its row kernel.

The step itself is that of ``normalize_step`` (``step.py``). Forward ends with it. Backward begins with it: from dy to
dx past the attention, and to what the passes over pairs read of a row,

    g_i = du_i / total_i    in the dtype of x, a product's operand
    d_i = <g_i, u_i>        (softmax)
"""

import triton
import triton.language as tl

from .emulation import rounded
from .step import STEP_CHANNELS, move, move_backward, read_step

__all__ = [
    "add_or_store",
    "fits",
    "magnitude",
    "move_and_store",
    "read_number",
    "rows_backward_kernel",
    "save_statistics",
    "shift_of",
    "signed",
    "truncated",
]

LOG2_E = tl.constexpr(1.4426950408889634)


# -- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def read_number(pointer, number):
    """The number, or that of a tensor () if it is given."""
    if pointer is not None:
        return tl.load(pointer).to(tl.float32)
    else:
        return number


@triton.jit
def magnitude(beta):
    """``|beta| log2(e)``: the sign is in the owner's points, which costs nothing a pair, so that the largest score has
    the largest product."""
    return tl.abs(beta) * LOG2_E


@triton.jit
def signed(points, beta):
    """``points`` with the sign of beta."""
    wide = points.to(tl.float32)
    return rounded(tl.where(beta < 0, -wide, wide), points.dtype)


@triton.jit
def shift_of(most):
    """What is taken off scores whose largest is ``most``; 0 if all are -inf, whose weights then are 0."""
    return tl.where(most == -float("inf"), 0.0, most)


@triton.jit
def truncated(e):
    """Weights of a softmax in the 8 bits of a bfloat16, as float32. Of numbers that are divided by their sum it does
    not matter that all become less; to round them and widen them again would take the unit of the exponentials."""
    return (e.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def fits(total, inside):
    """Whether every row's sum of weights by a shift that is not its largest score is far from overflow and from 0: a
    weight that underflows is then less than a rounding error of the sum. Never so of NaN."""
    return tl.min(tl.where(((total > 2.0**-64) & (total < 2.0**64)) | (inside == 0), 1, 0)) == 1


# -- rows ------------------------------------------------------------------------------------------------------------


@triton.jit
def save_statistics(saved_shift, saved_total, rows, inside, most, total, M, SOFTMAX: tl.constexpr, dtype: tl.constexpr):
    """The sum by which u has to be divided. Backward finds ``w_ij = 2^(t_ij - shift_i) / total_i``: of float16 e_ij is
    the weight itself, and total_i what would take it, or du_i, out of range."""
    shift = shift_of(most)
    rest = tl.exp2(-shift)
    if not SOFTMAX:
        total = rest * M
    if saved_shift is not None:
        kept = total
        if dtype == tl.float16:
            if SOFTMAX:
                shift += tl.log2(total)
                kept = tl.full(total.shape, 1.0, tl.float32)
            else:
                shift += tl.log2(tl.cast(M, tl.float32))
                kept = rest
        tl.store(saved_shift + rows, shift, inside)
        tl.store(saved_total + rows, kept, inside)
    return total


@triton.jit
def move_and_store(
    u, x, y, saved_u, step_pointer, step, eps, rows, inside, columns,
    D: tl.constexpr, DIRECTION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y of ``rows``, and u if it is to be kept; u is 0 in the columns from D on."""
    inside = inside[:, None] & (columns < D)[None, :]
    at = rows[:, None] * D + columns[None, :]
    if saved_u is not None:
        tl.store(saved_u + at, u, inside)
    u = tl.where(inside, u, 0.0)
    xs = tl.load(x + at, inside, 0.0).to(tl.float32)
    ys = move(xs, u, read_step(step_pointer, step, columns, D, STEP), eps, DIRECTION)
    tl.store(y + at, rounded(ys, y.dtype.element_ty), inside)


@triton.jit
def add_or_store(at, value, inside, ADD: tl.constexpr):
    """Add to a gradient of x, or write another one."""
    if ADD:
        value += tl.load(at, inside, 0.0)
    tl.store(at, rounded(value, at.dtype.element_ty), inside)


@triton.jit
def rows_backward_kernel(
    grad, x, u, shift, total, grad_x, g, offset, apart, partial, step_pointer, step, eps, M, N,
    D: tl.constexpr, DIRECTION: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: every so many tiles of ROWS whole rows; partial (programs, D) or (programs,) is its share of dstep,
    apart () becomes 1 where a row's shift is not that of the first of its N rows. What is not given is not needed."""
    columns = tl.arange(0, BLOCK)
    c = read_step(step_pointer, step, columns, D, STEP)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < D)[None, :]
        at = rows[:, None] * D + columns[None, :]
        dy = tl.load(grad + at, inside, 0.0).to(tl.float32)
        xs = tl.load(x + at, inside, 0.0).to(tl.float32)
        us = tl.load(u + at, inside, 0.0)
        dx, du, dstep = move_backward(dy, xs, us, c, eps, DIRECTION)
        if grad_x is not None:
            tl.store(grad_x + at, rounded(dx, grad_x.dtype.element_ty), inside)
        if g is not None:
            gs = rounded(du / tl.load(total + rows, rows < M, 1.0)[:, None], g.dtype.element_ty)
            tl.store(g + at, gs, inside)
            if offset is not None:
                tl.store(offset + rows, tl.sum(gs.to(tl.float32) * us, 1), rows < M)
        if apart is not None:
            first = tl.load(shift + rows // N * N, rows < M, 0.0)
            tl.store(apart, 1, tl.max(tl.where(tl.load(shift + rows, rows < M, 0.0) == first, 0, 1)) == 1)
        sums += tl.where(inside, dstep, 0.0)
    if partial is not None:
        if STEP == STEP_CHANNELS:
            tl.store(partial + tl.program_id(0) * D + columns, tl.sum(sums, 0), columns < D)
        else:
            tl.store(partial + tl.program_id(0), tl.sum(sums))
