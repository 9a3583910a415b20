"""The forward pass of ``sphere_attend_step`` on matrix products, flash attention with the step as its epilogue.

A program owns BM queries and meets the keys in blocks of BN: scores and weights never leave the chip, and where
queries, keys and values are the points themselves a block is loaded once for both products.

FIXED: of points among themselves no score is above that of the longest point with itself, which on the sphere is
``|beta|``. So one shift, the first point's, serves every row: no maximum is sought, no sum is scaled again, and the
weights are symmetric but for their rows' totals. Where backward makes use of that (``sphere_points.py``) a total is
that of the truncated weights, so that u is their mean exactly. Points whose lengths differ so much that a total leaves
the range are met again by the online softmax, which knows nothing of all this.
"""

import triton
import triton.language as tl

from .emulation import dot, rounded
from .sphere_rows import LOG2_E, fits, move_and_store, read_number, save_statistics, shift_of, truncated

__all__ = ["load_points", "sees", "wide_forward_kernel"]


@triton.jit
def load_points(p, rows, columns, left, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """``rows`` of ``p (left, D)`` as (rows, BD); without MASKED all of them are there."""
    at = p + (rows[:, None] * D + columns[None, :])
    if MASKED:
        return tl.load(at, (rows < left)[:, None] & (columns < D)[None, :], 0.0)
    elif D == BD:
        return tl.load(at)
    else:
        return tl.load(at, (columns < D)[None, :], 0.0)


@triton.jit
def sees(queries, keys, N, M, CAUSAL: tl.constexpr):
    """Whether query and key are there, and the query sees the key."""
    seen = (queries < N) & (keys < M)
    if CAUSAL:
        seen = seen & (keys <= queries)
    return seen


@triton.jit
def _attend(
    q, u, total, most, k, v, begin, end, rows, N, M, scale,
    E: tl.constexpr, D: tl.constexpr, SAME: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The keys in [begin, end): ``(sum_j e_ij v_j, sum_j e_ij, max_j t_ij)``."""
    keys = tl.arange(0, BN)
    k += tl.cast(begin, tl.int64) * E
    v += tl.cast(begin, tl.int64) * D
    for start in tl.range(begin, end, BN, num_stages=1 if MASKED else None):
        ks = load_points(k, keys, tl.arange(0, BE), M - start, E, BE, MASKED)
        vs = ks if SAME else load_points(v, keys, tl.arange(0, BD), M - start, D, BD, MASKED)
        s = dot(q, tl.trans(ks), tl.zeros((BM, BN), tl.float32), PRECISION)
        t = s * scale
        if MASKED:
            seen = sees(rows[:, None], (start + keys)[None, :], N, M, CAUSAL)
            t = tl.where(seen, t, -float("inf"))
        new = tl.maximum(most, tl.max(t, 1))
        shift = shift_of(new)
        e = tl.exp2(s * scale - shift[:, None])  # rounded once, as the backward pass does
        if MASKED:
            e = tl.where(seen, e, 0.0)
        again = tl.exp2(most - shift)
        total = total * again + tl.sum(e, 1)
        u = dot(rounded(e, vs.dtype), vs, u * again[:, None], PRECISION)
        most = new
        k += BN * E
        v += BN * D
    return u, total, most


@triton.jit
def _attend_fixed(
    q, u, total, shift, k, v, begin, end, rows, N, M, scale, E: tl.constexpr, D: tl.constexpr,
    SAME: tl.constexpr, CAUSAL: tl.constexpr, TRUNCATE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The keys in [begin, end) by a known shift: ``(sum_j e_ij v_j, sum_j e_ij)``, the latter in eight parts: the
    columns that different threads of a tensor core's result hold."""
    keys = tl.arange(0, BN)
    k += tl.cast(begin, tl.int64) * E
    v += tl.cast(begin, tl.int64) * D
    for start in tl.range(begin, end, BN, num_stages=1 if MASKED else None):
        ks = load_points(k, keys, tl.arange(0, BE), M - start, E, BE, MASKED)
        vs = ks if SAME else load_points(v, keys, tl.arange(0, BD), M - start, D, BD, MASKED)
        s = dot(q, tl.trans(ks), tl.zeros((BM, BN), tl.float32), PRECISION)
        e = tl.exp2(s * scale - shift)
        if MASKED:
            e = tl.where(sees(rows[:, None], (start + keys)[None, :], N, M, CAUSAL), e, 0.0)
        if TRUNCATE:
            e = truncated(e)
        total += tl.sum(tl.reshape(e, (BM, BN // 8, 8)), 1)
        u = dot(rounded(e, vs.dtype), vs, u, PRECISION)
        k += BN * E
        v += BN * D
    return u, total


@triton.jit
def wide_forward_kernel(
    x, q, k, v, y, saved_u, saved_shift, saved_total, beta_pointer, beta, step_pointer, step, eps, N, M,
    D: tl.constexpr, E: tl.constexpr, SAME: tl.constexpr, CAUSAL: tl.constexpr, FIXED: tl.constexpr,
    SOFTMAX: tl.constexpr, DIRECTION: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: BM queries of one batch element, and the step of their rows."""
    blocks = tl.cdiv(N, BM)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    begin = (blocks - 1 - tl.program_id(0) % blocks) * BM  # causal rows that see most come first
    rows = begin + tl.arange(0, BM)
    number = read_number(beta_pointer, beta)
    scale = number * LOG2_E
    at = batch * N + rows
    qs = load_points(q + (batch * N + begin) * E, tl.arange(0, BM), tl.arange(0, BE), N - begin, E, BE, True)
    k += batch * M * E
    v += batch * M * D
    whole = (tl.minimum(begin + 1, M) if CAUSAL else M) // BN * BN
    end = tl.minimum(begin + BM, M) if CAUSAL else M
    again = True
    u, total = tl.zeros((BM, BD), tl.float32), tl.zeros((BM,), tl.float32)
    most = tl.full((BM,), -float("inf"), tl.float32)
    if FIXED:
        one = load_points(x + batch * N * D, tl.arange(0, 1), tl.arange(0, BD), N, D, BD, True).to(tl.float32)
        shift = tl.sum(one * one) * tl.abs(scale)
        parts = tl.zeros((BM, 8), tl.float32)
        TRUNCATE: tl.constexpr = SOFTMAX and SAME and not CAUSAL and BD <= 128  # backward is wide_points_kernel
        u, parts = _attend_fixed(
            qs, u, parts, shift, k, v, 0, whole, rows, N, M, scale,
            E, D, SAME, CAUSAL, TRUNCATE, False, PRECISION, BM, BN, BE, BD,
        )  # fmt: skip
        u, parts = _attend_fixed(
            qs, u, parts, shift, k, v, whole, end, rows, N, M, scale,
            E, D, SAME, CAUSAL, TRUNCATE, True, PRECISION, BM, BN, BE, BD,
        )  # fmt: skip
        total, most = tl.sum(parts, 1), tl.full((BM,), 0.0, tl.float32) + shift
        again = not fits(total, rows < N)
    if again:
        u, total = tl.zeros((BM, BD), tl.float32), tl.zeros((BM,), tl.float32)
        most = tl.full((BM,), -float("inf"), tl.float32)
        u, total, most = _attend(
            qs, u, total, most, k, v, 0, whole, rows, N, M, scale,
            E, D, SAME, CAUSAL, False, PRECISION, BM, BN, BE, BD,
        )  # fmt: skip
        u, total, most = _attend(
            qs, u, total, most, k, v, whole, end, rows, N, M, scale,
            E, D, SAME, CAUSAL, True, PRECISION, BM, BN, BE, BD,
        )  # fmt: skip
    total = save_statistics(saved_shift, saved_total, at, rows < N, most, total, M, SOFTMAX, x.dtype.element_ty)
    u /= total[:, None]
    move_and_store(u, x, y, saved_u, step_pointer, step, eps, at, rows < N, tl.arange(0, BD), D, DIRECTION, STEP)
