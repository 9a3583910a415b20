"""Tiles cut into slices side by side, and put together again.

An epilogue that computes on a whole accumulator keeps every intermediate of it in registers: with dropout's four words
an element that is several times what a thread has. By slices it keeps those of a slice. An accumulator of tensor cores
has its columns in each thread's registers, so that the slices are only names for them.
"""

import triton
import triton.language as tl

from .dropout import drop, keeps

__all__ = ["drop_by_slices", "joined", "slices"]


@triton.jit
def _halves(t, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(t, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def slices(t, BM: tl.constexpr, BN: tl.constexpr, COUNT: tl.constexpr):
    """``t (BM, BN)`` as COUNT tiles side by side."""
    tl.static_assert(COUNT == 1 or COUNT == 2 or COUNT == 4 or COUNT == 8)
    if COUNT == 1:
        return (t,)
    else:
        a, b = _halves(t, BM, BN)
        if COUNT == 2:
            return (a, b)
        else:
            aa, ab = _halves(a, BM, BN // 2)
            ba, bb = _halves(b, BM, BN // 2)
            if COUNT == 4:
                return (aa, ab, ba, bb)
            else:
                aaa, aab = _halves(aa, BM, BN // 4)
                aba, abb = _halves(ab, BM, BN // 4)
                baa, bab = _halves(ba, BM, BN // 4)
                bba, bbb = _halves(bb, BM, BN // 4)
                return (aaa, aab, aba, abb, baa, bab, bba, bbb)


@triton.jit
def joined(a, b, BM: tl.constexpr, BN: tl.constexpr):
    """``a`` and ``b`` (BM, BN / 2) side by side."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BM, BN))


@triton.jit
def drop_by_slices(
    x, rows, start, width, seed, stream, p, scale, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """``x (BM, BN)`` after the dropout of a tensor (any, width), where it begins in its column ``start``."""
    if DROP:
        a, b, c, d = slices(x, BM, BN, 4)
        at = start + tl.arange(0, BN // 4)
        a = drop(a, keeps(rows, at, width, seed, stream, p, DROP), scale, DROP)
        b = drop(b, keeps(rows, at + BN // 4, width, seed, stream, p, DROP), scale, DROP)
        c = drop(c, keeps(rows, at + BN // 2, width, seed, stream, p, DROP), scale, DROP)
        d = drop(d, keeps(rows, at + BN // 4 * 3, width, seed, stream, p, DROP), scale, DROP)
        x = joined(joined(a, b, BM, BN // 2), joined(c, d, BM, BN // 2), BM, BN)
    return x
