"""Attention, forward: a program holds BM queries of one head and walks over the keys that they see.

    m = max over j of S_ij,   l = sum over j of e^(S_ij - m),   o_i = sum over j of drop(e^(S_ij - m)) v_j / l

with the maximum so far, l and o scaled as it grows (Dao 2023, arXiv 2307.08691). 4 T S head_dim FLOP a head, half where
causal; read q, k, v, written o and, for the backward pass, m and 1 / l: e^(S - m) / l is then the forward's weight,
where the relative error of e^(S - lse) would be the absolute one of the log-sum-exp. At head_dim 64 an H100 takes as
long for the exponentials (16 a clock and processor) as for the products: one instruction each, the scale folded in.
A query that sees nothing has l = 0: o = 0, and 0 is written for m and 1 / l.
"""

import triton
import triton.language as tl
from torch import Tensor

from .attention import Attention, dropout_factor, exponents, hidden, keys_of, load_rows
from .device import ceil_div, launch
from .emulation import dot, rounded

__all__ = ["attention_forward"]


@triton.jit
def _over_keys(
    o, m, total, q_tile, k, v, from_key, to_key, i, first_weight, span_begin, span_end,
    scale, T, S, mask, padding, spans, mask_i, mask_j, padding_j, seed, stream, p, keep, k_row, v_row,
    MASKED: tl.constexpr, DROP: tl.constexpr, CAUSAL: tl.constexpr, FOLD: tl.constexpr,
    HEAD: tl.constexpr, HD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``(o, m, total)`` after the keys in [from_key, to_key)."""
    factor = scale if FOLD else 1.0
    for start in range(from_key, to_key, BN):
        keys = start + tl.arange(0, BN)
        j = keys[None, :]
        k_tile = load_rows(k, start, S, k_row, BN, HEAD, HD, MASKED)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros((BM, BN), tl.float32), PRECISION)
        s = exponents(s, i, j, T, S, scale, mask, padding, mask_i, mask_j, padding_j, FOLD)
        if MASKED:
            s = tl.where(hidden(i, j, S, j, span_begin, span_end, spans, CAUSAL), float("-inf"), s)
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        below = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights = tl.exp2(s * factor - below[:, None])
        shrink = tl.exp2(m - below)
        total = total * shrink + tl.sum(weights, 1)
        if DROP:
            weights *= dropout_factor(first_weight + start, S, 1, seed, stream, p, keep, BM, BN)
        v_tile = load_rows(v, start, S, v_row, BN, HEAD, HD, MASKED)
        o = dot(rounded(weights, v_tile.dtype), v_tile, o * shrink[:, None], PRECISION)
        m = m_new
    return o, m, total


@triton.jit(do_not_specialize=["T", "S"])
def attention_forward_kernel(
    q, k, v, o, statistics, q_row, k_row, v_row,
    scale, T, S, H, GROUP, mask, padding, spans, mask_b, mask_h, mask_i, mask_j, padding_b, padding_j,
    seed, stream, p, keep, DROP: tl.constexpr, CAUSAL: tl.constexpr, FOLD: tl.constexpr,
    HEAD: tl.constexpr, HD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program: BM queries of one head; o is (B T, H HEAD), statistics (B, H, 2, T)."""
    tiles = tl.cdiv(T, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles  # where causal, the longest first
    head = tl.program_id(0) // tiles % H
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    queries = tile * BM + tl.arange(0, BM)
    i = queries[:, None]
    q_tile = load_rows(q + (batch * T * q_row + head * HEAD), tile * BM, T, q_row, BM, HEAD, HD, True)
    k += batch * S * k_row + head // GROUP * HEAD
    v += batch * S * v_row + head // GROUP * HEAD
    if mask is not None:
        mask += batch * mask_b + head.to(tl.int64) * mask_h
    if padding is not None:
        padding += batch * padding_b
    span_begin = 0
    span_end = 0
    if spans is not None:
        span_begin = tl.load(spans + i.to(tl.int64) * 2, i < T, 0)
        span_end = tl.load(spans + i.to(tl.int64) * 2 + 1, i < T, 0)
    first_weight = ((batch * H + head) * T + tile * BM) * S
    begin, middle, end = keys_of(tile * BM, tl.minimum(tile * BM + BM, T) - 1, S, spans, BN, CAUSAL)

    if DROP:
        seed = tl.load(seed)
    sums = tl.zeros((BM, HD), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums, m, total = _over_keys(
        sums, m, total, q_tile, k, v, begin, middle, i, first_weight, span_begin, span_end,
        scale, T, S, mask, padding, spans, mask_i, mask_j, padding_j, seed, stream, p, keep, k_row, v_row,
        False, DROP, CAUSAL, FOLD, HEAD, HD, PRECISION, BM, BN,
    )  # fmt: skip
    sums, m, total = _over_keys(
        sums, m, total, q_tile, k, v, middle, end, i, first_weight, span_begin, span_end,
        scale, T, S, mask, padding, spans, mask_i, mask_j, padding_j, seed, stream, p, keep, k_row, v_row,
        True, DROP, CAUSAL, FOLD, HEAD, HD, PRECISION, BM, BN,
    )  # fmt: skip

    channels = tl.arange(0, HD)
    sums /= tl.where(total == 0.0, 1.0, total)[:, None]
    at = (batch * T + queries)[:, None] * (H * HEAD) + head * HEAD + channels[None, :]
    tl.store(o + at, rounded(sums, o.dtype.element_ty), (queries < T)[:, None] & (channels < HEAD)[None, :])
    if statistics is not None:
        at_row = statistics + (batch * H + head) * 2 * T + queries
        sees = total != 0.0
        tl.store(at_row, tl.where(sees, m, 0.0), queries < T)
        tl.store(at_row + T, tl.where(sees, 1.0 / tl.where(sees, total, 1.0), 0.0), queries < T)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, a: Attention, o: Tensor, statistics: Tensor | None) -> None:
    """Attention of ``q (B T, H head_dim)`` to ``k``, ``v (B S, Hkv head_dim)``, rows without gaps, into ``o`` and
    ``statistics (B, H, 2, T)``, if they are given."""
    tile = a.tile("forward", q.dtype, q.device)
    launch(
        attention_forward_kernel, ceil_div(a.queries, tile.BM) * a.heads * a.batch, q.device,
        q, k, v, o, statistics, q.stride(0), k.stride(0), v.stride(0), *a.arguments(), **a.constants(tile, q.dtype),
    )  # fmt: skip
