"""The forward pass of ``sphere_attend_step`` on matrix products, flash attention with the step as its epilogue.

A program owns BM queries and meets the keys in blocks of BN: scores and weights never leave the chip, and where
queries, keys and values are the points themselves a block is loaded once for both products.
"""

import triton
import triton.language as tl

from .emulation import dot, rounded
from .sphere_rows import magnitude, move_and_store, read_number, save_statistics, shift_of, signed

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
    for start in range(begin, end, BN):
        first = tl.cast(start, tl.int64)
        ks = load_points(k + first * E, keys, tl.arange(0, BE), M - start, E, BE, MASKED)
        s = dot(q, tl.trans(ks), tl.zeros((BM, BN), tl.float32), PRECISION)
        if MASKED:
            seen = sees(rows[:, None], (start + keys)[None, :], N, M, CAUSAL)
            here = tl.max(tl.where(seen, s * scale, -float("inf")), 1)
        else:
            here = tl.max(s, 1) * scale
        new = tl.maximum(most, here)
        shift = shift_of(new)
        e = tl.exp2(s * scale - shift[:, None])
        if MASKED:
            e = tl.where(seen, e, 0.0)
        again = tl.exp2(most - shift)
        total = total * again + tl.sum(e, 1)
        vs = ks if SAME else load_points(v + first * D, keys, tl.arange(0, BD), M - start, D, BD, MASKED)
        u = dot(rounded(e, vs.dtype), vs, u * again[:, None], PRECISION)
        most = new
    return u, total, most


@triton.jit
def wide_forward_kernel(
    x, q, k, v, y, saved_u, saved_shift, saved_total, beta_pointer, beta, step_pointer, step, eps, N, M,
    D: tl.constexpr, E: tl.constexpr, SAME: tl.constexpr, CAUSAL: tl.constexpr, SOFTMAX: tl.constexpr,
    DIRECTION: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: BM queries of one batch element, and the step of their rows."""
    blocks = tl.cdiv(N, BM)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    begin = (blocks - 1 - tl.program_id(0) % blocks) * BM  # causal rows that see most come first
    rows = begin + tl.arange(0, BM)
    number = read_number(beta_pointer, beta)
    scale = magnitude(number)
    at = batch * N + rows
    qs = signed(
        load_points(q + (batch * N + begin) * E, tl.arange(0, BM), tl.arange(0, BE), N - begin, E, BE, True), number
    )
    k += batch * M * E
    v += batch * M * D
    u, total = tl.zeros((BM, BD), tl.float32), tl.zeros((BM,), tl.float32)
    most = tl.full((BM,), -float("inf"), tl.float32)
    whole = (tl.minimum(begin + 1, M) if CAUSAL else M) // BN * BN
    end = tl.minimum(begin + BM, M) if CAUSAL else M
    u, total, most = _attend(
        qs, u, total, most, k, v, 0, whole, rows, N, M, scale, E, D, SAME, CAUSAL, False, PRECISION, BM, BN, BE, BD
    )
    u, total, most = _attend(
        qs, u, total, most, k, v, whole, end, rows, N, M, scale, E, D, SAME, CAUSAL, True, PRECISION, BM, BN, BE, BD
    )
    total = save_statistics(saved_shift, saved_total, at, rows < N, most, total, M, SOFTMAX, x.dtype.element_ty)
    u /= total[:, None]
    move_and_store(u, x, y, saved_u, step_pointer, step, eps, at, rows < N, tl.arange(0, BD), D, DIRECTION, STEP)
