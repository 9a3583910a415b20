"""A product whose sum over k is cut in parts, each with a result of its own: for few tiles and a long sum.

    out[part] = c A B over the part's k        (parts, M, N)

Who asked for it adds the parts in their order, in a pass that is also the epilogue: no atomics, the same bits every
time. 2 M N K FLOP; the parts are written and read in float32, at most a tile for every processor. With one part
this is the plain product, rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import launch
from .product import as_operands, as_results, precision, product, put, tile_at, turns
from .rows import aligned
from .slices import slices
from .tiles import Tile

__all__ = ["product_parts", "sum_of_parts"]


@triton.jit(do_not_specialize=["M"])
def product_parts_kernel(
    left, right, out, c, M, N, K, part, left_stride, right_stride,
    LEFT_ALONG_K: tl.constexpr, RIGHT_ALONG_K: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ALIGN: tl.constexpr, STORES: tl.constexpr, PERSISTENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A program: one tile of one part, or where nothing is cut its share of the tiles."""
    N = aligned(N, ALIGN)
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    first, last, step = turns(M, N, BM, BN, PERSISTENT)
    for turn in tl.range(first, last, step, flatten=PERSISTENT):
        index, begin, end = 0, 0, K
        if CUT:
            index = turn // tiles
            begin = index * part
            end = min(begin + part, K)
        tile_row, tile_column = tile_at(turn % tiles, M, N, BM, BN, GROUP)
        tile = product(
            left, right, tile_row * BM, tile_column * BN, M, N, begin, end, left_stride, right_stride,
            LEFT_ALONG_K, RIGHT_ALONG_K, DESCRIPTORS, ALIGN, BM, BN, BK, PRECISION,
        )  # fmt: skip
        parts = slices(tile, BM, BN, SLICES)
        rows = tile_row * BM + tl.arange(0, BM)
        long_rows = index * tl.cast(M, tl.int64) + rows
        for i in tl.static_range(SLICES):
            begin = tile_column * BN + i * (BN // SLICES)
            at = begin + tl.arange(0, BN // SLICES)
            inside = (rows < M)[:, None] & (at < N)[None, :]
            put(out, c * parts[i], tile_row * BM, begin, long_rows, at, N, inside, STORES)


@triton.jit
def sum_of_parts(partial, parts, rows, columns, M, N, inside):
    """The tile at ``rows`` (int64), ``columns`` of the whole product, its parts added in their order."""
    at = partial + rows[:, None] * N + columns[None, :]
    total = tl.load(at, inside, 0.0)
    for _ in range(1, parts):
        at += tl.cast(M, tl.int64) * N
        total += tl.load(at, inside, 0.0)
    return total


def product_parts(
    left: Tensor, right: Tensor, along_k: tuple[bool, bool], plan: tuple[Tile, int, int], c: float = 1.0
) -> Tensor:
    """``c left right`` as ``(parts, M, N)`` by :func:`tiles.cut`'s plan: in float32, one part in the dtype of left.

    ``left`` is (M, K), or (K, M) where it is not along k, ``right`` (N, K) or (K, N)."""
    t, parts, part = plan
    M, K = left.shape if along_k[0] else left.shape[::-1]
    N = right.shape[0] if along_k[1] else right.shape[1]
    out = torch.empty((parts, M, N), dtype=left.dtype if parts == 1 else torch.float32, device=left.device)
    if parts > 1:
        t = t._replace(PERSISTENT=False)
    operands, constants = as_operands(left, right, t, *along_k, N)
    result, stores = as_results(t, out[0]) if parts == 1 and t.STORES else ((out,), {"STORES": False})
    launch(
        product_parts_kernel, parts * t.programs(M, N, left.device), left.device,
        *operands, *result, c, M, N, K, part, left.stride(0), right.stride(0),
        LEFT_ALONG_K=along_k[0], RIGHT_ALONG_K=along_k[1], CUT=parts > 1, PRECISION=precision(left.dtype),
        **constants, **stores, **t.constants(),
    )  # fmt: skip
    return out
