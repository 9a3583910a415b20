"""What the attention kernels share: the call as they see it, their tiles, and the pieces of a score.

    S_ij = scale q_i k_j + what the masks add,  -inf where they, ``causal`` or another sequence hide key j from query i

Scores are exponents of 2: log2(e) lies in the scale, so that a weight is one instruction of the special function unit.
A tile of scores has queries along one axis and keys along the other, in either order: ``i`` and ``j`` broadcast. Only
tiles on the diagonal or at a border look at what is hidden by position (``MASKED``), the others skip it.

Queries, keys and values are read where they lie side by side in their projections: token t of sequence b is row b T +
t, head h begins at channel h HEAD. HEAD need not be a power of two: HD, the next one from 16 on, is what is computed.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, power_of_2, target
from .dropout import Dropout
from .slices import joined
from .tiles import Tile, precision

__all__ = [
    "WIDEST_HEAD",
    "Attention",
    "dropout_factor",
    "exponents",
    "hidden",
    "keys_of",
    "load_rows",
]

WIDEST_HEAD = 256
LOG2E = tl.constexpr(math.log2(math.e))

# (architecture, bytes of an operand) -> kernel -> HD -> tiles, the largest first: BM queries by BN keys. Not yet tuned
# by measurement: chosen so that on sm_90 the 16-bit kernels use wgmma and spill no register at 64 and 128, which a test
# checks. Masks take registers, and the generator's words for dropout take more: rows of their own where that matters.
ATTENTION_TILES: dict[tuple[str, int], dict[str, dict[int, tuple[Tile, ...]]]] = {
    ("sm90", 2): {
        "forward": {
            **dict.fromkeys((16, 32, 64), (Tile(128, 128, 0, 8, 3), Tile(64, 64, 0, 4, 3))),
            128: (Tile(128, 64, 0, 8, 3), Tile(64, 64, 0, 4, 2)),
            256: (Tile(128, 64, 0, 8, 2),),
        },
        "queries": {
            **dict.fromkeys((16, 32, 64), (Tile(128, 64, 0, 8, 2), Tile(64, 64, 0, 4, 2))),
            128: (Tile(128, 32, 0, 8, 2),),
            256: (Tile(64, 32, 0, 8, 2),),
        },
        "keys": {
            **dict.fromkeys((16, 32, 64), (Tile(64, 128, 0, 8, 2), Tile(64, 64, 0, 4, 2))),
            128: (Tile(32, 128, 0, 8, 2),),
            256: (Tile(16, 64, 0, 8, 2),),
        },
        "forward_masked": {
            **dict.fromkeys((16, 32, 64), (Tile(128, 64, 0, 8, 2), Tile(64, 64, 0, 4, 2))),
            128: (Tile(128, 32, 0, 8, 2),),
            256: (Tile(64, 32, 0, 8, 2),),
        },
        "keys_masked": {
            **dict.fromkeys((16, 32, 64), (Tile(32, 128, 0, 8, 2),)),
            128: (Tile(16, 128, 0, 8, 2),),
            256: (Tile(16, 64, 0, 8, 2),),
        },
        "forward_dropout": {
            **dict.fromkeys((16, 32, 64, 128), (Tile(128, 32, 0, 8, 2),)),
            256: (Tile(64, 32, 0, 8, 2),),
        },
        "queries_dropout": {
            **dict.fromkeys((16, 32, 64, 128), (Tile(128, 32, 0, 8, 2),)),
            256: (Tile(64, 16, 0, 8, 2),),
        },
        "keys_dropout": {
            **dict.fromkeys((16, 32, 64), (Tile(16, 128, 0, 8, 2),)),
            **dict.fromkeys((128, 256), (Tile(16, 64, 0, 8, 2),)),
        },
    },
    ("sm80", 2): {
        "forward": {
            **dict.fromkeys((16, 64), (Tile(128, 64, 0, 8, 2), Tile(64, 64, 0, 4, 2))),
            32: (Tile(64, 64, 0, 4, 2),),
            128: (Tile(128, 32, 0, 8, 2),),
            256: (Tile(32, 32, 0, 4, 2),),
        },
        "queries": {
            **dict.fromkeys((16, 32, 64), (Tile(64, 32, 0, 4, 2),)),
            128: (Tile(64, 32, 0, 8, 2),),
            256: (Tile(32, 16, 0, 4, 2),),
        },
        "keys": {
            **dict.fromkeys((16, 32, 64), (Tile(32, 64, 0, 4, 2),)),
            128: (Tile(32, 64, 0, 8, 2),),
            256: (Tile(16, 32, 0, 4, 2),),
        },
        "keys_masked": {
            **dict.fromkeys((16, 32), (Tile(32, 64, 0, 4, 2),)),
            64: (Tile(32, 32, 0, 4, 2),),
            128: (Tile(32, 64, 0, 8, 2),),
            256: (Tile(32, 32, 0, 8, 2),),
        },
        "forward_dropout": {
            **dict.fromkeys((16, 32, 64), (Tile(128, 32, 0, 8, 2),)),
            128: (Tile(64, 64, 0, 8, 2),),
            256: (Tile(64, 32, 0, 8, 2),),
        },
        "queries_dropout": {
            **dict.fromkeys((16, 32, 64), (Tile(64, 32, 0, 4, 2),)),
            128: (Tile(64, 32, 0, 8, 2),),
            256: (Tile(32, 32, 0, 8, 2),),
        },
        "keys_dropout": {
            **dict.fromkeys((16, 32, 64, 128), (Tile(32, 32, 0, 4, 2),)),
            256: (Tile(16, 32, 0, 8, 2),),
        },
    },
    ("gfx942", 2): {
        "forward": {
            **dict.fromkeys((16, 32, 64), (Tile(128, 64, 0, 4, 1), Tile(64, 64, 0, 4, 1))),
            128: (Tile(64, 64, 0, 4, 1),),
            256: (Tile(32, 32, 0, 4, 1),),
        },
        "queries": {
            **dict.fromkeys((16, 32, 64), (Tile(64, 64, 0, 4, 1),)),
            128: (Tile(64, 32, 0, 4, 1),),
            256: (Tile(32, 16, 0, 4, 1),),
        },
        "keys": {
            **dict.fromkeys((16, 32, 64), (Tile(64, 64, 0, 4, 1),)),
            128: (Tile(32, 64, 0, 4, 1),),
            256: (Tile(16, 32, 0, 4, 1),),
        },
    },
}
# float32: tensor cores in tf32, fused multiply-adds in ieee, which want small tiles.
_small, _smallest = (Tile(32, 32, 0, 4, 1),), (Tile(16, 16, 0, 4, 1),)
_float32 = {**dict.fromkeys((16, 32, 64), _small), **dict.fromkeys((128, 256), _smallest)}
ATTENTION_TILES["sm80", 4] = dict.fromkeys(("forward", "queries", "keys"), _float32)
for _bytes in (2, 4):  # the interpreter on the CPU: a program costs milliseconds, its arithmetic little
    _tiles = dict.fromkeys((16, 32, 64, 128, 256), (Tile(64, 64, 0, 4, 1),))
    ATTENTION_TILES["emulated", _bytes] = dict.fromkeys(("forward", "queries", "keys"), _tiles)
ATTENTION_TILES["sm100", 2] = ATTENTION_TILES["sm90", 2]
for _architecture in ("sm90", "sm100", "gfx942"):
    ATTENTION_TILES[_architecture, 4] = ATTENTION_TILES["sm80", 4]


class Attention(NamedTuple):
    """One call's attention."""

    batch: int
    queries: int  # T, of each sequence
    keys: int  # S
    heads: int  # H
    kv_heads: int
    head_dim: int
    scale: float
    causal: bool
    mask: Tensor | None  # (B, H, T, S), broadcast by strides of 0
    padding: Tensor | None  # (B, S)
    spans: Tensor | None  # (T, 2) int32: where the sequence of each token begins and ends
    dropout: Dropout

    @property
    def one_key(self) -> bool:
        """No query sees more than one key: the weights are constants, and nothing has a gradient through a score."""
        return min(self.keys, self.queries if self.causal else self.keys) <= 1

    def arguments(self) -> tuple:
        """What every kernel takes, in this order."""
        mask_strides = (0,) * 4 if self.mask is None else self.mask.stride()
        padding_strides = (0,) * 2 if self.padding is None else self.padding.stride()
        return (
            self.scale * LOG2E.value, self.queries, self.keys, self.heads, self.heads // self.kv_heads,
            _readable(self.mask), _readable(self.padding), self.spans, *mask_strides, *padding_strides, *self.dropout,
        )  # fmt: skip

    def constants(self, tile: Tile, dtype: torch.dtype) -> dict:
        """Their constants."""
        return {
            "DROP": self.dropout.drops,
            "CAUSAL": self.causal,
            "FOLD": self.scale > 0.0 and self.mask is None and self.padding is None,
            "HEAD": self.head_dim,
            "HD": self.padded_head,
            "PRECISION": precision(dtype),
            "BM": tile.BM,
            "BN": tile.BN,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    @property
    def widths(self) -> tuple[int, int]:
        """The channels of all heads of queries, and of keys."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def padded_head(self) -> int:
        return max(16, power_of_2(self.head_dim))

    def tile(self, kernel: str, dtype: torch.dtype, device: torch.device) -> Tile:
        """Of "forward", "queries" or "keys"; tiles of the first two are counted over queries, the last over keys."""
        on = target(device)
        table = ATTENTION_TILES[on.architecture, dtype.itemsize]
        masked = self.mask is not None or self.padding is not None
        use = kernel + ("_dropout" if self.dropout.drops else "_masked" if masked else "")
        tiles = table.get(use, table[kernel])[self.padded_head]
        heads = self.batch * (self.kv_heads if kernel == "keys" else self.heads)

        def programs(t: Tile) -> int:
            return heads * (ceil_div(self.keys, t.BN) if kernel == "keys" else ceil_div(self.queries, t.BM))

        return next((t for t in tiles if programs(t) >= on.processors), tiles[-1])


def _readable(mask: Tensor | None) -> Tensor | None:
    """Booleans as bytes, which is what they are."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


@triton.jit
def load_rows(
    at, first, end, stride, ROWS: tl.constexpr, HEAD: tl.constexpr, HD: tl.constexpr, BOUND: tl.constexpr
):  # fmt: skip
    """ROWS rows from ``first`` on of one head, which begins at ``at``, as (ROWS, HD); zeros from row ``end`` on, unless
    not BOUND. Places within a tile are 32 bits wide and the same in every turn of a loop; its beginning has 64."""
    within = tl.arange(0, ROWS)
    rows = first + within
    channels = tl.arange(0, HD)
    where = at + tl.cast(first, tl.int64) * stride + (within[:, None] * stride + channels[None, :])
    if BOUND and HD != HEAD:
        return tl.load(where, (rows < end)[:, None] & (channels < HEAD)[None, :], 0.0)
    elif BOUND:
        return tl.load(where, (rows < end)[:, None], 0.0)
    elif HD != HEAD:
        return tl.load(where, (channels < HEAD)[None, :], 0.0)
    else:
        return tl.load(where)


@triton.jit
def keys_of(first, last, S, spans, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """``(begin, middle, end)`` for the queries from ``first`` to ``last``: they see no key outside [begin, end), and
    all of them see every key of [begin, middle), which is whole blocks of keys."""
    begin = 0
    end = S
    common = S
    if spans is not None:
        begin = tl.load(spans + first.to(tl.int64) * 2)
        common = tl.load(spans + first.to(tl.int64) * 2 + 1)
        end = tl.load(spans + last.to(tl.int64) * 2 + 1)
        # Queries of several sequences have no key in common.
        common = tl.where(tl.load(spans + last.to(tl.int64) * 2) == begin, common, begin)
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        common = tl.maximum(tl.minimum(common, first + 1), begin)
    return begin, begin + (common - begin) // BN * BN, end


@triton.jit
def exponents(
    products, i, j, T, S, scale, mask, padding, mask_i, mask_j, padding_j, FOLD: tl.constexpr
):  # fmt: skip
    """Scores times log2(e) with all that the masks add and hide; FOLD leaves the products of q and k as they are, for
    the caller to scale."""
    if FOLD:
        s = products
    else:
        s = products * scale
        if mask is not None:
            by_mask = tl.load(mask + (i.to(tl.int64) * mask_i + j.to(tl.int64) * mask_j), (i < T) & (j < S), 0)
            if mask.dtype.element_ty != tl.uint8:
                s += by_mask.to(tl.float32) * LOG2E
        if padding is not None:
            by_padding = tl.load(padding + j.to(tl.int64) * padding_j, j < S, 0)
            if padding.dtype.element_ty != tl.uint8:
                s += by_padding.to(tl.float32) * LOG2E
            else:
                s = tl.where(by_padding != 0, float("-inf"), s)
        if mask is not None:
            if mask.dtype.element_ty == tl.uint8:
                s = tl.where(by_mask != 0, float("-inf"), s)
    return s


@triton.jit
def hidden(i, j, S, of, begin, end, spans, CAUSAL: tl.constexpr):
    """Whether key j is hidden from query i by its position; ``of`` is i or j, and [begin, end) the sequence of the
    other."""
    out = (j >= S) & (i >= 0)
    if CAUSAL:
        out |= j > i
    if spans is not None:
        out |= (of < begin) | (of >= end)
    return out


@triton.jit
def _factor(position, seed, stream, p, keep):
    return tl.where(tl.rand(seed, position + stream) >= p, keep, 0.0)


@triton.jit
def dropout_factor(
    first, a_stride, b_stride, seed, stream, p, keep, A: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """What the dropout multiplies the weights by, a tile (A, B) whose elements are at ``first + a a_stride +
    b b_stride`` of the contiguous weights; by slices, so that the generator's words stay in registers."""
    a = first + tl.arange(0, A).to(tl.int64)[:, None] * a_stride
    b = tl.arange(0, B // 4).to(tl.int64)[None, :]
    w = _factor(a + b * b_stride, seed, stream, p, keep)
    x = _factor(a + (b + B // 4) * b_stride, seed, stream, p, keep)
    y = _factor(a + (b + B // 2) * b_stride, seed, stream, p, keep)
    z = _factor(a + (b + B // 4 * 3) * b_stride, seed, stream, p, keep)
    return joined(joined(w, x, A, B // 2), joined(y, z, A, B // 2), A, B)
