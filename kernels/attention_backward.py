"""Attention, backward: weights are formed again from their statistics, twice, so that no sum needs an atomic operation.

    P = e^(S - m) / l,   dP = drop(do v^T),   dS = P (dP - delta),   delta_i = <do_i, o_i>
    queries    dq = scale dS k                          a program holds queries and walks over the keys they see
    keys       dk = scale dS^T q,  dv = drop(P)^T do    a program holds keys and walks over the queries that see them,
                                                        of all the heads that share them

6 and 8 T S head_dim FLOP a head, half where causal (10 is what one pass with atomics takes); the same bits every time.
The tiles of the second kernel have keys along their rows: both of its sums then take P and dS from registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from .attention import Attention, dropout_factor, exponents, hidden, keys_of, load_rows
from .device import ceil_div, launch
from .emulation import dot, rounded

__all__ = ["attention_backward"]


@triton.jit
def _of_queries(
    dq, total, by_total, q_tile, do_tile, m, delta_row, k, v, from_key, to_key, i, first_weight, span_begin, span_end,
    scale, T, S, mask, padding, spans, mask_i, mask_j, padding_j, seed, stream, p, keep, k_row, v_row,
    SETTLE: tl.constexpr, MASKED: tl.constexpr, DROP: tl.constexpr, CAUSAL: tl.constexpr, FOLD: tl.constexpr,
    HEAD: tl.constexpr, HD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """After the keys in [from_key, to_key): ``l dq / scale``, or where SETTLE l and ``l delta`` as the weights have
    them here."""
    factor = scale if FOLD else 1.0
    for start in range(from_key, to_key, BN):
        keys = start + tl.arange(0, BN)
        j = keys[None, :]
        k_tile = load_rows(k, start, S, k_row, BN, HEAD, HD, MASKED)
        v_tile = load_rows(v, start, S, v_row, BN, HEAD, HD, MASKED)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros((BM, BN), tl.float32), PRECISION)
        dp = dot(do_tile, tl.trans(v_tile), tl.zeros((BM, BN), tl.float32), PRECISION)
        s = exponents(s, i, j, T, S, scale, mask, padding, mask_i, mask_j, padding_j, FOLD)
        if MASKED:
            s = tl.where(hidden(i, j, S, j, span_begin, span_end, spans, CAUSAL), float("-inf"), s)
        if DROP:
            dp *= dropout_factor(first_weight + start, S, 1, seed, stream, p, keep, BM, BN)
        weights = tl.exp2(s * factor - m[:, None])
        if SETTLE:
            total += tl.sum(weights, 1)
            by_total += tl.sum(weights * dp, 1)
        else:
            dq = dot(rounded(weights * (dp - delta_row[:, None]), k_tile.dtype), k_tile, dq, PRECISION)
    return dq, total, by_total


@triton.jit(do_not_specialize=["T", "S"])
def attention_queries_kernel(
    q, k, v, do, statistics, delta, dq, q_row, k_row, v_row, dq_row, step,
    scale, T, S, H, GROUP, mask, padding, spans, mask_b, mask_h, mask_i, mask_j, padding_b, padding_j,
    seed, stream, p, keep, SETTLE: tl.constexpr, DROP: tl.constexpr, CAUSAL: tl.constexpr, FOLD: tl.constexpr,
    HEAD: tl.constexpr, HD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program: dq, if it is given, of BM queries of one head, and before it where SETTLE their delta; ``step`` is
    the scale as the scores have it."""
    tiles = tl.cdiv(T, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles  # where causal, the longest first
    head = tl.program_id(0) // tiles % H
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    queries = tile * BM + tl.arange(0, BM)
    i = queries[:, None]
    q_tile = load_rows(q + (batch * T * q_row + head * HEAD), tile * BM, T, q_row, BM, HEAD, HD, True)
    do_tile = load_rows(do + (batch * T * H + head) * HEAD, tile * BM, T, H * HEAD, BM, HEAD, HD, True)
    row = (batch * H + head) * T
    m = tl.load(statistics + 2 * row + queries, queries < T, 0.0)
    share = tl.load(statistics + 2 * row + T + queries, queries < T, 0.0)
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
    total = tl.zeros((BM,), tl.float32)
    by_total = tl.zeros((BM,), tl.float32)
    if SETTLE:
        sums, total, by_total = _of_queries(
            sums, total, by_total, q_tile, do_tile, m, m, k, v, begin, middle, i, first_weight, span_begin, span_end,
            scale, T, S, mask, padding, spans, mask_i, mask_j, padding_j, seed, stream, p, keep, k_row, v_row,
            True, False, DROP, CAUSAL, FOLD, HEAD, HD, PRECISION, BM, BN,
        )  # fmt: skip
        sums, total, by_total = _of_queries(
            sums, total, by_total, q_tile, do_tile, m, m, k, v, middle, end, i, first_weight, span_begin, span_end,
            scale, T, S, mask, padding, spans, mask_i, mask_j, padding_j, seed, stream, p, keep, k_row, v_row,
            True, True, DROP, CAUSAL, FOLD, HEAD, HD, PRECISION, BM, BN,
        )  # fmt: skip
        delta_row = by_total / tl.where(total == 0.0, 1.0, total)
        tl.store(delta + row + queries, delta_row, queries < T)
    else:
        delta_row = tl.load(delta + row + queries, queries < T, 0.0)
    if dq is not None:
        sums, total, by_total = _of_queries(
            sums, total, by_total, q_tile, do_tile, m, delta_row, k, v, begin, middle, i, first_weight,
            span_begin, span_end,
            scale, T, S, mask, padding, spans, mask_i, mask_j, padding_j, seed, stream, p, keep, k_row, v_row,
            False, False, DROP, CAUSAL, FOLD, HEAD, HD, PRECISION, BM, BN,
        )  # fmt: skip
        sums, total, by_total = _of_queries(
            sums, total, by_total, q_tile, do_tile, m, delta_row, k, v, middle, end, i, first_weight,
            span_begin, span_end,
            scale, T, S, mask, padding, spans, mask_i, mask_j, padding_j, seed, stream, p, keep, k_row, v_row,
            False, True, DROP, CAUSAL, FOLD, HEAD, HD, PRECISION, BM, BN,
        )  # fmt: skip
        channels = tl.arange(0, HD)
        at = (batch * T + queries)[:, None] * dq_row + head * HEAD + channels[None, :]
        inside = (queries < T)[:, None] & (channels < HEAD)[None, :]
        tl.store(dq + at, rounded(sums * (share * step)[:, None], dq.dtype.element_ty), inside)


@triton.jit
def _over_queries(
    dk, dv, k_tile, v_tile, q, do, statistics, delta, from_query, to_query, end, j, first_weight, span_begin, span_end,
    scale, T, S, H, mask, padding, spans, mask_i, mask_j, padding_j, seed, stream, p, keep, q_row,
    MASKED: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    DROP: tl.constexpr, CAUSAL: tl.constexpr, FOLD: tl.constexpr,
    HEAD: tl.constexpr, HD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``(dk / scale, dv)`` after the queries in [from_query, to_query); those from ``end`` on count for nothing."""
    factor = scale if FOLD else 1.0
    for start in range(from_query, to_query, BM):
        queries = start + tl.arange(0, BM)
        i = queries[None, :]
        q_tile = load_rows(q, start, end, q_row, BM, HEAD, HD, True)
        do_tile = load_rows(do, start, end, H * HEAD, BM, HEAD, HD, True)
        m = tl.load(statistics + queries, queries < end, 0.0)
        share = tl.load(statistics + T + queries, queries < end, 0.0)
        s = dot(k_tile, tl.trans(q_tile), tl.zeros((BN, BM), tl.float32), PRECISION)
        s = exponents(s, i, j, T, S, scale, mask, padding, mask_i, mask_j, padding_j, FOLD)
        if MASKED:
            s = tl.where(hidden(i, j, S, i, span_begin, span_end, spans, CAUSAL), float("-inf"), s)
        weights = tl.exp2(s * factor - m[None, :]) * share[None, :]
        if DROP:
            drop = dropout_factor(first_weight + tl.cast(start, tl.int64) * S, 1, S, seed, stream, p, keep, BN, BM)
        if NEED_V:
            dropped = weights * drop if DROP else weights
            dv = dot(rounded(dropped, do_tile.dtype), do_tile, dv, PRECISION)
        if NEED_K:
            dp = dot(v_tile, tl.trans(do_tile), tl.zeros((BN, BM), tl.float32), PRECISION)
            if DROP:
                dp *= drop
            delta_row = tl.load(delta + queries, queries < end, 0.0)
            dk = dot(rounded(weights * (dp - delta_row[None, :]), q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S"])
def attention_keys_kernel(
    q, k, v, do, statistics, delta, dk, dv, q_row, k_row, v_row, dk_row, dv_row, step,
    scale, T, S, H, GROUP, mask, padding, spans, mask_b, mask_h, mask_i, mask_j, padding_b, padding_j,
    seed, stream, p, keep, DROP: tl.constexpr, CAUSAL: tl.constexpr, FOLD: tl.constexpr,
    HEAD: tl.constexpr, HD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program: dk and dv, each if it is given, of BN keys of one of the heads that hold keys."""
    tiles = tl.cdiv(S, BN)
    tile = tl.program_id(0) % tiles  # where causal, the longest first
    kv_head = tl.program_id(0) // tiles % (H // GROUP)
    batch = (tl.program_id(0) // tiles // (H // GROUP)).to(tl.int64)
    keys = tile * BN + tl.arange(0, BN)
    j = keys[:, None]
    k_tile = load_rows(k + (batch * S * k_row + kv_head * HEAD), tile * BN, S, k_row, BN, HEAD, HD, True)
    v_tile = load_rows(v + (batch * S * v_row + kv_head * HEAD), tile * BN, S, v_row, BN, HEAD, HD, True)
    if padding is not None:
        padding += batch * padding_b
    # The queries in [begin, middle) see some of these keys, those in [middle, end) all of them.
    first = tile * BN
    last = tl.minimum(first + BN, S) - 1
    begin = 0
    middle = 0
    end = T
    span_begin = 0
    span_end = 0
    if spans is not None:
        span_begin = tl.load(spans + j.to(tl.int64) * 2, j < S, 0)
        span_end = tl.load(spans + j.to(tl.int64) * 2 + 1, j < S, 0)
        begin = tl.load(spans + first.to(tl.int64) * 2)
        end = tl.load(spans + last.to(tl.int64) * 2 + 1)
        middle = tl.where(tl.load(spans + last.to(tl.int64) * 2) == begin, begin, end)
    if CAUSAL:
        begin = tl.maximum(begin, first)
        middle = tl.maximum(middle, last)
    middle = tl.minimum(begin + tl.cdiv(middle - begin, BM) * BM, tl.maximum(begin, end))

    if DROP:
        seed = tl.load(seed)
    dk_sums = tl.zeros((BN, HD), tl.float32)
    dv_sums = tl.zeros((BN, HD), tl.float32)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        mask_of_head = mask
        if mask is not None:
            mask_of_head = mask + (batch * mask_b + tl.cast(head, tl.int64) * mask_h)
        q_of_head = q + (batch * T * q_row + head * HEAD)
        do_of_head = do + (batch * T * H + head) * HEAD
        row = (batch * H + head) * T
        first_weight = row * S + first
        dk_sums, dv_sums = _over_queries(
            dk_sums, dv_sums, k_tile, v_tile, q_of_head, do_of_head, statistics + 2 * row, delta + row,
            begin, middle, end, j, first_weight, span_begin, span_end, scale, T, S, H, mask_of_head, padding, spans,
            mask_i, mask_j, padding_j, seed, stream, p, keep, q_row,
            True, dk is not None, dv is not None, DROP, CAUSAL, FOLD, HEAD, HD, PRECISION, BM, BN,
        )  # fmt: skip
        dk_sums, dv_sums = _over_queries(
            dk_sums, dv_sums, k_tile, v_tile, q_of_head, do_of_head, statistics + 2 * row, delta + row,
            middle, end, end, j, first_weight, span_begin, span_end, scale, T, S, H, mask_of_head, padding, spans,
            mask_i, mask_j, padding_j, seed, stream, p, keep, q_row,
            False, dk is not None, dv is not None, DROP, CAUSAL, FOLD, HEAD, HD, PRECISION, BM, BN,
        )  # fmt: skip
    channels = tl.arange(0, HD)
    inside = (keys < S)[:, None] & (channels < HEAD)[None, :]
    row = (batch * S + keys)[:, None]
    if dk is not None:
        at = row * dk_row + kv_head * HEAD + channels[None, :]
        tl.store(dk + at, rounded(dk_sums * step, dk.dtype.element_ty), inside)
    if dv is not None:
        at = row * dv_row + kv_head * HEAD + channels[None, :]
        tl.store(dv + at, rounded(dv_sums, dv.dtype.element_ty), inside)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, a: Attention, do: Tensor, statistics: Tensor, delta: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, settle: bool,
) -> None:  # fmt: skip
    """Fills ``dq (B T, H head_dim)``, ``dk`` and ``dv (B S, Hkv head_dim)``, each if it is given; rows have no gaps.
    ``do (B T, H head_dim)`` is contiguous, and so are ``statistics (B, H, 2, T)`` and ``delta (B, H, T)``, which is
    filled too where ``settle``. ``dk`` and ``dv`` may be where ``k`` and ``v`` are: a program reads no other's keys."""
    zero = [gradient for gradient in (dq, dk) if a.one_key and gradient is not None]
    if a.one_key:
        dq = dk = None
    settle = settle and not a.one_key
    rows = q.stride(0), k.stride(0), v.stride(0)
    if dq is not None or settle:
        tile = a.tile("queries", q.dtype, q.device)
        launch(
            attention_queries_kernel, ceil_div(a.queries, tile.BM) * a.heads * a.batch, q.device,
            q, k, v, do, statistics, delta, dq, *rows, 1 if dq is None else dq.stride(0), a.scale,
            *a.arguments(), SETTLE=settle, **a.constants(tile, q.dtype),
        )  # fmt: skip
    if dk is not None or dv is not None:
        tile = a.tile("keys", q.dtype, q.device)
        strides = [1 if d is None else d.stride(0) for d in (dk, dv)]
        launch(
            attention_keys_kernel, ceil_div(a.keys, tile.BN) * a.kv_heads * a.batch, q.device,
            q, k, v, do, statistics, delta, dk, dv, *rows, *strides, a.scale,
            *a.arguments(), **a.constants(tile, q.dtype),
        )  # fmt: skip
    for gradient in zero:
        gradient.zero_()
