"""The gradient of a weight: dW = c A^T B, a sum over the tokens.

A (M, P) is the gradient of the layer's output, B (M, Q) its input: 2 M P Q FLOP. Where dW has too few tiles for the
device the tokens are cut into parts, each with a float32 result of its own, which are then summed: no atomics, the same
bits every time. Otherwise dW is rounded once, in the kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, launch
from .emulation import rounded
from .product import precision, product, tile_at
from .tiles import splits, tile

__all__ = ["weight_gradient"]


@triton.jit(do_not_specialize=["M", "part"])
def weight_gradient_kernel(
    left, right, out, c, M, P, Q, part, left_stride, right_stride, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program: one tile of one part; out is (parts, P, Q)."""
    tiles = tl.cdiv(P, BM) * tl.cdiv(Q, BN)
    index = tl.program_id(0) // tiles
    tile_row, tile_column = tile_at(tl.program_id(0) % tiles, P, Q, BM, BN, GROUP)
    rows = tile_row * BM + tl.arange(0, BM)
    columns = tile_column * BN + tl.arange(0, BN)
    begin = index * part
    end = min(begin + part, M)
    dw = c * product(left, right, rows, columns, P, Q, begin, end, 1, left_stride, right_stride, 1,
                     BM, BN, BK, PRECISION)  # fmt: skip
    at = (index * tl.cast(P, tl.int64) + rows)[:, None] * Q + columns[None, :]
    tl.store(out + at, rounded(dw, out.dtype.element_ty), (rows < P)[:, None] & (columns < Q)[None, :])


def weight_gradient(left: Tensor, right: Tensor, c: float = 1.0) -> Tensor:
    """``c left^T right``, (P, Q), of ``left (M, P)`` and ``right (M, Q)``, equal dtypes, last dimensions gapless."""
    (count, p), q = left.shape, right.shape[1]
    t = tile("weight", left.dtype, left.device, p, q, count)
    tiles = t.count(p, q)
    parts = splits(tiles, count, left.device)
    part = ceil_div(ceil_div(count, parts), t.BK) * t.BK
    parts = max(ceil_div(count, max(part, 1)), 1)
    out = torch.empty((parts, p, q), dtype=left.dtype if parts == 1 else torch.float32, device=left.device)
    launch(
        weight_gradient_kernel, parts * tiles, left.device,
        left, right, out, c, count, p, q, part, left.stride(0), right.stride(0),
        PRECISION=precision(left.dtype), **t.constants(),
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)
