"""Tile sizes as data: which tile a product takes on which device, in which dtype and shape.

A row of the table is tried from its first tile on: the first that gives nearly every processor of the device one is
taken, else the last. A large tile reads least, a small one keeps the device busy when there are few rows. Where even
the tile of "few" gives too few processors work, the sum over k is cut in parts.
``sm80`` has the tiles that also fit consumer GPUs with 100 KiB of shared memory. Not yet tuned by measurement:
chosen so that on sm_90 the 16-bit products use wgmma without spilling a register, which a test checks, and that two
programs share a processor where an epilogue computes much: one multiplies while the other is in its epilogue.
"""

import functools
from typing import NamedTuple

import torch

from .device import architecture, ceil_div, processors

__all__ = ["TILES", "Tile", "cut", "tile"]

REGISTERS = 65536  # of a processor, 32 bits each


class Tile(NamedTuple):
    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    GROUP: int = 8  # rows of tiles that are walked together
    PERSISTENT: bool = False  # as many programs as the device holds, each walking over its share of the tiles
    DESCRIPTORS: bool = False  # operands come by tensor descriptors (TMA) where they can
    PARTS: int = 0  # of the sum over k, in "few" and "weight"; 0: by `_parts`
    MAXNREG: int = 0  # NVIDIA: registers of a thread at most, if the epilogue does with them; 0: as many as it wants

    def count(self, M: int, N: int) -> int:
        return ceil_div(M, self.BM) * ceil_div(N, self.BN)

    def programs(self, M: int, N: int, device: torch.device) -> int:
        """Of a product with an (M, N) result. Of a persistent one a processor gets as many as its bound on registers
        leaves room for: the epilogue of one overlaps the products of the other."""
        if not self.PERSISTENT:
            return self.count(M, N)
        together = max(REGISTERS // (32 * self.num_warps * self.MAXNREG), 1) if self.MAXNREG else 1
        return min(self.count(M, N), together * processors(device))

    def constants(self) -> dict[str, int]:
        """The arguments of a kernel with a main loop over k, whose epilogue works slice by slice: 16 elements a
        thread, 8 where registers are few."""
        return _constants(self)


@functools.cache
def _constants(tile: Tile) -> dict[str, int]:
    slices = max(1, min(tile.BM * tile.BN // ((256 if tile.MAXNREG else 512) * tile.num_warps), 8))
    names = ("BM", "BN", "BK", "num_warps", "num_stages", "GROUP", "PERSISTENT")
    bound = {"maxnreg": tile.MAXNREG} if tile.MAXNREG else {}
    return {**{name: getattr(tile, name) for name in names}, "SLICES": slices, **bound}


def _row(*tiles: Tile, **fields) -> tuple[Tile, ...]:
    """A row of the table: the fields are those of every tile but the last, which is for small products."""
    return (*(t._replace(**fields) for t in tiles[:-1]), tiles[-1])


_TMA = {"PERSISTENT": True, "DESCRIPTORS": True}
_TWO = {**_TMA, "MAXNREG": 128}  # programs of 8 warps on a processor

# (architecture, bytes of an operand) -> product -> tiles, the largest first
TILES: dict[tuple[str, int], dict[str, tuple[Tile, ...]]] = {
    ("sm90", 2): {
        "hidden": _row(Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), **_TWO),
        "gated": _row(Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 4), **_TWO),
        "hidden_backward": _row(Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), **_TWO),
        "linear": _row(Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), **_TMA),
        "linear_norm": _row(Tile(128, 256, 64, 8, 3), Tile(64, 256, 64, 8, 3), **_TMA),
        "linear_norm_dropout": (Tile(64, 256, 64, 8, 3, **_TMA),),
        "weight": _row(Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4), **_TMA),
        "few": (Tile(64, 64, 128, 4, 4),),
        "narrow": (Tile(128, 64, 0, 8, 3), Tile(64, 64, 0, 8, 3)),
        "narrow_dropout": (Tile(64, 64, 0, 8, 3),),
    },
    ("sm80", 2): {
        "hidden": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
        "gated": (Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 3)),
        "hidden_backward": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
        "linear": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
        "linear_norm": (Tile(64, 256, 32, 8, 3),),
        "linear_norm_dropout": (Tile(64, 256, 32, 8, 3),),
        "weight": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
        "few": (Tile(32, 64, 64, 4, 4),),
        "narrow": (Tile(128, 32, 0, 8, 2), Tile(64, 32, 0, 8, 2)),
        "narrow_dropout": (Tile(64, 32, 0, 8, 2),),
    },
    ("gfx942", 2): {
        "hidden": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
        "gated": (Tile(128, 64, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
        "hidden_backward": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
        "linear": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
        "linear_norm": (Tile(64, 256, 64, 8, 2),),
        "linear_norm_dropout": (Tile(64, 256, 64, 8, 2),),
        "weight": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
        "few": (Tile(32, 64, 64, 4, 2),),
        "narrow": (Tile(128, 32, 0, 8, 2), Tile(64, 32, 0, 4, 2)),
        "narrow_dropout": (Tile(64, 32, 0, 8, 2),),
    },
    # float32: tensor cores in tf32, fused multiply-adds in ieee, which want small tiles.
    ("sm80", 4): {
        "hidden": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "gated": (Tile(64, 32, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "hidden_backward": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "linear": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "linear_norm": (Tile(32, 256, 32, 8, 2),),
        "linear_norm_dropout": (Tile(32, 256, 32, 8, 2),),
        "weight": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "few": (Tile(32, 32, 32, 4, 3),),
        "narrow": (Tile(32, 32, 0, 8, 1),),
        "narrow_dropout": (Tile(32, 32, 0, 8, 1),),
    },
}
for _bytes in (2, 4):  # the interpreter on the CPU: a program costs milliseconds, its arithmetic little
    TILES["emulated", _bytes] = {
        **dict.fromkeys(TILES["sm80", 2], (Tile(64, 128, 256, 8, 1, 2),)),
        **dict.fromkeys(("linear_norm", "linear_norm_dropout"), (Tile(64, 256, 256, 8, 1, 2),)),
        **dict.fromkeys(("narrow", "narrow_dropout"), (Tile(32, 64, 0, 4, 1),)),
    }
TILES["sm100", 2] = TILES["sm90", 2]
TILES["sm90", 4] = TILES["sm100", 4] = TILES["gfx942", 4] = TILES["sm80", 4]


def tile(product: str, dtype: torch.dtype, device: torch.device, M: int, N: int, K: int) -> Tile:
    """The tile of a product with an (M, N) result, a sum over K terms, of operands of ``dtype``."""
    return _tile(product, dtype.itemsize, architecture(device), processors(device), M, N, K)


@functools.lru_cache(4096)
def _tile(product: str, itemsize: int, architecture: str, processors: int, M: int, N: int, K: int) -> Tile:
    tiles = TILES[architecture, itemsize][product]
    return next((t for t in tiles if _enough(t.count(M, N), processors)), tiles[-1])


def _enough(programs: int, processors: int) -> bool:
    """For nearly every processor: where 128 large tiles meet 132 processors, small ones would be no gain."""
    return 8 * programs >= 7 * processors


def cut(product: str, dtype: torch.dtype, device: torch.device, M: int, N: int, K: int) -> tuple[Tile, int, int]:
    """The tile of a product, into how many parts its sum over k is cut, and the length of one, a multiple of BK."""
    return _cut(product, dtype.itemsize, architecture(device), processors(device), M, N, K)


@functools.lru_cache(4096)
def _cut(product: str, itemsize: int, architecture: str, processors: int, M: int, N: int, K: int):
    tiles = TILES[architecture, itemsize][product]
    plans = [(t, t.PARTS or _parts(t, M, N, K, processors)) for t in tiles]
    t, parts = next(((t, n) for t, n in plans if _enough(n * t.count(M, N), processors)), plans[-1])
    part = max(ceil_div(ceil_div(K, parts), t.BK), 1) * t.BK
    return t, max(ceil_div(K, part), 1), part


def _parts(t: Tile, M: int, N: int, K: int, processors: int) -> int:
    """Enough to give every processor one, each long beside the writing and reading of its tile; none where a processor
    is spared less than 1024 terms, about the time of the pass that adds the parts."""
    parts = max(1, min(processors // max(t.count(M, N), 1), K // max(512, t.BM * t.BN // 8)))
    return parts if K - K // parts >= 1024 else 1
