"""Row kernels over heads: what happens to queries and keys between their projection and the scores, and <do, o>.

    rotary     (u, w) -> (u cos - w sin, w cos + u sin) of channels r and R / 2 + r, the first R of each head
    unit       then q / max(|q|, eps) times ``qk_scale``
    backward   of both in one pass, and the sum over the tokens for the gradient of ``qk_scale``
    delta      the row sums of do * o, which the backward pass of attention subtracts

A program holds some tokens of one head. Each channel is read with its partner, r with R / 2 + r, from the same cache
lines: nothing is exchanged between threads but the sum of squares. Memory is the limit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, launch, power_of_2, processors
from .emulation import rounded
from .rows import PROGRAMS_PER_PROCESSOR, TILE
from .sums import Sum, sums_of

__all__ = ["delta_of_heads", "position_heads", "position_heads_backward"]

UNIT_EPS = tl.constexpr(1e-12)


@triton.jit
def _partners(channels, HALF: tl.constexpr):
    """``(partner of each channel, sign of its sine, its column of cos and sin)``; 0 where nothing turns."""
    partner = tl.where(channels < HALF, channels + HALF, channels - HALF)
    turns = channels < 2 * HALF
    sign = tl.where(channels < HALF, -1.0, 1.0)
    return tl.where(turns, partner, channels), tl.where(turns, sign, 0.0), tl.where(turns, channels % HALF, 0)


@triton.jit
def _turned(x, x_partner, c, s):
    """A channel after the rotation; its partner's is the same with -s."""
    return x * c + x_partner * s


@triton.jit
def _angles(cos, sin, rows, columns, sign, T, HALF: tl.constexpr, inside):
    """``cos`` and ``sin`` times ``sign`` of a tile, 1 and 0 where nothing turns."""
    at = (rows % T)[:, None] * HALF + columns[None, :]
    turns = inside & (sign != 0.0)[None, :]
    return tl.load(cos + at, turns, 1.0).to(tl.float32), tl.load(sin + at, turns, 0.0).to(tl.float32) * sign[None, :]


@triton.jit(do_not_specialize=["M", "T"])
def position_forward_kernel(
    x, y, cos, sin, qk_scale, M, T, HEADS, x_row, y_row, scale_heads, scale_stride,
    HALF: tl.constexpr, HEAD: tl.constexpr, HD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program: TOKENS tokens of one head."""
    head = tl.program_id(0) % HEADS
    rows = (tl.program_id(0) // HEADS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.arange(0, HD)
    inside = (rows < M)[:, None] & (channels < HEAD)[None, :]
    x_at = x + rows[:, None] * x_row + head * HEAD
    z = tl.load(x_at + channels[None, :], inside, 0.0).to(tl.float32)
    if cos is not None:
        partner, sign, columns = _partners(channels, HALF)
        c, s = _angles(cos, sin, rows, columns, sign, T, HALF, inside)
        z = _turned(z, tl.load(x_at + partner[None, :], inside, 0.0).to(tl.float32), c, s)
    if qk_scale is not None:
        z /= tl.maximum(tl.sqrt(tl.sum(z * z, 1)), UNIT_EPS)[:, None]
        z *= tl.load(qk_scale + head % scale_heads * scale_stride + channels, channels < HEAD, 0.0).to(tl.float32)
    tl.store(y + rows[:, None] * y_row + head * HEAD + channels[None, :], rounded(z, y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M", "T"])
def position_backward_kernel(
    grad, x, dx, sums, cos, sin, qk_scale, M, T, HEADS, grad_row, x_row, dx_row, scale_heads, scale_stride,
    HALF: tl.constexpr, HEAD: tl.constexpr, HD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program: every so many tiles of TOKENS tokens of one head; sums are (programs of a head, HEADS, HEAD)."""
    head = tl.program_id(0) % HEADS
    channels = tl.arange(0, HD)
    if cos is not None:
        partner, sign, columns = _partners(channels, HALF)
    by_scale = tl.zeros((TOKENS, HD), tl.float32)
    if qk_scale is not None:
        scale_of_head = qk_scale + head % scale_heads * scale_stride
        weight = tl.load(scale_of_head + channels, channels < HEAD, 0.0).to(tl.float32)
        if cos is not None:
            weight_partner = tl.load(scale_of_head + partner, channels < HEAD, 0.0).to(tl.float32)
    for tile in range(tl.program_id(0) // HEADS, tl.cdiv(M, TOKENS), tl.num_programs(0) // HEADS):
        rows = tl.cast(tile, tl.int64) * TOKENS + tl.arange(0, TOKENS)
        inside = (rows < M)[:, None] & (channels < HEAD)[None, :]
        g_at = grad + rows[:, None] * grad_row + head * HEAD
        g = tl.load(g_at + channels[None, :], inside, 0.0).to(tl.float32)
        if cos is not None:
            c, s = _angles(cos, sin, rows, columns, sign, T, HALF, inside)
            g_partner = tl.load(g_at + partner[None, :], inside, 0.0).to(tl.float32)
        if qk_scale is not None:
            x_at = x + rows[:, None] * x_row + head * HEAD
            y = tl.load(x_at + channels[None, :], inside, 0.0).to(tl.float32)
            if cos is not None:
                z_partner = tl.load(x_at + partner[None, :], inside, 0.0).to(tl.float32)
                y_partner = _turned(z_partner, y, c, -s)
                y = _turned(y, z_partner, c, s)
            length = tl.sqrt(tl.sum(y * y, 1))[:, None]
            shrink = 1.0 / tl.maximum(length, UNIT_EPS)
            y *= shrink
            if sums is not None:
                by_scale += g * y
            g *= weight[None, :]
            radial = tl.where(length >= UNIT_EPS, tl.sum(g * y, 1)[:, None], 0.0)
            g = (g - y * radial) * shrink
            if cos is not None:
                g_partner = (g_partner * weight_partner[None, :] - y_partner * shrink * radial) * shrink
        if dx is not None:
            if cos is not None:
                g = _turned(g, g_partner, c, -s)
            out = dx + rows[:, None] * dx_row + head * HEAD + channels[None, :]
            tl.store(out, rounded(g, dx.dtype.element_ty), inside)
    if sums is not None:
        tl.store(sums + tl.program_id(0) * HEAD + channels, tl.sum(by_scale, 0), channels < HEAD)


@triton.jit(do_not_specialize=["M", "T"])
def delta_kernel(
    do, o, delta, M, T, H, HEAD: tl.constexpr, HD: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """A program: TOKENS tokens of one head; do and o are (M, H HEAD), delta is (B, H, T)."""
    head = tl.program_id(0) % H
    rows = (tl.program_id(0) // H).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.arange(0, HD)
    inside = (rows < M)[:, None] & (channels < HEAD)[None, :]
    at = (rows[:, None] * H + head) * HEAD + channels[None, :]
    products = tl.load(do + at, inside, 0.0).to(tl.float32) * tl.load(o + at, inside, 0.0).to(tl.float32)
    tl.store(delta + (rows // T * H + head) * T + rows % T, tl.sum(products, 1), rows < M)


def _tiles(head_dim: int) -> dict[str, int]:
    hd = power_of_2(head_dim)
    return {"HEAD": head_dim, "HD": hd, "TOKENS": max(1, min(TILE // hd, 256))}


def _scale(qk_scale: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The scale and how its heads follow each other."""
    if qk_scale is None:
        return None, 1, 0
    s = qk_scale.contiguous()
    return (s, 1, 0) if s.dim() == 1 else (s, s.shape[0], s.shape[1])


def _rotary(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """``(cos, sin, R / 2)``."""
    if cos is None or cos.shape[1] == 0:
        return None, None, 0
    return cos.contiguous(), sin.contiguous(), cos.shape[1]


def position_heads(
    x: Tensor, head_dim: int, tokens: int, cos: Tensor | None, sin: Tensor | None, qk_scale: Tensor | None, y: Tensor
) -> None:
    """The heads side by side in ``x (B tokens, heads head_dim)`` as the scores see them, into ``y``, of x's shape; rows
    have no gaps. ``qk_scale`` is ``(head_dim,)`` or ``(H, head_dim)``, of H heads and then the next H."""
    count, heads = x.shape[0], x.shape[1] // head_dim
    tiles, (cos, sin, half), (scale, *scale_at) = _tiles(head_dim), _rotary(cos, sin), _scale(qk_scale)
    launch(
        position_forward_kernel, ceil_div(count, tiles["TOKENS"]) * heads, x.device,
        x, y, cos, sin, scale, count, tokens, heads, x.stride(0), y.stride(0), *scale_at, HALF=half, **tiles,
    )  # fmt: skip


def position_heads_backward(
    grad: Tensor,
    x: Tensor,
    head_dim: int,
    tokens: int,
    cos: Tensor | None,
    sin: Tensor | None,
    qk_scale: Tensor | None,
    dx: Tensor | None,
    need_scale: bool,
) -> Tensor | None:
    """The gradient in x goes to ``dx``, if it is given; returns that in the heads' scales, (heads, head_dim)."""
    count, heads = x.shape[0], x.shape[1] // head_dim
    tiles, (cos, sin, half), (scale, *scale_at) = _tiles(head_dim), _rotary(cos, sin), _scale(qk_scale)
    parts = min(ceil_div(count, tiles["TOKENS"]), ceil_div(PROGRAMS_PER_PROCESSOR * processors(x.device), heads))
    sums = torch.empty((parts, heads, head_dim), dtype=torch.float32, device=x.device) if need_scale else None
    launch(
        position_backward_kernel, parts * heads, x.device,
        grad, x, dx, sums, cos, sin, scale, count, tokens, heads,
        grad.stride(0), x.stride(0), 0 if dx is None else dx.stride(0), *scale_at, HALF=half, **tiles,
    )  # fmt: skip
    return sums_of([sums], [Sum(torch.float32)])[0]


def delta_of_heads(do: Tensor, o: Tensor, heads: int, tokens: int) -> Tensor:
    """The row sums of ``do * o``, both ``(B tokens, heads head_dim)`` and contiguous, as ``(B, heads, tokens)``."""
    count = do.shape[0]
    tiles = _tiles(do.shape[1] // heads)
    delta = torch.empty((count // tokens, heads, tokens), dtype=torch.float32, device=do.device)
    launch(
        delta_kernel, ceil_div(count, tiles["TOKENS"]) * heads, do.device, do, o, delta, count, tokens, heads, **tiles
    )  # fmt: skip
    return delta
