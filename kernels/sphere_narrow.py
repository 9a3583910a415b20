"""The passes of ``sphere_attend_step`` for few channels, without matrix products: a thread owns a few points, their
coordinates and sums, and meets the others one after the other.

A tile is (others, owners): the owners lie along the threads, the others along a thread's registers, so that the sums
over the others need no exchange between threads, and what is read of the others is the same for a whole warp. The
coordinates of points are tuples of vectors, one a channel, so that no channel is padded.
"""

import triton
import triton.language as tl

from .sphere_rows import add_or_store, fits, magnitude, move_and_store, read_number, save_statistics, shift_of, signed

__all__ = ["narrow_forward_kernel", "narrow_keys_kernel", "narrow_queries_kernel"]


@triton.jit
def _points(p, rows, inside, D: tl.constexpr):
    """The coordinates of rows of ``p (any, D)``; all of them are there where ``inside`` is None."""
    at = p + rows * D
    found = ()
    for c in tl.static_range(D):
        found = found + (tl.load(at + c, inside, None if inside is None else 0.0).to(tl.float32),)
    return found


@triton.jit
def _four(p, D: tl.constexpr):
    """The first four rows of ``p (any, D)`` as points of numbers, by D reads of 16 bytes."""
    numbers = ()
    for i in tl.static_range(D):
        even, odd = tl.split(tl.reshape(tl.load(p + 4 * i + tl.arange(0, 4)), (2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        numbers = numbers + (first, second, third, fourth)
    points = ()
    for r in tl.static_range(4):
        point = ()
        for c in tl.static_range(D):
            point = point + (numbers[r * D + c],)
        points = points + (point,)
    return points


@triton.jit
def _zeros(COUNT: tl.constexpr, D: tl.constexpr):
    found = ()
    for _ in tl.static_range(D):
        found = found + (tl.zeros((COUNT,), tl.float32),)
    return found


@triton.jit
def _signed(points, number, D: tl.constexpr):
    found = ()
    for c in tl.static_range(D):
        found = found + (signed(points[c], number),)
    return found


@triton.jit
def _products(others, owners, D: tl.constexpr):
    """``<other, owner>`` (others, owners), the same bits if they change places: which of two products is rounded is
    not left to the compiler, whose loops over whole and over masked blocks would differ."""
    found = others[0][:, None] * owners[0][None, :]
    for c in tl.static_range(1, D):
        found = tl.fma(others[c][:, None], owners[c][None, :], found)
    return found


@triton.jit
def _plus(sums, weights, others, D: tl.constexpr):
    """``sums + sum over the others of weights others``; the new terms are added to each other first."""
    found = ()
    for c in tl.static_range(D):
        found = found + (sums[c] + tl.sum(weights * others[c][:, None], 0),)
    return found


@triton.jit
def _times(points, factor, D: tl.constexpr):
    found = ()
    for c in tl.static_range(D):
        found = found + (points[c] * factor,)
    return found


@triton.jit
def _tile(points, columns, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """The coordinates as (BM, BD), ``columns`` from D on are 0."""
    found = tl.zeros((BM, BD), tl.float32)
    for c in tl.static_range(D):
        found = tl.where(columns[None, :] == c, points[c][:, None], found)
    return found


@triton.jit
def _store(p, rows, inside, points, D: tl.constexpr, ADD: tl.constexpr):
    for c in tl.static_range(D):
        add_or_store(p + rows * D + c, points[c], inside, ADD)


# -- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    q, u, total, most, k, v, begin, end, rows, M, scale,
    E: tl.constexpr, D: tl.constexpr, SAME: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys in [begin, end): ``(sum_j e_ij v_j, sum_j e_ij, max_j t_ij)``."""
    for start in range(begin, end, BN):
        keys = tl.arange(0, BN)
        first = tl.cast(start, tl.int64)
        inside = (keys < M - start) if MASKED else None
        ks = _points(k + first * E, keys, inside, E)
        s = _products(ks, q, E)
        if MASKED:
            seen = (start + keys)[:, None] < M
            if CAUSAL:
                seen = seen & ((start + keys)[:, None] <= rows[None, :])
            here = tl.max(tl.where(seen, s * scale, -float("inf")), 0)
        else:
            here = tl.max(s, 0) * scale
        new = tl.maximum(most, here)
        shift = shift_of(new)
        e = tl.exp2(s * scale - shift[None, :])
        if MASKED:
            e = tl.where(seen, e, 0.0)
        again = tl.exp2(most - shift)
        total = total * again + tl.sum(e, 0)
        vs = ks if SAME else _points(v + first * D, keys, inside, D)
        u = _plus(_times(u, again, D), e, vs, D)
        most = new
    return u, total, most


@triton.jit
def _with_one(owners, one, D: tl.constexpr):
    """``<owner, one>`` (owners,), ``one`` a point of numbers or of vectors, as :func:`_products` would have it."""
    found = one[0] * owners[0]
    for c in tl.static_range(1, D):
        found = tl.fma(owners[c], one[c], found)
    return found


@triton.jit
def _plus_row(points, factor, others, D: tl.constexpr):
    found = ()
    for c in tl.static_range(D):
        found = found + (points[c] + factor * others[c],)
    return found


@triton.jit
def _attend_fixed(
    q, u, total, shift, k, v, end, scale, E: tl.constexpr, D: tl.constexpr, SAME: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys in [0, end), a multiple of BN, by known shifts: ``(sum_j e_ij v_j, sum_j e_ij)``. They are met one by
    one, which takes a third of a tile's registers, so that a processor holds more warps."""
    for _ in range(0, end, BN):
        here, terms = tl.zeros((BM,), tl.float32), _zeros(BM, D)
        for four in tl.static_range(0, BN, 4):
            ks = _four(k + four * E, E)
            vs = ks if SAME else _four(v + four * D, D)
            for r in tl.static_range(4):
                e = tl.exp2(_with_one(q, ks[r], E) * scale - shift)
                here += e
                terms = _plus_row(terms, e, vs[r], D)
        total += here
        u = _plus_row(u, 1.0, terms, D)
        k += BN * E
        v += BN * D
    return u, total


@triton.jit
def _attend_fours(
    q, u, total, most, k, v, begin, end, rows, M, scale,
    E: tl.constexpr, D: tl.constexpr, SAME: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The keys in [begin, end) as :func:`_attend` would, by fours: what the known shifts leave, in few registers."""
    for start in range(begin, end, 4):
        values, s, looks, new = (), (), (), most
        for r in tl.static_range(4):
            at, there = tl.cast(start + r, tl.int64), start + r < M
            ks = _points(k, at, there, E)
            values = values + ((ks if SAME else _points(v, at, there, D)),)
            seen = there & (start + r <= rows) if CAUSAL else there
            s, looks = s + (_with_one(q, ks, E),), looks + (seen,)
            new = tl.maximum(new, tl.where(seen, s[r] * scale, -float("inf")))
        shift = shift_of(new)
        again = tl.exp2(most - shift)
        total *= again
        u = _times(u, again, D)
        for r in tl.static_range(4):
            e = tl.where(looks[r], tl.exp2(s[r] * scale - shift), 0.0)  # rounded once, as the backward pass does
            total += e
            u = _plus_row(u, e, values[r], D)
        most = new
    return u, total, most


@triton.jit
def narrow_forward_kernel(
    x, q, k, v, y, saved_u, saved_shift, saved_total, beta_pointer, beta, step_pointer, step, eps, N, M,
    D: tl.constexpr, E: tl.constexpr, SAME: tl.constexpr, CAUSAL: tl.constexpr, FIXED: tl.constexpr,
    SOFTMAX: tl.constexpr, DIRECTION: tl.constexpr, STEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program: BM queries of one batch element, and the step of their rows."""
    blocks = tl.cdiv(N, BM)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    begin = (blocks - 1 - tl.program_id(0) % blocks) * BM  # causal rows that see most come first
    rows = begin + tl.arange(0, BM)
    number = read_number(beta_pointer, beta)
    scale = magnitude(number)
    at = batch * N + rows
    qs = _signed(_points(q, at, rows < N, E), number, E)
    k += batch * M * E
    v += batch * M * D
    u, total = _zeros(BM, D), tl.zeros((BM,), tl.float32)
    most = tl.full((BM,), -float("inf"), tl.float32)
    whole = (tl.minimum(begin + 1, M) if CAUSAL else M) // BN * BN
    end = tl.minimum(begin + BM, M) if CAUSAL else M
    if FIXED:
        most = _with_one(qs, qs, E) * scale
        u, total = _attend_fixed(qs, u, total, most, k, v, whole, scale, E, D, SAME, BM, BN)
        fit = fits(total, rows < N)
        if not fit:
            u, total = _zeros(BM, D), tl.zeros((BM,), tl.float32)
            most = tl.full((BM,), -float("inf"), tl.float32)
        met = tl.where(fit, whole, 0)
        u, total, most = _attend_fours(qs, u, total, most, k, v, met, end, rows, M, scale, E, D, SAME, CAUSAL)
    else:
        u, total, most = _attend(qs, u, total, most, k, v, 0, whole, rows, M, scale, E, D, SAME, CAUSAL, False, BN)
        u, total, most = _attend(qs, u, total, most, k, v, whole, end, rows, M, scale, E, D, SAME, CAUSAL, True, BN)
    columns = tl.arange(0, BD)
    total = save_statistics(saved_shift, saved_total, at, rows < N, most, total, M, SOFTMAX, x.dtype.element_ty)
    u = _tile(u, columns, D, BM, BD) / total[:, None]
    move_and_store(u, x, y, saved_u, step_pointer, step, eps, at, rows < N, columns, D, DIRECTION, STEP)


# -- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _along_keys(
    q, g, offset, shift, dq, excess, slope, k, v, begin, end, rows, M, scale, E: tl.constexpr, D: tl.constexpr,
    SAME: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, NEED_Q: tl.constexpr,
    NEED_BETA: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys in [begin, end): ``(sum_j a_ij k_j, sum_j a_ij, sum_j a_ij <q_i, k_j>)``."""
    for start in range(begin, end, BN):
        keys = tl.arange(0, BN)
        first = tl.cast(start, tl.int64)
        inside = (keys < M - start) if MASKED else None
        ks = _points(k + first * E, keys, inside, E)
        s = _products(ks, q, E)
        e = tl.exp2(s * scale - shift[None, :])
        if MASKED:
            seen = (start + keys)[:, None] < M
            if CAUSAL:
                seen = seen & ((start + keys)[:, None] <= rows[None, :])
            e = tl.where(seen, e, 0.0)
        vs = ks if SAME else _points(v + first * D, keys, inside, D)
        a = e * (_products(vs, g, D) - offset[None, :])
        excess += tl.sum(a, 0)
        if NEED_BETA:
            slope += tl.sum(a * s, 0)
        if NEED_Q:
            dq = _plus(dq, a, ks, E)
    return dq, excess, slope


@triton.jit
def _over_keys(
    q, g, offset, shift, dq, excess, slope, k, v, whole, end, rows, M, scale, E: tl.constexpr, D: tl.constexpr,
    SAME: tl.constexpr, CAUSAL: tl.constexpr, NEED_Q: tl.constexpr, NEED_BETA: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys in [0, end): those before ``whole`` are there and seen by every row."""
    dq, excess, slope = _along_keys(
        q, g, offset, shift, dq, excess, slope, k, v, 0, whole, rows, M, scale,
        E, D, SAME, CAUSAL, False, NEED_Q, NEED_BETA, BN,
    )  # fmt: skip
    return _along_keys(
        q, g, offset, shift, dq, excess, slope, k, v, whole, end, rows, M, scale,
        E, D, SAME, CAUSAL, True, NEED_Q, NEED_BETA, BN,
    )  # fmt: skip


@triton.jit
def narrow_queries_kernel(
    q, k, v, g, u, shift, total, offset, apart, grad_q, slopes, beta_pointer, beta, N, M,
    D: tl.constexpr, E: tl.constexpr, SAME: tl.constexpr, CAUSAL: tl.constexpr, SETTLE: tl.constexpr,
    NEED_Q: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program: BM queries of one batch element. See ``wide_queries_kernel``."""
    blocks = tl.cdiv(N, BM)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    begin = (blocks - 1 - tl.program_id(0) % blocks) * BM
    rows = begin + tl.arange(0, BM)
    inside = rows < N
    at = batch * N + rows
    number = read_number(beta_pointer, beta)
    scale = magnitude(number)
    qs = _signed(_points(q, at, inside, E), number, E)
    gs = _points(g, at, inside, D)
    shifts = tl.load(shift + at, inside, 0.0)
    d = tl.load(offset + at, inside, 0.0)
    k += batch * M * E
    v += batch * M * D
    whole = (tl.minimum(begin + 1, M) if CAUSAL else M) // BN * BN
    end = tl.minimum(begin + BM, M) if CAUSAL else M
    dq, excess, slope = _zeros(BM, E), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if SETTLE == "before":
        _, excess, _ = _over_keys(
            qs, gs, d, shifts, dq, excess, slope, k, v, whole, end, rows, M, scale, E, D, SAME, CAUSAL, False, False, BN
        )
        d += excess / tl.load(total + at, inside, 1.0)
        tl.store(offset + at, d, inside)
    if NEED_Q:
        excess = tl.zeros((BM,), tl.float32)
        dq, excess, slope = _over_keys(
            qs, gs, d, shifts, dq, excess, slope, k, v, whole, end, rows, M, scale,
            E, D, SAME, CAUSAL, True, slopes is not None, BN,
        )  # fmt: skip
        if SETTLE == "after":
            dq = _plus_row(dq, -excess, _points(u, at, inside, E), E)
            tl.store(offset + at, d + excess / tl.load(total + at, inside, 1.0), inside)
        if slopes is not None:
            tl.store(slopes + at, signed(slope, number), inside)
        if grad_q is not None:
            _store(grad_q, at, inside, _times(dq, number, E), E, ADD)


@triton.jit
def _along_queries(
    k, v, dk, dv, q, g, shift, offset, begin, end, keys, N, scale, E: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The queries in [begin, end): ``(sum_i a_ij q_i, sum_i e_ij g_i)``."""
    for start in range(begin, end, BN):
        rows = tl.arange(0, BN)
        first = tl.cast(start, tl.int64)
        inside = (rows < N - start) if MASKED else None
        other = 0.0 if MASKED else None
        qs, gs = _points(q + first * E, rows, inside, E), _points(g + first * D, rows, inside, D)
        shifts = tl.load(shift + first + rows, inside, other)
        e = tl.exp2(_products(qs, k, E) * scale - shifts[:, None])
        if MASKED:
            seen = (start + rows)[:, None] < N
            if CAUSAL:
                seen = seen & ((start + rows)[:, None] >= keys[None, :])
            e = tl.where(seen, e, 0.0)
        if NEED_V:
            dv = _plus(dv, e, gs, D)
        if NEED_K:
            offsets = tl.load(offset + first + rows, inside, other)
            dk = _plus(dk, e * (_products(gs, v, D) - offsets[:, None]), qs, E)
    return dk, dv


@triton.jit
def narrow_keys_kernel(
    q, k, v, g, shift, offset, apart, grad_k, grad_v, beta_pointer, beta, N, M,
    D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, ADD_K: tl.constexpr, ADD_V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program: BM keys of one batch element. See ``wide_keys_kernel``."""
    blocks = tl.cdiv(M, BM)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    begin = tl.program_id(0) % blocks * BM
    keys = begin + tl.arange(0, BM)
    inside = keys < M
    at = batch * M + keys
    number = read_number(beta_pointer, beta)
    scale = magnitude(number)
    ks = _signed(_points(k, at, inside, E), number, E)
    vs = _points(v, at, inside, D)
    q += batch * N * E
    g += batch * N * D
    shift += batch * N
    offset += batch * N
    dk, dv = _zeros(BM, E), _zeros(BM, D)
    first = tl.minimum(begin // BN * BN, N) if CAUSAL else 0
    border = tl.minimum(tl.cdiv(begin + BM - 1, BN) * BN, N) if CAUSAL else 0
    whole = tl.maximum(N // BN * BN, border)
    if CAUSAL:
        dk, dv = _along_queries(
            ks, vs, dk, dv, q, g, shift, offset, first, border, keys, N, scale, E, D, CAUSAL, True, NEED_K, NEED_V, BN
        )
    dk, dv = _along_queries(
        ks, vs, dk, dv, q, g, shift, offset, border, whole, keys, N, scale, E, D, CAUSAL, False, NEED_K, NEED_V, BN
    )
    dk, dv = _along_queries(
        ks, vs, dk, dv, q, g, shift, offset, whole, N, keys, N, scale, E, D, CAUSAL, True, NEED_K, NEED_V, BN
    )
    if ADD_K and ADD_V:  # both are x's
        dv = _plus_row(dv, number, dk, D)
    elif NEED_K:
        _store(grad_k, at, inside, _times(dk, number, E), E, ADD_K)
    if NEED_V or (ADD_K and ADD_V):
        _store(grad_v, at, inside, dv, D, ADD_V)
