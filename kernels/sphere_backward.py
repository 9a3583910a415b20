"""The passes over pairs of ``sphere_attend_step``'s backward on matrix products: flash attention's two, each of which
owns what it writes, so that nothing needs an atomic operation.

    queries    a_ij = e_ij (<g_i, v_j> - d_i);  dq_i = beta sum_j a_ij k_j;  dbeta = sum_ij a_ij <q_i, k_j>
    keys       dk_j = beta sum_i a_ij q_i;  dv_j = sum_i e_ij g_i

d_i = <g_i, u_i>, but where a few weights are most of a row <g_i, v_j> - d_i is a small difference of two sums that were
not rounded alike. ``sum_j a_ij``, which has to be 0, tells the error of d_i, times total_i: d_i is settled by adding
it. Of points among themselves dq needs no second look for this, as sum_j e_ij k_j = total_i u_i is known ("after");
else a loop of its own comes first ("before"), after which a gradient that is 0 comes out as 0.
"""

import triton
import triton.language as tl

from .emulation import dot, rounded
from .sphere_forward import load_points, sees
from .sphere_rows import LOG2_E, add_or_store, read_number

__all__ = ["wide_keys_kernel", "wide_queries_kernel"]


@triton.jit
def _along_keys(
    q, g, offset, shift, dq, excess, slope, k, v, begin, end, rows, N, M, scale, E: tl.constexpr, D: tl.constexpr,
    SAME: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, NEED_Q: tl.constexpr,
    NEED_BETA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The keys in [begin, end): ``(sum_j a_ij k_j, sum_j a_ij, sum_j a_ij <q_i, k_j>)``."""
    keys = tl.arange(0, BN)
    k += tl.cast(begin, tl.int64) * E
    v += tl.cast(begin, tl.int64) * D
    for start in tl.range(begin, end, BN, num_stages=1 if MASKED else None):
        ks = load_points(k, keys, tl.arange(0, BE), M - start, E, BE, MASKED)
        vs = ks if SAME else load_points(v, keys, tl.arange(0, BD), M - start, D, BD, MASKED)
        s = dot(q, tl.trans(ks), tl.zeros((BM, BN), tl.float32), PRECISION)
        e = tl.exp2(s * scale - shift[:, None])
        if MASKED:
            e = tl.where(sees(rows[:, None], (start + keys)[None, :], N, M, CAUSAL), e, 0.0)
        a = e * (dot(g, tl.trans(vs), tl.zeros((BM, BN), tl.float32), PRECISION) - offset[:, None])
        excess += tl.sum(a, 1)
        if NEED_BETA:
            slope += tl.sum(a * s, 1)
        if NEED_Q:
            dq = dot(rounded(a, ks.dtype), ks, dq, PRECISION)
        k += BN * E
        v += BN * D
    return dq, excess, slope


@triton.jit
def _over_keys(
    q, g, offset, shift, dq, excess, slope, k, v, whole, end, rows, N, M, scale, E: tl.constexpr, D: tl.constexpr,
    SAME: tl.constexpr, CAUSAL: tl.constexpr, NEED_Q: tl.constexpr, NEED_BETA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The keys in [0, end): those before ``whole`` are there and seen by every row."""
    dq, excess, slope = _along_keys(
        q, g, offset, shift, dq, excess, slope, k, v, 0, whole, rows, N, M, scale,
        E, D, SAME, CAUSAL, False, NEED_Q, NEED_BETA, PRECISION, BM, BN, BE, BD,
    )  # fmt: skip
    return _along_keys(
        q, g, offset, shift, dq, excess, slope, k, v, whole, end, rows, N, M, scale,
        E, D, SAME, CAUSAL, True, NEED_Q, NEED_BETA, PRECISION, BM, BN, BE, BD,
    )  # fmt: skip


@triton.jit
def wide_queries_kernel(
    q, k, v, g, u, shift, total, offset, apart, grad_q, slopes, beta_pointer, beta, N, M,
    D: tl.constexpr, E: tl.constexpr, SAME: tl.constexpr, CAUSAL: tl.constexpr, SETTLE: tl.constexpr,
    NEED_Q: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: BM queries of one batch element, the settled ``offset`` of their rows, their terms of dbeta (slopes).
    Where grad_q is that of x, it has the terms past the attention and gets these added."""
    if apart is not None:  # and 0: sphere_points.py has done it
        if tl.load(apart) == 0:
            return
    blocks = tl.cdiv(N, BM)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    begin = (blocks - 1 - tl.program_id(0) % blocks) * BM
    rows = begin + tl.arange(0, BM)
    here, to_e, to_d = tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, BD)
    inside = rows < N
    at = batch * N + rows
    number = read_number(beta_pointer, beta)
    scale = number * LOG2_E
    q += (batch * N + begin) * E
    qs = load_points(q, here, to_e, N - begin, E, BE, True)
    gs = load_points(g + (batch * N + begin) * D, here, to_d, N - begin, D, BD, True)
    shifts = tl.load(shift + at, inside, 0.0)
    d = tl.load(offset + at, inside, 0.0)
    k += batch * M * E
    v += batch * M * D
    whole = (tl.minimum(begin + 1, M) if CAUSAL else M) // BN * BN
    end = tl.minimum(begin + BM, M) if CAUSAL else M
    dq, slope = tl.zeros((BM, BE), tl.float32), tl.zeros((BM,), tl.float32)
    if SETTLE == "before":
        excess = tl.zeros((BM,), tl.float32)
        _, excess, _ = _over_keys(
            qs, gs, d, shifts, dq, excess, slope, k, v, whole, end, rows, N, M, scale,
            E, D, SAME, CAUSAL, False, False, PRECISION, BM, BN, BE, BD,
        )  # fmt: skip
        d += excess / tl.load(total + at, inside, 1.0)
        tl.store(offset + at, d, inside)
    if NEED_Q:
        excess = tl.zeros((BM,), tl.float32)
        dq, excess, slope = _over_keys(
            qs, gs, d, shifts, dq, excess, slope, k, v, whole, end, rows, N, M, scale,
            E, D, SAME, CAUSAL, True, slopes is not None, PRECISION, BM, BN, BE, BD,
        )  # fmt: skip
        if SETTLE == "after":
            us = load_points(u + (batch * N + begin) * D, here, to_d, N - begin, D, BD, True)
            dq -= excess[:, None] * us
            tl.store(offset + at, d + excess / tl.load(total + at, inside, 1.0), inside)
        if slopes is not None:
            tl.store(slopes + at, slope, inside)
        if grad_q is not None:
            to = grad_q + (at[:, None] * E + to_e[None, :])
            add_or_store(to, number * dq, inside[:, None] & (to_e < E)[None, :], ADD)


@triton.jit
def _along_queries(
    k, v, dk, dv, q, g, shift, offset, begin, end, keys, N, M, scale, E: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The queries in [begin, end): ``(sum_i a_ij q_i, sum_i e_ij g_i)``."""
    rows = tl.arange(0, BN)
    q += tl.cast(begin, tl.int64) * E
    g += tl.cast(begin, tl.int64) * D
    for start in range(begin, end, BN):
        qs = load_points(q, rows, tl.arange(0, BE), N - start, E, BE, MASKED)
        gs = load_points(g, rows, tl.arange(0, BD), N - start, D, BD, MASKED)
        s = dot(k, tl.trans(qs), tl.zeros((BM, BN), tl.float32), PRECISION)
        there = (rows < N - start) if MASKED else None
        shifts = tl.load(shift + start + rows, there, 0.0 if MASKED else None)
        e = tl.exp2(s * scale - shifts[None, :])
        if MASKED:
            e = tl.where(sees((start + rows)[None, :], keys[:, None], N, M, CAUSAL), e, 0.0)
        if NEED_V:
            dv = dot(rounded(e, gs.dtype), gs, dv, PRECISION)
        if NEED_K:
            offsets = tl.load(offset + start + rows, there, 0.0 if MASKED else None)
            a = e * (dot(v, tl.trans(gs), tl.zeros((BM, BN), tl.float32), PRECISION) - offsets[None, :])
            dk = dot(rounded(a, qs.dtype), qs, dk, PRECISION)
        q += BN * E
        g += BN * D
    return dk, dv


@triton.jit
def wide_keys_kernel(
    q, k, v, g, shift, offset, apart, grad_k, grad_v, beta_pointer, beta, N, M,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, ADD_K: tl.constexpr, ADD_V: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: BM keys of one batch element; gradients of x have terms already and get these added."""
    if apart is not None:  # and 0: sphere_points.py has done it
        if tl.load(apart) == 0:
            return
    blocks = tl.cdiv(M, BM)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    begin = tl.program_id(0) % blocks * BM
    keys = begin + tl.arange(0, BM)
    here, to_e, to_d = tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, BD)
    number = read_number(beta_pointer, beta)
    scale = number * LOG2_E
    ks = load_points(k + (batch * M + begin) * E, here, to_e, M - begin, E, BE, True)
    vs = load_points(v + (batch * M + begin) * D, here, to_d, M - begin, D, BD, True)
    q += batch * N * E
    g += batch * N * D
    shift += batch * N
    offset += batch * N
    dk, dv = tl.zeros((BM, BE), tl.float32), tl.zeros((BM, BD), tl.float32)
    # Queries before `first` see none of the keys, from `border` on they see all that are there.
    first = tl.minimum(begin // BN * BN, N) if CAUSAL else 0
    border = tl.minimum(tl.cdiv(begin + BM - 1, BN) * BN, N) if CAUSAL else 0
    whole = tl.maximum(N // BN * BN, border)
    if CAUSAL:
        dk, dv = _along_queries(
            ks, vs, dk, dv, q, g, shift, offset, first, border, keys, N, M, scale,
            E, D, CAUSAL, True, NEED_K, NEED_V, PRECISION, BM, BN, BE, BD,
        )  # fmt: skip
    # What is masked comes first: ptxas lets each product wait for the last where a loop of another kind follows.
    dk, dv = _along_queries(
        ks, vs, dk, dv, q, g, shift, offset, whole, N, keys, N, M, scale,
        E, D, CAUSAL, True, NEED_K, NEED_V, PRECISION, BM, BN, BE, BD,
    )  # fmt: skip
    dk, dv = _along_queries(
        ks, vs, dk, dv, q, g, shift, offset, border, whole, keys, N, M, scale,
        E, D, CAUSAL, False, NEED_K, NEED_V, PRECISION, BM, BN, BE, BD,
    )  # fmt: skip
    at = (batch * M + keys)[:, None]
    inside = (keys < M)[:, None]
    dk *= number
    if ADD_K and ADD_V:  # both are x's
        dv += dk
    elif NEED_K:
        add_or_store(grad_k + (at * E + to_e[None, :]), dk, inside & (to_e < E)[None, :], ADD_K)
    if NEED_V or (ADD_K and ADD_V):
        add_or_store(grad_v + (at * D + to_d[None, :]), dv, inside & (to_d < D)[None, :], ADD_V)
