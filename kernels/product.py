"""The matrix product inside every kernel that has one: tiles in grouped order, float32 accumulation, one main loop.

    accumulator (BM, BN) = sum over k of A[m, k] B[k, n]

An operand is a matrix whose last dimension has no gaps: that of k, or that of the rows of A, the columns of B. Which
one is a constant of the kernel, so that the backward pass transposes nothing in memory. A weight whose last dimension
has gaps (the ``w.T`` of a Conv1D) is copied by :func:`as_matrix` in every call, and such a call is never replayed
(:mod:`replay`). On Hopper the loop becomes asynchronous copies into ``num_stages`` buffers and wgmma.

A persistent kernel walks over its tiles in one loop with the sum over k (``flatten``): the copies for the next tile are
under way while the epilogue of the last one runs.

A sum over k has one term at least, masked if there is none, so that the compiler sees it: for a sum of none there would
be a second copy of the epilogue, and beside accumulators that are 0 in one case ptxas lets every wgmma wait for the
last (``offline.py`` looks for that).

Descriptors: a block of an operand is then one instruction of one thread (TMA), instead of an address and a mask for
every 16 bytes, and nothing lies in registers. They are made on the host: a kernel that makes its own writes them to
memory first, about a microsecond of each program, in a buffer from an allocator that Triton keeps per context, which
is not there in the threads of a backward pass. A descriptor costs the host a few microseconds a launch, which is why
small products go without.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .emulation import dot, rounded
from .rows import aligned, alignment
from .tiles import Tile, precision

__all__ = ["as_matrix", "as_operands", "as_results", "precision", "product", "product_pair", "put", "tile_at", "turns"]


def as_matrix(w: Tensor) -> Tensor:
    """``w`` (2-d) with a last dimension without gaps, copied only if it has some."""
    return w if w.stride(1) == 1 else w.contiguous()


def _can_be_described(w: Tensor) -> bool:
    """TMA wants rows that begin at multiples of 16 bytes and do not overlap."""
    rows, columns = w.shape
    stride = w.stride(0)
    aligned = w.data_ptr() % 16 == 0 and stride * w.itemsize % 16 == 0
    return aligned and rows > 0 and stride >= columns > 0


def as_operands(a: Tensor, b: Tensor, t: Tile, a_along_k: bool, b_along_k: bool, *numbers: int, pair: bool = False):
    """``(A, B)`` and the constants of :func:`product`, or :func:`product_pair`, for matrices whose last dimension has
    no gaps; ``numbers`` are the lengths and strides of what else the kernel reads and writes."""
    constants = {"ALIGN": alignment(a.stride(0), b.stride(0), a.shape[1], b.shape[1], *numbers)}
    if not (t.DESCRIPTORS and _can_be_described(a) and _can_be_described(b)):
        return (a, b), {"DESCRIPTORS": False, **constants}
    block_a = [t.BM, t.BK] if a_along_k else [t.BK, t.BM]
    block_b = [t.BN, t.BK] if b_along_k else [t.BK, t.BN]
    described = TensorDescriptor(a, [*a.shape], [a.stride(0), 1], block_a)
    if pair:
        rows, stride = b.shape[0] // 2, b.stride(0)
        halves = TensorDescriptor(b, [2, rows, b.shape[1]], [rows * stride, stride, 1], [2, *block_b])
        return (described, halves), {"DESCRIPTORS": True, **constants}
    return (described, TensorDescriptor(b, [*b.shape], [b.stride(0), 1], block_b)), {"DESCRIPTORS": True, **constants}


def as_results(t: Tile, *results: Tensor | None, whole: int = 0):
    """Contiguous tensors as the matrices that a kernel writes by :func:`put`, and its constant STORES. Tiles must not
    reach past a multiple of ``whole`` columns, if it is given: others begin there, and nothing is masked."""
    if not t.STORES or whole % t.BN:
        return results, {"STORES": False}
    matrices = [None if w is None else w.view(-1, w.shape[-1]) for w in results]
    if not all(w is None or _can_be_described(w) for w in matrices):
        return results, {"STORES": False}
    block = [t.BM, t.BN // t.slices]
    blocks = (None if w is None else TensorDescriptor(w, [*w.shape], [w.stride(0), 1], block) for w in matrices)
    return tuple(blocks), {"STORES": True}


@triton.jit
def put(to, value, row, column, rows, columns, width, inside, STORES: tl.constexpr):
    """Writes a tile of a contiguous matrix ``(any, width)``, rounded, at ``row`` and ``column``: ``rows`` (int64) and
    ``columns``, where they are ``inside``."""
    if STORES:
        to.store([row, column], rounded(value, to.dtype))
    else:
        tl.store(to + rows[:, None] * width + columns[None, :], rounded(value, to.dtype.element_ty), inside)


@triton.jit
def turns(M, N, BM: tl.constexpr, BN: tl.constexpr, PERSISTENT: tl.constexpr):
    """``(begin, end, step)``: the tiles of this program."""
    first = tl.program_id(0)
    if PERSISTENT:
        return first, tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)
    else:
        return first, first + 1, 1


@triton.jit
def tile_at(index, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """``(row, column)`` of a tile: GROUP rows of tiles are walked column by column, so that programs that run
    together share operands in L2."""
    columns = tl.cdiv(N, BN)
    in_group = GROUP * columns
    first = index // in_group * GROUP
    height = min(tl.cdiv(M, BM) - first, GROUP)
    within = index % in_group
    return first + within % height, within // height


@triton.jit
def _block(w, stride, row, k, rows_end, k_end, ROWS: tl.constexpr, BK: tl.constexpr, ALONG_K: tl.constexpr,
           DESCRIPTORS: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """The block (ROWS, BK) of an operand at ``row``, ``k``; 0 outside."""
    if DESCRIPTORS:
        if ALONG_K:
            return w.load([row, k])
        else:
            return w.load([k, row]).T
    else:
        rows = row + tl.arange(0, ROWS)
        ks = k + tl.arange(0, BK)
        stride = aligned(stride, ALIGN)
        if ALONG_K:
            k_end = aligned(k_end, ALIGN)
            at = rows.to(tl.int64)[:, None] * stride + ks[None, :]
        else:
            rows_end = aligned(rows_end, ALIGN)
            at = rows[:, None] + ks.to(tl.int64)[None, :] * stride
        return tl.load(w + at, (rows < rows_end)[:, None] & (ks < k_end)[None, :], 0.0)


@triton.jit
def product(
    a, b, row, column, M, N, begin, end, a_stride, b_stride,
    A_ALONG_K: tl.constexpr, B_ALONG_K: tl.constexpr, DESCRIPTORS: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile that begins at ``row``, ``column`` of A B over k in [begin, end), of the whole sum or a multiple of BK
    terms."""
    accumulator = tl.zeros((BM, BN), tl.float32)
    for k in range(begin, tl.maximum(end, begin + 1), BK):
        left = _block(a, a_stride, row, k, M, end, BM, BK, A_ALONG_K, DESCRIPTORS, ALIGN)
        right = _block(b, b_stride, column, k, N, end, BN, BK, B_ALONG_K, DESCRIPTORS, ALIGN)
        accumulator = dot(left, right.T, accumulator, PRECISION)
    return accumulator


@triton.jit
def product_pair(
    a, b, row, column, M, N, K, a_stride, b_stride, DESCRIPTORS: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles at ``column`` and N columns after it side by side, both A and B with k inside: one product, as ptxas
    would let each instruction of two that take turns wait for the last."""
    accumulator = tl.zeros((BM, 2 * BN), tl.float32)
    for k in range(0, tl.maximum(K, 1), BK):
        left = _block(a, a_stride, row, k, M, K, BM, BK, True, DESCRIPTORS, ALIGN)
        if DESCRIPTORS:
            right = tl.reshape(b.load([0, column, k]), (2 * BN, BK))
        else:
            within = tl.arange(0, 2 * BN) % BN
            at = column + within + tl.where(tl.arange(0, 2 * BN) < BN, 0, N)
            ks = k + tl.arange(0, BK)
            at = at.to(tl.int64)[:, None] * aligned(b_stride, ALIGN) + ks[None, :]
            right = tl.load(b + at, (column + within < N)[:, None] & (ks < aligned(K, ALIGN))[None, :], 0.0)
        accumulator = dot(left, right.T, accumulator, PRECISION)
    return accumulator
