"""``normalize_step`` for rows that do not fit in registers: a program walks over one row in blocks of columns, once for
each sum that the next one needs and once to write. Only the first walk comes from memory: a row of 65536 float32
channels is 256 KiB, and stays in the caches. The arguments are those of the kernels in ``normalize_step.py``.
"""

import triton
import triton.language as tl

from .emulation import rounded
from .rows import offsets
from .step import STEP_CHANNELS, move_back, read_step, velocity

__all__ = ["step_backward_wide", "step_forward_wide"]


@triton.jit
def _read(row, columns, D: tl.constexpr):
    """A block of a row as (1, BLOCK)."""
    return tl.load(row + columns, columns < D, 0.0).to(tl.float32)[None, :]


@triton.jit
def _along(x_row, u_row, D: tl.constexpr, BLOCK: tl.constexpr, DIRECTION: tl.constexpr):
    """<u, x>, for "difference" <u, u>: (1, 1)."""
    total = tl.zeros((1, BLOCK), tl.float32)
    if DIRECTION != "ambient":
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            us = _read(u_row, columns, D)
            total += us * (us if DIRECTION == "difference" else _read(x_row, columns, D))
    return tl.sum(total, 1)[:, None]


@triton.jit(do_not_specialize=["M"])
def step_forward_wide(
    x, u, y, step_pointer, step, eps, M,
    x_inner, x_outer, x_stride, u_inner, u_outer, u_stride,
    D: tl.constexpr, DIRECTION: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    tl.static_assert(ROWS == 1)
    row = tl.program_id(0).to(tl.int64)
    x_row = x + offsets(row, x_inner, x_outer, x_stride, ALIGN)
    u_row = u + offsets(row, u_inner, u_outer, u_stride, ALIGN)
    along = _along(x_row, u_row, D, BLOCK, DIRECTION)
    squares = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        xs = _read(x_row, columns, D)
        v = velocity(xs, _read(u_row, columns, D), along, eps, DIRECTION)
        z = xs + read_step(step_pointer, step, columns, D, STEP) * v
        squares += z * z
    length = tl.maximum(tl.sqrt(tl.sum(squares, 1)), eps)[:, None]
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        xs = _read(x_row, columns, D)
        v = velocity(xs, _read(u_row, columns, D), along, eps, DIRECTION)
        z = xs + read_step(step_pointer, step, columns, D, STEP) * v
        tl.store(y + row * D + columns[None, :], rounded(z / length, y.dtype.element_ty), (columns < D)[None, :])


@triton.jit(do_not_specialize=["M"])
def step_backward_wide(
    grad, x, u, grad_x, grad_u, partial, step_pointer, step, eps, M,
    g_inner, g_outer, g_stride, x_inner, x_outer, x_stride, u_inner, u_outer, u_stride,
    D: tl.constexpr, DIRECTION: tl.constexpr, STEP: tl.constexpr,
    NEED_X: tl.constexpr, NEED_U: tl.constexpr, NEED_STEP: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Where dstep has a number for every channel, a program adds to its own row of partial, zero before, in memory."""
    tl.static_assert(ROWS == 1)
    program = tl.program_id(0)
    sums = tl.zeros((1, BLOCK), tl.float32)
    for tile in range(program, M, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64)
        g_row = grad + offsets(row, g_inner, g_outer, g_stride, ALIGN)
        x_row = x + offsets(row, x_inner, x_outer, x_stride, ALIGN)
        u_row = u + offsets(row, u_inner, u_outer, u_stride, ALIGN)
        along = _along(x_row, u_row, D, BLOCK, DIRECTION)
        squares = tl.zeros((1, BLOCK), tl.float32)
        products = tl.zeros((1, BLOCK), tl.float32)
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            xs = _read(x_row, columns, D)
            v = velocity(xs, _read(u_row, columns, D), along, eps, DIRECTION)
            z = xs + read_step(step_pointer, step, columns, D, STEP) * v
            squares += z * z
            products += z * _read(g_row, columns, D)
        norm = tl.sqrt(tl.sum(squares, 1))[:, None]
        length = tl.maximum(norm, eps)
        radial = tl.where(norm >= eps, tl.sum(products, 1)[:, None] / length, 0.0)
        backs = tl.zeros((1, BLOCK), tl.float32)
        if DIRECTION != "ambient":
            for start in range(0, D, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                xs, us = _read(x_row, columns, D), _read(u_row, columns, D)
                c = read_step(step_pointer, step, columns, D, STEP)
                z = xs + c * velocity(xs, us, along, eps, DIRECTION)
                dv = c * (_read(g_row, columns, D) - z / length * radial) / length
                backs += dv * (us if DIRECTION == "difference" else xs)
        back = tl.sum(backs, 1)[:, None]
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = (columns < D)[None, :]
            xs, us = _read(x_row, columns, D), _read(u_row, columns, D)
            c = read_step(step_pointer, step, columns, D, STEP)
            v = velocity(xs, us, along, eps, DIRECTION)
            dz = (_read(g_row, columns, D) - (xs + c * v) / length * radial) / length
            dx, du = move_back(dz, c * dz, xs, us, along, back, eps, DIRECTION)
            if NEED_X:
                tl.store(grad_x + row * D + columns[None, :], rounded(dx, grad_x.dtype.element_ty), inside)
            if NEED_U:
                tl.store(grad_u + row * D + columns[None, :], rounded(du, grad_u.dtype.element_ty), inside)
            if NEED_STEP:
                if STEP == STEP_CHANNELS:
                    share = partial + program * D + columns[None, :]
                    tl.store(share, tl.load(share, inside, 0.0) + dz * v, inside)
                else:
                    sums += dz * v
    if NEED_STEP and STEP != STEP_CHANNELS:
        tl.store(partial + program, tl.sum(sums))
