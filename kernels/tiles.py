"""Tile sizes as data: which tile a product takes on which device, in which dtype and shape.

A row of the table is tried from its first tile on: the first that gives every processor of the device at least one is
taken, else the last. A large tile reads least, a small one keeps the device busy when there are few rows.
``sm80`` has the tiles that also fit consumer GPUs with 100 KiB of shared memory. Not yet tuned by measurement:
chosen so that on sm_90 the 16-bit products use wgmma without spilling a register, which a test checks.
"""

import functools
from typing import NamedTuple

import torch

from .device import architecture, ceil_div, processors

__all__ = ["TILES", "Tile", "splits", "tile"]


class Tile(NamedTuple):
    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    GROUP: int = 8  # rows of tiles that are walked together

    def count(self, M: int, N: int) -> int:
        return ceil_div(M, self.BM) * ceil_div(N, self.BN)

    def constants(self) -> dict[str, int]:
        """The arguments of a kernel with a main loop over k."""
        return _constants(self)[0]

    def with_slices(self) -> dict[str, int]:
        """The same for one whose epilogue works slice by slice: 16 elements a thread."""
        return _constants(self)[1]


@functools.cache
def _constants(tile: Tile) -> tuple[dict[str, int], dict[str, int]]:
    slices = max(1, min(tile.BM * tile.BN // (512 * tile.num_warps), 8))
    return tile._asdict(), {**tile._asdict(), "SLICES": slices}


# (architecture, bytes of an operand) -> product -> tiles, the largest first
TILES: dict[tuple[str, int], dict[str, tuple[Tile, ...]]] = {
    ("sm90", 2): {
        "hidden": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
        "gated": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
        "hidden_backward": (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
        "linear": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
        "weight": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
        "narrow": (Tile(128, 64, 0, 8, 3), Tile(64, 64, 0, 8, 3)),
        "narrow_dropout": (Tile(64, 64, 0, 8, 3),),
    },
    ("sm80", 2): {
        "hidden": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
        "gated": (Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 3)),
        "hidden_backward": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
        "linear": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
        "weight": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
        "narrow": (Tile(128, 32, 0, 8, 2), Tile(64, 32, 0, 8, 2)),
        "narrow_dropout": (Tile(64, 32, 0, 8, 2),),
    },
    ("gfx942", 2): {
        "hidden": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
        "gated": (Tile(128, 64, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
        "hidden_backward": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
        "linear": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
        "weight": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
        "narrow": (Tile(128, 32, 0, 8, 2), Tile(64, 32, 0, 4, 2)),
        "narrow_dropout": (Tile(64, 32, 0, 8, 2),),
    },
    # float32: tensor cores in tf32, fused multiply-adds in ieee, which want small tiles.
    ("sm80", 4): {
        "hidden": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "gated": (Tile(64, 32, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "hidden_backward": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "linear": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "weight": (Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        "narrow": (Tile(32, 32, 0, 8, 1),),
        "narrow_dropout": (Tile(32, 32, 0, 8, 1),),
    },
}
for _bytes in (2, 4):  # the interpreter on the CPU: a program costs milliseconds, its arithmetic little
    TILES["emulated", _bytes] = {
        **dict.fromkeys(("hidden", "gated", "hidden_backward", "linear", "weight"), (Tile(64, 128, 256, 8, 1, 2),)),
        **dict.fromkeys(("narrow", "narrow_dropout"), (Tile(32, 64, 0, 4, 1),)),
    }
TILES["sm100", 2] = TILES["sm90", 2]
TILES["sm90", 4] = TILES["sm100", 4] = TILES["gfx942", 4] = TILES["sm80", 4]


def tile(product: str, dtype: torch.dtype, device: torch.device, M: int, N: int) -> Tile:
    """The tile of a product with an (M, N) result and operands of ``dtype``."""
    return _tile(product, dtype.itemsize, architecture(device), processors(device), M, N)


@functools.lru_cache(4096)
def _tile(product: str, itemsize: int, architecture: str, processors: int, M: int, N: int) -> Tile:
    tiles = TILES[architecture, itemsize][product]
    return next((t for t in tiles if t.count(M, N) >= processors), tiles[-1])


def splits(tiles: int, length: int, device: torch.device) -> int:
    """Into how many parts the sum of a product with few tiles is cut: enough to give every processor one, each part
    at least 512 long."""
    return max(1, min(processors(device) // max(tiles, 1), length // 512))
