"""The backward pass of points among themselves, on matrix products: one look at every pair, no atomic operation.

Query, key and value are x and no row is masked, so that scores are symmetric. If all rows share one shift, so are the
numbers ``e_ij = 2^(t_ij - shift)``: the weight of j for i is ``e_ij / total_i``, of i for j ``e_ij / total_j``, and g_i
has been divided by total_i. What i gets as a query, a key and a value is then

    dx_i = beta sum_j a_ij x_j + sum_j e_ij g_j,    a_ij = e_ij (<g_i, x_j> + <x_i, g_j> - d_i - d_j)
    dbeta = 1/2 sum_ij a_ij <x_i, x_j>

five products and one exponential a pair, where a pass over queries and one over keys take seven and two. e_ij is
truncated as in forward and totals are sums of truncated weights, so ``sum_j e_ij (<g_i, x_j> - d_i)`` is 0 but for the
last bits of float32 sums, and no d_i has to be settled. Rows that forward gave a shift of their own are found by the
row kernel (``apart``): this pass then leaves at once, and those of ``sphere_backward.py`` run instead.
"""

import triton
import triton.language as tl

from .emulation import dot, rounded
from .sphere_forward import load_points
from .sphere_rows import LOG2_E, add_or_store, read_number, truncated

__all__ = ["wide_points_kernel"]


@triton.jit
def _along_points(
    xi, gi, di, dx, dv, slope, x, g, offset, begin, end, N, scale, shift, D: tl.constexpr,
    MASKED: tl.constexpr, NEED_BETA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The points in [begin, end): ``(sum_j a_ij x_j, sum_j e_ij g_j, sum_j a_ij <x_i, x_j>)``."""
    rows, columns = tl.arange(0, BN), tl.arange(0, BD)
    x += tl.cast(begin, tl.int64) * D
    g += tl.cast(begin, tl.int64) * D
    for start in tl.range(begin, end, BN, num_stages=1 if MASKED else None):
        xs = load_points(x, rows, columns, N - start, D, BD, MASKED)
        gs = load_points(g, rows, columns, N - start, D, BD, MASKED)
        s = dot(xi, tl.trans(xs), tl.zeros((BM, BN), tl.float32), PRECISION)
        e = tl.exp2(s * scale - shift)
        if MASKED:
            e = tl.where((rows < N - start)[None, :], e, 0.0)
        a = dot(gi, tl.trans(xs), tl.zeros((BM, BN), tl.float32), PRECISION)
        a = dot(xi, tl.trans(gs), a, PRECISION)
        if offset is not None:
            dj = tl.load(offset + start + rows, (rows < N - start) if MASKED else None, 0.0 if MASKED else None)
            e = truncated(e)
            a = a - di[:, None] - dj[None, :]
        dv = dot(rounded(e, gs.dtype), gs, dv, PRECISION)
        a *= e
        if NEED_BETA:
            slope += tl.sum(a * s, 1)
        dx = dot(rounded(a, xs.dtype), xs, dx, PRECISION)
        x += BN * D
        g += BN * D
    return dx, dv, slope


@triton.jit
def wide_points_kernel(
    x, g, shift, offset, apart, grad_x, slopes, beta_pointer, beta, N,
    D: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: BM points of one batch element, whose terms are added to grad_x; slopes, their terms of dbeta, and
    offset if given."""
    if tl.load(apart) != 0:
        return
    blocks = tl.cdiv(N, BM)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    begin = tl.program_id(0) % blocks * BM
    here, columns = tl.arange(0, BM), tl.arange(0, BD)
    inside = begin + here < N
    at = batch * N + begin + here
    number = read_number(beta_pointer, beta)
    x += batch * N * D
    g += batch * N * D
    xi = load_points(x + tl.cast(begin, tl.int64) * D, here, columns, N - begin, D, BD, True)
    gi = load_points(g + tl.cast(begin, tl.int64) * D, here, columns, N - begin, D, BD, True)
    di = tl.zeros((BM,), tl.float32)
    if offset is not None:
        di = tl.load(offset + at, inside, 0.0)
        offset += batch * N
    common = tl.load(shift + batch * N)
    dx, dv, slope = tl.zeros((BM, BD), tl.float32), tl.zeros((BM, BD), tl.float32), tl.zeros((BM,), tl.float32)
    whole = N // BN * BN
    dx, dv, slope = _along_points(
        xi, gi, di, dx, dv, slope, x, g, offset, 0, whole, N, number * LOG2_E, common,
        D, False, slopes is not None, PRECISION, BM, BN, BD,
    )  # fmt: skip
    dx, dv, slope = _along_points(
        xi, gi, di, dx, dv, slope, x, g, offset, whole, N, N, number * LOG2_E, common,
        D, True, slopes is not None, PRECISION, BM, BN, BD,
    )  # fmt: skip
    if slopes is not None:
        tl.store(slopes + at, 0.5 * slope, inside)
    to = grad_x + (at[:, None] * D + columns[None, :])
    add_or_store(to, number * dx + dv, inside[:, None] & (columns < D)[None, :], True)
