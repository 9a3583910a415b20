"""Around the masks of attention: the spans of packed sequences, and the gradients of floating masks.

    spans_t = (begin, end) of the sequence of token t, from cu_seqlens
    dmask   = the sum of dS over what the mask is broadcast over;  dS = P (drop(do v^T) - delta)

A program holds one tile of dmask and forms dS once for every sequence, head and tile that shares it: 4 T S head_dim
FLOP a head. Where dmask has fewer tiles than the device has processors, the sum is cut into parts which are then summed
in order: no atomics, the same bits every time. A key padding mask (B, S) is a mask (B, 1, 1, S).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import Attention, dropout_factor, exponents, hidden, load_rows
from .device import ceil_div, launch, processors
from .emulation import dot

__all__ = ["mask_gradient", "spans_of"]


@triton.jit(do_not_specialize=["T"])
def spans_kernel(borders, spans, sequences, T, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """A program: BLOCK tokens, each by bisection of the borders."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int32)  # borders[low] <= token < borders[high]
    high = low + sequences
    for _ in range(STEPS):
        middle = (low + high) // 2
        is_low = tl.load(borders + middle, token < T, 0) <= token
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
    at = spans + token.to(tl.int64) * 2
    tl.store(at, tl.load(borders + low, token < T, 0), token < T)
    tl.store(at + 1, tl.load(borders + low + 1, token < T, 0), token < T)


def spans_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``(tokens, 2)`` int32: where the sequence of each token begins and ends."""
    spans = torch.empty((tokens, 2), dtype=torch.int32, device=cu_seqlens.device)
    sequences = cu_seqlens.shape[0] - 1
    launch(
        spans_kernel, ceil_div(tokens, 512), spans.device,
        cu_seqlens.contiguous(), spans, sequences, tokens, STEPS=sequences.bit_length(), BLOCK=512,
    )  # fmt: skip
    return spans


@triton.jit(do_not_specialize=["T", "S"])
def mask_gradient_kernel(
    q, k, v, do, statistics, delta, out, q_row, k_row, v_row, parts, of_batches, of_heads, of_rows, of_columns,
    scale, T, S, H, GROUP, mask, padding, spans, mask_b, mask_h, mask_i, mask_j, padding_b, padding_j,
    seed, stream, p, keep, BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr,
    DROP: tl.constexpr, CAUSAL: tl.constexpr, FOLD: tl.constexpr,
    HEAD: tl.constexpr, HD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program: one part of one tile of ``out (parts, batches, heads, T or 1, S or 1)``. BY_QUERY and BY_KEY: out has
    the rows, the columns of the scores; ``of_*``: how many batches, heads and tiles are summed into one."""
    tiles_i = tl.cdiv(T, BM) // of_rows
    tiles_j = tl.cdiv(S, BN) // of_columns
    tile_j = tl.program_id(0) % tiles_j
    tile_i = tl.program_id(0) // tiles_j % tiles_i
    heads = H // of_heads
    first_head = tl.program_id(0) // (tiles_j * tiles_i) % heads
    first_batch = tl.program_id(0) // (tiles_j * tiles_i * heads) // parts
    part = tl.program_id(0) // (tiles_j * tiles_i * heads) % parts
    if DROP:
        seed = tl.load(seed)
    sums = tl.zeros((BM, BN), tl.float32)
    for index in range(part, of_batches * of_heads * of_rows * of_columns, parts):
        at_j = (tile_j + index % of_columns) * BN
        at_i = (tile_i + index // of_columns % of_rows) * BM
        head = first_head + index // (of_columns * of_rows) % of_heads
        batch = tl.cast(first_batch + index // (of_columns * of_rows * of_heads), tl.int64)
        queries = at_i + tl.arange(0, BM)
        keys = at_j + tl.arange(0, BN)
        i = queries[:, None]
        j = keys[None, :]
        row = (batch * H + head) * T
        q_tile = load_rows(q + (batch * T * q_row + head * HEAD), at_i, T, q_row, BM, HEAD, HD, True)
        do_tile = load_rows(do + (batch * T * H + head) * HEAD, at_i, T, H * HEAD, BM, HEAD, HD, True)
        k_tile = load_rows(k + (batch * S * k_row + head // GROUP * HEAD), at_j, S, k_row, BN, HEAD, HD, True)
        v_tile = load_rows(v + (batch * S * v_row + head // GROUP * HEAD), at_j, S, v_row, BN, HEAD, HD, True)
        mask_here = mask
        if mask is not None:
            mask_here = mask + (batch * mask_b + tl.cast(head, tl.int64) * mask_h)
        padding_here = padding
        if padding is not None:
            padding_here = padding + batch * padding_b
        span_begin = 0
        span_end = 0
        if spans is not None:
            span_begin = tl.load(spans + i.to(tl.int64) * 2, i < T, 0)
            span_end = tl.load(spans + i.to(tl.int64) * 2 + 1, i < T, 0)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros((BM, BN), tl.float32), PRECISION)
        s = exponents(s, i, j, T, S, scale, mask_here, padding_here, mask_i, mask_j, padding_j, FOLD)
        s = tl.where(hidden(i, j, S, j, span_begin, span_end, spans, CAUSAL), float("-inf"), s)
        dp = dot(do_tile, tl.trans(v_tile), tl.zeros((BM, BN), tl.float32), PRECISION)
        if DROP:
            dp *= dropout_factor((row + at_i) * S + at_j, S, 1, seed, stream, p, keep, BM, BN)
        m = tl.load(statistics + 2 * row + queries, queries < T, 0.0)
        share = tl.load(statistics + 2 * row + T + queries, queries < T, 0.0)
        delta_row = tl.load(delta + row + queries, queries < T, 0.0)
        sums += tl.exp2(s - m[:, None]) * share[:, None] * (dp - delta_row[:, None])
    out_row = tile_i * BM + tl.arange(0, BM)[:, None]
    out_column = tile_j * BN + tl.arange(0, BN)[None, :]
    if not BY_QUERY:
        sums = tl.sum(sums, 0)[None, :]
        out_row = tl.full((1, 1), 0, tl.int32)
    if not BY_KEY:
        sums = tl.sum(sums, 1)[:, None]
        out_column = tl.full((1, 1), 0, tl.int32)
    height = T if BY_QUERY else 1
    width = S if BY_KEY else 1
    batches = tl.num_programs(0) // (tiles_j * tiles_i * heads) // parts
    first = ((part.to(tl.int64) * batches + first_batch) * heads + first_head) * height
    tl.store(out + (first + out_row) * width + out_column, sums, (out_row < height) & (out_column < width))


def mask_gradient(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, do: Tensor, statistics: Tensor, delta: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """The gradient in a floating mask of this shape, 4-d and broadcast to the scores; the others as in
    :func:`attention_backward`."""
    if a.one_key:
        return torch.zeros(shape, dtype=torch.float32, device=q.device)
    t = a.tile("queries", q.dtype, q.device)
    batches, heads, rows, columns = shape
    rows_whole, columns_whole = rows == a.queries, columns == a.keys
    tiles_i, tiles_j = ceil_div(a.queries, t.BM), ceil_div(a.keys, t.BN)
    summed = (
        a.batch // batches, a.heads // heads, 1 if rows_whole else tiles_i, 1 if columns_whole else tiles_j
    )  # fmt: skip
    tiles = batches * heads * (tiles_i // summed[2]) * (tiles_j // summed[3])
    parts = max(1, min(processors(q.device) // max(tiles, 1), summed[0] * summed[1] * summed[2] * summed[3]))
    out = torch.empty((parts, *shape), dtype=torch.float32, device=q.device)
    launch(
        mask_gradient_kernel, parts * tiles, q.device,
        q, k, v, do, statistics, delta, out, q.stride(0), k.stride(0), v.stride(0), parts, *summed, *a.arguments(),
        BY_QUERY=rows_whole, BY_KEY=columns_whole, **a.constants(t, q.dtype),
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)
