"""``normalize_step``: a step on the unit sphere, y = S(x + step v) with S(z) = z / max(|z|, eps).

    v = u - <u, x> x    direction="tangent"
    v = S(u) - x        direction="difference"
    v = u               direction="ambient"

Backward, with z = x + step v, l = max(|z|, eps), y = z / l and the incoming gradient g:

    dz = (g - y <g, y>) / l                (g / l where |z| < eps)        dv = step dz
    dx = dz - <dv, x> u - <u, x> dv        du = dv - <dv, x> x            tangent
    dx = dz - dv                           du = (dv - S(u) <dv, S(u)>) / |u|       difference
    dx = dz                                du = dv                        ambient
    dstep = sum over the rows of dz v

Forward reads x and u and writes y; backward reads g, x and u and writes dx and du: about 3 FLOP a byte, so that memory
is the limit. Nothing is saved. Every sum over rows is a partial sum a program, then one over the programs: no atomics,
the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, launch, why_not_on
from .emulation import rounded
from .normalize_step_wide import step_backward_wide, step_forward_wide
from .rows import LONGEST, alignment, as_rows, offsets, row_tiles, stages
from .step import STEP_CHANNELS, move, move_backward, read_step, step_kind
from .sums import Sum, sums_of

__all__ = ["Saved", "backward", "forward", "saved_shapes", "why_not"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Saved(NamedTuple):
    """Nothing: the backward pass reads ``x`` and ``u`` again."""


def saved_shapes(x: Tensor, tensors, options, save: str) -> Saved:
    return Saved()


def why_not(request) -> str | None:
    if request.x.dtype not in DTYPES:
        return f"it runs float32, bfloat16 and float16, not {request.x.dtype}"
    if request.x.shape[-1] > LONGEST:
        return f"its rows have at most {LONGEST} channels, not {request.x.shape[-1]}"
    return why_not_on(request.x.device)


@triton.jit(do_not_specialize=["M"])
def step_forward(
    x, u, y, step_pointer, step, eps, M,
    x_inner, x_outer, x_stride, u_inner, u_outer, u_stride,
    D: tl.constexpr, DIRECTION: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program: ROWS whole rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    x_at = offsets(rows, x_inner, x_outer, x_stride, ALIGN)[:, None] + columns[None, :]
    u_at = offsets(rows, u_inner, u_outer, u_stride, ALIGN)[:, None] + columns[None, :]
    xs = tl.load(x + x_at, inside, 0.0).to(tl.float32)
    us = tl.load(u + u_at, inside, 0.0).to(tl.float32)
    c = read_step(step_pointer, step, columns, D, STEP)
    ys = move(xs, us, c, eps, DIRECTION)
    tl.store(y + rows[:, None] * D + columns[None, :], rounded(ys, y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M"])
def step_backward(
    grad, x, u, grad_x, grad_u, partial, step_pointer, step, eps, M,
    g_inner, g_outer, g_stride, x_inner, x_outer, x_stride, u_inner, u_outer, u_stride,
    D: tl.constexpr, DIRECTION: tl.constexpr, STEP: tl.constexpr,
    NEED_X: tl.constexpr, NEED_U: tl.constexpr, NEED_STEP: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program: every so many tiles of ROWS whole rows; partial (programs, D) or (programs,) is its share of dstep."""
    columns = tl.arange(0, BLOCK)
    c = read_step(step_pointer, step, columns, D, STEP)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < D)[None, :]
        g_at = offsets(rows, g_inner, g_outer, g_stride, ALIGN)[:, None] + columns[None, :]
        x_at = offsets(rows, x_inner, x_outer, x_stride, ALIGN)[:, None] + columns[None, :]
        u_at = offsets(rows, u_inner, u_outer, u_stride, ALIGN)[:, None] + columns[None, :]
        g = tl.load(grad + g_at, inside, 0.0).to(tl.float32)
        xs = tl.load(x + x_at, inside, 0.0).to(tl.float32)
        us = tl.load(u + u_at, inside, 0.0).to(tl.float32)
        dx, du, dstep = move_backward(g, xs, us, c, eps, DIRECTION)
        y_at = rows[:, None] * D + columns[None, :]
        if NEED_X:
            tl.store(grad_x + y_at, rounded(dx, grad_x.dtype.element_ty), inside)
        if NEED_U:
            tl.store(grad_u + y_at, rounded(du, grad_u.dtype.element_ty), inside)
        if NEED_STEP:
            sums += tl.where(inside, dstep, 0.0)  # past the last row it is NaN where eps is 0
    if NEED_STEP:
        if STEP == STEP_CHANNELS:
            tl.store(partial + tl.program_id(0) * D + columns, tl.sum(sums, 0), columns < D)
        else:
            tl.store(partial + tl.program_id(0), tl.sum(sums))


def forward(x: Tensor, tensors, options, save: str) -> tuple[Tensor, Saved]:
    """y, shape and dtype of x."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y, Saved()
    xs, us = as_rows(x), as_rows(tensors.u)
    step = None if tensors.step_tensor is None else tensors.step_tensor.contiguous()
    tiles = row_tiles(x.shape[-1])
    kernel = step_forward_wide if tiles.wide else step_forward
    launch(
        kernel, ceil_div(xs.count, tiles.ROWS), x.device,
        xs.tensor, us.tensor, y, step, options.step, options.eps, xs.count, *xs[2:], *us[2:],
        D=x.shape[-1], DIRECTION=options.direction, STEP=step_kind(tensors.step_tensor),
        ROWS=tiles.ROWS, BLOCK=tiles.BLOCK, ALIGN=alignment(*xs[3:], *us[3:]), num_warps=tiles.num_warps,
    )  # fmt: skip
    return y, Saved()


def backward(grad: Tensor, needs: tuple[bool, ...], x: Tensor, tensors, saved: Saved, options):
    """The gradients in x and in (u, step_tensor), None where not needed."""
    need_x, need_u, need_step = needs
    width = x.shape[-1]
    grad_x, grad_u = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None for need in (need_x, need_u)
    )
    if x.numel() == 0:
        return grad_x, type(tensors)(grad_u, torch.zeros_like(tensors.step_tensor) if need_step else None)
    gs, xs, us = as_rows(grad), as_rows(x), as_rows(tensors.u)
    step = None if tensors.step_tensor is None else tensors.step_tensor.contiguous()
    tiles, kind = row_tiles(width), step_kind(tensors.step_tensor)
    programs = tiles.programs(xs.count, x.device)
    partial = None
    if need_step:
        shape = (programs, width) if kind == STEP_CHANNELS.value else (programs,)
        new = torch.zeros if tiles.wide else torch.empty  # the wide kernel adds to it
        partial = new(shape, dtype=torch.float32, device=x.device)
    kernel = step_backward_wide if tiles.wide else step_backward
    launch(
        kernel, programs, x.device,
        gs.tensor, xs.tensor, us.tensor, grad_x, grad_u, partial, step, options.step, options.eps, xs.count,
        *gs[2:], *xs[2:], *us[2:],
        D=width, DIRECTION=options.direction, STEP=kind, NEED_X=need_x, NEED_U=need_u, NEED_STEP=need_step,
        STAGES=stages(x.device), ROWS=tiles.ROWS, BLOCK=tiles.BLOCK,
        ALIGN=alignment(*gs[3:], *xs[3:], *us[3:]), num_warps=tiles.num_warps,
    )  # fmt: skip
    wanted = Sum(tensors.step_tensor.dtype) if need_step else None
    return grad_x, type(tensors)(grad_u, *sums_of([partial], [wanted]))
